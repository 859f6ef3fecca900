"""The package as a package: one home for metadata, fast import, assets found in a checkout and in an installed wheel."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_settings_and_pyproject_agree(settings):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == settings["lib_name"]
    assert project["project"]["requires-python"] == ">=" + settings["min_python"]
    assert project["tool"]["nbdev"]["nbs_path"] == settings["nbs_path"]
    assert project["tool"]["nbdev"]["lib_path"] == settings["lib_path"]


def test_torch_pin_is_the_same_everywhere(settings):
    pin = (ROOT / "constraints.txt").read_text().strip()
    assert pin in settings["requirements"].split()
    assert settings["npu_requirements"].split() == ["torch-npu==" + pin.split("==")[1]]


def test_torchvision_is_never_needed(settings):
    assert "torchvision" not in (ROOT / "settings.ini").read_text()
    pattern = re.compile(r"^\s*(import|from) +(torchvision|torchaudio)", re.M)
    assert not [p for p in (ROOT / "camflow").rglob("*.py") if pattern.search(p.read_text())]


def test_device_names_live_in_one_module():
    pattern = re.compile(r"""\.cuda\(\)|["'](cuda|npu)["':]""")
    assert not [str(p) for p in (ROOT / "camflow").rglob("*.py") if p.name not in ("device.py", "_modidx.py") and pattern.search(p.read_text())]


def test_import_is_fast():
    # CPU time of a fresh interpreter, the interpreter's own start subtracted; best of three because the machine is noisy
    def cpu(code):
        times = []
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
            after = os.times()
            times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return min(times)
    assert cpu("import camflow") - cpu("pass") < 0.3


def test_one_notebook_per_module():
    names = re.compile(r"#\|\s*default_exp\s+(\S+)")
    exported = [m for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts for m in names.findall(p.read_text().replace("\\n", "\n").replace('"', ""))]
    exported = [name.split("\\")[0].rstrip(",") for name in exported]
    assert len(exported) == len(set(exported)), "two notebooks export the same module"
    modules = {str(p.relative_to(ROOT / "camflow").with_suffix("")).replace("/", ".") for p in (ROOT / "camflow").rglob("*.py")
               if p.name not in ("__init__.py", "_modidx.py")}
    assert modules == set(exported)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(source archive, wheel made from it)"
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"   # a copy: a build folder left in the checkout would put deleted modules into the wheel
    for name in ("camflow", "nbs", "data/tiny", "servers", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "node_modules", "goldens"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "constraints.txt", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"], check=True, cwd=source, capture_output=True)
    archive = next(folder.glob("*.tar.gz"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(archive)], check=True)
    return archive, next(folder.glob("*.whl"))


def test_source_archive_holds_the_notebooks(built):
    with tarfile.open(built[0]) as archive: names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files", "camflow", "nbs", "servers", "data/tiny", "LICENSE", "NOTICE"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(tracked) - names == set()
    assert not [name for name in names if name.startswith(("tests/", "reports/")) or "__pycache__" in name]


def test_wheel_holds_modules_and_assets(built):
    names = zipfile.ZipFile(built[1]).namelist()
    for folder in (p.parent.name for p in (ROOT / "camflow").glob("*/__init__.py")):
        assert f"camflow/{folder}/__init__.py" in names
    for kind in ("runs", "benchmarks"):
        for notebook in (ROOT / "nbs" / kind).glob("*"):
            if notebook.suffix in (".ipynb", ".yaml"):
                assert f"camflow/_assets/{kind}/{notebook.name}" in names
    for weights in (ROOT / "data/tiny").rglob("*.safetensors"):
        assert f"camflow/_assets/tiny/{weights.relative_to(ROOT / 'data/tiny')}" in names


@pytest.mark.slow
def test_an_installed_wheel_runs_outside_of_the_repository(built, tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    bare = {k: v for k, v in os.environ.items() if k not in ("CAMFLOW_REPORTS", "PYTHONPATH")}   # else pip finds the checkout and installs nothing
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(built[1])], check=True, env=bare)
    # the requirements are borrowed from this environment; a path does not follow its link to the checkout
    env = {**bare, "PYTHONPATH": sysconfig.get_path("purelib"), "JUPYTER_PATH": str(Path(sys.prefix) / "share/jupyter"), "OMP_NUM_THREADS": "1"}
    def said(*words): return subprocess.run([str(w) for w in words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    where = said(python, "-c", "import camflow; print(camflow.__file__)").stdout
    assert where.startswith(str(tmp_path)), where
    done = said(tmp_path / "venv/bin/camflow", "run", "recam_generate", "-f", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    report = Path(done.stdout.strip())
    assert report.is_relative_to(tmp_path / "reports") and report.stat().st_size > 10_000
    assert str(ROOT) not in report.read_text(encoding="utf-8")

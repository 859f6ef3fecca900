"""Devices, generators and the environment record."""
import json
import subprocess
import sys

import pytest
import torch

from camflow import device as dev
from camflow.files import InputError


def test_device_names(monkeypatch):
    assert dev.device("cpu").type == "cpu"
    monkeypatch.setenv("CAMFLOW_DEVICE", "cpu")
    assert dev.device() == torch.device("cpu") and dev.visible_devices() == [torch.device("cpu")]
    assert dev.launcher() == "torchrun" and dev.collective_backend() == "gloo"
    for wrong in ("quantum", "meta", "cpu:x"):
        with pytest.raises(InputError, match="cpu"):
            dev.device(wrong)


def test_the_ranks_take_their_own_device(monkeypatch):
    monkeypatch.delenv("CAMFLOW_DEVICE", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert dev.device() == torch.device("xpu", 3) and dev.device("xpu:1").index == 1 and dev.device("cpu").type == "cpu"
    assert len(dev.visible_devices()) == 4 and dev.launcher() == "accelerate"
    with pytest.raises(InputError, match="4 visible"):
        dev.device("xpu:4")


def test_generator_is_named_by_its_key():
    def draw(*key):
        return torch.randn(4, generator=dev.generator(*key))

    assert torch.equal(draw(0, "noise", 1), draw(0, "noise", 1))
    keys = [(0, "noise", 1), (0, "noise", 2), (0, "data", 1), (1, "noise", 1), (0, "noise", 1, 0), ("0", "noise", 1)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)
    # golden: the same key must give the same draw in every release
    assert dev.generator(0, "noise", 1).initial_seed() == 2826978214677109370
    with pytest.raises(InputError, match="list"):
        dev.generator([1])


def test_environment_is_json_and_names_the_code():
    info = dev.env_info()
    assert json.loads(json.dumps(info)) == info
    assert info["versions"]["torch"] == torch.__version__.split("+")[0] or info["versions"]["torch"] == torch.__version__
    assert any(info["sdpa"].values()) and info["threads"] >= 1 and info["memory"]["peak_bytes"] >= info["memory"]["current_bytes"]


def test_import_names_no_device_and_stays_light():
    code = "import sys, camflow.device; assert not torch_initialised(); assert 'diffusers' not in sys.modules and 'matplotlib' not in sys.modules"
    code = "import torch\ndef torch_initialised(): return torch.cuda.is_initialized()\n" + code
    subprocess.run([sys.executable, "-c", code], check=True)


def test_assets_in_an_installed_package(tmp_path):
    "A copy of the package without the repository around it, as a wheel would install it."
    import shutil
    from pathlib import Path

    import camflow
    for name in ("__init__.py", "files.py", "assets.py"):
        (tmp_path / "site/camflow").mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(camflow.__file__).parent / name, tmp_path / "site/camflow")
    runs = tmp_path / "site/camflow/_assets/runs"
    runs.mkdir(parents=True)
    (runs / "toy_train.ipynb").write_text("{}")
    (runs / "toy_train.smoke.yaml").write_text("steps: 1\n")
    (tmp_path / "site/camflow/_assets/tiny/toy").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    code = """
import os
os.environ.pop("CAMFLOW_REPORTS", None)
from pathlib import Path
from camflow import assets
assert assets.repo_root() is None and assets.list_runs() == ["toy_train"] and assets.list_profiles("toy_train") == ["smoke"]
assert assets.run_notebook("toy_train").is_file() and assets.profile_path("toy_train", "smoke").is_file() and assets.tiny_path("toy").is_dir()
assert assets.reports_dir() == Path.cwd() / "reports"
os.environ["CAMFLOW_TINY"] = "mine"; Path("mine/toy").mkdir(parents=True)
assert assets.tiny_path("toy") == Path("mine/toy")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "work", env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"})


def test_assets_in_the_checkout(monkeypatch, tmp_path):
    from camflow import assets
    assert (assets.repo_root() / "nbs/index.ipynb").is_file()
    monkeypatch.delenv("CAMFLOW_REPORTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert assets.reports_dir() == assets.repo_root() / "reports"
    with pytest.raises(InputError, match="there are"):
        assets.run_notebook("missing")

"""Package metadata lives in settings.ini (one home); this file only reads it."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
version = re.search(r'__version__\s*=\s*"([^"]+)"', (HERE / "camflow/__init__.py").read_text()).group(1)


class BuildWithAssets(build_py):
    """Copies the run notebooks and benchmarks, their profiles and the tiny weights into the wheel as camflow/_assets."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for source, target in (("nbs/runs", "runs"), ("nbs/benchmarks", "benchmarks"), ("data/tiny", "tiny")):
            if (HERE / source).is_dir():
                shutil.copytree(HERE / source, Path(self.build_lib) / "camflow/_assets" / target, dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))


setup(
    version=version,
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): value.split()
                    for key, value in cfg.items() if key.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split("\n"), "nbdev": ["camflow=camflow._modidx:d"]},
    cmdclass={"build_py": BuildWithAssets},
    zip_safe=False,
)

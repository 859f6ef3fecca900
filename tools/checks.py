"""Checks that `make test` runs before the tests: `python -m tools.checks exported clean readme [--write]`."""
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def _copy():
    "A scratch copy of what export and clean read and write, gone afterwards."
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / "repo"
        work.mkdir()
        for name in ("nbs", "camflow"):
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for name in ("pyproject.toml", "settings.ini", "README.md"):
            shutil.copy(ROOT / name, work / name)
        yield work


def _differences(work: Path, pattern: str, folder: str) -> list[str]:
    ours = {p.relative_to(ROOT): p.read_bytes() for p in (ROOT / folder).rglob(pattern) if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts}
    theirs = {p.relative_to(work): p.read_bytes() for p in (work / folder).rglob(pattern) if "__pycache__" not in p.parts}
    return sorted(str(p) for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))


def exported() -> list[str]:
    "Modules that differ from what the notebooks export."
    with _copy() as work:
        subprocess.run(["nbdev-export"], cwd=work, check=True)
        return _differences(work, "*.py", "camflow")


def clean() -> list[str]:
    "Notebooks that are not clean (execution counts, stray metadata)."
    with _copy() as work:
        subprocess.run(["nbdev-clean"], cwd=work, check=True)
        return _differences(work, "*.ipynb", "nbs")


def readme_text() -> str:
    "The README: prose cells of nbs/index.ipynb, code cells as fenced blocks, hidden cells left out."
    parts = []
    for cell in nbformat.read(ROOT / "nbs/index.ipynb", as_version=4).cells:
        if re.match(r"#\|\s*hide", cell.source):
            continue
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        parts.append(source if cell.cell_type == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(p for p in parts if p) + "\n"


def readme() -> list[str]:
    "README.md when it is not what nbs/index.ipynb says; `--write` brings it up to date."
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    return [] if (ROOT / "README.md").read_text(encoding="utf-8") == readme_text() else ["README.md"]


def main(names: list[str]) -> int:
    wrong = {name: files for name in names if (files := globals()[name]())}
    for name, files in wrong.items():
        print(f"{name}: run `make check` and commit; these differ: {', '.join(files)}")
    print(f"checks {' '.join(names)}: {'failed' if wrong else 'ok'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main([a for a in sys.argv[1:] if not a.startswith("-")]))

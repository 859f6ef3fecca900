"""Every notebook of a chapter reads alike: its module's name, one line, prose, examples that are checked, and not too long."""
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1]/"nbs"
OTHER = {"runs", "benchmarks", "tutorials"}   # drivers and explorations, which export nothing
CHAPTERS = sorted(p.name for p in NBS.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")) and p.name not in OTHER)
CHECKS = re.compile(r"\bassert\b|\btest_\w+\(|ExceptionExpected|expect_fail|pytest\.raises")


def faults(path, prefix=""):
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    name, code = re.sub(r"^\d+_", "", path.stem), [s for kind, s in cells if kind == "code"]
    exported = [s for s in code if re.search(r"(?m)^#\|\s*exporti?\b", s)]
    if cells[0][0] != "markdown" or cells[0][1].split("\n")[0] != f"# {name}": yield f"the first cell does not start with '# {name}'"
    if not re.search(r"(?m)^> \S", cells[0][1]): yield "the first cell has no line that starts with '> '"
    if exported and f"#| default_exp {prefix}{name}" not in (s.split("\n")[0] for s in code): yield f"does not export {prefix}{name}"
    if sum(len(re.sub(r"(?m)^[#>|].*$", "", s).strip()) for kind, s in cells if kind == "markdown") < 150: yield "says hardly anything in prose"
    if len(code) > 60: yield f"has {len(code)} code cells; 60 are the most"
    if not any(CHECKS.search(s) for s in code if s not in exported): yield "checks nothing"
    if any(not s.strip() for s in code): yield "has an empty cell"


@pytest.mark.parametrize("chapter", ["", *CHAPTERS])
def test_style(chapter):
    found = [p for p in sorted((NBS/chapter).glob("*.ipynb")) if p.stem != "index"]
    wrong = [f"{p.relative_to(NBS)}: {what}" for p in found for what in faults(p, f"{chapter}." if chapter else "")]
    assert found and not wrong, "\n".join(wrong)


def test_a_fault_is_seen(tmp_path):
    path = tmp_path/"03_flow.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# Flow experiments"]}, {"cell_type": "code", "source": ["#| default_exp flow.old\n", "#| export"]}, {"cell_type": "code", "source": []}]}))
    assert len(list(faults(path, "flow."))) == 6

"Every run notebook that the package ships, on its smoke profile: it ends, its result and its report are there, and the report opens without a network."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from camflow.assets import list_profiles, list_runs
from camflow.lab.registry import Run
from camflow.lab.report import needs_network
from camflow.lab.run import prepare
from tests.test_benchmarks import PROMISED

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", list_runs())
def test_smoke(name, tmp_path):
    done = subprocess.run([sys.executable, "-m", "camflow.lab.cli", "run", name, "-f", "smoke"], capture_output=True, text=True, timeout=600, cwd=tmp_path,
                          env={**os.environ, "CAMFLOW_REPORTS": str(tmp_path/"reports"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(Path(done.stdout.strip()).parent)
    page = (run.path/"report.html").read_text(encoding="utf-8")
    assert run.status == "ok" and needs_network(page) == [] and "Traceback (most recent call last)" not in page and "nothing to plot yet" not in page
    result = json.loads((run.path/"result.json").read_text(encoding="utf-8"))
    assert result["headline"] and all(key in result for key in result["headline"])
    if name in PROMISED: assert result["headline"] == PROMISED[name] and any("seconds" in key and result[key] for key in result)
    assert "ERROR" not in done.stderr, done.stderr


@pytest.mark.parametrize("name, profile", [(name, profile) for name in list_runs() for profile in list_profiles(name)])
def test_profiles_fit_their_notebooks(name, profile): prepare(name, profile)

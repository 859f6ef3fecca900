"The command line: answers fast, refuses bad input before anything starts, exit statuses."
import json
import os
import subprocess
import sys

import pytest

from tests.test_lab import make_toy


def camflow(*words, **env) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "camflow.lab.cli", *words], capture_output=True, text=True, env={**os.environ, **env})


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return make_toy(tmp_path_factory.mktemp("cli"))


def cpu_seconds(code: str) -> float:
    "Processor seconds of a Python process, which a busy machine does not change; the smallest of three."
    script = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True); t = os.times(); print(t.children_user + t.children_system)"
    return min(float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1]) for _ in range(3))


def test_import_is_light():
    assert cpu_seconds("import camflow") - cpu_seconds("pass") < 0.3
    heavy = "import sys, camflow.lab.cli, camflow.lab.launch, camflow.lab.registry, camflow.lab.views; print([m for m in ('torch', 'numpy', 'papermill', 'nbconvert', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_is_fast():
    assert cpu_seconds("import sys; sys.argv = ['camflow', '--help']; import runpy; runpy.run_module('camflow.lab.cli', run_name='__main__')") < 0.5
    shown = camflow("--help")
    assert shown.returncode == 0 and all(word in shown.stdout for word in ("run", "resume", "rerun", "list", "show", "doctor"))


@pytest.mark.parametrize("words, message", [
    (["run", "{toy}", "-p", "stps=3"], "-p: unknown parameter 'stps'; did you mean 'steps'? Allowed: steps, lr, mode"),
    (["run", "{toy}", "-p", "steps=many"], "-p: steps must be int, got str 'many'"),
    (["run", "omnicam_generate", "-p", "images=my room.png"], """write -p 'images=["my room.png"]'"""),
    (["run", "{toy}", "-p", "steps"], "must read key=value"),
    (["run", "{toy}", "-f", "smok"], "its profiles: smoke"),
    (["run", "no_such_notebook"], "no_such_notebook"),
    (["run", "/nowhere/x.ipynb"], "does not exist"),
    (["resume", "nothing"], "is no run"),
])
def test_bad_input_is_status_two(toy, tmp_path, words, message):
    done = camflow(*[w.format(toy=toy) for w in words], CAMFLOW_REPORTS=str(tmp_path))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_parameters_and_dry_run(toy, tmp_path):
    assert "steps: int = 5  # optimizer steps" in camflow("run", str(toy), "--parameters").stdout
    done = camflow("run", str(toy), "-f", "smoke", "-p", "lr=0.3", "--dry-run", CAMFLOW_REPORTS=str(tmp_path))
    assert json.loads(done.stdout)["parameters"] == {"steps": 4, "lr": 0.3, "mode": "ok"} and "--num_processes 32" in done.stderr and list(tmp_path.iterdir()) == []


def test_run_show_and_list(toy, tmp_path):
    env = dict(CAMFLOW_REPORTS=str(tmp_path), PYTHONPATH=os.pathsep.join([str(toy.parent), os.environ.get("PYTHONPATH", "")]))
    done = camflow("run", str(toy), "-f", "smoke", **env)
    assert done.returncode == 0 and done.stdout.strip().endswith("report.html") and "cell 5/5" in done.stderr and "loss 0.6561" in done.stderr
    shown = json.loads(camflow("show", "toy", **env).stdout)
    assert shown["status"] == "ok" and shown["result"]["loss"] == pytest.approx(0.6561) and shown["changed"] == {"steps": 4}
    listed = camflow("list", **env)
    assert "ok" in listed.stdout and (tmp_path/"index.html").exists()
    environment = json.loads((tmp_path/shown["name"]/shown["id"]/"env.json").read_text())
    assert environment.get("status") != "failed" and environment["device"] and environment["threads"]


def test_doctor():
    done = camflow("doctor", "--json")
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0 and rows["torch"]["status"] == "ok" and {"device", "threads", "disk", "tiny weights", "run notebooks"} <= rows.keys()

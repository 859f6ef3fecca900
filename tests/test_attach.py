"""Reward servers that a run brings along: planned before they start, gone when it ends, also when it is killed; the profile that trains with them."""
import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from camflow.files import InputError
from camflow.processes import free_port
from camflow.servers.attach import attached, planned, toml_value
from camflow.servers.plan import read_plan
from camflow.servers.supervisor import ask

ROOT = Path(__file__).resolve().parents[1]
SHARP = {"reward": "camflow.rewards.appearance:AppearanceReward", "env": {"OMP_NUM_THREADS": 1}}


def test_tables_become_a_plan(tmp_path):
    tables = {"a": SHARP | {"options": {"floor": 0.5, "weights": {"detail": 2}}, "devices": 2}, "b": SHARP | {"port": free_port(), "devices": [0]}}
    path, urls = planned(tables, tmp_path)
    plan = read_plan(path)
    assert {k: len(v) for k, v in urls.items()} == {"a": 2, "b": 1} and len({one.port for one in plan.processes}) == 3
    assert plan.processes[0].config["options"] == {"floor": 0.5, "weights": {"detail": 2}} and plan.processes[0].env["OMP_NUM_THREADS"] == "1"
    assert planned(path, tmp_path/"other") == (path, urls) and not (tmp_path/"other").exists()
    for tables, word in (({"a": 3}, "give a table"), ({"a": SHARP | {"speed": 1}}, "speed"), ({"a": SHARP | {"options": {"x": None}}}, "NoneType")):
        with pytest.raises(InputError, match=word): planned(tables, tmp_path)
    for value in ("a 😀 in é", "\x7f\n", {"k 😀": 1e22}): assert tomllib.loads(f"a = {toml_value(value)}")["a"] == value
    for value in (math.inf, math.nan):
        with pytest.raises(InputError, match="which TOML can hold"): toml_value(value)
    assert planned({"a.b": SHARP}, tmp_path/"dots")[1].keys() == {"a.b"}
    assert toml_value({"say": 'a "word"', "on": True}) == '{ "say" = "a \\"word\\"", "on" = true }'


def test_a_server_that_cannot_start_is_named(tmp_path):
    path, _ = planned({"wrong": SHARP | {"reward": "camflow.rewards.da3_reward:DA3Reward", "options": {"judge": "best"}}}, tmp_path)
    assert "restarts" not in path.read_text()        # what the reward refuses is given up at once
    with pytest.raises(InputError, match="wrong-0"):
        with attached(path, 600): raise AssertionError("it never was ready")


RUN = """
import sys, time
from camflow.processes import free_port
from camflow.servers.attach import attached
with attached(sys.argv[1]): print("ready", flush=True); time.sleep(600)
"""


def test_servers_end_with_a_killed_run(tmp_path):
    path, urls = planned({"sharp": SHARP}, tmp_path)
    run = subprocess.Popen([sys.executable, "-c", RUN, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.stdout.readline().strip() == "ready"
    port = int(urls["sharp"][0].rsplit(":", 1)[1])
    assert ask(port, "/healthz")[0] == 200
    run.send_signal(signal.SIGKILL)
    run.wait()
    end = time.monotonic() + 240
    while ask(port, "/healthz") and time.monotonic() < end: time.sleep(0.2)
    assert ask(port, "/healthz") is None


@pytest.mark.slow
def test_two_ranks_train_with_two_processes_of_two_judges(tmp_path):
    done = subprocess.run([sys.executable, "-m", "camflow.lab.cli", "run", "recam_grpo", "-f", "servers", "-q"], capture_output=True, text=True, timeout=1500, cwd=tmp_path,
                          env={**os.environ, "CAMFLOW_REPORTS": str(tmp_path/"reports"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    run = Path(done.stdout.strip()).parent
    records = [json.loads(line) for line in (run/"grpo/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2] and all(r["invalid_ratio"] == 0 for r in records)
    rows = json.loads(next((run/"servers").rglob("state.json")).read_text())
    assert len(rows) == 4 and {row["state"] for row in rows} == {"stopped"} and not any(row["restarts"] for row in rows)
    result = json.loads((run/"result.json").read_text())
    assert {"remote_da3/rot_deg_before", "remote_judge/alignment_before"} <= set(result)

"""Killed processes, full disks, signals: nothing is corrupted and a resumed run equals an uninterrupted one bit for bit."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from camflow.training import checkpoint
from camflow.training.checkpoint import damage, latest_checkpoint, list_checkpoints, save_checkpoint
from camflow.training.loop import EXIT_STOPPED
from camflow.training.metric_writer import read_metrics
from tests.test_training import BASE, one_thread, same  # noqa: F401
from tests.train_small import main

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {**BASE, "steps": 30, "checkpoint_every": 3, "validate_every": 7}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(run_dir, config, *options):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir/"config.json").write_text(json.dumps(config))
    return subprocess.Popen([sys.executable, "-m", "tests.train_small", "--config", str(run_dir/"config.json"), *options], cwd=ROOT, env=ENV,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_storm(tmp_path):
    "SIGKILL at eight random moments (while stepping, saving, logging); the run still ends bit-equal to one that was left alone."
    whole = start(tmp_path/"whole", CONFIG)
    storm = start(tmp_path/"storm", {**CONFIG, "pause": 0.06}, "--storm", "8", "0.3")  # 1.8 s of pauses: even a fast machine cannot outrun the kills
    _, problem = whole.communicate(timeout=900)
    assert whole.returncode == 0, problem[-3000:]
    out, problem = storm.communicate(timeout=900)
    assert storm.returncode == 0, problem[-3000:]
    assert json.loads(out.strip().splitlines()[-1])["kills"] >= 3
    same(tmp_path/"whole", tmp_path/"storm")
    assert all(damage(p) is None for p in list_checkpoints(tmp_path/"storm"/"checkpoints"))
    assert not list((tmp_path/"storm"/"checkpoints").glob(".step*")), "leftovers of killed writers"


def wait_for_step(run_dir, step, process, limit=900):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        table = read_metrics(run_dir)
        if len(table) and table["step"].max() >= step: return
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    raise TimeoutError


def test_sigterm_saves_and_says_so(tmp_path):
    process = start(tmp_path/"run", {**CONFIG, "checkpoint_every": 0, "hold": [6, str(tmp_path/"go")]})
    wait_for_step(tmp_path/"run", 4, process)
    process.send_signal(signal.SIGTERM)
    (tmp_path/"go").touch()
    process.communicate(timeout=900)
    assert process.returncode == EXIT_STOPPED
    result = json.loads((tmp_path/"run"/"result.json").read_text())
    assert result["status"] == "stopped" and latest_checkpoint(tmp_path/"run"/"checkpoints").name == f"step-{result['step']:08d}"
    main(CONFIG, tmp_path/"run")
    main(CONFIG, tmp_path/"whole")
    same(tmp_path/"whole", tmp_path/"run")


def test_bad_config_is_one_sentence(tmp_path):
    process = start(tmp_path/"run", {**CONFIG, "schedule": "sometimes"})
    _, problem = process.communicate(timeout=900)
    assert process.returncode == 2 and "schedule 'sometimes'" in problem and "Traceback" not in problem


@pytest.mark.parametrize("limit", [0, 5_000, 200_000])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, limit):
    "A limit on file size stands in for a full disk: inside the header, inside the data, inside the second file."
    groups = {"model": {"w": torch.randn(30_000)}, "ema": {"w": torch.randn(60_000)}}
    save_checkpoint(tmp_path, 1, groups)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="step-00000002 failed.*earlier checkpoints are intact"): save_checkpoint(tmp_path, 2, groups)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and damage(tmp_path/"step-00000001") is None
    save_checkpoint(tmp_path, 2, groups)
    assert latest_checkpoint(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("name", ["save_file", "write_json", "_sync"])
def test_disk_full_at_every_call(tmp_path, monkeypatch, name):
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(3)}})

    def fail(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, name, fail)
    with pytest.raises(OSError, match="No space left") as error: save_checkpoint(tmp_path, 2, {"model": {"w": torch.ones(3)}})
    assert error.value.errno == 28 and [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_half_removed_checkpoint_is_not_listed(tmp_path):
    for step in (1, 2): save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(3)}})
    (tmp_path/"step-00000002"/"meta.json").unlink()
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    shutil.rmtree(tmp_path/"step-00000001")
    assert latest_checkpoint(tmp_path) is None

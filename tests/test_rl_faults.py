"""RL under faults: killed ranks, a full disk, a clock that jumps, a rank that hangs, a gradient that is no number. What can go on goes on bit for bit, what cannot says why."""
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camflow.lab.launch import LaunchError, launch
from camflow.rl import faults, recam_grpo, trainer
from camflow.training.checkpoint import damage, list_checkpoints
from camflow.training.metric_writer import read_records
from tests.test_rl_methods import make
from tests.train_rl_small import CONFIG, brightness

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SECONDS = ("time", "seconds")


def program(folder, kills, steps):
    done = subprocess.run([sys.executable, "-m", "tests.train_rl_small", str(folder), str(kills), str(steps)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder/"found.json").read_text())


def records(run): return [{k: v for k, v in one.items() if not any(word in k for word in SECONDS)} for one in read_records(run)]


def same(a, b):
    "Two finished runs: judgements, metrics, weights, averages, optimizer, bit for bit."
    for name in ("before.json", "after.json"): assert json.loads((a/name).read_text()) == json.loads((b/name).read_text())
    assert records(a) == records(b) and len(records(a)) > 0
    files = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*.safetensors")) and len(files) >= 7
    for file in files:
        one, other = load_file(a/file), load_file(b/file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file
    assert not list(b.rglob("*.tmp")), "leftovers of killed writers"
    assert all(damage(path) is None for path in list_checkpoints(b/"checkpoints"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    return folder, program(folder, 3, 3)


def test_killed_ranks_resume_exactly(found):
    folder, report = found
    assert report["storm"]["kills"] == 3 and report["storm"]["hung"] == []
    same(folder/"whole", folder/"storm")


@pytest.mark.slow
def test_fifty_killed_ranks(tmp_path):
    "Either of two ranks dies at a random moment of every phase; the other is left to itself, told to stop, or dies with it."
    report = program(tmp_path, 50, 72)["storm"]                      # more steps than a fast machine takes between phases and kills
    print(report)
    assert report["kills"] == 50 and report["hung"] == [] and len(report["phases"]) == 9
    same(tmp_path/"whole", tmp_path/"storm")


# ---- a gradient that is not a number

def test_a_gradient_that_is_no_number_stops_all_ranks_and_is_replayed(found):
    report = found[1]["poisoned"]
    assert report["saved"] == ["poisoned/broken/rank1/step-00000001"] and report["hung"] == [] and all(report["states"].values())
    for log in report["logs"]:                                          # both ranks say where it happened
        assert "NonFiniteError: the gradient is not finite after 1 steps: rank 1, requests [" in log and "broken/rank1/step-00000001. The weights are those before" in log
    sick, mended = (report["rows"][name][0] for name in ("poisoned", "mended"))
    assert len(sick) == 2 and all(math.isfinite(loss) and not math.isfinite(norm) for loss, norm in sick)
    assert all(math.isfinite(x) for row in mended for x in row) and [loss for loss, _ in mended] == [loss for loss, _ in sick]


@pytest.mark.parametrize("changes", [dict(loss="nft", kl=.1, levels=(.9, .5)), dict(loss="awm", epochs=2), dict(loss="guard", best_of=2, pack=True)], ids=lambda c: c["loss"])
def test_every_kind_of_batch_is_replayed_as_it_was(changes, tmp_path, monkeypatch):
    "What the replay computes is what training would have computed, to the bit, two steps into a run."
    one = make(**changes)
    for _ in range(2): one.step()
    one.run_dir, seen = tmp_path, {}
    def note(one, work, total):
        batch, adv, keep = work[-1]
        seen["rows"], seen["folder"] = faults.trial(one, batch, adv, keep, total), faults.save_batch(one, batch, adv, keep, total)
        raise KeyboardInterrupt
    monkeypatch.setattr(trainer, "stop_for", note)
    one.update = lambda: (one.optimizer.zero_grad(), math.nan)[1]
    with pytest.raises(KeyboardInterrupt): one.step()
    again = make(**changes)
    assert faults.replay_batch(again, seen["folder"]) == seen["rows"] and len(seen["rows"]) >= 2
    assert again.done == 2 and all(torch.equal(one.params[name], again.params[name]) for name in one.params)


# ---- the disk

@pytest.mark.parametrize("limit", [0, 600])
def test_a_full_disk_keeps_the_old_checkpoint(limit, tmp_path):
    "A limit on file size stands in for a full disk."
    whole, one = make(), make()
    for _ in range(3): whole.step()
    one.step()
    one.save(tmp_path)
    one.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="step-00000002 failed.*earlier checkpoints are intact"): one.save(tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    again = make()
    assert again.restore(tmp_path)
    for _ in range(2): again.step()
    assert all(torch.equal(whole.params[name], again.params[name]) for name in whole.params)


def test_a_run_goes_on_after_a_full_disk(tmp_path, found, monkeypatch):
    "No space at the second checkpoint and in the middle of a line of metrics: the run ends with that sentence; resumed with space it equals the one that never met it."
    config = {**CONFIG, "steps": 2, "checkpoint_every": 1}
    recam_grpo.main(config, tmp_path/"whole", brightness)
    save = trainer.save_checkpoint

    def fail(folder, step, *words, **more):
        if step == 2: raise OSError(28, "No space left on device")
        return save(folder, step, *words, **more)
    monkeypatch.setattr(trainer, "save_checkpoint", fail)
    with pytest.raises(OSError, match="No space left"): recam_grpo.main(config, tmp_path/"full", brightness)
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    with open(tmp_path/"full/metrics.jsonl", "a") as file: file.write('{"step": 3, "rew')
    assert recam_grpo.main(config, tmp_path/"full", brightness)["resumed"] == 1
    same(tmp_path/"whole", tmp_path/"full")


# ---- clocks

def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    "The wall clock leaps years ahead and back between any two looks; a run with a limit of an hour neither ends early nor differs."
    config, now = {**CONFIG, "steps": 2, "max_seconds": 3600.0}, [0]
    recam_grpo.main(config, tmp_path/"whole", brightness)

    def jumping():
        now[0] += 1
        return 1.7e9 + (-1)**now[0] * 1e8 * now[0]
    monkeypatch.setattr(time, "time", jumping)
    assert recam_grpo.main(config, tmp_path/"jumps", brightness)["status"] == "done" and now[0] > 10
    same(tmp_path/"whole", tmp_path/"jumps")


def test_durations_come_from_clocks_that_are_never_set():
    "The wall clock stamps records for people; nothing that is decided or measured reads it."
    stamps = {"camflow/training/metric_writer.py": 1, "camflow/training/heartbeat.py": 1}
    files = [*(ROOT/"camflow/rl").glob("*.py"), *(ROOT/"camflow/training").glob("*.py"), ROOT/"camflow/lab/launch.py"]
    found = {str(path.relative_to(ROOT)): text.count("time.time()") + text.count("datetime") for path in files if "time.time()" in (text := path.read_text()) or "datetime" in text}
    assert found == stamps


# ---- a rank that hangs

HANGS = '''
import os, sys, time
from pathlib import Path
from camflow.training.heartbeat import Heartbeat
rank = int(os.environ["RANK"])
folder = Path(sys.argv[2]).parent
beat = Heartbeat(folder, rank)
step = 0
while step < 3 or len(list((folder/"heartbeat").glob("rank[01].json"))) < int(os.environ.get("WORLD_SIZE", 1)):  # as long as another rank has not begun
    beat("rollout", step)
    step += 1
    time.sleep(0.2)
beat("waiting for gradients" if rank == 0 else "reward", 2)
def ask_the_judge(): time.sleep(600)
ask_the_judge()
'''


def test_the_rank_that_hangs_is_named_with_its_phase(tmp_path):
    (tmp_path/"toy_hangs.py").write_text(HANGS)
    (tmp_path/"run/heartbeat").mkdir(parents=True)
    (tmp_path/"run/heartbeat/rank7.json").write_text('{"rank": 7, "phase": "reward", "step": 1}')  # of an earlier attempt with more ranks
    begun = time.monotonic()
    with pytest.raises(LaunchError) as error: launch("toy_hangs", {}, tmp_path/"run", 2, env={"PYTHONPATH": tmp_path, "CAMFLOW_GRACE": "1"}, stall=5.0, tick=0.1)
    assert str(error.value).startswith("rank 1 hangs in reward: toy_hangs was stopped because no rank was heard for 5.0 s (rank 0: waiting for gradients of step 2, ")
    assert "rank 1: reward of step 2" in str(error.value) and time.monotonic() - begun < 400
    log = (tmp_path/"run/train.log").read_text()
    for rank in range(2): assert re.search(rf"rank {rank} stood here when it was stopped:\n\w+ thread 0x\w+.*\n  File .* in ask_the_judge\n", log), log


def test_a_rank_that_is_killed_is_reported_with_its_phase(tmp_path):
    (tmp_path/"toy_dies.py").write_text(HANGS.replace('os.environ["RANK"]', "1").replace("time.sleep(600)", "os.kill(os.getpid(), 9)"))
    with pytest.raises(LaunchError, match="killed by signal 9") as error: launch("toy_dies", {}, tmp_path/"run", env={"PYTHONPATH": tmp_path}, tick=0.1)
    assert "; last heard: rank 1: reward of step 2, " in str(error.value)


@pytest.mark.slow
def test_a_reward_that_hangs_is_named(tmp_path):
    "The real training on two real ranks: one judge never answers."
    config = {**CONFIG, "steps": 3, "rewards": {"tests.train_rl_small:Brightness": 1.0}, "reward_options": {"tests.train_rl_small:Brightness": {"hang": True}}}
    with pytest.raises(LaunchError, match="^rank 1 hangs in reward: camflow.rl.recam_grpo was stopped") as error: launch("camflow.rl.recam_grpo", config, tmp_path/"run", 2, env={"PYTHONPATH": ROOT, "CAMFLOW_GRACE": "1"}, stall=120.0)
    assert "rank 0: waiting for rewards of step" in str(error.value) and "in ask_the_judge" in (tmp_path/"run/train.log").read_text()

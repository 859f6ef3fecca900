"The doctor: fast, without PyTorch where there is no accelerator, and with a reason for everything that will not run."
import json
import subprocess
import sys

import pytest

from camflow.assets import list_profiles, list_runs
from camflow.lab import doctor
from camflow.lab.doctor import diagnose, healthy, verdict
from tests.test_cli import camflow, cpu_seconds

LAPTOP, SERVER = ([], 16 * 2**30, 8), ([64 * 2**30] * 8, 2**41, 192)


def test_every_profile_has_a_verdict():
    done = camflow("doctor", "--json")
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0 and {"python", "torch", "video", "device", "threads", "memory", "disk", "reports", "tiny weights"} <= rows.keys()
    for name in list_runs():
        for what in (name, *(f"{name} -f {profile}" for profile in list_profiles(name))): assert rows[what]["status"] in ("runs", "not here") and (rows[what]["detail"] or rows[what]["status"] == "runs")
        assert rows[f"{name} -f smoke"]["status"] == "runs"


def test_it_is_fast_and_leaves_torch_alone():
    code = "import sys; from camflow.lab.doctor import diagnose; diagnose(); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert cpu_seconds(code) < 0.6 * cpu_seconds("import torch")      # measured: 0.5 s and 1.6 s


@pytest.mark.parametrize("name, profile, machine, status, words", [
    ("recam_grpo", "small", LAPTOP, "runs", "GiB"),
    ("recam_grpo", "smoke", ([], 2**28, 2), "not here", "needs about"),
    ("recam_grpo", "npu8", LAPTOP, "not here", "weights/recam-wan2.1-1.3b is not there"),
    ("recam_grpo", "npu8", ([], 2**34, 2), "not here", "asks for 8 devices; here are no accelerators and 2 CPUs"),
    ("recam_grpo", "npu32", ([2**36], 2**40, 64), "not here", "asks for 8 devices on each of 4 machines; here are 1 accelerators"),
    ("recam_finetune", "npu8", SERVER, "not here", "data=multicam needs -p root=FOLDER"),
    ("multicam_prepare", "npu8", SERVER, "not here", "root=MultiCamVideo-Dataset is not there"),
    ("multicam_caption", "npu32", ([], 2**34, 2), "not here", "asks for 8 devices on each of 4 machines"),
    ("webvid_prepare", "smoke", LAPTOP, "runs", ""),
    ("recam_finetune", "gpu", ([2**36], 2**38, 16), "runs", "GiB"),
    ("recam_generate", "wan", SERVER, "not here", "weights=weights/recam-wan2.1-1.3b is not there; give it with -p weights=PATH"),
])
def test_verdicts(name, profile, machine, status, words):
    found = verdict(name, profile, *machine)
    assert found[0] == status and words in found[1], found


def test_published_weights_on_a_server(tmp_path):
    "Where weights and data are there, memory decides: of the device, and of the host."
    from camflow.rl import estimate
    (tmp_path/"weights").mkdir()
    values = dict(model=str(tmp_path/"weights"), frames=81, size=[480, 832], groups=16, k=4, micro_batch=2, sampling_steps=30, guidance=5.0, window=15, kl=0.004, lora_rank=32, gradient_checkpointing=True,
                  conditions=64, num_processes=8)
    whole, kept = (doctor.estimated("recam_grpo", values | {"gradient_checkpointing": on}, True) for on in (True, False))
    assert whole.device_bytes < 64 * 2**30 < kept.device_bytes and 1.3e9 < whole.parameters < 1.6e9
    assert whole.device["text encoder"] == 2 * estimate.TEXT_WEIGHTS and 8 * whole.host_bytes < 64 * 2**30
    assert estimate.grpo(values, 8, True).seconds(estimate.ASCEND_910B)["step"] > 600


def test_what_is_broken_is_a_row(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-package"))
    rows = diagnose()
    assert ("no-such-package", "missing", "pip install -e . in the repository") in rows and not healthy(rows)
    monkeypatch.setattr(doctor, "machine", lambda: (_ for _ in ()).throw(OSError("no disk")))
    assert any(status == "broken" and "no disk" in detail for _, status, detail in diagnose())


MEASURE = """
import json, tempfile, torch
from camflow.lab.pretend import MEMORY, install
from camflow.processes import end_quickly
end_quickly()
torch.set_num_threads(1)
install("npu").is_bf16_supported = lambda: False
from camflow.rl import estimate
from camflow.rl.recam_grpo import build
config = {"model": "tiny", "groups": 1, "k": 4, "sampling_steps": 2, "window": 1, "steps": 1, "micro_batch": 4, "conditions": 1, "eval_conditions": 1}
trainer, found = build(config, tempfile.mkdtemp(), lambda samples: torch.rand(len(samples)))[0], {}
trainer.conditions(0)
for again in (False, True):
    if again: trainer.bare.enable_gradient_checkpointing()
    MEMORY.peak = MEMORY.current
    trainer.step()
    found[again] = MEMORY.peak, estimate.grpo(config | {"gradient_checkpointing": again}).device_bytes
print(json.dumps(found))
"""


def test_memory_estimate_against_a_measured_run():
    "A rollout and its update on the pretended device, whose memory is counted to the byte: within a factor of 1.5, with and without recomputation."
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for measured, estimated in found.values(): assert measured / 1.5 < estimated < measured * 1.5, found
    assert found["true"][0] < 0.7 * found["false"][0]


@pytest.mark.slow
def test_time_estimate_against_a_measured_run(tmp_path):
    "Rollout, decoding and update of the tiny model: within a factor of 3 of what the probe says, on one thread."
    code = """
import json, tempfile, time, torch
time.perf_counter = time.process_time          # of one thread: what else runs on this machine counts for nothing
torch.set_num_threads(1)
from camflow.rl import estimate
from camflow.rl.recam_grpo import build
config = {"model": "tiny", "groups": 2, "k": 4, "sampling_steps": 4, "window": 2, "steps": 1, "micro_batch": 4, "conditions": 2, "eval_conditions": 1}
trainer = build(config, tempfile.mkdtemp(), lambda samples: torch.rand(len(samples)))[0]
trainer.step()
best = {}
for _ in range(3):
    for name, seconds in trainer.step().items(): best[name] = min(seconds, best.get(name, seconds)) if name.startswith("seconds") else None
rate = max(estimate.probe() for _ in range(3))
print(json.dumps([best, estimate.grpo(config).seconds(rate)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    measured, estimated = json.loads(done.stdout.splitlines()[-1])
    for phase in ("rollout", "train"): assert measured[f"seconds_{phase}"] / 3 < estimated[phase] < measured[f"seconds_{phase}"] * 3, (phase, measured, estimated)

"""The training loop: exact resume, ranks, accumulation, precision, errors."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camflow.files import InputError
from camflow.processes import free_port
from camflow.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from camflow.training.loop import TrainConfig, fit, positions
from camflow.training.metric_writer import read_metrics
from tests.train_small import Net, main

ROOT = Path(__file__).resolve().parents[1]
BASE = dict(steps=14, batch_size=4, lr=1e-2, warmup=3, schedule="cosine", ema_decay=0.9, checkpoint_every=4, validate_every=5, dropout=0.3, seed=3)
IGNORED = ["time", "step_seconds"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a, b):
    "Everything in the last checkpoints and all metrics are equal, bit for bit."
    x, y = load_checkpoint(a/"checkpoints"), load_checkpoint(b/"checkpoints")
    assert x.step == y.step and x.tensors.keys() == y.tensors.keys()
    for group in x.tensors:
        for name, value in x.tensors[group].items(): assert torch.equal(value, y.tensors[group][name]), (group, name)
    left, right = (read_metrics(p).drop(columns=IGNORED) for p in (a, b))
    assert left.equals(right)


@pytest.mark.parametrize("accumulation,bf16", [(1, False), (3, True)])
def test_resume_is_exact(tmp_path, accumulation, bf16):
    "Mid-epoch, with dropout from the global generator, averages, schedule, accumulation and validation in between."
    config = {**BASE, "accumulation": accumulation, "bf16": bf16}
    main(config, tmp_path/"whole")
    for _ in range(14):  # max_seconds ends each call after one step
        if main({**config, "max_seconds": 1e-9}, tmp_path/"parts").status == "done": break
    same(tmp_path/"whole", tmp_path/"parts")


def test_rate_by_name(tmp_path):
    "One step of AdamW without decay moves every weight by its rate; a resume is exact and refuses other factors."
    plain = dict(steps=1, batch_size=4, lr=1e-3, weight_decay=0., grad_clip=0)
    moved = {k: (p - dict(Net().named_parameters())[k]).abs().max() for k, p in main({**plain, "lr_scale": {"layers.3.*": 5., "*.bias": 0.5}}, tmp_path/"one").loop.bare.named_parameters()}
    for name, factor in {"layers.0.weight": 1, "layers.0.bias": 0.5, "layers.3.weight": 5, "layers.3.bias": 5}.items(): # the first pattern that fits
        assert abs(moved[name].item() / (factor * 1e-3) - 1) < 1e-3, name
    config = {**BASE, "lr_scale": {"layers.3.weight": 5.}, "muon": ["layers.*.weight"]}
    main(config, tmp_path/"whole")
    for _ in range(14):
        if main({**config, "max_seconds": 1e-9}, tmp_path/"parts").status == "done": break
    same(tmp_path/"whole", tmp_path/"parts")
    with pytest.raises(InputError, match="trained with lr_scale"): main({**config, "steps": 15, "lr_scale": {}}, tmp_path/"whole")
    with pytest.raises(InputError, match="names nothing"): main({**plain, "lr_scale": {"nothing*": 2.}}, tmp_path/"x")
    with pytest.raises(InputError, match="positive"): TrainConfig(lr_scale={"*": 0})


def test_weights_stay_float32(tmp_path):
    result = main({**BASE, "steps": 2, "bf16": True}, tmp_path)
    assert all(p.dtype == torch.float32 for p in result.loop.bare.parameters())
    moments = [v for state in result.loop.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert all(v.dtype == torch.float32 for v in moments)


def test_accumulation_equals_large_batch(tmp_path):
    plain = {**BASE, "dropout": 0., "steps": 5}
    a = main({**plain, "batch_size": 8}, tmp_path/"a")
    b = main({**plain, "batch_size": 2, "accumulation": 4}, tmp_path/"b")
    for p, q in zip(a.loop.bare.parameters(), b.loop.bare.parameters()): torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def run(config, run_dir, ranks=1):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir/"config.json").write_text(json.dumps(config))
    start = [sys.executable, "-m"] + (["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "-m"] if ranks > 1 else [])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*start, "tests.train_small", "--config", str(run_dir/"config.json")], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def test_two_ranks_equal_one(tmp_path):
    "On two gloo ranks, one group of processes for all trainings: DDP and FSDP2 give the curve of one rank, also after a resume; one rank continues the checkpoint that two wrote, and two the one that one wrote."
    plain = {**BASE, "dropout": 0., "steps": 8, "checkpoint_every": 0}
    config = {**plain, "schedule": "constant", "blocks": 3, "accumulation": 2, "grad_clip": 0.05}
    one, mixed = {**config, "batch_size": 4}, {"frozen": "blocks.1", "bf16": True}
    main({**one, "steps": 5}, tmp_path/"handed")
    sharded = [["whole", {}], ["parts", {"steps": 5}], ["parts", {}], ["handed", {}], ["early", {"steps": 5}], ["mixed", mixed], ["ddp", {**mixed, "shard": False}]]
    done = run({**plain, "batch_size": 2, "runs": [["two", {}], *([name, {**config, "batch_size": 2, "shard": True, **changes}] for name, changes in sharded)]}, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {result["status"] for result in json.loads((tmp_path/"result.json").read_text())["results"]} == {"done"}

    main({**plain, "batch_size": 4}, tmp_path/"alone")
    apart = lambda: (read_metrics(tmp_path/"alone")["loss"] - read_metrics(tmp_path/"two")["loss"]).abs().max()
    assert len(read_metrics(tmp_path/"two")) == 8 and apart() < 1e-5
    assert load_checkpoint(tmp_path/"two"/"checkpoints").meta["world"] == 2
    for name in ("alone", "two"): main({**plain, "batch_size": 4, "steps": 12}, tmp_path/name)
    assert len(read_metrics(tmp_path/"two")) == 12 and apart() < 1e-5

    same(tmp_path/"whole", tmp_path/"parts")                       # weights, moments, averages and metrics, bit for bit
    main(one, tmp_path/"one")
    main({**one, "shard": True}, tmp_path/"early")                 # one rank has nothing to cut
    curve = lambda name: read_metrics(tmp_path/name)[["loss", "val", "grad_norm"]]
    for name in ("whole", "handed", "early"): assert (curve(name) - curve("one")).abs().max().max() < 1e-6, name
    assert (curve("mixed") - curve("ddp")).abs().max().max() < 1e-6 and curve("mixed")["grad_norm"].min() > config["grad_clip"]
    tensors = load_checkpoint(tmp_path/"whole"/"checkpoints").tensors
    assert {k: v.shape for k, v in tensors["model"].items()} == {k: v.shape for k, v in Net(blocks=3).state_dict().items()} and len(tensors["ema"]) == 10
    assert not [name for name in load_checkpoint(tmp_path/"mixed"/"checkpoints").tensors["model"] if name.startswith("blocks.1")]


def test_shard_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="set muon="): TrainConfig(shard=True, muon=["*"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="without it and set shard: true"): main(BASE, tmp_path)


def test_heartbeat_names_the_phase(tmp_path):
    seen = []
    watched = lambda model, batch, noise: (seen.append(json.loads((tmp_path/"heartbeat"/"rank0.json").read_text())), (model(torch.ones(2, 5)).square().mean(), {}))[1]
    fit(tmp_path, Net(), watched, lambda *_: None, TrainConfig(steps=2))
    assert [(one["phase"], one["step"]) for one in seen] == [("forward", 0), ("forward", 1)]
    assert json.loads((tmp_path/"heartbeat"/"rank0.json").read_text())["phase"] == "finished"


def test_prefetch_changes_nothing(tmp_path):
    main({**BASE, "prefetch": True, "accumulation": 2}, tmp_path/"a")
    main({**BASE, "prefetch": False, "accumulation": 2}, tmp_path/"b")
    same(tmp_path/"a", tmp_path/"b")


def test_gradient_checkpointing_flag(tmp_path):
    assert main({**BASE, "steps": 1, "gradient_checkpointing": True}, tmp_path/"a").loop.bare.checkpointing
    assert not main({**BASE, "steps": 1}, tmp_path/"b").loop.bare.checkpointing


def broken(model, batch, noise): return model(torch.zeros(2, 5)).sum() * math.nan, {}


def test_nan_is_null_and_gives_up(tmp_path):
    with pytest.raises(FloatingPointError, match="4 steps in a row"): fit(tmp_path, Net(), broken, lambda *_: None, TrainConfig(steps=9, max_skipped=3))
    records = [json.loads(line) for line in (tmp_path/"metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] is None and records[0]["status"].startswith("not finite") and records[0]["skipped"] == 1


def test_a_metric_is_a_mean_over_the_micro_batches_that_have_it(tmp_path):
    told = iter([math.nan, 4.0, 2.0, *[math.nan] * 3])
    step_fn = lambda model, batch, noise: (model(torch.ones(2, 5)).square().sum(), {"some": next(told)})
    fit(tmp_path, Net(), step_fn, lambda *_: None, TrainConfig(steps=2, accumulation=3))
    first, second = (json.loads(line) for line in (tmp_path/"metrics.jsonl").read_text().splitlines())
    assert first["some"] == 3 and second["some"] is None and first["loss"] > 0 and "status" not in first


def test_skipped_step_leaves_weights(tmp_path):
    loop = fit(tmp_path, Net(), broken, lambda *_: None, TrainConfig(steps=2)).loop
    assert all(torch.equal(p, q) for p, q in zip(loop.bare.parameters(), Net().parameters()))


def test_other_architecture_and_other_base(tmp_path):
    config = TrainConfig(steps=1)
    step = lambda model, batch, noise: (model(torch.ones(2, 5)).square().mean(), {})
    chosen = lambda name: name.startswith("layers.3")
    fit(tmp_path, Net(), step, lambda *_: None, config, trainable=chosen)
    assert set(load_checkpoint(tmp_path/"checkpoints").tensors["model"]) == {"layers.3.weight", "layers.3.bias", "seen"}
    with pytest.raises(InputError, match="another architecture.*2 missing.*layers.0.weight"): fit(tmp_path, Net(), step, lambda *_: None, config)
    other = Net()
    with torch.no_grad(): other.layers[0].weight.add_(0.01)
    with pytest.raises(InputError, match="other frozen weights"): fit(tmp_path, other, step, lambda *_: None, config, trainable=chosen)
    with pytest.raises(InputError, match="no parameter is trained"): fit(tmp_path/"x", Net(), step, lambda *_: None, config, trainable=lambda name: False)


def test_shared_tensors_and_dtypes_round_trip(tmp_path):
    base = torch.arange(6.)
    tensors = {"a": base, "b": base[:3], "c": base.view(2, 3).t(), "d": torch.tensor(3, dtype=torch.int64), "e": torch.ones(2, dtype=torch.bfloat16)}
    save_checkpoint(tmp_path, 1, {"model": tensors})
    back = load_checkpoint(tmp_path).tensors["model"]
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())


def test_damaged_checkpoint_falls_back(tmp_path):
    main({**BASE, "steps": 8}, tmp_path/"a")
    main({**BASE, "steps": 8}, tmp_path/"b")
    newest = latest_checkpoint(tmp_path/"a"/"checkpoints")/"model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    assert latest_checkpoint(tmp_path/"a"/"checkpoints").name == "step-00000004"
    assert main({**BASE, "steps": 8}, tmp_path/"a").resumed == 4
    same(tmp_path/"a", tmp_path/"b")


def test_positions_are_a_partition():
    for world, accumulation, batch in [(1, 1, 4), (3, 2, 2), (2, 3, 1)]:
        size = world * accumulation * batch
        seen = sorted(p for step in range(3) for rank in range(world) for micro in range(accumulation) for p in positions(step, rank, world, micro, batch, accumulation))
        assert seen == list(range(3 * size))


def test_counters_are_not_rounded_with_the_weights(tmp_path):
    from safetensors.torch import load_file
    from camflow.training.checkpoint import save_folder
    save_folder(tmp_path, {"w": torch.ones(2), "seen": torch.tensor(2049), "on": torch.tensor([True, False])}, {})
    found = load_file(tmp_path / "model.safetensors")
    assert found["w"].dtype == torch.float16 and found["seen"].item() == 2049 and found["on"].dtype == torch.bool


def test_orders_survive_another_thread(monkeypatch):
    from camflow.training import loop
    class Emptied(dict):                                                # by the other thread, at the worst moment
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()
    monkeypatch.setattr(loop, "_ORDERS", Emptied())
    assert sorted(loop.shuffled(i, 5, 1) for i in range(5)) == list(range(5))


def test_a_run_that_was_done_says_again_what_it_found(tmp_path):
    from tests import train_small
    config = dict(steps=2, batch_size=4, lr=1e-2, checkpoint_every=1, seed=3)
    first, again = train_small.main(config, tmp_path), train_small.main(config, tmp_path)
    assert (again.status, again.step, again.resumed) == ("done", 2, 2) and again.metrics == first.metrics and again.metrics


def test_a_line_without_an_end_does_not_spoil_the_next(tmp_path):
    from camflow.training.metric_writer import MetricWriter, read_records
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')            # killed, or no room on the disk
    writer = MetricWriter(tmp_path)
    for step in (3, 4): writer.log(step)
    assert [one["step"] for one in read_records(tmp_path)] == [1, 3, 4]

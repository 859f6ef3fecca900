"""RL: parity with the reference implementations, plans, rollouts, the trainer, resume."""
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camflow.files import InputError
from camflow.rl.sampler import plan
from tests.parity.rl import check

torch.set_num_threads(1)
GOLDENS = Path(__file__).parent / "goldens" / "rl"


def test_parity():
    results = check(GOLDENS)
    assert not {case: result for case, result in results.items() if result[3] is False}
    others = ("cam_score", "camera_embedding", "multi_score", "pose_error", "pose_payload", "unified_score")  # of other modules
    assert not [case for case, result in results.items() if result[3] is None and not case.startswith(others)]
    assert sum(result[3] is True for result in results.values()) > 120


def test_parity_notices_one_changed_number(tmp_path):
    for name in ("configs.json", "sde_step_sd3.safetensors"): shutil.copy(GOLDENS / name, tmp_path / name)
    tensors = load_file(tmp_path / "sde_step_sd3.safetensors")
    tensors["input.c0.v"][3, 0, 0, 0] += 1e-4
    save_file(tensors, tmp_path / "sde_step_sd3.safetensors")
    results = check(tmp_path)
    assert results["sde_step_sd3.c0"][3] is False and results["sde_step_sd3.c1"][3] is True


def test_unknown_cases_are_reported_not_passed(tmp_path):
    save_file({"input.c0.x": torch.zeros(1)}, tmp_path / "something_new.safetensors")
    assert check(tmp_path)["something_new"][3] is None


@pytest.mark.parametrize("counts, advice", [
    (dict(world=8, batch=2, k=5), "set batch to one of"), (dict(batch=4, k=1), "set k to 2 or more"), (dict(batch=8, micro_batch=3), "set micro_batch to one of [1, 2, 4, 8]"),
    (dict(batch=8, updates=2), "set updates to a divisor of 1"), (dict(batch=8, k=2, conditions=3), "raise k, lower batch, or add data"), (dict(batch=0), "positive integer")])
def test_impossible_plans_say_what_to_change(counts, advice):
    with pytest.raises(InputError, match="impossible batch plan") as error: plan(**counts)
    assert advice in str(error.value)


def tiny_trainer(world=1, batch=8, reward=None, **changes):
    "A 4-D linear policy; groups of 4, rewards from the first coordinate."
    from camflow.rl.trainer import RLConfig, Trainer
    model = torch.nn.Linear(5, 4)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.linspace(-.3, .3, p.numel()).view_as(p))
    def model_fn(x, sigma, cond): return model(torch.cat([x, cond["c"] * sigma], 1))
    reward = reward or (lambda samples: torch.stack([frames[0] for frames, _, _ in samples]))
    return Trainer(model, model_fn, lambda i: {"c": torch.tensor([float(i)]), "name": str(i)}, 12, list, reward, torch.linspace(1, 0, 9), (4,),
                   plan(world, batch, 4, draws=2, updates=2, micro_batch=4), RLConfig(**{"lr": 1e-2, "clip": 1e-2, **changes}))


def test_invalid_rewards_are_masked_and_counted():
    def reward(samples):
        values = torch.stack([frames[0] for frames, _, _ in samples])
        values[::4] = torch.nan
        return values
    trainer = tiny_trainer(reward=reward)
    metrics = trainer.step()
    assert metrics["status_invalid"] == 4 and metrics["kept"] == 12 and metrics["invalid_ratio"] == .25
    assert all(torch.isfinite(p).all() for p in trainer.params.values())


def test_no_signal_no_update():
    trainer = tiny_trainer(reward=lambda samples: torch.ones(len(samples)))
    before = {name: p.detach().clone() for name, p in trainer.params.items()}
    metrics = trainer.step()
    assert metrics["updates"] == 0 and metrics["zero_std_ratio"] == 1
    assert all(torch.equal(before[name], p) for name, p in trainer.params.items())


def test_evaluation_leaves_the_live_weights():
    trainer = tiny_trainer()
    for _ in range(3): trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.params.items()}
    first, second = (trainer.evaluate(range(4))[0]["reward"] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], p) for name, p in trainer.params.items())
    assert any(not torch.equal(before[name], value) for name, value in trainer.ema.shadow.items())


def test_rollout_cache_is_used_and_never_stale(tmp_path):
    from camflow.rl.rollout import RolloutCache
    for _ in range(2):
        trainer = tiny_trainer()
        trainer.cache = RolloutCache(tmp_path)
        metrics = [trainer.step() for _ in range(2)]
    assert trainer.cache.hits == 8 and metrics[0]["first_ratio_gap"] == 0
    other = tiny_trainer(level=.8)
    other.cache = RolloutCache(tmp_path)
    other.step()
    assert other.cache.hits == 0


def test_shared_noise_keeps_the_ratio_exact():
    trainer = tiny_trainer(same_noise=True, window_low=1)
    metrics = [trainer.step() for _ in range(3)]
    assert all(m["first_ratio_gap"] == 0 for m in metrics)


def brightness(samples): return torch.stack([sample.frames.unit().data.mean() for sample in samples])


TINY_RECAM = {"model": "random", "groups": 2, "k": 2, "sampling_steps": 4, "window_high": 3, "steps": 2, "micro_batch": 2, "eval_conditions": 1, "conditions": 3, "lr": 1e-3}


@pytest.mark.parametrize("arm", ["grpo", "finetune"])
def test_recam_resumes_exactly(tmp_path, arm):
    from camflow.rl.recam_grpo import main
    from camflow.training.metric_writer import read_metrics
    config = TINY_RECAM | {"arm": arm, "checkpoint_every": 1}
    whole = main(config, tmp_path / "whole", brightness)
    first = main(config | {"max_seconds": 1e-9}, tmp_path / "parts", brightness)
    assert (first["status"], first["step"]) == ("time", 1)
    second = main(config, tmp_path / "parts", brightness)
    assert (second["resumed"], second["step"]) == (1, 2)
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert whole["held_out"] == second["held_out"] and len(read_metrics(tmp_path / "parts")) == 2


def test_recam_refuses_what_cannot_work(tmp_path):
    from camflow.rl.recam_grpo import main, parse
    for config, advice in [({"arm": "dpo"}, "choose one of grpo"), ({"data": "videos"}, "needs root="), ({"rewardz": {}}, "unknown settings"),
                           ({"arm": "finetune", "data": "videos", "root": "x"}, "needs true target videos"), ({"cameras": "paired"}, "data='multicam'")]:
        with pytest.raises(InputError, match=advice): parse(config)
    with pytest.raises(InputError, match="impossible batch plan"): main(TINY_RECAM | {"groups": 8}, tmp_path, brightness)


def test_matching_needs_no_window_and_resumes(tmp_path):
    trainer = tiny_trainer(loss="awm", levels=[.9, .5], kl=0.0)
    metrics = [trainer.step() for _ in range(2)]
    assert metrics[0]["updates"] == 2 and "matching_level1" in metrics[0]
    trainer.save(tmp_path)
    again = tiny_trainer(loss="awm", levels=[.9, .5])
    assert again.restore(tmp_path)
    trainer.step(), again.step()
    assert all(torch.equal(trainer.params[n], again.params[n]) for n in trainer.params)

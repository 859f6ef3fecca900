"""RL: parity with the reference implementations, plans, rollouts, the trainer, resume."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camflow.files import InputError
from camflow.rl.sampler import plan
from tests.parity.rl import check

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
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


TWO_RANKS = """
import json, os, sys, torch
from camflow.processes import end_quickly
from camflow.rewards.protocol import Scores
from tests.test_rl import tiny_trainer
end_quickly()
torch.set_num_threads(1)

def reward(samples): # of every other group one cannot be judged: all of them on rank 1
    bad = [item.group % 2 == 1 and item.member == 3 for _, _, item in samples]
    return Scores([float("nan") if b else float(frames[0]) for (frames, _, _), b in zip(samples, bad)], ["invalid" if b else "ok" for b in bad], [{"height": float(frames[1])} for frames, _, _ in samples])

def step(world):
    trainer = tiny_trainer(world, 8 // world, reward)
    trainer.health_fn = lambda frames: {"width": frames[2]}
    return {name: value for name, value in trainer.step().items() if name.split("_")[0] in ("status", "detail", "frames", "reward")}

alone = step(1)
rank = 0 if (child := os.fork()) else 1
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
found = step(2)
if rank: os._exit(0)
os.waitpid(child, 0)
print(json.dumps([alone, found]))
"""


def test_what_a_rollout_tells_is_of_all_ranks(tmp_path):
    done = subprocess.run([sys.executable, "-c", TWO_RANKS, str(tmp_path/"store")], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, found = json.loads(done.stdout)
    assert alone["status_invalid"] == 2 and {"detail_height", "frames_width", "reward_mean"} <= alone.keys()
    assert found == pytest.approx(alone, rel=1e-6)


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


def test_equal_sums_of_different_rewards_are_a_signal():
    from camflow.rl.advantage import advantage
    rewards, group = {"a": torch.tensor([0., 1, 0, 1, 2, 2]), "b": torch.tensor([10., 0, 10, 0, 5, 5])}, [0, 0, 0, 0, 1, 1]
    adv, keep, stats = advantage(rewards, group, weights={"a": 1, "b": .1}, combine="each")
    assert keep.tolist() == [True] * 4 + [False] * 2 and adv.tolist() == pytest.approx([-.9, .9, -.9, .9, 0, 0], abs=1e-3) and stats["zero_std_ratio"] == .5
    assert not advantage(rewards, group, weights={"a": 1, "b": .1})[1].any()


def test_repeats_of_an_evaluation_differ_whatever_the_groups_share():
    plain, shared = (tiny_trainer(same_noise=same).evaluate([0, 1], repeats=3)[0]["reward"] for same in (False, True))
    assert torch.equal(plain, shared) and len(set(shared.tolist())) == 6


def test_another_number_of_samples_is_refused_on_resume():
    state = tiny_trainer(batch=8).state_dict()
    with pytest.raises(InputError, match="samples per draw 8 -> 16"): tiny_trainer(batch=16).load_state_dict(*state)


def test_a_likelihood_needs_noise():
    from camflow.rl.config import RLConfig
    with pytest.raises(InputError, match="level=0 samples without noise"): RLConfig(level=0)
    assert RLConfig(level=0, loss="awm").level == RLConfig(level=0, kind="wan").level == 0


def test_noise_of_the_first_step_is_small_at_any_shift():
    "Rounding made sigmas of 0.9999999 and 1.0000001 of some shifts, and of these steps with a deviation of 1000, or none that is a number."
    from camflow.rl.kernels import Kernel
    from camflow.wan.sampling import recam_sigmas
    for shift in (1.18, 1.32, 2.66, 3.0, 4.03, 4.18, 5.0, 8.06):
        sigmas = recam_sigmas(8, shift)
        assert sigmas[0] == 1 and 0 < float(Kernel().coefficients(sigmas, 0)[2]) < 2


def test_kept_rollouts_go_to_the_device(tmp_path):
    from camflow.rl.rollout import RolloutCache, rollout
    cache, make = RolloutCache(tmp_path), lambda: rollout(lambda x, t, c: x, torch.ones(2, 3), torch.linspace(1, 0, 5))
    for _ in range(2): made = cache.get(tmp_path / "one.safetensors", make, (0, 0), "meta")
    assert cache.hits == 1 and made.x0.device.type == made.latents.device.type == "meta" and made.sigmas.device.type == "cpu"


def test_a_reward_that_only_the_end_has_is_compared_as_missing():
    from camflow.rl.recam_grpo import compare
    found = compare({"a": [1., 2.]}, {"a": [2., 4.], "detail": [1., None]})
    assert found["a"]["difference"] == 1.5 and found["detail"]["missing"] == 2 and found["detail"]["difference"] != found["detail"]["difference"]


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

"""RL methods as the trainer runs them: gradients against formulas written out by hand, exact resume, ranks, precision, marginals."""
import math

import pytest
import torch

from camflow.files import InputError
from camflow.rl.kernels import Kernel
from camflow.rl.rollout import rollout
from camflow.rl.sampler import plan
from camflow.rl.schedules import schedule
from camflow.rl.trainer import RLConfig, Trainer, reference

torch.set_num_threads(1)
METHODS = {
    "flow_grpo": dict(window=0, std="group"),
    "cps": dict(kind="cps", form="square", clip=1e-5),
    "dance": dict(kind="dance", level=.3, window=0, best_of=2),
    "mix": dict(schedule="exp_decay", window_every=3, window_knee=1, window_decay=.5),
    "decay": dict(schedule="decay", window_every=3, roll_back=False),
    "flash": dict(schedule="progressive", solver="dpm2", compress=.5, same_noise=True),
    "tempflow": dict(step_weight="noise", same_noise=True),
    "guard": dict(loss="guard", kl=.01),
    "dppo": dict(loss="dppo", threshold=1e-6, kl_ema=.1),
    "nft": dict(loss="nft", kl=1e-2, levels=(.9, .5), solver="dpm2"),
    "nft_mixed": dict(loss="nft", mix=.5, adv_mode="positive_only", old_decay=2),
    "awm": dict(loss="awm", kl=.01),
    "awm_sgd": dict(loss="awm", optimizer="sgd", lr=.1),
    "awm_full": dict(loss="awm", weighting="ghuber", adv_top=1., clip=1., level_law="discrete", level_count=3, kl=.003, kl_ema=1.),
    "gdpo": dict(combine="each", std="none", adv_mode="binary"),
}


def first(samples): return torch.stack([frames[0] for frames, _, _ in samples])


def both(samples): return {"a": first(samples), "b": 10 * torch.stack([frames[1] for frames, _, _ in samples])}


def make(world=1, batch=8, **changes):
    "A 4-D policy, groups of 4, two draws and two updates per rollout."
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.linspace(-.5, .7, p.numel()).view_as(p))
    make_fn = lambda model: lambda x, sigma, cond: model(torch.cat([x, cond["c"] * sigma], 1))
    cfg = RLConfig(**{"lr": 1e-2, "clip": 1e-2, **changes})
    return Trainer(model, make_fn(model), lambda i: {"c": torch.tensor([float(i)])}, 12, list, both if cfg.combine == "each" else first, schedule(8), (4,),
                   plan(world, batch, 4, draws=2, updates=2, micro_batch=4), cfg, reference(model, make_fn))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_steps_and_resumes_exactly(name, tmp_path):
    whole, half, again = (make(**METHODS[name]) for _ in range(3))
    metrics = [whole.step() for _ in range(4)]
    assert all(math.isfinite(m["policy_loss"]) and m["updates"] == 2 for m in metrics)
    assert all(m["first_ratio_gap"] == 0 for m in metrics)
    for _ in range(2): half.step()
    half.save(tmp_path)
    assert again.restore(tmp_path)
    last = [again.step() for _ in range(2)][-1]
    for ours, theirs in [(whole.params, again.params), (whole.ema.shadow, again.ema.shadow)] + ([(whole.old.shadow, again.old.shadow)] if whole.old else []):
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert {k: v for k, v in metrics[-1].items() if "seconds" not in k} == pytest.approx({k: v for k, v in last.items() if "seconds" not in k}, abs=0, nan_ok=True)


def test_other_settings_are_refused_on_resume(tmp_path):
    trainer = make(**METHODS["nft"])
    trainer.step()
    trainer.save(tmp_path)
    with pytest.raises(InputError, match="old_decay 1 -> 2"): make(**METHODS["nft"] | {"old_decay": 2}).restore(tmp_path)


@pytest.mark.parametrize("name, value", [("loss", "dpo"), ("kind", "ddpm"), ("form", "sum"), ("schedule", "up"), ("step_weight", "snr"), ("solver", "heun"), ("std", "row"), ("combine", "max"),
                                         ("adv_mode", "some"), ("clip_unit", "px"), ("level_law", "normal"), ("weighting", "l1"), ("old_decay", 3)])
def test_unknown_names_say_what_exists(name, value):
    with pytest.raises(InputError, match=f"unknown {name} .*choose one of"): RLConfig(**{name: value})


def by_hand(trainer, batch, adv, v_of, old_of, ref_of):
    "The loss of one micro-batch, from its record and nothing but formulas. Advantages are given, all samples are kept."
    cfg, made, total = trainer.cfg, batch.trajectory, 0.0
    s, c = [float(x) for x in made.sigmas], batch.cond
    if cfg.loss in ("nft", "awm"):
        from camflow.device import generator
        for n, t in enumerate(cfg.levels):
            noise = torch.stack([torch.randn(4, generator=generator(cfg.seed, f"match {n}", item.group, 0)) for item in batch.items])
            x = (1 - t) * made.x0 + t * noise
            v = v_of(x, t, c)
            if cfg.loss == "awm":
                l = ((v - noise + made.x0)**2).mean(1)
                logp = -((l + 1e-10)**.25 - 1e-10**.25) * t / .25
                loss = -(adv / 5 * (logp - logp.detach()).exp())
            else:
                old, r = old_of(x, t, c), (adv / 10 + .5).clamp(0, 1)
                loss = 0
                for u, p in ((.5 * v + .5 * old, r), (1.5 * old - .5 * v, 1 - r)):
                    gap = x - t * u - made.x0
                    loss = loss + 5 * p * (gap**2).mean(1) / gap.detach().abs().mean(1) / .5
            total = total + (loss + cfg.kl * ((v - ref_of(x, t, c))**2).mean(1)).mean() / len(cfg.levels)
        return total
    for n in range(len(made)):
        i, x, y = made.window[0] + n, made.latents[n], made.latents[n + 1]
        dt = s[i + 1] - s[i]
        a = .7 * math.sqrt(s[i] / (1 - (s[i] if s[i] < 1 else s[1])))
        v = v_of(x, s[i], c)
        mean = x * (1 + a**2 * dt / (2 * s[i])) + v * (1 + a**2 * (1 - s[i]) / (2 * s[i])) * dt
        std = a * math.sqrt(-dt)
        logp = (-(y - mean)**2 / (2 * std**2)).mean(1)
        change, drift = logp - logp.detach(), lambda: ((mean - made.mean[n])**2).mean(1) / (2 * std**2)
        loss = {"ppo": lambda: -adv * change.exp(), "dppo": lambda: -adv * change.exp(), "guard": lambda: -adv * ((change + drift()) * std).exp() / -dt}[cfg.loss]()
        if cfg.step_weight == "noise":
            stds = [.7 * math.sqrt(s[j] / (1 - (s[j] if j else s[1])) * (s[j] - s[j + 1])) for j in range(4)]
            loss = loss * std / (sum(stds) / 4)
        total = total + (loss + cfg.kl * ((v - ref_of(x, s[i], c))**2).mean(1)).mean() / len(made)
    return total


@pytest.mark.parametrize("changes", [dict(), dict(step_weight="noise", kl=.3), dict(loss="guard", kl=.1), dict(loss="dppo", threshold=1e9), dict(loss="nft", mix=.5, kl=.2, old_decay=2),
                                     dict(loss="awm", weighting="ghuber", adv_top=1., kl=.2)], ids=lambda c: c.get("loss", "ppo") + "_weighted" * ("step_weight" in c))
def test_gradients_are_those_of_the_formulas(changes):
    trainer = make(**changes)
    for _ in range(2): trainer.step()                                # away from the reference (and from the old policy)
    if trainer.old: trainer.old.update({n: p * 1.1 for n, p in trainer.params.items()})
    items = trainer.sampler.items(9)[:4]
    batch = trainer.sample(items, trainer.window())
    adv = torch.tensor([1., -2., .5, 3.])
    for _ in trainer.backward(batch, adv / 5 if trainer.cfg.adv_top else adv, torch.ones(4, dtype=torch.bool), 4): pass
    got = {n: p.grad.clone() for n, p in trainer.params.items()}
    trainer.model.zero_grad()
    state = {n: p.detach().clone() for n, p in trainer.params.items()}
    old_of = lambda x, t, c: torch.func.functional_call(trainer.model, trainer.old.shadow, torch.cat([x, c["c"] * t], 1)).detach()
    v_of = lambda x, t, c: trainer.model(torch.cat([x, c["c"] * t], 1))
    by_hand(trainer, batch, adv, v_of, old_of, lambda *a: trainer.ref_fn(*a).detach()).backward()
    for n, p in trainer.params.items():
        assert torch.equal(state[n], p.detach())
        assert torch.allclose(got[n], p.grad, rtol=1e-4, atol=1e-7), n


def test_best_of_trains_on_the_extremes():
    trainer = make(best_of=2)
    metrics = trainer.step()
    assert metrics["kept"] == 8 and metrics["samples"] == 16          # two of each four


@pytest.mark.parametrize("loss", ["guard", "awm"])
def test_packing_halves_the_replays_and_changes_nothing(loss):
    results, calls = [], []
    for pack in (False, True):
        trainer = make(best_of=2, pack=pack, loss=loss, epochs=2)
        inner, seen = trainer.model_fn, []
        trainer.model_fn = lambda x, sigma, cond: (seen.append(len(x)) if torch.is_grad_enabled() else None, inner(x, sigma, cond))[1]
        results.append(trainer.step())
        calls.append(sum(seen))
        params = {n: p.detach().clone() for n, p in trainer.params.items()}
        results[-1]["params"] = params
    assert calls[1] * 2 == calls[0]
    assert all(torch.allclose(results[0]["params"][n], results[1]["params"][n], atol=1e-6) for n in params)
    assert results[0]["policy_loss"] == pytest.approx(results[1]["policy_loss"], abs=1e-5)


def test_the_nft_policy_that_samples_trails():
    trainer = make(loss="nft", old_decay=2)
    start = {n: p.detach().clone() for n, p in trainer.params.items()}
    trainer.step()
    assert all(torch.equal(trainer.old.shadow[n], p) for n, p in trainer.params.items())   # d = 0 until 75
    trainer.done = 80
    before = {n: v.clone() for n, v in trainer.old.shadow.items()}
    trainer.step()
    d = .0075 * (81 - 75)
    for n, p in trainer.params.items():
        assert torch.allclose(trainer.old.shadow[n], d * before[n] + (1 - d) * p.detach(), atol=1e-6) and not torch.equal(start[n], p)


def test_flash_compresses_after_the_window_only():
    trainer = make(**METHODS["flash"])
    made = trainer.sample(trainer.sampler.items(0)[:4], (1, 3)).trajectory
    assert torch.equal(made.sigmas[:4], trainer.sigmas[:4]) and len(made.sigmas) == 6 and made.sigmas[-1] == 0
    assert len(trainer.sample(trainer.sampler.items(0)[:4], (0, 0), "eval ").trajectory.sigmas) == 9


# ---- precision: before any update the policy that learns is the one that sampled

@pytest.mark.parametrize("dtype, loss", [(torch.float32, "ppo"), (torch.bfloat16, "guard")])
def test_first_step_ratio_is_one(dtype, loss, tmp_path, monkeypatch):
    from camflow.rl import recam_grpo
    monkeypatch.setattr(recam_grpo, "compute_dtype", lambda: dtype)
    config = {"model": "random", "groups": 2, "k": 2, "sampling_steps": 4, "window_high": 3, "micro_batch": 2, "eval_conditions": 1, "conditions": 3, "loss": loss}
    trainer = recam_grpo.build(config, tmp_path, lambda samples: torch.stack([sample.frames.unit().data.mean() for sample in samples]))[0]
    metrics = trainer.step()
    assert metrics["first_ratio_gap"] == 0 and metrics["updates"] == 1


# ---- ranks

RANKED = ("guard", "nft")


def curve(metrics): return [[m["policy_loss"], m["grad_norm"], m["reward_mean"]] for m in metrics]


def _rank(rank, world, folder):
    import os
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    run, result = lambda trainer, n: [trainer.step() for _ in range(n)], {}
    for name in RANKED:
        trainer, half, again = (make(world, 8 // world, **METHODS[name]) for _ in range(3))
        made = curve(run(trainer, 4))
        run(half, 2)
        half.save(f"{folder}/{name}")
        torch.distributed.barrier()
        assert again.restore(f"{folder}/{name}")
        run(again, 2)
        exact = all(torch.equal(trainer.params[n], again.params[n]) and torch.equal(trainer.ema.shadow[n], again.ema.shadow[n]) for n in trainer.params)
        found = [None] * world
        torch.distributed.all_gather_object(found, exact)
        result[name] = {"curve": made, "exact": all(found), "params": {n: p.detach() for n, p in trainer.params.items()}}
    if rank == 0: torch.save(result, f"{folder}/result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_curve_of_one_and_resume_exactly(tmp_path):
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    both = torch.load(tmp_path / "result.pt", weights_only=True)
    for name in RANKED:
        alone = make(**METHODS[name])
        assert torch.allclose(torch.tensor(curve([alone.step() for _ in range(4)])), torch.tensor(both[name]["curve"]), rtol=1e-5, atol=1e-5)
        assert both[name]["exact"] and all(torch.allclose(p, both[name]["params"][n], atol=1e-5) for n, p in alone.params.items())


# ---- marginals: with the exact velocity of Gaussian data, every sampler has a known final spread (table 1.2 of the field survey)

def spread(kind, level, N, solver="euler"):
    "Final over true standard deviation, in closed form: all kernels are linear, so the variance follows by recursion."
    m, d = .5, .3
    t = torch.linspace(1, 1e-3, N, dtype=torch.float64)
    s = torch.cat([3 * t / (1 + 2 * t), torch.zeros(1, dtype=torch.float64)])
    mean, var = 0.0, 1.0
    for i in range(N):
        sigma = float(s[i])
        slope = ((sigma - (1 - sigma) * d**2) / ((1 - sigma)**2 * d**2 + sigma**2))                   # v = slope * x + offset
        offset = (-m - slope * (1 - sigma) * m)
        kx, kv, std = (float(k) for k in Kernel(kind, level).coefficients(s, i))
        mean, var = (kx + kv * slope) * mean + kv * offset, (kx + kv * slope)**2 * var + std**2
    return math.sqrt(var) / d, mean


TABLE = [("flow", 0., .60, .79, .91), ("flow", .7, .87, .90, .96), ("flow", 1., 1.10, .95, .97), ("cps", .7, .54, .69, .78), ("cps", .9, .52, .62, .68),
         ("dance", .3, .73, .84, .93), ("dance", .7, 1.21, 1.02, 1.00), ("wan", 0., .72, .84, .93)]


@pytest.mark.parametrize("kind, level, n10, n20, n50", TABLE)
def test_marginals(kind, level, n10, n20, n50):
    for N, want in ((10, n10), (20, n20), (50, n50)): assert abs(spread(kind, level, N)[0] - want) < .02, (N, spread(kind, level, N))


@pytest.mark.parametrize("kind", ["flow", "dance", "wan"])
def test_marginals_converge_to_the_data(kind):
    far, near = (spread(kind, .5, N) for N in (50, 800))
    assert abs(near[0] - 1) < .01 and abs(near[1] - .5) < .01 and abs(near[0] - 1) < abs(far[0] - 1) + 1e-3


def test_the_recursion_is_what_the_sampler_does():
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(1, 1e-3, 20, dtype=torch.float64)
    s = torch.cat([3 * t / (1 + 2 * t), torch.zeros(1, dtype=torch.float64)])
    def exact(x, sigma, cond):
        x0 = .5 + (1 - sigma) * .09 / ((1 - sigma)**2 * .09 + sigma**2) * (x - (1 - sigma) * .5)
        return (x - x0) / sigma
    made = rollout(exact, torch.randn(20000, 1, generator=g), s, window=(0, 20), kernel=Kernel("flow", .7), generator=g)
    assert abs(float(made.x0.std()) / .3 - spread("flow", .7, 20)[0]) < .02

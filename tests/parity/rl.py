"""Replays a folder of RL goldens (format: goldens/rl/README.md). Settings come from configs.json and the case files, never from here."""
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from camflow.files import InputError
from camflow.rl.advantage import MODES, advantage, best_of, shaped
from camflow.rl.kernels import Kernel, coefficients, dpm_step, log_prob, sde_step
from camflow.rl.losses import WEIGHTINGS, dppo_loss, guard_loss, masked_mean, matching_logp, mean_kl, nft_loss, old_decay, ppo_loss, velocity_kl
from camflow.rl.rollout import rollout
from camflow.rl.sampler import GroupSampler, plan
from camflow.rl.schedules import STAYS, compressed, draw_levels, draw_window, moving_window, schedule
from camflow.training.ema import EMA
from camflow.wan.sampling import add_noise, euler_step, recam_sigmas, training_schedule, velocity

SAMPLE, LOGP, EXACT, SINGLE = (1e-6, 0.0), (1e-6, 2e-6), (1e-12, 1e-12), (1e-6, 1e-6)  # (absolute, relative)
EXACT_AWM = (1e-9, 1e-9)


class Score:
    "Collects differences of one case; a NaN matches only a NaN in the same place."
    def __init__(self): self.diff, self.worst, self.atol, self.rtol, self.ok = 0.0, -1.0, 0.0, 0.0, True

    def add(self, got, want, tolerance):
        got, want = (torch.as_tensor(np.asarray(value) if not torch.is_tensor(value) else value).detach().double() for value in (got, want))
        if got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
            self.ok, self.diff = False, float("inf")
            return
        atol, rtol = tolerance
        gap = (got - want).abs().nan_to_num(0.0)
        bound = atol + rtol * want.abs().nan_to_num(0.0)
        if not gap.numel(): return
        excess = float((gap / bound).max())
        self.ok &= excess <= 1
        if excess > self.worst: self.worst, self.diff, self.atol, self.rtol = excess, float(gap.max()), atol, rtol

    def same(self, got, want): self.add(torch.tensor(float(got != want)), torch.zeros(()), EXACT)

    @property
    def result(self): return self.diff, self.atol, self.rtol, self.ok


def gradient(loss, *inputs): return torch.autograd.grad(loss, inputs, retain_graph=True)


def ends(sigmas): return {"sigma_max": float(sigmas[1]), "sigma_min": float(sigmas[-1])}


def all_steps(x, v, sigmas, kind, level, form, **how):
    "One row per step of the schedule."
    s = sigmas.double()
    step = sde_step(x, v, s[:-1], s[1:], kind, level, form=form, **ends(s), **how)
    return step, step.logp if step.logp is not None else log_prob(step.x_next, step.mean, step.std, form)


def sde_step_sd3(score, cfg, i, o):
    kind, form = {"sde": ("flow", "gaussian"), "cps": ("cps", "square")}[cfg["sde_type"]]
    kernel = kind, cfg["noise_level"], form
    step, logp = all_steps(i["x"], i["v"], i["sigmas"], *kernel, noise=i["noise"])
    for name in ("x_next", "mean"): score.add(getattr(step, name), o[name], SAMPLE)
    score.add(logp, o["log_prob"], LOGP)
    per_dt = 1.0 if kind == "cps" else o["sqrt_dt"].double()
    score.add(step.std, o["std_dev_t"].double() * per_dt, SAMPLE)
    v = i["v"].clone().requires_grad_()
    _, given = all_steps(i["x"], v, i["sigmas"], *kernel, x_next=i["x_next_given"])
    score.add(given, o["log_prob_given"], LOGP)
    if given.isnan().all(): score.same(bool(o["grad_v_given"].isfinite().any()), False)  # a step without noise has no density, so no gradient
    else: score.add(gradient(given.sum(), v)[0], o["grad_v_given"], LOGP)


def sde_step_wan(score, cfg, i, o):
    kernel = "wan", 0.0, "gaussian"
    step, logp = all_steps(i["x"], i["v"], i["sigmas"], *kernel, noise=i["noise"])
    for name in ("x_next", "mean"): score.add(getattr(step, name), o[name], SAMPLE)
    score.add(logp, o["log_prob"], LOGP)
    score.add(step.std, o["std_step"], SAMPLE)
    s = i["sigmas"].double()
    straight = sde_step(i["x"], i["v"], s[:-1], s[1:], level=0.0).mean
    score.add(straight, o["x_next_deterministic"], SAMPLE)
    score.add(all_steps(i["x"], i["v"], i["sigmas"], *kernel, x_next=straight)[1], o["log_prob_deterministic"], LOGP)
    v = i["v"].clone().requires_grad_()
    _, given = all_steps(i["x"], v, i["sigmas"], *kernel, x_next=i["x_next_given"])
    score.add(given, o["log_prob_given"], LOGP)
    score.add(gradient(given.sum(), v)[0], o["grad_v_given"], LOGP)


def cameraflow_step(score, cfg, i, o):
    "The published recipe: an ODE step scored under the Wan SDE; its schedule has no trailing zero."
    s = i["sigmas"].double()
    stop = torch.cat([s, s.new_zeros(1)])
    ode = sde_step(i["x"], i["v"], stop[:-1], stop[1:], level=0.0).mean
    score.add(ode, o["ode_next"], SAMPLE)
    v = i["v"][:-1].clone().requires_grad_()
    step = sde_step(i["x"][:-1], v, s[:-1], s[1:], "wan", x_next=ode[:-1], **ends(s))
    score.add(step.mean, o["mean"], SAMPLE)
    score.add(step.std, o["std_step"], SAMPLE)
    score.add(step.logp, o["log_prob"], LOGP)
    score.add(gradient(step.logp.sum(), v)[0], o["grad_v"], LOGP)


def dance_mix_step(score, cfg, i, o):
    eta, s = cfg["eta"], i["sigmas"].double()
    for name, kind, form in [("dance", "dance", "gaussian"), ("mix_dance", "dance", "unnormalised"), ("mix_flow", "flow", "gaussian")]:
        infix = "_sde" if name == "dance" else ""
        step, logp = all_steps(i["x"], i["v"], i["sigmas"], kind, eta, form, noise=i["noise"])
        for part, value, tolerance in [("mean", step.mean, SAMPLE), ("x_next", step.x_next, SAMPLE), ("std_step", step.std, SAMPLE), ("log_prob", logp, LOGP)]:
            if f"{name}{infix}_{part}" in o: score.add(value, o[f"{name}{infix}_{part}"], tolerance)
        v = i["v"].clone().requires_grad_()
        _, given = all_steps(i["x"], v, i["sigmas"], kind, eta, form, x_next=i["x_next_given"])
        if f"{name}_log_prob_given" in o: score.add(given, o[f"{name}_log_prob_given"], LOGP)
        if f"{name}_grad_v_given" in o: score.add(gradient(given.sum(), v)[0], o[f"{name}_grad_v_given"], LOGP)
    straight = sde_step(i["x"], i["v"], s[:-1], s[1:], level=0.0).mean
    rows = s[:-1].view(-1, *[1] * (i["x"].ndim - 1)).float()
    score.add(i["x"] - rows * i["v"], o["pred_x0"], SAMPLE)
    std = eta * (s[:-1] - s[1:]).sqrt()
    noisy = straight + std.float().view_as(rows) * i["noise"]
    for name, value, tolerance in [("dance_ode_mean", straight, SAMPLE), ("dance_ode_x_next", noisy, SAMPLE), ("dance_ode_log_prob", log_prob(noisy, straight, std), LOGP),
                                   ("mix_dance_ode_x_next", straight, SAMPLE), ("mix_flow_ode_x_next", straight, SAMPLE),
                                   ("mix_dance_ode_log_prob", log_prob(straight, straight, std, "unnormalised"), LOGP)]:
        if name in o: score.add(value, o[name], tolerance)


def grpo_loss(score, cfg, i, o, kind):
    "Old chain, new chain, clipped loss plus KL, and the gradients."
    n, sigmas = cfg["step"], i["sigmas"].double()
    if kind == "wan" and len(sigmas) == cfg["N"] and n == cfg["N"] - 1: return score.same("last step", "not defined")
    kernel = Kernel(kind, cfg.get("noise_level", 0.0))
    old = kernel.step(sigmas, n, i["x"], i["v_old"], noise=i["noise"])
    v = i["v_new"].clone().requires_grad_()
    new = kernel.step(sigmas, n, i["x"], v, x_next=o["x_next"])
    ref = kernel.step(sigmas, n, i["x"], i["v_ref"], x_next=o["x_next"])
    score.add(old.x_next, o["x_next"], SAMPLE)
    for ours, step in (("old_mean", old), ("mean", new), ("mean_ref", ref)): score.add(step.mean, o[ours], SAMPLE)
    score.add(old.logp, o["old_log_prob"], LOGP)
    score.add(new.logp, o["log_prob"], LOGP)
    policy, metrics = ppo_loss(new.logp, o["old_log_prob"], i["advantages"].double(), cfg["clip_range"], adv_clip=cfg["adv_clip_max"])
    score.add(policy.reshape(1), o["policy_loss"], SAMPLE)
    score.add((new.logp - o["old_log_prob"]).exp(), o["ratio"], SAMPLE)
    spread = o["std_dev_t"][0].double() if kind == "flow" else new.std
    loss = policy
    if cfg["beta"]:
        kl = masked_mean(mean_kl(new.mean, ref.mean, float(spread)))
        score.add(kl.reshape(1), o["kl_loss"], SAMPLE)
        loss = policy + cfg["beta"] * kl
    score.add(loss.reshape(1), o["loss"], (1e-6, 4e-3) if o["loss"].dtype == torch.bfloat16 else SAMPLE)
    for name, value in zip(("grad_v", "grad_log_prob", "grad_mean"), gradient(loss, v, new.logp, new.mean)): score.add(value, o[name], SINGLE)
    score.add(metrics["approx_kl"].reshape(1), o["info_approx_kl"], SAMPLE)
    score.add((metrics["clip_high"] + metrics["clip_low"]).reshape(1), o["info_clipfrac"], SAMPLE)
    for ours, theirs in (("clip_high", "info_clipfrac_gt_one"), ("clip_low", "info_clipfrac_lt_one")):
        if theirs in o: score.add(metrics[ours].reshape(1), o[theirs], SAMPLE)


def grpo_loss_dance_mix(score, cfg, i, o):
    share = cfg["grad_acc"] * cfg["T"]
    rows = {"dance_loss": [], "dance_grad": [], "mix_loss": [], "mix_grad": [], "mix_kl_loss": []}
    for new, old, adv in zip(i["new_log_probs"], i["old_log_probs"], i["advantages"]):
        new = new.clone().requires_grad_()
        loss = ppo_loss(new, old, adv.reshape(1), cfg["clip_range"], adv_clip=cfg["adv_clip_max"])[0] / share
        kl = cfg["kl_coeff"] * 0.5 * (new - old).square().mean() / share
        for name, value in [("dance_loss", loss), ("dance_grad", gradient(loss, new)[0]), ("mix_loss", loss + kl), ("mix_grad", gradient(loss + kl, new)[0]), ("mix_kl_loss", kl)]:
            rows[name].append(float(value.detach()))
    for name, values in rows.items():
        if name != "mix_kl_loss": score.add(values, o[name], SAMPLE)


def guard(score, cfg, i, o):
    "GRPO-Guard. The published drift is one number for the whole batch; it is fed in through the log-probability, the loss itself has one per sample."
    if not cfg.get("rationorm", True): return NotImplemented
    n, sigmas = cfg["step"], i["sigmas"].double()
    kernel, dt = Kernel("flow", cfg["noise_level"]), float(sigmas[n + 1] - sigmas[n])
    old = kernel.step(sigmas, n, i["x"], i["v_old"], noise=i["noise"])
    v = i["v_new"].clone().requires_grad_()
    new, ref = (kernel.step(sigmas, n, i["x"], u, x_next=o["x_next"]) for u in (v, i["v_ref"]))
    for ours, value in (("x_next", old.x_next), ("old_mean", old.mean), ("mean", new.mean), ("mean_ref", ref.mean)): score.add(value, o[ours], SAMPLE)
    score.add(old.logp, o["old_log_prob"], LOGP)
    score.add(new.logp, o["log_prob"], LOGP)
    drift = mean_kl(new.mean, o["old_mean"], float(new.std))
    policy, metrics = guard_loss(new.logp + drift.mean() - drift, o["old_log_prob"], i["advantages"].double(), drift, float(new.std), dt, cfg["clip_range"], adv_clip=cfg["adv_clip_max"])
    score.add(policy.reshape(1), o["policy_loss"], SINGLE)
    score.add(((new.logp - o["old_log_prob"] + drift.mean()) * float(new.std)).exp(), o["ratio"], SAMPLE)
    loss = policy + cfg["beta"] * masked_mean(mean_kl(new.mean, ref.mean, float(o["std_dev_t"][0])))
    score.add(loss.reshape(1), o["loss"], SINGLE)
    for name, value in zip(("grad_v", "grad_log_prob", "grad_mean"), gradient(loss, v, new.logp, new.mean)): score.add(value, o[name], SINGLE)
    score.add((metrics["clip_high"] + metrics["clip_low"]).reshape(1), o["info_clipfrac"], SAMPLE)
    for ours, theirs in (("clip_high", "info_clipfrac_gt_one"), ("clip_low", "info_clipfrac_lt_one")): score.add(metrics[ours].reshape(1), o[theirs], SAMPLE)


def dppo(score, cfg, i, o):
    "One implementation's loss over all columns, another's three losses column by column, on that one's standard deviations."
    eta, sigmas, adv = cfg["eta"], i["sigmas"].double(), i["advantages"]
    rows, tau = torch.tensor(cfg["steps"]), cfg["kl_mask_threshold"]
    s = sigmas[rows]
    score.add(coefficients(s, sigmas[rows + 1], "flow", eta, sigma_max=0.99)[2], o["sigma_t"], SINGLE)  # at sigma = 1 not sigmas[1], but .99
    logp = i["new_log_prob"].clone().requires_grad_()
    columns = []
    for c, std in enumerate(o["sigma_t"].tolist()):
        new, old = logp[:, c], i["old_log_prob"][:, c]
        drift = mean_kl(i["new_mean"][:, c], i["old_mean"][:, c], std)
        loss, metrics = dppo_loss(new, old, adv, drift, tau)
        columns.append((loss, drift, metrics))
        score.add(loss, o["verl_dppo_loss"][c], SAMPLE)
        score.add(ppo_loss(new, old, adv, cfg.get("clip_range", 1e-4))[0], o["verl_grpo_loss"][c], SAMPLE)
        dt = float(sigmas[rows[c] + 1] - sigmas[rows[c]])
        score.add(guard_loss(new, old, adv, drift, std, dt, cfg.get("clip_range", 1e-4))[0], o["verl_guard_loss"][c], SINGLE)
    loss, drifts = torch.stack([one[0] for one in columns]).mean(), torch.stack([one[1] for one in columns], 1)
    ratio = (logp - i["old_log_prob"]).exp().detach()
    dropped, far = torch.stack([one[2]["dropped"] for one in columns]).mean(), (drifts >= tau).float().mean()
    score.add(loss.reshape(1), o["loss"], SAMPLE)
    score.add(gradient(loss, logp)[0], o["grad_log_prob"], SAMPLE)
    for name, value in [("kl_new_old_mean", drifts.mean()), ("kl_new_old_max", drifts.max()), ("masked_fraction", dropped), ("unmasked_fraction", 1 - dropped),
                        ("kl_mask_fraction", far), ("ratio_mean", ratio.mean()), ("ratio_std", ratio.std()), ("ratio_min", ratio.min()), ("ratio_max", ratio.max())]:
        score.add(value.reshape(1), o[f"metric_{name}"], SAMPLE)


def nft(score, cfg, i, o):
    if cfg["adv_mode"] not in MODES: return NotImplemented
    t = (i["timestep"].double() / 1000).view(-1, *[1] * (i["x0"].ndim - 1))
    x_t = (1 - t).float() * i["x0"] + t.float() * i["noise"]
    score.add(x_t, o["xt"], SAMPLE)
    adv, v = shaped(i["advantages"], cfg["adv_mode"], cfg["adv_clip_max"]).double(), i["v"].clone().requires_grad_()
    given = lambda keep=None: nft_loss(v.double(), i["v_old"].double(), o["xt"].double(), i["x0"].double(), t, adv, cfg["beta"], cfg["adv_clip_max"], keep)
    policy, metrics = given()
    rows = [given(torch.arange(len(adv)) == row) for row in range(len(adv))]
    score.add(torch.stack([one[0] for one in rows]) / cfg["adv_clip_max"], o["per_sample"], SINGLE)
    for ours, theirs in (("nft_positive", "positive_loss"), ("nft_negative", "negative_loss")): score.add(torch.stack([one[1][ours] for one in rows]), o[theirs], SINGLE)
    kl = velocity_kl(v, i["v_ref"]).mean()
    loss = policy + cfg["kl"] * kl
    for name, value in [("loss", loss), ("log_total_loss", loss), ("log_policy_loss", loss), ("log_kl_div", kl), ("log_kl_div_loss", kl),
                        ("log_old_kl_div", velocity_kl(i["v_old"], i["v_ref"]).mean()), ("log_old_deviate", metrics["old_distance"])]:
        score.add(value.reshape(1), o[name], SINGLE)
    score.add(gradient(loss, v)[0], o["grad_v"], SAMPLE)


AWM_NAMES = {"Uniform": "uniform", "t**2": "t2"}


def awm(score, cfg, i, o):
    if AWM_NAMES.get(cfg["weighting"], cfg["weighting"]) not in WEIGHTINGS or {cfg["kl_weight"], cfg["kl_ema_weight"]} - {"Uniform", "ELBO"}: return NotImplemented
    T, B, t = cfg["T"], cfg["B"], i["t"].double()
    rows = t.view(-1, *[1] * (i["clean"].ndim - 1))
    score.add((1 - rows) * i["clean"] + rows * i["noise"], o["noised"], SAMPLE)
    how = AWM_NAMES.get(cfg["weighting"], cfg["weighting"]), cfg["ghuber_power"]
    v = i["v"].clone().requires_grad_()
    new, old = (matching_logp(u.double(), i["clean"].double(), i["noise"].double(), i["t"], *how) for u in (v, i["v_old"]))
    if not cfg["off_policy"]: old = new.detach()
    score.add(new.view(T, B), o["log_prob"], EXACT_AWM)
    score.add(old.view(T, B), o["old_log_prob"], EXACT_AWM)
    adv = shaped(i["advantages"].double(), "all", cfg["adv_clip_max"], cfg["advantage_max"])
    if cfg["loss_type"] == "exp_first": adv = adv.repeat(T)
    else: new, old = (one.view(T, B).mean(0) for one in (new, old))
    score.add((new - old).exp(), o["ratio"], EXACT_AWM)
    policy, _ = ppo_loss(new, old, adv, cfg["clip_range"], adv_clip=None)
    score.add(policy.reshape(1), o["policy_loss"], EXACT_AWM)
    std = 0.7 * (t / (1 - t.clamp(max=0.99))).sqrt()
    score.add(std, o["std_dev_t"], SAMPLE)
    distance = {"Uniform": lambda u: velocity_kl(v.double(), u), "ELBO": lambda u: mean_kl(v.double(), u.double(), o["std_dev_t"].double())}
    loss = policy
    for name, weight, law, other in [("kl_loss", "beta", "kl_weight", "v_ref"), ("ema_kl_loss", "ema_beta", "kl_ema_weight", "v_ema")]:
        kl = distance[cfg[law]](i[other]).mean()
        score.add(kl.reshape(1), o[name], EXACT_AWM)
        loss = loss + cfg[weight] * kl
    score.add(loss.reshape(1), o["loss"], EXACT_AWM)
    score.add(gradient(loss, v)[0], o["grad_v"], SAMPLE)


def mix_dpmpp_ode(score, cfg, i, o):
    x, x0s, sigmas, N = i["x_T"].double(), [], i["sigmas"].double(), len(i["v"])
    for n, v in enumerate(i["v"].double()):
        x0s.append(x - float(sigmas[n]) * v)
        x = dpm_step(x, x0s, sigmas, n, min(cfg["order"], 2) if N < 15 and n == N - 2 else cfg["order"], cfg["solver"])
        score.add(x, o["x"][n], SINGLE)


def flow_match_training(score, cfg, i, o):
    "Two packages train on one schedule with different weights; the bell of the second is 2.8 times narrower."
    made, ids = training_schedule(cfg["N"]), torch.tensor(cfg["ids"])
    other = torch.exp(-2 * ((made.timesteps / 1000 - 0.5) / 0.5)**2)
    other = other - other.min()
    ends = torch.cat([made.sigmas, torch.zeros(1)])
    for name, weights in (("rc", made.weights), ("cf", other * (cfg["N"] / other.sum()))):
        score.add(made.timesteps, o[f"{name}_timesteps"], (1e-3, 0.0))
        score.add(weights, o[f"{name}_weights"], SINGLE)
        score.add(velocity(i["x0"], i["noise"]), o[f"{name}_target"], SAMPLE)
        noised = add_noise(i["x0"].expand(len(ids), *i["x0"].shape), i["noise"], made.sigmas[ids])
        score.add(noised, o[f"{name}_noised"], SAMPLE)
        score.add(torch.stack([euler_step(i["x0"], i["v"], ends[n], ends[n + 1]) for n in ids]), o[f"{name}_step"], SAMPLE)


def rl_loop_tiny(score, cfg, i, o, shapes):
    "Two optimizer steps of the reference loop: rollout, tracker, losses, Adam, average."
    from tests.parity.seeded import seeded_state_dict
    weights = {name: torch.as_tensor(value) for name, value in seeded_state_dict(shapes).items()}
    params = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    cond = i["cond"][i["group"]]

    def velocity(weights):
        def model(x, sigma, cond):
            h = torch.cat([x.flatten(1), torch.full((len(x), 1), float(sigma)), cond], 1)
            h = torch.tanh(h @ weights["policy.fc1.weight"].T + weights["policy.fc1.bias"])
            return (h @ weights["policy.fc2.weight"].T + weights["policy.fc2.bias"]).view_as(x)
        return model

    N, kernel = cfg["N"], Kernel("flow", cfg["noise_level"])
    made = rollout(velocity(params), i["x_T"], i["sigmas"], cond, (0, N), kernel, noise=i["noise"])
    score.add(made.latents.transpose(0, 1), o["latents"], SAMPLE)
    score.add(made.logp.T, o["log_probs"], LOGP)
    rewards = -(made.x0 - i["target"]).flatten(1).square().mean(1)
    score.add(rewards, o["rewards"], SAMPLE)
    adv = advantage(rewards, i["group"], std="global" if cfg["global_std"] else "group", zero_tol=0)[0]
    score.add(adv[:, None].expand_as(o["advantages"]), o["advantages"], SINGLE)
    optimizer = torch.optim.AdamW(params.values(), lr=cfg["lr"], betas=(.9, .999), eps=1e-8, weight_decay=1e-4)
    average, T = EMA(params, cfg["ema_decay"]), o["advantages"].shape[1]
    for update in range(len(o["losses"])):
        optimizer.zero_grad()
        for t in range(T):
            x = made.latents[t]
            new = kernel.step(made.sigmas, t, x, velocity(params)(x, float(made.sigmas[t]), cond), x_next=made.latents[t + 1])
            ref = kernel.step(made.sigmas, t, x, velocity(weights)(x, float(made.sigmas[t]), cond), x_next=made.latents[t + 1])
            loss, _ = ppo_loss(new.logp, made.logp[t], adv, cfg["clip_range"], adv_clip=cfg["adv_clip_max"])
            std = float(new.std / (made.sigmas[t].double() - made.sigmas[t + 1].double()).sqrt())
            loss = loss + cfg["beta"] * masked_mean(mean_kl(new.mean, ref.mean, std))
            score.add(loss, o["losses"][update, t], SAMPLE)
            score.add((new.logp - made.logp[t]).exp(), o["ratios"][update, t], SAMPLE)
            (loss / T).backward()
        for name, p in params.items(): score.add(p.grad, o[f"grad_step{update}.{name}"], SAMPLE)
        score.add(torch.nn.utils.clip_grad_norm_(params.values(), 1.0), o["grad_norms"][update], SAMPLE)
        optimizer.step()
        for name, p in params.items(): score.add(p, o[f"param_step{update}.{name}"], SAMPLE)
        average.count = update + 1
        if (average.count + 1) % cfg["ema_interval"] == 0: average.update(params)
    for name, value in average.shadow.items(): score.add(value, o[f"ema.{name}"], SAMPLE)


def advantage_per_prompt(score, i, o):
    names = sorted(set(i["prompts"]))
    ids = torch.tensor([names.index(p) for p in i["prompts"]])
    adv, _, stats = advantage(torch.tensor(i["rewards"], dtype=torch.float64), ids, "global" if i["global_std"] else "group", zero_tol=0)
    want = torch.tensor(o["advantages"], dtype=torch.float64)
    score.add(adv[:, None].expand_as(want) if want.ndim == 2 else adv, want, EXACT if o["dtype"] == "float64" else SINGLE)
    for ours, theirs in (("group_size", "avg_group_size"), ("zero_std_ratio", "zero_std_ratio"), ("group_std_mean", "reward_std_mean")): score.add(stats[ours], o[theirs], SINGLE)


def advantage_group(score, i, o):
    contiguous = lambda n: torch.arange(n) // i["num_generations"]
    dance = {"unbiased": True, "eps": 1e-8, "zero_tol": 0}
    if i["kind"] == "dance_group": return score.add(advantage(torch.tensor(i["rewards"]), contiguous(len(i["rewards"])), **dance)[0], o["advantages"], SINGLE)
    if i["kind"] == "mix_advantage_aggr":
        rewards = {name: torch.tensor(values) for name, values in i["rewards"].items()}
        ids = contiguous(len(next(iter(rewards.values()))))
        return score.add(advantage(rewards, ids, weights=i["weights"], combine="each", trim=i["trimmed_ratio"], **dance)[0], o["advantages"], SINGLE)
    if i["kind"] == "verl_omni":
        std = ("global" if i["global_std"] else "group") if i["norm_by_std"] else "none"
        return score.add(advantage(torch.tensor(i["rewards"]), torch.tensor(i["group"]), std, unbiased=True, zero_tol=0)[0], o["advantages"], SINGLE)
    if i["kind"] == "dance_hunyuan_bestofn":
        total = sum(i[f"{name}_coef"] * advantage(torch.tensor(i[name]), contiguous(len(i[name])), **dance)[0] for name in ("vq", "mq"))
        score.add(total, o["total_scores"], SINGLE)
        return score.same(best_of(torch.tensor(o["total_scores"]), i["bestofn"]).tolist(), o["selected_before_shuffle"])
    return NotImplemented


def k_repeat_sampler(score, i, o):
    sampler = GroupSampler(i["dataset_len"], plan(i["world"], i["batch_size"], i["k"]), i["seed"], compat="flow_grpo")
    score.same(sampler.plan.groups, o["m"])
    for epoch, want in zip(i["epochs"], o["indices_by_epoch"]): score.same([sampler.indices(epoch, rank) for rank in range(i["world"])], want)


def ema(score, i, o):
    if i["kind"] == "decay":
        average = EMA({"w": torch.zeros(1)}, i["max_decay"])
        got = []
        for average.count in i["steps"]: got.append(average.rate())
        return score.add(got, o["decay"], EXACT)
    if i["kind"] == "nft_old_decay": return score.add([old_decay(step, i["decay_type"]) for step in i["steps"]], o["decay"], EXACT)
    if i["kind"] == "cpu_swap":
        live = {"w": torch.tensor(i["live"])}
        average = EMA({"w": torch.tensor(i["start"])})
        with average.applied(live): score.add(live["w"], o["after_swap_in"], SINGLE)
        return score.add(live["w"], i["live"], SINGLE)  # the reference restores the average instead: its bug, not our target
    if i["kind"] == "trajectory":
        average = EMA({"w": torch.tensor(i["start"])}, i["max_decay"])
        got = []
        for call in i["calls"]:
            step, live = (call["step"], call["params"]) if isinstance(call, dict) else call
            average.count = step
            if (step + 1) % i["interval"] == 0: average.update({"w": torch.tensor(live)})
            got.append(average.shadow["w"].tolist())
        return score.add(got, o["ema_after_each_call"], SINGLE)
    return NotImplemented


def schedules(score, i, o):
    "ReCam's schedule and the SD3 shift are one formula, diffusers' two end differently."
    kind = {"euler": "euler", "unipc": "unipc", "sd3_time_shift": "plain", "diffsynth_cf": "plain", "diffsynth_rc": "plain"}.get(i["scheduler"])
    if kind is None: return NotImplemented
    sigmas = schedule(i["N"], i["shift"], kind)
    if kind == "plain": score.add(sigmas, recam_sigmas(i["N"], i["shift"]), SAMPLE)
    if i["scheduler"].startswith("diffsynth"): sigmas = sigmas[:-1]
    score.add(sigmas, o["sigmas"], SAMPLE)
    wanted = torch.tensor(o["timesteps"], dtype=torch.float64)
    times = 1000 * sigmas[:len(wanted)].double()
    if i["scheduler"] in ("sd3_time_shift", "unipc"): return score.add(times, wanted, (1.0, 0.0))  # the reference truncates to integers
    score.add(times, wanted, (1e-3, 0.0))
    if "index_of_bf16_timestep" not in o: return
    rounded = times.float().bfloat16().double()
    return score.same([int((times - t).abs().argmin()) for t in rounded], o["index_of_bf16_timestep"])


def awm_time_sampling(score, i, o):
    g, sigmas = torch.Generator().manual_seed(i["torch_seed"]), schedule(i["num_steps"], i["time_shift"], "euler")
    t = draw_levels(i["time_type"], i["train_timesteps"], g, i["batch_size"], i["time_shift"], sigmas, i["timestep_fraction"])
    score.add(t.flatten(), o["t"], SAMPLE)


def fast_window_draws(score, i, o):
    "Drawn per process and per draw in the reference; with its random source ours are the same windows."
    source, (low, high), N = random.Random(i["python_seed"]), i["window_range"], i["num_steps"]
    if i["window_size"] == 0: low, high = 0, N - 1
    made = [draw_window(0, 0, max(N, high + 1), i["window_size"], low, high, draw=lambda n: source.randint(0, n - 1)) for _ in range(i["draws"])]
    score.same([list(window) for window in made], o["windows"])


def mix_window_schedule(score, i, o):
    "Before each update; its random draws are seeded by the number of the update before."
    law, steps, size = i["sample_strategy"], i["max_timesteps"], i["group_size"]
    if law == "random": made = [(0, size)] + [draw_window(0, 0, steps + 1, size, 0, steps, draw=np.random.default_rng(n).integers) for n in range(i["iters"] - 1)]
    elif law in STAYS:
        how = {"every": i["iters_per_group"], "stride": i.get("prog_overlap_step", 1) if i.get("prog_overlap") else size, "k": i.get("exp_decay_k", 0.1),
               "knee": i.get("exp_decay_thre_timestep", 13), "roll_back": i.get("roll_back", False)}
        made = [moving_window(n, steps, size, 0, steps, law, overhang=True, **how) for n in range(i["iters"])]
    else: return NotImplemented
    score.same([list(range(*window)) for window in made], o["windows"])


def mix_compressed_sigmas(score, i, o):
    score.add(compressed(schedule(i["N"], i["shift"]), i["window_last"] + 1, i["ratio"]), o["sigmas"], SAMPLE)


def prompt_seeds(score, i, o):
    "The reference seeds the initial noise by the prompt's text. Ours is keyed by (seed, group), so equal prompts stay apart; this is its rule alone."
    seeds = [(i["base_seed"] + int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")) % 2**31 for prompt in i["prompts"]]
    score.same(seeds, o["seeds"])


def zero_advantage_filter(score, i, o):
    "The reference puts random silent rows back until their number divides; ours masks them (`keep`) and needs no such filling."
    keep = shaped(torch.tensor(i["advantages"], dtype=torch.float64), clip=None).abs().sum(1) != 0
    score.same(keep.tolist(), o["nonzero"])
    missing, silent = -int(keep.sum()) % i["num_batches"], torch.where(~keep)[0]
    if missing and len(silent) >= missing: keep[silent[torch.randperm(len(silent), generator=torch.Generator().manual_seed(i["torch_seed"]))[:missing]]] = True
    score.same(keep.tolist(), o["kept"])
    score.same(int(keep.sum()), o["kept_count"])


TENSORS = {"sde_step_sd3": sde_step_sd3, "sde_step_wan": sde_step_wan, "cameraflow_step": cameraflow_step, "dance_mix_step": dance_mix_step,
           "grpo_loss_sd3": lambda *a: grpo_loss(*a, "flow"), "grpo_loss_wan": lambda *a: grpo_loss(*a, "wan"), "grpo_loss_cf": lambda *a: grpo_loss(*a, "wan"),
           "grpo_loss_dance_mix": grpo_loss_dance_mix, "guard_loss": guard, "dppo_loss": dppo, "nft_loss": nft, "awm_loss": awm, "mix_dpmpp_ode": mix_dpmpp_ode, "flow_match_training": flow_match_training,
           "rl_loop_tiny": rl_loop_tiny}
LISTS = {"advantage_per_prompt": advantage_per_prompt, "advantage_group": advantage_group, "k_repeat_sampler": k_repeat_sampler, "ema": ema, "schedules": schedules,
         "awm_time_sampling": awm_time_sampling, "fast_window_draws": fast_window_draws, "mix_window_schedule": mix_window_schedule, "mix_compressed_sigmas": mix_compressed_sigmas,
         "prompt_seeds": prompt_seeds, "zero_advantage_filter": zero_advantage_filter}
UNCOVERED = (float("nan"), 0.0, 0.0, None)


def replayed(score, case, *data):
    "The result of a case; uncovered if it asks for a variant that does not exist here."
    try: return score.result if case(score, *data) is not NotImplemented else UNCOVERED
    except InputError: return UNCOVERED


def check_tensors(folder, name, configs):
    "One result per sub-case of a safetensors file."
    tensors, extra = load_file(folder / f"{name}.safetensors"), []
    if name == "rl_loop_tiny": extra = [json.loads((folder / "shapes.json").read_text())]
    for key in sorted({full.split(".")[1] for full in tensors}):
        i, o = ({full.split(".", 2)[2]: value for full, value in tensors.items() if full.startswith(f"{side}.{key}.")} for side in ("input", "output"))
        score = Score()
        yield f"{name}.{key}", replayed(score, TENSORS[name], configs[name][key], i, o, *extra)


def check_list(folder, name):
    "One result per entry of a JSON list."
    for number, entry in enumerate(json.loads((folder / f"{name}.json").read_text())):
        score = Score()
        yield f"{name}.{number}", replayed(score, LISTS[name], entry["input"], entry["output"])


def check(folder):
    "{case: (max_abs_diff, atol, rtol, ok)}; ok is None for cases that nothing here covers yet."
    folder = Path(folder)
    configs, results = json.loads((folder / "configs.json").read_text()) if (folder / "configs.json").exists() else {}, {}
    for path in sorted(folder.iterdir()):
        name = path.stem
        if path.suffix == ".safetensors": results |= dict(check_tensors(folder, name, configs)) if name in TENSORS else {name: UNCOVERED}
        elif path.suffix == ".json" and isinstance(json.loads(path.read_text()), list): results |= dict(check_list(folder, name)) if name in LISTS else {name: UNCOVERED}
    return results

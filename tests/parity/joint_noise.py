"""Noise levels, losses, schedules and sampling of joint diffusion against UniCon's loop and SVD's: `check(folder)` replays those cases."""
import functools
import json
import math

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from camflow.joint import edm
from camflow.joint.sample import SchedulerCopy, sample_joint, sd_model, svd_model
from camflow.joint.schedule import Levels, schedule
from camflow.joint.timesteps import add_noise, instructpix2pix_drops, joint_loss, min_snr_weights, snr, target
from tests.parity.wan import Folder, attempt, difference, largest, verdict

SAMPLE, SAMPLE_RELATIVE, LOSS, TABLE, EXACT = 1e-3, 1e-4, 1e-5, 1e-6, 1e-6  # pass lines of the goldens' README


def scheduler_of(folder, kind):
    settings = folder.cases["sd_scheduler"]
    if kind == "ddpm": return DDPMScheduler(**{k: v for k, v in settings.items() if k != "set_alpha_to_one"})
    if kind == "ddim": return DDIMScheduler(**settings)
    if kind == "euler": return EulerDiscreteScheduler(**{k: v for k, v in settings.items() if k not in ("clip_sample", "set_alpha_to_one")})
    raise ValueError(f"scheduler {kind!r} is not known to this harness")


def close(pairs, rtol, atol=0.0):
    "Largest difference beyond what each value allows, in units of its own size."
    pairs = [(ours.double(), golden.double()) for ours, golden in pairs]
    for ours, golden in pairs: assert ours.shape == golden.shape, f"{tuple(ours.shape)} against {tuple(golden.shape)}"
    worst = largest(((a - b).abs() / (b.abs() + atol / rtol).clamp_min(1e-30)).max().item() for a, b in pairs)
    return verdict(worst, rtol)


def tables(folder, name): return json.loads((folder.path / f"{name}.json").read_text())
def column(rows, key): return torch.tensor([row["output"][key] for row in rows], dtype=torch.float64)


# ---- tables

def edm_precondition(folder):
    rows = tables(folder, "edm_precondition")
    ours = edm.precondition(torch.tensor([row["input"]["sigma"] for row in rows], dtype=torch.float64))
    return close([(value, column(rows, name)) for name, value in ours._asdict().items()], 1e-9)


def min_snr(folder):
    scheduler, pairs = scheduler_of(folder, "ddpm"), []
    for row in tables(folder, "min_snr_weights"):
        ratio = snr(scheduler.alphas_cumprod, torch.tensor(row["input"]["timesteps"]))
        pairs += [(ratio, torch.tensor(row["output"]["snr"])), (min_snr_weights(ratio, row["input"]["snr_gamma"], row["input"]["prediction_type"]), torch.tensor(row["output"]["weights"]))]
    return close(pairs, TABLE)


def sigma_sampling(folder):
    pairs = []
    for row in tables(folder, "svd_sigma_sampling"):
        of, golden = row["input"], row["output"]
        if of["distribution"] == "lognormal": pairs.append((edm.lognormal_sigmas(torch.tensor(of["uniform"]), of["loc"], of["scale"]), torch.tensor(golden)))
        elif of["distribution"] == "lognormal_from_normals": pairs.append((edm.lognormal(torch.tensor(of["normal"]), of["loc"], of["scale"]), torch.tensor(golden)))
        elif of["distribution"] == "cosine_interpolated":
            u = torch.tensor(of["uniform"])
            if of["stratified"]:
                u = edm.stratified(u)
                pairs.append((u, torch.tensor(golden["stratified_uniform"])))
                golden = golden["sigma"]
            options = dict(image_d=of["image_d"], noise_d_low=of["noise_d_low"], noise_d_high=of["noise_d_high"], sigma_data=of["sigma_data"], minimum=of["min_value"], maximum=of["max_value"])
            pairs.append((edm.cosine_sigmas(u, **options), torch.tensor(golden)))
        else: raise ValueError(f"distribution {of['distribution']!r} is not known to this harness")
    return close(pairs, 1e-5)


def euler_schedule(folder):
    pairs = []
    for row in tables(folder, "svd_euler_schedule"):
        settings = dict(row["input"])
        steps = settings.pop("num_inference_steps")
        levels = Levels.of(edm.svd_scheduler(**settings), steps)
        one = torch.ones(1, dtype=torch.float64)
        pairs += [(torch.tensor(levels.sigmas), torch.tensor(row["output"]["sigmas"])), (torch.tensor(levels.times[:-1]), torch.tensor(row["output"]["timesteps"])),
                  (levels.start(one), one * row["output"]["init_noise_sigma"])]
    return close(pairs, TABLE)


def time_ids(folder):
    pairs = []
    for row in tables(folder, "svd_added_time_ids"):
        for key, batch in (("added_time_ids", 1), ("with_cfg", 2)): pairs.append((edm.added_time_ids(**row["input"], batch=batch), torch.tensor(row["output"][key])))
    return verdict(difference(pairs), 0.0)


def schedules(folder):
    "Rows, timesteps, what moves, and how each input starts."
    wrong, cases = 0, tables(folder, "schedules")
    for row in cases:
        steps = row["input"]["num_inference_steps"]
        path, levels = schedule(row["input"]["schedule"], steps, compat="unicon"), SchedulerCopy(scheduler_of(folder, "ddim"), steps)
        start = lambda init, p: "noise" if init == "noise" else f"add_noise(image_latents, t={int(levels.timestep(p))})"
        ours = {"init": [start(*both) for both in zip(path.inits, path.positions[0])],
                "rows": [{"steps": [int(p) for p in path.positions[k]], "timesteps": [int(levels.timestep(p)) for p in path.positions[k]], "advances": [int(m) for m in path.moves(k)]} for k in range(path.calls)]}
        wrong += ours != row["output"]
    return verdict(float(wrong) if cases else math.inf, 0.0)


# ---- tensors

def loss(folder, case, x, y):
    scheduler = scheduler_of(folder, "ddpm")
    ratio = snr(scheduler.alphas_cumprod, x["timesteps"])
    weights = {kind: min_snr_weights(ratio, 5.0, kind) for kind in ("epsilon", "v_prediction")}
    of = lambda w: joint_loss(x["model_pred"], x["target"], w)[0][None]
    noised = [x["latents"], x["noise"], x["timesteps"], scheduler.alphas_cumprod]
    dropped = instructpix2pix_drops(x["random_p"], 0.1).reshape(-1)
    pairs = [(ratio, y["snr"]), (of(None), y["loss_no_gamma"])]
    for kind, w in weights.items(): pairs += [(w, y[f"weights_{kind}"]), (of(w), y[f"loss_{kind}"])]
    return {"values": close(pairs, LOSS), "noise": verdict(difference([(add_noise(*noised), y["noisy"]), (target(*noised, "v_prediction"), y["velocity"])]), EXACT),
            "prompts": verdict(difference([(dropped.float(), y["prompt_dropped"].float())]), 0.0)}


def train_step(folder, case, x, y):
    "Loss, every gradient's norm, some gradients, and the loss after AdamW's step."
    from camflow.joint.layout import Layout
    from tests.parity.joint_adapter import build
    unet, adapter = build(folder, case)
    scheduler, pairs = scheduler_of(folder, "ddpm"), len(x["latents"]) // 2
    names = list(json.loads((folder.path / f"shapes_trainables_{case['post']}.json").read_text()))
    parameters = adapter.parameters_by_name()
    assert set(names) == set(parameters), f"{len(set(names) ^ set(parameters))} trainables differ"
    noisy = add_noise(x["latents"], x["noise"], x["timesteps"], scheduler.alphas_cumprod)
    weights = min_snr_weights(snr(scheduler.alphas_cumprod, x["timesteps"]))
    optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    def forward():
        with adapter.use(Layout(tuple((p, p + pairs) for p in range(pairs)), 2 * pairs)): out = unet(noisy, x["timesteps"], x["encoder_hidden_states"]).sample
        return joint_loss(out, x["noise"], weights)[0], out
    first, out = forward()
    first.backward()
    norms = torch.stack([parameters[name].grad.norm() for name in names])
    gradients = [(parameters[key.removeprefix("grad.")].grad, golden) for key, golden in y.items() if key.startswith("grad.")]
    optimizer.step()
    after = forward()[0].detach()
    return {"forward": verdict(difference([(noisy, y["noisy"]), (out.detach(), y["model_pred"])]), 1e-4),
            "loss": close([(first.detach()[None], y["loss"]), (weights, y["weights"]), (after[None], y["loss_after_one_adamw_step"])], LOSS),
            "gradients": verdict(difference([*gradients, (norms, y["grad_norms"])]), 1e-4)}


@torch.no_grad()
def sample(folder, case, x, y):
    "The release's loop: first call, rows, every step, the result, the number of calls."
    from tests.parity.joint_adapter import build
    unet, adapter = build(folder, case)
    path = schedule(case["schedule"], case["steps"], compat="unicon")
    names, batch, calls, steps = path.names, case["xlen"], [], []
    parts = lambda tensor: {name: tensor[i * batch:(i + 1) * batch] for i, name in enumerate(names)}
    mask = F.interpolate(x["mask"], size=x["latents"].shape[-2:], mode="nearest")
    unet.register_forward_pre_hook(lambda m, args: calls.append((args[0].clone(), args[1].clone())), prepend=True) # before the adapter reorders
    model = sd_model(unet, adapter, x["prompt_embeds"], x["negative_prompt_embeds"], case["pairs"], names, case["joint_scale"])
    out = sample_joint(model, parts(x["latents"]), path, scheduler_of(folder, case["scheduler"]), parts(x["image_latents"]), parts(mask) if (mask < 1).any() else None,
                       case["guidance_scale"], case["cond_guidance_scale"], callback=lambda k, now: steps.append(torch.cat([now[name] for name in names])))
    shown, times = next((given, t) for given, t in calls if len(given) == len(y["first_model_input"])) # ours computes the separate prediction without its null half
    exact = [(torch.tensor(path.positions[:-1]).long(), y["schedule"]), (torch.tensor([len(calls)]), y["unet_calls"])]
    return {"path": verdict(difference(exact), 0.0), "first call": verdict(difference([(shown, y["first_model_input"]), (times.float(), y["first_model_timesteps"])]), 1e-5),
            "latents": close([(torch.stack(steps), y["latents_steps"]), (torch.cat([out[name] for name in names]), y["latents"])], SAMPLE_RELATIVE, SAMPLE)}


def edm_case(folder, case, x, y):
    at = edm.precondition(x["sigmas"])
    noisy = edm.edm_noise(x["latents"], x["noise"], x["sigmas"])
    total = edm.edm_loss(x["model_pred"], noisy, x["latents"], x["sigmas"])[0]
    return close([(noisy, y["noisy"]), (edm.model_input(noisy, x["sigmas"]), y["model_input"]), (at.c_noise, y["timesteps"]), (at.c_out, y["c_out"]), (at.c_skip, y["c_skip"]), (at.weight, y["weight"]),
                  (edm.denoised(x["model_pred"], noisy, x["sigmas"]), y["denoised"]), (total[None], y["loss"])], LOSS, 1e-6)


@torch.no_grad()
def svd_sample(folder, case, x, y):
    "The plain loop, and the joint loop with one modality and our own levels."
    from tests.parity.joint_adapter import svd_unet
    unet, scheduler = svd_unet(folder, case), edm.svd_scheduler(**folder.cases["svd_scheduler"])
    scale, plain, joint = (case["min_guidance"], case["max_guidance"]), [], []
    given = x["image_latents"], x["image_embeds"], x["added_time_ids"]
    out = edm.svd_sample(unet, x["noise"], *given, scheduler, case["steps"], scale, callback=lambda k, now: plain.append(now))
    model = svd_model(unet, None, *given, pairs=(), names=("video",))
    other = sample_joint(model, {"video": x["noise"]}, schedule([[(0, 1)]], case["steps"], ("video",)), Levels.of(scheduler, case["steps"]), guidance_scale=edm.frame_guidance(*scale, x["noise"].shape[1]),
                         callback=lambda k, now: joint.append(now["video"]))
    golden = [y["latents_steps"], y["latents"]]
    return close([*zip([torch.stack(plain), out], golden), *zip([torch.stack(joint), other["video"]], golden)], SAMPLE_RELATIVE, SAMPLE)


FUNCTIONS = {"loss": loss, "train_step": train_step, "sample": sample, "edm": edm_case, "svd_sample": svd_sample}
TABLES = {"edm_precondition": edm_precondition, "min_snr_weights": min_snr, "svd_sigma_sampling": sigma_sampling, "svd_euler_schedule": euler_schedule, "svd_added_time_ids": time_ids, "schedules": schedules}


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)} of the cases of noise and sampling."
    folder, results = Folder(folder), {}
    for name, case in folder.cases.get("cases", {}).items():
        if case["function"] not in FUNCTIONS: continue
        done = attempt(lambda: FUNCTIONS[case["function"]](folder, case, *folder.tensors(name)))
        results |= {f"{name}.{part}": result for part, result in done.items()} if isinstance(done, dict) else {name: done}
    for name, table in TABLES.items():
        if (folder.path / f"{name}.json").exists(): results[name] = attempt(functools.partial(table, folder))
    return results

"""ReCamMaster, Wan2.1, its VAE, UMT5, schedule and sampler against the reference: `check(folder)` replays a folder of goldens/recam's format."""
import json
import math
import re
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from camflow.wan import convert, sampling, vae as video_vae
from camflow.wan.recam import ReCamTransformer3DModel, is_trainable
from tests.parity.seeded import seeded_array

DIT, VAE, TEXT, EXACT, DENOISE, GRADIENT = 1e-5, 1e-5, 1e-5, 1e-6, 5e-5, 1e-4  # pass lines of the goldens' README
UNCOVERED = (float("nan"), 0.0, 0.0, None)


def largest(values):
    "The largest value; NaN counts as infinite."
    return max((math.inf if math.isnan(v) else v for v in values), default=math.inf)


def difference(pairs):
    "Largest |a - b| over (ours, golden) pairs; shapes must agree."
    pairs = list(pairs)
    for ours, golden in pairs: assert ours.shape == golden.shape, f"{tuple(ours.shape)} against {tuple(golden.shape)}"
    return largest((ours.double() - golden.double()).abs().max().item() for ours, golden in pairs)


def verdict(diff, atol, rtol=0.0, scale=1.0): return (diff, atol, rtol, bool(diff <= atol + rtol * scale))


class Folder:
    "A folder of goldens: cases, and weights drawn by name."
    def __init__(self, path):
        self.path = Path(path)
        self.cases = json.loads((self.path / "cases.json").read_text()) if (self.path / "cases.json").exists() else {}

    def tensors(self, case):
        both = load_file(self.path / f"{case}.safetensors")
        pick = lambda head: {k.removeprefix(head): v for k, v in both.items() if k.startswith(head)}
        return pick("input."), pick("output.")

    def weights(self, name, gain=1.0):
        shapes = json.loads((self.path / name).read_text())
        return {k: torch.from_numpy(seeded_array(k, s, gain)) for k, s in shapes.items()}

    def dit(self, config, name, start=False):
        "The transformer; `start`: ReCam's layers as they are before training."
        state = self.weights(name, config.get("gain", 1.0))
        if start: state = {k: v for k, v in state.items() if "cam_encoder" not in k and "projector" not in k}
        return convert.recam_from_reference(state, config["num_heads"], eps=config.get("eps", 1e-6)).eval()

    def vae(self, config, name): return convert.vae_from_reference(self.weights(name, config.get("gain", 1.0)))
    def text(self, config, name): return convert.umt5_from_reference(self.weights(name, config.get("gain", 1.0)))


def watch(model, kept):
    "Hooks that keep what the goldens call intermediates."
    embedder = model.condition_embedder
    keep = lambda name: lambda module, args, out: kept.__setitem__(name, out)
    for name, module in [("time_embedding", embedder.time_embedder), ("time_projection", embedder.time_proj), ("text_embedding", embedder.text_embedder)]: module.register_forward_hook(keep(name))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{i}"))
        block.attn1.register_forward_hook(keep(f"block{i}_self_attn"))


@torch.no_grad()
def recam(folder, case, x, y):
    model, kept = folder.dit(case["config"], case["shapes"]), {}
    watch(model, kept)
    kept["pred"], kept["pred_source_half"] = model(x["latents"], x["timestep"], x["context"], x["source_latents"], x["camera"], return_source=True)
    for name in ("time_embedding", "time_projection"): kept[name] = kept[name][:1]
    return verdict(difference((kept[k], y[k]) for k in y), DIT)


@torch.no_grad()
def plain(folder, case, x, y):
    model = folder.dit(case["config"], case["shapes"], start=True)
    return verdict(difference([(model(x["latents"], x["timestep"], x["context"]), y["pred"])]), DIT)


def train(folder, case, x, y):
    "The reference's training step; gradients are compared relative to each tensor's largest entry."
    model, schedule, n = folder.dit(case["config"], case["shapes"]), sampling.training_schedule(), x["latents"].shape[2]
    index = x["timestep_index"]
    noisy = sampling.add_noise(x["latents"], x["noise"][:, :, :n], schedule.sigmas[index])
    target = sampling.velocity(x["latents"], x["noise"][:, :, :n])
    pred = model(noisy, schedule.timesteps[index], x["context"], x["source_latents"], x["camera"])
    loss = schedule.weights[index] * (pred.float() - target).square().mean()
    loss.sum().backward()
    ours = {"noisy_latents": torch.cat([noisy, x["source_latents"]], 2), "target": target, "pred": pred, "loss": loss, "timestep": schedule.timesteps[index], "weight": schedule.weights[index]}
    values = difference((ours[k].detach(), y[k]) for k in ours)
    gradients = {k.removeprefix("grad."): v for k, v in y.items() if k.startswith("grad.")}
    found = convert.dit_to_reference({k: p.grad for k, p in model.named_parameters() if is_trainable(k)})
    assert gradients.keys() == found.keys(), sorted(gradients.keys() ^ found.keys())[:3]
    relative = largest(((found[k] - g).abs().max() / g.abs().max().clamp_min(1e-12)).item() for k, g in gradients.items())
    return verdict(max(values / DIT, relative / GRADIENT) * GRADIENT, GRADIENT)


@torch.no_grad()
def vae(folder, case, x, y):
    model, config, pairs = folder.vae(case["config"], case["shapes"]), case["config"], []
    if config.get("tiled"):
        tiles = config["tile_size"], config["tile_stride"]
        pairs += [(video_vae.encode_tiled(model, x["video"], *tiles), y["latents"]), (video_vae.decode_tiled(model, x["latents"], *tiles), y["video"])]
        return verdict(difference(pairs), VAE)
    mean, std = video_vae.latent_stats(model, x["latents"])
    for whole in (True, False):  # one pass, and diffusers' cached loop
        pairs += [(video_vae.encode_video(model, x["video"], whole), y["latents"]), (video_vae.decode_latents(model, x["latents"], whole), y["video"])]
    moments = video_vae.encode_moments(model, x["video"])
    pairs += [(ours, y[k]) for k, ours in zip(("mu_raw", "logvar_raw"), moments) if k in y]
    if "video_unclamped" in y: pairs.append((video_vae.decode_raw_fast(model, x["latents"] * std + mean), y["video_unclamped"]))
    return verdict(difference(pairs), VAE)


@torch.no_grad()
def t5(folder, case, x, y):
    from camflow.wan.text import zero_padding
    model = folder.text(case["config"], case["shapes"])
    raw = model(x["ids"], x["mask"]).last_hidden_state
    bias = model.encoder.block[0].layer[0].SelfAttention
    buckets = lambda row: bias._relative_position_bucket(torch.arange(x["ids"].shape[1]) - row)
    pairs = [(raw, y["raw"]), (zero_padding(raw, x["mask"], compat="shortest"), y["context"])]  # frozen with the whole batch cut at its shortest prompt
    last = x["ids"].shape[1] - 1
    pairs += [(buckets(row), y[k]) for k, row in (("position_buckets_row0", 0), ("position_buckets_last_row", last)) if k in y]
    return verdict(difference(pairs), TEXT)


def sched(folder, case, x, y):
    schedule, pairs = sampling.training_schedule(), []
    pairs += [(schedule.sigmas, y["train_sigmas"]), (schedule.timesteps / 1000, y["train_timesteps"] / 1000), (schedule.weights, y["train_weights"])]
    if "train_index_after_bf16" in y: pairs.append((sampling.training_schedule(compat="bf16").used, y["train_index_after_bf16"]))
    if "train_timesteps_bf16" in y: pairs.append((schedule.timesteps.bfloat16().float(), y["train_timesteps_bf16"]))
    for steps, shift, strength in case["config"]["inference"]:
        tag, sigmas = f"n{steps}_shift{float(shift)}_strength{float(strength)}", sampling.recam_sigmas(steps, shift, strength)
        pairs += [(sigmas[:-1], y[f"sigmas_{tag}"]), (sigmas[:-1], y[f"timesteps_{tag}"] / 1000)]
        for name in y:
            if not (found := re.fullmatch(rf"step_{re.escape(tag)}_(?:i(\d+)|last)", name)): continue
            i = int(found[1]) if found[1] else steps - 1
            pairs.append((sampling.euler_step(x["sample"], x["model_output"], sigmas[i], sigmas[i + 1]), y[name]))
    if "query_timesteps" in x:
        levels = sampling.nearest_level(schedule, x["query_timesteps"])
        noisy = torch.stack([sampling.add_noise(x["sample"], x["model_output"], schedule.sigmas[i]) for i in levels])
        pairs += [(noisy, y["add_noise"]), (schedule.weights[levels], y["query_weight"])]
    return verdict(difference(pairs), EXACT)


@torch.no_grad()
def traj(folder, case, x, y):
    config, model = case["config"], folder.dit(case["config"], case["shapes"])
    network = lambda z, t, c: model(z, t, c, x["source_latents"], x["camera"])
    sigmas, path = sampling.recam_sigmas(config["steps"], config["shift"]), [x["noise"]]
    fn = sampling.guided(network, x["context_positive"], x["context_negative"], config["cfg_scale"])
    final = sampling.euler_sample(fn, x["noise"], sigmas, lambda i, z: path.append(z))
    pairs = [(final, y["final"]), (sigmas, y["sigmas"]), (torch.stack(path[:-1]), y["latents_before_step"])]
    for name, context in (("v_positive", x["context_positive"]), ("v_negative", x["context_negative"])):
        pairs.append((torch.stack([network(z, 1000 * s[None], context) for z, s in zip(y["latents_before_step"], sigmas)]), y[name]))
    return verdict(difference(pairs), DENOISE)


@torch.no_grad()
def e2e(folder, case, x, y):
    "Source bytes to target bytes through our pipeline; bytes may differ by one level on 1 % of the values."
    from camflow.media.frames import Frames
    from camflow.wan.pipeline import ReCamPipeline
    config, shapes = case["config"], case["shapes"]
    pipe = ReCamPipeline(folder.dit(config["dit"], shapes["dit"]), folder.vae(config["vae"], shapes["vae"]), folder.text(config["umt5"], shapes["umt5"]), None)
    pipe.set_progress_bar_config(disable=True)
    context = lambda side: pipe.text_encoder(x[f"ids_{side}"], x[f"mask_{side}"]).last_hidden_state * x[f"mask_{side}"][..., None]
    tiles = dict(tiled=True, tile_size=config["tile_size"], tile_stride=config["tile_stride"])
    source = Frames(x["source_video"].transpose(0, 1), "byte")
    encoded, path = pipe.encode_source(source, **tiles), []
    video = pipe(source, x["camera"], prompt_embeds=context("positive"), negative_prompt_embeds=context("negative"), num_inference_steps=config["steps"],
                 guidance_scale=config["cfg_scale"], shift=config["shift"], latents=x["noise"], source_latents=encoded, output_type="pt",
                 callback_on_step_end=lambda pipe, step, t, state: path.append(state["latents"]) or {}, **tiles).frames[0]
    levels = ((video.clamp(-1, 1) + 1) * 127.5).clamp(0, 255).byte().int() - y["video"].int()
    off = (levels != 0).float().mean().item()
    ok = levels.abs().max() <= 1 and off <= 0.01
    diff = difference([(path[-1], y["latents"]), (encoded, y["source_latents"])])
    return (diff, DENOISE, 0.0, bool(diff <= DENOISE and ok))


KINDS = {"recam": recam, "plain": plain, "train": train, "vae": vae, "t5": t5, "sched": sched, "traj": traj, "e2e": e2e}


def prompts(rows):
    from camflow.wan.text import clean_prompt
    wrong = [r for r in rows if clean_prompt(r["input"]) != r["output"]]
    return verdict(float(len(wrong)), 0.0)


def key_list(path):
    "A published name list against the model of its shapes, on storage-free tensors: same names, same shapes, same count."
    shapes = json.loads(path.read_text())
    state = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    if "token_embedding.weight" in shapes:
        from transformers import UMT5Config, UMT5EncoderModel
        with torch.device("meta"): model = UMT5EncoderModel(UMT5Config(**convert.umt5_config(state)))
        ours = convert.umt5_to_reference(model.state_dict())
    elif "encoder.conv1.weight" in shapes:
        from diffusers import AutoencoderKLWan
        with torch.device("meta"): model = AutoencoderKLWan(**convert.vae_config(state))
        ours = convert.vae_to_reference(model.state_dict())
    else:
        with torch.device("meta"): model = ReCamTransformer3DModel(**convert.dit_config(state, 1))
        ours = convert.dit_to_reference(model.state_dict())
        if "blocks.0.cam_encoder.weight" not in shapes: ours = {k: v for k, v in ours.items() if "cam_encoder" not in k and "projector" not in k}
    wrong = [k for k in ours.keys() | shapes.keys() if k not in ours or k not in shapes or list(ours[k].shape) != list(shapes[k])]
    return verdict(float(len(wrong)), 0.0)


def attempt(run):
    "A case that raises has failed; the others still run."
    try: return run()
    except Exception:
        traceback.print_exc()
        return (float("inf"), 0.0, 0.0, False)


def check(folder) -> dict:
    "{case: (max_abs_diff, atol, rtol, ok)}; ok None for cases that belong elsewhere."
    folder, results = Folder(folder), {}
    for name, case in folder.cases.items():
        run = KINDS.get(case.get("kind"))
        present = (folder.path / f"{name}.safetensors").exists()
        results[name] = attempt(lambda: run(folder, case, *folder.tensors(name))) if run and present else UNCOVERED
    if (folder.path / "prompt_clean.json").exists(): results["prompt_clean"] = attempt(lambda: prompts(json.loads((folder.path / "prompt_clean.json").read_text())))
    for path in sorted(folder.path.glob("shapes_*.json")): results[path.stem] = attempt(lambda: key_list(path))
    return results

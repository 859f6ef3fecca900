"""OmniCam's networks, LoRA files, timesteps, image condition and key maps against the reference; the script is in omnicam_script, caches are in omnicam_cache."""
import itertools
import json
import math

import torch

from camflow.media.frames import Frames
from camflow.wan import convert, omnicam_compat as compat, vae as video_vae
from camflow.wan.i2v_condition import given_mask, image_condition
from camflow.wan.lora import layer_aliases, load_lora, lora_state, original_name, read_lora
from camflow.wan.omnicam import OmniCamTransformer3DModel
from camflow.wan.sampling import recam_sigmas
from camflow.wan.timesteps import TimestepSampler, loss_weight, musubi_epoch, musubi_stream
from tests.parity.wan import attempt, difference, largest, verdict, Folder

NETWORK, GRADIENT, NUMBER = 2e-5, 5e-5, 1e-6  # pass lines of the goldens' README
NEVER = (math.nan, 0.0, 0.0, None)


def relative(ours, golden):
    "Largest |a - b| / max(1, |b|) of two lists of numbers."
    ours, golden = torch.as_tensor(ours, dtype=torch.float64).flatten(), torch.as_tensor(golden, dtype=torch.float64).flatten()
    return ((ours - golden).abs() / golden.abs().clamp_min(1)).max().item() if ours.shape == golden.shape else math.inf


# ---- timesteps.json

SETTINGS = {"timestep_sampling": "rule", "discrete_flow_shift": "shift", "weighting_scheme": "density"}


def timestep_row(row):
    given = dict(row["input"])
    size, numbers = given.pop("lat_hw", None), {key: torch.tensor(given.pop(key)) for key in ("u", "n", "org") if key in given}
    settings = {SETTINGS.get(key, key): value for key, value in given.items()}
    sampler = TimestepSampler(**({"shift": 1.0} | settings), compat="musubi")
    (name, draws), = numbers.items()
    t = sampler.level(**{"n" if name == "n" else "u": draws}, size=size)
    noisy = 0.5 * (1 - t) - 2 * t    # latents 0.5, noise -2
    return max(relative(sampler.timestep(t), row["output"]["timesteps"]), relative(noisy, row["output"]["x_first_element"]))


def timesteps(data):
    out = {"timestep_sampling": largest(map(timestep_row, data["timestep_sampling"]))}
    weights = [r for r in data["loss_weighting"] if r["output"] is not None]
    out["loss_weighting"] = largest(relative(loss_weight(torch.tensor(r["input"]["timesteps"]) / 1000, r["input"]["weighting_scheme"]), r["output"]) for r in weights)
    for row in data["inference_schedule"]:
        sigmas = recam_sigmas(row["input"]["num_inference_steps"], row["input"]["shift"])
        error = max(relative(sigmas, row["output"]["sigmas"]), relative(1000 * sigmas[:-1], row["output"]["timesteps"]))
        out["inference_schedule"] = max(out.get("inference_schedule", 0.0), error)
    built, levels = data["training_schedule_at_construction"], recam_sigmas(1000, shift=1.0)
    out["training_schedule"] = max(relative(levels[[0, 1, 500, 1000]], built["sigmas_at_0_1_500_1000"]), relative(1000 * levels[[0, 1, 500, 999]], built["timesteps_at_0_1_500_999"]),
                                   float(len(levels) != built["len_sigmas"]))
    out["epochs"] = largest(map(epoch, data["epoch_shuffle_and_pool"]))
    stream = data["bucketed_timestep_stream"]
    ours = musubi_stream(stream["input"]["random_seed"], stream["input"]["num_timestep_buckets"])
    out["stream"] = relative(list(itertools.islice(ours, stream["input"]["n"])), stream["output"])
    return {f"timesteps.{name}": verdict(error, NUMBER) for name, error in out.items()}


def epoch(row):
    given, want = row["input"], row["output"]
    batches, pool = musubi_epoch(given["buckets"], given["batch_size"], given["seed"], given["epoch"], given["num_timestep_buckets"])
    if [[list(key), names] for key, names in batches] != want["batches"] or (pool is None) != (want["timestep_pool"] is None): return math.inf
    return 0.0 if pool is None else relative(sum(pool, []), sum(want["timestep_pool"], []))


# ---- networks; outputs named *_bf16attn are the reference with attention in bfloat16, which ours has not

def sharp(tensors): return {k: v for k, v in tensors.items() if not k.endswith("_bf16attn")}


@torch.no_grad()
def plucker(folder, case, x, y):
    H, W = case["config"]["grid"]
    K = (x["intrinsics"] * torch.tensor([W, H, W, H]))[:, None].expand(-1, x["c2w"].shape[1], -1)
    return verdict(difference([(K, y["K"]), (compat.published_rays(K, x["c2w"], (H, W)), y["plucker"])]), NETWORK)


@torch.no_grad()
def plucker_net(folder, case, x, y):
    c = case["config"]
    net = compat.PluckerNet(c["hidden_channels"], c["final_channels"], c["num_heads"], c["num_transformer_layers"], dropout=0.0)
    net.load_state_dict(folder.weights(case["shapes"], c["gain"]))
    return verdict(difference((net.train(mode == "train")(x["K"], x["c2w"], c["grid"]), y[mode]) for mode in ("eval", "train")), NETWORK)


@torch.no_grad()
def cross_attn(folder, case, x, y):
    from diffusers.models.transformers.transformer_wan import WanAttention
    c, y = case["config"], sharp(y)
    head = c["dim"] // c["num_heads"]
    attn = compat.add_camera(WanAttention(c["dim"], c["num_heads"], head, eps=1e-6, added_kv_proj_dim=c["dim"], cross_attention_dim_head=head), c["cam_middim"])
    state = {f"blocks.0.cross_attn.{k}": v for k, v in folder.weights(case["shapes"], c["gain"]).items()}
    attn.load_state_dict({k.removeprefix("blocks.0.attn2."): v for k, v in compat.omnicam_to_diffusers(state).items()})
    attn.set_processor(compat.CameraCrossAttention(text_length=c["text_tokens"]))
    camera = x["adapter"].flatten(1, 3)
    q = attn.norm_q(attn.to_q(x["x"])).unflatten(2, (attn.heads, -1))
    term = attn.processor.joined(attn, q, torch.zeros_like(x["x"]), camera) / 2
    seen = lambda context, k, v, norm: attn.processor.attend(q, norm(k(context)).unflatten(2, (attn.heads, -1)), v(context).unflatten(2, (attn.heads, -1)), None)
    image, text = x["context"].split([257, c["text_tokens"]], 1)
    pairs = [(attn(x["x"], x["context"]), y["eval"]), (attn(x["x"], x["context"], camera=camera), y["train"]), (term, y["attn_camera1"]), (term, y["attn_camera2"]),
             (seen(text, attn.to_k, attn.to_v, attn.norm_k), y["attn_text"]), (seen(image, attn.add_k_proj, attn.add_v_proj, attn.norm_added_k), y["attn_image"])]
    return verdict(difference(pairs), NETWORK)


def inputs(x):
    "Arguments of a forward: latents, timestep, text, image tokens; and the camera."
    text = x["context"].clone()
    for row, length in zip(text, x["context_lens"]): row[int(length):] = 0
    args = torch.cat([x["x"], x["y"]], 1), x["t"].float(), text, x["clip_fea"]
    if "extrinsics" not in x: return args, None
    return args, ([path[:int(n)] for path, n in zip(x["extrinsics"], x["extrinsics_lens"])], x["intrinsics"])


def plain_model(folder, case):
    "Ours with an untrained camera, on Wan's weights."
    c = case["config"]
    return compat.omnicam_from_reference(folder.weights(case["shapes"], c["gain"]), c["num_heads"], camera_dim=c["dim"] // c["num_heads"], text_length=c["text_len"], eps=c.get("eps", 1e-6)).eval()


def published_model(folder, case, **extras):
    c = case["config"]
    return compat.published_from_reference(folder.weights(case["shapes"], c["gain"]), c["num_heads"], text_length=c["text_len"], camera_dropout=0.0, eps=c.get("eps", 1e-6), **extras).eval()


@torch.no_grad()
def wan_i2v(folder, case, x, y):
    args, _ = inputs(x)
    return verdict(difference([(plain_model(folder, case)(*args).sample, y["sample"])]), NETWORK)


def wan_i2v_camera(folder, case, x, y):
    (args, camera), y = inputs(x), sharp(y)
    model, pairs = published_model(folder, case, camera_mode="published"), []
    grid = model._grid(args[0], args[3])
    with torch.no_grad():
        K, poses, features = model.adapter(*camera, grid)
        pairs += [(K, y["K"]), (poses, y["poses"]), (features, y["adapter_bn_eval"]), (model(*args, camera=camera).sample, y["eval"])]
        model.camera_mode = "steer"
        pairs += [(model(*args, camera=camera).sample, y["train_bn_eval"]), (model(*args, camera=model.remember(camera, grid, len(args[0]))).sample, y["train_bn_eval"])]
    model.train()
    out = model(*args, camera=camera).sample
    loss = out.square().mean()
    loss.backward()
    statistics = model.myadapter.final_bn2d
    pairs += [(out.detach(), y["train_bn_train"]), (loss.detach()[None], y["loss"]), (statistics.running_mean.clone(), y["bn_running_mean_after"]), (statistics.running_var.clone(), y["bn_running_var_after"])]
    with torch.no_grad(): pairs.append((model.adapter(*camera, grid)[2], y["adapter_bn_train"]))
    found = compat.omnicam_to_reference({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    gradient = difference((found[k.removeprefix("grad.")], g) for k, g in y.items() if k.startswith("grad."))
    assert {k.removeprefix("grad.") for k in y if k.startswith("grad.")} == set(case["config"]["grads"])
    return {"": verdict(difference(pairs), NETWORK), ".gradients": verdict(gradient, GRADIENT)}


# ---- LoRA

@torch.no_grad()
def lora(folder, case, x, y):
    "The file as kohya writes it: base, merged into the weights, and beside them."
    c, (args, camera) = case["config"], inputs(x)
    state = folder.weights(case["lora_shapes"], c["lora_gain"])
    state |= {k.removesuffix("lora_down.weight") + "alpha": torch.tensor(c["alpha"]) for k in state if k.endswith("lora_down.weight")}
    make = lambda: published_model(folder, case) if camera else plain_model(folder, case)
    run = lambda model: model(*args, **({"camera": camera} if camera else {})).sample
    beside, merged = make(), make()
    pairs = [(run(beside), y["base"])]
    reports = [load_lora(beside, state, c["multiplier"], loud=False), load_lora(merged, state, c["multiplier"], merge=True, loud=False)]
    assert all(len(r.matched) == len(state) // 3 and not r.unmatched for r in reports), str(reports[0])
    return verdict(difference(pairs + [(run(beside), y["unmerged"]), (run(merged), y["merged"])]), NETWORK)


def lora_convert(data):
    "kohya's names and factors to ComfyUI's, through the names of our model."
    given, want = data["input"], data["output"]
    rank = given["rank"]
    with torch.device("meta"): model = OmniCamTransformer3DModel(num_layers=1 + max(int(k.split("_")[3]) for k in given["keys"]))
    names = layer_aliases(model)
    state = {k: torch.ones(()) * given["alpha"] if k.endswith("alpha") else torch.ones(rank, 1) if "down" in k else torch.ones(1, rank) for k in given["keys"]}
    pairs, form, left = read_lora(state)
    pairs = {names[k]: p for k, p in pairs.items()}
    comfy, back = lora_state(pairs, "comfy"), lora_state(pairs, "kohya")
    keys = {"lora_unet_" + original_name(n).replace(".", "_") + f".lora_{kohya}.weight": f"diffusion_model.{original_name(n)}.lora_{peft}.weight"
            for n in pairs for kohya, peft in (("down", "A"), ("up", "B"))}
    again = lora_state({names[k]: p for k, p in read_lora(comfy)[0].items()}, "kohya")
    wrong = (form != "kohya") + len(left) + (keys != want["other_format_key_of"]) + (set(comfy) != set(want["other_format_key_of"].values())) + (set(back) != set(given["keys"]))
    wrong += sorted({v.item() for k, v in again.items() if k.endswith("alpha")}) != want["back_to_default_alpha"]
    wrong += (set(again) == set(given["keys"])) != want["back_to_default_keys_equal"]
    return verdict(float(wrong) + largest(abs(v.flatten()[0].item() - want["scale_on_each_factor"]) for v in comfy.values()), NUMBER)


# ---- VAE and image condition

@torch.no_grad()
def vae(folder, case, x, y):
    model, pairs = folder.vae(case["config"], case["shapes"]), []
    for whole in (True, False):  # one pass, and diffusers' cached loop
        pairs.append((video_vae.encode_video(model, x["video"][None], whole)[0], y["latent"]))
        pairs.append((video_vae.decode_latents(model, x["latent"][None], whole, clamp=False)[0], y["decoded_unclamped"]))
    return verdict(difference(pairs), NETWORK)


@torch.no_grad()
def i2v_condition(folder, case, x, y):
    model, video = folder.vae(case["config"], case["shapes"]), Frames(x["frames_uint8"].permute(0, 3, 1, 2), "byte").signed().data
    condition = image_condition(model, video[:1], len(video))
    return verdict(difference([(condition[0], y["latents_image"]), (video_vae.encode_video(model, video.transpose(0, 1)[None])[0], y["latents"])]), NETWORK)


@torch.no_grad()
def first_last(folder, case, x, y):
    model, frames = folder.vae(case["config"], case["shapes"]), case["config"]["num_frames"]
    return verdict(difference([(image_condition(model, x["first"], frames), y["first_only"]), (image_condition(model, x["first"], frames, x["last"]), y["first_and_last"])]), NETWORK)


def i2v_mask(data):
    rows = [(r, False) for r in data["first_frame"]] + [(data["first_and_last_frame"], True)]
    return verdict(largest(relative(given_mask(r["input"]["video_frames"], last), r["output"]["mask_channel_by_latent_frame"]) for r, last in rows), 0.0)


# ---- names

def shapes(path):
    "A published list of names against the model of its size, on storage-free tensors. The 14B lists are two parts of one model."
    want = json.loads(path.read_text())
    if path.stem.startswith("shapes_14b"):
        with torch.device("meta"): found = compat.omnicam_to_reference(compat.PublishedOmniCam().state_dict())
        adapter = lambda k: "_camera1" in k or "norm_k_cam1" in k or k.startswith(("conv.", "myadapter."))
        found = {k: v for k, v in found.items() if adapter(k) == ("camera" in path.stem)}
    elif "patch_embedding.weight" in want:
        state = {k: torch.empty(s, device="meta") for k, s in want.items()}
        config, build = compat.i2v_config(state, 1), compat.PublishedOmniCam if "conv.weight" in want else OmniCamTransformer3DModel
        with torch.device("meta"): model = build(**config) if "conv.weight" in want else build(**config, camera_dim=config["attention_head_dim"])
        found = compat.omnicam_to_reference({k: v for k, v in model.state_dict().items() if "camera_" not in k})
    elif "encoder.conv1.weight" in want:
        from diffusers import AutoencoderKLWan
        with torch.device("meta"): found = convert.vae_to_reference(AutoencoderKLWan(**convert.vae_config({k: torch.empty(s, device="meta") for k, s in want.items()})).state_dict())
    else: return NEVER  # a part of a model; its case loads it strictly
    wrong = [k for k in found.keys() | want.keys() if k not in found or k not in want or list(found[k].shape) != list(want[k])]
    return verdict(float(len(wrong)), 0.0)


def key_map(path):
    "Reference name -> diffusers name, both ways."
    want = json.loads(path.read_text())
    table = convert.vae_table(convert._resnets(want)) if "encoder.conv1.weight" in want else compat.OMNICAM
    there, back = convert.rename({k: k for k in want}, table), convert.rename({v: k for k, v in want.items()}, table, back=True)
    wrong = sum(want[k] != other for other, k in there.items()) + sum(k != v for k, v in back.items())
    return verdict(float(wrong), 0.0)


FILES = {"timesteps": timesteps, "lora_convert": lora_convert, "i2v_mask": i2v_mask}
KINDS = {"plucker": plucker, "plucker_net": plucker_net, "cross_attn": cross_attn, "wan_i2v": wan_i2v, "wan_i2v_camera": wan_i2v_camera, "lora": lora,
         "vae": vae, "i2v_condition": i2v_condition, "i2v_condition_first_last": first_last}


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for what is covered elsewhere."
    folder, results = Folder(folder), {}
    for path in sorted(folder.path.iterdir()):
        if path.suffix not in (".json", ".safetensors") or path.stem == "cases" or path.stem.startswith(("shapes_", "lora_shapes", "key_map_")): continue
        results[path.stem] = NEVER
    for name, run in FILES.items():
        if name not in results: continue
        found = attempt(lambda: run(json.loads((folder.path / f"{name}.json").read_text())))
        results |= found if isinstance(found, dict) else {name: found}
        if isinstance(found, dict): results.pop(name)
    for name, case in folder.cases.items():
        if case.get("kind") not in KINDS or name not in results: continue
        found = attempt(lambda: KINDS[case["kind"]](folder, case, *folder.tensors(name)))
        results |= {name + part: one for part, one in found.items()} if isinstance(found, dict) else {name: found}
    for path in sorted(folder.path.glob("shapes_*.json")): results[path.stem] = attempt(lambda: shapes(path))
    for path in sorted(folder.path.glob("key_map_*.json")): results[path.stem] = attempt(lambda: key_map(path))
    parts = {case["shapes"].removesuffix(".json") for name, case in folder.cases.items() if case.get("shapes") and results.get(name, NEVER)[3] is not None}
    return {name: one for name, one in results.items() if one[3] is not None or name not in parts}   # a part's list was loaded strictly by its case

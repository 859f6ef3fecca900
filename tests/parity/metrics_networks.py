"""Networks and formulas of the evaluators against their references: `check(folder)`; matching, flow and pose cases have a module of their own."""
import json
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from camflow.metrics import clip, dino, frechet, i3d, inception, lpips, musiq, vbench
from camflow.metrics.weights import load_strict
from tests.parity.seeded import seeded_array

# Pass lines: of a tensor's std; relative, formulas on float32 input; relative, the float32 square root of videogpt, whose own rounding is about 5e-5.
NETWORK, FLOAT32, VIDEOGPT = 2e-4, 1e-6, 1e-4


def tensors(path):
    "(inputs, outputs, configuration) of a case."
    both = load_file(path)
    with open(path, "rb") as file:
        head = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    pick = lambda part: {k.removeprefix(part): v for k, v in both.items() if k.startswith(part)}
    return pick("input."), pick("output."), json.loads(head.get("__metadata__", {}).get("config", "{}"))


def weights(folder, config) -> dict:
    "Seeded weights of a case."
    shapes = json.loads((folder / config["shapes"]).read_text())
    return {k: torch.from_numpy(seeded_array(k, s, config["gain"])) for k, s in shapes.items()}


def scaled(got, want, scale):
    if tuple(got.shape) != tuple(want.shape): return float("inf")
    if not want.is_floating_point(): return 0.0 if torch.equal(got.long(), want.long()) else float("inf")
    diff = (got.double() - want.double()).abs()
    return float("inf") if diff.isnan().any() else diff.max().item() / scale


def against(ours: dict, theirs: dict):
    "Worst difference of the outputs in units of each tensor's std (of a single number: its size); big tensors come as head, every n-th value, statistics."
    worst = 0.0
    for name, want in theirs.items():
        whole, _, part = name.rpartition(".")
        if part in ("step", "head", "stats") or whole + "." + part == "video_seed_shape": continue
        if part == "shape":
            got, (mean, std, low, high) = ours[whole].detach().contiguous(), theirs[f"{whole}.stats"].double().tolist()
            if list(got.shape) != want.tolist(): return float("inf")
            flat, head, strided = got.flatten(), theirs[f"{whole}.head"], theirs[f"{whole}.strided"]
            worst = max(worst, scaled(flat[:len(head)], head, std), scaled(flat[::int(theirs[f"{whole}.step"])][:len(strided)], strided, std))
            found = [flat.double().mean().item(), flat.double().std().item(), flat.min().item(), flat.max().item()]
            worst = max(worst, max(abs(a - b) for a, b in zip(found, (mean, std, low, high))) / std)
        elif part != "strided":
            if name not in ours: return float("inf")
            std = want.double().std().item() if want.numel() > 1 else abs(want.double().item())
            worst = max(worst, scaled(ours[name].detach(), want, std or 1.0))
    return worst


def relative(got: dict, want: dict):
    "Worst relative difference of numbers (absolute below 1e-12), infinite where a name is missing or NaN stands against a number."
    worst = 0.0
    for name, value in want.items():
        a, b = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (got.get(name, np.inf), value))
        if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any(): return float("inf")
        gap = np.abs(a - b)[~np.isnan(b)]
        worst = max(worst, float((gap / np.maximum(np.abs(b[~np.isnan(b)]), 1e-12)).max(initial=0.0)) if (gap > 1e-12).any() else 0.0)
    return worst


def groups(named: dict):
    "{'v0': {'features': ...}} from 'v0.features'."
    out = {}
    for name, value in named.items():
        case, _, rest = name.partition(".")
        out.setdefault(case, {})[rest] = value
    return out


# networks

def unit(image): return image.float() / 255


def inception_fid(x, w, config, want):
    maps = load_strict(inception.InceptionFID(), w, "Inception").maps(unit(x["image"]))
    return dict(zip(("block0_64", "block1_192", "block2_768"), maps)) | {"features_2048": maps[-1].mean((2, 3))}


def i3d_case(x, w, config, want):
    shape = x["video_seed_shape"].tolist()
    video = torch.from_numpy(np.clip(5 * seeded_array(config["video_name"], [int(np.prod(shape))]), -1, 1).reshape(shape))
    net = load_strict(i3d.I3D(), w, "I3D")
    pooled = net.pooled(video)
    return {"video": video, "pooled_1024": pooled, "logits": net.head(pooled)}


def lpips_case(x, w, config, want):
    net = load_strict(lpips.LPIPS("vgg" if "features.28.weight" in w else "alex"), w, "LPIPS")
    a, b = unit(x["in0"]), unit(x["in1"])
    layers = net.layers(a, b)
    trunk = {f"trunk_relu{i}_in0": m for i, m in enumerate(net.trunk(a), 1)}
    return trunk | {"distance": net(a, b), "per_layer": torch.stack([m.mean((1, 2, 3)) for m in layers], 1), "spatial_map": net.spatial(a, b)}



def musiq_case(x, w, config, want):
    frame = unit(x["frame"])
    patches, place, scale, mask = musiq.multiscale_patches(frame * 2 - 1)
    out = {"patches": patches, "score": load_strict(musiq.MUSIQ(config["num_class"]), w, "MUSIQ")(frame)}
    return out | {"patch_spatial_index": place[None], "patch_scale_index": scale[None], "patch_mask": mask[None]}


def dino_case(x, w, config, want):
    net = load_strict(dino.Dino(dino.config_of(w, heads=config.get("heads") or getattr(dino.CONFIGS.get(config["arch"]), "heads", 0))), w, "DINO")
    tokens = net.tokens(vbench._standardise(unit(x["frame"]), vbench.IMAGENET_MEAN, vbench.IMAGENET_STD))
    return {"tokens_after_norm": tokens, "cls_feature": tokens[:, 0], "pos_embed_interpolated": net.positions(*x["frame"].shape[-2:])}


# formulas

def frechet_distance(x, want):
    rules = {"common_metrics_styleganv_unbiased_cov": "common-metrics", "common_metrics_videogpt_torch_float32": "videogpt", "pytorch_fid": "pytorch-fid",
             "seed_compute_fvd_truncated_to_min_n": "camflow_seed", "styleganv_original_biased_cov": "stylegan-v"}
    inputs, worst = groups(x), 0.0
    for name, value in want.items():
        case, _, rule = name.partition(".")
        gap = relative({"d": frechet.frechet_distance(inputs[case]["fake"], inputs[case]["real"], rules[rule])}, {"d": value})
        worst = max(worst, gap * (FLOAT32 / VIDEOGPT if rules[rule] == "videogpt" else 1))
    return worst


def fvd_v_seed(x, want):
    detector = lambda clips: clips.mean(2).reshape(len(clips), -1)  # the stand-in of the golden: mean over the repeated frames, flattened
    found = frechet.fvd_v(x["fakes"], x["real"], detector, "camflow_seed")
    shape = [*x["real"].shape[:2], len(x["fakes"]), *x["real"].shape[2:]]  # the reference copies the sources along a new third axis
    return relative({"fvd_v": found["value"], "real_views_shape": shape}, want)


def vbench_temporal_flickering(x, want):
    got = {}
    for name, frames in x.items():
        got |= {f"{name}.mae": vbench.frame_differences(frames), f"{name}.score": vbench.temporal_flickering(frames)}
    return relative(got | {"average": vbench.aggregate("temporal_flickering", [got[f"{n}.score"] for n in x])}, want)


COMPAT = {"single_process": "single", "multi_process": "dist"}


def _consistency(dimension, x, want):
    names = list(groups(x))
    scores, frames = [vbench.consistency(x[f"{n}.features"]) for n in names], [len(x[f"{n}.features"]) for n in names]
    got = {f"{n}.score": s for n, s in zip(names, scores)}
    got |= {f"aggregate_{long}": vbench.aggregate(dimension, scores, frames, short) for long, short in COMPAT.items()}
    return relative(got, want)


def vbench_subject_consistency(x, want): return _consistency("subject_consistency", x, want)
def vbench_background_consistency(x, want): return _consistency("background_consistency", x, want)


def vbench_aesthetic(x, want, folder):
    w = weights(folder, {"shapes": "shapes_laion_linear.json", "gain": 8.0})
    got = {f"{n}.score": vbench.aesthetic_quality(v["features"], lambda f: F.linear(f, w["weight"].double(), w["bias"].double())) for n, v in groups(x).items()}
    return relative(got | {"average": vbench.aggregate("aesthetic_quality", list(got.values()))}, want)


def clip_t_f_v(x, want):
    got = {}
    for name, f in groups(x).items():
        got |= {f"{name}.clip_t": clip.clip_t(f["target"], f["text"]), f"{name}.clip_f": clip.clip_f(f["target"], "camflow_seed")}
        got[f"{name}.clip_v"] = clip.clip_v(f["source"], f["target"])
    return relative(got, want)


def fvd_preprocess(x, want):
    got, rules = {}, {"common_metrics_styleganv_cthw": "common-metrics", "common_metrics_videogpt_cthw": "videogpt", "seed_pil_cthw": "camflow_seed"}
    for name, video in x.items():
        case, _, layout = name.partition(".")
        frames = video.permute(1, 0, 2, 3) if layout == "video_cthw" else video
        for long, short in rules.items():
            if f"{case}.{long}.shape" in want: got[f"{case}.{long}"] = i3d.fvd_clip(frames, short)
    return against(got, want)


def vbench_transforms(x, want):
    got = {}
    for name, value in x.items():
        case, kind = name.split(".")
        if kind == "frames": got |= {f"{case}.clip_224": vbench.clip_transform(value), f"{case}.dino_224": vbench.dino_transform(value)}
        else:
            big = value.repeat_interleave(6, -2).repeat_interleave(6, -1)
            got |= {f"{case}.longer": vbench.imaging_transform(big), f"{case}.none": vbench.imaging_transform(big, "None")}
    return against(got, want)


def vbench_imaging_aggregate(row):
    scores = {k: vbench.imaging_quality(v) for k, v in row["input"]["frame_scores"].items()}
    got, out = dict(scores), row["output"]
    got |= {f"aggregate_{long}": vbench.aggregate("imaging_quality", list(scores.values()), vbench_compat=short) for long, short in COMPAT.items()}
    return relative(got, out["per_video_0_100"] | {k: v for k, v in out.items() if k != "per_video_0_100"})


def vbench_imaging_resize_sizes(row):
    i = row["input"]
    return 0.0 if list(vbench.imaging_size(i["h"], i["w"], i["mode"])) == row["output"]["size"] else float("inf")


def vbench_quality_score(row):
    got, want = vbench.quality_score(row["input"]), row["output"]
    named = {k.replace(" ", "_"): v for k, v in want["normalised_times_weight"].items()}
    return max(relative(got["normalised"], named), relative(got, {k: v for k, v in want.items() if k != "normalised_times_weight"}))


def frame_sampling(row):
    i, modes = row["input"], {"seed_linspace": "linspace", "unifiedreward_official": "floor", "vbench_middle": "middle"}
    return 0.0 if vbench.frame_indices(i["total"], i["num"], modes[i["kind"]]) == row["output"] else float("inf")


NETWORKS = {"inception_fid": inception_fid, "i3d": i3d_case, "lpips": lpips_case, "musiq": musiq_case, "dino": dino_case}
TENSORS = {f.__name__: f for f in (frechet_distance, fvd_v_seed, vbench_temporal_flickering, vbench_subject_consistency, vbench_background_consistency,
                                   vbench_aesthetic, vbench_transforms, clip_t_f_v, fvd_preprocess)}
TABLES = {f.__name__: f for f in (vbench_imaging_aggregate, vbench_imaging_resize_sizes, vbench_quality_score, frame_sampling)}
LINES = {"vbench_transforms": NETWORK, "fvd_preprocess": NETWORK, "vbench_imaging_aggregate": 1e-9, "vbench_quality_score": 1e-9,
         "vbench_imaging_resize_sizes": 0.0, "frame_sampling": 0.0}


def _find(name, table): return next((f for start, f in table.items() if name == start or name.startswith(start + "_")), None)


def run(path) -> tuple:
    "(worst difference, atol, rtol, ok) of one case file; ok None where nothing here covers it."
    name = path.stem
    if path.suffix == ".json":
        table = _find(name, TABLES)
        if table is None: return (float("nan"), 0.0, 0.0, None)
        worst, line = max(table(row) for row in json.loads(path.read_text())), LINES[table.__name__]
        return (worst, 0.0, line, worst <= line)
    x, want, config = tensors(path)
    if (net := _find(name, NETWORKS)) is not None:
        if not (path.parent / config["shapes"]).exists(): return (float("nan"), 0.0, 0.0, None)
        worst, line = against(net(x, weights(path.parent, config), config, want), want), NETWORK
    elif (formula := _find(name, TENSORS)) is not None:
        worst = formula(x, want, path.parent) if formula is vbench_aesthetic else formula(x, want)
        line = LINES.get(formula.__name__, FLOAT32)
    else: return (float("nan"), 0.0, 0.0, None)
    return (worst, line, line, worst <= line)


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)} over the case files of a folder."
    files = [p for p in sorted(Path(folder).glob("*")) if p.suffix in (".json", ".safetensors") and not p.name.startswith("shapes_")]
    with torch.inference_mode(): return {p.stem: run(p) for p in files}

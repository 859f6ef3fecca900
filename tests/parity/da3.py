"""Depth Anything 3 against its reference: `check(folder)` compares every case of a folder of goldens (network kinds, preprocessing sizes)."""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from camflow.depth import da3, da3_files, da3_head, da3_video
from tests.parity.seeded import seeded_array

NETWORK, UNIT, FOCAL = 5e-5, 2e-6, 1e-4  # pass lines of the goldens' README: |a-b| <= tolerance * max(1,|b|); intrinsics relative to |b|


class Folder:
    "A folder of goldens: cases, configurations, weights drawn by name; models are kept while they are in use."
    def __init__(self, folder):
        self.path = Path(folder)
        read = lambda name: json.loads((self.path / name).read_text()) if (self.path / name).exists() else {}
        self.cases, self.configs, self.gains, self.model_of = read("cases.json"), read("configs.json"), read("gains.json"), (None, None)

    def tensors(self, case):
        both = load_file(self.path / f"{case}.safetensors")
        pick = lambda head: {k.removeprefix(head): v for k, v in both.items() if k.startswith(head)}
        return pick("input."), pick("output.")

    def weights(self, name):
        shapes, gains = json.loads((self.path / f"shapes_{name}.json").read_text()), self.gains.get(name, {})
        return {k: torch.from_numpy(seeded_array(k, s, gains.get(k, 1.0))) for k, s in shapes.items()}

    def model(self, name):
        "The model(s) of a configuration under its seeded weights: DepthAnything3, or a dict of two for the nested ones."
        if self.model_of[0] != name:
            self.model_of = (name, None)
            numbers, state = self.configs[name], self.weights(name)
            build = lambda c, s: da3_files.load_state(da3.DepthAnything3(da3.config_from_reference(c)), s).eval()
            if "net" in numbers: self.model_of = (name, build(numbers, state))
            else: self.model_of = (name, {k: build(numbers[k], {n.removeprefix(f"model.{k}."): v for n, v in state.items() if n.startswith(f"model.{k}.")}) for k in numbers})
        return self.model_of[1]


def _grid(params): return params["h"], params["w"]


def backbone(folder, case, x):
    params, model = case.get("params", {}), folder.model(case["config"])
    f = model.backbone["pretrained"](x["images"], params.get("ref_view_strategy", "saddle_balanced"), x.get("cam_token"), trace=case["kind"] == "trace")
    out = {f"feat{k}": m for k, m in enumerate(f.maps)} | {f"token{k}": t for k, t in enumerate(f.tokens)} | f.trace
    return out | ({} if f.reference is None else {"reference_view": f.reference})


def full(folder, case, x):
    params = case.get("params", {})
    return folder.model(case["config"])(x["images"], params.get("ref_view_strategy", "saddle_balanced"), ("camera", "depth", *(() if params.get("no_ray") else ("rays",))),
                                        x.get("extrinsics"), x.get("intrinsics"))


def pos_embed(folder, case, x):
    params, net = case["params"], folder.model(case["config"]).backbone["pretrained"]
    return {f"pos_{h}x{w}": net.positions(h, w)[..., ::params.get("channel_step", 1)] for h, w in params["grids"]}


def rope(folder, case, x):
    (h, w), d, out = _grid(case["params"]), x["x"].shape[-1], {}
    for name, local in (("local", True), ("global", False)):
        position, cos, sin = da3._rope_table(h, w, d, 1, local)
        out |= {f"positions_{name}": position[None], name: da3.rope(x["x"], cos, sin)}
    return out


def attention(folder, case, x):
    net, i = folder.model(case["config"]).backbone["pretrained"], case["params"]["block"]
    block, d = net.blocks[i], net.config.embed_dim // net.config.num_heads
    table = da3._rope_table(*_grid(case["params"]), d, 1, True)[1:] if net.in_second_part(i) else None
    return {"attn": block.attn(block.norm1(x["x"]), table), "block": block(x["x"], table), "block_nopos": block(x["x"])}


def norms(folder, case, x):
    model, x = folder.model(case["config"]), x["x"]
    net, first, last = (net := model.backbone["pretrained"]), net.blocks[0], net.blocks[-1]
    heads = x.reshape(*x.shape[:-1], net.config.num_heads, -1)
    enc = model.cam_enc
    return {"final_norm": net.norm(x), "block_norm1": first.norm1(x), "block_norm2": first.norm2(x), "q_norm": last.attn.q_norm(heads), "k_norm": last.attn.k_norm(heads),
            "cam_enc_block_norm1": enc.trunk[0].norm1(x), "cam_enc_token_norm": enc.token_norm(x), "cam_enc_trunk_norm": enc.trunk_norm(x),
            "head_norm": model.head.norm(torch.cat([x, x.flip(-1)], -1)), "aux_norm": model.head.scratch.output_conv2_aux[3]["2"](x[..., :32])}


def ref_view(folder, case, x):
    out = {s: da3.select_reference(x["x"][:, :, 0], s) for s in da3.REF_VIEWS}
    order = da3.view_order(x["index"], x["x"].shape[1])
    moved = da3.take_views(x["x"], order)
    return out | {"reordered": moved, "restored": da3.take_views(moved, order.argsort(1))}


def cam_dec(folder, case, x):
    size = case["params"]["H"], case["params"]["W"]
    out = folder.model(case["config"]).cameras(x["feat"], size)
    c2w, K = da3.decode_pose(out["pose_enc"], size)
    return {"pose_enc": out["pose_enc"], "c2w": c2w, "intrinsics": K, "w2c": out["extrinsics"]}


def pose_encoding(folder, case, x):
    size = case["params"]["H"], case["params"]["W"]
    c2w, K = da3.decode_pose(x["enc"], size)
    return {"pose_enc": da3.encode_pose(x["c2w"], x["intrinsics"], size), "c2w": c2w, "intrinsics": K, "quat": da3.matrix_to_quaternion(x["rot"])}


def cam_enc(folder, case, x):
    normal = da3.normalize_extrinsics(x["extrinsics"])
    return {"normalized": normal, "cam_token": folder.model(case["config"]).cam_enc(normal, x["intrinsics"], (case["params"]["H"], case["params"]["W"]))}


def head(folder, case, x):
    maps = [x[k] for k in sorted(x) if k.startswith("feat")]
    return folder.model(case["config"]).head(maps, (case["params"]["H"], case["params"]["W"]), rays=True)


def uv_embed(folder, case, x):
    p = case["params"]
    return {"embed": da3_head.uv_embedding(p["channels"], p["h"], p["w"], (p["H"], p["W"]))[None]}


def nested(folder, case, x):
    models = folder.model(case["config"])
    out, metric = models["da3"](x["images"]), models["da3_metric"](x["images"])
    metric["depth"] = da3_head.fill_sky(metric["depth"], metric["sky"])
    final = da3_head.metric_scale(out, metric)
    names = ("depth", "depth_conf", "extrinsics", "intrinsics")
    return {f"anyview_{k}": out[k] for k in names} | {"metric_depth": metric["depth"], "metric_sky": metric["sky"]} | {k: final[k] for k in (*names, "scale_factor")}


def ray_pose(folder, case, x):
    out = da3_video.camera_from_rays(x["ray"][0], x["ray_conf"][0], (case["params"]["H"], case["params"]["W"]), x["sample_index"])
    return {k: v[None] for k, v in out.items()}


def preprocess(folder, case, x):
    images = [x[k].numpy() for k in sorted(x) if k.startswith("image")]
    tensor, K = da3_video.preprocess(images, case["params"]["process_res"], case["params"]["method"], x["intrinsics"].numpy() if "intrinsics" in x else None)
    return {"tensor": tensor[0]} | ({} if K is None else {"intrinsics": K[0]})


def size_table(path):
    "Largest difference of sizes and intrinsics of a table of images."
    worst = 0.0
    for row in json.loads(path.read_text()):
        i, want = row["input"], row["output"]
        first, last = da3_video.process_sizes(i["height"], i["width"], i["process_res"], i["method"])
        _, K = da3_video.process_image(np.zeros((i["height"], i["width"], 3), np.uint8), i["process_res"], i["method"], i["K"])
        same = list(first[::-1]) == want["after_bound"] and list(last[::-1]) == want["final_wh"]
        worst = max(worst, float(np.abs(K - want["K"]).max()) if same else float("inf"))
    return (worst, 1e-9, 0.0, worst <= 1e-9)


def preprocess_504(path):
    "Grey levels of large synthetic images; another OpenCV build may differ by one."
    worst = 0.0
    for row in json.loads(path.read_text()):
        i, want = row["input"], row["output"]
        y, x = np.mgrid[:i["height"], :i["width"]].astype(np.int64)
        a, b, c, d = i["coef"]
        image = np.stack([(a * x + b * y + x * y // 64) % 256, (c * x + d * y + x * x // 97) % 256, (x // 7 * 5 + y // 5 * 11) % 256], -1).astype(np.uint8)
        out, _ = da3_video.process_image(image, i["process_res"], i["method"])
        if [out.shape[1], out.shape[0]] != want["wh"]: return (float("inf"), 1.0, 0.0, False)
        if hashlib.sha256(np.ascontiguousarray(out).tobytes()).hexdigest() == want["sha256_u8_hwc"]: continue
        step = want["sample_step"]
        worst = max(worst, float(np.abs(out[::step, ::step].astype(int) - np.array(want["sample_u8"])).max()))
    return (worst, 1.0, 0.0, worst <= 1.0)


FILES = {"size_table": size_table, "preprocess_504": preprocess_504}
KINDS = {f.__name__: f for f in (backbone, full, pos_embed, rope, attention, norms, ref_view, cam_dec, pose_encoding, cam_enc, head, uv_embed, nested, ray_pose, preprocess)} | {"trace": backbone}
UNITS = ("pos_embed", "rope", "norms", "uv_embed")


def compare(kind, ours, theirs):
    "(worst scaled difference, atol, rtol, ok) over the tensors of a case; the difference is divided so that `atol` is the pass line of every tensor."
    line, worst = UNIT if kind in UNITS else NETWORK, 0.0
    for name, want in theirs.items():
        if name not in ours: return (float("inf"), line, line, False)
        got = ours[name].detach()
        if not want.is_floating_point():
            if kind == "ref_view" and name == "saddle_sim_range": continue  # ties to rounding on normal features: not reproducible by design
            worst = max(worst, 0.0 if got.shape == want.shape and torch.equal(got.long(), want.long()) else float("inf"))
            continue
        if got.shape != want.shape or not torch.isfinite(got).all(): return (float("inf"), line, line, False)
        got, want = got.double(), want.double()
        diff = (got - want).abs()
        if name.endswith("intrinsics"): scaled = diff / want.abs().clamp(min=1.0) * (line / (2e-3 if kind == "nested" else FOCAL))
        else: scaled = diff / want.abs().clamp(min=1.0)
        worst = max(worst, scaled.max().item())
    return (worst, line, line, worst <= line)


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for kinds that are not supported here."
    goldens, out = Folder(folder), {}
    with torch.inference_mode():
        for name, case in sorted(goldens.cases.items(), key=lambda item: str(item[1].get("config"))):
            kind = case["kind"]
            if kind in FILES: out[name] = FILES[kind](goldens.path / case["file"])
            elif kind not in KINDS: out[name] = (float("nan"), 0.0, 0.0, None)
            elif not (goldens.path / f"{name}.safetensors").exists(): out[name] = (float("nan"), 0.0, 0.0, None)
            else:
                x, want = goldens.tensors(name)
                out[name] = compare(kind, KINDS[kind](goldens, case, x), want)
    return out

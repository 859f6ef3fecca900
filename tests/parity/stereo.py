"""DynamicStereo against its reference: `check(folder)` replays every case of a folder of goldens (network, its parts, a training step, files, sampling, metrics).

`check(folder, "oracle")` replays the network cases with the plain implementation of tests/oracles instead of camflow's fast one."""
import base64
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.parity.seeded import seeded_state_dict

MODULE, ENCODER, STACK, PEAK = 1e-5, 3e-5, 1e-4, 1e-5  # pass lines of the goldens' README: modules; fnet and corr; stacks, traces and windows; share of a stack's peak
NOT_COVERED = (float("nan"), 0.0, 0.0, None)

ROUNDING = 1e-6  # of values up to 15 that leave twelve layers of attention: the reference's own float32 result is 9e-6 away from float64 there


class NotSupported(Exception):
    "What a case needs does not exist here (yet)."


class Folder:
    "Cases of a folder and its weights, drawn by name."
    def __init__(self, path):
        self.path = Path(path)
        self.shapes = {p.stem.removeprefix("shapes").removeprefix("_") or "published": json.loads(p.read_text()) for p in sorted(self.path.glob("shapes*.json"))}

    def tensors(self, name):
        both = load_file(self.path / f"{name}.safetensors")
        pick = lambda head: {k.removeprefix(head): v for k, v in both.items() if k.startswith(head)}
        return pick("input."), pick("output.")

    def meta(self, name):
        with safe_open(self.path / f"{name}.safetensors", "pt") as file: return file.metadata()

    def weights(self, config, gain=1.0):
        if config not in self.shapes: raise NotSupported(f"no shapes for {config}")
        return self.shapes[config], {k: torch.from_numpy(v) for k, v in seeded_state_dict(self.shapes[config], gain).items()}


# ---------------------------------------------------------------- implementations
class Oracle:
    "The plain network of tests/oracles."
    def __init__(self):
        from tests.oracles import dynamic_stereo
        self.code = dynamic_stereo

    def network(self, shapes, state, config): return self.code.load(shapes, state, **config)
    def run(self, model, left, right, iters, flow_init=None, every=False): return model(left, right, iters, flow_init, every)

    def trace(self, model, left, right, iters):
        found = {}
        return model(left, right, iters, every=True, trace=found), found

    def fnet(self, model, left, right): return dict(zip(("fmap_left", "fmap_right"), model.fnet([left, right])))
    def sst(self, model, a, b, T): return dict(zip(("fmap_left", "fmap_right"), model.sst(a, b, T)))

    def attn(self, model, a, b, x, T):
        out = dict(zip(("self_a", "self_b"), model.self_attn_blocks[0](a, b))) | dict(zip(("cross_a", "cross_b"), model.cross_attn_blocks[0](a, b)))
        block = model.update_block16
        return out | {"time": model.time_attn_blocks[0](x, T), "update_time": block.time_attn(x, T), "update_space": block.space_attn(x, T),
                      "posenc": self.code.position_encoding(model.dim, 3, 5)}

    def update(self, model, name, net, inp, corr, flow, T):
        block = getattr(model, name)
        net, mask, delta = block(net, inp, corr, flow, T)
        return {"net": net, "mask": mask, "delta_flow": delta, "motion": block.encoder(flow, corr)}

    def corr(self, f1, f2, flows):
        block = self.code.CorrBlock1D(f1, f2)
        return {f"lookup_{k}": block(v) for k, v in flows.items()} | {f"pyramid_{i}": level for i, level in enumerate(block.pyramid)}

    def upsample(self, flow, mask): return self.code.convex_upsample(flow, mask)
    def interp(self, x, size): return self.code.interp(x, size)
    def windows(self, model, video, kernel, iters): return model.forward_batch_test(video, kernel, iters)

    def schedule(self, n, kernel):
        "(windows, kept runs) of the reference's schedule, by running it on a network that does nothing."
        model = self.code.DynamicStereo.__new__(self.code.DynamicStereo)
        torch.nn.Module.__init__(model)
        model.forward = lambda left, right, iters, every: left[None, :, :, :1] * 0
        record = []
        model.forward_batch_test(torch.zeros(n, 2, 3, 1, 1), kernel, record=record)
        return [[start, length] for start, length, _, _ in record], [[start, first, count] for start, _, first, count in record if count]

    def pads(self, h, w, multiple):
        down, right = -h % multiple, -w % multiple
        return right // 2, right - right // 2, down // 2, down - down // 2


class Fast:
    "camflow.stereo."
    def __init__(self):
        try: from camflow.stereo import attention, features, network, update, windows
        except ImportError as error: raise NotSupported(str(error)) from error
        self.attention, self.features, self.net, self.parts, self.video = attention, features, network, update, windows

    def network(self, shapes, state, config):
        given = self.net.StereoConfig(**{k: v for k, v in config.items() if k in ("num_frames", "attention_type", "use_3d_update_block", "different_update_blocks")})
        found = self.net.config_of(state)  # widths and depth are in the shapes
        whole = self.net.StereoConfig(**{**given.__dict__, "dim": found.dim, "depth": found.depth, "head": found.head})
        return self.net.load_state(self.net.DynamicStereo(whole), state).eval()

    def run(self, model, left, right, iters, flow_init=None, every=False): return model(left, right, iters, flow_init, every)

    def trace(self, model, left, right, iters):
        found = {}
        return model(left, right, iters, every=True, trace=found), found

    def fnet(self, model, left, right): return dict(zip(("fmap_left", "fmap_right"), model.fnet(torch.cat([left, right])).chunk(2)))
    def sst(self, model, a, b, T): return dict(zip(("fmap_left", "fmap_right"), model.attend(a, b, T)))

    def attn(self, model, a, b, x, T):
        out = dict(zip(("self_a", "self_b"), model.self_attn_blocks[0](a, b))) | dict(zip(("cross_a", "cross_b"), model.cross_attn_blocks[0](a, b)))
        over_time = lambda layer: self.attention.from_tokens(layer(x.permute(0, 2, 3, 1).flatten(1, 2), T), x.shape[-2:])
        block = model.update_block16
        return out | {"time": over_time(model.time_attn_blocks[0]), "update_time": over_time(block.time_attn), "update_space": block.space_attn(x),
                      "posenc": self.attention.position_table(model.config.dim, 3, 5).permute(0, 3, 1, 2)}

    def update(self, model, name, net, inp, corr, flow, T):
        block = getattr(model, name)
        new, delta = block(net, corr, flow, block.prepare(inp, T), T)
        return {"net": new, "mask": block.upsample_mask(new), "delta_flow": delta, "motion": block.encoder(flow, corr)}

    def corr(self, f1, f2, flows):
        block = self.parts.Correlation(f1, f2)
        return {f"lookup_{k}": block(v) for k, v in flows.items()} | {f"pyramid_{i}": block.level(i)[:, None, None] for i in range(4)}

    def upsample(self, flow, mask): return self.parts.convex_upsample(flow, mask)
    def interp(self, x, size): return self.features.interp(x, size)
    def windows(self, model, video, kernel, iters): return self.video.stereo_video(model, video[:, 0], video[:, 1], window=kernel, iters=iters, compat="reference")

    def schedule(self, n, kernel):
        "Windows that are run, and runs of frames by the window that they come from; windows of which the reference keeps nothing are not run."
        plan = self.video.reference_plan(kernel)
        windows = self.video.schedule(plan, n)
        owner = self.video.weights(plan, n).argmax(0).tolist()
        kept = [[windows[w][0], owner.index(w), owner.count(w)] for w in sorted(set(owner))]
        return [[start, stop - start] for start, stop in windows], kept

    def pads(self, h, w, multiple): return self.features.pad_amounts((h, w), multiple)


IMPLEMENTATIONS = {"camflow": Fast, "oracle": Oracle}


# ---------------------------------------------------------------- network cases
def forward(code, model, x, params):
    every = not params.get("test_mode", False)
    out = code.run(model, x["left"].float(), x["right"].float(), params["iters"], x.get("flow_init"), every)
    return {"predictions": out.transpose(-5, -4)}  # the reference has T before B


def trace(code, model, x, params):
    out, found = code.trace(model, x["left"].float(), x["right"].float(), params["iters"])
    return found | {"predictions": out.transpose(-5, -4)}


def fnet(code, model, x, params): return code.fnet(model, x["left"], x["right"])
def sst(code, model, x, params): return code.sst(model, x["fmap_left"], x["fmap_right"], params["T"])
def attn(code, model, x, params): return code.attn(model, x["a"], x["b"], x["x"], params["T"])
def update(code, model, x, params): return code.update(model, params["block"], x["net"], x["inp"], x["corr"], x["flow"], params["T"])
def batch(code, model, x, params): return {"disparity": code.windows(model, x["video"], params["kernel_size"], params["iters"])}
def corr(code, model, x, params): return code.corr(x["fmap1"], x["fmap2"], {k: v for k, v in x.items() if k.startswith("flow_")})
def upsample(code, model, x, params): return {"up": code.upsample(x["flow"], x["mask"])}
def interp(code, model, x, params): return {k: code.interp(x["x"], size) for k, size in (("x2", (6, 10)), ("x4", (12, 20)), ("odd", (7, 9)), ("one", (1, 1)))}


def train(code, model, x, params):
    "One step's loss, gradients and metrics; `names` are the tensors in the order of shapes.json."
    from camflow.stereo.loss import sequence_loss
    model.train()
    with torch.enable_grad():
        out = code.run(model, x["img"][:, :, 0].float(), x["img"][:, :, 1].float(), params["iters"], every=True)
        gt, valid = x["disp"][:, :, 0], x["valid_disp"][:, :, 0].float()[:, :, None]
        T = gt.shape[1]
        frames = [sequence_loss(out[:, :, t:t + 1], gt[:, t:t + 1], valid[:, t:t + 1], compat="reference") for t in range(T)]
        loss = sum(l for l, _ in frames) / T
        loss.backward()
    model.eval()
    whole = sequence_loss(out.detach(), gt, valid, compat="reference")[0]
    assert torch.allclose(whole, loss, rtol=1e-5), "the loss of a clip is not the mean of its frames' losses"
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = lambda name: -1.0 if grads.get(name) is None else float(grads[name].norm())
    found = {"loss": loss[None].detach(), "frame_loss": torch.stack([l / T for l, _ in frames]).detach(), "grad_norm": torch.tensor([norm(name) for name in params["names"]]),
             "total_grad_norm": torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)[None]}
    found |= {f"metric_{k}": torch.stack([torch.as_tensor(m[k]) for _, m in frames]) for k in ("epe", "1px", "3px", "5px")}
    found |= {f"grad.{name}": g for name, g in grads.items() if g is not None}
    model.zero_grad()
    return found


KINDS = {f.__name__: f for f in (forward, trace, fnet, sst, attn, update, batch, corr, upsample, interp, train)}
WITHOUT_WEIGHTS = ("corr", "upsample", "interp")


def unclipped(theirs, names):
    "Gradients as they were before clipping: whether a file holds clipped ones is told by the norms beside them."
    norms, factor = dict(zip(names, theirs["grad_norm"].tolist())), max(1.0, float(theirs["total_grad_norm"]) + 1e-6)
    stored = {k: v for k, v in theirs.items() if k.startswith("grad.") and norms[k.removeprefix("grad.")] > 1e-4}
    clipped = stored and all(abs(float(v.norm()) * factor / norms[k.removeprefix("grad.")] - 1) < 1e-2 for k, v in stored.items())
    return {k: v * factor if clipped and k.startswith("grad.") else v for k, v in theirs.items()}


def scaled(kind, name, got, want):
    "Largest difference of one tensor as a multiple of its pass line (at most 1 is good)."
    if got.shape != want.shape or not torch.isfinite(got).all(): return math.inf
    got, want = got.double(), want.double()
    diff = (got - want).abs()
    if kind == "train":
        if name == "grad_norm":
            if not torch.equal(got < 0, want < 0): return math.inf  # the same tensors have no gradient
            return float((diff / torch.where(want > 1e-4, 1e-3 * want, 1e-5)).max())
        if name.startswith("grad."): return float(diff.max() / max(1e-2 * want.abs().max() if name == "grad.fnet.conv1.weight" else 1e-3 * want.abs().max(), 1e-5))
        return float((diff / (1e-5 * want.abs().clamp(min=1e-3) if name in ("loss", "frame_loss") else 1e-3 * want.abs().clamp(min=1e-3))).max())
    if kind == "sst": return float((diff / (MODULE + ROUNDING * want.abs())).max())
    if name == "predictions": return float(diff.max()) / min(STACK, PEAK * float(want.abs().max()))
    line = {"forward": STACK, "trace": STACK, "batch": STACK, "fnet": ENCODER, "corr": ENCODER}.get(kind, MODULE)
    return float(diff.max()) / line


LINES = {"forward": STACK, "trace": STACK, "batch": STACK, "fnet": ENCODER, "corr": ENCODER, "train": 1e-3}


def compare(kind, ours, theirs):
    "(worst difference as a share of the pass line times that line, atol, rtol, ok)."
    line = LINES.get(kind, MODULE)
    worst = max(scaled(kind, name, ours[name].detach(), want) if name in ours else math.inf for name, want in theirs.items())
    return worst * line, line, ROUNDING if kind == "sst" else 0.0, worst <= 1


# ---------------------------------------------------------------- JSON cases
REFUSED = (ValueError, AssertionError, ArithmeticError, RuntimeError, LookupError)  # what a refusal may be; InputError is a ValueError


def numbers(value):
    "JSON to a float64 array; nan, inf and -inf are strings there."
    if isinstance(value, str): return float(value)
    if isinstance(value, list): return np.array([numbers(v) for v in value], np.float64)
    return value


def distance(got, want):
    "Largest difference; NaN and infinities must stand at the same places."
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or (np.isnan(got) != np.isnan(want)).any(): return math.inf
    if (np.isinf(got) != np.isinf(want)).any() or (np.sign(got[np.isinf(got)]) != np.sign(want[np.isinf(want)])).any(): return math.inf
    fine = np.isfinite(want)
    return float(np.abs(got[fine] - want[fine]).max()) if fine.any() else 0.0


def sequence_loss_case(code, i, want):
    from camflow.stereo.loss import sequence_loss
    options = {"gamma": i.get("loss_gamma", 0.9), "max_flow": i.get("max_flow", 700.0)}
    as_clip = lambda x: torch.tensor(numbers(x), dtype=torch.float32)[:, None]  # [B,1,...]: one frame
    p = torch.stack([as_clip(x) for x in i["preds"]]).requires_grad_()
    loss, metrics = sequence_loss(p, as_clip(i["gt"]), as_clip(i["valid"])[:, :, None], compat="reference", **options)
    worst = max(distance(loss.detach(), numbers(want["loss"])), *(distance(metrics[k], numbers(v)) for k, v in want["metrics"].items()))
    if "grad_preds" in want and torch.isfinite(loss):
        loss.backward()
        worst = max(worst, distance(p.grad[:, :, 0], numbers(want["grad_preds"])))
    return worst


def lr_schedule_case(code, i, want):
    from camflow.training.config import TrainConfig
    from camflow.training.optimizers import learning_rate
    cfg = TrainConfig(steps=i["num_steps"], lr=i["lr"], schedule="onecycle", weight_decay=want["weight_decay"])
    return max(abs(learning_rate(cfg, s) - lr) for s, lr in zip(want["steps"], want["lr_at_step"])) / i["lr"]


def input_padder_case(code, i, want):
    left, right, top, bottom = code.pads(i["height"], i["width"], i["divis_by"])
    got = [left, right, top, bottom, i["height"] + top + bottom, i["width"] + left + right]
    return distance(got, [want["left"], want["right"], want["top"], want["bottom"], *want["padded"]])


def window_schedule_case(code, i, want):
    "Where the reference returns 0..N-1, the same windows and the same frames of them; where it does not, 0..N-1 nevertheless."
    n, kernel = i["n_frames"], i["kernel_size"]
    if want["correct_reference"] or code.__class__ is Oracle:  # the oracle reproduces the faults as well
        windows, kept = code.schedule(n, kernel)
        wanted = want["windows"] if code.__class__ is Oracle else [w for w in want["windows"] if w[0] in {k[0] for k in want["kept"]}]
        return 0.0 if windows == wanted and kept == want["kept"] else math.inf
    _, kept = code.schedule(n, kernel)
    frames = [f for _, first, count in kept for f in range(first, first + count)]
    return 0.0 if frames == list(range(n)) else math.inf


def pfm_case(code, i, want):
    from camflow.data.stereo_files import parse_pfm
    found = parse_pfm(base64.b64decode(i["file_base64"])).numpy()  # channels first
    array = numbers(want["array"])
    return distance(found, array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def depth_png_case(code, i, want):
    from camflow.data.stereo_files import read_replica_depth
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "depth.png"
        path.write_bytes(base64.b64decode(i["png_base64"]))
        return distance(read_replica_depth(path).reshape(-1), numbers(want["depth"]))


def sintel_case(code, i, want):
    from camflow.data.stereo_files import read_sintel, write_image, write_mask
    with tempfile.TemporaryDirectory() as folder:
        colour, hidden = Path(folder) / "disparity.png", Path(folder) / "occlusion.png"
        write_image(colour, torch.tensor(i["disparity_rgb"], dtype=torch.uint8).permute(2, 0, 1))
        write_mask(hidden, torch.tensor(i["occlusion"], dtype=torch.uint8)[None])
        disparity, valid = read_sintel(colour, hidden)
    same = valid[0].tolist() == want["valid"]
    return distance(disparity[0], numbers(want["disparity"])) if same else math.inf


def chunks_case(code, i, want):
    "All sequences cut as the evaluation does; no clip at all is refused there, and is an empty list here (the set refuses it)."
    from camflow.data.dynamic_replica import chunks
    found = [[name, rows] for name, n in i["sequences"].items() for rows in chunks(n, i["sample_len"], i["only_first_n_samples"], compat="reference")]
    if not found: raise ValueError("no clip")
    return 0.0 if found == want["samples"] else math.inf


def sceneflow_case(code, i, want):
    from camflow.data.stereo_sets import sceneflow_windows, validation_sequences
    if i["kind"] == "append_sample": same = sceneflow_windows(i["n_frames"], i["sample_len"], "reference") == want["samples"]
    elif i["kind"] == "validation_split": same = validation_sequences(i["n_sequences"]) == want["validation_indices_sorted"]
    else: raise NotSupported(i["kind"])
    return 0.0 if same else math.inf


def camera_case(code, i, want):
    "Relative to the size of each number where that is above 1: the reference computes in float32."
    from camflow.data.dynamic_replica import depth_to_disparity, disparity_scale, viewpoint_camera
    if "size_hw" not in i: viewpoint_camera({"R": np.eye(3).tolist(), "T": [0, 0, 0], "focal_length": [1, 1], "principal_point": [0, 0], **i}, (4, 4))
    rows = [{"viewpoint": {**{k: i[k] for k in ("R", "focal_length", "principal_point", "intrinsics_format")}, "T": i[f"T_{eye}"]},
             "image": {"size": i["size_hw"]}, "sequence_name": "golden", "frame_number": 0} for eye in ("left", "right")]
    pairs = []
    for eye, row in zip(("left", "right"), rows):
        K, w2c = viewpoint_camera(row["viewpoint"], i["size_hw"])
        pairs += [(K, want[f"K_{eye}"]), (w2c[:3, :3], want[f"R_{eye}"]), (w2c[:3, 3], want[f"t_{eye}"])]
        if eye == "left" and "aux_projection_u_v_z" in want:
            points = torch.tensor(i["world_points"], dtype=torch.float64) @ w2c[:3, :3].mT + w2c[:3, 3]
            seen = points @ K.mT
            pairs.append((torch.cat([seen[:, :2] / seen[:, 2:], points[:, 2:]], 1), want["aux_projection_u_v_z"]))
    scale = disparity_scale(*rows)
    pairs += [(scale, want["depth_to_disparity_scale"])]
    if "disparities" in want: pairs.append((depth_to_disparity(torch.tensor(i["depths"], dtype=torch.float64), scale)[0], want["disparities"]))
    relative = lambda got, wanted: distance(np.asarray(got, np.float64) / np.maximum(1, np.abs(wanted)), wanted / np.maximum(1, np.abs(wanted)))
    return max(relative(got, numbers(wanted)) for got, wanted in pairs)


def dataset(folder, name):
    "A miniature data set written to disk and read back as the reference reads it; what is invalid is compared in the raw maps."
    from camflow.data.dynamic_replica import DynamicReplica
    meta, data = folder.meta(name), load_file(folder.path / f"{name}.safetensors")
    want = {k.removeprefix("output."): v for k, v in data.items() if k.startswith("output.")}
    with tempfile.TemporaryDirectory() as root:
        for key in data:
            if key.startswith("file."):
                path = Path(root) / key.removeprefix("file.")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data[key].numpy().tobytes())
        found = DynamicReplica(root, meta["split"], int(meta["sample_len"]), int(meta["only_first_n_samples"]), ("disparity", "right", "mask"), compat="reference")
        if len(found) != int(meta["n_samples"]) or found.names != json.loads(meta["sequences_in_list"]): return math.inf
        (source, frames), clip = found.samples[0], found[0]
        scale = clip.rig.fx * clip.rig.baseline
        raw = torch.stack([torch.stack([source.disparity_of(f, eye, scale)[0] for eye in (0, 1)]) for f in frames])
        masks = torch.stack([clip.extras["mask"][:, 0], clip.extras["right_mask"][:, 0]], 1) / 255
    w2c = torch.linalg.inv(clip.extras["c2w"][0])
    valid = torch.stack([clip.valid[:, 0], clip.extras["right_valid"][:, 0]], 1)
    size = want["disp"].abs().nan_to_num().clamp(min=1)
    pairs = [(torch.stack([clip.left.data, clip.right.data], 1), want["img"]), (-raw / size, want["disp"] / size), (valid, want["valid_disp"]), (masks, want["mask"]),
             (clip.rig.K_left, want["K_left0"][0]), (w2c[:3, :3], want["R_left0"][0]), (w2c[:3, 3], want["t_left0"][0])]
    return max(distance(got, wanted) for got, wanted in pairs)


def metric_tables(path):
    from tests.parity import stereo_metrics
    return stereo_metrics.check(path)


TABLES = {"sequence_loss": (sequence_loss_case, 1e-5), "lr_schedule": (lr_schedule_case, 1e-12), "input_padder": (input_padder_case, 0.0), "window_schedule": (window_schedule_case, 0.0),
          "pfm": (pfm_case, 0.0), "depth_png_decode": (depth_png_case, 0.0), "sintel_disparity": (sintel_case, 1e-9), "dynamic_replica_chunks": (chunks_case, 0.0),
          "sceneflow_sampling": (sceneflow_case, 0.0), "camera_opencv": (camera_case, 2e-6)}
NETWORK_TABLES = ("input_padder", "window_schedule")  # the others do not depend on the implementation of the network


def table(code, path, case, line):
    "Worst difference over the cases of a JSON file; a case that the reference refuses must be refused."
    worst = 0.0
    for row in json.loads(path.read_text())["cases"]:
        refused = "error" in row["output"] and "windows" not in row["output"]
        try: diff = case(code, row["input"], row["output"])
        except NotSupported: raise
        except REFUSED:
            if not refused and not (isinstance(code, Oracle) and "error" in row["output"]): raise
            diff = 0.0
        else:
            if refused: diff = math.inf
        worst = max(worst, diff)
    return worst, line, 0.0, worst <= line


# ---------------------------------------------------------------- all of a folder
def check_network(folder, code, names):
    "Results of the safetensors cases, grouped by configuration so that one network is in memory at a time."
    out, metas = {}, {name: folder.meta(name) for name in names}
    kept = (None, None)
    for name in sorted(names, key=lambda n: (metas[n].get("config", ""), n)):
        meta = metas[name]
        kind, config = meta.get("function", meta.get("kind")), json.loads(meta.get("config", "{}"))
        if kind == "dataset":
            try: found = dataset(folder, name)
            except (NotSupported, ImportError): out[name] = NOT_COVERED
            else: out[name] = (found, 2e-6, 0.0, found <= 2e-6)
            continue
        if kind not in KINDS:
            out[name] = NOT_COVERED
            continue
        params, model = json.loads(meta["params"]), None
        try:
            if kind not in WITHOUT_WEIGHTS:
                key = (meta["config_name"], meta["config"], meta["gain"])
                if kept[0] != key:
                    shapes, state = folder.weights(meta["config_name"], float(meta["gain"]))
                    kept = (key, code.network(shapes, state, config))
                model, params = kept[1], params | {"names": list(folder.shapes[meta["config_name"]])}
            x, want = folder.tensors(name)
            if kind == "train": want = unclipped(want, params["names"])
            out[name] = compare(kind, KINDS[kind](code, model, x, params), want)
        except NotSupported: out[name] = NOT_COVERED
    return out


def check(folder, implementation="camflow") -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for what is not supported here."
    folder = Folder(folder)
    try: code = IMPLEMENTATIONS[implementation]()
    except NotSupported: code = None
    names, out = sorted(p.stem for p in folder.path.glob("*.safetensors")), {}
    if implementation == "oracle": names = [n for n in names if folder.meta(n).get("kind") != "dataset"]
    with torch.no_grad(): out |= check_network(folder, code, names) if code else {name: NOT_COVERED for name in names}
    for path in sorted(folder.path.glob("*.json")):
        if path.stem.startswith("shapes") or "cases" not in json.loads(path.read_text()): continue
        if implementation == "oracle" and path.stem not in NETWORK_TABLES: continue
        case, line = TABLES.get(path.stem, (None, 0.0))
        try: out[path.stem] = table(code, path, case, line) if case and (code or path.stem not in NETWORK_TABLES) else NOT_COVERED
        except (NotSupported, ImportError): out[path.stem] = NOT_COVERED
    if implementation != "oracle":
        try: out |= metric_tables(folder.path)
        except ImportError: pass
    return out

"""GMFlow against its reference: `check(folder)` replays every case of a folder of goldens (network, its parts, warping and occlusion, colours, flow score, files' sizes).

`check(folder, "oracle")` replays the network cases with the plain implementation of tests/oracles instead of camflow's fast one."""
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parity.seeded import seeded_state_dict

GAIN = 0.7 # of every case, unless the case says otherwise
NOT_COVERED = (float("nan"), 0.0, 0.0, None)
MODULE, ATTENTION, FLOW, SCORE = (1e-4, 0.0), (5e-4, 0.0), (5e-3, 1e-4), (0.0, 1e-4) # (atol, rtol): pass lines of the goldens' README
OPTIONS = {"attn_splits": "attn_splits", "corr_radius": "corr_radius", "prop_radius": "prop_radius", "num_reg_refine": "num_reg_refine"}


class Folder:
    "Cases of a folder and its weights, drawn by name."
    def __init__(self, path):
        self.path, self.states = Path(path), {}

    def tensors(self, name):
        both = load_file(self.path / f"{name}.safetensors")
        pick = lambda head: {k.removeprefix(head): v for k, v in both.items() if k.startswith(head)}
        return pick("input."), pick("output.")

    def state(self, options):
        name = options.get("shapes") or ("shapes.json" if options.get("scales", 2) == 2 else f"shapes_scale{options['scales']}.json")
        gain = options.get("gain", GAIN)
        if (name, gain) not in self.states:
            self.states[name, gain] = {k: torch.from_numpy(v) for k, v in seeded_state_dict(json.loads((self.path / name).read_text()), gain).items()}
        return self.states[name, gain]


def network(folder, options):
    "camflow's network with the case's weights."
    from dataclasses import replace

    from camflow.flow.gmflow import GMFlow, config_of
    from camflow.training.checkpoint import load_whole
    state = folder.state(options)
    return load_whole(GMFlow(replace(config_of(state), **{OPTIONS[k]: v for k, v in options.items() if k in OPTIONS})), state).eval()


def oracle(folder, options):
    "The plain network of tests/oracles."
    from tests.oracles.gmflow_plain import PlainGMFlow
    names = {"attn_splits": "splits", "num_reg_refine": "refinements"}
    return PlainGMFlow(folder.state(options), **{names.get(k, k): v for k, v in options.items() if k in OPTIONS})


# ---------------------------------------------------------------- the whole network
def full(folder, x, options, wanted, code="camflow"):
    pair, trained = (x["image0"], x["image1"]), any(k.startswith("train_pred") for k in wanted)
    if code == "oracle":
        net = oracle(folder, options)
        found = {"flow": net(*pair), "flow_bidir": net(*pair, bidirectional=True)}
        predictions = net(*pair, train=True) if trained else []
    else:
        net = network(folder, options)
        found = {"flow": net(*pair), "flow_bidir": net(*pair, bidirectional=True)}
        if trained:
            with torch.enable_grad(): predictions = net.train()(*pair)
        else: predictions = []
    return found | {f"train_pred_{k}": p.detach() for k, p in enumerate(predictions)}


def trace(folder, x, options, wanted):
    "Taps of a forward pass, by hooks on the modules that it goes through."
    from camflow.flow.gmflow_features import position_code
    from camflow.flow.gmflow_matching import upsample_flow
    net, found, calls = network(folder, options), {}, {"transformer": 0, "feature_flow_attn": 0, "refine": 0}
    steps = net.config.num_reg_refine
    def tap(module, args, out, name):
        i = calls[name] = calls[name] + 1
        s = f"s{i - 1}."
        if name == "transformer":
            code = position_code(net.config.feature_channels, *args[0].shape[-2:], args[2])
            found.update({s + "feature0": args[0] - code, s + "seen": args[1] - code, s + "transformer0": out[0], s + "transformer1": out[1]})
        elif name == "feature_flow_attn": found.update({s + "flow_match": args[1], s + "flow_propagated": out})
        else: found.update({f"refine{i - 1}.flow_in": args[0], f"refine{i - 1}.corr": args[1], f"refine{i - 1}.delta": out[1], "refine_last.mask": net.refine.mask(out[0])})
    for name in calls: getattr(net, name).register_forward_hook(lambda *a, name=name: tap(*a, name), with_kwargs=False)
    net.backbone.register_forward_hook(lambda module, args, out: found.update({f"s{len(out) - 1 - i}.feature1": f.chunk(2)[1] for i, f in enumerate(out)}))
    found["flow"] = net(x["image0"], x["image1"])
    assert calls["refine"] == steps, "a refinement did not go through its module"
    found["s1.flow_up2"] = upsample_flow(found["s0.flow_propagated"], 2)
    found |= {"s1.feature1_warped": found["s1.seen"], "s1.flow_residual": found["s1.flow_match"] - found["s1.flow_up2"]}
    return found


# ---------------------------------------------------------------- its parts
def normalize(folder, x, options, wanted):
    from camflow.flow.gmflow_features import normalise
    return {k: normalise(v) for k, v in x.items()}


def backbone(folder, x, options, wanted):
    return {f"scale_{i}": f for i, f in enumerate(network(folder, options).backbone(x["image"]))}


def position(folder, x, options, wanted):
    from camflow.flow.gmflow_features import position_code
    made = lambda k: position_code(*x["feature"].shape[1:], int(k.rsplit("_", 1)[1]))
    return {k: x["feature"] + made(k) if k.startswith("added") else made(k) for k in wanted}


def transformer(folder, x, options, wanted):
    from camflow.flow.gmflow_transformer import apart, window_order, window_regions
    net, splits, taken = network(folder, options), options["splits"], {}
    h, w = x["feature0"].shape[-2:]
    tap = net.transformer.layers[0].self_attn.register_forward_hook(lambda module, args, out: taken.setdefault("first", out))
    f0, f1 = net.transformer(x["feature0"], x["feature1"], splits)
    tap.remove()
    first = taken["first"].flatten(1, -2)[:1]
    return {"feature0": f0, "feature1": f1, "shift_mask": apart(window_regions(h, w, splits)), "layer0_self": first[:, window_order(h, w, splits, False).argsort()]}


def matching(folder, x, options, wanted):
    from camflow.flow.gmflow_matching import LocalCorrelation, global_matching, local_matching
    f0, f1, flow = x["feature0"], x["feature1"], x["flow"]
    still = torch.zeros_like(flow)
    moved, probability = global_matching(f0, f1)
    near, chance = local_matching(LocalCorrelation(f0, f1, 4)(still), 4)
    found = {"global_flow": moved, "global_prob": probability, "global_flow_bidir": global_matching(f0, f1, True)[0], "local_flow": near,
             "local_prob": chance.flatten(2).mT, "corr_with_flow": LocalCorrelation(f0, f1, 4)(flow)}
    for name in wanted:
        if name.startswith("corr_zero_flow_r"): found[name] = LocalCorrelation(f0, f1, int(name.rsplit("r", 1)[1]))(still)
    return found


def propagation(folder, x, options, wanted):
    attention = network(folder, options).feature_flow_attn
    return {name: attention(x["feature0"], x["flow"], None if name == "global" else int(name.rsplit("r", 1)[1])) for name in wanted}


def refine_step(folder, x, options, wanted):
    from camflow.flow.gmflow_matching import upsample_flow
    from camflow.flow.gmflow_refine import convex_upsample
    net = network(folder, options)
    projection, factor = net.refine_proj(x["feature0"]), net.config.factor
    state, context = projection.chunk(2, 1)
    new, delta = net.refine(x["flow"], x["corr"], net.refine.prepare(projection))
    mask, after = net.refine.mask(new), x["flow"] + delta
    return {"net0": state.tanh(), "inp": context.relu(), "motion": net.refine.encoder(x["flow"], x["corr"]), "net1": new, "mask": mask, "delta": delta, "flow_next": after,
            "flow_up_convex": convex_upsample(after, mask, factor), "flow_up_bilinear": upsample_flow(x["flow"], factor)}


# ---------------------------------------------------------------- around it
def warp(folder, x, options, wanted):
    from camflow.flow.consistency import occlusion, occlusion_margin
    from camflow.flow.consistency import warp as warped
    seen, valid = warped(x["feature"], x["fwd"])
    hidden = occlusion(x["fwd"], x["bwd"])
    return {"warped": seen, "valid": valid, "warped_bwd": warped(x["bwd"], x["fwd"])[0], "fwd_occ": hidden[0].float(), "bwd_occ": hidden[1].float(), "fwd_margin": occlusion_margin(x["fwd"], x["bwd"])}


def viz(folder, x, options, wanted):
    from camflow.flow import colour
    flow, unit = x["flow"].numpy(), x["unit"].numpy()
    found = {"image_flow_to_image": colour.flow_to_image(flow), "image_flow_to_color": colour.flow_to_color(flow), "image_unit_uv": colour.unit_colours(unit[..., 0], unit[..., 1], 1), "wheel": colour.colour_wheel()}
    return {k: torch.as_tensor(v) for k, v in found.items()}


def score(folder, x, options, wanted):
    from camflow.flow.motion_bucket import flow_score
    from camflow.media.frames import Frames
    found = flow_score(network(folder, options), Frames(x["frames"], "byte"), size=tuple(options["size"]), indices=None)
    out = {k: torch.as_tensor(found[k], dtype=torch.float32).reshape(-1) for k in ("score", "pair_scores", "mean_speed")}
    flow = getattr(found["flow"], "data", found["flow"])
    return out | {"flow": flow, "flow_every_8th": flow[..., ::8, ::8]}


def resize_infer(folder, x, options, wanted):
    from camflow.flow.gmflow import gmflow_flow, to_gmflow, working_size
    from camflow.media.frames import Frames
    net, frames = network(folder, options), Frames(torch.cat([x["image0"], x["image1"]]).to(torch.uint8), "byte")
    seen = to_gmflow(frames, working_size(frames.size, None, net.config.multiple), "cpu")
    found = {"flow_model_size": net(seen[:1], seen[1:]), "flow_reference": gmflow_flow(net, frames, compat="reference").data}
    return found | {"flow_corrected": gmflow_flow(net, frames).data}


KINDS = {f.__name__: f for f in (full, trace, normalize, backbone, position, transformer, matching, propagation, refine_step, warp, viz, score, resize_infer)}
EXACT = ("valid", "fwd_occ", "bwd_occ", "shift_mask")


def line(kind, name):
    "(atol, rtol) of one tensor."
    if name in EXACT: return 0.0, 0.0
    if kind == "viz": return (1e-9, 0.0) if name == "wheel" else (1.0, 0.0)
    if name in ("score", "pair_scores", "mean_speed"): return SCORE
    if kind in ("full", "score", "resize_infer"): return FLOW
    if kind == "transformer" or "transformer" in name or name.endswith(".corr"): return ATTENTION
    if kind == "trace" and ("flow" in name or "delta" in name or "mask" in name or "warped" in name): return FLOW
    return MODULE


def compare(kind, ours, theirs):
    "(largest difference, atol, rtol, ok): the tensor that is nearest to its pass line, or furthest beyond it."
    worst = (-1.0, 0.0, 0.0, 0.0)
    for name, want in theirs.items():
        atol, rtol = line(kind, name)
        got = ours.get(name)
        if got is None or tuple(got.shape) != tuple(want.shape) or not torch.isfinite(got.double()).all(): return math.inf, atol, rtol, False
        diff = (got.detach().double() - want.double()).abs()
        allowed = atol + rtol * want.double().abs()
        share = float(torch.where(allowed > 0, diff / allowed.clamp_min(1e-300), torch.where(diff > 0, math.inf, 0.0)).max())
        if share > worst[0]: worst = share, float(diff.max()), atol, rtol
    share, diff, atol, rtol = worst
    return diff, atol, rtol, 0 <= share <= 1


def check(folder, code: str = "camflow") -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for a case whose function is not known, or that the oracle has no part in."
    folder = Folder(folder)
    described = json.loads((folder.path / "cases.json").read_text()) if (folder.path / "cases.json").is_file() else {}
    results = {}
    for case in sorted({p.stem for p in folder.path.glob("*.safetensors")} | described.keys()):
        options = described.get(case, {})
        kind = options.get("function")
        if kind not in KINDS or (code == "oracle" and kind != "full"):
            results[case] = NOT_COVERED
            continue
        if not (folder.path / f"{case}.safetensors").is_file(): # named in cases.json, but not there
            results[case] = (math.inf, 0.0, 0.0, False)
            continue
        x, wanted = folder.tensors(case)
        with torch.no_grad():
            ours = full(folder, x, options, wanted, code) if kind == "full" else KINDS[kind](folder, x, options, wanted)
        results[case] = compare(kind, ours, wanted)
    return results

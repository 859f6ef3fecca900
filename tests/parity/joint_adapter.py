"""The joint adapter against UniCon's patch: blocks, whole UNets, layouts, checkpoint keys; and SVD's UNet against diffusers."""
import functools
import json
import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel

from camflow.joint.adapter import JointAdapter
from camflow.joint.layout import Layout, Pair, adapter_name, lora_masks
from tests.parity.seeded import seeded_array
from tests.parity.wan import Folder, attempt, difference, verdict

BLOCK, NETWORK = 1e-4, 1e-4  # pass lines of the goldens' README


def shapes(folder, kind, name):
    "Shapes of a network's tensors, of this configuration where the folder tells several."
    own = Path(folder.path) / f"shapes_{kind}_{name}.json"
    return json.loads((own if own.exists() else Path(folder.path) / f"shapes_{kind}.json").read_text())


def drawn(table, prefix=""):
    return {name: torch.from_numpy(seeded_array(prefix + name, shape)) for name, shape in table.items()}


def base_unet(folder, case):
    unet = UNet2DConditionModel(**folder.cases["unet_configs"][case["unet"]]).eval()
    unet.load_state_dict(drawn(shapes(folder, "unet", case["unet"])))
    return unet


def svd_unet(folder, case):
    unet = UNetSpatioTemporalConditionModel(**folder.cases["svd_unet_configs"][case["unet"]]).eval()
    unet.load_state_dict(drawn(shapes(folder, "svd_unet", case["unet"])))
    return unet


def trainables(folder, post, y_lora=True, skip=None, prefix=""):
    "UniCon's trained parameters under their names in training."
    variant = post + ("_skip_encoder" if skip else "") + ("" if y_lora else "_without_y_lora")
    return drawn(json.loads((Path(folder.path) / f"shapes_trainables_{variant}.json").read_text()), prefix)


def as_model(name, state):
    "Names in training to names of a named model."
    for kind in ("xy", "yx", "y"): state = {k.replace(f".{kind}_lora.", f".{adapter_name(name, kind)}."): v for k, v in state.items()}
    return {k.replace(".conv1n.", f".post1n.{name}."): v for k, v in state.items()} if name else state


def build(folder, case, **changes):
    "(unet, adapter) of a case with the folder's weights: one unnamed model, or the case's named ones. changes: y_lora, lora_side."
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    unet, side = base_unet(folder, case), changes.pop("lora_side", case.get("lora_side", "token"))
    adapter, state = JointAdapter(unet, lora_side=side, empty=True), {}
    skip = case.get("skip")
    specs = case.get("models") or [["", case["post"], changes.pop("y_lora", case.get("y_lora", True))]]
    for i, (name, post, y_lora) in enumerate(specs):
        adapter.add_model(name, post, case["r"], case.get("alpha"), y_lora, (skip,) if skip else ())
        state |= as_model(name, trainables(folder, post, y_lora, skip, f"{name}/" if i else ""))
    adapter.load_state_dict(state)
    return unet, adapter


def layout_of(case, rows, cfg=False):
    "The case's pairs on this many rows of one copy."
    return Layout(tuple(Pair(*p) for p in case["pairs"]), rows, cfg, case.get("joint_scale", 1.0))


# ---- one block

@torch.no_grad()
def block(folder, case, x, y):
    unet, adapter = build(folder, case)
    rows = len(x["hidden_states"])
    if "x_ids" in x: pairs = zip(x["x_ids"].tolist(), x["y_ids"].tolist(), x["x_weights"].tolist(), x["y_weights"].tolist())
    else: pairs = case["pairs"]
    layout = Layout(tuple(Pair(*p) for p in pairs), rows, scale=case["joint_scale"])
    module, order, back, kept = unet.get_submodule(case["block"]), list(layout.order), layout.inverse(layout.order), {}
    module.attn1.register_forward_hook(lambda m, a, out: kept.__setitem__("self_attention", out), prepend=True)   # before the branch adds its term
    module.attn1.register_forward_hook(lambda m, a, out: kept.__setitem__("joined", out))
    run = lambda: module(x["hidden_states"][order], encoder_hidden_states=x["encoder_hidden_states"][order])[back]
    with adapter.use(layout):
        fused = run()
        adapter.state.record = {}
        kept["out"] = run()
    raw = torch.empty_like(y["joint_attention_raw"])
    for r, out_x, out_y, *_ in adapter.state.record[case["block"]]: raw[list(r.pairs)], raw[[p + len(layout.pairs) for p in r.pairs]] = out_x, out_y
    got = {"out": kept["out"], "self_attention": kept["self_attention"][back], "joint_attention_raw": raw, "joint_term": (kept["joined"] - kept["self_attention"])[back]}
    return verdict(difference([(got[name], y[name]) for name in y] + [(fused, y["out"])]), BLOCK)


# ---- whole networks

VARIANTS = {"token": {}, "query": dict(lora_side="query"), "token_no_y_lora": dict(y_lora=False), "token_scale_0.6": dict(scale=0.6), "joint_off": dict(joint=False), "base": dict(base=True)}


@torch.no_grad()
def unet(folder, case, x, y):
    pairs, errors = len(x["sample"]) // 2, {}
    for name, golden in y.items():
        how = dict(VARIANTS[name])
        scale, joint, base = how.pop("scale", 1.0), how.pop("joint", True), how.pop("base", False)
        model, adapter = build(folder, case, **how)
        run = lambda: model(x["sample"], x["timesteps"], x["encoder_hidden_states"]).sample
        with adapter.use(Layout(tuple((p, p + pairs) for p in range(pairs)), 2 * pairs, scale=scale)):
            if joint and not base: got = [run()]
            else:
                with adapter.off(lora=base): got = [run()]
        if base: got.append(run())                          # outside of `use`: the plain network, too
        errors[name] = verdict(difference((g, golden) for g in got), NETWORK)
    return errors


@torch.no_grad()
def unet_infer(folder, case, x, y):
    model, adapter = build(folder, case)
    rows = len(x["sample"]) // (2 if case["use_cfg"] else 1)
    with adapter.use(layout_of(case, rows, case["use_cfg"])): out = model(x["sample"], x["timesteps"], x["encoder_hidden_states"]).sample
    return verdict(difference([(out, y["out"])]), NETWORK)


@torch.no_grad()
def svd(folder, case, x, y):
    "The plain network, and with an untrained adapter on all of its self-attentions."
    model, results = svd_unet(folder, case), {}
    ids = x["added_time_ids"]
    calls = {"out": (x["encoder_hidden_states"], ids), "out_two_token_context": (x["context2"], ids), "out_swapped_ids_wrong": (x["encoder_hidden_states"], ids[:, [0, 2, 1]])}
    run = lambda name: model(x["sample"], x["timesteps"], *calls[name]).sample
    plain = {name: run(name) for name in y}
    adapter = JointAdapter(model, attention="both")
    with adapter.use(Layout(((0, 1),), len(x["sample"]))): joined = {name: run(name) for name in y}
    for name in ("out", "out_two_token_context"): results[name] = verdict(difference([(plain[name], y[name]), (joined[name], y[name])]), NETWORK)
    wrong = difference([(plain["out"], y["out_swapped_ids_wrong"])])
    results["order of ids"] = (wrong, NETWORK, 0.0, bool(wrong > 1e-3))      # the wrong order must not match
    return results


# ---- tables

def masks_of(given, golden):
    "Our layout in the golden's words."
    layout = Layout(tuple(Pair(*p) for p in given["pairs"]), given["input_len"], given["use_cfg"])
    y_lora = [m for m in layout.models if adapter_name(m, "y") in golden["active_adapters"]]
    masks, pairs, weight = lora_masks(layout, y_lora), layout.all_pairs, lambda w: torch.tensor(w, dtype=torch.float32).item()
    return dict(active_adapters=sorted(masks), x_ids=layout.x_ids, y_ids=layout.y_ids, x_weights=[weight(p.x_weight) for p in pairs], y_weights=[weight(p.y_weight) for p in pairs],
                query_batch_rows=layout.x_ids + layout.y_ids, key_value_batch_rows=layout.y_ids + layout.x_ids,
                pair_mask_per_model={m: [int(p.model == m) for p in pairs] for m in layout.models}, lora_row_masks=masks)


def cfg_layout(folder):
    rows = json.loads((folder.path / "cfg_layout.json").read_text())
    wrong = sum(masks_of(row["input"], row["output"]) != row["output"] for row in rows)
    return verdict(float(wrong) if rows else math.inf, 0.0)


def checkpoint_keys(folder):
    "What we write has UniCon's keys and shapes, and reading it back gives every parameter, bit for bit."
    from camflow.joint.adapter_files import unicon_state
    golden, wrong = json.loads((folder.path / "checkpoint_keys.json").read_text()), 0
    case = next(c for c in folder.cases["cases"].values() if "unet" in c and c["function"] in ("unet", "train_step"))
    for variant, files in golden.items():
        post = "conv_fuse" if variant.startswith("conv_fuse") else "conv"
        _, adapter = build(folder, {"unet": case["unet"], "post": post, "r": case["r"], "skip": "down_blocks" if "skip_encoder" in variant else None,
                                    "y_lora": not variant.endswith("without_y_lora")})
        ours = {name: {key: list(t.shape) for key, t in tensors.items()} for name, tensors in unicon_state(adapter).items()}
        wrong += {name: dict(sorted(keys.items())) for name, keys in ours.items()} != {name: dict(sorted(keys.items())) for name, keys in files.items() if keys}
    return verdict(float(wrong) if golden else math.inf, 0.0)


FUNCTIONS = {"block": block, "unet": unet, "unet_infer": unet_infer, "svd_unet": svd}
TABLES = {"cfg_layout": cfg_layout, "checkpoint_keys": checkpoint_keys}


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)} of the adapter's cases."
    folder, results = Folder(folder), {}
    for name, case in folder.cases.get("cases", {}).items():
        if case["function"] not in FUNCTIONS: continue
        done = attempt(functools.partial(FUNCTIONS[case["function"]], folder, case, *folder.tensors(name)))
        results |= {f"{name}.{part}": result for part, result in done.items()} if isinstance(done, dict) else {name: done}
    for name, table in TABLES.items():
        if (folder.path / f"{name}.json").exists(): results[name] = attempt(functools.partial(table, folder))
    return results

"""RAFT-Stereo against its reference: `check(folder)` replays every case of a folder of goldens (predictions, features, states, lookups, flows)."""
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.parity.seeded import seeded_state_dict

NOT_COVERED = (float("nan"), 0.0, 0.0, None)
LINES = {"fmap": 3e-4, "corr": 2e-3}  # pass lines of the goldens' README, absolute; 2e-4 for all others
EVERY = {"fmap1": 32, "fmap2": 64, "net": 32, "last": 32, "inp": 96, "corr": 5}  # channels kept


def load(folder, config, gain):
    "camflow's network with weights drawn by name."
    from camflow.stereo.raft_stereo import RAFTStereo, config_of
    from camflow.training.checkpoint import load_whole
    shapes = json.loads((folder / f"shapes_{config}.json").read_text())
    state = {k: torch.from_numpy(v) for k, v in seeded_state_dict(shapes, gain).items()}
    return load_whole(RAFTStereo(config_of(state)), state).eval()


def replay(net, left, right, params):
    "{name of an output: ours}."
    trace = {}
    with torch.no_grad(): disparity = net(left, right, params["iters"], params["every"], trace)
    thin = lambda k, v: v[:, ::next((n for head, n in EVERY.items() if k.startswith(head)), 1)]
    return {k: thin(k, v) for k, v in trace.items()} | {"flow": -disparity}


def compare(ours, theirs):
    "(largest difference, atol, rtol, ok) of the tensor that is nearest to its pass line, or furthest beyond it."
    worst = (-1.0, 0.0, 0.0)
    for name, want in theirs.items():
        atol, got = next((line for head, line in LINES.items() if name.startswith(head)), 2e-4), ours.get(name)
        if got is None or got.shape != want.shape or not torch.isfinite(got).all(): return math.inf, atol, 0.0, False
        diff = float((got.double() - want.double()).abs().max())
        worst = max(worst, (diff / atol, diff, atol))
    return worst[1], worst[2], 0.0, 0 <= worst[0] <= 1


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for a case whose function is not known."
    results = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file: meta = file.metadata()
        if meta.get("function") not in ("forward", "trace"):
            results[path.stem] = NOT_COVERED
            continue
        both = load_file(path)
        theirs = {k.removeprefix("output."): v for k, v in both.items() if k.startswith("output.")}
        net = load(Path(folder), meta["config"], float(meta["gain"]))
        results[path.stem] = compare(replay(net, both["input.left"], both["input.right"], json.loads(meta["params"])), theirs)
    return results

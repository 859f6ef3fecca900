"""OmniCam's networks, LoRA files, timesteps, image condition and key maps against the reference; the script is in omnicam_script, caches are in omnicam_cache."""
import itertools
import json
import math

import torch

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


FILES = {"timesteps": timesteps}
KINDS = {}


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
        if case.get("kind") in KINDS: results[name] = attempt(lambda: KINDS[case["kind"]](folder, case, *folder.tensors(name)))
    return results

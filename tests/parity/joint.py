"""Joint diffusion's goldens, joined: the adapter, and noise with sampling, are replayed by the modules of their chapters."""
from importlib import import_module, util
from pathlib import Path

PARTS = ("joint_adapter", "joint_noise")
NEVER = (float("nan"), 0.0, 0.0, None)
WEIGHTS = ("cases", "shapes_")   # what the cases are made with, no cases themselves


def case_names(folder) -> list:
    "Every case of a folder: its tensor files and JSON tables."
    return sorted(p.stem for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".json") and not p.stem.startswith(WEIGHTS))


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for what waits for a part that is missing."
    results = dict.fromkeys(case_names(folder), NEVER)
    for name in PARTS:
        if util.find_spec(f"tests.parity.{name}") is None: continue
        for case, result in import_module(f"tests.parity.{name}").check(folder).items():
            if case not in results or results[case][3] is None: results[case] = result
    whole = {case.split(".")[0] for case, result in results.items() if "." in case and case not in case_names(folder)}
    results = {case: result for case, result in results.items() if result[3] is not None or case not in whole}
    if not all(util.find_spec(f"tests.parity.{name}") for name in PARTS): return results
    return {case: result if result[3] is not None else (float("inf"), 0.0, 0.0, False) for case, result in results.items()}   # all parts are here: nothing may be left out

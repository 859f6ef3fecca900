"""OmniCam's goldens, joined: the camera script, the networks with their files, and the caches are replayed by the modules of their chapters."""
from importlib import import_module, util

PARTS = ("omnicam_model", "omnicam_script", "omnicam_cache")


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; ok is None for what no part covers."
    results = {}
    for name in PARTS:
        if util.find_spec(f"tests.parity.{name}") is None: continue
        for case, result in import_module(f"tests.parity.{name}").check(folder).items():
            if case not in results or results[case][3] is None: results[case] = result
    return results

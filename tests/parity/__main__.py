"""`python -m tests.parity SYSTEM FOLDER`: replay a folder of goldens; prints a table, exits 1 when a case fails or none ran."""
import argparse
import importlib
import sys
from pathlib import Path

# A system's goldens are replayed by the modules that own the code they exercise.
SYSTEMS = {
    "recam": ["wan", "cameras"],
    "rl": ["rl", "cameras", "rewards"],
    "da3": ["da3", "cameras"],
    "qwen3vl": ["qwen3vl"],
    "metrics": ["metrics", "metrics_matching", "metrics_networks"],
    "omnicam": ["omnicam"],
    "stereo": ["stereo"],
    "joint": ["joint"],
    "stereo-oracle": ["stereo_oracle"],
    "gmflow": ["gmflow"],
    "raft_stereo": ["raft_stereo"],
}


def check(system: str, folder: Path) -> dict:
    "{case: (max_abs_diff, atol, rtol, ok)}; ok is None for a case nothing here covers yet."
    results = {}
    for name in SYSTEMS[system]:
        for case, result in importlib.import_module(f"tests.parity.{name}").check(folder).items():
            if case not in results or results[case][3] is None:
                results[case] = result
    whole = {case.split(".")[0] for case, result in results.items() if result[3] is not None and "." in case}
    return {case: result for case, result in results.items() if result[3] is not None or case not in whole}  # replayed part by part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    results = check(args.system, args.folder)
    for case, (diff, atol, rtol, ok) in sorted(results.items()):
        verdict = {True: "ok", False: "FAIL", None: "not covered yet"}[ok]
        print(f"{case:42s} {verdict:16s}" + ("" if ok is None else f" max |diff| {diff:.3g}  (atol {atol:g}, rtol {rtol:g})"))
    ran = [r for r in results.values() if r[3] is not None]
    failed = [r for r in ran if not r[3]]
    print(f"{len(ran) - len(failed)} passed, {len(failed)} failed, {len(results) - len(ran)} skipped")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())

"Replays the metric tables of a folder of stereo goldens (metrics.json, evaluation_aggregate.json; format: goldens/stereo/README.md)."
import json
import math
from pathlib import Path

import torch

from camflow.metrics.stereo import aggregate, stereo_errors

LINE = 1e-5 # the reference sums in float32; percentages relative to 100


def tensor(nested):
    "float32 tensor of nested lists in which nan, inf and -inf are strings."
    plain = lambda value: [plain(v) for v in value] if isinstance(value, list) else float(value)
    return torch.tensor(plain(nested), dtype=torch.float32)


def difference(got, want):
    "Relative to the size of the wanted number where that is above 1; NaN matches NaN only."
    got, want = float(got), float(want)
    if math.isnan(got) or math.isnan(want): return 0.0 if math.isnan(got) and math.isnan(want) else math.inf
    return abs(got - want) / max(1.0, abs(want))


def worst(got: dict, want: dict):
    return max([difference(got[name], want[name]) if name in got else math.inf for name in want], default=0.0)


def from_valid(row, aux):
    "The published numbers from ours: mean_valid = mean * nonzero / valid."
    out = {}
    for kind, short in (("epe", "epe"), ("temp_epe", "temp")):
        scale = aux[f"{short}_valid"] / aux[f"{short}_nonzero"] if aux[f"{short}_nonzero"] else 0.0
        out |= {name: value * scale if aux[f"{short}_valid"] else 0.0 for name, value in row.items() if name.startswith(f"{kind}_") and not name.startswith("epe_abs")}
    return out


def metrics_case(i, want):
    pred, gt, mask = (tensor(i[name]) for name in ("pred", "gt", "mask"))
    crop, aux = i.get("crop", 0), want.get("aux")
    numbers = {name: value for name, value in want.items() if name != "aux"}
    found = worst(stereo_errors(pred, gt, mask, "upstream", crop), numbers)
    plain = aux and bool(((mask == 0) | (mask == 1)).all()) and not bool(pred.isnan().any()) and not bool((gt.isnan() & (mask > 0.5)).any())
    if plain: found = max(found, worst(from_valid(stereo_errors(pred, gt, mask, "valid", crop), aux), numbers))
    return found


def aggregate_case(i, want):
    rows, frames = [], []
    for sequence in i["sequences"]:
        pred, gt, mask = (tensor(sequence[name]) for name in ("pred", "gt", "mask"))
        row = stereo_errors(pred * mask.round(), gt, mask, "upstream")
        rows.append({f"disp_{name}": value for name, value in row.items()})
        frames.append(len(gt))
    found = max(worst(row, one) for row, one in zip(rows, want["per_sequence"]))
    whole = {name: interval.estimate for name, interval in aggregate(rows, frames, n=10).items()}
    return max(found, worst(whole, want["aggregate"]), 0.0 if frames == want["n_frames"] else math.inf)


CASES = {"metrics": metrics_case, "evaluation_aggregate": aggregate_case}


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)} for the tables that the folder holds."
    out = {}
    for name, case in CASES.items():
        path = Path(folder)/f"{name}.json"
        if not path.exists(): continue
        found = max(case(row["input"], row["output"]) for row in json.loads(path.read_text())["cases"])
        out[name] = (found, LINE, 0.0, found <= LINE)
    return out

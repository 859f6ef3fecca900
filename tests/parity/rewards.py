"""CameraFlow's reward arithmetic against recorded outputs: `check(folder)` replays cam_score, unified_score, multi_score."""
import json
import math
from pathlib import Path

from camflow.rewards import camera

LINE = 1e-12


def cam_score(x): return camera.cam_score(x["rot_err"], x["trans_err"])


def unified_score(x):
    replies = iter(x["replies"])

    def ask():
        reply = next(replies, "")
        if reply == "HTTP_ERROR": raise ConnectionError(reply)
        return reply

    return camera.unified_score(ask)


def multi_score(x):
    cam = [camera.cam_score(*pair) for pair in x["pose"]]
    judge = [camera.unified_score(lambda text=text: text)["score"] for text in x["answers"]]
    scores = {"cam_score": [c["score"] for c in cam], "unifiedscore": judge}
    return scores | {"avg": camera.multi_score(x["weights"], scores), "cam_score_rot_err": [c["rot_score"] for c in cam], "cam_score_trans_err": [c["trans_score"] for c in cam]}


CASES = {f.__name__: f for f in (cam_score, unified_score, multi_score)}


def difference(got, want) -> float:
    "Largest |got - want| / max(1, |want|) over all numbers; inf where the shapes differ; NaN equals NaN."
    if isinstance(want, dict): return max((difference(got[k], v) if k in got else math.inf for k, v in want.items()), default=0.0)
    if isinstance(want, list): return max((difference(g, w) for g, w in zip(got, want)), default=0.0) if len(got) == len(want) else math.inf
    want = float(want)
    if math.isnan(want): return 0.0 if math.isnan(got) else math.inf
    return abs(got - want) / max(1.0, abs(want))


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)}; cases of other modules are reported as not supported."
    out = {}
    names = [p.stem for p in sorted(Path(folder).iterdir()) if p.suffix in (".json", ".safetensors") and p.stem not in ("configs", "shapes", "synthetic_camera_extrinsics")]
    for name in names:
        if name not in CASES: out[name] = (math.nan, 0.0, 0.0, None)
        else:
            worst = max(difference(CASES[name](entry["input"]), entry["output"]) for entry in json.loads((Path(folder) / f"{name}.json").read_text()))
            out[name] = (worst, LINE, LINE, worst <= LINE)
    return out

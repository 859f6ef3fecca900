"Camera script of the goldens (camera_script, direction_rates, prompt_form, frame_index) against camflow.geometry.script_omnicam."
import hashlib
import math
import re
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

from camflow.geometry.script_omnicam import omnicam_deltas, omnicam_frame_index, omnicam_poses, omnicam_rates, omnicam_segments, omnicam_smooth, prompt_form

from .cameras import Score, read

ATOL = {"camera_script": 1e-6, "direction_rates": 1e-12, "prompt_form": 0.0, "frame_index": 0.0}


def _plain(value):
    "As the goldens write it: non-finite numbers become {'nonfinite': name}."
    return {"nonfinite": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _failure(text):
    "What goes wrong, in the goldens' form, or None."
    stage = "deltas"
    try:
        deltas = omnicam_deltas(omnicam_segments(text))
        stage = "poses"
        omnicam_smooth(deltas)
    except Exception as error: return {"type": type(error).__name__, "stage": stage, "message": str(error)}
    return None


def script(path, score):
    "Every script: instructions, cumulative moves, smoothed moves, poses, or the error."
    tensors = load_file(path.with_suffix(".safetensors"))
    entries, unused = read(path), set(tensors)
    for entry in entries:
        name, text, want = entry["name"], entry["input"]["text"], entry["output"]
        segments = omnicam_segments(text)
        yield [{k: _plain(v) for k, v in s.items()} for s in segments] == want["segments"]
        if "deltas" in want:
            deltas = omnicam_deltas(segments)
            score.add(deltas, want["deltas"], atol=0, rtol=0)
            yield len(deltas) == want["n_deltas"]
        failure = _failure(text)
        if "error" in want:
            said = want["error"]
            same = failure is not None and (failure["type"], failure["stage"]) == (said["type"], said["stage"])
            yield same and failure["message"].startswith(said["message_start"])
            continue
        yield failure is None
        w2c, smooth = omnicam_poses(text)
        yield w2c.dtype == torch.float32 and len(w2c) == want["n_poses"]
        score.add(smooth, tensors[f"output.smooth.{name}"], atol=1e-9)
        score.add(w2c, tensors[f"output.w2c.{name}"])
        unused -= {f"output.smooth.{name}", f"output.w2c.{name}"}
    yield bool(entries) and not unused  # every tensor was compared


def rates(path, score):
    for entry in read(path): score.add(omnicam_rates(**entry["input"]), entry["output"])
    yield bool(read(path))


def form(path, score):
    for entry in read(path):
        want = entry["output"]
        try: found, place = prompt_form(entry["input"])
        except IndexError as error:
            yield want.get("error", {}).get("type") == type(error).__name__
            continue
        yield "error" not in want and (found, place) == (want["form"], want["path"])


def index(path, score):
    data = read(path)
    for case in data["cases"]:
        ours = omnicam_frame_index(case["input"]["latent_frames"], case["input"]["n_poses"])
        yield len(ours) == case["input"]["video_frames"] and ours == case["output"]
    if "grid_sha256" in data:
        rows, columns = map(int, re.findall(r"1\.\.(\d+)", data["grid_sha256"]["input"]))
        text = "".join(f"{t},{n}:" + ",".join(map(str, omnicam_frame_index(t, n))) + "\n" for t in range(1, rows + 1) for n in range(1, columns + 1))
        yield hashlib.sha256(text.encode()).hexdigest() == data["grid_sha256"]["output"]


REPLAY = {"camera_script": script, "direction_rates": rates, "prompt_form": form, "frame_index": index}


def check(folder) -> dict:
    "{case: (max_abs_diff, atol, rtol, ok)} of the four cases where the folder has them."
    results = {}
    for name, replay in REPLAY.items():
        path = Path(folder)/f"{name}.json"
        if not path.is_file(): continue
        score = Score(ATOL[name], 1e-6 if name == "direction_rates" else 0)
        try: agreed = all([*replay(path, score)])
        except Exception:
            traceback.print_exc()
            results[name] = (math.inf, score.atol, score.rtol, False)
            continue
        results[name] = (score.worst, score.atol, score.rtol, score.ok and agreed)
    return results

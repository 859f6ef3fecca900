"""Camera errors on real clips with published poses: `python -m tests.real_cameras ../shared/real/realestate10k` prints a row per clip and estimator.

The videos are 16 frames 0.28 s apart, 16:9 originals *stretched* to 256x384: with the lens of a centre crop instead, structure from motion reads 4.5 degrees on a clip
where it reads 0.3 with fx of the stretched picture, and an estimated focal length agrees with the latter. The published poses are ORB-SLAM2's, refined, not a truth.
"""
import sys
from pathlib import Path

import pandas as pd

from camflow.geometry.camera import Cameras
from camflow.media.video import read_video
from camflow.metrics.camera_accuracy import CameraAccuracy

ESTIMATORS = ("auto", "sfm_global", "sfm_incremental", "fallback", "rotation", "tiny")
COLUMNS = ("rot_mean_deg", "trans_max", "trans_dir_deg", "unregistered", "seconds")


def clips(folder):
    "(name, uint8 [T,3,H,W], Cameras) of every clip."
    for path in sorted(Path(folder).glob("videos/*.mp4")):
        frames = read_video(path)
        yield path.stem, frames.data, Cameras.from_realestate10k(path.parents[1]/"poses"/f"{path.stem}.txt", frames.size)


def table(folder, estimators=ESTIMATORS) -> pd.DataFrame:
    "One row per clip and estimator."
    rows = []
    for name, video, cameras in clips(folder):
        for estimator in estimators:
            results = {r.metric.split(".")[1]: r for r in CameraAccuracy(estimator)(video=video, cameras=cameras)}
            first = results["rot_mean_deg"]
            rows.append({"clip": name, "estimator": estimator, "status": first.status} | {c: results[c].value for c in COLUMNS}
                        | {"support": first.details.get("rotation_support"), "warning": first.details.get("warning", ""), "reason": first.reason})
            print(rows[-1], file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    found = table(sys.argv[1], sys.argv[2].split(",") if len(sys.argv) > 2 else ESTIMATORS)
    print(found.round(3).to_string(index=False))
    print(found.pivot(index="clip", columns="estimator", values="rot_mean_deg").round(3).to_string())

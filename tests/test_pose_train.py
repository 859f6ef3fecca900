"The training of the tiny camera estimator: configuration, two ranks, what it writes."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camflow.depth import pose, pose_train
from camflow.files import InputError
from camflow.lab.launch import launch
from camflow.media.frames import Frames

ROOT = Path(__file__).resolve().parents[1]
CONFIG = dict(items=4, clips=2, steps=2, batch_size=2, evaluate=False, validate_every=2, checkpoint_every=2, warmup=0, width=32)

BANK = """
import sys
from camflow.depth import pose_train
from camflow.processes import end_quickly
end_quickly()
make = pose_train.make_item
def noted(seed, **options):
    with open(sys.argv[2], "a") as file: print(seed, file=file, flush=True)
    return make(seed, **options)
pose_train.make_item = noted
print(pose_train.Bank(sys.argv[1], 0, 4, part=2).flow.sum().item())
"""


def test_two_ranks_train_and_one_writes(tmp_path):
    done = launch("camflow.depth.pose_train", CONFIG, tmp_path, num_processes=2, env={"OMP_NUM_THREADS": "1"})
    assert done.metrics[-1]["step"] == 2
    assert json.loads((tmp_path/"result.json").read_text())["status"] == "done"
    frames = Frames(torch.randint(0, 256, (9, 3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), "byte")
    assert pose.estimate_cameras(pose.load_pose(tmp_path/"model"), frames).shape == (9, 4, 4)


def test_ranks_share_the_rendering(tmp_path):
    "Every clip is rendered once, whichever rank comes first; all read the same bank."
    start = lambda rank: subprocess.Popen([sys.executable, "-c", BANK, str(tmp_path/"bank"), str(tmp_path/"log")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                          env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})
    ranks = [start(0), start(1)]
    sums = [process.communicate(timeout=900) for process in ranks]
    assert sums[0][0] == sums[1][0] != "", sums
    assert sorted((tmp_path/"log").read_text().split()) == ["0", "1", "2", "3"]


def test_another_vae_makes_other_items(tmp_path):
    "A shared bank gave a second VAE the frames of the first."
    def dark(frames, g): return frames // 4
    def flat(frames, g): return frames * 0
    dark.made_of, flat.made_of = ["dark"], ["flat"]
    first, second = (pose_train.Bank(tmp_path, 0, 1, through=f).colour for f in (dark, flat))
    assert (second == -1).all() and not torch.equal(first, second) and len(list(tmp_path.glob("*.safetensors"))) == 2
    assert pose_train.vae_round_trip("tiny").made_of != pose_train.vae_round_trip("tiny", noise=0.1).made_of


def test_unknown_setting_is_refused(tmp_path):
    with pytest.raises(InputError, match="widht"): pose_train.main({"widht": 3}, tmp_path)

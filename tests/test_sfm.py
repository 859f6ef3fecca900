"Cameras read from rendered videos must be the true ones, whichever backend reads them; clips without parallax are named; failures are typed."
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.geometry import trajectory as tr
from camflow.geometry.camera import Cameras
from camflow.geometry.rigid import so3_exp
from camflow.metrics.camera_accuracy import NUMBERS, CameraAccuracy
from camflow.metrics.pose import pose_error
from camflow.metrics.rotation_only import gray_frames, rotation_path
from camflow.metrics.sfm import has_pycolmap, recover
from camflow.world.render import default_K, render, render_clips
from camflow.world.scene import random_scene

from .real_cameras import table

REAL = Path(__file__).resolve().parents[2]/"shared/real/realestate10k"
BACKENDS = [pytest.param(name, marks=pytest.mark.skipif(name != "fallback" and not has_pycolmap(), reason="pycolmap has no wheel for this machine"))
            for name in ("sfm_global", "sfm_incremental", "fallback")]
PATHS = ("arc_right", "zoom_in", "translate_up")


@cache
def clip(name, frames=12, side=192, seed=3, motion=False):
    "A finely textured room on one of the presets (or standing still): uint8 [T,3,H,W], poses [T,4,4], K."
    path = tr.static(frames) if name == "static" else tr.preset(name, frames)
    scene, K = random_scene(seed, motion=motion, detail=4), default_K((side, side))
    return render_clips(scene, [(scene.start @ path.numpy(), K)], np.arange(frames) / 8, size=(side, side))[0], path, K


def errors(name, method, lens=True, **which):
    video, path, K = clip(name, **which)
    found = recover(video, K if lens else None, method=method)
    assert found.cameras is not None, (found.status, found.reason)
    truth = path[found.cameras.frames]
    error = pose_error(truth, found.cameras.c2w, "ls")
    return found, error.rot_mean_deg, error.trans_mean / float((path[1:, :3, 3] - path[:-1, :3, 3]).norm(dim=1).sum())


@pytest.mark.parametrize("method", BACKENDS)
@pytest.mark.parametrize("name", ["arc_right", "zoom_in", pytest.param("translate_up", marks=pytest.mark.slow)])
def test_truth(name, method):
    found, degrees, share = errors(name, method)
    assert found.status == "ok" and found.registered == 1 and degrees < 0.2 and share < 0.01, (degrees, share)
    assert 0 < found.reprojection < 1 and found.points > 100 and found.cpu_seconds < 15
    assert (found.cameras.c2w[0] - torch.eye(4)).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("method", BACKENDS)
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("name", [*PATHS, "arc_left", "translate_down", "zoom_out"])
def test_truth_at_full_size(name, seed, method):
    found, degrees, share = errors(name, method, frames=20, side=256, seed=seed)
    if method == "sfm_incremental" and found.status == "partial": return  # said so: its first pair was a wrong one
    assert found.status == "ok" and degrees < 0.2 and share < 0.01, (degrees, share)


@pytest.mark.slow
@pytest.mark.parametrize("method", BACKENDS)
def test_unknown_lens(method):
    found, degrees, share = errors("arc_right", method, lens=False, frames=20, side=256, seed=3)
    true = clip("arc_right", frames=20, side=256, seed=3)[2][0, 0]
    assert found.status == "ok" and degrees < 0.5 and abs(float(found.cameras.K[0, 0, 0]) / true - 1) < 0.03


@pytest.mark.parametrize("name", ["pan_left", "tilt_up"])
def test_pans_go_to_the_rotation(name):
    video, path, K = clip(name)
    found = recover(video, K)
    error = pose_error(path, found.cameras)
    assert (found.status, found.method) == ("rotation_only", "rotation") and found.support > 0.9
    assert error.rot_mean_deg < 0.05 and float(found.cameras.c2w[:, :3, 3].abs().max()) == 0


@pytest.mark.parametrize("name,status", [("static", "static"), ("pan_right", "rotation_only"), *((name, "translating") for name in PATHS)])
def test_model_selection(name, status):
    video, _, K = clip(name)
    assert rotation_path(gray_frames(video), K).status == status


def test_dynamic_mask():
    "People cover much of the picture; without them the pan is read as if they were not there."
    scene, size, path = random_scene(5, figures=2, things=4, detail=4), (160, 160), tr.preset("pan_right", 6)
    seen = render(scene, (scene.start @ path.numpy(), default_K(size)), np.arange(6) / 8, want=("image", "moving"), size=size)
    video, masks = seen.frames.byte().data.numpy(), ~seen.moving.numpy()
    found = recover(video, default_K(size), masks)
    assert found.status == "rotation_only" and pose_error(path, found.cameras).rot_mean_deg < 0.1
    with pytest.raises(InputError, match="bool \\[T,H,W\\]"): recover(video, default_K(size), masks[:3])


@pytest.mark.slow
@pytest.mark.parametrize("method", BACKENDS)
def test_dynamic_mask_in_reconstruction(method):
    scene, size, path = random_scene(3, detail=4), (256, 256), tr.preset("arc_left", 16)
    seen = render(scene, (scene.start @ path.numpy(), default_K(size)), np.arange(16) / 8, want=("image", "moving"), size=size)
    found = recover(seen.frames.byte().data, default_K(size), ~seen.moving.numpy(), method=method)
    assert found.status == "ok" and pose_error(path, found.cameras, "ls").rot_mean_deg < 0.25   # 0.21 global, 0.12 incremental, 0.21 fallback


def test_budgets_are_typed():
    video, _, K = clip("arc_right")
    late = recover(video, K, seconds=0.2)
    assert (late.status, late.cameras, late.registered) == ("timeout", None, 0) and late.seconds < 120          # a deadline for what hangs
    small = recover(video, K, memory_mb=150)
    assert small.status == "failed" and "150 MB" in small.reason


@pytest.mark.skipif(not has_pycolmap(), reason="only where pycolmap is")
def test_the_same_seed_gives_the_same_poses():
    video, _, K = clip("arc_right", frames=6)
    a, b = (recover(video, K, method="sfm_global", seed=3) for _ in range(2))
    assert torch.equal(a.cameras.c2w, b.cameras.c2w)


@pytest.mark.parametrize("method", BACKENDS)
def test_no_parallax_is_a_failure_of_reconstruction(method):
    video, _, K = clip("static", frames=4)
    found = recover(video, K, method=method)
    assert found.status == "failed" and "parallax" in found.reason and found.cameras is None


def test_without_pycolmap_the_fallback_takes_over(tmp_path, monkeypatch):
    (tmp_path/"pycolmap.py").write_text("raise ImportError('no wheel')")
    monkeypatch.syspath_prepend(tmp_path)
    video, path, K = clip("arc_right")
    found = recover(video, K)
    assert (found.status, found.method) == ("ok", "fallback") and pose_error(path, found.cameras, "ls").rot_mean_deg < 0.2
    refused = recover(video, K, method="sfm_global")
    assert refused.status == "failed" and "needs pycolmap" in refused.reason


def read(results): return {r.metric.partition(".")[2]: r for r in results}


def test_one_degree_of_pose_noise_reads_one_degree():
    video, path, K = clip("pan_left")
    asked = path.clone()
    turn = so3_exp(math.radians(1) * torch.nn.functional.normalize(torch.randn(len(path), 3, generator=torch.Generator().manual_seed(0)).double(), dim=1))
    asked[1:, :3, :3] = path[1:, :3, :3] @ turn[1:]
    results = read(CameraAccuracy()(video=torch.from_numpy(video), cameras=Cameras(asked, K, video.shape[2:])))
    assert set(results) == set(NUMBERS)
    assert abs(results["rot_mean_deg"].value - 1) < 0.03 and results["rot_mean_deg"].status == "rotation_only"
    assert math.isnan(results["trans_ls"].value) and results["trans_ls"].status == "rotation_only"
    assert "warning" not in results["rot_mean_deg"].details and len(results["rot_mean_deg"].details["per_frame"]) == len(path)


def test_a_camera_that_did_not_move_is_measured_not_dropped():
    video, path, K = clip("static")
    results = read(CameraAccuracy()(video=torch.from_numpy(video), cameras=Cameras(tr.preset("arc_left", len(path)), K, video.shape[2:])))
    assert results["trans_dir_deg"].value == 90 and results["rot_mean_deg"].value > 10 and results["rot_mean_deg"].details["estimate"] == "static"
    assert results["trans_metric"].status == "skipped" and results["unregistered"].value == 0


def test_failures_of_the_metric_are_typed():
    grey = torch.full((4, 3, 64, 64), 90, dtype=torch.uint8)
    asked = Cameras(tr.preset("arc_left", 4), default_K((64, 64)), (64, 64))
    results = read(CameraAccuracy()(video=grey, cameras=asked))
    assert results["rot_mean_deg"].status == "failed" and results["unregistered"].value == 1 and results["rot_mean_deg"].reason
    with pytest.raises(InputError, match="4 poses for 3 frames"): CameraAccuracy()(video=grey[:3], cameras=asked)
    with pytest.raises(InputError, match="at least two"): CameraAccuracy()(video=grey[:1], cameras=asked[:1])
    assert {r.status for r in CameraAccuracy("da3")(video=grey, cameras=asked)} == {"no_weights"}
    drawn = read(CameraAccuracy("da3", weights="random", options={"process_res": 56})(video=grey, cameras=asked))
    assert drawn["rot_mean_deg"].status == "random_weights"


@pytest.mark.slow
def test_realestate10k():
    if not REAL.exists(): pytest.skip("../shared/real/realestate10k is not here")
    found = table(REAL, ["sfm_global", "sfm_incremental", "fallback", "rotation", "tiny"])
    assert len(found) == 25 and found.seconds.max() < 60
    best = found[found.estimator == "sfm_global"]
    assert (best.status == "ok").all() and best.rot_mean_deg.max() < 1.5 and best.trans_dir_deg.max() < 6
    assert not best.warning.any() and set(found.status) <= {"ok", "invalid", "failed", "timeout"}

"""Cameras by flow and depth: exact where points are exact, unbiased where a network expects a whole preset, missing where nothing can be read."""
import numpy as np
import pytest
import torch

from camflow.depth.flow_pose import flow_poses, lift, robust_pose, smooth_path
from camflow.depth.pose import estimate_cameras, load_pose, to_vector
from camflow.files import InputError
from camflow.geometry.trajectory import PRESETS, preset, rescale
from camflow.rewards.camera import CameraReward
from camflow.rewards.protocol import Sample
from camflow.world.clips import HELD_OUT, first_depth, scene_clips


def clip(kind, size, seed):
    made = scene_clips(seed, [(rescale(preset(kind, 9), translation=size, rotation=size), kind)])
    return torch.from_numpy(made.frames_NT3HW[0]), first_depth(made.scene), torch.from_numpy(made.K_33), torch.from_numpy(made.c2w_NT44[0])


@pytest.mark.parametrize("outliers", [0.0, 0.3])
def test_exact_points_give_the_exact_pose(outliers):
    draw, true = np.random.default_rng(1), np.linalg.inv(preset("arc_right", 9)[-1].numpy())
    points = np.stack([draw.uniform(-3, 3, 500), draw.uniform(-2, 2, 500), draw.uniform(2, 9, 500)], 1)
    Y = points @ true[:3, :3].T + true[:3, 3]
    seen = np.stack([80 * Y[:, 0] / Y[:, 2] + 40, 80 * Y[:, 1] / Y[:, 2] + 24], 1)
    count = int(500 * outliers)
    seen[:count] += draw.uniform(-20, 20, (count, 2))
    found, share = robust_pose(seen, points, np.ones(500), (80., 80., 40., 24.), np.linalg.inv(preset("arc_right", 9)[-2].numpy()))
    assert np.abs(found - true).max() < (1e-6 if not outliers else 2e-3) and abs(share - (1 - outliers)) < 0.1


def test_points_between_surfaces_do_not_count():
    depth = np.full((48, 80), 3.0)
    depth[:, :40] = np.nan
    points, fine = lift(np.array([[10.5, 10.5], [60.5, 10.5], [90.0, 10.5]]), depth, (80., 80., 40., 24.))
    assert fine.tolist() == [False, True, False] and np.allclose(points[1], [20.5 / 80 * 3, -13.5 / 80 * 3, 3])


def test_half_a_preset_is_read_as_half():
    "Slope of measured against true size over all presets at half size: geometry within 15 % of right; errors in bounds."
    slopes, errors = [], []
    for n, kind in enumerate(PRESETS):
        frames, depth, K, true = clip(kind, 0.5, HELD_OUT + 700 + n)
        read = flow_poses(frames, depth, K)
        a, m = (v[-1] / torch.tensor([0.1] * 3 + [0.5] * 3) for v in (to_vector(true), to_vector(read)))
        slopes.append(float(a @ m / (a @ a)))
        errors.append((float((to_vector(true) - to_vector(read))[-1, :3].norm().rad2deg()), float((true - read)[-1, :3, 3].norm())))
    assert 0.85 < np.median(slopes) < 1.15
    assert np.median([e[0] for e in errors]) < 1.5 and np.median([e[1] for e in errors]) < 0.15


def test_the_reward_reads_by_geometry_where_the_depth_is_known():
    frames, depth, K, true = clip("zoom_in", 0.6, HELD_OUT + 730)
    known, unknown = CameraReward()([Sample(frames, preset("zoom_in", 9), depth=depth, K=K), Sample(frames, preset("zoom_in", 9))]).details
    assert known["trans_m"] == pytest.approx(CameraReward().one(Sample(frames, preset("zoom_in", 9)), flow_poses(frames, depth, K))[2]["trans_m"])
    assert unknown["trans_m"] == pytest.approx(CameraReward().one(Sample(frames, preset("zoom_in", 9)), estimate_cameras(load_pose(), frames))[2]["trans_m"], abs=1e-6)
    with pytest.raises(InputError, match="belong together"): Sample(frames, depth=depth)


def test_what_cannot_be_read_is_missing():
    frames, depth, K, _ = clip("pan_left", 1.0, HELD_OUT + 740)
    nowhere = flow_poses(frames, torch.full_like(depth, torch.nan), K)
    assert nowhere[0].isfinite().all() and nowhere[1:].isnan().all()
    scores = CameraReward()([Sample(frames, preset("pan_left", 9), depth=torch.full_like(depth, torch.nan), K=K)])
    assert scores.status == ["invalid"] and scores.values.isnan().all()
    with pytest.raises(InputError, match="one size"): flow_poses(frames, depth[:24], K)
    with pytest.raises(InputError, match="one map"): flow_poses(frames, depth[None], K)


def test_a_smooth_path_keeps_a_preset_and_calms_noise():
    true, noise = preset("arc_left", 9), torch.randn(9, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = true.clone()
    noisy[1:, :3, 3] += 0.1 * noise[1:, :3, 3]
    off = lambda path: (path - true)[1:, :3, 3].norm(dim=-1).mean()
    assert off(smooth_path(true)) < 0.01 and off(smooth_path(noisy)) < 0.7 * off(noisy)
    assert torch.equal(smooth_path(noisy, 0), noisy)
    assert off(smooth_path(true[::2], frames_N=range(0, 9, 2))) < 0.01 and len(smooth_path(true[[0, 4, 6]], frames_N=[0, 4, 6])) == 7
    assert torch.equal(smooth_path(true[:1]), true[:1]) and len(smooth_path(true[:2])) == 2


def test_any_number_of_frames():
    "Even counts, two frames, one frame, all frames as measured: a pose each."
    frames, depth, K, true = clip("pan_right", 1.0, HELD_OUT + 750)
    for count in (1, 2, 6, 9):
        read = flow_poses(frames[:count], depth, K)
        assert read.shape == (count, 4, 4) and torch.equal(read[0], torch.eye(4, dtype=torch.float64)) and read.isfinite().all()
    assert float((to_vector(true) - to_vector(flow_poses(frames, depth, K, degree=0)))[-1, :3].norm().rad2deg()) < 3


def test_following_is_not_biased_by_noise_that_grows_with_motion():
    "Readings whose noise is proportional to the motion: the norm of errors pays for too little motion, the share along the path for the right one."
    from camflow.rewards.camera import FollowReward
    path, g = preset("zoom_in", 9), torch.Generator().manual_seed(0)
    sizes, noise = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2), torch.randn(60, 9, 3, generator=g, dtype=torch.float64)
    best = {}
    for reward in (CameraReward(trans_scale=0.5, gaps=()), FollowReward(across=0.0)):
        means = []
        for size in sizes:
            poses = path.expand(60, 9, 4, 4).clone()
            poses[:, 1:, :3, 3] = size * (poses[:, 1:, :3, 3] + 0.6 * noise[:, 1:])
            means.append(np.mean([reward.one(Sample(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), path), p)[0] for p in poses]))
        best[reward.name] = sizes[int(np.argmax(means))]
    assert best["follow"] == 1.0 and best["camera"] <= 0.8, best

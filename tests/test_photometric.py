"The photometric judge must read zero on the truth, the right pose on known deviations, and fail loudly on what no pose explains."
import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.metrics.photometric import blur, photometric_pose, pose_difference, step
from camflow.metrics.photometric_calibration import SPOILED, calibration, guesses, invent, soften, trial, trials_table
from camflow.world.render import default_K, render_clips
from camflow.world.scene import random_scene

SIZE, TIMES = (48, 80), np.arange(3) / 8
K = default_K(SIZE)


def shot(seed, size=SIZE, scale=1.):
    "A scene, a path with motion in all six directions and its video in 0..1."
    scene, rng = random_scene(seed), np.random.default_rng(seed)
    twist = scale * rng.uniform(-1, 1, 6) * [.05, .08, .04, .3, .2, .3]
    poses = np.stack([step(scene.start, twist * i) for i in range(3)])
    return scene, poses, render_clips(scene, [(poses, default_K(size))], TIMES, size)[0] / 255.


@pytest.mark.parametrize("seed", range(3))
def test_zero_error_on_the_truth(seed):
    scene, poses, video = shot(seed)
    result = photometric_pose(video, scene, TIMES, poses, K)
    assert result.status == ["ok"] * 3 and result.residual.max() < .08 and result.blur.max() <= .5
    for read, truth in zip(result.c2w, poses):
        degrees, metres = pose_difference(read, truth)
        assert degrees < .05 and metres < .008


@pytest.mark.parametrize("seed,width", [(10, 1.), (11, 2.), (12, 3.)])
def test_soft_frames_that_ignore_the_asked_path_are_read_where_they_are(seed, width):
    scene, poses, video = shot(seed)
    asked = np.stack([step(scene.start, np.array([0, -.06, 0, -.2, 0, 0]) * i) for i in range(3)])
    read, status, residual = photometric_pose(blur(video, width) * .9 + .03, scene, TIMES, asked, K)
    assert status == ["ok"] * 3
    for i, (a, b) in enumerate(zip(read, poses)):
        degrees, metres = pose_difference(a, b)
        assert degrees < .3 and metres < .06, i


def test_a_static_video_reads_as_static():
    scene, poses, video = shot(20)
    asked = np.stack([step(scene.start, np.array([0, .15, 0, 0, 0, 0]) * i) for i in range(3)])
    video = render_clips(scene, [(scene.start, K)], TIMES, SIZE)[0] / 255.
    read, status, _ = photometric_pose(video, scene, TIMES, asked, K)
    assert status == ["ok"] * 3 and max(pose_difference(p, scene.start)[0] for p in read) < .15


def test_failures_are_typed_with_reasons_and_nan():
    scene, poses, video = shot(30)
    noise = np.random.default_rng(0).random(video.shape)
    result = photometric_pose(noise, scene, TIMES, poses, K)
    assert result.status == ["failed"] * 3 and np.isnan(result.c2w).all() and all("no pose explains" in r for r in result.reasons)
    broken = video.copy()
    broken[0], broken[1, 0, 3, 3] = .5, np.nan
    result = photometric_pose(broken, scene, TIMES, poses, K)
    assert result.status == ["failed", "failed", "ok"] and "flat" in result.reasons[0] and "NaN" in result.reasons[1]
    other = photometric_pose(shot(31)[2], scene, TIMES, poses, K)
    assert other.status == ["failed"] * 3 and (other.residual > .5).all()


def test_larger_frames_are_scaled_down_with_their_intrinsics():
    scene, poses, video = shot(40, (96, 160))
    read, status, _ = photometric_pose(torch.from_numpy(video).float(), scene, TIMES, poses, default_K((96, 160)))
    assert status == ["ok"] * 3 and max(pose_difference(a, b)[0] for a, b in zip(read, poses)) < .15


def test_cameras_and_frames_are_taken_as_they_are():
    pytest.importorskip("camflow.media.frames")
    from camflow.geometry.camera import Cameras
    from camflow.media.frames import Frames
    scene, poses, video = shot(41)
    frames = Frames(torch.from_numpy((video * 255).round().astype(np.uint8)), "byte", fps=8)
    assert photometric_pose(frames, scene, TIMES, Cameras(poses, K, SIZE)).status == ["ok"] * 3


def test_wrong_input():
    scene, poses, video = shot(50)
    with pytest.raises(InputError, match="one time per frame"): photometric_pose(video[:2], scene, TIMES, poses, K)
    with pytest.raises(InputError, match="0..1"): photometric_pose(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), scene, TIMES, poses, K)
    with pytest.raises(InputError, match="pass K"): photometric_pose(video, scene, TIMES, poses)


def test_what_the_source_never_showed_does_not_count():
    t = invent(trial(0, 6., .4))
    told, untold = t.read((0, 4, 8)), t.read((0, 4, 8), seen=False)
    assert told.status == ["ok"] * 3 and .4 < told.cover[-1] < .9 and untold.cover.min() > .999
    assert told.residual[-1] < untold.residual[-1] and told.residual[-1] < .6
    degrees, metres = pose_difference(told.c2w[-1], t.shown[-1])
    assert degrees < 1.5 and metres < .2


def test_a_source_that_looks_elsewhere_is_a_typed_failure():
    t = trial(1)
    turned = np.stack([step(p, np.array([0, 2.6, 0, 0, 0, 0])) for p in t.source])
    t.source = turned
    result = t.read((0, 4, 8))
    assert result.status == ["failed"] * 3 and all("showed only" in r for r in result.reasons), result.reasons


def test_the_first_guess_does_not_decide():
    t = soften(invent(trial(2, 6., .4)))
    read = {name: t.read((0, 4, 8), init=path) for name, path in guesses(t).items() if name != "shown"}
    ok = [r.c2w[-1] for r in read.values() if r.status[-1] == "ok"]
    assert len(ok) == 3 and max(pose_difference(a, ok[0])[0] for a in ok) < .5


def test_standard_errors_grow_with_blur_and_are_zero_for_nobody():
    sharp, soft = trial(3).read((0, 4, 8)), soften(trial(3)).read((0, 4, 8))
    assert (sharp.error > 0).all() and (soft.error[-1] > sharp.error[-1]).all() and sharp.error.shape == (3, 6)


def test_frames_on_their_own():
    scene, poses, video = shot(60)
    jump = video[[0, 2, 1]]
    read, status, _ = photometric_pose(jump, scene, TIMES[[0, 2, 1]], poses[[0, 2, 1]], K, bend=np.full(6, np.inf))
    assert status == ["ok"] * 3 and max(pose_difference(a, b)[0] for a, b in zip(read, poses[[0, 2, 1]])) < .05


def test_calibration_table():
    table = calibration(("sharp", "soft and invented"), ((4., .2),), count=1)
    assert len(table) == 2 and table.failed.sum() == 0 and table.rot_deg_p90[0] < .5 and table.rot_deg_p90[1] < 4 and table.trans_m_p90[0] < .1
    assert set(SPOILED) >= {"sharp", "soft", "invented", "blocks and noise"}
    empty = trials_table("sharp", 1, judged=())
    assert len(empty) == 0

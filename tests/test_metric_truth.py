"""Every metric that needs no weights, on the world: zero error on the truth, the exact value on a known distortion, never better with more of it.

Each test carries its control: a number that must *not* stay the same, or a distortion that must *not* be seen.
"""
from functools import cache, partial

import numpy as np
import pytest
import torch

from camflow.geometry.camera import Cameras
from camflow.geometry.rigid import geodesic
from camflow.geometry.trajectory import preset, rescale
from camflow.metrics import distortions as wrong
from camflow.metrics.consistency import Consistency
from camflow.metrics.ego_motion import EgoMotion
from camflow.metrics.frechet import frechet_distance, kernel_distance, real_floor
from camflow.metrics.matching import SourceMatches
from camflow.metrics.perceptual import psnr, ssim
from camflow.metrics.photometric import photometric_pose
from camflow.metrics.pose import pose_error
from camflow.metrics.vbench import VBenchMetric, frame_differences, temporal_flickering
from camflow.rewards.smoothness import flow_statistics
from camflow.world.render import default_K, render, render_clips
from camflow.world.scene import random_scene

SIZE, T = (144, 256), 9


@cache
def world(kind="arc_right", motion=False, seed=1, scale=0.4):
    "(clip, cameras, depth) of a room."
    scene = random_scene(seed, motion=motion, detail=2.0)
    path = torch.eye(4, dtype=torch.float64).repeat(T, 1, 1)
    if kind == "slide": path[:, 0, 3] = torch.linspace(0, 0.5, T)            # to the right, without turning
    elif kind != "still": path = rescale(preset(kind, T), translation=scale, rotation=scale)
    cameras = Cameras(scene.start @ path.numpy(), default_K(SIZE), SIZE)
    out = render(scene, cameras, np.arange(T) / 8, want=("image", "depth"), size=SIZE)
    return out.frames.byte().data, cameras, out.depth


def numbers(results): return {r.metric.split(".")[1]: r.value for r in results}


def never_better(values, slack=0.0):
    "Rises from level to level, and the last is clearly above the first."
    assert all(b >= a - slack for a, b in zip(values, values[1:])), values
    assert values[-1] > values[0] + max(slack, 1e-9), values


# --- the picture against the true picture

@pytest.mark.parametrize("decibels", [12, 20, 31.7, 45])
def test_noise_of_a_given_psnr_reads_that_psnr(decibels):
    clip = world()[0]
    noisy = wrong.noise(clip, decibels)
    assert psnr(noisy, clip, "byte") == pytest.approx(decibels, abs=1e-3)
    assert psnr(noisy, clip, "byte", per_frame=True).std() < 1e-3
    assert psnr(wrong.noise(clip, decibels + 1), clip, "byte") != pytest.approx(decibels, abs=0.5)
    assert not torch.equal(noisy, wrong.noise(clip, decibels, seed=1))


def test_the_truth_is_equal_to_itself():
    clip = world()[0]
    assert psnr(clip, clip, "byte") == np.inf and ssim(clip, clip, "byte") == pytest.approx(1, abs=1e-12)
    assert psnr(clip, wrong.blur(clip, 0.7), "byte") < 50 and ssim(clip, wrong.blur(clip, 0.7), "byte") < 1 - 1e-3


@pytest.mark.parametrize("name", wrong.CLIP_DISTORTIONS)
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_psnr_and_ssim_fall_with_every_distortion(name, measure):
    clip = world()[0][..., :72, :128]
    make, levels = wrong.CLIP_DISTORTIONS[name]
    values = [measure(clip, make(clip, level), "byte", per_frame=True).clamp(max=60).mean().item() for level in levels]
    never_better([-v for v in values])
    assert values[0] == pytest.approx(60 if measure is psnr else 1)


# --- time

@pytest.mark.parametrize("amplitude", [0, 1, 7, 40, 200])
def test_flicker_reads_its_amplitude(amplitude):
    still = wrong.freeze(world()[0])
    made = wrong.flicker(still, amplitude)
    assert (frame_differences(made) == amplitude).all()
    assert VBenchMetric()(made).value == (255 - amplitude) / 255
    assert temporal_flickering(wrong.flicker(still, amplitude + 1)) != (255 - amplitude) / 255


def test_static_output_and_lost_frames_are_counted_exactly():
    clip = world(motion=True)[0]
    assert (frame_differences(clip) > 0.5).all()                                        # the control: the clip itself moves
    assert (frame_differences(wrong.freeze(clip, 4)) == 0).all() and temporal_flickering(wrong.freeze(clip)) == 1
    for every in (2, 3, 4):
        same = frame_differences(wrong.drop(clip, every)) == 0
        assert same.nonzero()[0].tolist() == list(range(every - 2, T - 1, every))       # the steps into the lost frames


@pytest.mark.parametrize("name", ["flicker", "noise"])
def test_flickering_falls_with_flicker_and_noise(name):
    clip = world()[0]
    make, levels = wrong.CLIP_DISTORTIONS[name]
    never_better([-temporal_flickering(make(clip, level)) for level in levels])
    assert temporal_flickering(wrong.blur(clip, 3)) > temporal_flickering(clip)         # blur is no flicker


def test_smoothness_statistics():
    clip = world()[0]
    usual, still = flow_statistics(clip), flow_statistics(wrong.freeze(clip))
    assert still["motion"] < 1e-3 < 1 < usual["motion"] and still["flicker"] == 0
    never_better([flow_statistics(wrong.flicker(clip, a))["flicker"] for a in (0, 4, 12, 32)])
    never_better([flow_statistics(wrong.drop(clip, every))["jerk"] for every in (0, 4, 2)])
    assert flow_statistics(wrong.shift(clip, 0))["jerk"] == usual["jerk"]


# --- the camera path against the asked path

@pytest.mark.parametrize("degrees", [0.1, 1, 5, 60])
def test_rotation_noise_reads_its_angle(degrees):
    path = world()[1]
    found = pose_error(path, wrong.turn(path, degrees))
    assert found.rot_mean_deg == pytest.approx(degrees, rel=1e-9) and found.trans_mean == pytest.approx(0, abs=1e-12)
    assert found.rot_sum_rad == pytest.approx((T - 1) * np.radians(degrees), rel=1e-9)
    assert pose_error(path, path).rot_mean_deg < 1e-6


@pytest.mark.parametrize("distance", [0.01, 0.2])
def test_position_noise_reads_its_distance(distance):
    path = world()[1]
    found = pose_error(path, wrong.displace(path, distance))
    assert found.trans_mean == pytest.approx(distance, rel=1e-9) and found.rot_mean_deg < 1e-6


@pytest.mark.parametrize("factor", [0.4, 1.5])
def test_the_scale_of_a_path(factor):
    path = world()[1]
    longer = wrong.stretch(path, factor)
    assert pose_error(path, longer, "ls").trans_mean < 1e-9 and pose_error(path, longer, "ls").scale == pytest.approx(1 / factor)
    assert pose_error(path, longer, "max").trans_mean < 1e-9
    centres = path.relative().c2w[1:, :3, 3].norm(dim=1).mean().item()
    assert pose_error(path, longer, "metric").trans_mean == pytest.approx(abs(factor - 1) * centres, rel=1e-9)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_path_that_comes_too_late(frames):
    path = world("pan_right")[1]
    at = (torch.arange(T) - frames).clamp(0)
    asked = geodesic(path.c2w[:, :3, :3], path.c2w[at, :3, :3]).rad2deg()[1:].mean().item()
    found = pose_error(path, wrong.late(path, -frames))
    assert asked > 0.5 and found.rot_mean_deg == pytest.approx(asked, rel=1e-6)


def test_swapped_conventions():
    pan, slide = world("pan_right")[1], world("slide")[1]
    turned = geodesic(pan.c2w[:1, :3, :3], pan.c2w[:, :3, :3]).rad2deg()
    for how in ("inverse", "transposed"):                     # a turn the wrong way round is twice as far off
        assert pose_error(pan, wrong.swap(pan, how)).per_frame_rot == pytest.approx((2 * turned).tolist(), abs=1e-6)
    for how in ("inverse", "opengl"): assert pose_error(slide, wrong.swap(slide, how)).trans_dir_deg == pytest.approx(0 if how == "opengl" else 180, abs=1e-4)
    assert pose_error(slide, wrong.swap(slide, "transposed")).trans_dir_deg < 1e-4   # no rotation, nothing to transpose


@pytest.mark.parametrize("name", wrong.PATH_DISTORTIONS)
def test_pose_error_rises_with_every_path_distortion(name):
    path = world()[1]
    make, levels = wrong.PATH_DISTORTIONS[name]
    found = [pose_error(path, make(path, level)) for level in levels]
    never_better([e.rot_mean_deg + 10 * e.trans_mean for e in found])
    assert found[0].rot_mean_deg < 1e-6 and found[0].trans_mean < 1e-9


def test_photometric_pose_reads_the_camera_that_made_the_clip():
    scene, times = random_scene(1_000_003, detail=0.5), np.arange(5) / 8
    cameras = Cameras(scene.start @ rescale(preset("arc_right", 5), translation=0.4, rotation=0.4).numpy(), default_K((48, 80)), (48, 80))
    clip = torch.from_numpy(render_clips(scene, [cameras], times)[0])                   # anti-aliased, as the metric renders
    error = lambda made: pose_error(cameras, torch.from_numpy(photometric_pose(made.float() / 255, scene, times, cameras).c2w))
    assert error(clip).rot_mean_deg < 0.05 and error(clip).trans_mean < 0.01
    for made in (wrong.noise(clip, 30), wrong.blur(clip, 1.0)): assert error(made).rot_mean_deg < 0.2 and error(made).trans_mean < 0.03
    stood = pose_error(cameras, cameras.c2w[:1].repeat(5, 1, 1))                        # static output: off by the whole asked path
    found = error(wrong.freeze(clip))
    assert stood.rot_mean_deg > 3 and found.rot_mean_deg == pytest.approx(stood.rot_mean_deg, rel=0.2)
    assert found.trans_mean == pytest.approx(stood.trans_mean, rel=0.3)


# --- source and result

def test_matched_pixels_of_a_clip_with_itself_a_shifted_self_and_another_clip():
    clip, other = world()[0], world(seed=2)[0]
    metric = SourceMatches(frames=3)
    match = lambda a, b: {r.metric.split(".")[1]: r for r in metric(video=a, source=b)}
    itself = match(clip, clip)
    assert min(itself["density"].details["per_frame"]) > 0.1
    never_better([-match(clip, wrong.shift(clip, n))["density"].value for n in (0, 2, 4)])
    never_better([-match(clip, wrong.shift(clip, n))["thousands"].value for n in (0, 2, 4)])
    strangers = match(clip, other)
    assert strangers["density"].value < 0.05 * itself["density"].value and strangers["thousands"].value < 0.1 * itself["thousands"].value
    grey = match(torch.full_like(clip, 128), clip)
    assert grey["thousands"].value == 0 and grey["density"].value == 0


@pytest.mark.parametrize("name", ["blur", "noise", "jpeg"])
def test_matched_pixels_fall_as_the_picture_is_damaged(name):
    clip = world()[0][:2]
    make, levels = wrong.CLIP_DISTORTIONS[name]
    never_better([-SourceMatches(frames=2)(video=make(clip, level), source=clip)[1].value for level in levels], slack=0.01)


# --- the scene behind the pictures

def consistency(cameras=None, kind="arc_right", motion=False, depth=None, clip=None, seed=1):
    video, true, _ = world(kind, motion, seed)
    return numbers(Consistency(depth=depth)(video=video if clip is None else clip, cameras=true if cameras is None else cameras))


@pytest.mark.parametrize("kind", ["arc_right", "pan_right", "translate_up", "zoom_in", "still"])
def test_the_true_camera_is_consistent_with_its_clip(kind):
    found = consistency(kind=kind)
    limit = 2 if kind == "zoom_in" else 1                           # what comes nearer changes its size, which costs precision
    assert found["asked_px"] < 0.3 * limit and found["reprojection_px"] < 0.4 * limit, found
    assert found["asked_outliers"] < 0.1 * limit and found["reprojection_outliers"] < 0.1 * limit, found
    off = consistency(wrong.turn(world(kind)[1], 2), kind)          # the control: another path is not
    assert off["asked_px"] > 1 and off["reprojection_outliers"] > 0.9, off
    assert off["best_px"] == found["best_px"]                       # which does not concern the best geometry


@pytest.mark.parametrize("name", ["turn", "late"])
def test_consistency_falls_as_the_asked_path_is_wrong(name):
    make, levels = wrong.PATH_DISTORTIONS[name]
    found = [consistency(make(world()[1], level)) for level in levels]
    for number in ("asked_px", "reprojection_px"): never_better([f[number] for f in found], slack=0.02)


def test_a_rotation_of_one_degree_moves_the_tracks_by_as_many_pixels():
    cameras = world("still")[1]
    c2w = cameras.c2w.clone()
    yaw = rescale(preset("pan_right", 2), rotation=1.0)[1]
    degrees = geodesic(torch.eye(3, dtype=torch.float64), yaw[:3, :3]).rad2deg().item()
    c2w[-1] = c2w[-1] @ rescale(preset("pan_right", 2), rotation=1 / degrees)[1]
    expected = cameras.K[0, 0, 0].item() * np.radians(1)             # in the middle of the picture; more towards the sides
    found = consistency(Cameras(c2w, cameras.K, SIZE), "still")["asked_px"]
    assert expected < found < 1.3 * expected and consistency(kind="still")["asked_px"] < 0.01


def test_only_depth_sees_the_length_of_the_path():
    _, cameras, depth = world()
    known = lambda video, path: depth
    makes = [wrong.stretch(cameras, f) for f in (1, 1.1, 1.5, 2.5)]
    never_better([consistency(path, depth=known)["reprojection_px"] for path in makes])
    without = [consistency(path) for path in makes]
    assert max(f["asked_px"] for f in without) - min(f["asked_px"] for f in without) < 1e-6
    assert max(f["reprojection_px"] for f in without) < 0.4


def test_a_swapped_convention_is_seen():
    true, off = consistency(kind="slide"), consistency(wrong.swap(world("slide")[1], "inverse"), "slide")
    assert true["reprojection_outliers"] < 0.1 and off["reprojection_outliers"] > 0.5
    assert off["asked_px"] == pytest.approx(true["asked_px"], abs=1e-6)        # a mirrored move has the same epipolar lines
    assert consistency(wrong.swap(world("pan_right")[1], "inverse"), "pan_right")["asked_px"] > 10
    assert consistency(wrong.swap(world("translate_up")[1], "opengl"), "translate_up")["reprojection_outliers"] > 0.5


def test_movers_are_outliers_and_a_bent_scene_is_not_rigid():
    clip, cameras, _ = world()
    quiet, lively = consistency(), consistency(motion=True)
    assert lively["reprojection_px"] < 0.4 and lively["reprojection_outliers"] > quiet["reprojection_outliers"] + 0.05
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE[0]), torch.linspace(-1, 1, SIZE[1]), indexing="ij")
    def bent(amount):
        "Walls that breathe: rows slide to and fro, more in later frames."
        out = []
        for t, frame in enumerate(clip):
            grid = torch.stack([x + amount * t / T * torch.sin(9 * y), y + amount * t / T * torch.sin(7 * x)], 2)
            out.append(torch.nn.functional.grid_sample(frame[None].float(), grid[None], padding_mode="border", align_corners=True)[0].round().byte())
        return torch.stack(out)
    found = [consistency(clip=bent(a)) for a in (0, 0.005, 0.012, 0.025)]
    for number in ("best_px", "asked_px", "reprojection_px"): never_better([f[number] for f in found])


# --- what moves by itself

@pytest.mark.parametrize("kind", ["still", "pan_right", "translate_up", "arc_right"])
def test_ego_motion_is_zero_for_a_frozen_room_and_finds_movers(kind):
    frozen, lively = (EgoMotion()(video=world(kind, motion)[0]) for motion in (False, True))
    assert frozen[0].value == 0 and frozen[1].value < 0.8 and frozen[2].value < 0.01
    assert lively[0].value == 1 and lively[1].value > 1 and lively[2].value > 0.01
    assert frozen[0].details["whole_flow_dynamic"] == (kind in ("pan_right", "arc_right"))   # the control: the whole flow says otherwise


def test_ego_motion_is_not_moved_by_noise_nor_by_static_output():
    clip = world("pan_right")[0]
    for made in (wrong.noise(clip, 35), wrong.blur(clip, 1), wrong.freeze(world("pan_right", True)[0])): assert EgoMotion()(video=made)[0].value == 0
    assert EgoMotion()(video=wrong.noise(world("pan_right", True)[0], 35))[0].value == 1


# --- sets of clips

@cache
def features(shift=0.0, blur=0.0, first=0):
    "Simple features of 24 rooms: mean, spread and gradient of each colour."
    rows = []
    for seed in range(first, first + 24):
        scene = random_scene(seed, detail=1.0)
        clip = render(scene, (scene.start[None], default_K((36, 64))), [0.0], want=("image",), size=(36, 64)).frames.byte().data
        x = wrong.blur(clip, blur)[0].double() / 255
        rows.append(torch.cat([x.mean((1, 2)), x.std((1, 2)), (x[:, 1:] - x[:, :-1]).abs().mean((1, 2))]).numpy() + shift)
    return np.stack(rows)


def test_distances_between_sets_of_features():
    real = features()
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features(shift=0.1), real) == pytest.approx(real.shape[1] * 0.01, rel=1e-6)          # only the mean moved
    wider = real.mean(0) + 1.5 * (real - real.mean(0))
    assert frechet_distance(wider, real) == pytest.approx(0.25 * np.trace(np.cov(real.T)), rel=1e-6)             # only the spread grew
    for distance in (frechet_distance, partial(kernel_distance)):
        never_better([distance(features(blur=s), real) for s in (0, 0.7, 1.5, 3)])
    floor = real_floor(np.concatenate([real, features(first=24)]), 24)
    assert 0 < floor["mean"] < frechet_distance(features(blur=3), real)                                          # real against real is not zero

"The camera's path from DIS flow on clips whose truth is known, one per way in which reconstructions fail."
from functools import cache

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.geometry.align import umeyama
from camflow.gflow.find_path import find_path
from camflow.gflow.masks import jaccard, threshold
from camflow.gflow.pose import Matches, Path, bundle, pair_pose, refine
from camflow.gflow.priors import gather_priors
from camflow.gflow.truth import noisy_depth, truth_clip

# metres of the centres after a similarity (without one where they are on a point), and overlap of the mask; a path of a third of a metre
BOUNDS = {"plain": (0.003, 0.85), "static": (0.003, None), "large": (0.04, 0.75), "portrait": (0.003, 0.65), "odd": (0.003, 0.85), "crossing": (0.003, 0.8),
          "leaving": (0.003, None), "thin": (0.003, 0.5), "flicker": (0.01, 0.75)}


@cache
def clip_of(variant, frames=8): return truth_clip(variant, frames=frames)


def gathered(variant, noisy=False, K=None, frames=8):
    clip = clip_of(variant, frames)
    return clip, gather_priors(clip.frames, K=K, depth=noisy_depth(clip.depth) if noisy else "truth", flow="dis", truth=clip)


def centre_error(path, clip):
    true, found = clip.cameras.c2w[:, :3, 3], torch.from_numpy(path.c2w_T44[:, :3, 3])
    R, t, s = umeyama(true, found)
    return float((s * found @ R.T + t - true).square().sum(1).mean().sqrt())


def pose_error(path, clip):
    "Largest (metres, degrees) of all frames, as they are."
    off = np.linalg.inv(np.linalg.inv(clip.cameras.c2w[0].numpy()) @ clip.cameras.c2w.numpy()) @ path.c2w_T44
    turn = np.degrees(np.arccos(np.clip((np.trace(off[:, :3, :3], axis1=1, axis2=2) - 1) / 2, -1, 1)))
    return np.linalg.norm(off[:, :3, 3], axis=1).max(), turn.max()


@pytest.mark.parametrize("variant", BOUNDS)
def test_variants(variant):
    clip, priors = gathered(variant)
    path = find_path(priors)
    metres, overlap = BOUNDS[variant]
    assert path.status == ["ok"] * 8
    assert centre_error(path, clip) < metres
    if overlap: assert jaccard(path.moving_THW, clip.moving.numpy()) > overlap
    if variant == "static": assert path.moving_THW.mean() < 0.01


@pytest.mark.parametrize("variant, metres, degrees", [("turn", 0.01, 0.15), ("still", 0.002, 0.03)])
def test_a_camera_that_only_turns_or_stands_still(variant, metres, degrees):
    clip, priors = gathered(variant)
    path = find_path(priors)
    off, turn = pose_error(path, clip)
    assert path.status == ["ok"] * 8 and off < metres and turn < degrees
    assert jaccard(path.moving_THW, clip.moving.numpy()) > 0.8


def test_no_texture_is_typed():
    clip, priors = gathered("plain_walls")
    path = find_path(priors)
    assert np.isfinite(path.c2w_T44).all()
    assert all(status in ("few matches", "no consensus") for status in path.status[1:]) or pose_error(path, clip)[0] < 0.05


def test_noisy_depth_and_its_factors():
    clip, priors = gathered("plain", noisy=True, frames=12)
    path = find_path(priors)
    factor = (clip.depth.data / priors.depth.data).flatten(1).median(1).values.numpy()
    assert centre_error(path, clip) < 0.005 and jaccard(path.moving_THW, clip.moving.numpy()) > 0.85
    assert np.abs(path.scale_T / (factor / factor[0]) - 1).max() < 0.01


def test_windows():
    clip, priors = gathered("plain", noisy=True)
    whole, windowed, none = find_path(priors), find_path(priors, window=5), find_path(priors, rounds=0)
    assert centre_error(windowed, clip) < 0.006 and centre_error(whole, clip) < 0.006 and centre_error(none, clip) > centre_error(windowed, clip)
    with pytest.raises(InputError, match="window"): find_path(priors, window=5, focal=True)
    for few in (0, 2):                                       # nothing would be free in them, and nothing was said
        with pytest.raises(InputError, match=f"window={few}"): find_path(priors, window=few)


def test_the_focal_length_is_found():
    clip = clip_of("plain")
    true = clip.cameras.K[0].numpy()
    wrong = true * np.array([[1.1, 1, 1], [1, 1.1, 1], [1, 1, 1]])
    _, priors = gathered("plain", K=wrong)
    found = find_path(priors, focal=True)
    assert abs(found.K_33[0, 0] / true[0, 0] - 1) < 0.03 and found.K_33[0, 0] == found.K_33[1, 1]
    assert centre_error(found, clip) < 0.005
    assert np.array_equal(find_path(priors, rounds=0).K_33, wrong)


def test_two_identical_frames_and_one():
    clip = clip_of("plain")
    path = find_path(gather_priors(clip.frames[[0, 0]], K=clip.cameras.K[0].numpy(), depth=clip.depth[[0, 0]]))
    assert path.status == ["ok", "ok"] and np.abs(path.c2w_T44 - np.eye(4)).max() < 1e-3 and not path.moving_THW.any()
    assert find_path(gather_priors(clip.frames[:1], K=clip.cameras.K[0].numpy(), depth=clip.depth[:1])).status == ["ok"]


def test_unknown_depth_is_left_out():
    clip, priors = gathered("plain")
    priors.depth.data[:, :, :, :120] = torch.nan
    path = find_path(priors)
    assert path.status == ["ok"] * 8 and centre_error(path, clip) < 0.02 and not np.isnan(path.odds_THW).any()


def test_few_matches_and_no_consensus():
    rng, K = np.random.default_rng(0), np.array([[200., 0, 120], [0, 200, 68], [0, 0, 1]])
    place = lambda n: rng.uniform((0, 0), (240, 136), (n, 2))
    lonely, random = (Matches(0, 1, place(n), np.full(n, 3.), place(n), np.full(n, 3.), np.ones(n)) for n in (10, 600))
    assert pair_pose(lonely, K, (136, 240)).status == "few matches" and pair_pose(random, K, (136, 240)).status == "no consensus"
    start = Path(np.tile(np.eye(4), (2, 1, 1)), K, np.ones(2), ["ok", "few matches"])
    empty = Matches(0, 1, *(np.zeros(s) for s in ((0, 2), 0, (0, 2), 0, 0)))
    assert bundle(start, [empty]) is start and refine(start, []) is start


def test_a_threshold_is_not_raised_by_movers():
    residual = np.full((40, 60), 12.)
    residual[:, :20] = 0.3
    assert threshold(residual) == pytest.approx(1.2) and threshold(residual, residual < 1) == pytest.approx(1.2)
    assert threshold(np.full((40, 60), 12.)) == pytest.approx(48.) and threshold(np.full((4, 4), np.nan)) == 1.

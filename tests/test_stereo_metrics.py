"Stereo metrics: the published numbers, their denominators, and known distortions of exact clips."
import json
import math
from pathlib import Path

import pytest
import torch

from camflow.files import InputError
from camflow.metrics.stereo import (aggregate, depth_consistency, edges, flow_errors, region_errors, seams, stereo_errors, stereo_report)
from camflow.world.clips import HELD_OUT
from camflow.world.stereo_clips import stereo_clip
from tests.parity import stereo_metrics as parity

torch.set_num_threads(1)
GOLDENS = Path(__file__).parent / "goldens" / "stereo"


@pytest.fixture(scope="module")
def clip(): return stereo_clip(HELD_OUT + 2, "tiny")


def draw(*shape, seed=0): return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_published_numbers():
    results = parity.check(GOLDENS)
    assert set(results) == {"metrics", "evaluation_aggregate"} and all(result[3] for result in results.values()), results


@pytest.mark.parametrize("name", ["metrics", "evaluation_aggregate"])
def test_a_changed_input_is_noticed(name, tmp_path):
    table = json.loads((GOLDENS / f"{name}.json").read_text())
    case = table["cases"][0]["input"]
    (case if "pred" in case else case["sequences"][1])["pred"][0][0][0][0] += 0.01
    (tmp_path / f"{name}.json").write_text(json.dumps(table))
    assert parity.check(tmp_path)[name][3] is False


def test_valid_and_upstream_differ_by_the_number_of_perfect_pixels():
    gt = draw(3, 1, 5, 7) * 20
    pred, valid = gt.clone(), draw(3, 1, 5, 7, seed=1) > .3
    pred[:, :, 0] += draw(3, 1, 7, seed=2) * 4 + .01
    wrong, all_valid = int(((pred != gt) & valid).sum()), int(valid.sum())
    ours, theirs = stereo_errors(pred, gt, valid), stereo_errors(pred, gt, valid, "upstream")
    for name in ("mean", "bad_0.5px", "bad_1px", "bad_2px", "bad_3px"):
        assert abs(ours[f"epe_{name}"] - theirs[f"epe_{name}"] * wrong / all_valid) < 1e-4
    assert ours["epe_mean"] < theirs["epe_mean"]


def test_no_valid_pixel_is_nan_not_zero():
    gt = draw(2, 1, 4, 4)
    numbers = stereo_errors(gt, gt, torch.zeros(2, 1, 4, 4))
    assert all(math.isnan(value) for value in numbers.values())
    assert math.isnan(stereo_errors(gt[:1], gt[:1])["temp_epe_mean"]) and stereo_errors(gt[:1], gt[:1])["epe_mean"] == 0


def test_missing_answers_are_bad_and_counted():
    gt = draw(2, 1, 4, 8) + 5
    pred = gt.clone()
    pred[..., :2] = math.nan
    numbers = stereo_errors(pred, gt)
    assert numbers["missing"] == 25 and numbers["epe_bad_0.5px"] == 25 and numbers["epe_bad_3px"] == 25 and numbers["epe_mean"] == 0
    assert numbers["temp_epe_bad_3px"] == 25
    assert all(math.isnan(v) for k, v in stereo_errors(gt * math.nan, gt).items() if k.endswith("mean"))


def test_the_truth_is_free_of_errors_and_a_bias_does_not_flicker(clip):
    masks = {"occluded": clip.occlusion, "moving": clip.moving, "textureless": clip.textureless}
    right = stereo_report(clip.disparity, clip.disparity, clip.valid, clip.flow, clip.flow_occlusion, masks, period=2)
    assert all(v == 0 or math.isnan(v) for k, v in right.items() if k.endswith(("epe_mean", "px", "missing")))
    biased = stereo_report(clip.disparity + 1.5, clip.disparity, clip.valid, clip.flow, clip.flow_occlusion, masks)
    assert abs(biased["epe_mean"] - 1.5) < 1e-4 and biased["epe_bad_1px"] == 100 and biased["epe_bad_2px"] == 0
    assert max(biased["temp_epe_mean"], biased["flow_tepe_mean"], biased["tepe_abs_mean"]) < 1e-4
    assert abs(biased["moving.epe_mean"] - 1.5) < 1e-4


def test_flicker_of_a_known_size_is_read(clip):
    flicker = clip.disparity + .5 * (-1.) ** torch.arange(len(clip)).view(-1, 1, 1, 1)
    assert abs(stereo_errors(flicker, clip.disparity)["temp_epe_mean"] - 1) < 1e-4
    change, where = flow_errors(flicker, clip.disparity, clip.valid, clip.flow, clip.flow_occlusion)
    assert torch.allclose(change[where], torch.ones(int(where.sum())), atol=1e-4)


def test_an_error_that_rides_on_a_surface_is_seen_by_tepe_only():
    "A wrong stripe moves with the picture by one pixel a frame: per pixel it flickers, along the motion it does not."
    gt, x = torch.full((4, 1, 8, 32), 10.), torch.arange(32.)
    pred = torch.stack([gt[0] + 2 * torch.sin((x - t) / 2) for t in range(4)])
    flow, none = torch.zeros(3, 2, 8, 32), torch.zeros(3, 1, 8, 32, dtype=torch.bool)
    flow[:, 0] = 1
    change, where = flow_errors(pred, gt, None, flow, none)
    assert float(change[where].max()) < 1e-4 and not where[..., -1].any() and where[..., :-1].all()
    assert stereo_errors(pred, gt)["temp_epe_mean"] > .5


def test_unknown_flow_and_invalid_landing_are_left_out(clip):
    valid = clip.valid.clone()
    valid[:, :, :, 60:70] = False
    flow = clip.flow.clone()
    flow[:, :, :5] = math.nan
    _, where = flow_errors(clip.disparity, clip.disparity, valid, flow, clip.flow_occlusion)
    assert not where[:, :, :5].any() and not where[..., 60:70].any() and where.any()
    cut = stereo_clip(HELD_OUT, "tiny", hard="cut")
    assert not flow_errors(cut.disparity, cut.disparity, cut.valid, cut.flow, cut.flow_occlusion)[1][2].any()


def test_regions(clip):
    pred = clip.disparity + 3 * clip.occlusion
    numbers = region_errors(pred, clip.disparity, clip.valid, {"occluded": clip.occlusion, "seen": ~clip.occlusion, "none": clip.occlusion & ~clip.occlusion})
    assert abs(numbers["occluded.epe_mean"] - 3) < 1e-4 and numbers["seen.epe_mean"] == 0 and numbers["occluded.epe_bad_1px"] == 100
    assert abs(numbers["occluded.share"] - 100 * float(clip.occlusion.float().mean())) < 1e-3
    assert math.isnan(numbers["none.epe_mean"]) and numbers["none.share"] == 0
    step = torch.full((1, 1, 9, 20), 5.)
    step[..., 10:] = 9
    assert edges(step)[0, 0, 0].nonzero().ravel().tolist() == list(range(7, 13))


@pytest.mark.parametrize("period", [4, 5, 8])
def test_seams_are_found_at_their_period(period):
    g = torch.Generator().manual_seed(period)
    gt = torch.full((6 * period + 3, 1, 16, 40), 12.)
    noise = .1 * torch.randn(gt.shape, generator=g)
    swim = .4 * (torch.arange(len(gt)) % period / period).view(-1, 1, 1, 1)
    quiet, loud = seams(gt + noise, gt, None, period), seams(gt + noise + swim, gt, None, period)
    assert .5 < quiet["seam_energy"] < 1.6 and loud["seam_energy"] > 2 * quiet["seam_energy"] and loud["seam_step"] > 1.5 > quiet["seam_step"] > .6
    assert seams(gt, gt, None, period) == {"seam_energy": 1., "seam_step": 1.}
    assert all(math.isnan(v) for v in seams(gt[:period], gt[:period], None, period).values())


def test_sets_are_weighted_by_frames_and_resampled_by_sequence():
    whole = aggregate([{"epe_mean": 1., "x": math.nan}, {"epe_mean": 3.}, {"epe_mean": 2., "x": 7.}], [10, 10, 20])
    assert whole["epe_mean"].estimate == 2 and 1 <= whole["epe_mean"].low < 2 < whole["epe_mean"].high <= 3 and whole["epe_mean"].missing == 0
    assert whole["x"].estimate == 7 and whole["x"].missing == 2 and whole["x"].n == 1
    with pytest.raises(InputError, match="one per sequence"): aggregate([{}], [1, 2])


def test_depth_numbers_know_the_truth(clip):
    z = clip.depth
    same = depth_consistency(z, z, clip.flow, clip.flow_occlusion, clip.left)
    assert same["rtc"] == same["rtc_truth"] and same["opw"] == same["opw_truth"] and same["tcc"] > .9999
    worse = depth_consistency(z * (1 + .03 * (-1.) ** torch.arange(len(z)).view(-1, 1, 1, 1)), z, clip.flow, clip.flow_occlusion, clip.left)
    assert worse["rtc"] < same["rtc"] - 20 and worse["opw"] > 2 * same["opw"] and worse["tcc"] < .9


def test_errors_name_the_remedy(clip):
    with pytest.raises(InputError, match="one size"): stereo_errors(clip.disparity, clip.disparity[:, :, 1:])
    with pytest.raises(InputError, match="valid or upstream"): stereo_errors(clip.disparity, clip.disparity, denominator="all")
    with pytest.raises(InputError, match="validity per pixel"): stereo_errors(clip.disparity, clip.disparity, clip.valid[:, :, 1:])
    with pytest.raises(InputError, match="T-1"): flow_errors(clip.disparity, clip.disparity, None, clip.flow[1:], clip.flow_occlusion)

"Pose errors on truths and on known distortions; typed failures; statistics and pixel metrics."
import math

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.geometry import trajectory as tr
from camflow.geometry.camera import Cameras, focal_K
from camflow.geometry.rigid import se3_exp, so3_exp
from camflow.metrics.interface import Result, measure
from camflow.metrics.perceptual import psnr, ssim
from camflow.metrics.pose import cami2v_errors, pose_auc, pose_error, pose_record, relative
from camflow.metrics.statistics import bootstrap_ci, paired_bootstrap, summarise


def randoms(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(c2w, degrees, metres, seed=0):
    turn = so3_exp(math.radians(degrees) * torch.nn.functional.normalize(randoms(seed, len(c2w), 3), dim=1))
    out = c2w.clone()
    out[:, :3, :3] = c2w[:, :3, :3] @ turn
    out[:, :3, 3] += metres * torch.nn.functional.normalize(randoms(seed + 1, len(c2w), 3), dim=1)
    out[0] = c2w[0]
    return out


@pytest.mark.parametrize("name", tr.PRESETS)
@pytest.mark.parametrize("scale", ["metric", "ls", "max"])
def test_truth_reads_zero_and_noise_reads_itself(name, scale):
    truth = tr.preset(name)
    world = se3_exp(randoms(3, 6))
    zero = pose_error(truth, world @ truth, scale)
    assert max(zero.rot_mean_deg, zero.rot_sum_rad, zero.trans_mean, *zero.segment_rot.values(), *zero.segment_trans.values()) < 1e-8
    e = pose_error(truth, world @ noisy(truth, 0.5, 0.02), scale)
    assert abs(e.rot_mean_deg - 0.5) < 1e-6
    turns = name.startswith(("pan", "tilt"))
    assert e.status == ("rotation_only" if turns else "ok")
    assert math.isfinite(e.trans_mean) and e.trans_mean < 0.021  # never the 0.47 of a normalised pan
    assert math.isnan(e.scale) == turns and math.isfinite(e.drift) == turns
    if turns: assert abs(e.drift - 0.02) < 1e-9 and math.isnan(e.trans_dir_deg)


def test_half_as_far_is_seen_by_metric_and_named_by_ls():
    truth, est = tr.preset("arc_left"), tr.rescale(tr.preset("arc_left"), translation=0.5)
    metric, ls, longest = (pose_error(truth, est, mode) for mode in ("metric", "ls", "max"))
    assert abs(metric.trans_mean - truth[1:, :3, 3].norm(dim=1).mean() / 2) < 1e-9 and metric.scale == 1
    assert ls.trans_mean < 1e-12 and abs(ls.scale - 2) < 1e-12
    assert longest.trans_mean < 1e-12 and abs(longest.scale - 2) < 1e-12


def test_the_wrong_way_and_standing_still():
    zoom = tr.preset("zoom_in")
    back = pose_error(zoom, tr.preset("zoom_out"), "ls")
    assert back.scale == 0 and abs(back.trans_dir_deg - 180) < 1e-9 and back.trans_mean > 0.9
    frozen = pose_error(zoom, tr.static(81), "max")
    assert frozen.status == "ok" and frozen.trans_dir_deg == 90 and abs(frozen.trans_mean - zoom[1:, 2, 3].mean() / zoom[-1, 2, 3]) < 1e-9
    still = pose_error(tr.static(9), noisy(tr.static(9), 1.0, 0.1), median_depth=4)
    assert still.status == "static" and abs(still.rot_mean_deg - 1) < 1e-6 and abs(still.drift - 0.025) < 1e-9
    side = pose_error(zoom, tr.translate((2, 0, 0)))
    assert abs(side.trans_dir_deg - 90) < 1e-9


def test_segments_do_not_see_drift_that_the_whole_path_sees():
    truth = tr.preset("zoom_in")
    drift = tr.compose(truth, tr.pan(8.0))  # 8 degrees in 80 steps
    e = pose_error(truth, drift, gaps=(1, 4, 20, 200))
    assert abs(e.per_frame_rot[-1] - 8) < 1e-9 and abs(e.segment_rot[1] - 0.1) < 1e-9 and abs(e.segment_rot[20] - 2) < 1e-9
    assert math.isnan(e.segment_rot[200])
    assert e.record()["segment20_rot_deg"] == e.segment_rot[20]


def test_missing_poses_are_typed():
    truth = tr.preset("pan_left", 9)
    lost = truth.clone()
    lost[[4, 5]] = float("nan")
    e = pose_error(truth, lost)
    assert (e.status, e.registered, e.total) == ("invalid", 7, 9) and "frame 4" in e.reason and math.isnan(e.rot_mean_deg)
    with pytest.raises(InputError, match="true path, frame 4"): pose_error(lost, truth)
    with pytest.raises(InputError, match="index by index"): pose_error(truth, truth[:5])
    with pytest.raises(InputError, match="choose metric"): pose_error(truth, truth, "sim3")


def test_cameras_bfloat16_and_single_frames_are_accepted():
    cameras = Cameras(tr.preset("arc_right", 9), focal_K(24, (48, 80)), (48, 80))
    rounded = cameras.embedding().bfloat16().double().reshape(-1, 3, 4)
    e = pose_error(cameras, rounded)
    assert e.status == "ok" and e.rot_mean_deg < 0.3
    assert pose_error(cameras[:1], cameras[:1]).status == "static"
    assert relative(cameras).shape == (9, 4, 4)


def test_unregistered_frames_are_found_by_their_numbers():
    truth = Cameras(tr.preset("zoom_in", 9), focal_K(24, (48, 80)), (48, 80), range(0, 36, 4))
    e = pose_error(truth, truth[[0, 1, 2, 4, 8]])
    assert (e.status, e.registered, e.total) == ("invalid", 5, 9) and "frame 3" in e.reason
    assert pose_error(truth, Cameras(truth.c2w, truth.K, truth.size)).trans_mean < 1e-12  # equally long: position by position
    with pytest.raises(InputError, match="frame 7 of the estimate"): pose_error(truth, Cameras(truth.c2w[:2], truth.K[:2], truth.size, [0, 7]))


def test_anchored_errors_see_a_wrong_start():
    truth = tr.preset("zoom_in", 9)
    shifted = tr.translate((0.3, 0, 0), 2)[-1] @ truth
    assert pose_error(truth, shifted).trans_mean < 1e-12
    assert abs(pose_error(truth, shifted, anchored=True).trans_mean - 0.3) < 1e-12
    row = pose_record(truth, tr.rescale(shifted, translation=0.5))
    assert row["trans_ls"] < 1e-12 and abs(row["ls_scale"] - 2) < 1e-12 and row["trans_metric"] > 0.4 and row["segment1_rot_deg"] < 1e-9


def test_rounded_files_read_zero_here_and_not_in_cami2v():
    truth = torch.round(tr.preset("arc_left") * 1e6) / 1e6
    assert pose_error(truth, truth).rot_sum_rad < 1e-9
    assert cami2v_errors(truth, truth)["RotErr"] > 1e-4  # arccos of a trace near 3
    pan = cami2v_errors(tr.preset("pan_right"), noisy(tr.preset("pan_right"), 0, 1e-3))
    assert pan["TransErr_abs"] > 1e6 and pan["TransErr_rel"] > 20  # why pose_error does not normalise a pan


def test_auc_counts_pairs():
    views = torch.linalg.inv(tr.orbit(40, frames=6, elevation=10))
    assert pose_auc(views, views)["auc"]["auc03"] == 1
    assert pose_auc(views, views)["pair_index"].shape == (2, 15)
    still = torch.eye(4).repeat(3, 1, 1)
    assert pose_auc(still, still)["translation_deg"].tolist() == [90, 90, 90]


def test_results_are_typed_and_counted():
    def fails(): raise InputError("no frames; clip 3; render it again")
    rows = [Result("rot", 1.0), Result("rot", 3.0), measure(fails)]
    row = summarise(rows, higher_is_better=False)
    assert (row["failed"], row["mean"], row["statuses"]) == (1, 2.0, {"ok": 2, "failed": 1})
    assert abs(row["worst_case_mean"] - 7 / 3) < 1e-12
    assert math.isnan(summarise([float("nan")])["mean"])


def test_bootstrap_covers_and_is_reproducible():
    draws, inside = np.random.default_rng(0), 0
    for i in range(100):
        _, low, high = bootstrap_ci(draws.normal(1, 1, 40), n=500, seed=i)
        inside += low < 1 < high
    assert 86 <= inside <= 100
    a, b = draws.normal(0, 1, 30), draws.normal(0.2, 1, 30)
    assert paired_bootstrap(a, b, seed=4) == paired_bootstrap(a, b, seed=4)
    estimate, low, high = paired_bootstrap(a, b)
    assert abs(estimate - (b - a).mean()) < 1e-12 and low < estimate < high


def test_pixel_metrics_do_not_guess():
    a = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    b = (a + 0.02).clamp(0, 1)
    assert abs(psnr(a, b, "unit") - psnr(a * 2 - 1, b * 2 - 1, "signed")) < 1e-4
    assert abs(ssim(a, b, "unit") - ssim(a * 255, b * 255, "byte")) < 1e-6
    assert psnr(a, b, "unit", per_frame=True).shape == (3,)
    with pytest.raises(InputError, match="range"): psnr(a, b)
    with pytest.raises(InputError, match="resize"): ssim(a, b[:2], "unit")
    with pytest.raises(InputError, match="window"): ssim(a[..., :8], b[..., :8], "unit")

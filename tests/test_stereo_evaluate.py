"Evaluating stereo: protocols, public layouts, one table, resuming, and baselines that behave."
import math

import pytest
import torch

from camflow.data.stereo_files import write_image, write_kitti, write_pfm
from camflow.files import InputError, read_json
from camflow.stereo import evaluate
from camflow.stereo.baselines import block_matching, fill, per_frame, search_range, sgbm
from camflow.stereo.network import CONFIGS, DynamicStereo, save_stereo
from camflow.stereo.windows import stereo_video
from camflow.world.clips import HELD_OUT
from camflow.world.stereo_clips import stereo_clip
from camflow.world.stereo_write import write_dynamic_replica, write_sceneflow, write_sintel_stereo

torch.set_num_threads(1)
SMALL = dict(preset="tiny", clips=2, frames=4, window=2, overlap=1, iters=2, weights="random", samples=50, methods=["sgbm_filled"])


@pytest.fixture(scope="module")
def clips(): return [stereo_clip(HELD_OUT + i, "tiny", both=True) for i in range(2)]


# ---- baselines
def test_semi_global_matching_finds_a_plane():
    "A picture shifted by 6 px, matched to a fraction of a pixel also in the leftmost columns that both views show."
    g = torch.Generator().manual_seed(0)
    wide = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 40, 142, generator=g), 3, 1, 1) * 255
    left, right = wide[..., :128].to(torch.uint8), wide[..., 6:134].to(torch.uint8)
    for method in (sgbm, block_matching):
        disparity, confident = method(left, right)
        assert disparity.shape == (1, 1, 40, 128) and bool((disparity.isnan() == ~confident).all()) and confident[..., 6:].float().mean() > .5
        assert float((disparity - 6)[..., 12:-8].nan_to_num(0).abs().median()) < .2
        full, _ = method(left, right, filled=True)
        assert bool(torch.isfinite(full).all()) and float((full - 6).abs().median()) < .2


def test_holes_take_the_farther_neighbour():
    nan = math.nan
    holes = torch.tensor([[nan, nan, nan, nan], [4., nan, nan, 2.], [nan, 7., nan, nan]]).view(1, 1, 3, 4)
    assert fill(holes)[0, 0].tolist() == [[4, 2, 2, 2], [4, 2, 2, 2], [7, 7, 7, 7]]
    assert fill(torch.full((1, 1, 2, 3), nan)).abs().max() == 0
    assert [search_range(w) for w in (32, 128, 256, 1280)] == [16, 32, 80, 384]


def test_one_frame_at_a_time(clips):
    model, clip = DynamicStereo(CONFIGS["tiny"]).eval(), clips[0]
    alone = per_frame(model, clip.left, clip.right, iters=2)
    assert torch.allclose(alone[2:3], stereo_video(model, clip.left[2:3], clip.right[2:3], iters=2), atol=1e-5) and alone.shape == clip.disparity.shape


def test_baselines_refuse(clips):
    with pytest.raises(InputError, match="same frames"): sgbm(clips[0].left, clips[0].right[:3])
    with pytest.raises(InputError, match="uint8"): sgbm(clips[0].left.float(), clips[0].right)


# ---- one clip
def test_the_truth_scores_zero(clips, monkeypatch):
    example = evaluate.world_example(HELD_OUT, "tiny")
    monkeypatch.setitem(evaluate.METHODS, "sgbm", lambda e, c: example.disparity.clone())
    row, _ = evaluate.evaluate_clip("sgbm", example, evaluate.settled(SMALL | dict(methods=["sgbm"])))
    for name, value in row["numbers"].items(): assert value == 0 or math.isnan(value) or name.endswith((".share", "s_per_frame")) or name.startswith(("seam", "depth")), name
    assert row["numbers"]["depth.rtc"] == row["numbers"]["depth.rtc_truth"] > 30 and row["numbers"]["depth.opw"] == row["numbers"]["depth.opw_truth"] and row["numbers"]["depth.tcc"] > .9999
    assert row["frames"] == 5 and row["suite"] == "ordinary" and row["frame_epe"] == [0] * 5


def test_the_worst_frame_is_found(clips, monkeypatch):
    example = evaluate.world_example(HELD_OUT, "tiny")
    off = torch.tensor([0., 1, 5, 2, 0]).view(5, 1, 1, 1)
    monkeypatch.setitem(evaluate.METHODS, "sgbm", lambda e, c: example.disparity + off)
    row, pred = evaluate.evaluate_clip("sgbm", example, evaluate.settled(SMALL | dict(methods=["sgbm"])))
    assert row["worst_frame"] == 2 and abs(row["numbers"]["epe_mean"] - 1.6) < 1e-5
    assert evaluate.strip(example, pred, 2).shape == (3, 32, 4 * 128) and evaluate.strip(example, pred, 2, width=64).shape == (3, 16, 4 * 64)


# ---- whole runs
def test_a_world_run_and_its_schema(tmp_path):
    result = evaluate.main(SMALL | dict(methods=["network", "per_frame", "sgbm", "sgbm_filled", "block_matching"], hard=[None, "fast"]), tmp_path)
    assert result["schema"] == "camflow.stereo_evaluate/1" and result["clips"] == 2 and result["frames"] == 8 and set(result["suites"]) == {"ordinary", "fast"}
    assert set(result["settings"]["changed"]) == {"clips", "frames", "hard", "iters", "overlap", "preset", "window"}
    for table in result["methods"].values():
        for key in ("epe_mean", "epe_bad_3px", "temp_epe_mean", "upstream.epe_mean", "upstream.temp_epe_bad_1px", "tepe_abs_mean", "flow_tepe_mean", "occluded.epe_mean", "moving.temp_epe_mean", "textureless.epe_mean", "edge.epe_mean", "seam_energy", "cpu_s_per_frame"):
            assert set(table[key]) == {"mean", "low", "high", "n", "missing"}, key
    assert result["epe_ratio_to_sgbm"] == pytest.approx(result["sgbm_filled_epe"] / result["network_epe"]) and "network - sgbm_filled" in result["paired"]
    assert result["methods"]["sgbm"]["missing"]["mean"] > 0 == result["methods"]["sgbm_filled"]["missing"]["mean"]
    rows, heads = evaluate.table(result["methods"])
    assert len(rows) == 5 and heads[1] == "EPE px" and "[" in rows[0][1] and "TEPE px" in heads and "seam energy" not in heads
    (name, epe, files), *_ = evaluate.worst_clips(result, "sgbm_filled", 1)
    row = read_json(tmp_path / files["sgbm_filled"])
    assert row["numbers"]["epe_mean"] == epe and (tmp_path / files["sgbm_filled"]).with_name(row["picture"]).stat().st_size > 500


def test_a_killed_run_continues_and_settings_do_not_mix(tmp_path, monkeypatch):
    real, seen = evaluate.METHODS["sgbm_filled"], []

    def dies(e, c):
        if len(seen) == 1: raise KeyboardInterrupt
        seen.append(1)
        return real(e, c)
    monkeypatch.setitem(evaluate.METHODS, "sgbm_filled", dies)
    with pytest.raises(KeyboardInterrupt): evaluate.main(SMALL, tmp_path)
    counted = []
    monkeypatch.setitem(evaluate.METHODS, "sgbm_filled", lambda e, c: (counted.append(1), real(e, c))[1])
    assert evaluate.main(SMALL, tmp_path)["clips"] == 2 and len(counted) == 1
    more = evaluate.main(SMALL | dict(clips=3), tmp_path)
    assert more["clips"] == 3 and len(counted) == 2, "more clips reuse the rows that are there"
    evaluate.main(SMALL | dict(frames=5), tmp_path)
    assert len(counted) == 4, "other clips are other rows"


def test_new_weights_are_new_rows(tmp_path):
    torch.manual_seed(0)
    config = lambda: evaluate.settled(SMALL | dict(methods=["network"], weights=str(tmp_path / "net")))
    save_stereo(DynamicStereo(CONFIGS["tiny"]), tmp_path / "net")
    first = evaluate.identity(config(), "network"), evaluate.identity(config(), "sgbm")
    save_stereo(DynamicStereo(CONFIGS["tiny"]), tmp_path / "net")
    assert evaluate.identity(config(), "network") != first[0] and evaluate.identity(config(), "sgbm") == first[1]


def test_sintel_and_dynamic_replica_by_their_protocols(clips, tmp_path):
    write_sintel_stereo(tmp_path / "sintel", clips)
    write_dynamic_replica(tmp_path / "replica", clips, "valid", tracks=False)
    result = evaluate.main(dict(protocol="sintel-final", root=str(tmp_path / "sintel"), methods=["sgbm_filled"], samples=50), tmp_path / "a")
    truth = [sgbm(c.left, c.right, filled=True)[0] - c.disparity for c in clips]
    outside = [torch.arange(c.size[1]) + .5 - c.disparity < 0 for c in clips]  # counts, as published
    expected = sum(float(e.abs()[~c.occlusion | o].mean()) for e, c, o in zip(truth, clips, outside)) / 2
    assert result["settings"]["changed"] == [] and result["sgbm_filled_epe"] == pytest.approx(expected, rel=2e-3), "hidden pixels do not count"
    result = evaluate.main(dict(protocol="valid-40", root=str(tmp_path / "replica"), methods=["sgbm_filled"], samples=50), tmp_path / "b")
    expected = sum(float(e.abs().mean()) for e in truth) / 2
    table = result["methods"]["sgbm_filled"]
    assert result["sgbm_filled_epe"] == pytest.approx(expected, rel=5e-3) and {"flow_tepe_mean", "occluded.epe_mean", "foreground.epe_mean"} <= set(table)
    assert result["clips"] == 2 and result["reproduced"] is None and evaluate.REPRODUCED["table5-test150"]["epe_mean"] == .2387
    with pytest.raises(InputError, match="frame_annotations_test"): evaluate.main(dict(protocol="table5-test150", root=str(tmp_path / "replica"), methods=["sgbm"]), tmp_path / "c")


def test_sceneflow_and_single_pictures(clips, tmp_path):
    write_sceneflow(tmp_path / "things", clips, "test")
    result = evaluate.main(dict(protocol="things-40", root=str(tmp_path / "things"), methods=["sgbm_filled"], samples=50), tmp_path / "a")
    assert result["clips"] == 2 and result["frames"] == 10 and result["reproduced"]["epe_mean"] == .74
    for side, view in (("image_2", clips[0].left), ("image_3", clips[0].right)): write_image(tmp_path / "kitti/training" / side / "000000_10.png", view[0])
    write_kitti(tmp_path / "kitti/training/disp_occ_0/000000_10.png", clips[0].disparity[0])
    result = evaluate.main(dict(protocol="kitti-2015", root=str(tmp_path / "kitti"), methods=["network", "sgbm_filled"], weights="random", iters=2, samples=50), tmp_path / "b")
    error = (sgbm(clips[0].left[:1], clips[0].right[:1], filled=True)[0] - clips[0].disparity[:1]).abs().mean()
    assert result["sgbm_filled_epe"] == pytest.approx(float(error), rel=5e-3) and math.isnan(result["sgbm_filled_tepe"]) and "TEPE px" not in evaluate.table(result["methods"])[1]


def test_networks_may_see_smaller_views(clips, tmp_path):
    "The answer is in pixels of the full size and is compared there; what was changed is said and has rows of its own."
    example, seen = evaluate.world_example(HELD_OUT, "tiny"), []
    def run(left, right):
        seen.append(left.size)
        return torch.full((len(left), 1, *left.size), 3.0)
    (H, W), found = example.left.size, evaluate.shrunk(run, example, 64)
    assert seen == [(H * 64 // W, 64)] and found.shape == example.disparity.shape and torch.allclose(found, torch.tensor(3.0 * W / 64))
    assert evaluate.shrunk(run, example, 0).eq(3).all() and seen[1] == (H, W)
    config = SMALL | dict(methods=["network"])
    whole, small = (evaluate.main(config | extra, tmp_path) for extra in ({}, {"max_size": 64}))
    assert small["settings"]["changed"] == sorted([*whole["settings"]["changed"], "max_size"]) and small["rows"] != whole["rows"] and small["network_epe"] != whole["network_epe"]
    with pytest.raises(InputError, match="max_size"): evaluate.main(config | dict(max_size=-1), tmp_path)


def test_middlebury_and_eth3d(clips, tmp_path):
    clip, scenes = clips[0], {"middlebury": (tmp_path / "m/Adirondack", tmp_path / "m/Adirondack/disp0.pfm"), "eth3d": (tmp_path / "e/two_view_training/delivery", tmp_path / "e/two_view_training_gt/delivery/disp0GT.pfm")}
    error = (sgbm(clip.left[:1], clip.right[:1], filled=True)[0] - clip.disparity[:1]).abs().mean()
    for protocol, (scene, truth) in scenes.items():
        for name, view in (("im0", clip.left), ("im1", clip.right)): write_image(scene / f"{name}.png", view[0])
        write_pfm(truth, clip.disparity[0])
        result = evaluate.main(dict(protocol=protocol, root=str(tmp_path / protocol[0]), methods=["network", "sgbm_filled"], weights="random", iters=2, samples=50), tmp_path / protocol)
        assert result["clips"] == result["frames"] == 1 and result["sgbm_filled_epe"] == pytest.approx(float(error), rel=1e-4) and math.isfinite(result["network_epe"])
    with pytest.raises(InputError, match="needs root=.*two_view_training_gt"): evaluate.main(dict(protocol="eth3d"), tmp_path)


def test_bad_clips_stop_the_run_or_are_listed(clips, tmp_path):
    write_sintel_stereo(tmp_path / "sintel", clips)
    (tmp_path / "sintel/training/disparities" / clips[0].name / "frame_0002.png").write_bytes(b"no picture")
    config = dict(protocol="sintel-clean", root=str(tmp_path / "sintel"), methods=["sgbm_filled"], samples=50)
    with pytest.raises(InputError, match="not a readable picture"): evaluate.main(config, tmp_path / "a")
    result = evaluate.main(config | dict(skip_bad=True), tmp_path / "a")
    assert result["clips"] == 1 and "frame_0002.png" in result["skipped"][clips[0].name]


@pytest.mark.parametrize("config, words", [
    (dict(protocol="sintel-clean"), "needs root=.*disparities"), (dict(protocol="table5-test150"), "needs root=.*frame_annotations"),
    (dict(protocol="table5"), "table5-test150"), (dict(root="here"), "needs no root"), (dict(methods=["raft"]), "block_matching"), (dict(methods=[]), "no methods"),
    (dict(windows=3), "windows"), (dict(protocol="sintel-final", root="/nowhere"), "does not exist"), (dict(clips=0), "clips=0"), (dict(weights="missing"), "no weights missing")])
def test_refusals_name_the_remedy(config, words, tmp_path):
    with pytest.raises(InputError, match=words): evaluate.main(config, tmp_path)

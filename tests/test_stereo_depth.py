"Somebody's own stereo data: what is refused before anything runs, what is mended and said, and that a killed run goes on with the same bytes."
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.data.dynamic_replica import read_annotations, write_annotations
from camflow.data.stereo_files import read_mask, read_npy, read_pfm, read_png16, write_image
from camflow.files import InputError, read_json, write_json
from camflow.geometry.stereo_rig import StereoRig, write_k_txt, write_middlebury_calib
from camflow.media.frames import Frames
from camflow.media.video import probe, write_video
from camflow.stereo import depth
from camflow.stereo.depth import main, prepare
from camflow.stereo.network import DynamicStereo, StereoConfig, save_stereo
from camflow.stereo.show import read_ply
from camflow.world.stereo_clips import stereo_clip
from camflow.world.stereo_write import write_dynamic_replica
from tests.holding import held

ROOT = Path(__file__).resolve().parents[1]
SIZE, T = (64, 160), 6
PLAIN = dict(weights="sgbm", orbit=False, confidence=False, ply=0, check_rectification=False)
LOOKING = dict(PLAIN, check_rectification=True)


@pytest.fixture(scope="module")
def clip(): return stereo_clip(1_000_002, "small", size=SIZE, frames=T)


def write_folders(root, left, right, names=None):
    for side, frames in (("left", left), ("right", right)):
        for t, picture in enumerate(frames): write_image(root/side/f"{names[t] if names else f'{t + 1:04d}'}.png", picture)
    return root


@pytest.fixture(scope="module")
def data(clip, tmp_path_factory):
    root = write_folders(tmp_path_factory.mktemp("data")/"my_data", clip.left, clip.right)
    write_k_txt(root/"K.txt", StereoRig(clip.K, clip.K, clip.baseline, clip.size))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    save_stereo(DynamicStereo(StereoConfig(dim=32, depth=1, cascade_sign=1.0, dead_weights=False, vertical=False)), folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain")
    return run, main(dict(PLAIN, left=str(data)), run)


def maps(run, result, folder="disparity"): return torch.stack([read_npy(Path(run)/folder/f"{name}.npy") for name in result["names"]])


def error(found, truth):
    off = (found - truth).abs()
    return float(off[torch.isfinite(off)].median())


def test_metres_and_files(clip, data, tmp_path):
    result = main(dict(left=str(data/"left"), right=str(data/"right"), calibration=str(data/"K.txt"), weights="sgbm", pfm=True, ply=4, precision="float16"), tmp_path)
    d = maps(tmp_path, result)
    assert error(d, clip.disparity) < 0.3 and error(maps(tmp_path, result, "depth"), clip.depth) < 0.15 * float(clip.depth.median())
    assert result["calibrated"] and result["remarks"] == [] and result["rectification"]["after"]["status"] == "ok"
    metres, mm = maps(tmp_path, result, "depth")[0, 0], read_png16(tmp_path/"depth_png/0001.png")
    known = torch.isfinite(metres).numpy()
    assert (mm[~known] == 0).all() and np.abs(mm[known] / 1000 - metres.numpy()[known]).max() < 0.01
    torch.testing.assert_close(read_pfm(tmp_path/"disparity_pfm/0001.pfm"), d[0], equal_nan=True)
    points, paint = read_ply(tmp_path/"points/0001.ply")
    assert 0.3 * SIZE[0] * SIZE[1] < len(points) == len(paint) and 0 < points[:, 2].min() and points[:, 2].max() <= result["max_depth"]
    assert sorted(p.name for p in (tmp_path/"points").iterdir()) == ["0001.ply", "0005.ply"] and len(list((tmp_path/"visualisations").iterdir())) == T
    confident = torch.stack([read_mask(tmp_path/f"confidence/{n}.png") for n in result["names"]]) > 128
    assert 0.5 < result["confident"] <= 1 and error(d[confident], clip.disparity[confident]) <= error(d, clip.disparity) + 0.02
    for name in ("depth_video", "orbit_angle_15", "orbit_angle_-15", "orbit_changing_angle"): assert probe(tmp_path/f"{name}.mp4").frames == T


@pytest.mark.parametrize("layout", ["side-by-side", "top-bottom", "pair"])
def test_videos(clip, plain, tmp_path, layout):
    axis = -1 if layout == "side-by-side" else -2
    if layout == "pair":
        for side in ("left", "right"): write_video(tmp_path/f"{side}.mp4", Frames(getattr(clip, side), "byte", 12), lossless=True)
        given = dict(left=str(tmp_path/"left.mp4"), right=str(tmp_path/"right.mp4"))
    else:
        write_video(tmp_path/"both.mkv", Frames(torch.cat([clip.left, clip.right], axis), "byte", 12), lossless=True)
        given = dict(left=str(tmp_path/"both.mkv"), layout=layout)
    result = main(dict(PLAIN, **given, limit=2), tmp_path/"run")
    torch.testing.assert_close(maps(tmp_path/"run", result), maps(*plain)[:2], equal_nan=True)
    assert result["fps"] == 12 and not result["calibrated"] and "no calibration" in result["remarks"][-1] + result["remarks"][0]


def test_sizes_starts_and_shrinking(clip, data, plain, tmp_path):
    small = main(dict(PLAIN, left=str(data), max_size=120, start=2, limit=3), tmp_path)
    assert small["size"] == (48, 120) and small["names"] == ["0003", "0004", "0005"] and small["rig"]["size"] == (48, 120)
    assert small["depth_m"]["median"] == pytest.approx(plain[1]["depth_m"]["median"], rel=0.15)     # metres do not change with the size
    assert small["disparity_px"]["median"] == pytest.approx(0.75 * plain[1]["disparity_px"]["median"], rel=0.15)


def test_exchanged_views_are_exchanged_back(data, plain, tmp_path):
    result = main(dict(LOOKING, left=str(data/"right"), right=str(data/"left"), calibration=str(data/"K.txt")), tmp_path)
    assert result["rectification"]["before"]["status"] == "swapped" and "left and right exchanged" in result["remarks"][1]
    torch.testing.assert_close(maps(tmp_path, result), maps(*plain), equal_nan=True)
    left_alone = prepare(depth.checked(dict(LOOKING, left=str(data/"right"), right=str(data/"left"), calibration=str(data/"K.txt"), rectify=False)))
    assert left_alone.rectifier.nothing and "still" not in left_alone.remarks[0] and "nothing was done" in left_alone.remarks[-1]


def test_a_lower_camera_is_measured_and_corrected(clip, tmp_path):
    root = write_folders(tmp_path/"d", clip.left, clip.right.roll(2, -2))
    result = main(dict(LOOKING, left=str(root)), tmp_path/"run")
    before, after = result["rectification"]["before"], result["rectification"]["after"]
    assert before["status"] == "unrectified" and before["vertical_px"] == pytest.approx(2, abs=0.2) and after["status"] == "ok" and after["error_px"] < 0.3
    assert error(maps(tmp_path/"run", result)[..., 3:-3, :], clip.disparity[..., 3:-3, :]) < 0.35


def test_views_of_a_3d_film_keep_their_metres(clip, tmp_path):
    shift = round(float(clip.disparity[:2].quantile(0.4)))  # the views moved apart: two fifths of the disparities become negative, doffs says so
    root = write_folders(tmp_path/"d", clip.left[:2], clip.right[:2].roll(shift, -1))
    K_right = torch.tensor(clip.K)
    K_right[0, 2] += shift
    write_middlebury_calib(root/"calib.txt", StereoRig(clip.K, K_right, clip.baseline, clip.size))
    result = main(dict(LOOKING, left=str(root)), tmp_path/"run")
    assert result["rectification"]["before"]["status"] == "converging" and result["rig"]["doffs_px"] < shift
    z = maps(tmp_path/"run", result, "depth")[..., :-20]
    assert error(z, clip.depth[:2, ..., :-20]) < 0.1 * float(clip.depth.median())


def broken(data, tmp_path, how):
    import shutil
    root = tmp_path/"d"
    shutil.copytree(data, root)
    how(root)
    return root


@pytest.mark.parametrize("how, told", [
    (lambda r: (r/"right/0003.png").unlink(), "lacks frame 3"),
    (lambda r: [(r/side/"0003.png").unlink() for side in ("left", "right")], "frame 3 missing"),
    (lambda r: write_image(r/"right/0002.png", torch.zeros(3, 60, 160, dtype=torch.uint8)), "one size"),
    (lambda r: (r/"left/0002.png").write_bytes((r/"left/0002.png").read_bytes()[:20]), "0002.png"),
    (lambda r: (r/"left/0004.png").rename(r/"left/x.png"), "no frame number"),
    (lambda r: (r/"K.txt").write_text("1 2 3\n"), "K.txt"),
    (lambda r: (r/"calib.txt").write_text("1 2 3\n"), "calibration files"),
    (lambda r: (r/"K.txt").write_text("700 0 900 0 700 500 0 0 1\n0.1\n"), "principal point"),
    (lambda r: [p.unlink() for p in (r/"right").iterdir()], "no pictures"),
])
def test_bad_folders_are_refused_before_anything_runs(data, tmp_path, how, told):
    with pytest.raises(InputError, match=told): main(dict(PLAIN, left=str(broken(data, tmp_path, how))), tmp_path/"run")
    assert not list((tmp_path/"run").rglob("*.npy"))


def test_maps_that_miss_matched_features_are_doubted():
    "As read on real pairs: the tiny network at 960 x 540 and at 480 x 270, where its disparities are half as large."
    from camflow.stereo.depth import doubts
    assert "weights=sgbm" in doubts(dict(matches=327, median_px=15.9, largest_px=115.3), (540, 960))[0]
    assert doubts(dict(matches=345, median_px=0.89, largest_px=58.7), (270, 480)) == []


def test_huge_frames_are_said_to_be_huge(tmp_path):
    wide = torch.zeros(1, 3, 16, 1700, dtype=torch.uint8)
    job = prepare(depth.checked(dict(PLAIN, left=str(write_folders(tmp_path, wide, wide)))))
    assert "max_size=1280" in job.remarks[-1] and "very small" in job.remarks[-2] and next(job.pairs())[0].shape == (3, 16, 1700)
    assert prepare(depth.checked(dict(PLAIN, left=str(tmp_path), max_size=850))).size == (16, 850)


def test_names_are_sorted_by_number(clip, plain, tmp_path):
    root = write_folders(tmp_path/"d", clip.left, clip.right, ["9", "10", "11", "12", "13", "14"])
    job = prepare(depth.checked(dict(PLAIN, left=str(root))))
    assert job.names == ["9", "10", "11", "12", "13", "14"] and torch.equal(next(job.pairs())[0], clip.left[0])


@pytest.mark.parametrize("settings, told", [
    (dict(left=""), "no input"), (dict(left="/nowhere"), "does not exist"), (dict(window=0), "window=0"), (dict(window=4, overlap=4), "smaller than window"), (dict(frames=3), "unknown settings"),
    (dict(start=6), "start=6"), (dict(max_size=10), "max_size=10"), (dict(weights="/nowhere.pth"), "does not exist"), (dict(precision="int8"), "precision"), (dict(compat="original"), "compat"), (dict(unit="km"), "unit"),
])
def test_bad_settings(data, tmp_path, settings, told):
    with pytest.raises(InputError, match=told): main(dict(dict(PLAIN, left=str(data)), **settings), tmp_path)


def test_absent_tiny_weights_and_broken_checkpoints(data, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "tiny_path", lambda name: (_ for _ in ()).throw(InputError("none")))
    with pytest.raises(InputError, match="weights=sgbm"): main(dict(left=str(data)), tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path/"x.pth")
    with pytest.raises(InputError, match="no DynamicStereo"): main(dict(left=str(data), weights=str(tmp_path/"x.pth")), tmp_path)


def test_memory_and_disk_are_predicted(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "available_bytes", lambda: depth.BASE + 70 * 2**20)
    with pytest.raises(InputError, match=r"GiB are available; use window=\d") as told: main(dict(left=str(data), weights=weights, window=6, iters=1), tmp_path/"a")
    fits = int(str(told.value).split("window=")[-1].split()[0])
    assert depth.need_bytes(SIZE, fits, 32) <= 0.9 * (depth.BASE + 70 * 2**20) - depth.BASE < depth.need_bytes(SIZE, fits + 1, 32)
    monkeypatch.undo()
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("Usage", (), dict(free=1000)))
    with pytest.raises(InputError, match="on disk"): main(dict(PLAIN, left=str(data)), tmp_path/"b")


def test_tiny_frames_nan_and_silence(clip, tmp_path, monkeypatch):
    root = write_folders(tmp_path/"t", clip.left[:2, :, :12, :40], clip.right[:2, :, :12, :40])
    with pytest.raises(InputError, match="at least 16 x 16"): main(dict(PLAIN, left=str(root)), tmp_path/"a")
    root = write_folders(tmp_path/"d", clip.left[:2], clip.right[:2])
    holes = lambda pairs: ((i, torch.where(torch.arange(SIZE[1]) < 40, torch.nan, 5.0).expand(1, *SIZE)) for i, _ in enumerate(pairs))
    monkeypatch.setattr(depth, "_sgbm", holes)
    result = main(dict(PLAIN, left=str(root)), tmp_path/"b")
    assert result["unknown"] == pytest.approx(0.25) and result["disparity_px"]["median"] == 5
    monkeypatch.setattr(depth, "_sgbm", lambda pairs: ((i, torch.full((1, *SIZE), 70.0)) for i, _ in enumerate(pairs)))  # a network outside of what it was trained for
    result = main(dict(LOOKING, left=str(root)), tmp_path/"w")
    assert "do not trust them; try max_size=96" in result["remarks"][0] and result["matches"]["median_px"] > 40
    monkeypatch.setattr(depth, "_sgbm", lambda pairs: ((i, torch.full((1, *SIZE), torch.nan)) for i, _ in enumerate(pairs)))
    with pytest.raises(InputError, match="no pixel"): main(dict(PLAIN, left=str(root)), tmp_path/"c")
    blank = torch.full((2, 3, *SIZE), 100, dtype=torch.uint8)
    assert prepare(depth.checked(dict(LOOKING, left=str(write_folders(tmp_path/"e", blank, blank))))).after.status == "unknown"


@pytest.mark.parametrize("compat", ["", "reference"])
def test_an_interrupted_run_ends_with_the_same_bytes(data, weights, tmp_path, compat):
    config = depth.checked(dict(left=str(data), weights=weights, window=4, overlap=1, iters=1, compat=compat))
    model, job = depth.load_weights(weights), prepare(config)
    whole = [f.read_bytes() for f in depth.compute_maps(job, model, config, tmp_path/"a")]
    for missing in (2, 5):
        for f in sorted((tmp_path/"a").iterdir())[missing:]: f.unlink()
        assert [f.read_bytes() for f in depth.compute_maps(job, model, config, tmp_path/"a")] == whole


@pytest.mark.slow
def test_killed_in_the_middle(data, weights, tmp_path):
    config = dict(left=str(data), weights=weights, window=2, overlap=1, iters=4, orbit=False, ply=0, compare_sgbm=False)
    write_json(tmp_path/"run/config.json", config)
    child = subprocess.Popen([sys.executable, "-m", "camflow.stereo.depth", "--config", str(tmp_path/"run/config.json")], cwd=tmp_path, env=held(tmp_path/"held", "camflow.stereo.depth", "disparity/0003.npy"))
    end = time.monotonic() + 900
    while time.monotonic() < end and child.poll() is None and not (tmp_path/"run/disparity/0002.npy").exists(): time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL), child.wait()
    left = sorted(p.name for p in (tmp_path/"run").rglob("*.npy"))
    assert left and not (tmp_path/"run/result.json").exists()
    result, straight = main(config, tmp_path/"run"), main(config, tmp_path/"again")
    for folder in ("disparity", "disparity_right", "depth"): assert torch.equal(maps(tmp_path/"run", result, folder), maps(tmp_path/"again", straight, folder))
    assert not [p for p in (tmp_path/"run/disparity").iterdir() if p.suffix != ".npy"]


def test_results_are_copied_and_nothing_else_is_touched(data, plain, tmp_path):
    out = tmp_path/"outputs/custom_eval"
    depth.publish(plain[0], out)
    assert (out/"visualisations/0001.png").exists() and (out/"depth/0001.npy").exists()
    (out/"mine.txt").write_text("keep")
    (plain[0]/"visualisations/0001.png").rename(tmp_path/"kept.png")
    depth.publish(plain[0], out)
    assert not (out/"visualisations/0001.png").exists() and (out/"mine.txt").read_text() == "keep" and len(read_json(out/depth.MARK)["files"]) > 10
    (tmp_path/"kept.png").rename(plain[0]/"visualisations/0001.png")
    (tmp_path/"other").mkdir()
    (tmp_path/"other/a.txt").write_text("")
    with pytest.raises(InputError, match="other things"): main(dict(PLAIN, left=str(data), out=str(tmp_path/"other")), tmp_path/"run")
    assert not (tmp_path/"run").exists()


# ---- a public set
def test_a_sequence_of_dynamic_replica_knows_its_cameras(tmp_path):
    "As all reconstructions of the published evaluation: metres from the annotated cameras, the three videos, also where there is no truth (the real split)."
    clip = stereo_clip(1_000_002, "small", size=SIZE, frames=3, both=True)
    write_dynamic_replica(tmp_path, [clip], "real", tracks=False)
    folder = tmp_path/"real"
    name = read_annotations(next(folder.glob("*.jgz")))[0][0]["sequence_name"]
    for depths in folder.rglob("depths"): shutil.rmtree(depths)                          # nobody reads the truth
    told = main(dict(PLAIN, left=str(folder), sequence=name, orbit=True, out=str(tmp_path/"out")), tmp_path/"run")
    assert told["frames"] == 3 and told["calibrated"] and told["rig"]["baseline_m"] == pytest.approx(clip.baseline, rel=1e-5)
    own = main(dict(PLAIN, **sides(folder, name)), tmp_path/"plain")                     # the same pictures without cameras
    assert not own["calibrated"] and own["disparity_px"] == told["disparity_px"]
    focal, shown = float(clip.K[0, 0]), told["disparity_px"]["median"]
    assert told["depth_m"]["median"] == pytest.approx(focal*clip.baseline/shown, rel=0.02)
    assert all(probe(tmp_path/f"out/orbit_{mode}.mp4").frames == 3 for mode in ("angle_15", "angle_-15", "changing_angle"))
    with pytest.raises(InputError, match=name): main(dict(PLAIN, left=str(folder), sequence="nobody"), tmp_path/"no")
    table = next(folder.glob("*.jgz"))
    rows = read_annotations(table)[0]
    write_annotations(table, [row | {"viewpoint": rows[0]["viewpoint"]} for row in rows])   # one camera for both eyes
    lost = main(dict(PLAIN, left=str(folder), sequence=name), tmp_path/"lost")
    assert not lost["calibrated"] and any("not used: the right camera" in text for text in lost["remarks"])
    with pytest.raises(InputError, match="leave those out"): main(dict(PLAIN, left=str(folder), right="x", sequence=name), tmp_path/"no")


def sides(folder, name):
    return {side: str(next(folder.glob(f"{name}*{side}"))/"images") for side in ("left", "right")}

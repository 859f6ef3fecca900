"""Readers of DAVIS, TAP-Vid, Sintel and TUM against files written from the world's truth, the refusal of pickles that run, and scores on known errors."""
import collections
import math
import os
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from camflow.files import InputError
from camflow.flow.files import write_flows
from camflow.geometry.camera import Cameras
from camflow.geometry.rigid import quaternion, se3_exp
from camflow.gflow.datasets import davis_names, from_truth, nearest, read_cam, read_davis, read_dpt, read_mask, read_plain_pickle, read_sintel_clip, read_tapvid, read_tracking, read_tum
from camflow.gflow.ideal import ideal_timeline
from camflow.gflow.scores import boundary_f, camera_scores, mask_scores, mean_scores, novel_scores, outline, score_timeline, self_scores, tap_queries, tap_scores
from camflow.gflow.truth import truth_clip
from camflow.media.frames import to_pil
from camflow.metrics.interface import Result

T, SIZE = 5, (44, 70)


@pytest.fixture(scope="module")
def clip(): return truth_clip("crossing", frames=T, size=SIZE)


@pytest.fixture(scope="module")
def tl(clip): return ideal_timeline(clip)


def save(path, frames, t):
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(frames, t).save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))


# ---- DAVIS

def write_davis(root, clip, name="world", annotated=range(T)):
    known = from_truth(clip)
    for t in range(T):
        save(root/"JPEGImages/480p"/name/f"{t:05d}.jpg", clip.frames, t)
        if t in annotated:
            values = known.masks[t].numpy().astype(np.uint8)
            values[0, 0] = 255
            image = Image.fromarray(values, "P")
            image.putpalette([v for k in range(256) for v in (k * 7 % 256, k * 13 % 256, k * 29 % 256)])
            (root/"Annotations/480p"/name).mkdir(parents=True, exist_ok=True)
            image.save(root/"Annotations/480p"/name/f"{t:05d}.png")
    (root/"ImageSets/2017").mkdir(parents=True)
    (root/"ImageSets/2017/val.txt").write_text(f"{name}\nother\n")
    (root/"ImageSets/2016").mkdir(parents=True)
    (root/"ImageSets/2016/val.txt").write_text(f"/JPEGImages/480p/{name}/00000.jpg /Annotations/480p/{name}/00000.png\n/JPEGImages/480p/{name}/00001.jpg x\n")
    return known


def test_davis_round_trip(tmp_path, clip):
    known = write_davis(tmp_path, clip)
    found = read_davis(tmp_path, "world")
    expected = known.masks.clone()
    expected[:, 0, 0] = -1
    assert torch.equal(found.masks, expected) and found.numbers == list(range(T)) and len(np.unique(found.masks)) > 3
    assert (found.frames.data.float() - clip.frames.data.float()).abs().mean() < 4
    assert davis_names(tmp_path) == ["world", "other"] and davis_names(tmp_path, year=2016) == ["world"]


def test_davis_with_the_first_annotation_only_and_with_holes(tmp_path, clip):
    write_davis(tmp_path, clip, annotated=[0])
    found = read_davis(tmp_path, "world", limit=3)
    assert len(found) == 3 and (found.masks[1:] == -1).all() and (found.masks[0] >= -1).any() and "2 of 3" in found.notes[0]
    save(tmp_path/"JPEGImages/480p/world/00002.jpg", clip.frames.resize((20, 30)), 0)
    with pytest.raises(InputError, match=r"00002.jpg has \(20, 30\) pixels"): read_davis(tmp_path, "world")
    with pytest.raises(InputError, match="holds no"): read_davis(tmp_path, "nobody")
    with pytest.raises(InputError, match="ImageSets"): davis_names(tmp_path, "test-dev")


def test_black_and_white_masks(tmp_path):
    values = np.zeros((6, 8), np.uint8)
    values[2:4, 3:6] = 255
    Image.fromarray(values).save(tmp_path/"a.png")
    Image.fromarray(np.stack([values] * 3, 2)).save(tmp_path/"b.png")
    for name in "ab": assert np.array_equal(read_mask(tmp_path/f"{name}.png"), values // 255)
    (tmp_path/"c.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"): read_mask(tmp_path/"c.png")


# ---- TAP-Vid

def tap_record(clip, dtype=np.float32):
    known, (H, W) = from_truth(clip), clip.frames.size
    return known, {"video": clip.frames.data.permute(0, 2, 3, 1).contiguous().numpy(), "points": (known.tracks.points.transpose(1, 0, 2) / (W, H)).astype(dtype), "occluded": ~known.tracks.visible.T}


@pytest.mark.parametrize("protocol", range(0, 6))
def test_tapvid_round_trip(tmp_path, clip, protocol):
    known, record = tap_record(clip)
    (tmp_path/"tapvid_davis.pkl").write_bytes(pickle.dumps({"a": record, "b": record}, protocol))
    found = read_tapvid(tmp_path/"tapvid_davis.pkl", ["b"])
    assert list(found) == ["b"] and torch.equal(found["b"].frames.data, clip.frames.data)
    assert np.allclose(found["b"].tracks.points, known.tracks.points, atol=1e-4) and np.array_equal(found["b"].tracks.visible, known.tracks.visible)


def test_tracking_pkl_fortran_and_foreign_byte_order(tmp_path, clip):
    known, record = tap_record(clip)
    record = {"points": np.asfortranarray(record["points"]).astype(">f8"), "occluded": np.asfortranarray(record["occluded"])}
    (tmp_path/"tracking.pkl").write_bytes(pickle.dumps(record))
    assert np.allclose(read_tracking(tmp_path/"tracking.pkl", SIZE).points, known.tracks.points, atol=1e-4)


class Runs:
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


def touched(tmp_path): return tmp_path/"touched"


@pytest.mark.parametrize("name, make", [
    ("posix.system", lambda p: Runs(os.system, f"touch {p}")),
    ("builtins.eval", lambda p: Runs(eval, f"open({str(p)!r}, 'w')")),
    ("builtins.getattr", lambda p: Runs(getattr, "text", "upper")),
    ("collections.OrderedDict", lambda p: collections.OrderedDict(a=1)),
    ("torch._utils", lambda p: torch.zeros(2)),
    ("numpy", lambda p: Runs(np.fromfile, str(p))),
])
def test_pickles_that_call_are_refused_by_name(tmp_path, name, make):
    (tmp_path/"evil.pkl").write_bytes(pickle.dumps({"points": [make(touched(tmp_path))]}))
    with pytest.raises(InputError, match=f"calls {name}"): read_plain_pickle(tmp_path/"evil.pkl")
    assert not touched(tmp_path).exists()


def test_pickles_that_lie_about_arrays_are_refused(tmp_path):
    def attempt(data, match):
        (tmp_path/"bad.pkl").write_bytes(data)
        with pytest.raises(InputError, match=match): read_plain_pickle(tmp_path/"bad.pkl")
    whole = pickle.dumps({"points": np.arange(6.)})
    attempt(whole[:-20], "no pickle of plain data")
    attempt(b"", "no pickle")
    attempt(pickle.dumps({"a": {1, 2}}), "holds set")
    attempt(pickle.dumps({"a": b"raw"}), "holds bytes")
    attempt(pickle.dumps({"a": np.array([object(), 1], dtype=object)}), "calls builtins.object")
    attempt(pickle.dumps({"a": np.array(["text", 1], dtype=object)}), "array of 'O8'")
    attempt(pickle.dumps(np.ndarray), "holds")  # the class itself
    attempt(pickle.dumps(np.zeros(2, [("x", "f4")])), "array of")
    bomb = [0]
    for _ in range(15): bomb = [bomb] * 10  # ten lists of the same list, fifteen times: 10^15 items in a small file
    attempt(pickle.dumps(bomb), "100,000 items")
    cut = pickle.dumps({"points": np.arange(6.)}, 4).replace(b"K\x06\x85", b"K\x07\x85")
    assert cut != pickle.dumps({"points": np.arange(6.)}, 4)
    attempt(cut, "48 bytes for shape")


def test_tapvid_says_what_is_wrong(tmp_path, clip):
    _, record = tap_record(clip)
    def attempt(data, match, names=None):
        (tmp_path/"t.pkl").write_bytes(pickle.dumps(data))
        with pytest.raises(InputError, match=match): read_tapvid(tmp_path/"t.pkl", names)
    attempt({"a": record}, "has no 'z'", ["z"])
    attempt({"a": {**record, "video": record["video"][:-1]}}, "4 frames, points for 5")
    attempt({"a": {k: v for k, v in record.items() if k != "occluded"}}, "no array 'occluded'")
    attempt({"a": {**record, "video": record["video"][0]}}, "no video of bytes")
    attempt([record], "holds a list")
    with pytest.raises(InputError, match="does not exist"): read_tapvid(tmp_path/"none.pkl")


# ---- Sintel

def write_sintel_clip(root, clip, name="world"):
    for t in range(T):
        stem = f"frame_{t + 1:04d}"
        save(root/"training/final"/name/f"{stem}.png", clip.frames, t)
        K = clip.cameras.K[t].numpy().copy()
        K[:2, 2] -= 0.5
        (root/"training/camdata_left"/name).mkdir(parents=True, exist_ok=True)
        (root/"training/camdata_left"/name/f"{stem}.cam").write_bytes(struct.pack("<f", 202021.25) + K.astype("<f8").tobytes() + clip.cameras.w2c[t, :3].numpy().astype("<f8").tobytes())
        (root/"training/depth"/name).mkdir(parents=True, exist_ok=True)
        depth = clip.depth.data[t, 0].numpy().astype("<f4").copy()
        depth[0, 0] = 1e10
        (root/"training/depth"/name/f"{stem}.dpt").write_bytes(struct.pack("<fii", 202021.25, depth.shape[1], depth.shape[0]) + depth.tobytes())
    write_flows(root/"training/flow"/name, clip.flow_forward)


def test_sintel_round_trip(tmp_path, clip):
    write_sintel_clip(tmp_path, clip)
    found = read_sintel_clip(tmp_path, "world")
    assert torch.equal(found.frames.data, clip.frames.data) and found.numbers == list(range(T))
    assert torch.allclose(found.cameras.c2w, clip.cameras.c2w, atol=1e-9) and torch.allclose(found.cameras.K, clip.cameras.K, atol=1e-9) and found.cameras.frames.tolist() == found.numbers
    assert torch.allclose(found.depth.data[:, :, 1:], clip.depth.data.float()[:, :, 1:], atol=1e-5) and found.depth.data[:, 0, 0, 0].isnan().all()
    assert torch.allclose(found.flow.data, clip.flow_forward.data.float(), atol=1e-5, equal_nan=True) and found.notes == []
    assert len(read_sintel_clip(tmp_path/"training", "world", limit=2).flow) == 1
    # a point of frame 0 with Sintel's depth and camera lands where the flow says
    row, column = (int(x) for x in (~clip.moving[0]).nonzero()[500])
    pixel = np.array([[column + 0.5, row + 0.5]])
    world = found.cameras[0].unproject(pixel[None], found.depth.data[:1, 0, row, column][None])
    landed = found.cameras[1].project(world[0])[0][0, 0].numpy()
    assert np.allclose(landed - pixel[0], found.flow.data[0, :, row, column].numpy(), atol=1e-3)


def test_sintel_without_truth_and_with_damaged_files(tmp_path, clip):
    save(tmp_path/"test/clean/world/frame_0001.png", clip.frames, 0)
    found = read_sintel_clip(tmp_path/"test", "world", "clean")
    assert found.cameras is None and found.notes == ["no cameras", "no depth", "no flow"]
    (tmp_path/"x.cam").write_bytes(b"PIEH" + bytes(100))
    with pytest.raises(InputError, match="no .cam file"): read_cam(tmp_path/"x.cam")
    (tmp_path/"x.dpt").write_bytes(struct.pack("<fii", 202021.25, 8, 6) + bytes(100))
    with pytest.raises(InputError, match="cut off"): read_dpt(tmp_path/"x.dpt")


# ---- TUM

def write_tum(folder, clip, lost_pose=2, lost_depth=3):
    lines = {"rgb.txt": ["# color images"], "depth.txt": ["# depth maps"], "groundtruth.txt": ["# timestamp tx ty tz qx qy qz qw"]}
    for t in range(T):
        at = 1305031102.1758 + t / 30
        save(folder/f"rgb/{at:.6f}.png", clip.frames, t)
        lines["rgb.txt"].append(f"{at:.6f} rgb/{at:.6f}.png")
        if t != lost_depth:
            depth = clip.depth.data[t, 0].numpy().copy()
            depth[0, 0] = 0
            (folder/"depth").mkdir(exist_ok=True)
            Image.fromarray((depth * 5000).round().astype(np.uint16)).save(folder/f"depth/{t}.png")
            lines["depth.txt"].append(f"{at + 0.007:.6f} depth/{t}.png")
        for shift in (-0.016, 0.004, 0.0165 if t == lost_pose else 0.012):
            if t == lost_pose and shift != 0.0165: continue
            w, x, y, z = quaternion(clip.cameras.c2w[t, :3, :3]).tolist()
            place = clip.cameras.c2w[t, :3, 3] + (10 if shift != 0.004 else 0)
            lines["groundtruth.txt"].append(f"{at + shift:.6f} " + " ".join(f"{v:.9f}" for v in (*place.tolist(), x, y, z, w)))
    for name, rows in lines.items(): (folder/name).write_text("\n".join(rows) + "\n")


def test_tum_round_trip(tmp_path, clip):
    folder = tmp_path/"rgbd_dataset_freiburg3_world"
    write_tum(folder, clip)
    found = read_tum(folder, within=0.015)
    assert found.cameras.frames.tolist() == [0, 1, 3, 4] and torch.allclose(found.cameras.c2w, clip.cameras.c2w[[0, 1, 3, 4]], atol=1e-8)
    assert found.cameras.K[0, 0, 2] == 320.6 and found.cameras.K[0, 0, 0] == 535.4
    there = [0, 1, 2, 4]
    assert torch.allclose(found.depth.data[there, 0, 1:], clip.depth.data[there, 0, 1:].float(), atol=1.1e-4) and found.depth.data[3].isnan().all() and found.depth.data[0, 0, 0, 0].isnan()
    assert len(found.notes) == 2 and round(found.frames.fps) == 30
    assert len(read_tum(folder, stride=2, limit=2)) == 2
    (folder/"groundtruth.txt").write_text("1 2 3\n")
    with pytest.raises(InputError, match="groundtruth.txt, line 1"): read_tum(folder)


def test_tum_asks_for_the_lens(tmp_path, clip):
    write_tum(tmp_path/"mine", clip)
    with pytest.raises(InputError, match="which camera"): read_tum(tmp_path/"mine")
    assert torch.equal(read_tum(tmp_path/"mine", K=clip.cameras.K[0]).cameras.K[0], clip.cameras.K[0])


def test_nearest_is_the_nearest():
    rng = np.random.default_rng(0)
    for n in (1, 2, 30):
        a, b = np.sort(rng.random(20)), np.sort(rng.random(n))
        d = np.abs(a[:, None] - b[None])
        assert np.array_equal(nearest(a, b, 0.05), np.where(d.min(1) <= 0.05, d.argmin(1), -1))


# ---- scores

def test_outline_is_that_of_the_benchmark():
    mask = np.zeros((5, 6), bool)
    mask[1:4, 2:5] = True
    expected = np.zeros((5, 6), bool)
    expected[0, 1:5] = expected[3, 1:5] = expected[0:4, 1] = expected[0:4, 4] = True
    assert np.array_equal(outline(mask), expected)
    full = np.ones((5, 6), bool)
    assert not outline(full).any() and math.isnan(boundary_f(full, full)) and boundary_f(full, mask) == 0


def test_masks_with_void_and_missing_annotations():
    truth = np.zeros((3, 40, 50), int)
    truth[:, 10:20, 10:20] = 2
    truth[1] = -1
    truth[2, 15:20] = np.where(truth[2, 15:20] > 0, -1, truth[2, 15:20])
    ours = truth > 0
    ours[2, 15:20, 10:20] = True  # on void: neither right nor wrong
    ours[1, :5] = True            # nobody knows
    s = mask_scores(ours, truth)
    assert s["mask_J"].value == 1 and s["mask_J"].details["frames"] == 2 and s["mask_J_pooled"].value == 1
    with pytest.raises(InputError, match="one size"): mask_scores(ours[:2], truth)


@pytest.mark.parametrize("variant, status", [("turn", "rotation_only"), ("still", "static")])
def test_cameras_without_translation_have_no_ate(variant, status):
    cameras = truth_clip(variant, frames=4, size=(24, 32)).cameras
    bent = cameras.c2w.clone()
    bent[2:] = se3_exp(torch.tensor([0.01, 0, 0, 0.1, 0, 0], dtype=torch.float64)) @ bent[2:]
    s = camera_scores(Cameras(bent, cameras.K, cameras.size), cameras)
    assert s["camera_ate"].status == s["camera_rpe_trans"].status == status and math.isnan(s["camera_ate"].value)
    assert s["camera_rpe_rot"].ok and abs(s["camera_rpe_rot"].value - math.degrees(0.01) / 3 ** 0.5) < 1e-6


def test_ate_of_a_straight_path_and_of_missing_poses():
    c2w = torch.eye(4, dtype=torch.float64).repeat(6, 1, 1)
    c2w[:, 0, 3] = torch.arange(6)
    true = Cameras(c2w, torch.eye(3), (8, 8))
    off = c2w.clone()
    off[:, 1, 3] = 0.1 * (-1.) ** torch.arange(6)  # zigzag: 0.1 off
    turned = se3_exp(torch.tensor([0.2, 0.4, -1, 3, 4, 5], dtype=torch.float64)) @ off
    turned[:, :3, 3] *= 0.25
    assert camera_scores(Cameras(turned, torch.eye(3), (8, 8)), true)["camera_ate"].value == pytest.approx(0.1, rel=0.05)
    straight = se3_exp(torch.tensor([0.2, 0.4, -1, 0, 0, 0], dtype=torch.float64)) @ c2w
    assert camera_scores(Cameras(straight, torch.eye(3), (8, 8)), true)["camera_ate"].value < 1e-9
    some = Cameras(straight[[0, 2, 5]], torch.eye(3), (8, 8), [0, 2, 5])
    assert camera_scores(some, true)["camera_ate"].value < 1e-9 and camera_scores(some, true)["camera_ate"].details["frames"] == 3
    assert camera_scores(some[[0, 1]], true)["camera_ate"].status == "skipped"


def slow_tap(points, visible, tracks, queries, point, mode):
    "The definitions, one query at a time."
    T, hit, tp, fp, gt, right, n = len(tracks.points), np.zeros(5), np.zeros(5), np.zeros(5), 0, 0, 0
    for q, (f, k) in enumerate(zip(queries[:, 0].astype(int), point)):
        for t in range(T):
            if t == f or (mode == "first" and t < f): continue
            true, seen = tracks.points[t, k] * (256 / tracks.size[1], 256 / tracks.size[0]), tracks.visible[t, k]
            d = np.linalg.norm(points[t, q] * (256 / tracks.size[1], 256 / tracks.size[0]) - true)
            right, n, gt = right + (visible[t, q] == seen), n + 1, gt + seen
            for i, limit in enumerate((1, 2, 4, 8, 16)):
                near = d < limit
                hit[i] += near and seen
                tp[i] += near and seen and visible[t, q]
                fp[i] += visible[t, q] and not (near and seen)
    return right / n, (hit / gt).mean(), (tp / (gt + fp)).mean()


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_tap_scores_are_their_definitions(clip, mode):
    tracks = from_truth(clip).tracks
    rng = np.random.default_rng(3)
    tracks = replace(tracks, visible=tracks.visible & (rng.random(tracks.visible.shape) > 0.2))
    queries, point = tap_queries(tracks, mode, 2)
    points = tracks.points[:, point] + rng.normal(size=(T, len(point), 2)) * rng.choice([0.2, 1, 5], (1, len(point), 1))
    visible = rng.random(points.shape[:2]) > 0.4
    s = tap_scores(points, visible, tracks, queries, point, mode)
    assert np.allclose([r.value for r in s.values()], slow_tap(points, visible, tracks, queries, point, mode))
    if mode == "first": assert (queries[:, 0] > 0).any(), "some point must be seen late"


def test_whole_score_of_an_ideal_fit_and_of_a_wrong_camera(clip, tl):
    known = from_truth(clip)
    good = score_timeline(tl, known, clip=clip)
    assert good["camera_ate"].value < 1e-6 and good["mask_J"].value == 1 and good["track_delta_avg"].value > 0.9 and good["novel_known"].value > 0.8
    assert {r.status for r in good.values()} == {"ok", "no_weights", "skipped"} and all(math.isnan(r.value) == (r.status != "ok") for r in good.values())
    bent = clip.cameras.c2w.clone()
    bent[2:] = bent[2:] @ se3_exp(torch.tensor([0, 0.03, 0, 0, 0, 0], dtype=torch.float64))
    bad = score_timeline(replace(tl, c2w_T44=bent), known, clip=clip)
    assert bad["camera_rpe_rot"].value > 0.5 and bad["track_delta_avg"].value < good["track_delta_avg"].value - 0.1 and bad["train_psnr"].value < good["train_psnr"].value


def test_scores_of_another_scale_and_of_a_smaller_fit(clip, tl):
    known = from_truth(clip)
    larger = [replace(g, means=g.means * 3, scales=g.scales * 3) for g in tl.frames]
    c2w = tl.c2w_T44.clone()
    c2w[:, :3, 3] *= 3
    other, same = score_timeline(replace(tl, frames=larger, c2w_T44=c2w), known, clip=clip), score_timeline(tl, known, clip=clip)
    for name in ("camera_ate", "track_delta_avg", "train_psnr", "novel_psnr", "novel_depth"): assert other[name].value == pytest.approx(same[name].value, abs=2e-3), name
    small = replace(tl, K_33=torch.diag(torch.tensor([0.5, 0.5, 1.], dtype=torch.float64)) @ tl.K_33, size=(22, 35), moving=tl.moving[:, ::2, ::2])
    half = score_timeline(small, known, clip=clip)
    assert half["track_delta_avg"].value > 0.85 and half["mask_J"].value > 0.8 and half["novel_depth"].value < 0.02


def test_a_sequence_without_truth_has_no_numbers(clip, tl):
    bare = replace(from_truth(clip), cameras=None, masks=None, tracks=None)
    s = score_timeline(tl, bare)
    assert s["train_psnr"].ok and all(s[n].status == "skipped" and s[n].reason for n in ("camera_ate", "mask_J", "track_AJ", "heldout_ssim"))
    with pytest.raises(InputError, match="none in common"): score_timeline(replace(tl, numbers=[90, 91, 92, 93, 94]), bare)


def test_nothing_drawn_is_skipped(clip, tl):
    empty = replace(tl, frames=[g[:0] for g in tl.frames], ids=[i[:0] for i in tl.ids], moving=torch.zeros_like(tl.moving))
    s = score_timeline(empty, from_truth(clip), clip=clip)
    assert s["novel_psnr"].status == "skipped" and s["track_delta_avg"].value == 0 and s["track_delta_avg"].details["carried_by_nothing"] > 0 and s["mask_J"].value == 0
    assert novel_scores(empty, clip)["novel_depth"].status == "skipped"


def test_static_scene_has_no_mask_score():
    clip = truth_clip("static", frames=3, size=(32, 48))
    s = score_timeline(ideal_timeline(clip), from_truth(clip))
    assert s["mask_J"].status == s["mask_F"].status == s["track_movers_AJ"].status == "skipped" and s["track_AJ"].ok


def test_the_originals_scores_have_their_own_names_and_their_own_errors(clip, tl):
    known = from_truth(clip)
    own = self_scores(tl, clip.moving[:-1], clip.cameras, known.tracks)
    assert all(name.startswith("self_") for name in own) and own["self_seg_J"].value == 1 and own["self_camera_ate"].value < 1e-6
    queries, point = tap_queries(known.tracks, "strided")
    exact = tap_scores(known.tracks.points[:, point], known.tracks.visible[:, point], known.tracks, queries, point, "strided", (256, 256), (255, 255))
    assert 0.85 < exact["track_delta_avg"].value <= 1 and exact["track_OA"].value == 1  # perfect answers times 255 are up to a pixel off
    far = tap_scores(known.tracks.points[:, point], known.tracks.visible[:, point], known.tracks, queries, point, "strided", (2560, 2560), (2550, 2550))
    assert far["track_delta_avg"].value < 0.9


def test_means_count_what_is_missing():
    rows = {"a": {"x": Result("x", 0.), "y": Result("y", status="skipped", reason="-")}, "b": {"x": Result("x", 1.), "y": Result("y", status="skipped", reason="-")}}
    m = mean_scores(rows)
    assert m["x"] == (0.5, 2, 2) and math.isnan(m["y"][0]) and m["y"][1:] == (0, 2)  # a zero that was measured counts, what is missing does not

"The cache of OmniCam: frame indices, bad input, damage, collisions, repeats, ranks, files of musubi-tuner."
import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from camflow.data import omnicam_cache
from camflow.data.buckets import EXTRACTIONS, bucket_sizes, cut, kept_frames, select_bucket, video_windows
from camflow.data.musubi import Dataset, camera_name, latent_name, parse_latent_name, read_cache_file, read_toml
from camflow.data.musubi_exchange import take_musubi, write_musubi
from camflow.data.omnicam_cache import CacheOptions, OmniCamCache, gc, load_frames, make_cache, read_manifest, verify_cache
from camflow.data.omnicam_items import list_clips
from camflow.files import InputError
from camflow.geometry.camera import Cameras, focal_K
from camflow.geometry.rigid import homogeneous, inverse
from camflow.geometry.script import parse, script_path
from camflow.media.frames import Frames
from camflow.media.video import probe, write_video
from tests.parity.omnicam_cache import check
from tests.phone import phone_video, shown

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/"shared"
SCRIPT = "Camera: <starttime>0</starttime> <endtime>4</endtime> <speed>high</speed> <direction>right</direction> <rotate>stay</rotate> <sep>"


def numbered(frames, size=(32, 48)):
    "Pictures whose brightness is their frame number."
    return Frames(torch.arange(frames, dtype=torch.uint8).mul(4)[:, None, None, None].expand(-1, 3, *size).contiguous(), "byte")


def path_of(frames):
    "Camera-to-world poses whose x is the frame number."
    t = torch.zeros(frames, 3, dtype=torch.float64)
    t[:, 0] = torch.arange(frames)
    return homogeneous(torch.cat([torch.eye(3, dtype=torch.float64).expand(frames, 3, 3), t[..., None]], -1))


def camera_file(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"extrinsics": inverse(path_of(frames)), "intrinsics": torch.tensor([0.6, 0.9, 0.5, 0.5], dtype=torch.float64)}, path)
    return path


class Counting:
    "Encoders that count; latents hold the mean of every fourth frame."
    def __init__(self): self.clips, self.texts, self.read = 0, [], []
    def clip(self, clips):
        self.clips += len(clips)
        out = []
        for clip in clips:
            T, _, H, W = clip.shape
            out.append({"latents": clip.float().mean((1, 2, 3))[::4][None, :, None, None].expand(16, -1, H // 8, W // 8).clone(), "image": torch.zeros(16, (T + 3) // 4, H // 8, W // 8)})
        return out
    def text(self, texts):
        self.texts += texts
        return torch.ones(len(texts), 4, 8)


def made(folder, rows, frames=20, dataset=None, counting=None, **options):
    "(report, encoders) of a pass over a table; videos that are not there are written."
    for name, _ in rows:
        if not (folder/name).exists() and name.endswith(".mp4"): write_video(folder/name, numbered(frames), 8)
    (folder/"metadata.jsonl").write_text("\n".join(json.dumps({"video_path": name, "caption": prompt}) for name, prompt in rows), encoding="utf-8")
    dataset = dataset or Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(48, 32), target_frames=(9,))
    counting = counting or Counting()
    report = make_cache(folder/"cache", list_clips(dataset, folder), {"vae": "test"}, counting.clip, {"text": "test"}, counting.text, **options)
    return report, counting


# ---- frames and poses

@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 200), extraction=st.sampled_from(EXTRACTIONS), targets=st.lists(st.integers(1, 60), min_size=1, max_size=3), stride=st.integers(1, 30), sample=st.integers(1, 6),
       limit=st.integers(1, 150), source=st.sampled_from([None, 8.0, 16.0, 23.976, 24.0, 30.0, 60.0]))
def test_pose_k_belongs_to_frame_k(total, extraction, targets, stride, sample, limit, source):
    cameras = Cameras(path_of(total), focal_K(24, (108, 192)), (108, 192))
    clips = video_windows(total, (192, 108), 24.0, (64, 48), source_fps=source, targets=targets, extraction=extraction, stride=stride, sample=sample, max_frames=limit)
    for clip in clips:
        n = list(clip.frames)
        assert len(n) % 4 == 1 and n == sorted(set(n)) and 0 <= n[0] and n[-1] < total
        ours = cut(cameras, clip)
        assert ours.frames.tolist() == n and ours.size == clip.size and torch.allclose(ours.c2w[:, 0, 3], torch.tensor(n, dtype=torch.float64) - n[0])
        rate = source or 24.0
        whole = script_path(parse("<starttime>0</starttime> <endtime>99</endtime> <speed>0.1</speed> <direction>right</direction> <rotate>stay</rotate>"), total, rate)
        some = script_path(parse("<starttime>0</starttime> <endtime>99</endtime> <speed>0.1</speed> <direction>right</direction> <rotate>stay</rotate>"), n, rate)
        assert torch.allclose(some, inverse(whole[n[0]]) @ whole[n], atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(16, 4000), st.integers(16, 4000), st.integers(64, 1400), st.integers(64, 1400), st.booleans(), st.booleans())
def test_buckets_are_whole_and_of_the_area(w, h, W, H, bucket, keep):
    found = select_bucket((w, h), (W, H), bucket, keep)
    assert found[0] % 16 == found[1] % 16 == 0 and min(found) >= 16 and found[0] * found[1] <= W * H
    if bucket and not keep: assert found in bucket_sizes((W, H))


def test_kept_frames_are_those_on_screen():
    for fps in (16.0, 24.0, 25.0, 59.94):
        kept = kept_frames(240, fps)
        assert kept == sorted(set(kept)) and all(n / fps <= k / 16 + 1e-5 < (n + 1) / fps + 2e-5 for k, n in enumerate(kept) if fps > 16)


def test_paths_as_musubi_tuner_writes_them(tmp_path):
    "Tables name videos from where the trainer was started, prompts name the author's camera files; the set's own folder safetensors has them."
    folder = tmp_path/"OmniCam-Sep-1"
    (folder/"videos").mkdir(parents=True)
    camera_file(folder/"safetensors/clip.safetensors", 20)
    write_video(folder/"videos/clip.mp4", numbered(20), 8)
    prompt = "Object: A box. ; Caption: The camera moves according to the #trajectory:{/data/author/clip.safetensors}."
    (folder/"metadata.jsonl").write_text("\n".join(json.dumps({"video_path": name, "caption": prompt}) for name in ("OmniCam-Sep-1/videos/clip.mp4", "videos/clip.mp4", "videos/none.mp4")))
    dataset = Dataset("set", video_jsonl_file="OmniCam-Sep-1/metadata.jsonl", cache_directory="cache", resolution=(48, 32), target_frames=(9,))
    found = list_clips(dataset, tmp_path)
    assert [item.path for item in found] == [folder/"videos/clip.mp4", folder/"videos/clip.mp4", folder/"videos/none.mp4"]
    counting = Counting()
    make_cache(tmp_path/"cache", found, {"vae": "test"}, counting.clip, {"text": "test"}, counting.text)
    assert [row["name"] for row in OmniCamCache(tmp_path/"cache").rows if row["camera_key"]] == ["OmniCam-Sep-1/videos/clip.mp4", "videos/clip.mp4"]


def test_pixels_and_poses_of_a_window(tmp_path):
    camera_file(tmp_path/"safetensors/clip.safetensors", 40)
    dataset = Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(48, 32), target_frames=(9,), frame_extraction="uniform", frame_sample=3)
    made(tmp_path, [("clip.mp4", "Object: A box. ; Caption: The camera moves according to the #trajectory:{/data/author/clip.safetensors}.")], 40, dataset, options=CacheOptions((tmp_path/"safetensors",)))
    cache = OmniCamCache(tmp_path/"cache")
    assert [row["first"] for row in cache.rows] == [0, 15, 31]
    for i, row in enumerate(cache.rows):
        item = cache[i]
        assert torch.allclose(item["c2w"][:, 0, 3], torch.arange(9.0))
        assert (item["latents"][0, :, 0, 0] / 4 - torch.tensor(row["frames"][::4])).abs().max() < 1    # brightness says which frames were encoded


@pytest.mark.parametrize("source_fps", [None, 12.0, 30.0])
def test_pixels_and_poses_of_a_variable_rate(tmp_path, source_fps):
    times = phone_video(tmp_path/"phone.mp4")
    rate = min(16, source_fps) if source_fps else probe(tmp_path/"phone.mp4").fps
    dataset = Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(80, 48), target_frames=(17,), frame_extraction="uniform", frame_sample=3, source_fps=source_fps)
    made(tmp_path, [("phone.mp4", f"Object: A box. ; {SCRIPT}")], dataset=dataset)
    cache = OmniCamCache(tmp_path/"cache")
    assert len(cache.rows) == 3 and cache.rows[-1]["first"] > 10
    for i, row in enumerate(cache.rows):
        ticks = [row["first"] + k for k in range(17)]
        assert row["fps"] == pytest.approx(rate) and cache[i]["latents"][0, :, 0, 0].tolist() == [shown(times, tick / rate) for tick in ticks[::4]]
        assert torch.allclose(cache[i]["c2w"], script_path(parse(SCRIPT), ticks, rate).float(), atol=1e-6)
    # a ledger from before it was asked how the frames lie in time is asked again
    part, = (tmp_path/"cache/ledger").glob("part-*.jsonl")
    facts = json.loads(part.read_text())
    part.write_text(json.dumps({name: value for name, value in facts.items() if name != "times"}) + "\n")
    again, counting = made(tmp_path, [("phone.mp4", f"Object: A box. ; {SCRIPT}")], dataset=dataset)
    assert again["opened"] == 1 and counting.clips == 0 and OmniCamCache(tmp_path/"cache").rows == cache.rows


def test_what_musubi_tuner_counted_is_not_taken_for_a_variable_rate(tmp_path):
    phone_video(tmp_path/"phone.mp4"), write_video(tmp_path/"even.mp4", numbered(20, (48, 80)), 8)
    rows = [("even.mp4", f"Object: A box. ; {SCRIPT}"), ("phone.mp4", f"Object: A box. ; {SCRIPT}")]
    made(tmp_path, rows, dataset=Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(80, 48), target_frames=(9,)))
    cache = OmniCamCache(tmp_path/"cache")
    write_musubi(cache, tmp_path/"musubi")
    took = take_musubi(tmp_path/"other", cache.rows, tmp_path/"musubi", {"vae": "test"})
    assert took["taken"] == 1 and list(took["bad"]) == ["phone.mp4"] and "the rate of" in took["bad"]["phone.mp4"]


def test_long_videos_are_read_in_pieces(tmp_path, monkeypatch):
    write_video(tmp_path/"long.mp4", numbered(60), 8)
    numbers = [3, 40, 5, 22, 59, 3]
    whole = load_frames(tmp_path/"long.mp4", numbers, (16, 24)).data
    monkeypatch.setattr(omnicam_cache, "PIECE", 3 * 32 * 48 * 4)
    assert torch.equal(load_frames(tmp_path/"long.mp4", numbers, (16, 24)).data, whole)


# ---- one pass, and once more

def test_second_pass_opens_no_video(tmp_path, monkeypatch):
    rows = [(f"{n}.mp4", f"Object: A box. ; {SCRIPT}") for n in range(5)]
    report, first = made(tmp_path, rows)
    assert (report["clips"], first.clips, len(first.texts), report["distinct_clips"]) == (5, 1, 1, 1)       # equal bytes, equal captions: once
    def refuse(*args, **kwargs): raise AssertionError("a video was opened")
    for name in ("probe", "read_video", "video_chunks"): monkeypatch.setattr(omnicam_cache, name, refuse)
    report, second = made(tmp_path, rows)
    assert (second.clips, second.texts, report["opened"], report["videos"], report["cameras"]) == (0, [], 0, 0, 0) and report["clips"] == 5


def test_what_changes_is_made_again(tmp_path):
    rows = [("a.mp4", f"Object: A box. ; {SCRIPT}")]
    made(tmp_path, rows)
    assert made(tmp_path, [("a.mp4", f"Object: A cup. ; {SCRIPT}")])[1].texts == ["A cup."]
    write_video(tmp_path/"a.mp4", numbered(24), 8)
    assert made(tmp_path, rows)[1].clips == 1
    wider = Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(64, 48), target_frames=(9,))
    assert made(tmp_path, rows, dataset=wider)[1].clips == 1
    assert gc(tmp_path/"cache")["items"] >= 2 and verify_cache(tmp_path/"cache")["ok"] and len(OmniCamCache(tmp_path/"cache")) == 1


def test_equal_stems_do_not_collide(tmp_path):
    for n, name in enumerate(("a", "b")): write_video(tmp_path/name/"clip.mp4", numbered(20 + n), 8)
    report, counting = made(tmp_path, [("a/clip.mp4", f"Object: A box. ; {SCRIPT}"), ("b/clip.mp4", f"Object: A cup. ; {SCRIPT}")])
    cache = OmniCamCache(tmp_path/"cache")
    assert (report["same_stem"], counting.clips, len({row["key"] for row in cache.rows})) == (1, 2, 2)
    stems = write_musubi(cache, tmp_path/"musubi")
    assert len(set(stems)) == 2 and len(list((tmp_path/"musubi").iterdir())) == 6
    for i, stem in enumerate(stems):
        file, _ = read_cache_file(tmp_path/"musubi"/latent_name(stem, (48, 32), 0, 9))
        camera, meta = read_cache_file(tmp_path/"musubi"/camera_name(stem))
        assert torch.equal(file["latents"], cache[i]["latents"]) and file["latents_image"].shape[0] == 20 and meta["caption1"] == cache.rows[i]["text"]
        assert torch.allclose(inverse(camera["extrinsics"].double()), cache[i]["c2w"].double(), atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_cache_file_is_redone(tmp_path, damage):
    rows = [("a.mp4", f"Object: A box. ; {SCRIPT}")]
    made(tmp_path, rows)
    shard, = (tmp_path/"cache/clips").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    before = OmniCamCache(tmp_path/"cache")[0]["latents"].clone()
    if damage == "cut": data = data[:len(data) // 2]
    else: data[-3] ^= 255
    shard.write_bytes(data)
    report = verify_cache(tmp_path/"cache")
    assert not report["ok"] and len(report["removed"]) == 1 and report["incomplete"] == {"manifest": ["a.mp4"]}
    assert made(tmp_path, rows)[1].clips == 1 and verify_cache(tmp_path/"cache")["ok"] and torch.equal(OmniCamCache(tmp_path/"cache")[0]["latents"], before)


def test_cut_file_is_redone_without_verify(tmp_path):
    rows = [("a.mp4", f"Object: A box. ; {SCRIPT}")]
    made(tmp_path, rows)
    for shard in (tmp_path/"cache").rglob("*.safetensors"): shard.write_bytes(shard.read_bytes()[:100])
    report, counting = made(tmp_path, rows)
    assert (counting.clips, len(counting.texts), report["cameras"], report["dropped_files"]) == (1, 1, 1, 3)


def test_killed_pass_continues(tmp_path):
    rows = []
    for n in range(6):
        write_video(tmp_path/f"{n}.mp4", numbered(12 + n), 8)
        rows.append((f"{n}.mp4", f"Object: Box {n}. ; {SCRIPT}"))
    class Killed(Exception): pass
    dying = Counting()
    def clip(clips):
        if dying.clips >= 4: raise Killed
        return Counting.clip(dying, clips)
    with pytest.raises(Killed):
        made(tmp_path, rows, counting=type("C", (), {"clip": staticmethod(clip), "text": dying.text})(), batch=1, shard=2)
    assert made(tmp_path, rows, batch=1, shard=2)[1].clips == 2


def test_ranks_share_the_work(tmp_path):
    rows = []
    for n in range(5):
        write_video(tmp_path/f"{n}.mp4", numbered(12 + n), 8)
        rows.append((f"{n}.mp4", f"Object: Box {n}. ; {SCRIPT}"))
    made(tmp_path, rows[:1])
    barrier, results = threading.Barrier(2, timeout=60), {}
    (tmp_path/"metadata.jsonl").write_text("\n".join(json.dumps({"video_path": name, "caption": prompt}) for name, prompt in rows))
    dataset = Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(48, 32), target_frames=(9,))
    def one(rank):
        counting = Counting()
        make_cache(tmp_path/"cache", list_clips(dataset, tmp_path), {"vae": "test"}, counting.clip, {"text": "test"}, counting.text, rank=rank, world=2, wait=barrier.wait)
        results[rank] = counting.clips
    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(results.values()) == [2, 2] and len(OmniCamCache(tmp_path/"cache")) == 5 and verify_cache(tmp_path/"cache")["ok"]


# ---- bad input

@pytest.mark.parametrize("poses, status", [(20, None), (15, "camera_length"), (30, "camera_length")])
def test_camera_file_of_another_length(tmp_path, poses, status):
    camera_file(tmp_path/"clip.safetensors", poses)
    report, _ = made(tmp_path, [("clip.mp4", f"Object: A box. ; Caption: #trajectory:{{{tmp_path}/clip.safetensors}}.")])
    _, rows = read_manifest(tmp_path/"cache/manifests/manifest.jsonl")
    assert report["reasons"] == ({status: 1} if status else {})
    if status: assert f"{poses} poses for 20 frames" in rows[0]["reason"]


def test_every_dropped_item_says_why(tmp_path):
    (tmp_path/"bad.mp4").write_bytes(b"no video")
    (tmp_path/"half.safetensors").write_bytes(b"\x10\0\0")
    write_video(tmp_path/"short.mp4", numbered(5), 8)
    write_video(tmp_path/"good.mp4", numbered(20), 8)
    (tmp_path/"cut.mp4").write_bytes((tmp_path/"good.mp4").read_bytes()[:-400])
    rows = [("good.mp4", f"Object: A box. ; {SCRIPT}"), ("gone.mov", f"Object: A box. ; {SCRIPT}"), ("bad.mp4", f"Object: A box. ; {SCRIPT}"), ("short.mp4", f"Object: A box. ; {SCRIPT}"),
            ("good.mp4", f"; {SCRIPT}"), ("good.mp4", "A box."), ("good.mp4", f"Object: A box. ; Caption: #trajectory:{{{tmp_path}/half.safetensors}}."),
            ("good.mp4", "Object: A box. ; Caption: #trajectory:{/nowhere/x.safetensors}."), ("good.mp4", f"Object: A box. ; {SCRIPT.replace('right', 'sideways')}"), ("cut.mp4", f"Object: A cut. ; {SCRIPT}")]
    report, _ = made(tmp_path, rows)
    _, found = read_manifest(tmp_path/"cache/manifests/manifest.jsonl")
    assert [row["status"] for row in found] == ["ok", "missing", "unreadable", "too_short", "no_text", "no_camera", "bad_camera", "bad_camera", "bad_camera", "unreadable"]
    assert all(row["reason"] for row in found[1:]) and report["dropped"] == 9 and set(report["reasons"]) <= set(omnicam_cache.STATUSES)


def test_a_video_that_breaks_while_read_is_reported(tmp_path, monkeypatch):
    rows = [("a.mp4", f"Object: A box. ; {SCRIPT}")]
    def broken(*args): raise InputError("a.mp4 is damaged; copy it again")
    with monkeypatch.context() as patch:
        patch.setattr(omnicam_cache, "load_frames", broken)
        assert made(tmp_path, rows)[0]["reasons"] == {"unreadable": 1}
    assert made(tmp_path, rows)[1].clips == 0 and made(tmp_path, rows, retry=True)[1].clips == 1


def test_caption_of_5000_words(tmp_path):
    from camflow.wan.text import build_tiny_text
    encoder, words = build_tiny_text(["A box on a table."], 32, 1), " ".join(f"word{n}" for n in range(5000))
    counting = Counting()
    counting.text = encoder.encode
    made(tmp_path, [("a.mp4", f"Object: {words} ; {SCRIPT}")], counting=counting)
    item = OmniCamCache(tmp_path/"cache")[0]
    assert item["context"].shape == (encoder.length, 32) and len(item["row"]["text"].split()) == 5000


def test_another_encoder_has_its_own_files(tmp_path):
    rows = [("a.mp4", f"Object: A box. ; {SCRIPT}")]
    made(tmp_path, rows)
    counting, dataset = Counting(), Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(48, 32), target_frames=(9,))
    make_cache(tmp_path/"cache", list_clips(dataset, tmp_path), {"vae": "other"}, counting.clip, {"text": "test"}, counting.text)
    assert (counting.clips, counting.texts) == (1, []) and gc(tmp_path/"cache")["items"] == 1 and len(list((tmp_path/"cache/clips").iterdir())) == 1


TOML = '[[datasets]]\nvideo_jsonl_file = "metadata.jsonl"\ncache_directory = "cache"\n'


@pytest.mark.parametrize("text, message, line", [
    (TOML + "resolution = [960]", "resolution", 4), (TOML + "resolution = [8, 8]", "resolution", 4), (TOML + "target_frames = 21", "target_frames", 4), (TOML + "target_frames = [0]", "target_frames", 4),
    (TOML + 'frame_extraction = "middle"', "frame_extraction", 4), (TOML + "batch_size = 0", "batch_size", 4), (TOML + "batch_size = true", "batch_size", 4), (TOML + 'enable_bucket = "yes"', "enable_bucket", 4),
    (TOML + "source_fps = -1", "source_fps", 4), (TOML + "target_frame = [21]", "unknown key", 4), ("[general]\nbatch_size = 1.5\n" + TOML, "batch_size", 2), (TOML + 'image_directory = "x"', "and", 1),
    ("[[datasets]]\nbatch_size = 1", "no source", 1), ('[[datasets]]\nvideo_jsonl_file = "m.jsonl"', "cache_directory", 1), (TOML + TOML, "share", 1), ("[[datasets]\n", "not TOML", 1), ("[other]\n" + TOML, "unknown table", 0),
    ("[general]\n", "no [[datasets]]", 0)])
def test_malformed_data_set_files(tmp_path, text, message, line):
    (tmp_path/"set.toml").write_text(text)
    with pytest.raises(InputError) as error: read_toml(tmp_path/"set.toml")
    assert message in str(error.value) and (not line or f"line {line}" in str(error.value)), str(error.value)


def test_names_are_read_from_the_right():
    for stem in ("clip", "a_b", "my_te_01", "x_00000-017_0064x0048_wan", "1-2"):
        assert parse_latent_name(latent_name(stem, (1920, 1080), 26, 81)) == dict(stem=stem, first=26, frames=81, size=(1920, 1080))
    assert parse_latent_name("clip_wan_te.safetensors") is None


@pytest.mark.parametrize("folder", [p for p in (ROOT/"tests/goldens/omnicam", SHARED/"goldens/omnicam") if (p/"buckets.json").exists() and (p/"musubi_cache.json").exists()])
def test_goldens(folder):
    results = check(folder)
    assert len(results) == 7 and all(result[3] for result in results.values()), results


@pytest.mark.skipif(not (SHARED/"real/omnicam/groundtruth.mp4").exists(), reason="the real camera file is not on this machine")
def test_real_camera_file(tmp_path):
    real = SHARED/"real/omnicam"
    (tmp_path/"metadata.jsonl").write_text(json.dumps({"video_path": str(real/"groundtruth.mp4"), "caption": "Object: A room. ; Caption: The camera moves according to the #trajectory:{/data/extrinsics_intrinsics.safetensors}."}))
    dataset = Dataset("set", video_jsonl_file="metadata.jsonl", cache_directory="cache", resolution=(160, 96), enable_bucket=True, target_frames=(21,), frame_extraction="uniform", frame_sample=3)
    counting = Counting()
    report = make_cache(tmp_path/"cache", list_clips(dataset, tmp_path), {"vae": "test"}, counting.clip, {"text": "test"}, counting.text, CacheOptions((real,)))
    cache = OmniCamCache(tmp_path/"cache")
    assert report["clips"] == counting.clips == 3 and [row["first"] for row in cache.rows] == [0, 46, 93]
    item = cache[1]
    assert item["c2w"].shape == (21, 4, 4) and abs(item["intrinsics"][0] * 160 / (item["intrinsics"][1] * 96) - 1) < 0.02

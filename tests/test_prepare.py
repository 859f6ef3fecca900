"Preparation of MultiCamVideo folders: kills, ranks, damage, repeats, the published files, one tiling."
import builtins
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from camflow.assets import tiny_path
from camflow.data import prepare
from camflow.data.cache import LatentCache, text_key
from camflow.data.contradictions import dark_findings
from camflow.data.ledger import Ledger
from camflow.data.prepare import list_items, prepare_texts, prepare_videos
from camflow.data.tensors_file import find_tensors, read_set, read_tensors, tensors_path, write_set
from camflow.files import InputError, read_json, sha256_file, write_json
from camflow.media.frames import Frames
from camflow.media.video import read_video, write_video
from camflow.world.write import write_multicam

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(frames=9, size=(48, 80))


def encode(clips): return {"latents": torch.stack([clip[:, ::4, ::8, ::8].half() for clip in clips])}
def never(*_): raise AssertionError("computed again")
def tree(folder): return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    write_multicam(root, scenes=2, frames=9, cameras=3, size=(48, 80), val=False)
    return root


@pytest.fixture
def root(written, tmp_path): return Path(shutil.copytree(written, tmp_path/"set"))


def contents(folder):
    cache = LatentCache(folder/"latents")
    return {key: cache.get(key)["latents"].clone() for key in cache.where}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


SLOW = """
import sys, time, torch
from camflow.data.prepare import list_items, prepare_videos
seen = []
def encode(clips):
    seen.append(len(clips))
    if sum(seen) > 4: time.sleep(600)                    # it cannot come to its end before it is killed
    return {"latents": torch.stack([clip[:, ::4, ::8, ::8].half() for clip in clips])}
prepare_videos(sys.argv[2], list_items(sys.argv[1]), {"encoder": "pick"}, encode, 9, (48, 80), shard=1)
"""


def test_a_killed_pass_continues_and_ends_in_the_same_bytes(root, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(root), str(tmp_path/"killed")], env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 600
    while len(list((tmp_path/"killed/latents").glob("*.safetensors"))) < 2 and time.monotonic() < until: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path/"killed/ledger/part-00000.jsonl").open("ab").write(b'{"key": "file:f24') # half a line
    items, before = list_items(root), set(contents(tmp_path/"killed"))
    assert 2 <= len(before) < 6
    resumed = prepare_videos(tmp_path/"killed", items, {"encoder": "pick"}, encode, **SHAPE, shard=1)
    whole = prepare_videos(tmp_path/"whole", items, {"encoder": "pick"}, encode, **SHAPE, shard=1)
    assert resumed.encoded == 6 - len(before) and resumed.hashed == 0 and whole.encoded == 6
    assert {p.name: sha256_file(p) for p in (tmp_path/"killed/latents").glob("*.safetensors")} == {p.name: sha256_file(p) for p in (tmp_path/"whole/latents").glob("*.safetensors")}
    for name in ("killed", "whole"): write_set(tmp_path/name, items, {}, tmp_path/f"out-{name}", resumed.keys)
    files = [{str(p.relative_to(tmp_path/f"out-{name}")): sha256_file(p) for p in (tmp_path/f"out-{name}").rglob("*.pth")} for name in ("killed", "whole")]
    assert files[0] == files[1] and len(files[0]) == 6


def test_a_second_pass_opens_no_video_and_loads_no_weights(root, tmp_path, monkeypatch):
    from camflow.wan import prepare as process
    data = tree(root)
    config = dict(root=str(root), frames=9, size=[48, 80], cache_folder=str(tmp_path/"cache"), workers=0, export=str(tmp_path/"out"))
    first = process.main(config, tmp_path/"run")
    captions = process.captions_of(process.checked(config), [item.name for item in list_items(root)])[0]
    assert (first["videos"], first["encoded"], first["opened"], first["files"]) == (6, 6, 6, 6) and first["texts"] == first["distinct_captions"] == len(set(captions.values())) < 6
    import av
    opened = builtins.open
    def guarded(file, *args, **options):
        assert not str(file).endswith((".mp4", ".safetensors.bin")), f"{file} was opened"
        return opened(file, *args, **options)
    monkeypatch.setattr(av, "open", never), monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr(prepare, "read_video", never), monkeypatch.setattr(prepare, "probe", never), monkeypatch.setattr(process, "from_folder", never)
    second = process.main(config, tmp_path/"run")
    assert [second[name] for name in ("encoded", "opened", "hashed", "texts", "files", "load_seconds")] == [0] * 6 and second["ok"] == 6
    assert first["cpu_seconds"] > 5 * second["cpu_seconds"]                     # the run's profile `small` measures it on 400 clips
    assert tree(root) == data                                                   # nothing written beside the videos
    monkeypatch.undo()

    # a training with the same settings finds everything
    from camflow.wan import finetune
    asked = finetune.configuration(dict(data="multicam", root=str(root), cache_folder=str(tmp_path/"cache"), text_encoder=str(tiny_path("recam"))), finetune.DEFAULTS)
    monkeypatch.setattr(prepare, "load_clip", never), monkeypatch.setattr(finetune.TextEncoder, "encode", never)
    scenes = finetune.datasets(asked, tmp_path/"train")[3]
    item = list_items(root)[4]
    made = read_tensors(tensors_path(tmp_path/"out"/item.name))
    assert torch.equal(scenes.latents[1][1].bfloat16(), made["latents"]) and made["latents"].shape == (16, 3, 6, 10) and torch.equal(scenes.text_SLD[1].bfloat16(), made["context"])
    with pytest.raises(InputError, match="made with other tiles"): finetune.datasets(asked | {"tiles": "recammaster"}, tmp_path/"train")


def test_two_ranks_share_the_work(root, tmp_path):
    "Two processes under torchrun: no clip twice, the same latents as one process."
    from camflow.lab.launch import launch
    from camflow.wan import prepare as process
    config = dict(root=str(root), frames=9, size=[48, 80], workers=0, shard=2)
    launch("camflow.wan.prepare", {**config, "cache_folder": str(tmp_path/"two")}, tmp_path/"run", num_processes=2)
    result = read_json(tmp_path/"run/result.json")
    ranks = [read_json(tmp_path/f"run/ranks/rank0000{r}.json") for r in (0, 1)]
    assert result["encoded"] == 6 and [r["encoded"] for r in ranks] == [3, 3] and [r["hashed"] for r in ranks] == [3, 3] and sum(r["texts"] for r in ranks) == result["distinct_captions"]
    parts = [{line.split('"')[3] for line in p.read_text().splitlines() if '"clip:' in line} for p in sorted((tmp_path/"two/ledger").glob("part-*"))]
    assert len(parts) == 2 and not parts[0] & parts[1] and len(parts[0] | parts[1]) == 6
    assert process.main({**config, "cache_folder": str(tmp_path/"one")}, tmp_path/"run1")["encoded"] == 6
    assert equal(contents(tmp_path/"one"), contents(tmp_path/"two"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_cache_file_is_made_again(root, tmp_path, damage):
    items = list_items(root)
    made = prepare_videos(tmp_path/"cache", items, {"encoder": "pick"}, encode, **SHAPE, shard=2)
    whole, shard = contents(tmp_path/"cache"), sorted((tmp_path/"cache/latents").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 255
    if damage == "gone": shard.unlink()
    else: shard.write_bytes(data if damage == "flipped" else data[:len(data) // 2])
    again = prepare_videos(tmp_path/"cache", items, {"encoder": "pick"}, encode, **SHAPE, shard=2, verify=damage == "flipped")
    assert again.encoded == 2 and again.dropped == (damage != "gone") and again.keys == made.keys and equal(contents(tmp_path/"cache"), whole)


def test_content_decides_what_is_encoded(root, tmp_path):
    items = list_items(root)
    run = lambda: prepare_videos(tmp_path/"cache", list_items(root), {"encoder": "pick"}, encode, **SHAPE)
    assert run().encoded == 6
    os.utime(items[0].path)                                     # touched: hashed again, not encoded
    assert (lambda r: (r.hashed, r.opened))(run()) == (1, 0)
    shutil.copy(items[0].path, items[1].path)                   # now the same content twice
    again = run()
    assert (again.hashed, again.encoded) == (1, 0) and again.keys[items[0].name] == again.keys[items[1].name]
    write_video(items[2].path, Frames(read_video(items[3].path).data // 8, "byte", 8))   # new content, dark
    last = run()
    assert last.encoded == 1 and [f.file_name for f in dark_findings({name: note["luminance"] for name, note in last.notes.items()})] == [items[2].name]


def test_what_cannot_be_read_is_listed_and_the_rest_is_done(root, tmp_path):
    from camflow.wan import prepare as process
    items = list_items(root)
    good = items[1].path.read_bytes()
    items[1].path.write_bytes(good[:500])
    write_video(items[4].path, read_video(items[4].path, range(5)), fps=8)
    config = dict(root=str(root), frames=9, size=[48, 80], texts=False, workers=2)
    with pytest.raises(InputError, match="2 of 6 videos could not be encoded.*the others are done"): process.main(config, tmp_path/"run")
    rows = {line.split(",")[0]: line for line in (tmp_path/"run/manifest.csv").read_text().splitlines()}
    assert sum(",ok," in row for row in rows.values()) == 4 and "5 there" in rows[items[4].name] and "0 frames" in rows[items[1].name]
    items[1].path.write_bytes(good)
    result = process.main({**config, "skip_bad": True}, tmp_path/"run")
    assert (result["ok"], result["failed"], result["encoded"]) == (5, 1, 1) and "5 there" in result["first_failure"]


def test_a_table_of_another_set_is_refused(tmp_path):
    "It was given on purpose, and no caption of it would be encoded."
    from camflow.wan.prepare import captions_of, checked
    (tmp_path/"metadata.csv").write_text("file_name,text\n1.mp4,A man walks.\n")
    names = ["f24_aperture5/scene1/videos/cam01.mp4"]
    with pytest.raises(InputError, match="no row is about a video of the set.*1.mp4.*metadata.csv"): captions_of(checked(dict(root="x", metadata=str(tmp_path/"metadata.csv"))), names)
    assert captions_of(checked(dict(root=str(tmp_path))), names) == ({}, [])        # lay there by itself


def test_distinct_captions_are_encoded_once(tmp_path):
    seen = []
    def embed(texts):
        seen.extend(texts)
        return torch.ones(len(texts), 4, 8)
    captions = [f"caption {i % 7}" for i in range(50)]
    for rank in (0, 1): prepare_texts(tmp_path, captions, {"text": 1}, embed, batch=3, rank=rank, world=2)
    assert sorted(seen) == sorted(set(captions)) and all(text_key(c) in LatentCache(tmp_path/"text") for c in captions)


@pytest.mark.parametrize("style, name", [("tensors", "cam01.mp4.tensors.pth"), ("tensor", "cam01.mp4.tensor.pth"), ("pth", "cam01.pth")])
def test_published_names_round_trip(root, tmp_path, style, name):
    items, identity = list_items(root), {"encoder": "pick", "tiles": [[34, 34], [18, 16]]}
    made = prepare_videos(tmp_path/"a", items, identity, encode, **SHAPE)
    prepare_texts(tmp_path/"a", ["one", "two"], {"text": 1}, lambda t: torch.nn.functional.pad(torch.ones(len(t), 3, 8), (0, 0, 0, 5)))
    captions = {item.name: ("one", "two")[i % 2] for i, item in enumerate(items)}
    assert write_set(tmp_path/"a", items, captions, root/"train", made.keys, style) == 6 and write_set(tmp_path/"a", items, captions, root/"train", made.keys, style) == 0
    assert find_tensors(items[0].path) == items[0].path.with_name(name)
    raw = torch.load(find_tensors(items[0].path), weights_only=True)
    assert raw.keys() == {"latents", "prompt_emb", "image_emb"} and raw["latents"].dtype == torch.bfloat16 and raw["prompt_emb"]["context"].shape == (1, 8, 8)
    find_tensors(items[5].path).write_bytes(find_tensors(items[5].path).read_bytes()[:700])
    taken, bad = read_set(tmp_path/"b", items, captions, LatentCache(tmp_path/"a/latents").identity, {"text": 1}, note=root/"train/tensors.json" if style == "pth" else None)
    assert taken == 5 and list(bad) == [items[5].name] and "cut off" in bad[items[5].name]
    rest = prepare_videos(tmp_path/"b", items, identity, encode, **SHAPE)
    assert rest.encoded == 1 and all(torch.equal(contents(tmp_path/"b")[k].bfloat16(), v.bfloat16()) for k, v in contents(tmp_path/"a").items())
    assert LatentCache(tmp_path/"b/text").get(text_key("one"))["context"].shape == (3, 8)  # stored without padding


def test_a_cached_file_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return (os.system, (f"touch {tmp_path}/ran",))
    (tmp_path/"cam01.mp4.tensors.pth").write_bytes(pickle.dumps({"latents": Evil()}))
    with pytest.raises(InputError, match="cannot be read as tensors"): read_tensors(tmp_path/"cam01.mp4.tensors.pth")
    assert not (tmp_path/"ran").exists()
    torch.save({"latents": torch.full((16, 3, 2, 2), float("nan"))}, tmp_path/"nan.pth")
    with pytest.raises(InputError, match="not finite"): read_tensors(tmp_path/"nan.pth")


def test_sampling_encodes_as_training_did():
    from camflow.wan.pipeline import tiny_pipeline
    from camflow.wan.vae import encode_tiled, encode_video, tiling
    pipe, video = tiny_pipeline(), torch.rand(1, 3, 1, 64, 96) * 2 - 1
    with torch.no_grad(): whole, tiled = encode_video(pipe.vae, video), encode_tiled(pipe.vae, video, (4, 6), (2, 3))
    assert torch.equal(pipe.encode_source(video), whole) and torch.equal(pipe.encode_source(video, True, (4, 6), (2, 3)), tiled) and not torch.equal(whole, tiled)
    pipe.latent_tiles = tiling([[4, 6], [2, 3]])
    assert torch.equal(pipe.encode_source(video), tiled) and torch.equal(pipe.encode_source(video, True, (4, 6), (2, 3)), tiled)
    for asked in (dict(tiled=False), dict(tiled=True)):
        with pytest.raises(InputError, match="trained on latents with tiling"): pipe.encode_source(video, **asked)
    for bad in ("mosaic", [[4, 4], [5, 5]], [[4, 4], [0, 2]]):
        with pytest.raises(InputError, match="tiling"): tiling(bad)


def test_exported_weights_say_how_to_encode(tmp_path, monkeypatch):
    from camflow.wan import generate
    folder = tmp_path/"weights"
    for name in ("transformer", "text_encoder", "tokenizer"): shutil.copytree(tiny_path("recam")/name, folder/name)
    shutil.copytree(tiny_path("vae"), folder/"vae")
    assert generate.load_pipeline(str(folder)).latent_tiles == "unknown"
    write_json(folder/"latents.json", {"tiles": [[34, 34], [18, 16]]})
    assert generate.load_pipeline(str(folder)).latent_tiles == ((34, 34), (18, 16))


def test_a_ledger_keeps_whole_lines_only(tmp_path):
    one, two = Ledger(tmp_path, 0), Ledger(tmp_path, 1)
    for i in range(20): (one, two)[i % 2].add(f"k{i}", value=i)
    one.refresh()
    assert len(one.rows) == 20
    one.close()
    with open(one.path, "ab") as file: file.write('{"key": "k99", "text": "é'.encode()[:-1])
    assert "k99" not in Ledger(tmp_path).rows
    again = Ledger(tmp_path, 0)
    again.add("k100", value=1)
    assert len(Ledger(tmp_path).rows) == 21 and not Ledger(tmp_path).damaged


@pytest.mark.parametrize("limit", [float("inf"), float("nan")])
def test_a_cache_of_no_limit_is_found_again(limit, tmp_path):
    "Infinity stood as null in its record, and a hash that tells the two apart took it for another one."
    LatentCache(tmp_path, {"limit": limit})
    assert len(LatentCache(tmp_path, {"limit": limit})) == 0
    with pytest.raises(InputError, match="other limit"): LatentCache(tmp_path, {"limit": None})

"Tables, folders, crops and codecs of joint diffusion; bad input is an InputError that names it."
import json
import math
import shutil
from pathlib import PurePath

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from camflow.assets import tiny_path
from camflow.data.stereo_files import write_image
from camflow.device import generator
from camflow.files import InputError
from camflow.joint.codecs import FLOW_KINDS, DepthCodec, FlowCodec, codec_from_dict, load_coded, round_trip, save_coded
from camflow.joint.data import Crop, Source, _videos, apply_crop, captions, check_item, draw_crop, draw_size, image_folder, modalities, panda_videos, read_depth, read_panda, video_folder, voc_json, webvid_videos, world_items
from camflow.joint.models import identity_vae, load_sd, load_svd
from camflow.joint.shapes import shape_clip
from camflow.media.frames import Depth, Flow, Frames, to_pil
from camflow.media.video import probe, write_video
from tests.phone import phone_video, shown


def _item(size=(24, 32), frames=3):
    clip = shape_clip(1, size, frames)
    return dict(video=clip.frames, flow=clip.flow, depth=clip.depth, fps=7.0, caption=clip.caption, id="clip")


def test_one_crop_for_all_modalities_and_flow_in_new_pixels():
    item, crop = _item(), Crop(4, 6, 16, 20, False)
    out = apply_crop(item, crop, (32, 40)) # twice as large
    assert {part.size for part in modalities(out).values()} == {(32, 40)}
    assert float(out["flow"].data.abs().max()) == pytest.approx(2 * float(item["flow"].data[..., 4:20, 6:26].abs().max()), rel=1e-4)


def test_flip_turns_u_and_nothing_else():
    item = _item()
    out = apply_crop(item, Crop(0, 0, 24, 32, True), (24, 32))
    assert torch.equal(out["flow"].data[:, 0], -item["flow"].data[:, 0].flip(-1)) and torch.equal(out["flow"].data[:, 1], item["flow"].data[:, 1].flip(-1))
    assert torch.equal(out["depth"].data, item["depth"].data.flip(-1)) and torch.equal(out["video"].data, item["video"].data.flip(-1))


def test_unknown_flow_stays_unknown_and_does_not_spread():
    item = _item()
    item["flow"].data[0, :, 3, 5] = math.nan
    out = apply_crop(item, Crop(0, 0, 24, 32, False), (24, 32))
    assert int(torch.isnan(out["flow"].data).sum()) == 2


def test_crops_and_sizes_depend_on_the_generator_alone():
    draw = lambda i: draw_crop((48, 64), (32, 32), generator(0, "crop", i))
    assert draw(3) == draw(3) and len({draw(i) for i in range(20)}) > 15
    sizes = [draw_size(512 * 512, generator(0, "size", i)) for i in range(100)]
    assert len(set(sizes)) > 20 and all(h % 8 == w % 8 == 0 and 0.8 < h * w / 512**2 < 1.2 and 1 / 1.6 < h / w < 1.6 for h, w in sizes)


def test_mismatched_pairs_are_refused():
    item = _item()
    with pytest.raises(InputError, match="sizes"): check_item(item | {"depth": Depth(torch.ones(3, 1, 8, 8), "metric")})
    with pytest.raises(InputError, match="frames"): check_item(item | {"depth": item["depth"][:2]})
    with pytest.raises(InputError, match="no modality"): check_item(dict(fps=1, caption=None, id="x"))


@pytest.mark.parametrize("kind", FLOW_KINDS)
def test_flow_codecs_are_reversible(kind):
    flow, codec = Flow(torch.randn(3, 2, 16, 24, generator=torch.Generator().manual_seed(1)) * 0.5, "forward"), FlowCodec(kind)
    picture = codec.encode(flow)
    assert len(picture) == 4 and torch.equal(picture.data[3], picture.data[2])
    assert (codec_from_dict(codec.to_dict()).decode(picture).data - flow.data).abs().max() < 1e-4
    errors = round_trip(codec, flow, identity_vae(video=True))
    assert errors["codec"] < 1e-4 < errors["byte"] < 0.1 and errors["vae"] < errors["byte"]


def test_flow_codec_refuses_what_it_cannot_keep():
    flow = Flow(torch.zeros(1, 2, 8, 8), "backward")
    with pytest.raises(InputError, match="backward"): FlowCodec().encode(flow)
    with pytest.raises(InputError, match="unknown"): FlowCodec().encode(Flow(torch.full((1, 2, 8, 8), math.nan), "forward"))
    assert FlowCodec().clipped(Flow(torch.full((1, 2, 8, 8), 99.0), "forward")) == 1
    with pytest.raises(InputError, match="at least two"): FlowCodec().decode(Frames(torch.zeros(1, 3, 8, 8), "signed"))


def test_constant_depth_is_grey_and_comes_back():
    wall = Depth(torch.full((2, 1, 8, 8), 4.0), "metric")
    codec = DepthCodec().fit(wall)
    assert float(codec.encode(wall).data.abs().max()) == 0 and torch.allclose(codec.decode(codec.encode(wall)).data, wall.data)
    with pytest.raises(InputError, match="known depth"): DepthCodec().fit(Depth(torch.full((1, 1, 4, 4), math.nan), "metric"))


def test_near_is_bright_and_unknown_is_far():
    depth = Depth(torch.tensor([[[[1.0, 2.0, math.nan, 8.0]]]]), "metric")
    assert DepthCodec().encode(depth).data[0, 0, 0].tolist() == pytest.approx([1.0, 2 * (0.5 - 0.125) / 0.875 - 1, -1.0, -1.0])
    with pytest.raises(InputError, match="unknown"): DepthCodec(unknown="refuse").encode(depth)


def test_coded_files_are_lossless_to_16_bits(tmp_path):
    depth = Depth(1 + 5 * torch.rand(2, 1, 12, 10), "metric")
    save_coded(tmp_path, DepthCodec().fit(depth), depth)
    assert torch.allclose(load_coded(tmp_path).data, depth.data, rtol=1e-3)
    (tmp_path/"00001.png").unlink()
    with pytest.raises(InputError, match="00001.png"): load_coded(tmp_path)


def _pictures(folder, names, size=(12, 10)):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names): to_pil(Frames(torch.full((1, 3, *size), i / 10), "unit")).save(folder/name)


def test_image_folder_pairs_by_stem_and_lists_what_it_skips(tmp_path):
    _pictures(tmp_path/"rgb", ["a.png", "b.jpg"])
    (tmp_path/"depth").mkdir()
    cv2.imwrite(str(tmp_path/"depth"/"a.png"), np.full((12, 10), 2500, np.uint16))
    (tmp_path/"rgb"/"metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "grey"}) + "\n")
    source = image_folder(tmp_path/"rgb", tmp_path/"depth")
    assert len(source) == 1 and "b.jpg" in source.skipped and source[0]["caption"] == "grey" and float(source[0]["depth"].data[0, 0, 0, 0]) == pytest.approx(2.5)
    plain = image_folder(tmp_path/"rgb")
    assert plain[1]["caption"] is None
    with pytest.raises(InputError, match="no caption"): captions(plain, "refuse", lambda p: None)
    assert len(captions(plain)) == len(plain)                                                  # without a function items are asked themselves
    with pytest.raises(InputError, match="1 of 2 items have no caption"): captions(plain, "refuse")
    class Entry:
        def __eq__(self, other): raise AssertionError("entries are compared")                  # of 20,000 each with each took seconds, of a million hours
    entries = [Entry(), Entry(), Entry()]
    kept = captions(Source(entries, None), "drop", lambda e: None if e is entries[1] else "told").entries
    assert len(kept) == 2 and kept[0] is entries[0] and kept[1] is entries[2]
    cv2.imwrite(str(tmp_path/"depth"/"a.png"), np.full((6, 10), 2500, np.uint16))
    with pytest.raises(InputError, match="sizes"): source[0]


def test_long_folders_and_tables_are_compared_once(tmp_path, monkeypatch):
    "Every entry against every other would take minutes for a table of 100,000."
    (tmp_path / "images").mkdir(), (tmp_path / "depth").mkdir()
    for i in range(200): (tmp_path / f"images/{i}.png").touch()
    for i in range(0, 200, 2): (tmp_path / f"depth/{i}.png").touch()
    entries, compared, equal = [(tmp_path / f"{'images' if i % 2 else 'gone'}/{i}.png", 0.0, None, str(i)) for i in range(200)], [], PurePath.__eq__
    monkeypatch.setattr(PurePath, "__eq__", lambda a, b: (compared.append(0), equal(a, b))[1])
    pictures, plain, clips = image_folder(tmp_path / "images", tmp_path / "depth"), image_folder(tmp_path / "images"), _videos(entries, 2, 1)
    assert len(compared) < 600
    assert [p.name for p in pictures.entries] == [f"{i}.png" for i in range(0, 200, 2)] and list(pictures.skipped) == [f"{i}.png" for i in range(1, 200, 2)]
    assert len(plain) == 200 and not plain.skipped
    assert [e[3] for e in clips.entries] == [str(i) for i in range(1, 200, 2)] and list(clips.skipped) == [str(i) for i in range(0, 200, 2)]


def test_depth_that_is_none_and_captions_of_editors(tmp_path):
    from PIL import Image
    grey = np.linspace(20, 230, 48).reshape(6, 8).astype(np.uint8)
    cv2.imwrite(str(tmp_path/"jet.png"), cv2.applyColorMap(grey, cv2.COLORMAP_JET))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path/"metres.tif")
    for name, says in {"jet.png": "coloured picture", "metres.tif": "float32 numbers"}.items():
        with pytest.raises(InputError, match=f"{name}.*{says}"): read_depth(tmp_path/name)
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path/"rgb.png")
    Image.fromarray(grey).save(tmp_path/"grey.png")
    assert torch.equal(read_depth(tmp_path/"rgb.png").data, read_depth(tmp_path/"grey.png").data)
    table = tmp_path/"metadata.jsonl"
    table.write_text('{"file_name": "rgb.png", "text": "one\u2028two"}\r\n\r\n', encoding="utf-8-sig")
    assert image_folder(tmp_path/"rgb.png", captions=table)[0]["caption"] == "one\u2028two"
    table.write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match="no file_name.*line 1"): image_folder(tmp_path/"rgb.png", captions=table)


def test_voc_rows(tmp_path):
    _pictures(tmp_path, ["1.jpg", "d1.png"])
    (tmp_path/"train.json").write_text(json.dumps([{"image": "1.jpg", "depth": "d1.png", "caption": ["a dog"]}, {"image": "1.jpg", "caption": "x"}]))
    source = voc_json(tmp_path/"train.json")
    assert len(source) == 1 and source[0]["caption"] == "a dog" and source.skipped == {"1": "no column depth"}


def test_panda_rows_clip_by_clip(tmp_path):
    table = tmp_path/"panda.csv"
    table.write_text('videoID,url,timestamp,caption,matching_score\nabc,u,"[[\'0:00:01.500\', \'0:00:03.000\'], [\'0:01:00.000\', \'0:01:02.000\']]","[\'a cat\']","[0.4, 0.5]"\n'
                     'bad,u,"[[",[],[]\n')
    clips, bad = read_panda(table)
    assert [(c.id, c.start, c.caption) for c in clips] == [("abc_0", 1.5, "a cat"), ("abc_1", 60.0, None)] and list(bad) == [3]
    table.write_text("videoID,url\n")
    with pytest.raises(InputError, match="timestamp"): read_panda(table)


def test_a_panda_clip_ends_where_the_table_says(tmp_path):
    "A second shot begins at 1 s: no frame of it belongs to the first clip."
    shots = torch.cat([torch.zeros(10, 3, 16, 16), torch.ones(10, 3, 16, 16)])
    write_video(tmp_path/"abc.mp4", Frames(shots, "unit"), fps=10)
    (tmp_path/"panda.csv").write_text('videoID,url,timestamp,caption,matching_score\nabc,u,"[[\'0:00:00.700\', \'0:00:01.000\'], [\'0:00:01.000\', \'0:00:02.000\']]",[],[]\n')
    first, second = (lambda i, frames=frames: panda_videos(tmp_path/"panda.csv", tmp_path, frames, 1)[i] for frames in (3, 4))
    assert float(first(0)["video"].unit().data.max()) < 0.1 and float(second(1)["video"].unit().data.min()) > 0.9
    with pytest.raises(InputError, match="from 0.7 to 1 s has 3 frames, 4 are needed"): second(0)


def test_a_clip_of_variable_rate_is_what_was_on_screen(tmp_path):
    times = phone_video(tmp_path/"abc.mp4")
    fps = probe(tmp_path/"abc.mp4").fps
    item = video_folder(tmp_path, frames=9, stride=3)[0]
    assert item["video"].data[:, 0, 0, 0].tolist() == [shown(times, 3 * k / fps) for k in range(9)]
    assert item["fps"] == item["video"].fps == pytest.approx(fps / 3)                       # the clip has a rate, as of its mean
    for cut in range(15, 45):                                                               # shots of one picture each
        start, end = (f"0:00:0{time:.3f}" for time in times[cut:cut + 13:12])
        (tmp_path/"panda.csv").write_text(f"""videoID,url,timestamp,caption,matching_score\nabc,u,"[['{start}', '{end}']]",[],[]\n""")
        seen = panda_videos(tmp_path/"panda.csv", tmp_path, 3, 1)[0]["video"].data[:, 0, 0, 0].tolist()
        first = math.ceil(times[cut] * fps)
        assert seen == [shown(times, (first + k) / fps) for k in range(3)] and seen[0] >= shown(times, times[cut]) and seen[-1] < shown(times, times[cut + 12])
    with pytest.raises(InputError, match="frames, 119 are needed"): video_folder(tmp_path, frames=60, stride=2)[0]


def test_short_and_mixed_videos_say_so(tmp_path):
    write_video(tmp_path/"one.mp4", Frames(torch.zeros(1, 3, 16, 16), "unit"), fps=8)
    with pytest.raises(InputError, match="1 frames, 3 are needed"): video_folder(tmp_path, frames=3)[0]
    with pytest.raises(InputError, match="at least two"): video_folder(tmp_path, frames=1)[0]
    _pictures(tmp_path/"frames", ["0.png", "1.png"])
    _pictures(tmp_path/"frames", ["2.png"], (20, 10))
    with pytest.raises(InputError, match="differ in size"): video_folder(tmp_path/"frames", frames=3)[0]
    with pytest.raises(InputError, match="no pictures"): image_folder(tmp_path/"nothing")


def test_webvid_takes_what_is_on_disk(tmp_path):
    table = tmp_path/"webvid.csv"
    table.write_text("videoid,contentUrl,duration,page_dir,name\n1,https://a.b/1.mp4,PT00H00M05S,x,a hill\n2,https://a.b/2.mp4,PT00H00M05S,x,a lake\n3,https://a.b/3.mp4,PT5S,x,\n")
    write_video(tmp_path/"1.mp4", Frames(torch.rand(4, 3, 16, 16), "unit"), fps=8)
    source = webvid_videos(table, tmp_path, frames=2, stride=2)
    assert len(source) == 1 and source[0]["caption"] == "a hill" and source[0]["fps"] == 4 and set(source.skipped) == {"2", "line 4"}


def test_world_items_are_pairs():
    item = world_items([0], (16, 24), frames=3)[0]
    assert item["flow"].data.shape == (2, 2, 16, 24) and item["video"].data.shape == (3, 3, 16, 24) and item["caption"]


def test_what_does_not_load_is_listed(tmp_path):
    "Stock from_pretrained warns and draws what is missing at random."
    shutil.copytree(tiny_path("joint")/"image_depth", tmp_path/"sd")
    file = next((tmp_path/"sd"/"unet").glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name != "conv_in.bias"}, file)
    with pytest.raises(InputError, match=r"1 missing \(first: conv_in.bias\)"): load_sd(tmp_path/"sd")
    save_file(tensors | {"conv_new.bias": torch.zeros(4)}, file)
    with pytest.raises(InputError, match=r"1 unexpected \(first: conv_new.bias\)"): load_sd(tmp_path/"sd")
    save_file(tensors | {"conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(InputError, match="conv_in.bias"): load_sd(tmp_path/"sd")
    with pytest.raises(InputError, match="an? UNetSpatioTemporalConditionModel is needed"): load_svd(tmp_path/"sd")


def test_model_folders_are_refused_when_incomplete(tmp_path):
    with pytest.raises(InputError, match="no folder unet"): load_sd(tmp_path)
    with pytest.raises(InputError, match="no folder unet"): load_svd(tmp_path)


@pytest.mark.parametrize("data", ["images", "voc"])
def test_pictures_without_depth_are_looked_at(tmp_path, data):
    "PascalVOC comes without depth; a Depth Anything 3 may be given in place of a folder of it."
    from camflow.depth.da3_files import random_da3, save_da3
    from camflow.joint import controlnet_train, train
    for i in range(5): write_image(tmp_path/f"{i}.png", torch.randint(0, 256, (3, 28, 42), dtype=torch.uint8, generator=generator(i)))
    (tmp_path/"voc.json").write_text(json.dumps([{"image": f"{i}.png", "caption": "noise"} for i in range(5)]))
    save_da3(random_da3(), tmp_path/"da3")
    config = dict(batch_size=2, held_out=8, sample_steps=1, warmup=0, size=[16, 16], steps=1, data=data, folder=str(tmp_path), table=str(tmp_path/"voc.json"), depth=str(tmp_path/"da3"))
    full = train.configuration(config, train.DEFAULTS)
    item = train.open_items(full | dict(held_out=train.spared(full)))[0]
    assert item["depth"].size == (28, 42) and len(item["depth"]) == 1 and train.spared(full) == 1
    assert train.main(config | dict(rank=2), tmp_path/"run").step == 1 == controlnet_train.main(config | dict(family="sd"), tmp_path/"control").step


def test_pictures_need_depth_before_anything_is_loaded(tmp_path):
    from camflow.joint import controlnet_train, train
    for trainer in (train, controlnet_train):
        with pytest.raises(InputError, match="Depth Anything 3"): trainer.main(dict(data="images", folder=str(tmp_path), family="sd"), tmp_path/"run")

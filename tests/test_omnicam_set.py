"Training of OmniCam from what omnicam_cache left: the same batches as from the files, exact resume, several shapes, what does not fit."
import json
import os
from pathlib import Path

import pytest
import torch

from camflow.files import InputError
from camflow.geometry.script import Segment, script_text
from camflow.training.checkpoint import load_checkpoint
from camflow.wan import omnicam_cache, omnicam_train
from camflow.wan.omnicam_clips import file_latents, read_items
from camflow.wan.omnicam_set import BatchOrder, cached_clips

REAL = Path(os.environ.get("CAMFLOW_REAL", Path(__file__).resolve().parents[2]/"shared/real"))/"omnicam"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here (CAMFLOW_REAL)")
SCRIPT = script_text([Segment(0, 1, "high", "right", "stay")])
BASE = dict(data="cache", steps=4, batch_size=2, model={"num_layers": 1}, start="nothing", warmup=0, ema_decay=0.9)


def toml(folder, rows, **settings):
    "A data set file and its table."
    (folder/"metadata.jsonl").write_text("\n".join(json.dumps({"video_path": str(name), "caption": prompt}) for name, prompt in rows), encoding="utf-8")
    said = dict(video_jsonl_file="metadata.jsonl", cache_directory="musubi", resolution=[80, 48], enable_bucket=True, target_frames=[9]) | settings
    (folder/"set.toml").write_text("[[datasets]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in said.items()), encoding="utf-8")
    return str(folder/"set.toml")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A cache of wide and tall videos, two lengths of clip: four shapes."
    from camflow.media.frames import Frames
    from camflow.media.video import write_video
    torch.set_num_threads(1)
    folder, g = tmp_path_factory.mktemp("set"), torch.Generator().manual_seed(0)
    for n, size in enumerate([(48, 80), (48, 80), (80, 48)]):
        noise = torch.nn.functional.interpolate(torch.rand(14, 3, 6, 6, generator=g), size=size, mode="bilinear")
        write_video(folder/f"{n}.mp4", Frames((255 * noise).byte(), "byte"), 8)
    file = toml(folder, [(f"{n}.mp4", f"Object: Noise number {n}. ; Camera: {SCRIPT}") for n in range(3)], target_frames=[5, 13])
    done = omnicam_cache.main(dict(toml=file, cache_folder=str(folder/"cache"), workers=0), folder/"run")
    assert done["clips"] == 6
    return folder/"cache"


@real
def test_the_real_clip_is_trained_on_from_a_cache(tmp_path):
    "groundtruth.mp4 with its 114 poses: omnicam_cache, then the trainer; batches are those that the trainer makes from the files itself."
    torch.set_num_threads(1)
    (tmp_path/"cache_input").mkdir()
    file = toml(tmp_path/"cache_input", [(REAL/"groundtruth.mp4", "Object: A room. ; Caption: The camera moves according to the #trajectory:{/data/extrinsics_intrinsics.safetensors}.")],
                frame_extraction="uniform", frame_sample=3)
    done = omnicam_cache.main(dict(toml=file, camera_folders=[str(REAL)], cache_folder=str(tmp_path/"cache"), workers=0), tmp_path/"first")
    assert (done["clips"], done["encoded"], done["cameras"]) == (3, 3, 3)
    result = omnicam_train.main({**BASE, "steps": 2, "batch_size": 1, "cache_folder": str(tmp_path/"cache")}, tmp_path/"run")
    assert result.step == 2 and result.metrics["loss"] > 0

    (tmp_path/"metadata.jsonl").write_text(json.dumps({"video": str(REAL/"groundtruth.mp4"), "camera": str(REAL/"extrinsics_intrinsics.safetensors"), "text": "A room."}))
    model, vae, text, _ = omnicam_train.parts(omnicam_train.configuration(BASE | {"cache_folder": ""}, omnicam_train.DEFAULTS))
    files = file_latents(tmp_path/"files", read_items(tmp_path/"metadata.jsonl"), vae, text, frames=9, size=(48, 80), fps=0.0).batch([0], (6, 10))
    cached = cached_clips(tmp_path/"cache", model)
    first = [n for n, row in enumerate(cached.rows) if row["frames"][0] == 0]
    for name, a, b, atol in zip(("latents", "image", "rays", "text"), files, cached.batch(first), (2e-3, 2e-3, 1e-5, 1e-6)):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3, msg=lambda m: f"{name}: {m}")


def test_a_transformer_that_reads_the_warped_first_frame_is_refused(made):
    with pytest.raises(InputError, match="holds latents only"): cached_clips(made, omnicam_train.starting_model(start="nothing", num_layers=1, camera_warp=True))


def test_every_batch_has_one_shape_and_every_clip_comes(made):
    model = omnicam_train.starting_model(start="nothing", num_layers=1)
    clips = cached_clips(made, model, batch=2)
    assert len(clips.order.groups) == 4 and len(clips) == 2 * (1 + 1 + 1 + 1)
    seen = set()
    for start in range(0, len(clips), 2):
        chosen = clips.choose([start, start + 1], 5)
        seen |= set(chosen)
        target, image, rays, context, tokens = clips.batch(chosen)
        assert target.shape == image.shape and rays.shape == (2, 24, *target.shape[2:]) and context.shape[::2] == (2, 64) and tokens is None
        for n, c in enumerate(chosen): assert torch.equal(target[n], clips.cache[c]["latents"].float())
    assert seen == set(range(6))


def test_resume_from_a_cache_is_exact(made, tmp_path):
    config = {**BASE, "cache_folder": str(made)}
    whole = omnicam_train.main(config, tmp_path/"whole")
    for _ in range(5): pieces = omnicam_train.main({**config, "max_seconds": 1e-9}, tmp_path/"pieces")
    assert pieces.status == "done" and whole.step == pieces.step == 4
    a, b = (load_checkpoint(tmp_path/name/"checkpoints").tensors for name in ("whole", "pieces"))
    assert all(torch.equal(t, b[group][name]) for group in a for name, t in a[group].items())


def test_epochs_count_the_batches_of_every_shape(made, tmp_path):
    assert omnicam_train.main({**BASE, "epochs": 1, "batch_size": 4, "cache_folder": str(made)}, tmp_path/"run").step == 4


def test_orders_do_not_depend_on_the_ranks():
    order = BatchOrder([(3, 6, 10)] * 7 + [(3, 10, 6)] * 4, 2)
    alone = [order.at([n, n + 1], 3) for n in range(0, 3 * len(order), 2)]
    other = BatchOrder([(3, 6, 10)] * 7 + [(3, 10, 6)] * 4, 2)
    ranks = {start: other.at([start, start + 1], 3) for rank in (1, 0) for start in range(2 * rank, 3 * len(order), 4)}
    assert alone == [ranks[n] for n in sorted(ranks)] and alone != [order.at([n, n + 1], 4) for n in range(0, 3 * len(order), 2)]


def test_what_does_not_fit_is_refused(made, tmp_path):
    main = lambda **change: omnicam_train.main({**BASE, "cache_folder": str(made), **change}, tmp_path/"run")
    with pytest.raises(InputError, match="needs cache_folder"): main(cache_folder=None)
    with pytest.raises(InputError, match="run omnicam_cache first"): main(cache_name="other")
    with pytest.raises(InputError, match="width of texts 64, the transformer reads 32"): main(model={"num_layers": 1, "text_dim": 32})
    with pytest.raises(InputError, match="width of image tokens 32, the transformer reads 48"): main(model={"num_layers": 1, "image_dim": 48, "added_kv_proj_dim": 192})


def test_a_damaged_cache_is_named_and_redone(made, tmp_path):
    import shutil
    shutil.copytree(made.parent, tmp_path/"copy")
    cache, model = tmp_path/"copy/cache", omnicam_train.starting_model(start="nothing", num_layers=1)
    shard, *_ = sorted((cache/"clips").rglob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:len(data) // 2])
    with pytest.raises(InputError, match="unreadable.*fill the cache again"): cached_clips(cache, model)
    shard.unlink()
    with pytest.raises(InputError, match="clips are incomplete"): cached_clips(cache, model)
    shard.write_bytes(data[:len(data) // 2])
    done = omnicam_cache.main(dict(toml=str(tmp_path/"copy/set.toml"), cache_folder=str(cache), workers=0), tmp_path/"run")
    assert done["encoded"] > 0 and len(cached_clips(cache, model).rows) == 6

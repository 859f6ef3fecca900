"Bad input of the training and generation modules: one sentence that names the thing and the remedy, before anything is rendered or trained."
import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from camflow.depth import pose_train
from camflow.files import InputError
from camflow.training.checkpoint import from_folder
from camflow.training.config import TrainConfig
from camflow.wan import finetune, generate, vae_train
from camflow.wan.recam import ReCamTransformer3DModel, tiny_recam
from camflow.wan.vae import tiny_vae
from camflow.world.write import write_multicam


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A MultiCamVideo set, a folder of videos, untrained weights."
    folder = tmp_path_factory.mktemp("refusals")
    write_multicam(folder/"set", scenes=2, frames=9, cameras=2, val=False, size=(48, 80))
    (folder/"videos").mkdir()
    shutil.copy(folder/"set/train/f24_aperture5/scene1/videos/cam01.mp4", folder/"videos/a.mp4")
    tiny_vae(0).save_pretrained(folder/"vae")
    tiny_recam(0, num_layers=1).save_pretrained(folder/"recam")
    return folder


WORLD = dict(steps=1, batch_size=1, scenes=2, cameras=2, held_out=2, vae="{place}/vae", transformer="{place}/recam")
SET = {**WORLD, "data": "multicam", "root": "{place}/set"}
GENERATE = dict(videos="{place}/videos", size=[48, 80], frames=9, steps=1, guidance=1.0, preset="pan_left")
CASES = [
    (finetune, WORLD, dict(cameras=1), "cameras=1 must be at least 2"), (finetune, WORLD, dict(held_out=0), "held_out=0"), (finetune, WORLD, dict(shift=-1), "shift=-1 must be above 0"),
    (finetune, WORLD, dict(trained="lora", lora_rank=0), "lora_rank=0"), (finetune, WORLD, dict(data="multicam"), "needs root"), (finetune, WORLD, dict(lr=-1), "lr=-1 must be at least 0"),
    (finetune, WORLD, dict(log_every=0), "log_every=0"), (finetune, WORLD, dict(ema_decay=1.0), "ema_decay=1.0"),
    (finetune, SET, dict(focal="f99"), "no folder 'f99'"), (finetune, SET, dict(vae="/nowhere"), "config.json is not there"), (finetune, SET, dict(transformer="{place}/vae"), "holds a AutoencoderKLWan"),
    (finetune, SET, dict(text_encoder="/nowhere"), "no folder tokenizer"), (finetune, SET, dict(frames=81), "frames 0..80 wanted, 9 there"),
    (vae_train, {}, dict(short_frames=4), "short_frames=4 must be 1, 5 or 9"), (vae_train, {}, dict(held_out=0), "held_out=0"),
    (pose_train, {}, dict(items=0), "items=0"), (pose_train, {}, dict(items=1, clips=2, vae="/nowhere"), "config.json is not there"),
    (generate, GENERATE, dict(batch=0), "batch=0"), (generate, GENERATE, dict(limit=-1), "limit=-1"), (generate, GENERATE, dict(frames=10), "4k . 1"), (generate, GENERATE, dict(preset="pan_lfet"), "choose 1..10"),
    (generate, GENERATE, dict(prompts={"z.mp4": "a dog"}), "'z.mp4' is not among the videos"), (generate, GENERATE, dict(trajectory="{place}/short.json"), "8 poses for 9 frames; .*short.json"),
    (generate, GENERATE, dict(trajectory="{place}/list.json"), "list.json has no frame0"), (generate, GENERATE, dict(videos="{place}/twice"), "'a' in several formats"),
    (generate, GENERATE, dict(frames=81, skip_bad=True), "no video can be used; .*a.mp4"), (generate, GENERATE, dict(out="{place}/videos/a.mp4"), "out: .*a.mp4 is a file"),
]


@pytest.mark.parametrize("module, base, change, words", CASES, ids=[f"{module.__name__.split('.')[-1]} {' '.join(change)} {number}" for number, (module, _, change, _) in enumerate(CASES)])
def test_refused(place, tmp_path, module, base, change, words):
    poses = json.loads((place/"set/train/f24_aperture5/scene1/cameras/camera_extrinsics.json").read_text())
    (place/"short.json").write_text(json.dumps({name: row for name, row in poses.items() if name != "frame8"}))
    (place/"list.json").write_text("[]")
    (place/"twice").mkdir(exist_ok=True)
    for name in ("a.mp4", "a.mov"): shutil.copy(place/"videos/a.mp4", place/"twice"/name)
    config = {k: v.format(place=place) if isinstance(v, str) else v for k, v in {**base, **change}.items()}
    with pytest.raises(InputError, match=words): module.main(config, tmp_path)


def test_a_clip_of_variable_rate_is_what_was_on_screen(tmp_path):
    "A phone's video with held frames: the clip has the rate that was asked for, and shows what a player shows at that time."
    import av
    import numpy as np
    from fractions import Fraction
    with av.open(str(tmp_path/"phone.mp4"), "w") as out:
        stream, time = out.add_stream("libx264", rate=30), 0
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = 48, 80, "yuv420p", Fraction(1, 30)
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 80, 3), 10 * i, np.uint8), format="rgb24")
            frame.pts, time = time, time + (1 if i < 10 else 3)
            for packet in stream.encode(frame): out.mux(packet)
        for packet in stream.encode(): out.mux(packet)
    assert generate.clip_frames(tmp_path/"phone.mp4", 9, 10.0) == [0, 3, 6, 9, 10, 11, 12, 13, 14]
    clip = generate.source_clip(tmp_path/"phone.mp4", 9, (48, 80), 10.0)
    assert clip.fps == 10 and (clip.data.float().mean((1, 2, 3)) / 10).round().tolist() == [0, 3, 6, 9, 10, 11, 12, 13, 14]
    with pytest.raises(InputError, match="20 frames in 1.2. s, a clip of 17 at 10 a second needs 1.70 s"): generate.clip_frames(tmp_path/"phone.mp4", 17, 10.0)
    assert generate.source_clip(tmp_path/"phone.mp4", 9, (48, 80)).fps == pytest.approx(19 / (37 / 30)) # the file's own mean, not a guess


def test_damaged_set_is_refused_before_the_work_or_left_out_and_listed(place, tmp_path):
    shutil.copytree(place/"set", tmp_path/"set")
    video = tmp_path/"set/train/f24_aperture5/scene1/videos/cam02.mp4"
    video.write_bytes(video.read_bytes()[:200])
    config = {k: v.format(place=place) if isinstance(v, str) else v for k, v in SET.items()} | {"root": str(tmp_path/"set"), "scenes": 1}
    with pytest.raises(InputError, match="1 items of .* cannot be used, first: .*scene1/videos/cam02.mp4"): finetune.main(config, tmp_path/"run")
    assert not (tmp_path/"run").exists() or not list((tmp_path/"run").rglob("*.safetensors"))
    assert finetune.main({**config, "skip_bad": True}, tmp_path/"run").step == 1
    assert "cam02" in json.loads((tmp_path/"run/skipped.json").read_text())[0]


def test_weights_are_complete_or_refused(place, tmp_path):
    shutil.copytree(place/"recam", tmp_path/"recam")
    file = tmp_path/"recam/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "cam_encoder.bias" not in name}, file)
    with pytest.raises(InputError, match=r"1 missing \(first: blocks.0.cam_encoder.bias\)"): from_folder(ReCamTransformer3DModel, tmp_path/"recam")
    save_file({**tensors, "blocks.0.cam_encoder.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match="cam_encoder.weight"): from_folder(ReCamTransformer3DModel, tmp_path/"recam")


def test_training_starts_from_plain_wan(place, tmp_path):
    "ReCamMaster's own start: Wan text-to-video weights, camera layers that change nothing yet."
    WanTransformer3DModel(patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=64, freq_dim=32, ffn_dim=64, num_layers=1).save_pretrained(tmp_path/"wan")
    model = finetune.starting_model(tmp_path/"wan", torch.float32)
    assert isinstance(model, ReCamTransformer3DModel) and not model.blocks[0].cam_encoder.weight.any()


def test_another_checkpoint_is_refused(place, tmp_path):
    "A run's weights fit its own architecture only, also where the checkpoint has less than the model."
    config = {k: v.format(place=place) if isinstance(v, str) else v for k, v in SET.items()}
    finetune.main(config, tmp_path)
    with pytest.raises(InputError, match="another architecture.*missing"): finetune.load_trained(tmp_path, tiny_recam(0, num_layers=2))
    with pytest.raises(InputError, match="another architecture.*of another shape"): finetune.load_trained(tmp_path, tiny_recam(0, num_layers=1, ffn_dim=64))
    assert finetune.load_trained(tmp_path, tiny_recam(0, num_layers=1)).step == 1


def test_size_and_length_of_world_clips_are_as_asked(place, tmp_path):
    config = finetune.configuration({**{k: v.format(place=place) if isinstance(v, str) else v for k, v in WORLD.items()}, "frames": 5, "size": [32, 48], "held_out": 1}, finetune.DEFAULTS)
    scenes = finetune.datasets(config, tmp_path)[3]
    assert len(scenes.latents[0]) == 2 and scenes.latents[0][0].shape == (16, 2, 4, 6)


def test_train_config_refuses_what_cannot_run():
    for name, value in dict(steps=0, keep=0, lr=-1.0, warmup=-1, checkpoint_every=-1).items():
        with pytest.raises(InputError, match=f"{name}={value}"): TrainConfig(**{name: value})

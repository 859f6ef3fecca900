"""OmniCam: what trains, exact resume, the camera in eval mode, bad input, real files, the shipped tiny weights."""
import json
import os
from pathlib import Path

import pytest
import torch

from camflow.assets import tiny_path
from camflow.files import InputError
from camflow.geometry.script import Segment, script_text
from camflow.training.checkpoint import load_checkpoint
from camflow.wan import omnicam_generate, omnicam_train
from camflow.wan.i2v_condition import read_first_frame
from camflow.wan.omnicam import OmniCamTransformer3DModel, camera_rays
from camflow.wan.omnicam_clips import FileItem, file_latents, lens, read_items, world_latents
from camflow.wan.omnicam_train import compare, main, prepare_trained, sample, starting_model, trained_model
from camflow.wan.text import build_tiny_text
from camflow.wan.vae import tiny_vae

REAL = Path(os.environ.get("CAMFLOW_REAL", Path(__file__).resolve().parents[2]/"shared/real"))/"omnicam"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here (CAMFLOW_REAL)")
SCRIPT = script_text([Segment(0, 1, "high", "right", "stay")])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Configuration for runs of seconds."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("omnicam")
    return dict(steps=4, batch_size=2, scenes=3, cameras=2, held_out=2, validation_clips=2, sample_steps=2, model={"num_layers": 1}, start="nothing",
        warmup=0, ema_decay=0.9, cache_folder=str(folder/"cache"))


def test_loss_is_the_formula():
    model, g = starting_model(start="nothing", num_layers=1), torch.Generator().manual_seed(0)
    target, image, noise = (torch.randn(2, 16, 3, 6, 10, generator=g) for _ in range(3))
    rays, context, level = torch.randn(2, 24, 3, 6, 10, generator=g), torch.randn(2, 8, 64, generator=g), torch.tensor([0.3, 0.9])
    ours = omnicam_train.flow_loss(model, target, image, rays, context, None, noise, level)
    for i in range(2):  # one by one, as the spec writes it: x_t = (1-t) x0 + t eps, target eps - x0, noisy latents, mask and image latents together
        x = (1 - level[i]) * target[i] + level[i] * noise[i]
        mask = torch.cat([torch.ones(4, 1, 6, 10), torch.zeros(4, 2, 6, 10)], 1)
        v = model(torch.cat([x, mask, image[i]])[None], 1000 * level[i:i + 1], context[i:i + 1], camera=rays[i:i + 1]).sample[0]
        torch.testing.assert_close(ours[i], (v - (noise[i] - target[i])).square().mean(), atol=1e-5, rtol=1e-4)


def test_every_tensor_of_the_optimizer_changes(base, tmp_path):
    "LoRA and adapter are in the optimizer, nothing else is, and one step after the gates open all of them have moved."
    result = main({**base, "steps": 3, "batch_size": 4, "trainable_modules": ["lora_", "camera_"], "lora_rank": 2, "muon": [], "text_dropout": 0.,
        "camera_dropout": 0.}, tmp_path/"run")
    held = {id(p) for group in result.loop.optimizer.param_groups for p in group["params"]}
    named = dict(result.loop.bare.named_parameters())
    assert {name for name, p in named.items() if id(p) in held} == {name for name in named if "lora_" in name or any(part.startswith("camera_")
        for part in name.split("."))}
    fresh = starting_model(start="nothing", num_layers=1)
    names = prepare_trained(fresh, ["lora_", "camera_"], 2, 0)
    start = dict(fresh.named_parameters())
    still = [name for name in names if torch.equal(named[name], start[name])]
    assert set(names) == {name for name, p in named.items() if p.requires_grad} and still == [], still
    assert all(torch.equal(named[name], p) for name, p in start.items() if name not in names)
    assert len(names) == 2 * 10 + len([n for n in names if "camera_" in n and "lora_" not in n])  # 4 + 4 attention and 2 feed-forward layers, two matrices each


def test_published_start_trains_gates_first(base, tmp_path):
    "Wan weights with an untrained camera: gates and input term open in the first step, what is behind them follows."
    from camflow.wan.omnicam import tiny_omnicam
    plain = tiny_omnicam(0, num_layers=1, image_dim=None, added_kv_proj_dim=None)
    plain.save_pretrained(tmp_path/"model")
    config = {**base, "model": {}, "transformer": str(tmp_path/"model"), "trainable_modules": ["camera_"], "muon": [], "camera_dropout": 0.}
    one, two = (main({**config, "steps": n}, tmp_path/f"run{n}").loop.bare for n in (1, 2))
    start = dict(plain.named_parameters())
    moved = lambda model: {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert "blocks.0.camera_gate" in moved(one) and "camera_input.weight" in moved(one) and "blocks.0.camera_attn.to_v.weight" in moved(two)
    assert all("camera_" in n for n in moved(two))


def test_resume_is_exact(base, tmp_path):
    whole = main(base, tmp_path/"whole")
    for _ in range(5): pieces = main({**base, "max_seconds": 1e-9}, tmp_path/"pieces")
    assert pieces.status == "done"
    a, b = (load_checkpoint(tmp_path/name/"checkpoints").tensors for name in ("whole", "pieces"))
    assert all(torch.equal(t, b[group][name]) for group in a for name, t in a[group].items()) and whole.step == pieces.step == 4


def test_the_world_is_rendered_once(base, tmp_path):
    config = omnicam_train.configuration(base, omnicam_train.DEFAULTS)
    _, vae, clips, _, truth = omnicam_train.datasets(config, tmp_path)
    text = omnicam_train.parts(config)[2]
    before = {p.name: p.stat().st_mtime_ns for p in Path(base["cache_folder"]).rglob("*.safetensors")}
    again = world_latents(Path(base["cache_folder"]), vae, text, 0, 3, 2)
    assert torch.equal(again.held["latents"], clips.held["latents"]) and truth.shape == (2, 3, 9, 48, 80)
    assert before == {p.name: p.stat().st_mtime_ns for p in Path(base["cache_folder"]).rglob("*.safetensors")}
    with pytest.raises(InputError, match="other cameras"): world_latents(Path(base["cache_folder"]), vae, text, 0, 3, 3)


def test_paths_do_not_collide_with_held_out():
    with pytest.raises(InputError, match="belongs to training"):
        from camflow.wan.omnicam_evaluate import script_cases, scripted
        scripted(script_cases(1), first=5)


def test_a_script_alone_is_compared_with_the_way_back():
    "The wrong camera is another one's; of one clip it would be its own."
    from camflow.wan.omnicam_evaluate import script_cases, scripted
    clips = scripted(script_cases(1), frames=5, size=(16, 32))
    assert abs(clips.wrong_MT44[0, -1] - clips.c2w_MT44[0, -1]).max() > 0.1


@pytest.mark.parametrize("change, words", [
    ({"data": "files"}, "needs items"), ({"frames": 8}, r"4k \+ 1"), ({"size": [50, 80]}, "multiples of"), ({"camera_dropout": 1.5}, "no share"),
    ({"lora_rank": 2}, r"muon=\[\]"),
    ({"timesteps": "flux"}, "timestep rule"), ({"timesteps": "qinglong_flux"}, "mixes several"), ({"weighting": "snr"}, "weighting 'snr'"), ({"shfit": 3.0}, "shfit"), ({"trainable_modules": ["kamera"]}, "names no parameter"),
    ({"start": "wan"}, "'recam' or 'nothing'"),
    ({"offload": "disk"}, "give 'block'"), ({"storage": "fp8"}, "float8_e4m3fn"), ({"storage": "float8_e4m3fn"}, "type of frozen weights.*trains them"), ({"text_encoder": "nowhere"}, "no folder tokenizer")])
def test_bad_settings(base, tmp_path, change, words):
    with pytest.raises(InputError, match=words): main({**base, **change}, tmp_path)


# ---- files

@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "A video of 12 frames with its camera file."
    from camflow.media.frames import Frames
    from camflow.media.video import write_video
    from camflow.world.clips import scene_clips
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp("room")
    clips = scene_clips(3, 1, frames=12)
    write_video(folder/"room.mp4", Frames(torch.from_numpy(clips.frames_NT3HW[0]), "byte", 8.0))
    w2c = torch.linalg.inv(torch.from_numpy(clips.c2w_NT44[0])).contiguous()
    save = lambda name, poses: save_file({"extrinsics": poses.contiguous().clone(), "intrinsics": lens((48, 80))}, folder/f"{name}.safetensors")
    bent = w2c.clone()
    bent[4, :3, :3] *= 1.2
    for name, poses in (("good", w2c), ("short", w2c[:10]), ("long", torch.cat([w2c, w2c[-1:]])), ("bent", bent)): save(name, poses)
    return folder


@pytest.mark.parametrize("name, words", [("short", "10 poses for 12 frames"), ("long", "13 poses for 12 frames"),
    ("bent", "frame 4.*orthonormal|orthonormal.*frame 4"), ("none", "not found")])
def test_camera_files_that_do_not_fit(room, name, words):
    with pytest.raises(InputError, match=words): FileItem(str(room/"room.mp4"), "", str(room/f"{name}.safetensors")).clip(5, (48, 80))


def test_files_train_and_equal_stems_stay_apart(room, base, tmp_path):
    import shutil
    for name in ("a", "b"):
        (tmp_path/name).mkdir()
        shutil.copy(room/"room.mp4", tmp_path/name/"room.mp4")
    lines = [{"video": "a/room.mp4", "camera": str(room/"good.safetensors"), "text": "a room"}, {"video": "b/room.mp4", "script": SCRIPT,
        "text": "words " * 5000}]
    (tmp_path/"metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = main({**base, "data": "files", "items": str(tmp_path/"metadata.jsonl"), "fps": 8.0, "cache_folder": None, "epochs": 2, "batch_size": 1,
        "frames": 9}, tmp_path/"run")
    assert result.step == 4 and len(read_items(tmp_path/"metadata.jsonl")) == 2                    # 2 epochs of 2 clips
    with pytest.raises(InputError, match="line 1"):
        (tmp_path/"bad.jsonl").write_text('{"video": "c/room.mp4", "script": "x"}')
        read_items(tmp_path/"bad.jsonl")


def test_a_clip_may_have_several_texts(room, tmp_path):
    item = lambda text: FileItem(str(room/"room.mp4"), text, str(room/"good.safetensors"))
    words = ["a room", "a chair in a room", "a room"]                                              # said twice is one item
    clips = file_latents(tmp_path, [item(text) for text in words], tiny_vae(), build_tiny_text(words), frames=5, size=(48, 80), fps=8.0)
    assert clips.captions == words[:2] and len(clips) == len(set(clips.keys)) + 1 == 2
    latents, *_, text, _ = clips.batch([0, 1], (6, 10))
    assert torch.equal(latents[0], latents[1]) and not torch.equal(text[0], text[1])


@real
def test_real_camera_file_is_loaded_cached_and_trained_on(base, tmp_path):
    "114 poses of a real camera with its video: same frames, one focal length, a few steps."
    from camflow.geometry.camera import Cameras
    item = FileItem(str(REAL/"groundtruth.mp4"), "a room", str(REAL/"extrinsics_intrinsics.safetensors"))
    frames, cameras = item.clip(9, (48, 80), 8.0)
    stored = Cameras.from_omnicam(REAL/"extrinsics_intrinsics.safetensors", (1088, 1920), 114).relative()
    torch.testing.assert_close(cameras.c2w, stored.c2w[[3 * k for k in range(9)]])                     # 23.98 fps, every third frame
    assert frames.size == (48, 80) and abs(cameras.K[0, 0, 0] / cameras.K[0, 1, 1] - 1) < 0.02 and cameras.c2w[0].allclose(torch.eye(4, dtype=torch.float64),
        atol=1e-9)
    (tmp_path/"metadata.jsonl").write_text(json.dumps({"video": str(REAL/"groundtruth.mp4"), "camera": str(REAL/"extrinsics_intrinsics.safetensors"),
        "text": "a room"}))
    result = main({**base, "data": "files", "items": str(tmp_path/"metadata.jsonl"), "fps": 8.0, "cache_folder": None, "steps": 4}, tmp_path/"run")
    assert result.step == 4 and result.metrics["loss"] > 0
    clips = file_latents(tmp_path/"run/cache", read_items(tmp_path/"metadata.jsonl"), *omnicam_train.parts(omnicam_train.configuration(base,
        omnicam_train.DEFAULTS))[1:3], frames=9, size=(48, 80), fps=8.0)
    assert clips.batch([0], (6, 10))[0].shape == (1, 16, 3, 6, 10)


# ---- generation

def generator_of(layers=1):
    return omnicam_generate.Generator(starting_model(start="nothing", num_layers=layers), tiny_vae(0), build_tiny_text(["a room with a box"]))


@pytest.mark.parametrize("change, words", [
    ({"images": []}, "no images"), ({"images": ["none.png"]}, "no image at"), ({"cameras": []}, "no cameras"), ({"cameras": ["<starttime>0</starttime>"]},
    "segment 1"), ({"cameras": ["jump about"]}, "clause|sentence"),
    ({"output": "gif"}, "one of video, latent, both"), ({"solver": "ddim"}, "one of unipc"), ({"texts": {"x.png": "a"}}, "not among the images"),
    ({"frames": 10}, r"4k \+ 1"), ({"fov": 190}, "between 0 and 180"), ({"guidence": 1}, "guidence"), ({"detail": -0.1}, "detail=-0.1"), ({"detail": 0.1}, "detail comes from"), ({"warp_start": 0.0}, "no noise level"),
    ({"guidance": 1.0, "slg_layers": [0]}, "need guidance"), ({"guidance": 3.0, "slg_layers": [9]}, "no block 9")])
def test_bad_requests(tmp_path, change, words):
    from PIL import Image
    Image.new("RGB", (80, 48), "red").save(tmp_path/"red.png")
    config = {"images": [str(tmp_path/"red.png")], "cameras": [SCRIPT], "size": [48, 80], "frames": 9, "fps": 8.0, "steps": 1, **change}
    with pytest.raises(InputError, match=words): omnicam_generate.main(config, tmp_path/"run", generator_of())


def test_pictures_of_all_kinds_and_a_long_caption(tmp_path):
    from PIL import Image
    Image.new("RGBA", (80, 48), (0, 0, 255, 128)).save(tmp_path/"alpha.png")
    Image.new("CMYK", (90, 48), (0, 255, 0, 0)).save(tmp_path/"print.jpg")
    Image.new("P", (48, 80)).save(tmp_path/"palette.png")
    (tmp_path/"broken.png").write_bytes(b"\x89PNG nothing")
    names = ["alpha.png", "print.jpg", "palette.png"]
    blue = read_first_frame(tmp_path/"alpha.png").data[0, :, 0, 0].tolist()
    assert blue[2] == 255 and 125 <= blue[0] <= 130                                                    # half transparent over white
    config = {"images": [str(tmp_path/n) for n in names], "texts": {"alpha.png": "a box " * 5000}, "cameras": [SCRIPT], "size": [48, 80], "frames": 5,
        "fps": 8.0, "steps": 1, "guidance": 1.0}
    assert omnicam_generate.main(config, tmp_path/"run", generator_of())["written"] == 3
    record = json.loads((tmp_path/"run/results/cameras.json").read_text())
    assert record["palette/01_script"]["size"] == [80, 48] and record["alpha/01_script"]["size"] == [48, 80]
    with pytest.raises(InputError, match="not a readable image"): omnicam_generate.main({**config, "images": [str(tmp_path/"broken.png")], "texts": {}},
        tmp_path/"run2", generator_of())


# ---- the shipped weights

@pytest.mark.parametrize("changes, forwards", [({"guidance": 5.0}, 3), ({"guidance": 1.0}, 2), ({"guidance": 5.0, "slg_layers": [1], "slg_end": 1.0}, 3),
    ({"guidance": 5.0, "slg_layers": [1], "slg_mode": "uncond", "slg_end": 1.0}, 3)])
def test_guidance_by_the_camera_takes_one_forward_more(changes, forwards):
    "What text and camera say together is known from the guidance by text."
    parts, seen = omnicam_generate.load_generator(), []
    parts.transformer.register_forward_hook(lambda module, args, kwargs, out: seen.append((kwargs["camera"] is not None, out[0])), with_kwargs=True)
    camera = omnicam_generate.asked_camera("pan_right", (48, 80), 9, 8.0)[0]
    config = {**omnicam_generate.DEFAULTS, "steps": 1, "solver": "euler", "camera_guidance": 1.5, **changes}
    z = omnicam_generate.film(parts, torch.full((3, 48, 80), 90, dtype=torch.uint8), [camera], "a room", config)
    assert len(seen) == forwards and [on for on, _ in seen] == [True] * (forwards - 1) + [False]
    plain = omnicam_generate.film(parts, torch.full((3, 48, 80), 90, dtype=torch.uint8), [camera], "a room", {**config, "camera_guidance": 1.0})
    torch.testing.assert_close(z, plain - 0.5 * (seen[0][1] - seen[forwards - 1][1]), atol=1e-5, rtol=1e-5)   # one Euler step from noise to 0


def test_the_shipped_camera_steers_in_eval_mode():
    "Two cameras, eval mode, one noise: the videos differ; without a camera another one; every gate is open."
    config = omnicam_train.configuration({"transformer": str(tiny_path("omnicam"))}, omnicam_train.DEFAULTS)
    model, vae, _, _ = omnicam_train.parts(config)
    assert sum(p.stat().st_size for p in tiny_path("omnicam").rglob("*") if p.is_file()) <= 5_000_000
    assert all(block.camera_gate.abs().max() > 0.05 for block in model.eval().blocks)
    from camflow.geometry.trajectory import pan
    from camflow.wan.depth_warp import model_camera
    from camflow.wan.i2v_condition import image_condition
    first, context = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.zeros(1, 64, 64)
    camera = lambda d: model_camera(model, vae, omnicam_train.depth_net(config, model), first, torch.as_tensor(pan(d, 9))[None], lens((48, 80))[None])
    right, left, off = (sample(model, image_condition(vae, first, 9)[:, 4:], None if d is None else camera(d), context, steps=2) for d in (20, -20, None))
    assert (right - left).abs().mean() > 0.1 and (right - off).abs().mean() > 0.05


def test_the_world_that_explains_more_is_read():
    "Of two readings the better one counts, and none when both explain as much with different paths."
    from types import SimpleNamespace
    import numpy as np
    from camflow.wan.omnicam_evaluate import chosen
    at = lambda x, score: SimpleNamespace(score=score, c2w=np.stack([np.eye(4), np.block([[np.eye(3), np.array([[x], [0], [0]])], [np.zeros((1, 3)), 1]])]))
    clips = SimpleNamespace(scenes=[SimpleNamespace(start=np.eye(4))])
    read = lambda moving, standing, figures="either": chosen([(moving, standing)], clips, figures)[0, 1, 0, 3]
    assert read(at(1., -5.), at(2., -9.)) == 2 and read(at(1., -9.), at(2., -5.)) == 1 and read(at(1., -5.), at(2., -9.), "move") == 1
    assert np.isnan(read(at(1., -5.), at(2., -5.5))) and read(at(1., -5.), at(1.2, -5.5)) == 1.2       # unclear, but for paths that hardly differ
    assert read(at(1., -5.), at(np.nan, np.nan)) == 1 and np.isnan(read(at(np.nan, -5.), at(2., -3.)))  # a failed reading counts as it is
    with pytest.raises(InputError, match="either"): read(at(1., 0.), at(1., 0.), "all")


@pytest.mark.slow
def test_the_shipped_weights_follow_scripts():
    "With the settings of omnicam_generate: nearer to the truth than without camera and than with the wrong one; instructions go the asked way; errors of the camera are a part."
    from camflow.wan.omnicam_evaluate import compare_errors, film, judge, script_cases, scripted
    config = omnicam_train.configuration({"transformer": str(tiny_path("omnicam"))}, omnicam_train.DEFAULTS)
    model, vae, text, _ = omnicam_train.parts(config)
    clips = scripted(script_cases(12), first=1_002_000)
    context, depth = text.encode(clips.captions), omnicam_train.depth_net(config, model)
    asked, wrong, off = (judge(film(model.eval(), vae, clips, context, camera, 12, 5.0, 1.5, depth=depth, warp_start=0.75, detail=0.16), clips)[0] for camera in ("asked", "wrong", "off"))
    assert asked["psnr_db"] > off["psnr_db"] + 3 and asked["psnr_db"] > wrong["psnr_db"] + 3
    assert asked["sign_agreement"] >= 0.85 and asked["rotation_deg"] < 0.5 * wrong["rotation_deg"]
    ratios = compare_errors(asked, off)
    assert ratios["rotation_ratio"] < 0.3 and ratios["translation_ratio"] < 0.45 and ratios["clips_compared"] >= 3   # 12 clips scatter, and a third is read without camera; the card has 40


def test_export_and_compare(base, tmp_path):
    main({**base, "export": str(tmp_path/"out"), "trainable_modules": ["lora_", "camera_"], "lora_rank": 2, "muon": []}, tmp_path/"run")
    loaded = OmniCamTransformer3DModel.from_pretrained(tmp_path/"out", torch_dtype=torch.float32)
    assert not any("lora" in name for name, _ in loaded.named_parameters()) and {p.name for p in (tmp_path/"out").iterdir()} >= {"lora_peft.safetensors",
        "lora_kohya.safetensors", "lora_comfy.safetensors", "card.md", "scores.json"}
    model, ckpt, config = trained_model(tmp_path/"run", {**base, "trainable_modules": ["lora_", "camera_"], "lora_rank": 2, "muon": []})
    assert ckpt.step == 4
    x, context, rays = torch.randn(1, 36, 3, 6, 10), torch.randn(1, 8, 64), torch.randn(1, 24, 3, 6, 10)
    with torch.no_grad(): torch.testing.assert_close(model(x, torch.tensor([500.]), context, camera=rays).sample, loaded.eval()(x, torch.tensor([500.]),
        context, camera=rays).sample, atol=2e-2, rtol=2e-2)
    _, vae, _, held, truth = omnicam_train.datasets(config, tmp_path/"run")
    assert set(compare(model, held, vae, truth, 1)) >= {"psnr_sample", "psnr_camera_off", "psnr_wrong_camera", "psnr_still"}


# ---- memory and profiles

@pytest.mark.parametrize("change", [{"storage": "float8_e4m3fn"}, {"offload": "block"}, {"attention": "native"}, {"gradient_checkpointing": True}])
def test_ways_to_save_memory_train_the_same(base, tmp_path, change):
    "Two steps of LoRA and adapter: the same result, but for the rounding of 8-bit weights."
    config = {**base, "steps": 2, "trainable_modules": ["lora_", "camera_"], "lora_rank": 2, "muon": [], "ema_decay": 0.}
    plain, saved = (main({**config, **extra}, tmp_path/name) for name, extra in (("plain", {}), ("saved", change)))
    if "storage" in change: assert saved.loop.bare.blocks[0].ffn.net[2].base_layer.weight.dtype == torch.float8_e4m3fn
    assert abs(plain.metrics["psnr_sample"] - saved.metrics["psnr_sample"]) < (0.5 if "storage" in change else 1e-3)


def test_eight_bit_adam_is_asked_for_by_name(base, tmp_path):
    from camflow.lab.run import prepare
    prepare("omnicam_finetune", ["original"], {"optimizer": "adamw8bit"})     # the run takes it
    if __import__("importlib").util.find_spec("bitsandbytes"): pytest.skip("bitsandbytes is installed")
    with pytest.raises(InputError, match="needs bitsandbytes"): main({**base, "optimizer": "adamw8bit", "muon": []}, tmp_path)


def test_the_original_profile_is_the_published_recipe():
    import yaml
    profiles = Path(__file__).resolve().parents[1]/"nbs/runs"
    original, fsdp = (yaml.safe_load((profiles/f"omnicam_finetune.{name}.yaml").read_text()) for name in ("original", "fsdp8"))
    for name, value in omnicam_train.ORIGINAL.items():
        if name != "betas": assert original[name] == value, name
    assert (original["lora_rank"], original["shift"], original["lr"], original["epochs"], original["seed"]) == (64, 3.0, 1e-4, 10, 42)
    assert fsdp == {**original, "num_processes": 8, "shard": True}
    assert omnicam_train.TrainConfig.pick({**omnicam_train.DEFAULTS, **omnicam_train.ORIGINAL}).gradient_checkpointing


@pytest.mark.slow
def test_two_ranks_train_a_lora_in_pieces(base, tmp_path):
    "Sharded over two ranks, as the profile fsdp8 does over eight; the first rank writes what all have trained."
    from camflow.lab.launch import launch
    config = {**base, "steps": 2, "trainable_modules": ["lora_", "camera_"], "lora_rank": 2, "muon": [], "shard": True, "validate_every": 0, "export": str(tmp_path/"out")}
    launch("camflow.wan.omnicam_train", config, tmp_path/"run", num_processes=2)
    assert OmniCamTransformer3DModel.from_pretrained(tmp_path/"out").config.num_layers == 1 and (tmp_path/"out/lora_kohya.safetensors").exists()
    assert load_checkpoint(tmp_path/"run"/"checkpoints").meta["config"]["shard"]


def test_the_warp_starts_at_nothing_and_belongs_to_the_camera():
    "A trained model that is given the warped first frame gives what it gave; then the warp counts, and a model without camera sees none."
    from camflow.geometry.trajectory import orbit
    from camflow.wan.omnicam import with_warp
    from camflow.wan.omnicam_train import image_velocity, resized
    old = starting_model(start="nothing", num_layers=1).eval()
    with torch.no_grad(): old.camera_input.weight.normal_(generator=torch.Generator().manual_seed(0))
    new, g = resized(old, camera_warp=True).eval(), torch.Generator().manual_seed(1)
    assert old.camera_warped is None and new.camera_warped.weight.shape == (192, 17)
    rays = camera_rays(torch.as_tensor(orbit(20, 4.0, 9)), lens((48, 80)), (6, 10))
    x, image, context, warp, other = (torch.randn(1, *shape, generator=g) for shape in ((16, 3, 6, 10), (16, 3, 6, 10), (64, 64), (17, 3, 6, 10), (17, 3, 6, 10)))
    run = lambda model, camera: image_velocity(model, x, torch.tensor([0.8]), image, camera, context).detach()
    both = with_warp(rays, warp)
    assert torch.equal(run(old, rays), run(new, both))
    with torch.no_grad(): new.camera_warped.weight.normal_(generator=g)
    assert (run(new, both) - run(new, with_warp(rays, other))).abs().max() > 0.1 and torch.equal(run(old, None), run(new, None))
    assert torch.equal(run(new, both), run(new, new.remember(both, (3, 6, 10)))) and torch.equal(run(old, rays * 0), run(new, both * 0))
    with pytest.raises(InputError, match="with_warp"): run(new, rays)
    with pytest.raises(InputError, match="expected"): run(old, both)


def test_training_with_the_warp_reads_it_and_measures_wrong_cameras_with_theirs(base, tmp_path):
    config = {**base, "model": {"num_layers": 1, "camera_warp": True}, "cache_folder": str(tmp_path/"cache"), "steps": 2, "export": str(tmp_path/"out")}
    result = main(config, tmp_path/"run")
    assert result.loop.bare.camera_warped.weight.abs().max() > 0 and {"psnr_wrong_camera", "psnr_sample"} <= set(result.metrics)
    full = omnicam_train.configuration(config, omnicam_train.DEFAULTS)
    model, vae, train, held, truth = omnicam_train.datasets(full, tmp_path/"run")
    camera, depth = held.batch([0], (6, 10))[2], omnicam_train.depth_net(full, model)
    from camflow.wan.depth_warp import model_camera
    asked = model_camera(model, vae, depth, truth[:1, :, 0], held.c2w_SNT44[:1, 0], held.K_S4[:1])
    torch.testing.assert_close(camera, asked, atol=5e-3, rtol=1e-3)             # the cache keeps half precision
    alone = compare(result.loop.bare.eval(), held, vae, truth[:1], 1, depth=depth)
    assert alone["psnr_wrong_camera"] != alone["psnr_sample"]                   # of one clip the wrong camera is the way back
    assert (tmp_path/"out/depth/model.safetensors").exists()
    with pytest.raises(InputError, match="takes its depth"): compare(model, held, vae, truth, 1)
    with pytest.raises(InputError, match="as depth/"): omnicam_generate.Generator(model, vae, build_tiny_text(["a room"]))


def test_resized_keeps_the_heaviest_units_and_refuses_other_shapes():
    from camflow.wan.omnicam_train import resized
    old = starting_model(start="nothing", num_layers=1)
    with torch.no_grad(): old.blocks[0].ffn.net[2].weight[:, 5:] *= 1e-4
    small = resized(old, ffn_dim=5)
    assert torch.equal(small.blocks[0].ffn.net[2].weight, old.blocks[0].ffn.net[2].weight[:, :5])
    with pytest.raises(InputError, match="only a smaller ffn_dim"): resized(old, text_dim=32)

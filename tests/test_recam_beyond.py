"""ReCam beyond the published model: the source's own timestep, hidden conditions and guidance by them, any length and size, what is trained.

Everything here is off by default; that published numbers stay is what tests/test_wan.py and the goldens say."""
import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from camflow.files import InputError
from camflow.geometry.camera import Cameras, focal_K, write_unreal_json
from camflow.geometry.trajectory import pose, preset, static
from camflow.media.frames import Frames
from camflow.media.video import write_video
from camflow.wan import finetune, generate
from camflow.wan.conditions import Hidden, hide
from camflow.wan.evaluate import camera_input
from camflow.wan.pipeline import ReCamPipeline, camera_tensor, tiny_pipeline
from camflow.wan.recam import ReCamTransformer3DModel, is_trainable, tiny_recam
from camflow.wan.transformer import exact_positions

ROOT = Path(__file__).resolve().parents[1]


def generator(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def moving(model):
    "Camera layers away from their start, so that a camera matters."
    for block in model.blocks: torch.nn.init.normal_(block.cam_encoder.weight, std=0.3, generator=generator(5))
    return model.eval()


def inputs(batch=2, frames=3, rows=4, columns=6):
    z = (16, frames, rows, columns)
    return dict(hidden_states=normal(batch, *z), timestep=torch.linspace(30, 970, batch), encoder_hidden_states=normal(batch, 5, 64, seed=1),
                source=normal(batch, *z, seed=2), camera=normal(batch, frames, 12, seed=3))


# --- the source's own timestep --------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_source_timesteps_are_the_tokens_timesteps_of_wan22():
    "Without a camera, ours with source_timesteps is diffusers' Wan with a timestep per token: t for the target's, 0 for the source's."
    model, x = tiny_recam(num_layers=2, shared_source_positions=False, source_embedding=False, source_timesteps=True).eval(), inputs()
    names = ("patch_size", "num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim", "freq_dim", "rope_max_seq_len")
    plain = exact_positions(WanTransformer3DModel(**{name: model.config[name] for name in names})).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    half = 3 * 4 * 6
    tokens = torch.cat([x["timestep"][:, None].expand(2, half), torch.zeros(2, half)], 1)
    theirs = plain(torch.cat([x["hidden_states"], x["source"]], 2), tokens, x["encoder_hidden_states"]).sample
    ours = model(**{**x, "camera": None}, return_source=True)
    torch.testing.assert_close(torch.cat(ours, 2), theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_source_timesteps_are_off_by_default_and_saved(tmp_path):
    model, x = moving(tiny_recam(num_layers=1)), inputs()
    assert model.config.source_timesteps is False and torch.equal(model(**x), model(**x, source_timestep=torch.full((2,), 400.0)))  # a published model is told nothing
    told = ReCamTransformer3DModel.from_config({**model.config, "source_timesteps": True})
    told.load_state_dict(model.state_dict())                                                # no new weights
    told.eval().save_pretrained(tmp_path)
    again = ReCamTransformer3DModel.from_pretrained(tmp_path)
    assert again.config.source_timesteps and torch.equal(again(**x), told(**x)) and not torch.allclose(told(**x), model(**x), atol=1e-3)
    levels = torch.tensor([[0.0, 1000.0, 1000.0], [250.0, 250.0, 250.0]])
    assert not torch.allclose(told(**x, source_timestep=levels)[0], told(**x)[0], atol=1e-3)
    one = {k: v[1:] for k, v in x.items()}
    torch.testing.assert_close(told(**x, source_timestep=levels)[1:], told(**one, source_timestep=torch.tensor([250.0])), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="per sample or per latent frame"): told(**x, source_timestep=torch.zeros(2, 2))


def test_loss_pipeline_and_policy_take_such_a_model(tmp_path):
    from camflow.rl.recam_grpo import make_fn
    x = inputs(1)
    model = moving(tiny_recam(num_layers=1, source_timesteps=True))
    loss = finetune.flow_loss(model, x["hidden_states"], x["source"], x["camera"], x["encoder_hidden_states"], normal(1, 16, 3, 4, 6, seed=9), torch.tensor([0.5]), torch.ones(1), 1000 * torch.tensor([[0.0, 1, 1]]))
    loss.sum().backward()
    assert loss.isfinite().all() and all(p.grad is not None for p in model.parameters())
    cond = {"source": x["source"], "camera": x["camera"], "context": x["encoder_hidden_states"]}
    with torch.no_grad(): assert torch.equal(make_fn()(model)(x["hidden_states"], 0.4, cond), model(x["hidden_states"], torch.tensor([400.0]), x["encoder_hidden_states"], x["source"], x["camera"]))
    model.save_pretrained(tmp_path)
    assert finetune.starting_model(tmp_path, torch.float32, source_timesteps=False).config.source_timesteps is False


# --- guidance by camera and source ----------------------------------------------------------------------------------------------
CLIP = normal(1, 3, 5, 32, 48, seed=7).clamp(-1, 1)
CAMERA = normal(1, 2, 12, seed=9)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    moving(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answers(pipe, clip=CLIP, camera=CAMERA, **settings):
    "(result, velocities that each forward gave)."
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    out = pipe(clip, camera, "a room", num_inference_steps=1, generator=generator(1), output_type="latent", **settings).frames
    handle.remove()
    return out, seen


def test_guidance_of_one_is_no_guidance_bit_for_bit(pipe):
    plain, forwards = answers(pipe, guidance_scale=1.0)
    same, again = answers(pipe, guidance_scale=1.0, camera_guidance_scale=1.0, source_guidance_scale=1.0, guidance_batch=3)
    assert torch.equal(plain, same) and len(forwards) == len(again) == 1
    text, _ = answers(pipe, guidance_scale=4.0)
    assert torch.equal(text, answers(pipe, guidance_scale=4.0, camera_guidance_scale=1.0, source_guidance_scale=1.0)[0])


@pytest.mark.parametrize("told", [False, True])
def test_what_is_dropped_has_no_influence(pipe, told):
    "The branch without camera (source) answers the same whatever camera (source) was given, and the full branch does not."
    if told:
        pipe = copy.deepcopy(pipe)
        pipe.transformer.register_to_config(source_timesteps=True)
    scales = dict(guidance_scale=1.0, camera_guidance_scale=3.0, source_guidance_scale=2.0)
    _, (full, no_camera, no_source) = answers(pipe, **scales)
    _, (full_1, no_camera_1, no_source_1) = answers(pipe, camera=CAMERA + 1, **scales)
    _, (full_2, no_camera_2, no_source_2) = answers(pipe, clip=CLIP.flip(-1), **scales)
    assert torch.equal(no_camera, no_camera_1) and not torch.allclose(full, full_1, atol=1e-3) and not torch.allclose(no_source, no_source_1, atol=1e-3)
    assert torch.equal(no_source, no_source_2) and not torch.allclose(full, full_2, atol=1e-3) and not torch.allclose(no_camera, no_camera_2, atol=1e-3)


def test_guidance_is_its_formula_and_one_forward_can_hold_all_branches(pipe):
    scales = dict(guidance_scale=4.0, camera_guidance_scale=3.0, source_guidance_scale=0.5)
    out, (full, no_text, no_camera, no_source) = answers(pipe, **scales)
    noise = answers(pipe, guidance_scale=1.0)[0] + full                                     # one Euler step from sigma 1 to 0: x - v
    v = full + 3 * (full - no_text) + 2 * (full - no_camera) - 0.5 * (full - no_source)
    torch.testing.assert_close(out, noise - v, atol=1e-4, rtol=1e-4)
    together, forwards = answers(pipe, guidance_batch=4, **scales)
    assert len(forwards) == 1 and len(forwards[0]) == 4
    torch.testing.assert_close(together, out, atol=1e-4, rtol=1e-4)


def test_hidden_conditions_do_not_reach_the_loss():
    "All of them hidden: other text, other camera, another source, the same training item."
    hidden, x = Hidden(text=1, camera=1, text_to_video=1), inputs()
    model, target, noise = moving(tiny_recam(num_layers=1, source_timesteps=True)), normal(2, 16, 3, 4, 6, seed=8), normal(2, 16, 3, 4, 6, seed=9)
    def loss(which, shift):
        given = {k: x[k] + shift * (k == which) for k in ("source", "camera", "encoder_hidden_states")}
        source, camera, context, told = hide(hidden, 0, [3, 4], given["source"], given["camera"], given["encoder_hidden_states"])
        return finetune.flow_loss(model, target, source, camera, context, noise, torch.tensor([0.3, 0.9]), torch.ones(2), told)
    with torch.no_grad():
        whole = loss("", 0)
        for which in ("source", "camera", "encoder_hidden_states"): assert torch.equal(loss(which, 1.0), whole), which
    source, _, _, told = hide(Hidden(image_to_video=1), 0, [3], x["source"][:1], x["camera"][:1], x["encoder_hidden_states"][:1])
    assert torch.equal(source[:, :, 0], x["source"][:1, :, 0]) and told.tolist() == [[0, 1000, 1000]] and not torch.allclose(source[:, :, 1:], x["source"][:1, :, 1:], atol=0.1)


def toy(camera_dropout, steps=100, batch=8):
    "A small model of a world where the camera says which of two videos to make; its loss function, with or without the camera."
    model = tiny_recam(num_layers=1, num_attention_heads=1, in_channels=4, out_channels=4, ffn_dim=64)
    finetune.open_cameras(model, 1.0)
    optimizer, video = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99)), 2 * normal(4, 1, 1, 1, seed=4)
    def losses(first, batch, hidden):
        source, sign = normal(batch, 4, 2, 2, 2, seed=first), torch.where(normal(batch, seed=first + 1) > 0, 1.0, -1.0)
        camera = torch.eye(3, 4).flatten().repeat(batch, 2, 1)
        camera[:, :, 3] = sign[:, None]
        source, camera, context, told = hide(hidden, 0, range(first, first + batch), source, camera, torch.zeros(batch, 2, 64))
        target = sign[:, None, None, None, None] * video.expand(batch, 4, 2, 2, 2)
        return finetune.flow_loss(model, target, source, camera, context, normal(batch, 4, 2, 2, 2, seed=first + 2), torch.full((batch,), 0.95), torch.ones(batch), told)
    for step in range(steps):
        optimizer.zero_grad()
        losses(1000 + batch * step, batch, Hidden(camera=camera_dropout)).mean().backward()
        optimizer.step()
    return lambda **kind: float(losses(0, 64, Hidden(**kind)).mean().detach())


def test_hidden_cameras_are_learned():
    "A model that has met hidden cameras answers them with the mean of both videos; one that has not is as sure as ever and wrong. With the camera both know the way."
    dropped, kept = toy(0.3), toy(0.0)
    assert dropped() < 0.1 * dropped(camera=1.0) and dropped(camera=1.0) < 0.75 * kept(camera=1.0) and kept() < 0.1 * kept(camera=1.0)


# --- lengths and sizes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frames,size", [(5, (48, 80)), (9, (80, 48)), (13, (40, 56)), (17, (48, 80)), (1, (24, 24))])
def test_one_pipeline_for_any_length_and_size(pipe, frames, size):
    path = Cameras(preset("zoom_in", frames), focal_K(24, size), size)
    out = pipe(normal(1, 3, frames, *size).clamp(-1, 1), path, "a room", num_inference_steps=1, guidance_scale=1.0, generator=generator(1), output_type="pt").frames
    assert out.shape == (1, 3, frames, *size) and out.isfinite().all()


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 81])
def test_the_pose_of_a_latent_is_that_of_the_last_frame_of_its_group(frames):
    c2w = torch.eye(4, dtype=torch.float64).repeat(frames + 3, 1, 1)
    c2w[:, 2, 3] = torch.arange(frames + 3)                                                 # frame i stands at i metres; a longer path than the clip does not matter
    camera = camera_tensor(Cameras(c2w, focal_K(24, (48, 80)), (48, 80)), frames)
    assert camera.shape == (1, 1 + frames // 4, 12) and camera[0, :, 11].tolist() == list(range(0, frames, 4))


def test_lengths_and_sizes_that_cannot_be_are_refused(pipe):
    run = lambda frames, size, pipe=pipe: pipe(torch.zeros(1, 3, frames, *size), CAMERA, num_inference_steps=1)
    with pytest.raises(InputError, match=r"8 frames; this model takes 1 \+ 4k: cut it to 5"): run(8, (48, 80))
    with pytest.raises(InputError, match=r"45 x 80; this model takes multiples of 8 x 8: .*\(\(40, 80\)\)"): run(5, (45, 80))
    published = ReCamPipeline(tiny_recam(num_layers=1, patch_size=(1, 2, 2)), pipe.vae, pipe.text_encoder, pipe.tokenizer)
    published.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match=r"multiples of 16 x 16: .*\(\(48, 64\)\)"): run(5, (48, 72), published)
    with pytest.raises(InputError, match="a path of 5 poses for 9 frames"): pipe(torch.zeros(1, 3, 9, 48, 80), Cameras(preset(1, 5), focal_K(24, (48, 80)), (48, 80)), num_inference_steps=1)
    small = ReCamPipeline(tiny_recam(num_layers=1, rope_max_seq_len=8), pipe.vae, pipe.text_encoder, pipe.tokenizer)
    small.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="exceeds rope_max_seq_len 8"): run(5, (48, 80), small)
    settings = {**finetune.DEFAULTS, "size": [48, 72]}
    with pytest.raises(InputError, match=r"multiples of \[16, 16\]"): finetune.check_size(settings, published.transformer, pipe.vae)
    with pytest.raises(InputError, match=r"4k \+ 1"): finetune.checked({**settings, "frames": 10})


def psnr(a, b): return float(-10 * torch.log10((a.unit().data - b.unit().data)[1:].square().mean()))


def scene(seed, *paths, **options):
    "The same scene along several paths, and its caption."
    from camflow.world.clips import HELD_OUT, scene_clips
    clips = scene_clips(HELD_OUT + seed, [(path, "") for path in paths], **options)
    return [Frames(torch.from_numpy(x), "byte", 8.0) for x in clips.frames_NT3HW], clips.caption


@pytest.fixture(scope="module")
def trained():
    if not (ROOT/"data/tiny/recam/transformer").exists(): pytest.skip("data/tiny/recam is not in this checkout")
    return generate.load_pipeline()


CONFIG = {**generate.DEFAULTS, "frames": 9, "steps": 4, "guidance": 1.0, "shift": 3.0}


@pytest.mark.parametrize("frames,size", [(17, (48, 80)), (9, (80, 48))])
def test_the_shipped_weights_are_good_for_other_lengths_and_sizes(trained, frames, size):
    "Trained on 9 frames of 48 x 80 alone: clearly nearer to the truth than the copied source."
    path = preset("pan_left", frames)
    (source, truth), caption = scene(70, static(frames), path, size=size)
    made, = generate.rerender(trained, source, [path], caption, {**CONFIG, "frames": frames}, "x")
    assert psnr(made, truth) > psnr(source, truth) + 2


# --- a source whose camera moves ------------------------------------------------------------------------------------------------
def test_paths_in_the_sources_world_are_those_of_training(tmp_path):
    "Target and source from one pose file, the source moving and starting elsewhere: the numbers that the data set's reader gives the training."
    from camflow.data.multicam import MultiCamVideo
    from camflow.world.write import write_multicam
    write_multicam(tmp_path, scenes=1, frames=9, cameras=3, val=False)
    data = MultiCamVideo(tmp_path)
    file = next(tmp_path.rglob("camera_extrinsics.json"))
    away = Cameras.from_unreal_json(file, "cam02")
    moved = Cameras(pose((0, 20, 0), (1, 0, 0.5)) @ away.c2w, away.K, away.size, away.frames)        # cam02 starts somewhere else
    write_unreal_json(file, {"cam01": Cameras.from_unreal_json(file, "cam01"), "cam02": moved, "cam03": Cameras.from_unreal_json(file, "cam03")})
    config = {**CONFIG, "trajectory": str(file), "source_cameras": str(file)}
    video = next(tmp_path.rglob("cam02.mp4"))
    source = generate.source_path(config, video, None, list(range(9)))
    paths = generate.placed({}, config, source)
    for n, name in enumerate(("cam01", "cam03")):
        item = data.load(data.scenes[0], "cam02", name, frames=9, size=(48, 80))
        ours = camera_input(paths[f"cam_type{(1, 3)[n]}"][None])[0]
        torch.testing.assert_close(ours, item.camera, atol=1e-5, rtol=1e-5)
        assert (ours[0] - torch.eye(3, 4).flatten()).abs().max() > 0.3                              # it does not start at the source's pose
        by_pipeline = camera_tensor(Cameras.from_unreal_json(file, name), 9, source_cameras=moved)
        torch.testing.assert_close(by_pipeline[0], item.camera, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="no camera 'film'"): generate.source_path(config, video.with_name("film.mp4"), None, [0])


@pytest.mark.parametrize("known", ["given", "estimate"])
def test_a_moving_source_can_be_held_or_followed(trained, known):
    "The source pans. A still path gives the view of its first frame; the same path on top of the source's own movement gives the source back."
    still, moving_path = static(9), preset("pan_right", 9)
    (source, held), caption = scene(40, moving_path, still)
    config = {**CONFIG, "follow": True, "source_cameras": known}
    found = moving_path if known == "given" else generate.source_path(config, None, source, None)
    paths = [generate.placed({"x": still}, CONFIG)["x"], generate.placed({"x": still}, config, found)["x"]]
    as_held, as_source = generate.rerender(trained, source, paths, caption, CONFIG, "x")
    assert psnr(as_held, held) > psnr(as_held, source) + 4 and psnr(as_source, source) > psnr(as_source, held) + 4


def test_a_target_may_start_elsewhere(trained):
    "`start` in degrees and metres from the source's first frame, a place that training never showed: still nearer to the truth than without."
    start, move = [0, 6, 0, 0, 0, 0], preset("zoom_in", 9)
    path = generate.placed({"x": move}, {**CONFIG, "start": start})["x"]
    (source, truth), caption = scene(60, static(9), path)
    told, untold = generate.rerender(trained, source, [path, move], caption, CONFIG, "x")
    assert torch.allclose(path[0], pose((0, 6, 0))) and psnr(told, truth) > psnr(untold, truth) + 1

def test_a_source_whose_camera_cannot_be_estimated_is_refused_before_anything_is_filmed(tmp_path, monkeypatch):
    "The estimator has no pose for a clip of the sky; with skip_bad the other videos are filmed."
    monkeypatch.setattr(generate, "_estimator", lambda folder: lambda clips: torch.full((len(clips), len(clips[0]), 4, 4), torch.nan))
    write_video(tmp_path/"sky.mp4", Frames(torch.full((9, 3, 48, 80), 200, dtype=torch.uint8), "byte"), fps=8)
    config = {"videos": str(tmp_path/"sky.mp4"), "preset": "pan_left", "frames": 9, "steps": 1, "source_cameras": "estimate", "follow": True}
    with pytest.raises(InputError, match="cannot say how the camera of .*sky.mp4 moves"): generate.main(config, tmp_path/"run")
    assert not (tmp_path/"run/results/cameras.json").exists()
    with pytest.raises(InputError, match="no video can be used"): generate.main({**config, "skip_bad": True}, tmp_path/"run")


def test_moves_of_a_file_can_ride_on_an_estimated_source(tmp_path):
    "The file's world and the source's have nothing in common: the file gives moves, relative to their own first poses."
    path = pose((0, 50, 0), (9, 0, 0)) @ preset("pan_left", 9)
    write_unreal_json(tmp_path/"moves.json", {"cam01": Cameras(path, focal_K(24, (48, 80)), (48, 80))})
    config, source = {**CONFIG, "trajectory": str(tmp_path/"moves.json"), "source_cameras": "estimate", "follow": True}, preset("zoom_in", 9)
    generate.check_source(config)
    made = generate.placed(generate.asked_paths("all", config["trajectory"], 9), config, source)["cam_type1"]
    torch.testing.assert_close(made, source @ preset("pan_left", 9), atol=1e-5, rtol=1e-5)


def test_realestate10k_files_are_trajectories(tmp_path):
    "The same poses in either file are the same paths, every k-th where there are more than frames; other files are refused by what they are."
    clip = Cameras(pose((0, 50, 0), (9, 0, 0)) @ preset("arc_left", 17), focal_K(24, (48, 80)), (48, 80))
    clip.to_realestate10k(tmp_path/"clip.txt")
    write_unreal_json(tmp_path/"clip.json", {"cam01": clip})
    one, other = (generate.asked_paths("all", str(tmp_path/f"clip.{end}"), 9)["cam_type1"] for end in ("txt", "json"))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, clip[list(range(0, 17, 2))].relative().c2w, atol=1e-5, rtol=0)
    sources = [generate.source_path({"source_cameras": str(tmp_path/f"clip.{end}")}, tmp_path/"any.mp4", None, [2, 4, 6]) for end in ("txt", "json")]
    torch.testing.assert_close(*sources, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="no camera file that is read here"): generate.asked_paths("all", str(tmp_path/"path.npz"), 9)


@pytest.mark.parametrize("asked", ["arc_left", "arc-left", "Arc left", 9, "9"])
def test_presets_are_known_as_people_write_them(asked):
    assert list(generate.asked_paths(asked, frames=5)) == ["cam_type9"] and torch.equal(preset(asked, 5), preset("arc_left", 5))
    with pytest.raises(InputError, match="no preset"): generate.asked_paths("arc", frames=5)
    with pytest.raises(InputError, match="no preset"): generate.asked_paths("²", frames=5)   # a digit that is no number


@pytest.mark.parametrize("wrong,words", [({"follow": True}, "needs the source's camera"), ({"source_cameras": "estimate"}, "changes nothing here"), ({"start": [1, 2]}, "three angles"),
                                         ({"trajectory": "t.json", "source_cameras": "estimate"}, "has no place in"), ({"trajectory": "t.json", "source_cameras": "s.json", "follow": True}, "leave out follow")])
def test_source_settings_that_contradict_are_refused(wrong, words):
    with pytest.raises(InputError, match=words): generate.check_source({**generate.DEFAULTS, **wrong})


# --- what is trained ------------------------------------------------------------------------------------------------------------
def kinds(names): return {name.split("blocks.0.")[-1].removesuffix(".weight").removesuffix(".bias").replace(".default", "") for name in names}


ATTENTION = {f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")}
CAMERA_LAYERS = {"cam_encoder", "projector", "source_token"}


@pytest.mark.parametrize("trained,expected", [
    ("attention", ATTENTION), ("recam", ATTENTION | CAMERA_LAYERS),
    ("lora", {f"attn1.{name}.lora_{side}" for name in ("to_q", "to_k", "to_v", "to_out.0") for side in "AB"} | CAMERA_LAYERS)])
def test_finetune_trains_exactly_these(trained, expected):
    model = tiny_recam(num_layers=1)
    chosen = finetune.prepare_trained(model, trained, 4)
    assert kinds(name for name, _ in model.named_parameters() if chosen(name)) == expected


def test_finetune_trains_all_by_default():
    chosen = finetune.prepare_trained(tiny_recam(num_layers=1), finetune.DEFAULTS["trained"])
    assert all(chosen(name) for name, _ in tiny_recam(num_layers=1).named_parameters())


def test_post_training_trains_exactly_these():
    "The policy's patterns: ReCam's part by default, self-attention alone (Geo-Align) by `train`, adapters by `lora_rank`."
    from camflow.rl.policy import choose_trainable
    from camflow.rl.recam_config import Settings
    from camflow.rl.recam_grpo import add_lora
    names = lambda patterns: kinds(choose_trainable(tiny_recam(num_layers=1), patterns))
    assert names(Settings().train) == ATTENTION | CAMERA_LAYERS and names(["*attn1*"]) == ATTENTION
    assert set(choose_trainable(tiny_recam(num_layers=1), Settings().train)) == {name for name, _ in tiny_recam(num_layers=1).named_parameters() if is_trainable(name)}
    adapted = kinds(choose_trainable(add_lora(tiny_recam(num_layers=1), 4)))
    assert adapted == {f"{layer}.lora_{side}" for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "cam_encoder", "projector") for side in "AB"}
    with pytest.raises(InputError, match="no parameter is trained"): names(["*attn9*"])

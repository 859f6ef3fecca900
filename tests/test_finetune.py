"""Latent caches, the loss, trained parameters, the tiny VAE and the finetune run, on small data."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from camflow.data.cache import LatentCache, fill, fill_texts, texts
from camflow.files import InputError
from camflow.training.checkpoint import load_checkpoint
from camflow.wan import finetune
from camflow.wan.finetune import Levels, LatentScenes, export_recam, flow_loss, main, world_scenes
from camflow.wan.recam import ReCamTransformer3DModel, tiny_recam
from camflow.wan.text import build_tiny_text
from camflow.wan.vae import signed, tiny_vae
from camflow.wan.vae_train import WorldBank, configuration, vae_quality
from camflow.world.clips import HELD_OUT

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A folder with clips, a VAE that knows nothing, and a configuration for runs of a second."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finetune")
    tiny_vae(0).save_pretrained(folder/"vae")
    return dict(steps=4, batch_size=2, scenes=3, cameras=3, held_out=2, clips_folder=str(folder/"clips"), cache_folder=str(folder/"cache"), vae=str(folder/"vae"),
                validation_clips=2, sample_steps=2, model={"num_layers": 1}, warmup=0, ema_decay=0.9)


def test_loss_is_the_formula():
    g = torch.Generator().manual_seed(0)
    target, source, noise = (torch.randn(2, 16, 3, 6, 10, generator=g) for _ in range(3))
    camera, context, sigma = torch.randn(2, 3, 12, generator=g), torch.randn(2, 4, 64, generator=g), torch.tensor([0.3, 0.9])
    model = tiny_recam(0, num_layers=1)
    ours = flow_loss(model, target, source, camera, context, noise, sigma, torch.tensor([2., 0.5]))
    for i in range(2):  # one by one, as the paper writes it
        x = (1 - sigma[i]) * target[i:i + 1] + sigma[i] * noise[i:i + 1]
        v = model(x, 1000 * sigma[i:i + 1], context[i:i + 1], source=source[i:i + 1], camera=camera[i:i + 1])
        expected = [2., 0.5][i] * (v - (noise[i] - target[i])).square().mean()
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=1e-4)


def test_levels_match_the_published_schedule():
    levels = Levels(5.0, "bsmntw")
    assert abs(levels.schedule.sigmas.median() - 0.833) < 2e-3 and abs((levels.schedule.sigmas > 0.5).float().mean() - 0.834) < 2e-3
    assert levels.schedule.weights.min() == 0 and abs(levels.schedule.weights.max() - 2.076) < 2e-3 and abs(levels.schedule.weights.mean() - 1) < 1e-5
    a, b = levels.draw(0, [5, 6]), levels.draw(0, [6])
    assert a[0][1] == b[0][0]  # a draw belongs to its position
    with pytest.raises(InputError, match="weighting"): Levels(weighting="bell")


def test_recam_trains_only_its_parts(base, tmp_path):
    start = tiny_recam(0, num_layers=1)
    start.save_pretrained(tmp_path/"model")
    result = main({**base, "transformer": str(tmp_path/"model"), "trained": "recam", "batch_size": 1}, tmp_path/"run")
    before = dict(start.named_parameters())
    changed = {n for n, p in result.loop.bare.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(any(part in n for part in ("attn1", "cam_encoder", "projector", "source_token")) for n in changed)
    assert {"blocks.0.cam_encoder.weight", "blocks.0.attn1.to_q.weight", "blocks.0.attn1.norm_q.weight"} <= changed
    assert set(load_checkpoint(tmp_path/"run"/"checkpoints").tensors["model"]) >= changed and "blocks.0.ffn.net.2.weight" not in load_checkpoint(tmp_path/"run"/"checkpoints").tensors["model"]


def test_attention_alone_with_hidden_conditions(base, tmp_path):
    "Self-attention only, the paper's mix, noised sources, the source's own timestep: trains, resumes from its checkpoint, exports what it says."
    config = {**base, "trained": "attention", "text_to_video": 0.2, "image_to_video": 0.2, "camera_dropout": 0.3, "source_noise": [0.0, 0.3], "model": {"num_layers": 1, "source_timesteps": True}}
    result = main(config, tmp_path/"run")
    start = dict(tiny_recam(0, num_layers=1).named_parameters())
    changed = {n for n, p in result.loop.bare.named_parameters() if "cam_encoder" not in n and not torch.equal(p, start[n])}
    assert changed and all("attn1" in n for n in changed) and set(load_checkpoint(tmp_path/"run"/"checkpoints").tensors["model"]) == {n for n in start if "attn1" in n}
    export_recam(tmp_path/"run", tmp_path/"out", config, clips=2)
    assert ReCamTransformer3DModel.from_pretrained(tmp_path/"out"/"transformer").config.source_timesteps
    with pytest.raises(InputError, match="sum to more than 1"): main({**config, "text_to_video": 0.9}, tmp_path/"other")


def test_lora_is_merged_at_export(base, tmp_path):
    config = {**base, "trained": "lora", "lora_rank": 4, "camera_std": 0.}
    result = main(config, tmp_path/"run")
    live = result.loop.bare.eval()
    export_recam(tmp_path/"run", tmp_path/"out", config, clips=2)
    merged = ReCamTransformer3DModel.from_pretrained(tmp_path/"out"/"transformer", torch_dtype=torch.float32).eval()
    assert not any("lora" in n for n, _ in merged.named_parameters())
    g = torch.Generator().manual_seed(0)
    args = torch.randn(1, 16, 3, 6, 10, generator=g), torch.tensor([500.]), torch.randn(1, 4, 64, generator=g)
    kwargs = dict(source=torch.randn(1, 16, 3, 6, 10, generator=g), camera=torch.randn(1, 3, 12, generator=g))
    with torch.no_grad(), result.loop.ema.applied(result.loop.params): torch.testing.assert_close(merged(*args, **kwargs), live(*args, **kwargs), atol=2e-2, rtol=2e-2)


def test_resume_of_a_run_is_exact(base, tmp_path):
    a = main(base, tmp_path/"a")
    for _ in range(5):
        b = main({**base, "max_seconds": 1e-9}, tmp_path/"b")
    assert b.status == "done"
    x, y = (load_checkpoint(tmp_path/n/"checkpoints").tensors for n in "ab")
    assert all(torch.equal(t, y[group][name]) for group in x for name, t in x[group].items())
    assert a.metrics == b.metrics or a.step == b.step


def test_export_loads_in_the_pipeline(base, tmp_path):
    from camflow.wan.generate import load_pipeline
    main(base, tmp_path/"run")
    export_recam(tmp_path/"run", tmp_path/"out", base, clips=2)
    tiny_vae(0).save_pretrained(tmp_path/"out"/"vae")
    pipe = load_pipeline(str(tmp_path/"out"))
    video = signed(WorldBank(base["clips_folder"], 0, 3, 3).images(0, 0))[None]
    out = pipe(video, torch.eye(3, 4).flatten().expand(1, 3, 12), "a room", num_inference_steps=2, guidance_scale=1, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    assert out.shape == video.shape and torch.isfinite(out).all()
    assert json.loads((tmp_path/"out"/"scores.json").read_text())["step"] == base["steps"]


@pytest.mark.slow
def test_two_ranks_train_in_pieces_and_export(base, tmp_path):
    "Sharded over two gloo ranks, one text encoder for both; the first rank writes what all have trained."
    from camflow.lab.launch import launch
    from camflow.wan.text import build_tiny_text
    text = build_tiny_text(["a room with a box", "two spheres in a hall"])
    text.model.save_pretrained(tmp_path/"text/text_encoder"), text.tokenizer.save_pretrained(tmp_path/"text/tokenizer")
    config = {**base, "muon": [], "cache_folder": str(tmp_path/"cache"), "text_encoder": str(tmp_path/"text"), "shard": True, "export": str(tmp_path/"out")}
    launch("camflow.wan.finetune", config, tmp_path/"run", num_processes=2)
    assert ReCamTransformer3DModel.from_pretrained(tmp_path/"out"/"transformer").config.num_layers == 1 and (tmp_path/"out"/"scores.json").exists()
    assert load_checkpoint(tmp_path/"run"/"checkpoints").meta["config"]["shard"]


def test_another_vae_needs_another_cache(base, tmp_path):
    bank, text = WorldBank(base["clips_folder"], 0, 3, 3), build_tiny_text(["a room"])
    world_scenes(tmp_path, bank, tiny_vae(0), text)
    with pytest.raises(InputError, match="other vae"): world_scenes(tmp_path, bank, tiny_vae(1), text)


def test_unknown_key_is_an_error(base, tmp_path):
    with pytest.raises(InputError, match=r"\['shfit'\]"): main({**base, "shfit": 3.}, tmp_path)


def test_held_out_scenes_count_once_and_have_a_wrong_camera(base, tmp_path):
    "With one clip the wrong camera would be its own."
    seen = []
    class Held(list):
        def batch(self, triples): seen.extend(triples); raise StopIteration
    with pytest.raises(StopIteration): finetune.compare(tiny_recam(0, num_layers=1), Held("ab"), None, None, count=5)
    assert seen == [(0, 0, 1), (1, 0, 1)]
    for name in ("held_out", "validation_clips"):
        with pytest.raises(InputError, match=f"{name}=1 must be at least 2"): main({**base, name: 1}, tmp_path)


def test_condition_is_that_of_cameras():
    from camflow.geometry.camera import Cameras
    from camflow.geometry.trajectory import random_trajectory
    from camflow.world.render import default_K
    paths = [random_trajectory(torch.Generator().manual_seed(i), 9) for i in range(2)]
    paths[0] = random_trajectory(torch.Generator().manual_seed(5), 9)[-1] @ paths[0]  # a source that does not start at the identity
    cameras = [Cameras(p, torch.as_tensor(default_K((48, 80))).expand(9, 3, 3), (48, 80)) for p in paths]
    scenes = LatentScenes([torch.zeros(2, 16, 3, 6, 10)], [torch.stack(paths)[:, ::4]], torch.zeros(1, 1, 64), [""])
    torch.testing.assert_close(scenes.condition(0, 0, 1), cameras[1].embedding(reference_c2w=cameras[0].c2w[0], frames=range(0, 9, 4)))


def test_a_text_encoder_in_half_precision_serves_a_float32_model():
    "The shipped text encoder is stored in float16; what it encodes is trained on in float32."
    scenes = LatentScenes([torch.zeros(2, 16, 3, 6, 10).half()], [torch.eye(4).expand(2, 3, 4, 4)], torch.ones(1, 4, 64).half(), ["a room"])
    assert all(part.dtype == torch.float32 for part in scenes.batch([(0, 0, 1)]))


def test_captions_are_encoded_once(tmp_path):
    seen = []
    def encode(captions):
        seen.extend(captions)
        return torch.ones(len(captions), 6, 2)
    cache = LatentCache(tmp_path, {"text": 1})
    for _ in range(2): fill_texts(cache, ["a", "b", "a", "a"], encode)
    assert sorted(seen) == ["a", "b"] and texts(cache, ["a", "a"]).shape == (2, 6, 2)


KILLED = """
import sys, time, torch
from camflow.data.cache import LatentCache, fill
seen = []
def slow(batch):
    seen.extend(batch)
    time.sleep(600 if len(seen) > 100 else 0.01)         # it cannot come to its end before it is killed
    return {"latents": torch.stack(batch)}
fill(LatentCache(sys.argv[1], {"v": 1}), [f"k{i}" for i in range(200)], lambda k: torch.full((4,), float(k[1:])), slow, batch=2, shard=4)
"""


def test_killed_fill_continues(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while len(list(tmp_path.glob("*.safetensors"))) < 3 and process.poll() is None: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cache = LatentCache(tmp_path)
    kept, keys = len(cache), [f"k{i}" for i in range(200)]
    assert 0 < kept < 200
    assert fill(cache, keys, lambda k: torch.full((4,), float(k[1:])), lambda batch: {"latents": torch.stack(batch)}) == 200 - kept
    assert LatentCache(tmp_path).stack(keys, "latents")[:, 0].tolist() == [float(i) for i in range(200)]


def test_broken_shard_is_named(tmp_path):
    LatentCache(tmp_path, {"v": 1}).add({"a": {"x": torch.ones(2)}})
    shard = next(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(InputError, match=shard.name): LatentCache(tmp_path)


def test_tiny_vae_reconstructs_held_out_scenes(base):
    "The committed weights: held-out PSNR and latents of unit variance."
    from diffusers import AutoencoderKLWan
    from camflow.wan.vae import encode_video
    folder = ROOT/"data/tiny/vae"
    if not folder.exists(): pytest.skip("data/tiny/vae is not in this checkout")
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval()
    bank = WorldBank(base["clips_folder"], HELD_OUT, 6, 2)
    assert vae_quality(vae, bank, 12)["psnr"] > 21.5
    with torch.no_grad(): z = encode_video(vae, torch.stack([signed(bank.images(i, 1)) for i in range(6)]))
    assert 0.8 < z.std() < 1.2 and z.mean().abs() < 0.2


def test_tiny_recam_beats_copying(base):
    "The committed weights, held-out scenes: the sample is nearer to the truth than the copied source, and needs the right camera."
    folder = ROOT/"data/tiny/recam"
    if not (folder/"transformer").exists(): pytest.skip("data/tiny/recam is not in this checkout")
    from diffusers import AutoencoderKLWan
    vae = AutoencoderKLWan.from_pretrained(ROOT/"data/tiny/vae", torch_dtype=torch.float32).eval()
    model = ReCamTransformer3DModel.from_pretrained(folder/"transformer", torch_dtype=torch.float32).eval()
    bank = WorldBank(base["clips_folder"], HELD_OUT, 16, 2)
    latents = finetune.latent_encoder(vae)([signed(bank.images(i, n)) for i in range(16) for n in range(2)])["latents"].unflatten(0, (16, 2))
    poses = [torch.stack([torch.as_tensor(bank.poses(i, n))[::4] for n in range(2)]) for i in range(16)]
    scenes = LatentScenes(list(latents), poses, torch.zeros(16, 8, 64), bank.captions)
    numbers = finetune.compare(model, scenes, vae, lambda s, n: signed(bank.images(s, n)), count=16)
    assert numbers["psnr_sample"] > numbers["psnr_copy"] + 1 and numbers["psnr_sample"] > numbers["psnr_wrong_camera"] + 0.5, numbers


def test_finetune_on_a_multicam_folder(base, tmp_path):
    "The published data layout, end to end: read, encode once, train ReCam's part, resume from the caches."
    from camflow.data.multicam import MultiCamVideo
    from camflow.world.write import write_multicam
    write_multicam(tmp_path/"data", scenes=2, frames=9, cameras=3, val=False)
    config = {**base, "data": "multicam", "root": str(tmp_path/"data"), "trained": "recam", "cache_folder": str(tmp_path/"cache"), "steps": 2}
    assert main(config, tmp_path/"run").step == 2
    data = MultiCamVideo(tmp_path/"data")
    _, vae, text, scenes, held_out, _ = finetune.datasets(configuration(config, finetune.DEFAULTS), tmp_path/"run")
    assert held_out is None and len(scenes) == 2 and len(scenes.latents[0]) == 3 and scenes.latents[0][0].shape == (16, 3, 6, 10)
    names = data.videos(data.scenes[1])
    item = data.load(data.scenes[1], names[2], names[0])
    torch.testing.assert_close(scenes.condition(1, 2, 0), item.camera, atol=1e-5, rtol=1e-5)
    encoded = finetune.latent_encoder(vae)([item.target.signed().data.transpose(0, 1)])["latents"][0]
    torch.testing.assert_close(scenes.latents[1][0], encoded, atol=2e-3, rtol=2e-3)


def test_texts_of_another_encoder_are_refused_before_videos_are_encoded(base, tmp_path):
    from camflow.world.write import write_multicam
    write_multicam(tmp_path/"data", scenes=1, frames=5, cameras=2, size=(32, 48), val=False)
    LatentCache(tmp_path/"cache/text", {"text": "another"})
    with pytest.raises(InputError, match="text was made with other"): main({**base, "data": "multicam", "root": str(tmp_path/"data"), "frames": 5, "size": [32, 48], "cache_folder": str(tmp_path/"cache")}, tmp_path/"run")
    assert not list((tmp_path/"cache").rglob("*.safetensors"))


def test_activation_checkpointing_changes_no_gradient():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    args = [draw(1, 16, 3, 6, 10), draw(1, 16, 3, 6, 10), draw(1, 3, 12), draw(1, 4, 64), draw(1, 16, 3, 6, 10), torch.tensor([0.4]), torch.ones(1)]
    grads = []
    for checkpointing in (False, True):
        model = tiny_recam(0, num_layers=2).train()
        if checkpointing: model.enable_gradient_checkpointing()
        flow_loss(model, *args).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(torch.equal(a, b) for a, b in zip(*grads))

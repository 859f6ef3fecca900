"""Wan and ReCam: equal to the reference, any grid and batch, exact checkpoints, a pipeline that can be saved and steered."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from camflow.files import InputError
from camflow.wan import convert, sampling, vae as video_vae
from camflow.wan.pipeline import ReCamPipeline, tiny_pipeline
from camflow.wan.recam import ReCamTransformer3DModel, cast, is_trainable, tiny_recam
from camflow.wan.transformer import attention_plan, attention_report
from tests.parity import wan as parity

GOLDENS = Path(__file__).parent / "goldens" / "recam"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "goldens" / "recam"
HERE = [n for n in json.loads((GOLDENS / "cases.json").read_text()) if (GOLDENS / f"{n}.safetensors").exists()]


def generator(seed=0): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- parity ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def replayed(): return parity.check(GOLDENS)


@pytest.mark.parametrize("case", HERE + ["prompt_clean", "shapes_recam_1p3b", "shapes_wan_1p3b", "shapes_vae_full", "shapes_umt5_tiny"])
def test_golden(replayed, case):
    diff, atol, _, ok = replayed[case]
    assert ok, f"{case}: {diff:.3g} above {atol:g}"


@pytest.mark.parametrize("case", ["vae_tiled", "denoise_cfg5", "recam_grid30x52", "pipeline_e2e"])
def test_large_golden(case):
    if not (SHARED / f"{case}.safetensors").exists(): pytest.skip(f"{case} is not copied into the repository (size); it lies in ../shared/goldens/recam")
    folder = parity.Folder(SHARED)
    config = folder.cases[case]
    diff, atol, _, ok = parity.KINDS[config["kind"]](folder, config, *folder.tensors(case))
    assert ok, f"{case}: {diff:.3g} above {atol:g}"


@pytest.mark.parametrize("what", ["input.camera", "input.timestep", "gain", "head"])
def test_parity_notices_one_change(tmp_path, what):
    "The harness fails when one input, one configuration number or one weight differs."
    case = json.loads((GOLDENS / "cases.json").read_text())["recam_tiny"]
    tensors, shapes = load_file(GOLDENS / "recam_tiny.safetensors"), json.loads((GOLDENS / "shapes_tiny.json").read_text())
    if what.startswith("input."): tensors[what] = tensors[what].clone().index_fill_(-1, torch.tensor([0]), 0.5)
    elif what == "gain": case["config"]["gain"] = 1.01
    save_file(tensors, tmp_path / "recam_tiny.safetensors")
    (tmp_path / "cases.json").write_text(json.dumps({"recam_tiny": case, "future": {"kind": "unheard of", "config": {}}}))
    (tmp_path / "shapes_tiny.json").write_text(json.dumps(shapes))
    if what == "head":
        folder = parity.Folder(tmp_path)
        folder.weights = lambda name, gain=1.0: {k: v + 1e-3 * (k == "head.head.bias") for k, v in parity.Folder.weights(folder, name, gain).items()}
        assert not parity.recam(folder, case, *folder.tensors("recam_tiny"))[3]
    else:
        results = parity.check(tmp_path)
        assert results["recam_tiny"][3] is False and results["future"][3] is None


def test_parity_counts_nan_as_failure():
    assert parity.difference([(torch.tensor([1.0, float("nan")]), torch.ones(2)), (torch.ones(1), torch.ones(1))]) == float("inf")


def test_trainable_count():
    shapes = json.loads((GOLDENS / "shapes_recam_1p3b.json").read_text())
    state = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    names = convert.dit_to_diffusers(state)
    assert sum(v.numel() for k, v in names.items() if is_trainable(k)) == 354_816_000
    assert len(names) == 945 and convert.dit_to_reference(names).keys() == shapes.keys()


# --- transformer ----------------------------------------------------------------------------------------------------------------
def inputs(batch=2, frames=3, rows=4, columns=6, width=64):
    z = (16, frames, rows, columns)
    return dict(hidden_states=normal(batch, *z), timestep=torch.linspace(30, 970, batch), encoder_hidden_states=normal(batch, 5, width, seed=1),
                source=normal(batch, *z, seed=2), camera=normal(batch, frames, 12, seed=3))


def moving(model):
    "Camera layers away from their start, so that a camera matters."
    for block in model.blocks: torch.nn.init.normal_(block.cam_encoder.weight, std=0.3, generator=generator(5))
    return model.eval()


@pytest.mark.parametrize("grid", [(1, 1, 2, 2), (3, 5, 6, 10), (2, 2, 8, 4)])
@torch.no_grad()
def test_any_grid_and_per_sample_timesteps(grid):
    model, x = moving(tiny_recam(num_layers=2)), inputs(*grid)
    together = model(**x)
    alone = torch.cat([model(**{k: v[i:i + 1] for k, v in x.items()}) for i in range(grid[0])])
    assert together.shape == x["hidden_states"].shape and torch.allclose(together, alone, atol=2e-5)
    assert torch.allclose(model(**{**x, "timestep": torch.tensor([500.0])}), model(**{**x, "timestep": torch.full((grid[0],), 500.0)}), atol=1e-6)


@torch.no_grad()
def test_shared_positions_make_the_halves_alike():
    "With shared positions and no source mark, exchanging target and source exchanges the predictions; with the published positions it does not."
    x = inputs()
    swapped = {**x, "hidden_states": x["source"], "source": x["hidden_states"]}
    for shared in (True, False):
        model = moving(tiny_recam(num_layers=2, shared_source_positions=shared, source_embedding=False))
        (a, b), (c, d) = model(**x, return_source=True), model(**swapped, return_source=True)
        assert (torch.allclose(a, d, atol=1e-5) and torch.allclose(b, c, atol=1e-5)) is shared


@torch.no_grad()
def test_camera_reaches_its_own_frames_on_both_halves():
    "One block, no attention across tokens: the camera of frame k changes the attention input of frame k in target and source alike."
    model, x, seen = moving(tiny_recam(num_layers=1)), inputs(1), []
    model.blocks[0].attn1.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(**x)
    other = x["camera"].clone()
    other[:, 1] += 1
    model(**{**x, "camera": other})
    changed = (seen[0] - seen[1]).abs().amax(-1).view(6, -1) > 0
    assert changed.all(1).tolist() == [False, True, False, False, True, False] and changed.any(1).tolist() == changed.all(1).tolist()


def test_no_float64_and_no_complex_on_the_device_path(monkeypatch):
    "Every operation of a training step is float32 or narrower; the sinusoid is made on the host."
    model, x, seen = tiny_recam(num_layers=2), inputs(), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex64, torch.complex128): seen.add(str(func))
            return out

    ready = model.condition_embedder.timesteps_proj(x["timestep"])
    monkeypatch.setattr("camflow.wan.transformer.timestep_sinusoid", lambda t, dim: ready)
    with Watch(): model(**x).square().mean().backward()
    assert not seen


def test_bf16_stays_near_float32():
    model, x = moving(tiny_recam(num_layers=2)), inputs()
    with torch.no_grad():
        exact = model(**x)
        low = cast(model, torch.bfloat16)(**{k: v if k == "timestep" else v.bfloat16() for k, v in x.items()})
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16 and model.scale_shift_table.dtype == torch.float32
    assert low.dtype == torch.bfloat16 and (low.float() - exact).abs().max() < 0.15 * exact.abs().max()


def test_attention_is_planned_and_reported():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    x = inputs()
    with torch.no_grad():
        whole = moving(tiny_recam(num_layers=2))
        chunked = moving(tiny_recam(num_layers=2, score_limit=2 * 3 * 144 * 4 * 5))
        with sdpa_kernel(SDPBackend.MATH): assert torch.allclose(whole(**x), chunked(**x), atol=1e-5)
    assert "chunks of 5 queries" in attention_report(chunked)["self"] and "whole" in attention_report(whole)["self"]
    q = torch.empty(1, 12, 65520, 128, dtype=torch.bfloat16, device="meta")
    assert attention_plan(q, q, q).score_bytes == 65520**2 * 12 * 4


def test_lora_trains_and_is_saved(tmp_path):
    from peft import LoraConfig
    model, x = tiny_recam(num_layers=1), inputs()
    before = model(**x).detach()
    model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q", "attn1.to_out.0", "cam_encoder", "projector"], init_lora_weights=False))
    with torch.no_grad(): changed = model(**x)
    assert (changed - before).abs().max() > 1e-4 and all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    model.save_lora_adapter(tmp_path)
    other = tiny_recam(num_layers=1)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    with torch.no_grad(): assert torch.allclose(other(**x), changed, atol=1e-6)


# --- VAE ------------------------------------------------------------------------------------------------------------------------
def test_tiny_vae_is_seeded_and_leaves_the_random_state():
    state = torch.get_rng_state()
    a, b = video_vae.tiny_vae(3), video_vae.tiny_vae(3)
    assert torch.equal(torch.get_rng_state(), state) and all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert sum(p.numel() for p in a.parameters()) < 2_000_000


def test_tiny_vae_learns_at_once():
    "Five steps on one clip lower the error clearly; from the library's start they do not."
    clip = torch.nn.functional.interpolate(normal(2, 3, 5, 4, 4), (5, 32, 32), mode="trilinear").clamp(-1, 1)
    vae = video_vae.tiny_vae()
    optimizer, losses = torch.optim.AdamW(vae.parameters(), lr=2e-3), []
    for _ in range(6):
        loss = (video_vae.decode_latents(vae, video_vae.encode_video(vae, clip), clamp=False) - clip).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape,words", [((1, 3, 8, 32, 32), "1 \\+ 4k"), ((1, 3, 5, 30, 32), "multiples of 8"), ((1, 4, 5, 32, 32), r"\[batch, 3")])
def test_bad_videos_are_refused(shape, words):
    with pytest.raises(InputError, match=words): video_vae.encode_video(video_vae.tiny_vae(), torch.zeros(shape))


@torch.no_grad()
def test_tiles_may_lie_edge_to_edge():
    vae, tiles = video_vae.tiny_vae(), video_vae.tiling([[3, 5], [3, 5]])
    video = normal(1, 3, 5, 48, 80).clamp(-1, 1)
    z = video_vae.encode_as(vae, video, tiles)
    parts = [[video_vae.encode_video(vae, video[..., r:r + 24, c:c + 40]) for c in (0, 40)] for r in (0, 24)]
    assert torch.equal(z, torch.cat([torch.cat(row, -1) for row in parts], -2)) and video_vae.decode_tiled(vae, z, *tiles).shape == video.shape


@torch.no_grad()
def test_cached_decoding_clamps_nothing_before_blending():
    "Tiles of a large video are decoded frame by frame; they must not be clamped one by one."
    vae = video_vae.tiny_vae()
    z = 20 * normal(1, 16, 3, 2, 2)
    whole, cached = video_vae.decode_raw(vae, z, whole=True), video_vae.decode_raw(vae, z, whole=False)
    assert whole.abs().max() > 1.5 and torch.allclose(whole, cached, atol=1e-4)
    assert torch.allclose(cached.clamp(-1, 1), vae.decode(z).sample, atol=1e-5)


def test_published_vae_takes_the_cached_loop_for_long_videos():
    from diffusers import AutoencoderKLWan
    with torch.device("meta"): published = AutoencoderKLWan()
    assert not video_vae.fits_whole(published, 81 * 480 * 832) and video_vae.fits_whole(video_vae.tiny_vae(), 64 * 9 * 48 * 80)


# --- converters -----------------------------------------------------------------------------------------------------------------
def test_files_of_either_kind_load_the_same(tmp_path):
    model = tiny_recam(num_layers=1, shared_source_positions=False, source_embedding=False)
    published = convert.dit_to_reference(model.state_dict())
    save_file(published, tmp_path / "a.safetensors")
    torch.save(published, tmp_path / "b.ckpt")
    for name in ("a.safetensors", "b.ckpt"):
        again = convert.recam_from_reference(convert.read_weights(tmp_path / name), num_heads=6)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="no checkpoint"): convert.read_weights(tmp_path / "c.ckpt")


def test_foreign_names_are_refused():
    published = convert.dit_to_reference(tiny_recam(num_layers=1, source_embedding=False).state_dict())
    with pytest.raises(InputError, match="do not belong to this model"): convert.recam_from_reference({**published, "teacache.weight": torch.zeros(1)}, num_heads=6)
    with pytest.raises(InputError, match="1 missing"): convert.recam_from_reference({k: v for k, v in published.items() if k != "blocks.0.modulation"}, num_heads=6)


def test_image_to_video_names():
    names = ["img_emb.proj.0.weight", "img_emb.proj.4.bias", "blocks.3.cross_attn.k_img.weight", "blocks.3.cross_attn.norm_k_img.weight", "img_emb.emb_pos"]
    ours = ["condition_embedder.image_embedder.norm1.weight", "condition_embedder.image_embedder.norm2.bias", "blocks.3.attn2.add_k_proj.weight", "blocks.3.attn2.norm_added_k.weight", "condition_embedder.image_embedder.pos_embed"]
    assert list(convert.dit_to_diffusers(dict.fromkeys(names, 0))) == ours and list(convert.dit_to_reference(dict.fromkeys(ours, 0))) == names


# --- sampling and pipeline ------------------------------------------------------------------------------------------------------
def test_sigmas_are_not_those_of_diffusers_by_default():
    from diffusers import FlowMatchEulerDiscreteScheduler
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, 51)[:-1].tolist())
    assert torch.allclose(theirs.sigmas, sampling.recam_sigmas(50), atol=1e-6)
    theirs.set_timesteps(50)
    assert (theirs.sigmas - sampling.recam_sigmas(50)).abs().max() > 0.05
    with pytest.raises(InputError, match="strength"): sampling.recam_sigmas(10, strength=0)


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    moving(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CLIP = normal(1, 3, 9, 32, 48, seed=7).clamp(-1, 1)
CAMERA = torch.eye(4)[:3].reshape(1, 1, 12).repeat(1, 3, 1)


def test_pipeline_survives_saving(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = ReCamPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    run = lambda p: p(CLIP, CAMERA, "a red box", num_inference_steps=2, generator=generator(1), output_type="pt").frames
    assert isinstance(again.transformer, ReCamTransformer3DModel) and torch.equal(run(pipe), run(again))


def test_batch_equals_samples_one_by_one(pipe):
    cameras = torch.cat([CAMERA, CAMERA + normal(1, 3, 12, seed=9)])
    run = lambda c, g: pipe(CLIP, c, "a room", num_inference_steps=2, guidance_scale=3.0, generator=g, output_type="latent").frames
    both = run(cameras, [generator(1), generator(2)])
    each = torch.cat([run(cameras[:1], generator(1)), run(cameras[1:], generator(2))])
    assert torch.allclose(both, each, atol=1e-4) and (both[0] - both[1]).abs().max() > 1e-2


def test_callback_steers(pipe):
    out = pipe(CLIP, CAMERA, num_inference_steps=2, guidance_scale=1.0, output_type="latent", callback_on_step_end=lambda p, i, t, kw: {"latents": torch.zeros_like(kw["latents"])} if i else {}).frames
    assert (out == 0).all()


def test_pipeline_errors(pipe):
    with pytest.raises(InputError, match="output_type"): pipe(CLIP, CAMERA, output_type="mp4")
    bare = ReCamPipeline(pipe.transformer, pipe.vae)
    with pytest.raises(InputError, match="no text encoder"): bare(CLIP, CAMERA, num_inference_steps=1)

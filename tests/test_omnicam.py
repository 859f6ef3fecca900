"""OmniCam's network and files: the camera steers in eval mode, the adapter trains, published checkpoints and LoRAs of every maker are read or refused with a reason."""
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from camflow.files import InputError
from camflow.geometry.camera import Cameras
from camflow.geometry.rigid import se3_exp
from camflow.wan.i2v_condition import image_condition, model_input, tiny_image_encoder
from camflow.wan.lora import LORA_LAYERS, add_lora, linear_layers, load_lora, lora_pairs, match_lora, save_lora, trainable_modules
from camflow.wan.omnicam import OmniCamTransformer3DModel, camera_rays, from_wan, is_camera, stack_frames, tiny_omnicam
from camflow.wan.omnicam_compat import OMNICAM, PublishedOmniCam, camera_attention_cost, omnicam_from_reference, omnicam_to_reference, pose_index, published_from_reference
from camflow.wan.recam import cast
from camflow.wan.timesteps import RULES, TimestepSampler, draw, stratified
from camflow.wan.transformer import exact_positions, plan_attention
from tests.parity import omnicam_model as parity
from tests.parity.seeded import seeded_array

GOLDENS = Path(__file__).parent / "goldens" / "omnicam"
K = torch.tensor([0.9, 1.5, 0.5, 0.5])
SMALL = dict(num_attention_heads=2, attention_head_dim=24, in_channels=36, out_channels=16, num_layers=2, ffn_dim=64, text_dim=16, freq_dim=32, image_dim=12, added_kv_proj_dim=48)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def path(frames=9, twist=(0.0, 0.3, 0.0, 0.0, 0.0, 0.0)):
    "A path of constant velocity from the identity; rotation, then translation."
    return torch.stack([se3_exp(torch.tensor(twist, dtype=torch.float64) * k / max(frames - 1, 1)) for k in range(frames)])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(): return normal(2, 36, 3, 6, 10), torch.tensor([300.0, 800.0]), normal(2, 5, 64), normal(2, 50, 32)


def open_gates(model, seed=0):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "camera_gate" in name or "camera_input" in name: p.copy_(0.3 * normal(*p.shape, seed=seed))
    return model


def two_cameras(grid=(6, 10), batch=2):
    return [camera_rays(path(twist=t), K, grid).expand(batch, -1, -1, -1, -1) for t in ((0, 0.3, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1.0))]


# ---- the camera steers

@pytest.mark.parametrize("attention", ["global", "frame"])
def test_gates_shut_is_the_base_bit_for_bit_and_open_steers_in_eval_mode(inputs, attention):
    wan = exact_positions(plan_attention(WanTransformer3DModel(**{k: v for k, v in tiny_omnicam().config.items() if k in WanTransformer3DModel.__init__.__wrapped__.__code__.co_varnames}), text_length=64))
    model = from_wan(wan, text_length=64, camera_dim=64, camera_attention=attention).eval()
    x, t, text, clip = inputs
    a, b = two_cameras()
    with torch.no_grad():
        base = wan(x, t, torch.nn.functional.pad(text, (0, 0, 0, 59)), clip).sample
        assert torch.equal(model(x, t, text, clip).sample, base) and torch.equal(model(x, t, text, clip, camera=a).sample, base)
        open_gates(model)
        one, two, none = (model(x, t, text, clip, camera=c).sample for c in (a, b, torch.zeros_like(a)))
    assert not model.training and (one - two).abs().max() > 0.01 and torch.allclose(none, base, atol=1e-5)
    assert model.config.camera_attention == attention


def test_adapter_tensors_are_in_the_optimizer_and_change_after_a_step(inputs):
    model = tiny_omnicam()
    add_lora(model, rank=4)
    names = trainable_modules(model, ("lora_", "camera_"))
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    listed = {name for name, p in model.named_parameters() if id(p) in held}
    adapter = {name for name, _ in model.named_parameters() if is_camera(name)}
    assert adapter and adapter <= listed == set(names) and all("lora_" in name for name in listed - adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, t, text, clip = inputs
    for _ in range(2):                       # a shut gate passes no gradient on: the layers behind it move from the second step
        optimizer.zero_grad()
        (model(x, t, text, clip, camera=two_cameras()[0]).sample - normal(2, 16, 3, 6, 10)).square().mean().backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if name in listed and torch.equal(p, before[name])]
    moved = [name for name, p in model.named_parameters() if name not in listed and not torch.equal(p, before[name])]
    assert not moved and not still


def test_stock_pipeline_steers_with_attention_kwargs():
    torch.manual_seed(0)
    model = open_gates(OmniCamTransformer3DModel(**SMALL, camera_dim=24, text_length=16)).eval()
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=model, image_encoder=tiny_image_encoder(width=12).model,
                                   image_processor=CLIPImageProcessor(do_center_crop=False, size={"height": 224, "width": 224}))
    pipe.set_progress_bar_config(disable=True)
    image = Image.effect_noise((48, 32), 60).convert("RGB")
    run = lambda camera: pipe(image=image, prompt_embeds=normal(1, 16, 16), negative_prompt_embeds=normal(1, 16, 16, seed=1),
                              height=32, width=48, num_frames=9, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent",
                              attention_kwargs={"camera": camera} if camera is not None else None).frames
    a, b, none = (run(c) for c in [*(r[:1] for r in two_cameras((2, 3))), None])
    assert a.shape == (1, 16, 3, 4, 6) and (a - b).abs().max() > 1e-3 and (a - none).abs().max() > 1e-3


def test_poses_belong_to_their_frames():
    "The rays of latent frame k are those of video frames 4k-3 .. 4k."
    c2w = path(13, (0.1, 0.3, -0.1, 0.2, 0.1, 1.0))
    rays = camera_rays(c2w, K, (3, 4))[0].unflatten(0, (4, 6))                      # [4,6,T,H,W]
    for k in range(4):
        for i in range(4):
            frame = 0 if k == 0 else 4 * k - 3 + i
            centre = c2w[frame, :3, 3].float()
            moment, d = rays[i, :3, k], rays[i, 3:, k]
            assert (moment - torch.linalg.cross(centre[:, None, None].expand_as(d), d, dim=0)).abs().max() < 1e-6
    assert torch.equal(stack_frames(torch.arange(5.0)[:, None, None, None])[:, :, 0, 0], torch.tensor([[0.0, 1], [0, 2], [0, 3], [0, 4]]))


@pytest.mark.parametrize("bad, says", [(path(8), "1 \\+ 4k"), (path(13), "needs 9 poses"), (path(9) * 2, "last row"), (path(13)[:10], "1 \\+ 4k"), (path(13)[4:], "relative to frame 0"),
                                       (torch.full((9, 4, 4), math.nan), "NaN"), (path(9) * torch.tensor([1.0, 1.2, 1, 1])[:, None], "not orthonormal")])
def test_camera_paths_that_do_not_fit(inputs, bad, says):
    x, t, text, clip = (i[:1] for i in inputs)
    with pytest.raises(InputError, match=says): tiny_omnicam()(x, t, text, clip, camera=(bad[None], K[None]))


def test_storage_in_eight_bits_and_offload(inputs):
    "fp8 storage through diffusers' hooks leaves the gates alone; block offload changes nothing."
    x, t, text, clip = inputs
    model = open_gates(tiny_omnicam()).eval()
    with torch.no_grad(): want = model(x, t, text, clip, camera=two_cameras()[0]).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn and model.blocks[0].camera_gate.dtype == torch.float32
    with torch.no_grad(): assert 0 < (model(x, t, text, clip, camera=two_cameras()[0]).sample - want).abs().max() < 0.2 * want.abs().max()
    model = open_gates(tiny_omnicam()).eval()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with torch.no_grad(): assert torch.equal(model(x, t, text, clip, camera=two_cameras()[0]).sample, want)


def test_attention_backend_option_reaches_the_camera(inputs):
    x, t, text, clip = inputs
    model = open_gates(tiny_omnicam()).eval()
    with torch.no_grad():
        want = model(x, t, text, clip, camera=two_cameras()[0]).sample
        model.set_attention_backend("native")
        assert torch.allclose(model(x, t, text, clip, camera=two_cameras()[0]).sample, want, atol=1e-5)


def test_bfloat16_weights_run_and_steer(inputs):
    x, t, text, clip = (i if i.ndim == 1 else i.bfloat16() for i in inputs)
    model, (a, b) = open_gates(tiny_omnicam()).eval(), two_cameras()
    with torch.no_grad():
        want = model(*inputs, camera=a).sample
        cast(model, torch.bfloat16)
        one, two = (model(x, t, text, clip, camera=c).sample for c in (a, b))
    assert one.dtype == torch.bfloat16 and (one - want).abs().max() < 0.05 < (one - two).abs().max()
    published = published_from_reference({k: v.bfloat16() if v.is_floating_point() else v for k, v in published_state().items()}, num_heads=2).eval()
    args = normal(1, 36, 2, 4, 6).bfloat16(), torch.tensor([500.0]), normal(1, 5, 16).bfloat16(), normal(1, 5, 12).bfloat16()
    with torch.no_grad(): one, two = (published(*args, camera=(path(5, twist)[None], K[None])).sample for twist in ((0, 0.3, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1.0)))
    assert one.dtype == torch.bfloat16 and (one - two).abs().max() > 0.01


# ---- published checkpoints

def published_state():
    torch.manual_seed(0)
    return omnicam_to_reference(PublishedOmniCam(**SMALL).state_dict())


def test_scaled_eight_bit_files_are_refused_and_plain_ones_read():
    state = published_state()
    for extra in ({"scaled_fp8": torch.zeros(2)}, {"blocks.0.ffn.0.scale_weight": torch.ones(1)}, {"blocks.0.ffn.0.weight_scale": torch.ones(1)}):
        for load in (published_from_reference, omnicam_from_reference):
            with pytest.raises(InputError, match="fp8_scaled.*bf16"): load(state | extra, num_heads=2)
    eight = {k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in state.items()}
    model = published_from_reference(eight, num_heads=2)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


def test_checkpoint_of_another_model_is_refused():
    state = published_state()
    with pytest.raises(InputError, match="missing"): published_from_reference({k: v for k, v in state.items() if "running_mean" not in k}, num_heads=2)
    with pytest.raises(InputError, match="do not belong to this model"): omnicam_from_reference(state, num_heads=2)      # the adapter is not Wan's
    plain = {k: v for k, v in state.items() if "_camera1" not in k and "norm_k_cam1" not in k and not k.startswith(("conv.", "myadapter."))}
    with pytest.raises(InputError, match="do not fit"): omnicam_from_reference({k: v for k, v in plain.items() if k != "head.head.bias"}, num_heads=2, camera_dim=24)
    text_only = {k: v for k, v in plain.items() if "img" not in k}
    assert omnicam_from_reference(text_only, num_heads=2, camera_dim=24).config.image_dim is None


def test_pose_index_is_the_published_one():
    assert pose_index(114, 21).tolist() == [0, 5, 11, 16, 22, 28, 33, 39, 45, 50, 56, 62, 67, 73, 79, 84, 90, 96, 101, 107, 113]
    assert pose_index(25, 81).tolist() == [*range(25), *[24] * 56]


@pytest.mark.slow
def test_one_attention_instead_of_two():
    cost = camera_attention_cost(tokens=2048)
    assert cost["difference"] < 1e-5 and cost["attention_ratio"] >= 2


# ---- LoRA

def trained_lora(model, layers=LORA_LAYERS):
    add_lora(model, rank=4, alpha=2.0, layers=layers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.copy_(0.2 * normal(*p.shape))
    return model


@pytest.mark.parametrize("form", ["peft", "kohya", "comfy"])
def test_lora_of_the_published_adapter_goes_round(form, tmp_path):
    "Names with underscores inside (k_camera1, k_img) come back to their layers."
    make = lambda: published_from_reference(published_state(), num_heads=2).eval()
    layers = rf"{LORA_LAYERS}|blocks\.\d+\.attn2\.[kv]_camera1\.linear[12]"
    model = trained_lora(make(), layers)
    save_lora(model, tmp_path / "lora.safetensors", form)
    if form == "kohya": assert "lora_unet_blocks_0_cross_attn_k_camera1_linear1.lora_down.weight" in load_file(tmp_path / "lora.safetensors")
    other = make()
    report = load_lora(other, tmp_path / "lora.safetensors")
    assert len(report.matched) == 2 * 16 and not report.unmatched and report.form == form
    args = normal(1, 36, 2, 4, 6), torch.tensor([500.0]), normal(1, 5, 16), normal(1, 5, 12)
    camera = (path(5)[None], K[None])
    with torch.no_grad(): assert torch.allclose(other(*args, camera=camera).sample, model(*args, camera=camera).sample, atol=1e-5)


def layers_of(model, adapter): return {n: p.detach().clone() for n, p in model.named_parameters() if f".{adapter}." in n and "lora_" in n}


def test_a_second_lora_leaves_the_first_alone_and_both_act(tmp_path):
    model = trained_lora(tiny_omnicam())
    first, learns = layers_of(model, "default"), {n: p.requires_grad for n, p in model.named_parameters() if ".default." in n}
    add_lora(model, rank=2, seed=5, adapter="second")
    again = layers_of(model, "default")
    assert first.keys() == again.keys() and all(torch.equal(p, again[n]) for n, p in first.items())   # neither drawn anew nor changed
    assert learns == {n: p.requires_grad for n, p in model.named_parameters() if ".default." in n} and any(learns.values())
    layer = model.get_submodule("blocks.0.attn1.to_q")
    assert set(layer.active_adapters) == {"default", "second"}
    x, g = normal(3, layer.in_features), torch.Generator().manual_seed(6)
    with torch.no_grad():
        layer.lora_B["second"].weight.copy_(torch.randn(layer.lora_B["second"].weight.shape, generator=g))
        pairs = [lora_pairs(model, name)["blocks.0.attn1.to_q"] for name in ("default", "second")]
        own, both = layer.base_layer(x), layer(x)
    parts = [p.scale * (x @ p.down.T) @ p.up.T for p in pairs]
    assert all(part.abs().max() > 0.1 for part in parts) and torch.allclose(both, own + sum(parts), atol=1e-5)
    save_lora(model, tmp_path/"second.safetensors", adapter="second")
    other = trained_lora(tiny_omnicam())
    load_lora(other, tmp_path/"second.safetensors", adapter="second")                                  # reading a file is the same
    with torch.no_grad(): assert torch.allclose(other.get_submodule("blocks.0.attn1.to_q")(x), both, atol=1e-5)


def test_a_second_lora_starts_as_it_would_alone():
    alone, second = tiny_omnicam(), trained_lora(tiny_omnicam())
    for model in (alone, second): add_lora(model, rank=2, seed=5, adapter="second")
    a, b = layers_of(alone, "second"), layers_of(second, "second")
    assert a.keys() == b.keys() and all(torch.equal(p, b[n]) for n, p in a.items())
    with pytest.raises(InputError, match="already carries a LoRA named 'second'"): add_lora(second, rank=2, adapter="second")


def test_our_own_camera_layers_take_loras(tmp_path):
    model = trained_lora(tiny_omnicam(), r"blocks\.\d+\.camera_attn\.to_\w+")
    save_lora(model, tmp_path / "lora.safetensors", "kohya")
    assert len(load_lora(tiny_omnicam(), tmp_path / "lora.safetensors").matched) == 16


def test_partial_lora_loads_and_the_camera_keys_are_named(tmp_path):
    "An attention-only file, and one with keys of the published adapter, which this model has not."
    published = trained_lora(published_from_reference(published_state(), num_heads=2), r"blocks\.1\.(attn[12]\.to_[qv]|attn2\.k_camera1\.linear1)")
    save_lora(published, tmp_path / "lora.safetensors", "kohya")
    model = OmniCamTransformer3DModel(**SMALL, camera_dim=24)
    report = load_lora(model, tmp_path / "lora.safetensors", loud=False)
    assert sorted(report.matched) == [f"blocks.1.attn{n}.to_{x}" for n in (1, 2) for x in "qv"] and len(report.camera) == len(report.unmatched) == 3
    assert "3 keys unmatched (3 of the published camera adapter)" in str(report)


@pytest.mark.parametrize("stabilised", [False, True])
def test_peft_files_act_as_in_peft(tmp_path, stabilised):
    "Also those whose scale is alpha / sqrt(rank)."
    from peft import LoraConfig, inject_adapter_in_model
    made, plain = (torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(6, 5)])}) for _ in range(2))
    plain.load_state_dict(made.state_dict())
    layer = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, use_rslora=stabilised, target_modules=["blocks.0"]), made).blocks[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    told = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.use_rslora": stabilised}
    save_file({f"transformer.blocks.0.{side}.weight": getattr(layer, side)["default"].weight.detach().clone() for side in ("lora_A", "lora_B")},
              tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    load_lora(plain, tmp_path / "lora.safetensors", merge=True)
    x = torch.randn(3, 6)
    torch.testing.assert_close(plain.blocks[0](x), layer(x))


def test_lora_of_another_model_is_refused(tmp_path):
    save_lora(trained_lora(tiny_omnicam()), tmp_path / "tiny.safetensors", "kohya")
    other = OmniCamTransformer3DModel(**SMALL, camera_dim=24)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(InputError, match=r"192 -> 192 .* 48 -> 48: a LoRA of another model"): load_lora(other, tmp_path / "tiny.safetensors")
    save_file({"lora_te1_q.lora_down.weight": torch.zeros(4, 8), "lora_te1_q.lora_up.weight": torch.zeros(8, 4)}, tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="nothing in this LoRA fits"): load_lora(other, tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="nothing in this LoRA fits"): load_lora(other, {"blocks.0.hada_w1_a": torch.zeros(4, 8)})
    with pytest.raises(InputError, match="no LoRA file"): load_lora(other, tmp_path / "missing.safetensors")
    assert other.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_alpha_rule_and_warning():
    pair = {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(8, 192), "blocks.0.attn1.to_q.lora_B.weight": torch.ones(192, 8)}
    assert match_lora(tiny_omnicam(), pair)[0]["blocks.0.attn1.to_q"].scale == 1.0                       # no alpha: the rank
    with pytest.warns(UserWarning, match="1/rank"): found, report = match_lora(tiny_omnicam(), pair | {"blocks.0.attn1.to_q.alpha": torch.tensor(1.0)})
    assert found["blocks.0.attn1.to_q"].scale == 1 / 8 and report.alphas == {0.125: 1}


def test_diffusers_loads_our_peft_file(tmp_path):
    "The PEFT form through diffusers' own loader gives the same weights."
    model = trained_lora(OmniCamTransformer3DModel(**SMALL, camera_dim=24))
    save_lora(model, tmp_path / "lora.safetensors", "peft")
    plain = OmniCamTransformer3DModel(**SMALL, camera_dim=24)
    plain.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer")
    ours, theirs = lora_pairs(model), lora_pairs(plain, next(iter(plain.peft_config)))
    assert ours.keys() == theirs.keys() and len(ours) == 24
    assert all(torch.allclose(a.scale * a.up @ a.down, theirs[k].scale * theirs[k].up @ theirs[k].down, atol=1e-6) for k, a in ours.items())


def test_every_linear_layer_has_one_name():
    from camflow.wan.lora import layer_aliases
    with torch.device("meta"): model = OmniCamTransformer3DModel()
    names, layers = layer_aliases(model), linear_layers(model)
    assert set(names.values()) == set(layers) and len({k for k in names if "_" in k and "." not in k}) >= len(layers)
    assert sum(1 for name in layers if name.startswith("blocks.0.")) == 12 + 4


# ---- timesteps

@pytest.mark.parametrize("rule", RULES)
def test_every_rule_stays_in_range_and_repeats(rule):
    sampler = TimestepSampler(rule, min_timestep=100, max_timestep=900)
    a, b = (draw(sampler, 400, torch.Generator().manual_seed(1), size=(60, 104)) for _ in range(2))
    assert torch.equal(a, b) and 0.099 <= a.min() and a.max() <= 0.901 and a.unique().numel() > 100


def test_stratified_levels_cover_the_range_and_do_not_depend_on_history():
    sampler = TimestepSampler("shift", shift=3.0)
    levels = sampler.level(u=stratified(20, 20, seed=42, epoch=1))
    quantiles = sampler.level(u=torch.linspace(0, 1, 21))
    assert ((levels.sort().values >= quantiles[:-1]) & (levels.sort().values <= quantiles[1:])).all()
    assert not torch.equal(stratified(20, 20, 42, 1), stratified(20, 20, 42, 2))


# ---- image condition

def test_the_parts_fit_together():
    from camflow.wan.vae import tiny_vae
    from camflow.media.frames import Frames
    first = Frames(torch.rand(1, 3, 48, 80), "unit")
    condition, clip = image_condition(tiny_vae().eval(), first.signed().data, 9), tiny_image_encoder().encode(first)
    x = model_input(normal(1, 16, 3, 6, 10), 36, condition)
    camera = Cameras(path(9), torch.tensor([[60.0, 0, 40], [0, 60, 24], [0, 0, 1]]), (48, 80))
    out = tiny_omnicam()(x, torch.tensor([500.0]), normal(1, 4, 64), clip, camera=(camera.c2w[None], torch.tensor([[60 / 80, 60 / 48, 0.5, 0.5]]))).sample
    assert out.shape == (1, 16, 3, 6, 10)


# ---- parity

@pytest.fixture(scope="module")
def results(): return parity.check(GOLDENS)


def test_goldens(results):
    failed = {case: result for case, result in results.items() if result[3] is False}
    assert not failed and sum(result[3] is True for result in results.values()) >= 18, failed


def test_a_perturbed_weight_fails(monkeypatch):
    def perturbed(name, shape, gain=1.0):
        array = seeded_array(name, shape, gain)
        if name == "blocks.1.cross_attn.v_camera1.linear2.bias": array[0] += 0.01
        return array
    monkeypatch.setattr("tests.parity.wan.seeded_array", perturbed)
    folder = parity.Folder(GOLDENS)
    case = folder.cases["wan_i2v_camera_tiny"]
    assert not parity.wan_i2v_camera(folder, case, *folder.tensors("wan_i2v_camera_tiny"))[""][3]
    assert len(OMNICAM) > 30

"ControlNets for SD and SVD: zero start, layout, the public SVD ControlNet's defects, refusals, resume."
import pytest
import torch
from diffusers import ControlNetModel, StableVideoDiffusionPipeline

from camflow.device import generator
from camflow.files import InputError
from camflow.joint import controlnet_train as ct, train
from camflow.joint.codecs import DepthCodec, RGBCodec
from camflow.joint.controlnet_sd import control_images, control_pipeline, sd_controlnet
from camflow.joint.controlnet_svd import ControlNetSpatioTemporal, SVDControlNetPipeline, condition_tensor, controlled, picture, steered
from camflow.joint.models import tiny_sd, tiny_svd
from camflow.joint.svd_lora import add_svd_lora
from camflow.media.frames import Depth, Frames

DEEP = dict(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4), layers_per_block=2)  # with a downsampler, as the published network
SMALL = dict(batch_size=2, items=4, held_out=2, sample_steps=1, warmup=0, frames=3, schedule="constant")


def inputs(frames=3):
    return torch.randn(2, frames, 6, 16, 16, generator=generator(0)), torch.tensor([0.3, -1.0]), torch.randn(2, 1, 16, generator=generator(1)), torch.tensor([[6., 127., 0.02]] * 2)


def signed(frames=3, batch=2): return torch.rand(batch, frames, 3, 16, 16, generator=generator(2)) * 2 - 1


@pytest.mark.parametrize("changes", [{}, DEEP])
def test_residuals_reach_their_skip_connections(changes):
    "Against the arithmetic written out: every skip of every decoder block, and the middle, get their own residual."
    unet = tiny_svd(**changes)["unet"]
    controlnet = ControlNetSpatioTemporal.from_unet(unet, factor=1).eval()
    with torch.no_grad():
        base = unet(*inputs()).sample
        down, mid = controlnet(*inputs(), signed())
        with controlled(unet, down, mid): assert torch.equal(unet(*inputs()).sample, base)
        down, mid = [torch.full_like(x, 0.1 * (i + 1)) for i, x in enumerate(down)], torch.full_like(mid, 7.0)
        plain, got = {}, {}
        for store, given in ((plain, None), (got, (down, mid))):
            hooks = [b.register_forward_hook(lambda m, a, k, o, i=i, s=store: s.update({i: (k["hidden_states"], k["res_hidden_states_tuple"])}), with_kwargs=True) for i, b in enumerate(unet.up_blocks)]
            if given is None: unet(*inputs())
            else:
                with controlled(unet, *given): unet(*inputs())
            for hook in hooks: hook.remove()
        order = [r for i in range(len(unet.up_blocks)) for r in reversed(got[i][1])]
        before = [r for i in range(len(unet.up_blocks)) for r in reversed(plain[i][1])]
        for a, b, residual in zip(order, before, reversed(down), strict=True): assert torch.allclose(a - b, residual, atol=1e-5)
        assert torch.allclose(got[0][0] - plain[0][0], mid, atol=1e-4)
        assert torch.equal(unet(*inputs()).sample, base)


def test_saved_in_the_librarys_layout(tmp_path):
    controlnet = ControlNetSpatioTemporal.from_unet(tiny_svd(**DEEP)["unet"], factor=1, conditioning_range="unit", conditioning_kind="depth")
    with torch.no_grad():
        for p in controlnet.controlnet_down_blocks.parameters(): p.normal_(generator=generator(3))
    controlnet.save_pretrained(tmp_path)
    again = ControlNetSpatioTemporal.from_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert again.config.conditioning_range == "unit" and again.config.conditioning_kind == "depth"
    assert all(torch.equal(a, b) for a, b in zip(controlnet.state_dict().values(), again.state_dict().values(), strict=True))


def test_whole_pipeline_through_a_folder(tmp_path):
    parts = tiny_svd()
    pipe = SVDControlNetPipeline(**parts, controlnet=ControlNetSpatioTemporal.from_unet(parts["unet"], factor=1))
    again = SVDControlNetPipeline.from_pretrained(_saved(pipe, tmp_path), vae=parts["vae"])
    options = dict(num_inference_steps=1, output_type="pt")
    first, depth = Frames(signed()[0, :1], "signed"), Frames(signed()[0], "signed")
    for part in ("unet", "image_encoder", "controlnet"): assert all(torch.equal(a, b) for a, b in zip(getattr(pipe, part).state_dict().values(), getattr(again, part).state_dict().values(), strict=True))
    a, b = (p(first, depth, generator=generator(1), **options).frames for p in (pipe, again))
    assert torch.allclose(a, b, atol=1e-3)      # equal weights that lie elsewhere in memory: narrow products round differently


def _saved(pipe, folder):
    pipe.save_pretrained(folder)
    return folder


def test_start_is_seeded():
    parts, video = tiny_sd(), tiny_svd()
    a, b, c = (sd_controlnet(parts["unet"], 1, seed=s).controlnet_cond_embedding.conv_in.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    a, b, c = (ControlNetSpatioTemporal.from_unet(video["unet"], 1, seed=s).controlnet_cond_embedding.conv_in.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def moved(controlnet):
    with torch.no_grad(): controlnet.controlnet_mid_block.weight.normal_(generator=generator(4)), controlnet.controlnet_cond_embedding.conv_out.weight.normal_(generator=generator(5))
    return controlnet


def test_pipeline_tells_network_and_controlnet_the_same_ids(monkeypatch):
    "Published pipeline and trainer disagree on the order of fps, motion and strength."
    parts = tiny_svd()
    controlnet = ControlNetSpatioTemporal.from_unet(parts["unet"], factor=1)
    pipe, seen = SVDControlNetPipeline(**parts, controlnet=controlnet), {}
    forward = type(controlnet).forward
    monkeypatch.setattr(type(controlnet), "forward", lambda self, x, t, e, ids, *rest: (seen.update(ids=ids), forward(self, x, t, e, ids, *rest))[1])
    pipe(Frames(signed()[0, :1], "signed"), Frames(signed()[0], "signed"), num_inference_steps=1, fps=9, motion_bucket_id=40, noise_aug_strength=0.1, output_type="pt", generator=generator(0))
    assert torch.allclose(seen["ids"], torch.tensor([[8.0, 40.0, 0.1]] * 2))
    config = ct.DEFAULTS | dict(family="svd", fps=9, motion_bucket=40, noise_aug=0.1, dropout=0.0)
    _, _, ids = ct.svd_conditions(train.Encoders(parts, "svd"), signed(), torch.full((2,), 40.0), config, generator(1))
    assert torch.allclose(ids, seen["ids"])


def test_ranges_of_condition_and_picture():
    "Published trainer: depth in 0..1 beside colours in -1..1. Here the range travels with the data and is the one in the config."
    depth = Depth(torch.rand(3, 1, 8, 8, generator=generator(0)) + 0.5, "metric")
    coded = DepthCodec().encode(depth)
    assert coded.range == "signed" and float(coded.data.min()) == -1 and float(coded.data.max()) == 1
    for kind, low in (("signed", -1.0), ("unit", 0.0)):
        for same in (coded, coded.unit()):
            out = condition_tensor(same, kind)
            assert float(out.min()) == pytest.approx(low) and float(out.max()) == pytest.approx(1)
    with pytest.raises(InputError, match="whose range is known"): condition_tensor(coded.data)
    with pytest.raises(InputError, match="signed or unit"): condition_tensor(coded, "byte")


def test_one_crop_and_flip_for_picture_and_condition():
    "Published trainer: colours are flipped and resized, depth is not. A depth that is the picture has to stay it."
    class Same:
        entries = list(range(8))
        def __len__(self): return 8
        def __getitem__(self, i):
            grey = torch.rand(1, 1, 24, 32, generator=generator(i)) * 0.8 + 0.1
            return dict(image=Frames(grey.expand(-1, 3, -1, -1).contiguous(), "unit"), depth=Depth(grey, "disparity"), fps=None, caption="x", id=str(i))
    config = ct.DEFAULTS | dict(size=[24, 32], crop=[1.0, 1.0], flip=0.5)
    pairs = ct.ControlPairs(Same(), config, {"image": RGBCodec(), "depth": DepthCodec(0.0, 1.0, "disparity")})
    pixels, _ = pairs.batch(list(range(8)), (24, 32))
    image, depth = pixels.chunk(2)
    assert torch.allclose(image, depth, atol=1e-5)
    originals = [Same()[i]["image"].signed().data for i in range(8)]          # a batch holds the items in an order of its own
    straight, turned = ([any(torch.allclose(shown, change(whole), atol=1e-4) for whole in originals) for shown in image] for change in (lambda x: x, lambda x: x.flip(-1)))
    assert 0 < sum(turned) < 8 and all(a != b for a, b in zip(turned, straight))


def test_image_noise_and_diffusion_noise_differ(monkeypatch):
    "Published trainer: the same tensor, added to latents."
    from camflow.joint import svd_train
    parts, seen = tiny_svd(), {}
    config = ct.DEFAULTS | dict(family="svd", noise_aug=0.5, dropout=0.0)
    plain = svd_train.edm_noise
    monkeypatch.setattr(svd_train, "edm_noise", lambda x, n, s: (seen.update(noise=n), plain(x, n, s))[1])
    unet = parts["unet"]
    controlnet = ControlNetSpatioTemporal.from_unet(unet, factor=1)
    frozen, codecs = train.Encoders(parts, "svd"), train.codecs_of(ct.joint_config(config))
    hook = unet.register_forward_pre_hook(lambda m, a: seen.update(sample=a[0]))
    video = signed() * 0.5
    ct.svd_step(unet, frozen, codecs, config)(controlnet, (torch.cat([video, signed() * 0.1]), ["", ""], torch.full((2,), 7.0)), generator(3))
    hook.remove()
    image_noise = (seen["sample"][:, 0, 3:] - video[:, 0]) / 0.5
    assert image_noise.std() == pytest.approx(1, abs=0.1)
    for frame in range(3): assert abs(torch.corrcoef(torch.stack([image_noise.flatten(), seen["noise"][:, frame].flatten()]))[0, 1]) < 0.1


def test_base_is_frozen_and_learns_nothing():
    parts = tiny_svd()
    config = ct.DEFAULTS | dict(family="svd")
    controlnet, unet, frozen = ct.build(config)
    before = {n: p.clone() for n, p in unet.named_parameters()}
    loss, _ = ct.svd_step(unet, frozen, train.codecs_of(ct.joint_config(config)), config)(controlnet, (torch.cat([signed(), signed() * 0.1]), ["", ""], torch.full((2,), 7.0)), generator(0))
    loss.backward()
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in unet.named_parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in controlnet.parameters()) and len(parts)


def test_lora_and_control_together():
    "The frozen network may carry a LoRA; a ControlNet is not made from one that does."
    parts = tiny_svd()
    controlnet = moved(ControlNetSpatioTemporal.from_unet(parts["unet"], factor=1))
    add_svd_lora(parts["unet"], 2)
    with torch.no_grad():
        plain = parts["unet"](*inputs()).sample
        with steered(parts["unet"], controlnet, signed()): on = parts["unet"](*inputs()).sample
        assert not torch.allclose(on, plain) and torch.equal(parts["unet"](*inputs()).sample, plain)
    with pytest.raises(InputError, match="LoRA layers"): ControlNetSpatioTemporal.from_unet(parts["unet"], factor=1)


def test_sizes_that_do_not_fit():
    parts, sd = tiny_svd(), tiny_sd()
    controlnet = ControlNetSpatioTemporal.from_unet(parts["unet"], factor=1)
    with pytest.raises(InputError, match="one picture per frame"): controlnet(*inputs(), signed(2))
    with pytest.raises(InputError, match="one picture per frame"): controlnet(*inputs(), signed()[..., :8])
    with pytest.raises(InputError, match="another network"): controlled(parts["unet"], [torch.zeros(1)] * 5, torch.zeros(1)).__enter__()
    with pytest.raises(InputError, match="one per video"), steered(parts["unet"], controlnet, signed(batch=3)): parts["unet"](*inputs())
    pipe = SVDControlNetPipeline(**parts, controlnet=controlnet)
    with pytest.raises(InputError, match="cut the condition"): pipe(Frames(signed()[0, :1], "signed"), Frames(signed()[0], "signed"), num_frames=4)
    with pytest.raises(InputError, match="give one"): picture(Frames(signed()[0], "signed"))
    still = control_pipeline(sd, sd_controlnet(sd["unet"], 1))
    with pytest.raises(InputError, match="stretch"): control_images(still, ["a"], Frames(signed()[0, :1], "signed"), size=(32, 32))
    with pytest.raises(InputError, match="condition of 3 channels"): condition_tensor(Frames(signed()[0], "signed"), "unit", channels=1)


def test_control_off_is_the_stock_pipeline():
    parts = tiny_svd()
    pipe = SVDControlNetPipeline(**parts, controlnet=moved(ControlNetSpatioTemporal.from_unet(parts["unet"], factor=1)))
    first, depth = Frames(signed()[0, :1], "signed"), Frames(signed()[0], "signed")
    options = dict(num_inference_steps=1, output_type="pt")
    stock = StableVideoDiffusionPipeline(**parts)(picture(first), height=16, width=16, num_frames=3, generator=generator(0), **options).frames
    assert torch.equal(pipe(first, depth, controlnet_conditioning_scale=0.0, generator=generator(0), **options).frames, stock)
    assert not torch.equal(pipe(first, depth, generator=generator(0), **options).frames, stock)


def test_missing_captions(tmp_path):
    from PIL import Image
    folder = tmp_path/"pictures"
    (folder/"depth").mkdir(parents=True)
    for i in range(3): Image.new("RGB", (16, 16), (40 * i, 90, 20)).save(folder/f"{i}.png"), Image.new("I;16", (16, 16), 900 + i).save(folder/"depth"/f"{i}.png")
    config = SMALL | dict(steps=1, data="images", folder=str(folder), depth=str(folder/"depth"), items=2, held_out=0, captions_missing="error")
    with pytest.raises(InputError, match="no caption"): ct.main(config, tmp_path/"run")
    assert ct.main(config | dict(captions_missing="empty"), tmp_path/"run2").step == 1


@pytest.mark.parametrize("family", ["sd", "svd"])
def test_resume_and_export(family, tmp_path):
    config = SMALL | dict(family=family)
    whole = ct.main(config | dict(steps=2, export=str(tmp_path/"out")), tmp_path/"whole")
    ct.main(config | dict(steps=1), tmp_path/"parts")
    again = ct.main(config | dict(steps=2), tmp_path/"parts")
    assert again.resumed == 1 and all(torch.equal(p, again.loop.params[n]) for n, p in whole.loop.params.items())
    kind = ControlNetModel if family == "sd" else ControlNetSpatioTemporal
    assert isinstance(ct.build(ct.DEFAULTS | dict(family=family, start=str(tmp_path/"out")))[0], kind)
    with pytest.raises(InputError, match="is needed"): ct.build(ct.DEFAULTS | dict(family="svd" if family == "sd" else "sd", start=str(tmp_path/"out")))


@pytest.mark.parametrize("changes, words", [(dict(family="svd", frames=1), "at least two"), (dict(captions_missing="skip"), "'empty' or 'error'"), (dict(dropout=0.6), "at most 1/3"),
                                           (dict(depth_folder="x"), "unknown configuration"), (dict(data="voc"), "give table"), (dict(size=[15, 16]), "multiples of")])
def test_bad_configurations(changes, words, tmp_path):
    "An unknown flag (the public README names one that does not exist) is an error."
    with pytest.raises(InputError, match=words): ct.main(SMALL | dict(steps=1) | changes, tmp_path)

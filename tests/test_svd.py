"SVD LoRA and SVD training: files, refusals, the published trainers' defects, exact resume."
import json

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.loaders import PeftAdapterMixin

from camflow.device import generator
from camflow.files import InputError
from camflow.joint import svd_lora, svd_train, train
from camflow.joint.edm import edm_noise, model_input
from camflow.joint.models import tiny_svd

SMALL = dict(batch_size=2, items=4, held_out=2, sample_steps=1, frames=3, rank=2, warmup=0, schedule="constant")


def inputs(frames=3):
    return torch.randn(2, frames, 6, 16, 16, generator=generator(0)), torch.tensor([0.3, -1.0]), torch.randn(2, 1, 16, generator=generator(1)), torch.tensor([[6., 127., 0.02]] * 2)


def run(unet):
    with torch.no_grad(): return unet(*inputs()).sample


def with_lora(rank=4, alpha=6, **options):
    unet = tiny_svd()["unet"]
    svd_lora.add_svd_lora(unet, rank, alpha, **options)
    for name, p in unet.named_parameters():
        if "lora_B" in name: p.data = torch.randn(p.shape, generator=generator(2, name)) * 0.1
    return unet


def test_library_reads_the_file_with_its_alpha(tmp_path):
    "The fix that the spec verified, a stock network with the adapter methods, reads our file to the same output."
    class Network(UNetSpatioTemporalConditionModel, PeftAdapterMixin): pass
    unet = with_lora()
    svd_lora.save_svd_lora(unet, tmp_path)
    stock = Network.from_config(tiny_svd()["unet"].config).eval()
    stock.load_state_dict(tiny_svd()["unet"].state_dict())
    base = run(stock)
    stock.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=svd_lora.NAME)
    assert torch.equal(run(stock), run(unet)) and not torch.equal(base, run(stock))


def test_reads_the_librarys_file(tmp_path):
    "save_lora_adapter's file: no prefix, its own metadata."
    class Network(UNetSpatioTemporalConditionModel, PeftAdapterMixin): pass
    from peft import LoraConfig
    stock = Network.from_config(tiny_svd()["unet"].config).eval()
    stock.load_state_dict(tiny_svd()["unet"].state_dict())
    stock.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_v"]))
    for name, p in stock.named_parameters():
        if "lora_B" in name: p.data = torch.randn(p.shape, generator=generator(3, name)) * 0.1
    stock.save_lora_adapter(str(tmp_path))
    mine = tiny_svd()["unet"]
    report = svd_lora.load_svd_lora(mine, tmp_path)
    assert torch.equal(run(mine), run(stock)) and report.alphas == {2.5: len(report.matched)} and not report.unmatched


def test_refusals(tmp_path):
    svd_lora.save_svd_lora(with_lora(attention="temporal"), tmp_path)
    fresh = lambda: tiny_svd()["unet"]
    with pytest.raises(InputError, match="asked for 8"): svd_lora.load_svd_lora(fresh(), tmp_path, rank=8)
    with pytest.raises(InputError, match=r"has \[8\]"): svd_lora.load_svd_lora(with_lora(8, attention="temporal"), tmp_path)
    with pytest.raises(InputError, match="of them differ"): svd_lora.load_svd_lora(with_lora(4), tmp_path)
    with pytest.raises(InputError, match="a LoRA of another model"): svd_lora.load_svd_lora(tiny_svd(cross_attention_dim=32, block_out_channels=(64,))["unet"], tmp_path)
    with pytest.raises(InputError, match="no LoRA at"): svd_lora.load_svd_lora(fresh(), tmp_path/"nothing")
    (tmp_path/"bad.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="not a LoRA file"): svd_lora.load_svd_lora(fresh(), tmp_path/"bad.safetensors")


def test_two_loras_and_taking_one_out(tmp_path):
    unet = with_lora(attention="temporal")
    one = run(unet)
    svd_lora.add_svd_lora(unet, 2, attention="both", adapter="second")
    assert svd_lora.adapters(unet) == {"default", "second"} and torch.allclose(run(unet), one, atol=1e-6)   # a fresh one changes nothing, the first still acts
    svd_lora.remove_svd_lora(unet, "second")
    assert torch.allclose(run(unet), one, atol=1e-6)


def test_trained_network_samples_in_the_stock_pipeline(tmp_path):
    svd_train.main(SMALL | dict(steps=1, alpha=3.0, export=str(tmp_path/"out")), tmp_path/"run")
    pipe, told, codec = svd_train.load_finetuned(tiny_svd(), tmp_path/"out")
    pipe.set_progress_bar_config(disable=True)
    from PIL import Image
    video = pipe(Image.new("RGB", (16, 16), "red"), height=16, width=16, num_frames=3, num_inference_steps=1, output_type="pt", generator=generator(0)).frames
    assert video.shape == (1, 3, 3, 16, 16) and told["target"] == "video" and codec.to_dict() == {"codec": "rgb"}


@pytest.mark.parametrize("trained, share", [("temporal", "temporal_transformer_blocks"), ("full", "")])
def test_what_trains(trained, share):
    unet = svd_train.prepare(tiny_svd()["unet"], svd_train.DEFAULTS | dict(trained=trained))
    names = [n for n, p in unet.named_parameters() if p.requires_grad]
    assert names and all(share in n for n in names) and (trained == "full") == (len(names) == len(list(unet.parameters())))


def spy_step(config, monkeypatch, rows=3):
    "One training step; what the network and the loss were given."
    seen = {}
    parts = tiny_svd()
    frozen, codecs = train.Encoders(parts, "svd"), train.codecs_of(svd_train.joint_config(config))
    def spied(noise, given):
        def inner(latents, n, sigma):
            seen.update(latents=latents, noise=n, sigma=sigma)
            return edm_noise(latents, n, sigma)
        return inner
    monkeypatch.setattr(svd_train, "edm_noise", spied(None, None))
    def network(sample, timestep, embeds, ids, return_dict):
        seen.update(sample=sample, embeds=embeds, ids=ids)
        return (torch.zeros_like(sample[:, :, :3]).requires_grad_(),)
    video = torch.rand(rows, 3, 3, 16, 16, generator=generator(5)) * 1.6 - 0.8
    flow = torch.rand(rows, 3, 3, 16, 16, generator=generator(6)) * 0.2
    mapping = svd_train.FixedBucket(127) if config["motion_bucket"] == 127 else svd_train.fit_map([0.01, 0.1, 0.4], config["motion_bucket"])
    svd_train.make_step(frozen, mapping, codecs, config)(network, (torch.cat([video, flow]), torch.full((rows,), 7.0)), generator(7))
    return seen | dict(video=video)


def test_noise_of_the_image_is_not_the_noise_of_the_video(monkeypatch):
    "Published trainer: one tensor for both, so the input shows what is to be predicted."
    seen = spy_step(svd_train.DEFAULTS | dict(noise_aug=0.5, dropout=0.0), monkeypatch)
    image_noise = (seen["sample"][:, 0, 3:] - seen["video"][:, 0]) / 0.5
    for frame in range(3):
        correlation = torch.corrcoef(torch.stack([image_noise.flatten(), seen["noise"][:, frame].flatten()]))[0, 1]
        assert abs(correlation) < 0.1
    assert image_noise.std() == pytest.approx(1, abs=0.1)
    assert torch.equal(seen["sample"][:, 0, 3:], seen["sample"][:, 2, 3:])
    assert torch.allclose(seen["sample"][:, :, :3], model_input(edm_noise(seen["latents"], seen["noise"], seen["sigma"]), seen["sigma"]))


def test_ids_are_in_the_pipelines_order_and_of_each_sample(monkeypatch):
    "Published trainers: (fps, strength, motion); sample 0's strength for all; fps 7 instead of 6."
    seen = spy_step(svd_train.DEFAULTS | dict(noise_aug="lognormal", dropout=0.0, motion_bucket="quantile"), monkeypatch)
    from diffusers import StableVideoDiffusionPipeline
    pipe = StableVideoDiffusionPipeline(**tiny_svd())
    fps, bucket, strength = seen["ids"].T
    for row in range(3):
        own = pipe._get_add_time_ids(7 - 1, float(bucket[row]), float(strength[row]), torch.float32, 1, 1, False)
        assert torch.equal(own[0], seen["ids"][row])
    assert len(set(strength.tolist())) == 3 and (fps == 6).all() and bucket.min() >= 0 and bucket.max() <= 255 and not (bucket == 127).all()
    told = (seen["sample"][:, 0, 3:] - seen["video"][:, 0]).flatten(1).std(1)
    assert torch.allclose(told, strength, rtol=0.2)


def test_dropped_conditions_are_zeros_as_in_guidance(monkeypatch):
    seen = spy_step(svd_train.DEFAULTS | dict(dropout=1 / 3), monkeypatch, rows=12)
    no_embed, no_image = seen["embeds"].abs().amax((1, 2)) == 0, seen["sample"][:, 0, 3:].abs().amax((1, 2, 3)) == 0
    assert no_embed.any() and no_image.any() and (no_embed & no_image).any() and (no_embed | no_image).all()
    assert (seen["ids"][:, 0] == 6).all()


def test_resume_is_exact(tmp_path):
    config = SMALL | dict(noise_aug="lognormal", motion_bucket="quantile", target="flow")
    whole = svd_train.main(config | dict(steps=3), tmp_path/"whole")
    svd_train.main(config | dict(steps=1), tmp_path/"parts")
    again = svd_train.main(config | dict(steps=3), tmp_path/"parts")
    assert again.resumed == 1 and all(torch.equal(p, again.loop.params[n]) for n, p in whole.loop.params.items())


@pytest.mark.parametrize("changes, words", [(dict(frames=1), "at least two"), (dict(target="depth"), "video, flow"), (dict(trained="some"), "lora, temporal, full"),
                                           (dict(motion_bucket=300), "0..255"), (dict(noise_aug=-1), "from 0"), (dict(dropout=0.5), "at most 1/3"),
                                           (dict(data="images"), "videos for svd"), (dict(data="webvid"), "give table and folder"), (dict(data="panda", table="x"), "give folder"), (dict(rnk=3), "unknown configuration")])
def test_bad_configurations(changes, words, tmp_path):
    with pytest.raises(InputError, match=words): svd_train.main(SMALL | changes, tmp_path)


def test_metadata_is_readable(tmp_path):
    from safetensors import safe_open
    path = svd_lora.save_svd_lora(with_lora(4, 6), tmp_path)
    with safe_open(path, "pt") as opened: told = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert told["unet.r"] == 4 and told["unet.lora_alpha"] == 6.0 and told["unet.alpha_pattern"] == {}

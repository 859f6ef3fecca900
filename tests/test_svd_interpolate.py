"Interpolation between two pictures on SVD: identities, symmetry, ends, files, bad input, resume, real frames."
import copy
from pathlib import Path

import pytest
import torch

from camflow.device import generator
from camflow.files import InputError
from camflow.joint import interpolate_train as train
from camflow.joint.edm import svd_sample
from camflow.joint.interpolate import (SVDInterpolatePipeline, end_conditions, end_latents, fusion_model, fusion_weights, sample_between,
                                       single_model)
from camflow.joint.interpolate_scores import between_scores, clip_gain, guess
from camflow.joint.models import save_parts, tiny_svd
from camflow.joint.shapes import shape_clip
from camflow.joint.svd_lora import add_svd_lora
from camflow.joint.time_reversal import backward_twin, load_twin, rotated, save_twin, value_names
from camflow.joint.train import Encoders
from camflow.media.frames import Frames, from_pil

LADY = Path(__file__).resolve().parents[2]/"shared/real/davis/lady-running"
SMALL = dict(steps=2, batch_size=1, items=3, held_out=0, sample_steps=2, frames=3, rank=2, warmup=0, size=[8, 8], prefetch=False)


@pytest.fixture(scope="module")
def parts(): return tiny_svd(0, **train.TINY)


@pytest.fixture(scope="module")
def ends(parts):
    "Conditions of a clip's two ends, without noise of their own."
    video = shape_clip(3, (8, 8), frames=4).frames.signed().data[None]
    return end_conditions(Encoders(parts, "svd"), video[:, 0], video[:, -1], noise_aug_strength=0.0)


def noise(frames=4, batch=1): return torch.randn(batch, frames, 3, 8, 8, generator=generator(1, "test"))


@pytest.mark.parametrize("guidance", [None, (1.0, 2.5)])
def test_one_sided_fusion_is_svd(parts, ends, guidance):
    unet, (first, last, embeds, ids) = parts["unet"], ends
    ahead = sample_between(fusion_model(unet, *ends, guidance, [1.0] * 4), noise(), steps=3)
    torch.testing.assert_close(ahead, svd_sample(unet, noise(), first, embeds[:, :1], ids, steps=3, guidance=guidance), rtol=1e-3, atol=1e-3)
    back = sample_between(fusion_model(unet, *ends, guidance, [0.0] * 4), noise(), steps=3)
    torch.testing.assert_close(back, svd_sample(unet, noise().flip(1), last, embeds[:, 1:], ids, steps=3, guidance=guidance).flip(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", ["linear", "half"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_reversing_the_ends_and_the_noise_reverses_the_video(parts, ends, weights, repeats):
    first, last, embeds, ids = ends
    again = lambda step, repeat, shape: torch.randn(shape, generator=generator(step, repeat))
    there = sample_between(fusion_model(parts["unet"], *ends, weights=weights), noise(), steps=3, hold=(first, last), repeats=repeats, renoise=again)
    back = sample_between(fusion_model(parts["unet"], last, first, embeds.flip(1), ids, weights=weights), noise().flip(1), steps=3, hold=(last, first), repeats=repeats,
                          renoise=lambda *a: again(*a).flip(1))
    torch.testing.assert_close(there, back.flip(1), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(there, there.flip(1), atol=1e-2)


def test_first_prediction_of_repeats_is_the_plain_one(parts, ends):
    seen = []
    model = fusion_model(parts["unet"], *ends)
    counted = lambda x, t: (seen.append(round(t, 4)), model(x, t))[1]
    plain = sample_between(counted, noise(), steps=4)
    assert len(seen) == 4
    assert not torch.allclose(plain, sample_between(counted, noise(), steps=4, repeats=3, repeat_until=0.5))
    assert len(seen) == 4 + (3 + 3 + 1 + 1) and seen[4] == seen[5] == seen[6]


@pytest.mark.parametrize("model_of", [lambda unet, ends: fusion_model(unet, *ends), lambda unet, ends: single_model(unet, *ends, guidance=2.0)])
def test_held_ends_come_back(parts, ends, model_of):
    out = sample_between(model_of(parts["unet"], ends), noise(), steps=3, hold=ends[:2], repeats=2)
    assert torch.equal(out[:, 0], ends[0]) and torch.equal(out[:, -1], ends[1])
    free = sample_between(model_of(parts["unet"], ends), noise(), steps=3)
    assert not torch.allclose(free[:, 0], ends[0], atol=1e-2)


def test_the_network_sees_both_pictures(parts, ends):
    first, last, embeds, ids = ends
    changed = (first, -last, embeds, ids), (first, last, embeds * torch.tensor([1.0, -1.0])[None, :, None], ids)
    plain = single_model(parts["unet"], *ends)(noise(), 0.3)
    for other in changed: assert (single_model(parts["unet"], *other)(noise(), 0.3) - plain).abs().max() > 1e-4
    stood = end_latents(first, last, 4)
    assert torch.equal(stood[:, 0], first) and torch.equal(stood[:, -1], last) and not stood[:, 1:-1].any()
    assert torch.allclose(end_latents(first, last, 4, "blend")[:, 1], (2 * first + last) / 3, atol=1e-6)


def test_fusion_is_an_average_of_denoised_videos(parts, ends):
    "Averaging predictions is averaging what they denoise to."
    from camflow.joint.edm import denoised
    x, sigma = noise(), torch.tensor([2.0])
    shown, t = x / (1 + 2.0**2) ** 0.5, 0.25 * float(sigma.log())
    one = lambda share: denoised(fusion_model(parts["unet"], *ends, weights=[share] * 4)(shown, t), x, sigma)
    torch.testing.assert_close(one(0.25), 0.25 * one(1.0) + 0.75 * one(0.0), rtol=1e-4, atol=1e-4)


def test_untrained_lora_and_twin_change_nothing(parts, ends):
    unet = copy.deepcopy(parts["unet"])
    plain = single_model(unet, *ends)(noise(), 0.3)
    add_svd_lora(unet, 2)
    torch.testing.assert_close(single_model(unet, *ends)(noise(), 0.3), plain, rtol=0, atol=1e-5)
    base = copy.deepcopy(parts["unet"])
    twin = backward_twin(base)
    torch.testing.assert_close(fusion_model(base, *ends, backward=twin)(noise(), 0.3), fusion_model(base, *ends)(noise(), 0.3), rtol=0, atol=1e-5)
    lent = fusion_model(base, *ends, backward=twin, rotate=True)(noise(), 0.3)
    assert (lent - fusion_model(base, *ends)(noise(), 0.3)).abs().max() > 1e-4
    assert all(not m._forward_hooks for m in base.modules()), "hooks stay behind"


def test_twin_file_and_base(parts, tmp_path):
    base = copy.deepcopy(parts["unet"])
    twin = backward_twin(base)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in value_names(twin): p.add_(0.1)
    save_twin(twin, tmp_path)
    again = load_twin(base, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(base.state_dict()[value_names(base)[0]], twin.state_dict()[value_names(twin)[0]])
    with pytest.raises(InputError, match="base that it was trained on"): load_twin(tiny_svd(0)["unet"], tmp_path)
    with pytest.raises(InputError, match="forward pass first"):
        with rotated(base, twin): twin(torch.zeros(1, 3, 6, 8, 8), 0.1, torch.zeros(1, 1, 16), torch.zeros(1, 3))


@pytest.mark.parametrize("change, says", [
    (dict(last=Frames(torch.zeros(1, 3, 8, 16), "signed")), "one size"),
    (dict(first=Frames(torch.zeros(2, 3, 8, 8), "signed")), "2 frames"),
    (dict(first=torch.zeros(1, 3, 8, 8)), "do not say their range"),
    (dict(num_frames=1), "at least two"),
    (dict(mode="both"), "single, fusion"),
    (dict(weights=[0.5, 0.5]), "one per frame"),
    (dict(weights=[2.0] * 6), "0..1"),
    (dict(repeats=0), "at least 1"),
    (dict(output_type="numpy"), "frames, pil or latent"),
])
def test_bad_input(parts, change, says):
    frame = Frames(torch.zeros(1, 3, 8, 8), "signed")
    with pytest.raises(InputError, match=says): SVDInterpolatePipeline(**parts)(**dict(first=frame, last=frame, num_inference_steps=1) | change)


def test_sizes_that_do_not_divide():
    parts = tiny_svd(0, block_out_channels=(32, 32), down_block_types=("DownBlockSpatioTemporal",) * 2, up_block_types=("UpBlockSpatioTemporal",) * 2, num_attention_heads=(4, 4))
    frame = Frames(torch.zeros(1, 3, 9, 8), "signed")
    with pytest.raises(InputError, match="multiples of 2, such as 8 x 8"): SVDInterpolatePipeline(**parts)(frame, frame)


def test_ranges_are_read(parts):
    "The same picture as bytes, units, signed values or a Pillow image gives the same video."
    from camflow.media.frames import to_pil
    clip, pipe = shape_clip(4, (8, 8), frames=2).frames.byte(), SVDInterpolatePipeline(**parts)
    options = dict(num_inference_steps=1, num_frames=3, generator=None)
    outs = [pipe(make(clip[0]), make(clip[1]), **options).frames.data for make in (lambda f: f, Frames.unit, Frames.signed, to_pil)]
    for other in outs[1:]: torch.testing.assert_close(other, outs[0], rtol=1e-5, atol=1e-5)


def test_folders(parts, tmp_path):
    "A plain SVD folder is used by fusion; with what training exported, the way it was trained."
    base = tmp_path / "svd"
    save_parts(parts, base, half=False)
    assert SVDInterpolatePipeline.from_pretrained(base).mode == "fusion"
    train.main(SMALL | dict(base=str(base), export=str(tmp_path / "single")), tmp_path / "run")
    pipe = SVDInterpolatePipeline.from_pretrained(base, tmp_path / "single")
    assert (pipe.mode, pipe.frames) == ("single", 3)
    clip = shape_clip(4, (8, 8), frames=3).frames
    model, _, frozen, config = train.interpolator(tmp_path / "run", SMALL | dict(base=str(base)))
    other = SVDInterpolatePipeline(**frozen.parts | dict(unet=model), mode="single", frames=3)
    torch.testing.assert_close(pipe(clip[0], clip[2], num_inference_steps=2).frames.data, other(clip[0], clip[2], num_inference_steps=2).frames.data, rtol=0, atol=1e-3) # a quarter of a byte
    with pytest.raises(InputError, match="export_interpolator"): SVDInterpolatePipeline.from_pretrained(base, tmp_path)
    with pytest.raises(InputError, match="no folder unet"): SVDInterpolatePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("mode", ["single", "fusion"])
def test_resume_is_exact(tmp_path, mode):
    config = SMALL | dict(mode=mode, trained="full", steps=3, checkpoint_every=1, seed=5)
    whole = train.main(config, tmp_path/"a")
    train.main(config | dict(max_seconds=1e-6), tmp_path/"b")
    again = train.main(config, tmp_path/"b")
    assert again.resumed == 1 and again.step == 3
    assert all(torch.equal(p, again.loop.params[n]) for n, p in whole.loop.params.items())


def test_only_the_values_train(tmp_path):
    config = SMALL | dict(mode="fusion", lr=1e-2)
    train.main(config, tmp_path)
    twin, base, _, _ = train.interpolator(tmp_path, config)
    own, moved = set(value_names(base)), {name for name, p in base.named_parameters() if not torch.equal(p, twin.get_parameter(name))}
    assert moved and moved <= own


@pytest.mark.parametrize("change, says", [(dict(mode="both"), "single, fusion"), (dict(frames=2), "frames=2"), (dict(motion_bucket="quantile"), "not known"), (dict(between="copy"), "zeros, blend"),
                                          (dict(dropout=0.5), "1/3"), (dict(rank=0), "rank")])
def test_bad_configuration(tmp_path, change, says):
    with pytest.raises(InputError, match=says): train.main(SMALL | change, tmp_path)


def test_guesses_and_scores():
    clips = torch.stack([shape_clip(i, frames=5).frames.signed().data for i in range(3)])
    for kind in ("blend", "nearest", "first"):
        made = guess(clips[:, 0], clips[:, -1], 5, kind)
        assert torch.equal(made[:, 0], clips[:, 0]) and torch.equal(made[:, -1], clips[:, -1])
    perfect = between_scores(clips + 1e-4, clips, shapes=True)
    assert perfect["psnr_middle"] > 60 and perfect["overlap_middle"] == 1 and perfect["psnr_ends"] == 60
    blend, nearest = (guess(clips[:, 0], clips[:, -1], 5, kind) for kind in ("blend", "nearest"))
    backwards = [between_scores(x.flip(1), clips.flip(1))["psnr_middle"] for x in (blend, nearest)]
    assert backwards[0] == pytest.approx(between_scores(blend, clips)["psnr_middle"])
    gain = clip_gain(blend, nearest, clips)
    assert gain["low"] <= gain["mean"] <= gain["high"] and gain["mean"] == pytest.approx(-clip_gain(nearest, blend, clips)["mean"])
    with pytest.raises(InputError, match="one shape"): between_scores(clips, clips[:, :4])
    with pytest.raises(InputError, match="no middle"): between_scores(clips[:, :2], clips[:, :2])


def test_weights():
    assert fusion_weights("linear", 5).flatten().tolist() == [1, 0.75, 0.5, 0.25, 0]
    for frames in (4, 5): torch.testing.assert_close(fusion_weights("linear", frames).flip(1), 1 - fusion_weights("linear", frames))


@pytest.mark.skipif(not LADY.is_dir(), reason=f"real frames are not at {LADY}")
def test_real_frames(parts):
    from PIL import Image
    ends = [from_pil(Image.open(LADY / f"{i:05d}.jpg")).cover((24, 40)) for i in (0, 6)]
    out = SVDInterpolatePipeline(**parts)(*ends, num_frames=4, num_inference_steps=2, hold=True, noise_aug_strength=0.0).frames
    assert out.size == (24, 40) and len(out) == 4
    for i, end in ((0, ends[0]), (3, ends[1])): torch.testing.assert_close(out.data[i], end.signed().data[0], rtol=0, atol=0.02)


@pytest.mark.skipif(not LADY.is_dir(), reason=f"real frames are not at {LADY}")
def test_training_on_real_frames(tmp_path):
    done = train.main(SMALL | dict(data="videos", folder=str(LADY), frames=3, held_out=1, size=[16, 24]), tmp_path)
    assert done.step == 2 and done.metrics["psnr_middle_blend"] > 10 and (tmp_path / "validation" / "000002.png").is_file()

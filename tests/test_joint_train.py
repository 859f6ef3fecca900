"Training of joint diffusion: exact resume, clipping, conditions, weights."
import json

import pytest
import torch

from camflow.assets import tiny_path
from camflow.device import generator
from camflow.files import InputError
from camflow.joint import coupling, train
from camflow.joint.codecs import codec_from_dict
from camflow.joint.timesteps import Draw, LossGrid
from camflow.training.config import configuration

TINY = dict(steps=4, batch_size=2, items=4, held_out=0, sample_steps=2, frames=3, prefetch=False, warmup=0)


@pytest.mark.parametrize("family", ["sd", "svd"])
def test_resume_is_exact(tmp_path, family):
    whole = train.main(TINY | dict(family=family, checkpoint_every=4), tmp_path/"a")
    train.main(TINY | dict(family=family, checkpoint_every=2, max_seconds=1e-6), tmp_path/"b")
    again = train.main(TINY | dict(family=family, checkpoint_every=2), tmp_path/"b")
    assert again.resumed > 0 and again.step == whole.step == 4
    a, b = (train.trained_joint(tmp_path/n, TINY | dict(family=family))[0].state_dict() for n in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_clipping_works(tmp_path):
    "The published trainers' clipping saw an exhausted iterator; with a tiny limit nothing may move faster than it allows."
    result = train.main(TINY | dict(steps=1, grad_clip=1e-6, schedule="constant"), tmp_path)
    norms = [p.grad for p in result.loop.params.values()]
    assert norms == [None] * len(norms)      # cleared, so look at the first moments: 0.1 times the clipped gradient
    moments = torch.cat([s["exp_avg"].flatten() for s in result.loop.optimizer.state.values()])
    assert 0 < float(moments.norm()) <= 0.1 * 1e-6 * 1.001


def test_only_the_adapter_moves(tmp_path):
    config = configuration(TINY, train.DEFAULTS)
    before = {k: v.clone() for k, v in train.build(config)[0].state_dict().items()}
    train.main(TINY, tmp_path)
    model, adapter, *_ = train.trained_joint(tmp_path, TINY)
    names = set(adapter.parameters_by_name())
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and moved <= names


@pytest.mark.parametrize("step, family", [(train.SDStep, "sd"), (train.SVDStep, "svd")])
def test_conditions_are_shown_clean_and_have_no_loss(step, family):
    config = configuration(TINY | dict(family=family, prompt_dropout=0.0), train.DEFAULTS)
    model, adapter, frozen = train.build(config)
    pairs = train.Pairs(train.open_items(config), config, train.codecs_of(config))
    pixels, captions = pairs.batch([0, 1], (16, 16))
    one, seen = step(config, frozen, adapter, LossGrid(2, 4)), {}
    one.sampler = lambda batch, g: Draw(torch.tensor([[0.0, 0.0], [0.5, 0.9]]), torch.tensor([[True, True], [False, False]]))
    def spy(sample, *rest, **options):
        seen["sample"] = sample
        return (torch.zeros_like(frozen.latents(pixels)),)
    loss, numbers = one(spy, (pixels, captions), generator(0, "test"))
    shown = seen["sample"][:2, :, :3] if family == "svd" else seen["sample"][:2]
    assert torch.equal(shown, frozen.latents(pixels)[:2])
    first, second = (numbers[f"loss_{name}"] for name in train.NAMES[family])
    assert torch.isnan(first) and torch.isfinite(second) and torch.isfinite(loss)


def test_both_halves_see_one_crop():
    config = configuration(TINY | dict(data="shapes"), train.DEFAULTS)
    pixels, _ = train.Pairs(train.open_items(config), config, train.codecs_of(config)).batch(list(range(8)), (16, 16))
    images, depths = pixels[:, 0].chunk(2)
    assert float(coupling.silhouette_agreement(images, depths).mean()) > 0.8


def test_export_and_read_again(tmp_path):
    train.main(TINY | dict(steps=2, export=str(tmp_path/"out")), tmp_path/"run")
    model, *_ = train.trained_joint(tmp_path/"run", TINY | dict(steps=2))
    parts, adapter, told = train.load_joint(tmp_path/"out")
    ours = model.joint_adapter.state_dict()
    assert parts["scheduler"].config.prediction_type == "v_prediction"  # what it was trained to predict is what sampling assumes
    assert told["names"] == ["image", "depth"] and all((v - ours[k]).abs().max() < 1e-3 for k, v in adapter.state_dict().items())


@pytest.mark.parametrize("change, message", [
    (dict(family="sd", data="videos", folder="x"), "videos for svd"), (dict(data="images"), "give folder"), (dict(family="svd", data="videos", table="x"), "give folder"), (dict(family="svd", frames=1), "at least two"),
    (dict(size=[15, 16]), "multiples of 2"), (dict(data="nothing"), "one of"), (dict(rank=0), "at least 1"),
    (dict(gradient_checkpointing=True, joint_dropout=0.1), "joint_dropout"), (dict(no_such_knob=1), "no_such_knob")])
def test_bad_configurations(tmp_path, change, message):
    with pytest.raises(InputError, match=message): train.main(TINY | change, tmp_path)


def test_gap_of_strangers_is_nothing():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(12, 3, 8, 8, generator=g), torch.rand(12, 3, 8, 8, generator=g)
    found = coupling.coupling(x, y, coupling.depth_agreement)
    assert abs(found["gap"]) < 0.15 and coupling.coupling(x, x, coupling.depth_agreement)["gap"] > 0.8
    with pytest.raises(InputError, match="at least two"): coupling.coupling(x[:1], y[:1], coupling.depth_agreement)
    flat = coupling.coupling(torch.zeros(4, 3, 8, 8), y[:4], coupling.depth_agreement)
    assert flat["undefined"] == 4 and flat["paired"] != flat["paired"] # NaN, not 0
    assert json.dumps(found)


def test_few_files_need_no_special_care(tmp_path):
    "Held-out items are spared only where there are enough; windows of one clip never share frames with them."
    from camflow.joint.data import video_folder
    from camflow.joint.shapes import shape_clip
    from PIL import Image
    (tmp_path/"clip").mkdir()
    clip = shape_clip(0, (24, 32), frames=9)
    for i, frame in enumerate(clip.frames.byte().data): Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path/"clip"/f"{i}.png")
    config = configuration(TINY | dict(family="svd", data="videos", folder=str(tmp_path/"clip"), held_out=8), train.DEFAULTS)
    assert len(video_folder(config["folder"], 3)) == 7 and train.spared(config) == 1
    kept, last = ([*train._part(video_folder(config["folder"], 3), 1, held).entries] for held in (False, True))
    assert last == [6] and kept == [0, 1, 2, 3]            # 4 and 5 show frames of the last window
    assert train.spared(config | dict(frames=7)) == 0      # three windows, all overlap
    depth = 1000 / (1 / clip.depth.data[0, 0])
    Image.fromarray(depth.round().numpy().astype("uint16")).save(tmp_path/"depth.png")
    one = dict(data="images", folder=str(tmp_path/"clip"/"0.png"), depth=str(tmp_path/"depth.png"), held_out=8, steps=1)
    done = train.main(TINY | one, tmp_path/"run")
    assert done.step == 1 and train.spared(configuration(TINY | one, train.DEFAULTS)) == 0


def test_rows_without_condition():
    "Without condition the halves share nothing but the small numbers, and flow is told its own."
    config = configuration(TINY | dict(family="svd", condition="none", flow_bucket=255), train.DEFAULTS)
    _, _, frozen = train.build(config)
    pixels = torch.rand(4, 3, 3, 16, 16, generator=generator(0, "test")) * 2 - 1
    image, embeds, ids = train.video_conditions(frozen, pixels, config)
    assert not image.any() and not embeds.any() and ids[:, 1].tolist() == [127, 127, 255, 255]
    image, embeds, ids = train.video_conditions(frozen, pixels, config | dict(condition="first", flow_bucket=None))
    assert image.any() and embeds.any() and set(ids[:, 1].tolist()) == {127}


def test_norm_groups_survive_the_folder(tmp_path):
    from camflow.joint.models import load_svd, save_parts, tiny_svd
    parts = tiny_svd(norm_groups=8)
    save_parts(parts, tmp_path)
    groups = {m.num_groups for m in load_svd(tmp_path)["unet"].modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups == {8}
    with pytest.raises(InputError, match="divide"): tiny_svd(norm_groups=5)
    with pytest.raises(InputError, match="no such tiny network"): train.parts_of(configuration(dict(unet=dict(colour="red")), train.DEFAULTS))


def test_a_vae_whose_factor_is_one_is_written(tmp_path):
    from diffusers import AutoencoderKL
    from camflow.joint.models import load_sd, save_parts, tiny_sd
    own = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=1, latent_channels=3, scaling_factor=1.0)
    save_parts(tiny_sd() | dict(vae=own), tmp_path, half=False)
    back = load_sd(tmp_path)["vae"].state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in own.state_dict().items())


def test_motion_agreement_is_about_direction():
    from camflow.joint.shapes import shape_clip
    clips = [shape_clip(seed, frames=4, fast=3.0) for seed in range(8)]
    videos, flows = torch.stack([c.frames.data * 2 - 1 for c in clips]), torch.stack([c.flow.data for c in clips])
    turned = torch.stack([-flows[:, :, 1], flows[:, :, 0]], 2)
    score = coupling.motion_agreement
    assert score(videos, flows).mean() > 0.8 and score(videos, -flows).mean() < -0.8 and score(videos, turned).abs().max() < 0.3
    torch.testing.assert_close(score(videos, 3 * flows), score(videos, flows))
    assert coupling.moving_overlap(videos, flows).mean() > 0.8
    torch.testing.assert_close(coupling.moving_overlap(videos, -flows), coupling.moving_overlap(videos, flows))  # where, not which way


SHIPPED = tiny_path("joint")


def shipped_scores(name, samples, steps, given, seed=0):
    "Coupling of samples of a shipped model on held-out shapes."
    parts, adapter, told = train.load_joint(SHIPPED/name)
    kept = {k: told[k] for k in ("family", "size", "frames", "fps", "motion_bucket", "noise_aug", "condition", "flow_bucket", "fast") if k in told}
    config = configuration(kept | dict(held_out=samples, sample_steps=steps), train.DEFAULTS)
    codecs = {n: codec_from_dict(told["codecs"][n]) for n in told["names"]}
    pixels, texts = train.Pairs(train.open_items(config, True), config, codecs).batch(list(range(samples)))
    made = train.sample_pairs(parts["unet"].eval(), adapter, train.Encoders(parts, told["family"]), config, pixels, texts, given, seed=seed).cpu()
    return coupling.pair_scores(made, codecs, drawn=True)


def test_shipped_models_fit_their_budget():
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 2_000_000
    for name in ("image_depth", "video_flow"):
        parts, adapter, told = train.load_joint(SHIPPED/name)
        assert adapter is not None and told["names"] == name.split("_") and (SHIPPED/name/"card.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name, given, score", [("image_depth", "depth", "silhouettes"), ("image_depth", "image", "silhouettes"), ("video_flow", "flow", "moving_overlap"),
                                                ("video_flow", "flow", "motion_agreement")])
def test_shipped_models_are_coupled(name, given, score):
    assert shipped_scores(name, 24, 12, (given,))[score]["gap"] > 0.2

"Keyframe editing: identities, keyframes at their places, joins, inversion, bad input, real frames."
import math
from pathlib import Path

import pytest
import torch

from camflow.device import generator
from camflow.files import InputError
from camflow.joint import keyframes as edit
from camflow.joint.adapter import JointAdapter
from camflow.joint.interpolate import SVDInterpolatePipeline
from camflow.joint.models import tiny_sd, tiny_svd
from camflow.joint.schedule import Levels
from camflow.joint.shapes import shape_clip
from camflow.joint.train import Encoders
from camflow.media.frames import Flow, Frames

LADY = Path(__file__).resolve().parents[2]/"shared/real/davis/lady-running"


@pytest.fixture(scope="module")
def parts(): return tiny_sd(0)


@pytest.fixture(scope="module")
def frozen(parts): return Encoders(parts, "sd")


def pictures(keyframes=3, batch=2): return torch.rand(keyframes, batch, 3, 8, 8, generator=generator(2, "pictures")) * 2 - 1


def edited(frozen, parts, x, **options):
    return edit.edit_keyframes(frozen, parts["unet"], x, ["a red disc"] * x.shape[1], **dict(steps=3, guidance_scale=2.0, join="none") | options)


@pytest.mark.parametrize("join", ["all", "first"])
def test_equal_keyframes_stay_equal_and_see_nothing_new(frozen, parts, join):
    still = pictures(1).repeat(3, 1, 1, 1, 1)
    together, alone = edited(frozen, parts, still, join=join), edited(frozen, parts, still)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together[0], together[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("join", ["all", "first"])
def test_keyframes_of_a_video_see_each_other_and_no_other_video(frozen, parts, join):
    x = pictures()
    changed = x.clone()
    changed[0, 0] = -x[0, 0]                                          # first keyframe of the first video
    a, b, alone, alone_b = (edited(frozen, parts, y, join=j) for y, j in ((x, join), (changed, join), (x, "none"), (changed, "none")))
    assert (a[1, 0] - b[1, 0]).abs().max() > 1e-4, "the second keyframe does not see the first"
    torch.testing.assert_close(a[:, 1], b[:, 1], rtol=1e-4, atol=1e-4)  # the other video
    torch.testing.assert_close(alone[1:, 0], alone_b[1:, 0], rtol=1e-4, atol=1e-4)


def test_shared_attention_leaves_nothing_behind(parts):
    with edit.shared_attention(parts["unet"], 3): assert any(m._forward_pre_hooks for m in parts["unet"].modules())
    assert not any(m._forward_pre_hooks for m in parts["unet"].modules())
    with pytest.raises(InputError, match="all keyframes in one batch"):
        with edit.shared_attention(parts["unet"], 3): parts["unet"](torch.zeros(2, 3, 8, 8), 10, torch.zeros(2, 77, 16))


def test_an_untrained_adapter_is_no_join_and_a_trained_one_joins():
    parts = tiny_sd(1)
    frozen, x = Encoders(parts, "sd"), pictures()
    alone = edited(frozen, parts, x)
    adapter = JointAdapter(parts["unet"], empty=True)
    adapter.add_model("appearance", "conv", rank=2, y_lora=False)
    torch.testing.assert_close(edited(frozen, parts, x, join="adapter", adapter=adapter), alone, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for name, p in adapter.parameters_by_name().items():
            if "post1n" in name: p.copy_(torch.randn(p.shape, generator=generator(name)) * 0.2)
    joined, changed = edited(frozen, parts, x, join="adapter", adapter=adapter), x.clone()
    changed[2, 0] = -x[2, 0]
    other = edited(frozen, parts, changed, join="adapter", adapter=adapter)
    assert (joined[0, 0] - other[0, 0]).abs().max() > 1e-4
    torch.testing.assert_close(joined[:, 1], other[:, 1], rtol=1e-4, atol=1e-4)


def test_weights_of_pairs_do_not_grow():
    for K in (2, 3, 5):
        received = [0.0] * K
        for i, j, wi, wj, _ in edit.keyframe_pairs(K):
            received[i] += wi
            received[j] += wj
        assert received == pytest.approx([1.0] * K)


def test_starts(frozen, parts):
    x = pictures(1).repeat(3, 1, 1, 1, 1)
    shared, own = (edited(frozen, parts, x, start=start) for start in ("shared", "noise"))
    torch.testing.assert_close(shared[0], shared[1], rtol=1e-4, atol=1e-4)
    assert (own[0] - own[1]).abs().max() > 0.05


def test_inverted_noise_leads_to_the_inverted_latents_and_back(frozen, parts):
    "Inversion with the prompt that is then used, no guidance, gives the picture back; noise of another kind does not."
    levels, clean = Levels.of(parts["scheduler"], 15), pictures(2, 1)
    noise = edit.inverted_noise(parts["unet"], clean[:, 0], frozen.text(["a red disc"] * 2), levels, 6)
    assert torch.isfinite(levels.noised(clean[:, 0], noise, 6)).all()
    back = edited(frozen, parts, clean, start="inverted", sources=["a red disc"], strength=0.6, steps=15, guidance_scale=1.0)
    other = edited(frozen, parts, clean, start="shared", strength=0.6, steps=15, guidance_scale=1.0)
    error = lambda y: float((y - clean).abs().mean())
    assert error(back) < 0.3 * error(other)
    assert not edit.inverted_noise(parts["unet"], clean[:, 0], frozen.text(["a"] * 2), levels, 15).any()


def test_masks_keep_what_is_outside(frozen, parts):
    x, mask = pictures(), torch.zeros(3, 2, 1, 8, 8)
    mask[..., :4] = 1
    out = edited(frozen, parts, x, strength=1.0, masks_KB1hw=mask)
    torch.testing.assert_close(out[..., 4:], x[..., 4:], rtol=0, atol=5e-3)  # the tiny VAE is the identity up to rounding
    assert (out[..., :4] - x[..., :4]).abs().mean() > 0.05


def test_video_has_its_keyframes_at_their_places(parts):
    clip = shape_clip(2, (8, 8), frames=8).frames
    pipe = edit.VideoEditPipeline(**parts, interpolator=SVDInterpolatePipeline(**tiny_svd(0, down_block_types=("DownBlockSpatioTemporal",), up_block_types=("UpBlockSpatioTemporal",))))
    out = pipe(clip, "a green disc", keyframes=[1, 4, 5], num_inference_steps=2, interpolation=dict(num_inference_steps=1))
    assert len(out.frames) == 5 and out.frames.fps == clip.fps                     # 1, 2, 3, 4, 5
    torch.testing.assert_close(out.frames.data[[0, 3, 4]], out.keyframes.data)
    again = pipe(clip, "a green disc", keyframes=[1, 4, 5], num_inference_steps=2, interpolation=dict(num_inference_steps=1))
    assert torch.equal(out.frames.data, again.frames.data)


@pytest.mark.parametrize("options, says", [
    (dict(keyframes=1), "at least 2"), (dict(keyframes=9), "at most one per frame"), (dict(keyframes=[2]), "at least two"), (dict(keyframes=[0, 8]), "0 to 7"), (dict(keyframes=[-1, 3]), "0 to 7"),
    (dict(keyframes=[4, 2]), "rising"), (dict(keyframes=[2, 2]), "each once"), (dict(keyframes=[0, 1.5]), "1.5"), (dict(strength=0.0), "above 0"), (dict(join="adapter"), "needs an adapter"),
    (dict(join="merge"), "none, all, first, adapter"), (dict(start="zeros"), "noise, shared, inverted"), (dict(video=torch.zeros(8, 3, 8, 8)), "range is known"),
    (dict(video=Frames(torch.zeros(1, 3, 8, 8), "signed")), "at least two frames"), (dict(video=Frames(torch.zeros(8, 3, 9, 8), "signed")), "multiples of 2"),
])
def test_bad_input(parts, options, says):
    given = dict(video=Frames(torch.zeros(8, 3, 8, 8), "signed"), prompt="a disc", keyframes=2, num_inference_steps=2) | options
    with pytest.raises(InputError, match=says): edit.VideoEditPipeline(**parts)(**given)


def test_ranges_are_read(parts):
    clip = shape_clip(4, (8, 8), frames=3).frames.byte()
    outs = [edit.VideoEditPipeline(**parts)(make(clip), "a disc", keyframes=2, num_inference_steps=2).keyframes.data for make in (lambda f: f, Frames.unit, Frames.signed)]
    for other in outs[1:]: torch.testing.assert_close(other, outs[0], rtol=1e-4, atol=1e-4)


def test_agreement_tells_agreeing_from_disagreeing():
    "One recolouring for all keyframes agrees; one each does not."
    clips, numbers = [shape_clip(i, frames=5) for i in range(4)], [0, 2, 4]
    source = torch.stack([c.frames.signed().data[numbers] for c in clips], 1)
    flows, masks = torch.stack([edit.chained_flow(c.flow, numbers) for c in clips]), edit.object_masks(clips, numbers)
    colours = [edit.recoloured(c.caption)[1] for c in clips]
    paint = lambda tints: torch.where(masks[:, :, None], tints * 2 - 1, source)
    alike = paint(torch.tensor(colours)[None, :, :, None, None])
    each = paint(torch.rand(3, 4, 3, 1, 1, generator=generator(0)))
    good, bad = edit.agreement(alike, source, flows, masks, colours), edit.agreement(each, source, flows, masks, colours)
    assert good["colour_spread"] < 1e-4 < bad["colour_spread"] and good["warp_error"] < bad["warp_error"] and good["colour_likeness"] == pytest.approx(1, abs=1e-3)
    plain = edit.agreement(alike, source, flows)
    assert math.isnan(plain["colour_spread"]) and plain["warp_error"] == good["warp_error"]


def test_chained_flow_follows_positions():
    "A flow that shears: two steps land where two steps land, not at twice the first."
    y = torch.arange(12.0)[:, None].expand(12, 12)
    step = torch.stack([y * 0.1, torch.ones(12, 12)])                                # x moves by y / 10, y by 1
    total = edit.chained_flow(Flow(step[None].repeat(2, 1, 1, 1), "forward"), [0, 2])[0]
    torch.testing.assert_close(total[:, 4, 4], torch.tensor([0.4 + 0.5, 2.0]), rtol=0, atol=1e-4)


@pytest.mark.skipif(not LADY.is_dir(), reason=f"real frames are not at {LADY}")
def test_real_frames(parts):
    from camflow.joint.data import read_picture
    video = Frames(torch.cat([read_picture(LADY/f"{i:05d}.jpg").cover((24, 40)).data for i in range(5)]), "byte", 24.0)
    out = edit.VideoEditPipeline(**parts)(video, "a woman in red", keyframes=[0, 2, 4], strength=0.05, num_inference_steps=4, guidance_scale=1.0)
    assert out.keyframes.size == (24, 40)
    torch.testing.assert_close(out.keyframes.data, video[[0, 2, 4]].signed().data, rtol=0, atol=0.6)
    assert (out.keyframes.data - video[[0, 2, 4]].signed().data).abs().mean() < 0.1

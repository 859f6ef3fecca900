"""Panels of the joint chapter without a browser: turn knobs, click, look at what is shown; and the parts that the run joint_sample is made of."""
import io
from datetime import datetime

import pytest
import torch
from PIL import Image

from camflow.assets import tiny_path
from camflow.device import generator
from camflow.files import InputError
from camflow.joint import conditions, widgets
from camflow.joint.adapter import JointAdapter
from camflow.joint.codecs import DepthCodec
from camflow.joint.controlnet_sd import control_pipeline, sd_controlnet
from camflow.joint.controlnet_svd import ControlNetSpatioTemporal, SVDControlNetPipeline
from camflow.joint.models import tiny_sd, tiny_svd
from camflow.joint.pipelines import JointImagePipeline, JointVideoPipeline
from camflow.media.frames import Depth, Frames

TINY = tiny_path("joint")/"image_depth"


def noise(*key, frames=1): return Frames(torch.rand(frames, 3, 16, 16, generator=generator(*key)), "unit")


@pytest.fixture(scope="module")
def pictures(): return JointImagePipeline.from_pretrained(TINY)


@pytest.fixture(scope="module")
def videos():
    parts = tiny_svd()
    return JointVideoPipeline(**parts, adapter=JointAdapter(parts["unet"], attention="temporal"))


def click(panel, **values):
    panel.set(**values).button.click()
    assert panel.state == "ok", panel.message
    return panel.result


def shown(panel): return [Image.open(io.BytesIO(box.children[0].value)) for box in panel.shown.children]


# ---- each mode

def test_picture_panels(pictures):
    depths, images = {"a": noise(0), "b": noise(1)}, {"a": noise(2)}
    joint = widgets.joint_panel(pictures, steps=2)
    first, again, other = (click(joint, prompt="a ball", seed=seed)["image"].data for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)                       # the seed is the noise
    assert [image.size for image in shown(joint)] == [(128, 128)] * 2                        # sixteen pixels, enlarged to be seen
    given = widgets.given_panel(pictures, "depth", depths, steps=2)
    a, b = (click(given, condition=name)["image"].data for name in "ab")
    assert not torch.allclose(a, b, atol=1e-3)                                               # the chosen example arrives
    assert set(click(widgets.coarse_panel(pictures, "image", images, steps=4), strength=0.5)) == {"image", "depth"}
    masked = widgets.masked_panel(pictures, "image", images, steps=2)
    image = click(masked, anew="left")["image"].unit().data
    assert torch.allclose(image[..., 8:], images["a"].data[..., 8:], atol=2e-3) and not torch.allclose(image[..., :8], images["a"].data[..., :8], atol=0.1)
    assert "fps" not in joint.knobs and "image" not in joint.knobs and "prompt" in joint.knobs


def test_video_panels(videos):
    starts, clips = {"a": noise(0)}, {"a": noise(1, frames=6)}
    joint = widgets.joint_panel(videos, starts, steps=1)
    assert {name: len(clip) for name, clip in click(joint, motion_bucket=200, fps=12).items()} == {"video": 6, "flow": 5}
    assert shown(joint)[0].n_frames == 6 and "prompt" not in joint.knobs
    coarse, masked = widgets.coarse_panel(videos, "video", clips, steps=2), widgets.masked_panel(videos, "video", clips, steps=1)
    for panel in (widgets.given_panel(videos, "flow", clips, starts, steps=1), coarse, masked):
        assert len(click(panel)["video"]) == 6


def test_controlnet_and_svd_panels():
    parts, video = tiny_sd(), tiny_svd()
    control = widgets.control_panel(control_pipeline(parts, sd_controlnet(parts["unet"], factor=1)), {"a": noise(0)}, steps=1)
    assert click(control, prompt="a ball", scale=0.5)["image"].size == (16, 16)
    controlnet = ControlNetSpatioTemporal.from_unet(video["unet"], factor=1)
    steered = SVDControlNetPipeline(**video, controlnet=controlnet)
    panel = widgets.video_panel(steered, {"a": noise(0)}, {"flow": noise(1, frames=6)}, steps=1)
    assert len(click(panel, scale=0.5)["video"]) == 6
    from diffusers import StableVideoDiffusionPipeline
    plain = StableVideoDiffusionPipeline(**video)
    assert len(click(widgets.video_panel(plain, {"a": noise(0)}, frames=4, steps=1))["video"]) == 4
    with pytest.raises(InputError, match="needs them"): widgets.video_panel(steered, {"a": noise(0)})
    with pytest.raises(InputError, match="has none"): widgets.video_panel(plain, {"a": noise(0)}, {"flow": noise(1, frames=6)})


def test_interpolation_panel():
    module = pytest.importorskip("camflow.joint.interpolate")
    panel = widgets.between_panel(module.SVDInterpolatePipeline(**tiny_svd()), {"a": noise(0)}, {"b": noise(1)}, steps=2)
    video = click(panel, hold=True)["video"].unit().data
    assert len(video) == 6 and torch.allclose(video[:1], noise(0).data, atol=0.02) and torch.allclose(video[-1:], noise(1).data, atol=0.02)


def test_edit_panel():
    module = pytest.importorskip("camflow.joint.keyframes")
    panel = widgets.edit_panel(module.VideoEditPipeline(**tiny_sd()), {"a": noise(0, frames=6)}, steps=2)
    made = click(panel, keyframes=2, prompt="a red ball")
    assert len(made["source"]) == 6 and len(made["keyframes"]) == 2
    panel.set(keyframes=16).button.click()                                  # more than there are frames
    assert panel.state == "refused" and "keyframes" in panel.message


def test_motion_panel():
    arms = pytest.importorskip("camflow.joint.motion_arms")
    from camflow.joint import train
    from camflow.joint.codecs import FlowCodec, RGBCodec
    parts = tiny_svd()
    config = train.DEFAULTS | dict(family="svd", frames=6, radius=2.0, strength=1.0, sigma=1.0, map_share=0.15, sample_steps=2)
    rig = arms.Rig(parts["unet"], JointAdapter(parts["unet"], attention="temporal"), tiny_svd()["unet"], None, train.Encoders(parts, "svd"),
                   {"video": RGBCodec(), "flow": FlowCodec()}, config)
    made = click(widgets.motion_panel(rig, {"a": noise(0)}), to_x=1.0, arm="replacement")     # to the very edge
    assert len(made["video"]) == 6 and len(made["flow"]) in (5, 6)


# ---- what can go wrong

def test_values_out_of_range_are_refused_and_nothing_is_turned(pictures):
    panel = widgets.joint_panel(pictures, steps=2)
    before = dict(panel.values)
    wrong = dict(steps=[0, 101, 2.5], guidance=[float("nan"), 21], seed=["x", True], prompt=[3])
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        with pytest.raises(InputError, match=name): panel.set(**{"prompt": "other", name: value})
    with pytest.raises(InputError, match="no knob 'strength'; there are"): panel.set(strength=0.5)
    assert panel.values == before
    masked = widgets.masked_panel(pictures, "image", {"a": noise(0)})
    with pytest.raises(InputError, match="anew='middle'; one of left"): masked.set(anew="middle")
    with pytest.raises(InputError, match="no example 'c'; there are a"): masked.set(condition="c")
    with pytest.raises(InputError, match="given='flow'; given_panel; one of image, depth"): widgets.given_panel(pictures, "flow", {"a": noise(0)})


def test_errors_are_words_in_the_panel():
    def refuses(size: int = 3): raise InputError(f"{size} <pixels>; refuses; give more")
    def breaks(size: int = 3): raise RuntimeError("out of memory & time")
    panel = widgets.Panel(refuses)
    panel.button.click()
    assert (panel.state, panel.message, panel.result) == ("refused", "3 <pixels>; refuses; give more", {})
    assert "3 &lt;pixels&gt;" in panel.line.value and "Traceback" not in panel.line.value and not panel.button.disabled
    panel = widgets.Panel(breaks)
    panel.button.click()
    assert panel.state == "failed" and panel.message == "RuntimeError: out of memory & time"
    assert "out of memory &amp; time" in panel.still().data and "Traceback" not in panel.still().data


def test_a_wrong_size_is_said_by_the_pipeline(pictures):
    odd = Frames(torch.rand(1, 3, 15, 16, generator=generator(3)), "unit")
    panel = widgets.given_panel(pictures, "depth", {"odd": odd}, steps=2)
    panel.button.click()
    assert panel.state == "refused" and "15 x 16" in panel.message and "multiples of" in panel.message


def test_uploads(pictures):
    def file(content, name): return (dict(name=name, type="", size=len(content), content=content, last_modified=datetime(2026, 1, 1)),)
    panel = widgets.given_panel(pictures, "depth", {"a": noise(0)}, steps=2)
    from_menu = click(panel)["depth"].unit().data
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "white").save(picture, "PNG")
    panel.knobs["condition"].upload.value = file(picture.getvalue(), "mine.png")
    depth = click(panel)["depth"].unit().data                               # cut to 16 x 16, used instead of the menu's
    assert float(depth.min()) > 0.99 and not torch.allclose(depth, from_menu)
    panel.knobs["condition"].upload.value = file(b"not a picture", "mine.txt")
    assert "mine.txt is no readable picture" in panel.knobs["condition"].note.value
    panel.button.click()
    assert panel.state == "refused" and "mine.txt" in panel.message and panel.result == {}
    click(panel, condition="a")                                             # back to the menu


def test_parameters_without_a_widget():
    def bare(x): return noise(0)
    def odd(x: dict): return noise(0)
    with pytest.raises(InputError, match="parameter x has no type"): widgets.Panel(bare)
    with pytest.raises(InputError, match="parameter x has the type .*dict.*use str, int"): widgets.Panel(odd)
    with pytest.raises(InputError, match="at least one"): widgets.Examples({})
    with pytest.raises(InputError, match="of type Tensor"): widgets.Examples({"a": torch.zeros(1, 3, 4, 4)})


# ---- what joint_sample asks for

@pytest.mark.parametrize("wishes, message", [
    (dict(mode="sideways"), "one of joint"), (dict(given=["flow"]), "modalities are image, depth"),
    (dict(given=["image", "depth"]), "at least one has to be made"), (dict(mode="second_given_first", masks={"image": "left"}), "image is given and has a mask"),
    (dict(mode="coarse", given=["depth"], strength={"depth": 0.5}), "given and has a strength"), (dict(mode="coarse", strength=1.5), "0 .exact. to 1"),
    (dict(mode="coarse", strength={}), "without a hint"), (dict(strength={"depth": 0.5}), "hints are of mode coarse"),
    (dict(masks={"edge": "left"}), "masks of edge")])
def test_wishes_that_contradict_each_other(wishes, message):
    with pytest.raises(InputError, match=message): conditions.choose(("image", "depth"), **wishes)


def test_regions(tmp_path):
    halves = [conditions.region(what, (6, 10)) for what in ("left", "right", "top", "bottom")]
    assert torch.equal(halves[0] + halves[1], torch.ones(1, 1, 6, 10)) and torch.equal(halves[2] + halves[3], torch.ones(1, 1, 6, 10))
    Image.fromarray((halves[0][0, 0].numpy() * 255).astype("uint8")).resize((40, 24), Image.NEAREST).save(tmp_path/"left.png")
    Image.new("L", (8, 8)).save(tmp_path/"dark.png")
    assert torch.equal(conditions.region(str(tmp_path/"left.png"), (6, 10)), halves[0])
    with pytest.raises(InputError, match="dark everywhere"): conditions.region(str(tmp_path/"dark.png"), (6, 10))
    with pytest.raises(InputError, match="one of left.*or a picture file"): conditions.region("middle", (6, 10))


def test_each_condition_of_several_acts(tmp_path):
    "Our folder under two names gives what its pairs give; taking one condition's values away changes the picture."
    pipe = conditions.several_conditions(TINY, {"depth": TINY, "near": TINY/"joint_adapter"}, {"depth": DepthCodec(0.0, 1.0), "near": DepthCodec(0.0, 1.0)})
    pixels = {name: noise(name).signed().data[:, None] for name in pipe.names}
    wishes = conditions.choose(pipe.names, "first_given_second")
    assert wishes["given"] == ("depth", "near")
    make = lambda **changed: conditions.sample_set(pipe, pixels | changed, ["a ball"], wishes, steps=2)["image"]
    both = make()
    for name in ("depth", "near"): assert not torch.allclose(both, make(**{name: -pixels[name]}), atol=1e-3)
    alone = JointImagePipeline.from_pretrained(TINY)
    once = conditions.sample_set(alone, {n: pixels[n] for n in alone.names}, ["a ball"], conditions.choose(alone.names, "first_given_second"), steps=2)["image"]
    pipe.adapter.remove_model("near")
    pipe.names, pipe.codecs = ("image", "depth"), {n: pipe.codecs[n] for n in ("image", "depth")}
    again = conditions.sample_set(pipe, {n: pixels[n] for n in pipe.names}, ["a ball"], conditions.choose(pipe.names, "first_given_second"), steps=2)["image"]
    torch.testing.assert_close(once, again, atol=1e-3, rtol=0)                # read under another name it is the same model
    with pytest.raises(InputError, match="choose another name"): conditions.several_conditions(TINY, {"image": TINY})


def test_unicon_conditions_are_noised_and_ours_are_not(pictures, videos):
    wishes = conditions.choose(pictures.names, "first_given_second")
    assert conditions.plan_of(pictures, wishes, 4).inits == ("noise", "clean")
    assert conditions.plan_of(pictures, wishes, 4, "unicon").inits == ("noise", "noised")
    pixels = {"depth": noise(0).signed().data[:, None]}
    exact, old = (conditions.sample_set(pictures, pixels, ["a"], wishes, steps=4, clean_condition=how)["depth"] for how in ("exact", "unicon"))
    assert torch.allclose(exact, pixels["depth"], atol=2e-3) and not torch.allclose(old, pixels["depth"], atol=2e-3)
    with pytest.raises(InputError, match="pictures only"): conditions.plan_of(videos, conditions.choose(videos.names, "first_given_second"), 4, "unicon")


def test_video_sets_keep_what_is_kept(videos):
    pixels = {name: torch.stack([noise(name, b, frames=6).signed().data for b in range(2)]) for name in videos.names}
    wishes = conditions.choose(videos.names, masks={"video": "top", "flow": "right"})
    made = conditions.sample_set(videos, pixels, ["", ""], wishes, steps=2)
    assert made["video"].shape == made["flow"].shape == (2, 6, 3, 16, 16) and not torch.equal(made["video"][0], made["video"][1])
    assert all(error < 1e-3 for error in conditions.kept_error(made, pixels, wishes["masks"]).values())
    assert conditions.kept_error(made, {n: -p for n, p in pixels.items()}, wishes["masks"])["video"] > 0.1


def test_conditions_that_are_not_there(tmp_path):
    from camflow.joint import train
    config = train.configuration(dict(family="sd", data="shapes"), train.DEFAULTS)
    with pytest.raises(InputError, match="holds no edge; open_conditions; give pictures="): conditions.open_conditions(config, ("image", "depth", "edge"), 2)
    with pytest.raises(InputError, match="samples=0"): conditions.open_conditions(config, ("image", "depth"), 0)
    with pytest.raises(InputError, match="holds no files"): conditions.open_conditions(config, ("image", "depth", "edge"), 2, {"edge": tmp_path})
    names = [conditions.open_conditions(config, ("image", "depth"), 2)[i]["id"] for i in range(2)]
    Image.new("L", (16, 16)).save(tmp_path/f"{names[0]}.png")
    with pytest.raises(InputError, match="1 items for 2 samples.*1 were skipped"):
        conditions.open_conditions(config, ("image", "depth", "edge"), 2, {"edge": tmp_path})
    one = conditions.with_pictures(conditions.open_conditions(config, ("image", "depth"), 2), "edge", tmp_path)
    assert len(one) == 1 and isinstance(one[0]["edge"], Frames) and isinstance(one[0]["depth"], Depth)

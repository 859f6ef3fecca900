"""The camera reward over pieces of the path: better for what was asked, in the source's metres, and not to be had by standing still, by half the way, or by poses that were passed on."""
import json
import math

import pytest
import torch

from camflow.assets import tiny_path
from camflow.files import InputError
from camflow.geometry.rigid import so3_exp
from camflow.geometry.trajectory import PRESETS, orbit, pose, preset, rescale, static
from camflow.rewards.protocol import Reward, Sample, run_reward
from camflow.rewards.segments import SegmentReward, SourceUnits, segment_errors
from camflow.world.clips import HELD_OUT, scene_clips

NAME = "camflow.rewards.segments:SegmentReward"


@pytest.fixture(scope="module")
def tiny():
    try: tiny_path("pose")
    except InputError as error: pytest.skip(str(error))
    from camflow.depth.estimators import load_estimator
    return load_estimator()


def films(*paths, seed=77): return [torch.from_numpy(f) for f in scene_clips(HELD_OUT + seed, [(path, "") for path in paths]).frames_NT3HW]


class Device:
    "Measures clips whose paths are known, in a unit of its own for every clip, with a little noise; tells the depth of the first frame in that unit."
    def __init__(self, depth=True): self.known, self.depth, self.asked = [], depth, []

    def film(self, path, unit=1.0, metres=3.0):
        self.known.append((path, unit, metres))
        return torch.full((len(path), 3, 4, 4), len(self.known) - 1, dtype=torch.uint8)

    def __call__(self, clips):
        self.asked.append(len(clips))
        rows, g = [self.known[int(clip[0, 0, 0, 0])] for clip in clips], torch.Generator().manual_seed(1)
        poses = torch.stack([rescale(path, translation=unit) for path, unit, _ in rows])
        poses[:, 1:, :3, 3] += 1e-3 * torch.randn(poses[:, 1:, :3, 3].shape, generator=g, dtype=torch.float64)
        poses[:, 1:, :3, :3] = poses[:, 1:, :3, :3] @ so3_exp(1e-3 * torch.randn(poses[:, 1:, :3, 3].shape, generator=g, dtype=torch.float64))
        return (poses, torch.tensor([metres * unit for _, unit, metres in rows])) if self.depth else poses


def test_the_tiny_estimator_prefers_what_was_asked(tiny):
    reward, right = SegmentReward(tiny, gaps=(1, 4)), 0
    assert isinstance(reward, Reward)
    for name in ("pan_left", "zoom_out", "tilt_up", "arc_left"):
        path = preset(name, 9)
        clips = films(path, rescale(path, translation=0.4, rotation=0.4), rescale(path, translation=-0.7, rotation=-0.7), static(9))
        values = reward([Sample(clip, path, source=clips[3], id=name) for clip in clips]).values
        right += int(values.argmax() == 0)
        assert values[0] > values[2] and values[0] > values[3], name
    assert right >= 3


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scale", ["source", "metric", "umeyama"])
def test_standing_still_never_pays(name, scale):
    "On every preset and with every scale the clip that moves as asked is worth at least half a point more than one that stands still, jitter included."
    device, path = Device(), preset(name, 41)
    source = device.film(static(41))
    honest, idle = (Sample(device.film(p), path, source=source) for p in (path, static(41)))
    values = SegmentReward(device, scale=scale)([honest, idle]).values
    assert values[0] > values[1] + 0.5, values


def test_half_the_way_is_seen_unless_the_scale_is_free():
    "Units differ from clip to clip, as those of an up-to-scale network do; the depth of the common first frame ties them to the source's unit."
    path = orbit(25, frames=25)
    for unit_a, unit_b in ((1.0, 1.0), (0.4, 2.5)):
        device = Device()
        source = device.film(rescale(path, translation=0.5), unit=0.7)
        meta = {"source_c2w": rescale(path, translation=0.5)}                                # the source's true path gives metres
        samples = [Sample(device.film(p, unit), path, source=source, meta=meta) for p, unit in ((path, unit_a), (rescale(path, translation=0.5), unit_b))]
        fixed, free = (SegmentReward(device, scale=scale)(samples) for scale in ("source", "umeyama"))
        assert fixed.values[0] > -0.3 and fixed.values[0] > fixed.values[1] + 0.5
        assert abs(fixed.details[0]["unit"] * unit_a - 1) < 0.05 and abs(fixed.details[1]["unit"] * unit_b - 1) < 0.05
        assert abs(free.values[0] - free.values[1]) < 0.3                                    # CamVerse's alignment cannot tell them apart: an option, not the default


def test_the_source_is_measured_once_and_its_unit_serves_all_its_clips():
    device, path = Device(), preset("zoom_in", 9)
    source = device.film(preset("arc_left", 9), unit=0.5)
    meta = {"source_c2w": preset("arc_left", 9)}
    samples = [Sample(device.film(path, 0.5), path, source=source, meta=meta) for _ in range(6)]
    reward = SegmentReward(device)
    first = reward(samples)
    reward(samples)
    assert device.asked == [6, 1, 6] and len({round(d["unit"], 6) for d in first.details}) == 1 and abs(first.details[0]["unit"] - 2) < 0.05


def test_a_source_that_stands_still_says_nothing_about_the_scale():
    device = Device(depth=False)
    source = device.film(static(9), unit=0.5)
    units = SourceUnits(device)
    assert units(Sample(source, source=source, meta={"source_c2w": static(9), "metres": 2.0}))[0] == 2.0
    assert math.isnan(units(Sample(source, source=source))[1]) and units(Sample(source))[0] == 1.0


def test_a_target_that_starts_elsewhere_keeps_the_sources_unit():
    "Its first frame is another picture, whose depth must not be compared."
    device = Device()
    path = pose((0, 30, 0), (1, 0, 0)) @ preset("zoom_in", 9)
    source, clip = device.film(static(9), metres=3.0), device.film(preset("zoom_in", 9), metres=1.5)
    assert SegmentReward(device)([Sample(clip, path, source=source)]).details[0]["unit"] == 1.0


def test_poses_that_were_passed_on_are_no_measurement():
    path = preset("arc_right", 9)
    clip = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    for metres in (1.0, 2.5):
        result = SegmentReward(lambda clips: torch.stack([path] * len(clips)), scale="metric")([Sample(clip, path, meta={"metres": metres})])
        assert result.status == ["invalid"] and "was not measured" in result.details[0]["reason"]
    assert SegmentReward(lambda clips: torch.stack([static(9)] * len(clips)))([Sample(clip, static(9))]).values.tolist() == [0.0]   # a still request may be met exactly


def test_the_estimator_sees_pixels_only(tiny):
    seen = []
    def spy(*args, **kwargs):
        seen.append((args, kwargs))
        return tiny(*args)
    clip, = films(preset("pan_left", 9))
    SegmentReward(spy)([Sample(clip, preset("pan_left", 9), source=clip, prompt="a room")])
    assert len(seen) == 2
    for args, kwargs in seen: assert len(args) == 1 and not kwargs and all(one.dtype == torch.uint8 and one.shape == (9, 3, 48, 80) for one in args[0])


def test_what_cannot_be_judged_is_invalid():
    clip, path = torch.zeros(9, 3, 8, 8, dtype=torch.uint8), preset("zoom_in", 9)
    lost = lambda clips: torch.full((len(clips), 9, 4, 4), torch.nan, dtype=torch.float64)
    assert SegmentReward(lost)([Sample(clip, path), Sample(clip)]).status == ["invalid", "invalid"]
    broken = run_reward(SegmentReward(lambda clips: static(9)), [Sample(clip, path)])
    assert broken.status == ["failed"] and "must give [B,T,4,4]" in broken.details[0]["reason"]
    with pytest.raises(InputError, match="no gap of"): segment_errors(path, path, (20,))


def test_it_is_a_setting_of_the_post_training(tiny):
    "By name, with options from JSON."
    from camflow.rl.recam_config import parse
    from camflow.rl.recam_grpo import reward_from
    config = json.loads(json.dumps({"rewards": {NAME: 1.0, "camera": 0.5}, "reward_options": {NAME: {"gaps": [1, 4], "scale": "umeyama"}}}))
    settings, algorithm = parse(config)
    path = preset("pan_left", 9)
    clip, = films(path)
    scores = reward_from(settings, algorithm)([Sample(clip, path, source=clip)])
    assert scores.status == ["ok"] and f"{NAME}/rot_deg_4" in scores.details[0]
    with pytest.raises(InputError, match="it takes"): parse({**config, "reward_options": {NAME: {"gap": [1]}}})
    with pytest.raises(InputError, match="one of source"): reward_from(*parse({**config, "reward_options": {NAME: {"scale": "mine"}}}))

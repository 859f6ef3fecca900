"""Synchrony, smoothness, truth and Depth Anything 3 as rewards: worse with more of a known distortion, typed where they cannot judge, blind to the target's poses."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

from camflow.files import InputError
from camflow.geometry.trajectory import preset, static
from camflow.metrics.clip import clip_images, image_features, load_clip, random_clip
from camflow.rewards.da3_reward import DA3Reward
from camflow.rewards.protocol import Reward, Sample, run_reward
from camflow.rewards.smoothness import SmoothnessReward, flow_statistics
from camflow.rewards.synchrony import SynchronyReward
from camflow.rewards.truth import TruthReward
from camflow.world.clips import HELD_OUT, scene_clips

PATH = preset("arc_right", 9)


@pytest.fixture(scope="module")
def scenes():
    "(source, clip along PATH) of three held-out scenes, uint8 [9,3,48,80]."
    return [tuple(torch.from_numpy(f) for f in scene_clips(HELD_OUT + seed, [(static(9), "still"), (PATH, "arc")]).frames_NT3HW) for seed in (41, 42, 43)]


def shifted(clip, n): return clip[[max(0, t - n) for t in range(len(clip))]]


def blurred(clip, n):
    if not n: return clip
    k = torch.exp(-torch.arange(-3 * n, 3 * n + 1).float() ** 2 / (2 * n * n))
    k = (k / k.sum())[None, None].expand(3, 1, -1)
    y = F.conv2d(F.pad(clip.float(), (3 * n,) * 4, mode="replicate"), k[:, :, None], groups=3)
    return F.conv2d(y, k[..., None], groups=3).round().clamp(0, 255).byte()


def flickering(clip, n): return (clip.float() * (1 + n * (torch.arange(len(clip)) % 2)[:, None, None, None])).clamp(0, 255).round().byte()


def shaken(clip, n): return torch.stack([torch.roll(frame, (n if t % 2 else 0), -1) for t, frame in enumerate(clip)])


def slowed(clip, share): return clip[[int(t * share) for t in range(len(clip))]]


LADDERS = {"late": (shifted, (0, 1, 3, 6)), "blur": (blurred, (0, 1, 2, 4)), "flicker": (flickering, (0, 0.2, 0.4, 0.8)), "shake": (shaken, (0, 1, 3, 5)), "frozen": (slowed, (1, 0.6, 0.3, 0))}


def ladder(reward, scenes, name, against):
    "Mean values over the scenes for more and more of a distortion; `against` makes the sample of a distorted clip."
    distort, steps = LADDERS[name]
    return [float(reward([against(distort(made, n), source, made) for source, made in scenes]).values.mean()) for n in steps]


@pytest.mark.parametrize("measure", ["psnr", "ssim", "error"])
@pytest.mark.parametrize("name", LADDERS)
def test_truth_falls_with_every_distortion(scenes, measure, name):
    values = ladder(TruthReward(measure), scenes, name, lambda clip, source, made: Sample(clip, PATH, truth=made))
    assert values == sorted(values, reverse=True) and values[0] > values[-1], values


@pytest.mark.parametrize("name", ["late", "blur", "flicker"])
def test_synchrony_falls_when_the_clip_departs_from_its_source(scenes, name):
    values = ladder(SynchronyReward(network=random_clip()), scenes, name, lambda clip, source, made: Sample(clip, source=made))
    assert values == sorted(values, reverse=True) and abs(values[0] - 1) < 1e-5 and values[-1] < 1 - 1e-3, values


@pytest.mark.parametrize("name", ["flicker", "shake", "frozen"])
def test_smoothness_falls_with_flicker_shaking_and_standing_still(scenes, name):
    values = ladder(SmoothnessReward(), scenes, name, lambda clip, source, made: Sample(clip, PATH, source=source))
    assert values == sorted(values, reverse=True) and values[0] > 0.7 and values[-1] < 0.5 * values[0], values


def test_a_still_clip_is_smooth_only_where_nothing_should_move(scenes):
    source, made = scenes[0]
    still, calm = made[:1].expand(9, -1, -1, -1).contiguous(), source[:1].expand(9, -1, -1, -1).contiguous()
    reward = SmoothnessReward()
    asked, moving_source, nothing = reward([Sample(still, PATH, source=calm), Sample(still, source=made), Sample(still, static(9), source=calm)]).values.tolist()
    assert asked < 0.05 and moving_source < 0.05 and nothing > 0.9


def test_what_cannot_be_judged_is_typed(scenes):
    source, made = scenes[0]
    noise = torch.randint(0, 255, made.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cases = [(SynchronyReward(network=random_clip()), Sample(made), "no source"), (SynchronyReward(network=random_clip()), Sample(made, source=source[:4]), "9 frames against 4"),
             (SmoothnessReward(), Sample(made[:2]), "at least three"), (TruthReward(), Sample(made), "no true video"), (TruthReward(), Sample(made, truth=made[:, :, :24]), "one length and size"),
             (TruthReward(skip=9), Sample(made, truth=made), "skipped"), (DA3Reward("random", judge="camera", process_res=70), Sample(made), "no target path")]
    for reward, sample, reason in cases:
        assert isinstance(reward, Reward)
        scores = run_reward(reward, [sample])
        assert scores.status == ["invalid"] and math.isnan(scores.values[0]) and reason in scores.details[0]["reason"], (reward.name, scores.details)
    assert run_reward(SmoothnessReward(), [Sample(noise, source=made)]).status[0] in ("ok", "invalid")
    missing = run_reward(SynchronyReward(), [Sample(made, source=source)])
    assert missing.status == ["failed"] and "no CLIP weights" in missing.details[0]["reason"]
    assert run_reward(TruthReward(), [Sample(made.float(), truth=made)]).status == ["failed"]        # not uint8: said, not guessed
    for make in (lambda: SynchronyReward("/nowhere"), lambda: TruthReward("lpips"), lambda: SmoothnessReward(jerk=0), lambda: DA3Reward("random", judge="best"), lambda: DA3Reward("/nowhere")):
        with pytest.raises(InputError): make()


def test_clip_preprocessing_is_the_published_one():
    Image = pytest.importorskip("PIL.Image")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    for H, W in ((48, 80), (300, 250), (224, 260)):
        x = torch.randint(0, 255, (1, 3, H // 8 + 1, W // 8 + 1), generator=torch.Generator().manual_seed(H)).float()
        x = F.interpolate(x, (H, W), mode="bilinear").round().byte()
        want = CLIPImageProcessorPil()(Image.fromarray(x[0].permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
        assert (clip_images(x) - want).abs().max() < 1e-5, (H, W)


def test_clip_folders_load_strictly(tmp_path, scenes):
    clip = random_clip(3)
    clip.model.save_pretrained(tmp_path)
    again = load_clip(str(tmp_path))
    film = scenes[0][1]
    assert torch.allclose(image_features(again, film), image_features(clip, film), atol=1e-5) and again.weights_id.startswith("model.safetensors:")
    from safetensors.torch import load_file, save_file
    state = load_file(tmp_path/"model.safetensors")
    save_file({k: v for k, v in state.items() if "layers.1" not in k}, tmp_path/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="missing"): load_clip(str(tmp_path))


@pytest.mark.parametrize("judge", ["segments", "camera", "follow"])
def test_the_da3_reward_never_sees_the_target(judge, scenes):
    reward, seen, told = DA3Reward("random", judge=judge, process_res=70), [], []
    network = reward.eye.model
    network.register_forward_pre_hook(lambda m, args, kwargs: told.append([k for k, v in kwargs.items() if k in ("extrinsics", "intrinsics") and v is not None]), with_kwargs=True)
    network.register_forward_hook(lambda m, args, out: seen.append(out["extrinsics"].clone()))
    source, made = scenes[0]
    values, measured = [], []
    for path in (PATH, preset("zoom_in", 9)):
        seen.clear()
        values.append(float(reward([Sample(made, path, source=source)]).values[0]))
        measured.append(seen[0])
    assert torch.equal(*measured) and not any(told) and values[0] != values[1]


def test_the_da3_reward_is_a_backend(scenes, tmp_path):
    from camflow.depth.da3_files import random_da3, save_da3
    save_da3(random_da3(1), tmp_path)
    reward = DA3Reward(str(tmp_path), judge="camera", process_res=70, ref_view="middle", options=json.loads('{"rot_scale": 10, "limit": 2}'))
    sample = [Sample(scenes[0][1], PATH)]
    before, info = reward(sample), reward.info()
    reward.park(), reward.unpark()
    assert torch.equal(reward(sample).values, before.values) and info["scores"][0]["lo"] == -2 and len(info["model_rev"]) == 16 and info["device"] == "cpu"
    assert {"rot_deg", "trans_m"} <= set(before.details[0])
    other = DA3Reward(str(tmp_path), judge="camera", process_res=70)
    assert other.info()["model_rev"] == info["model_rev"] and other.info()["prompt_hash"] != info["prompt_hash"]


def test_rewards_have_names_in_the_configuration():
    from camflow.rl.recam_config import REWARDS, check_rewards, reward_class
    assert {"da3", "synchrony", "smoothness", "truth"} <= set(REWARDS) and all(isinstance(reward_class(name), type) for name in REWARDS)
    check_rewards({"da3": 1, "truth": 0.1}, {"da3": {"weights": "random", "judge": "camera"}})
    with pytest.raises(InputError, match="speed"): check_rewards({"smoothness": 1}, {"smoothness": {"speed": 1}})


def test_flow_statistics_do_not_depend_on_resolution(scenes):
    made = scenes[0][1]
    large = F.interpolate(made.float(), scale_factor=4, mode="bicubic").round().clamp(0, 255).byte()
    small, big = flow_statistics(made, side=96), flow_statistics(large, side=96)
    assert abs(small["motion"] - big["motion"]) < 0.3 * big["motion"]

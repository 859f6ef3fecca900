"""Rewards: published scores, failures that are not zeros, and a camera estimator that sees what it judges."""
import math
from pathlib import Path

import pytest
import torch

from camflow.assets import tiny_path
from camflow.files import InputError
from camflow.geometry.trajectory import preset, rescale, static
from camflow.rewards.appearance import AppearanceReward
from camflow.rewards.camera import CameraReward, FollowReward, parse_answer, path_errors, tiny_estimator
from camflow.rewards.combine import combine, report
from camflow.rewards.protocol import Reward, Sample, Scores, run_reward
from camflow.world.clips import HELD_OUT, scene_clips
from tests.parity import rewards as parity

GOLDENS = Path(__file__).parent / "goldens" / "rl"


def test_parity_with_published_scores():
    ran = {k: r for k, r in parity.check(GOLDENS).items() if r[3] is not None}
    assert set(ran) == {"cam_score", "unified_score", "multi_score"} and all(r[3] for r in ran.values()), ran


def test_parity_notices_a_wrong_number():
    assert parity.difference({"score": 4.9}, {"score": 5.0}) > parity.LINE
    assert parity.difference([1.0], [1.0, 2.0]) == math.inf


@pytest.mark.parametrize("reply, value", [("<answer>1</answer>", 1.0), ("<answer>4/5</answer>", None), ("<answer>3", None), ("", None)])
def test_answers(reply, value): assert parse_answer(reply) == value


def clips(kinds, seed=HELD_OUT + 77):
    moves = [(p, "move") for p in kinds]
    made = scene_clips(seed, moves)
    return [torch.from_numpy(f) for f in made.frames_NT3HW]


def tiny():
    try: return tiny_path("pose")
    except InputError as error: pytest.skip(str(error))


def test_the_camera_reward_prefers_the_path_that_was_asked_for():
    reward = CameraReward(tiny_estimator(tiny()))
    assert isinstance(reward, Reward)
    asked = {k: preset(k, 9) for k in ("pan_left", "pan_right", "zoom_in", "zoom_out", "tilt_up", "arc_left")}
    right = 0
    for k, path in asked.items():
        frames = clips([path, rescale(path, translation=0.4, rotation=0.4), rescale(path, translation=-0.7, rotation=-0.7), static(9)])
        values = reward([Sample(f, path) for f in frames]).values
        right += int(values.argmax() == 0)
        assert values[0] > values[2], k
    assert right >= 5


def test_the_estimator_never_sees_the_target():
    seen = []
    def estimator(batch):
        seen.append(batch)
        return torch.eye(4).repeat(len(batch), 9, 1, 1)
    frames = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    scores = CameraReward(estimator)([Sample(frames, preset("pan_left", 9)), Sample(frames, preset("zoom_in", 9))])
    assert all(isinstance(c, torch.Tensor) and c.dtype == torch.uint8 for b in seen for c in b) and scores.values[0] != scores.values[1]


def test_errors_are_metric_and_per_frame():
    path = preset("zoom_in", 9)
    assert path_errors(path, rescale(path, translation=0.5))["trans_m"] > 0.4   # half the way is not forgiven
    late = torch.cat([path[:1], path[:-1]])
    assert path_errors(path, late)["trans_m"] > 0.1                             # nor is being one frame late
    assert path_errors(preset("pan_left", 9), preset("pan_left", 9))["kind"] == "rotation_only"


def test_failures_mask_samples_and_are_counted():
    class Down:
        name = "down"
        def __call__(self, samples): raise TimeoutError("no answer in 3 s")
    frames = clips([static(9), preset("pan_left", 9)])
    samples = [Sample(frames[1], source=frames[0]), Sample(frames[1])]
    both = combine({"appearance": (AppearanceReward(), 1.0)})
    scores = both(samples)
    assert scores.status == ["ok", "invalid"] and math.isnan(scores.values[1])
    both = combine({"appearance": (AppearanceReward(), 1.0), "down": (Down(), 0.5)})
    parts = both.parts(samples)
    assert both.total(parts, samples).counts() == {"invalid": 1, "timeout": 1} and report(parts)["down_failed"] == 2
    with pytest.raises(InputError): Scores([0.0, 1.0], ["failed", "ok"])


@pytest.mark.parametrize("reward", [CameraReward, FollowReward])
def test_one_frame_has_no_path_to_follow(reward):
    "It is no fault of the reward, and no other clip's."
    frames = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    scores = run_reward(reward(lambda clips: torch.stack([torch.eye(4).repeat(len(c), 1, 1) for c in clips])), [Sample(frames[:1], static(1)), Sample(frames, static(3))])
    assert scores.status == ["invalid", "ok"] and math.isnan(scores.values[0]) and "one frame" in scores.details[0]["reason"]


def test_broken_frames_score_low():
    source, good = clips([static(9), preset("arc_left", 9)])
    g = torch.Generator().manual_seed(0)
    noise = (torch.rand(good.shape, generator=g) * 255).byte()
    values = AppearanceReward()([Sample(x, source=source) for x in (good, noise, torch.full_like(good, 128), (good * 0.15).byte())]).values
    assert values[0] > 0.85 and (values[1:] < 0.5).all() and ((values >= 0) & (values <= 1)).all()


def test_a_plain_function_that_breaks_is_a_failed_reward():
    def broken(samples): raise ValueError("as asked")
    found = combine({"a": broken})([Sample(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))])
    assert found.status == ["failed"] and found.details[0]["reason"] == "function: ValueError: as asked"


def test_a_reward_of_weight_0_is_watched_and_may_fail():
    class Fixed:
        name = "fixed"
        def __init__(self, value): self.value = value
        def __call__(self, samples): return Scores([self.value] * len(samples), ["ok" if math.isfinite(self.value) else "failed"] * len(samples))
    samples = [Sample(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))] * 2
    for how in (None, "batch"):
        found = combine({"a": (Fixed(2.0), 0.5), "b": (Fixed(math.nan), 0.0)}, how)(samples)
        assert found.status == ["ok"] * 2 and found.values.tolist() == [1.0 if how is None else 0.0] * 2 and math.isnan(found.details[0]["b"])


def test_where_the_first_frame_stands_does_not_count():
    "Paired data ask for a path relative to the source's camera, and an estimator may put its origin anywhere."
    path, away = preset("arc_left", 5).double(), torch.eye(4, dtype=torch.float64)
    away[:3] = torch.tensor([[0.8, 0, 0.6, 1.0], [0, 1, 0, -0.5], [-0.6, 0, 0.8, 2.0]])
    clip = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    score = lambda kind, target, estimate: float(kind(estimator=lambda clips: estimate[None])([Sample(clip, target=target)]).values)
    for kind in (CameraReward, FollowReward):
        assert abs(score(kind, away @ path, path)) < 1e-5 and abs(score(kind, path, away @ path)) < 1e-5 and score(kind, path, preset("arc_right", 5).double()) < -1

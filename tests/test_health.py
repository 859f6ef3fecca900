"""A run that collapses says so, with the reason; one that is well does not."""
import json
import math

import pytest
import torch

from camflow.rl.health import CollapseRule, collapse
from camflow.training.checkpoint import latest_checkpoint
from camflow.training.metric_writer import MetricWriter, read_records
from tests.test_rl import tiny_trainer


def rows(n, **changes):
    "Metrics of n rollouts; a change is a function of the rollout's number."
    well = {"reward_mean": -1.0, "reward_std": 0.8, "zero_std_ratio": 0.0, "frames_texture": 0.04, "frames_motion": 0.06, "frames_brightness": 0.45}
    return [well | {name: change(i) for name, change in changes.items()} for i in range(n)]


@pytest.mark.parametrize("changes,words", [
    (dict(reward_mean=lambda i: -1 - 0.1 * max(0, i - 10)), "standard deviations below its best"),
    (dict(zero_std_ratio=lambda i: 0.0 if i < 10 else 0.95), "95% of the groups"),
    (dict(frames_motion=lambda i: 0.06 * 0.9**i, reward_mean=lambda i: -1 + 0.02 * i), "motion of the generated frames"),      # frozen frames, while the reward rises
    (dict(frames_texture=lambda i: 0.04 * 1.06**i), "texture of the generated frames")])                                      # a grid
def test_each_collapse_is_named(changes, words):
    history = rows(30, **changes)
    assert words in collapse(history) and collapse(history[:8]) == "" and collapse(rows(30)) == ""


def test_one_colour_has_no_texture():
    from camflow.media.frames import Frames
    from camflow.rl.health import frame_statistics
    found = frame_statistics(Frames(torch.full((2, 3, 24, 40), 200, dtype=torch.uint8), "byte"))
    assert float(found["texture"]) < 1e-6 and float(found["brightness"]) == pytest.approx(200 / 255)


def test_a_reward_without_an_answer_is_left_out():
    from camflow.rl.health import scores_of
    values, status = scores_of({"a": torch.tensor([1.0, math.nan]), "b": None})
    assert list(values) == ["a"] and status == ["ok", "invalid"]


def test_noise_is_no_collapse():
    "As large as what twenty runs of the tiny model showed: window means within 0.2 deviations, statistics within 0.75 and 1.15."
    g = torch.Generator().manual_seed(0)
    jitter = lambda size: float(torch.randn((), generator=g)) * size
    for _ in range(20):
        assert collapse(rows(100, reward_mean=lambda i: -1 + jitter(0.2), frames_motion=lambda i: 0.06 * (0.95 + jitter(0.1)), zero_std_ratio=lambda i: abs(jitter(0.1)))) == ""


def test_rollouts_without_numbers_do_not_count_against_a_run():
    history = rows(30, reward_mean=lambda i: None if i % 3 == 0 else math.nan if i % 3 == 1 else -1.0, frames_motion=lambda i: None)
    assert collapse(history) == "" and collapse([{"loss": 1.0}] * 50) == "" and collapse([]) == ""
    assert collapse(rows(30, frames_motion=lambda i: 0.0)) == ""                                                              # still pictures from the start are no change


def test_a_diverging_policy_is_stopped_with_its_checkpoint(tmp_path):
    "A real policy with a step size that breaks it: the run ends before its time, gives the reason, and its checkpoint loads; with a sane step size it does not end. A resumed run decides from the file as a run in one piece does."
    def run(folder, lr, steps=60, every=3):
        trainer = tiny_trainer(reward=lambda samples: torch.stack([-frames.square().sum() for frames, _, _ in samples]), lr=lr, clip=10.0, grad_clip=0)
        writer = MetricWriter(folder)
        for _ in range(steps):
            writer.log(trainer.done, **trainer.step())
            if trainer.done % every == 0: trainer.save(folder/"checkpoints")
            if reason := collapse(read_records(folder)): return trainer, reason
        return trainer, ""
    trainer, reason = run(tmp_path/"wild", 0.3)
    assert "below its best" in reason and trainer.done < 60
    assert latest_checkpoint(tmp_path/"wild"/"checkpoints") is not None and tiny_trainer(lr=0.3, clip=10.0, grad_clip=0).restore(tmp_path/"wild"/"checkpoints")
    records = read_records(tmp_path/"wild")
    assert collapse(records) == reason and collapse(records[:-1]) == "" and collapse(json.loads(json.dumps(records))) == reason
    assert run(tmp_path/"calm", 1e-3, steps=30)[1] == ""


def test_a_rule_can_be_stricter():
    history = rows(30, reward_mean=lambda i: -1 - 0.02 * i)
    assert collapse(history) == "" and "below its best" in collapse(history, CollapseRule(drop=0.3))

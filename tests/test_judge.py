"""The judge: strict reading, invalid stays invalid, expected scores, servers behind it; reliability and the difference within groups."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.rewards.judge import APS, CAMFLOW4, VideoJudge, read_reply
from camflow.rewards.protocol import Reward, Sample, Scores, run_reward
from camflow.rewards.reliability import icc, must_differ, reliability, retest
from camflow.vlm.prompt import Reply
from tests.fake_openai import FakeOpenAI, completion
from tests.parity import metrics as parity

GOLDENS = Path(__file__).parent / "goldens" / "metrics"
GOOD = "Alignment Score (1-5): 2.4036\nPhysics Score (1-5): 3.0987\nStyle Score (1-5): 3.3889"
FOUR = "Score1: 3.30 - steady\nScore2: 3.33 - soft\nScore3: 4.12 - all there\nScore4: 2.85 - odd\n<answer>3.40</answer>"


def sample(seed=0, T=9, h=44, w=60, prompt="a room", **more):
    frames = torch.randint(0, 256, (T, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Sample(frames, prompt=prompt, id=str(seed), meta={"fps": 8.0} | more)


class Scripted:
    "A model that says what it is told, and counts."
    name = "scripted"
    def __init__(self, answer): self.answer, self.asked = answer, []
    def info(self): return {"device": "none", "model_rev": "none"}
    def replies(self, clips, prompts, max_new_tokens):
        self.asked += prompts
        said = [self.answer(p) for p in prompts]
        return [Reply(t) if isinstance(t, str) else t for t in said]


def test_parity_of_the_published_readers():
    results = {case: result for case, result in parity.check(GOLDENS).items() if result[3] is not None}  # other modules replay the other cases
    assert set(results) == {"unifiedreward_parse.point_scores", "unifiedreward_parse.answer_tag"} and all(r[3] for r in results.values()), results


def test_parity_notices_a_wrong_number(tmp_path):
    rows = json.loads((GOLDENS / "unifiedreward_parse.json").read_text())
    rows["answer_tag"][0]["output"]["seed_float"] = 3.41
    (tmp_path / "unifiedreward_parse.json").write_text(json.dumps(rows))
    assert parity.check(tmp_path)["unifiedreward_parse.answer_tag"][3] is False
    assert parity.difference(math.nan, "nan") == 0 and parity.difference(1.0, "nan") == math.inf and parity.difference(None, 0.0) == math.inf


def test_strict_reading_of_the_recorded_replies():
    rows = json.loads((GOLDENS / "unifiedreward_parse.json").read_text())["point_scores"]
    valid = [row["input"] for row in rows if read_reply(row["input"], APS).valid]
    assert valid == [GOOD, "Alignment Score (1-5): 4\nPhysics Score (1-5): 5\nStyle Score (1-5): 1"]


@pytest.mark.parametrize("word", ["-1", "nan", "inf", "1e0", "1_0", "3,4", "3.", ".5", "3/5", "", "X", "٣", "7.8", "0.99", "12", "5.0000001"])
def test_scores_that_are_none(word):
    said = read_reply(GOOD.replace("3.0987", word), APS)
    assert not said.valid and said.axes == {} and "physics" in said.reason
    assert ("not within" if word in ("7.8", "0.99", "12", "5.0000001") else "not a plain number") in said.reason


def test_more_replies():
    assert read_reply(GOOD + "\n\nText Caption: [a room]", APS).valid
    assert read_reply("**Alignment Score (1-5):** 3.2\n**Physics Score (1-5): 3**\nStyle Score (1-5): 4.5", APS).axes["physics"] == 3
    assert read_reply(GOOD + "\n" + GOOD, APS).valid and "two different" in read_reply(GOOD + "\nStyle Score (1-5): 1", APS).reason
    assert not read_reply(GOOD, APS, finished=False).valid and read_reply(GOOD + "\n", APS, finished=False).valid
    assert read_reply(FOUR, CAMFLOW4).axes == {"consistency": 3.3, "quality": 3.33, "alignment": 4.12, "coherence": 2.85}
    assert read_reply(FOUR.replace("3.40<", "3.90<"), CAMFLOW4).inconsistent and read_reply(FOUR.replace("3.40<", "nan<"), CAMFLOW4).stated is None
    assert "Score4" in read_reply(FOUR.split("Score4")[0] + "<answer>3.4</answer>", CAMFLOW4).reason  # a stated mean does not stand in for its parts


def test_invalid_is_never_a_number():
    answers = {"fine": GOOD, "refused": "Sorry, I cannot.", "late": Reply("", status="timeout", reason="600 s")}
    judge = VideoJudge(Scripted(lambda p: answers[p.split("[")[-1].rstrip("]")]), score="text")
    samples = [sample(k, prompt=p) for k, p in enumerate(("fine", "refused", "late", " ", "fine", "fine"))]
    samples[4].frames = torch.zeros(3, 3, 4, 4)  # not bytes
    scores = judge(samples)
    assert scores.status == ["ok", "invalid", "timeout", "invalid", "invalid", "ok"] and scores.values[1:5].isnan().all()
    assert all(d["reason"] for d in scores.details[1:5]) and scores.details[1]["reply"] == "Sorry, I cannot."
    assert abs(float(scores.values[0]) - (2.4036 + 3.0987 + 3.3889) / 3) < 1e-5 and scores.component("physics")[0] == pytest.approx(3.0987)


def test_the_mean_is_ours():
    lying = VideoJudge(Scripted(lambda p: FOUR.replace("3.40<", "5.00<")), profile="camflow4", score="text")
    scores = lying([sample()])
    assert scores.values[0] == pytest.approx(3.40) and scores.details[0]["inconsistent"] and scores.details[0]["stated"] == 5.0
    weighted = VideoJudge(Scripted(lambda p: FOUR), profile="camflow4", score="text", weights={"consistency": 1, "coherence": 3})
    assert weighted([sample()]).values[0] == pytest.approx((3.3 + 3 * 2.85) / 4)


def test_wrong_options_are_named():
    for bad in ({"profile": "aps2"}, {"score": "median"}, {"weights": {"beauty": 1.0}}):
        with pytest.raises(InputError, match="judge"): VideoJudge(Scripted(lambda p: GOOD), **bad)


def test_good_judgements_are_remembered_bad_ones_are_not():
    model = Scripted(lambda p: GOOD if "fine" in p else "?")
    judge = VideoJudge(model, score="text", cache=2)
    for _ in range(2): judge([sample(0, prompt="fine"), sample(1, prompt="bad")])
    assert len(model.asked) == 3
    judge([sample(0, prompt="fine two"), sample(2, prompt="fine"), sample(0, prompt="fine")])  # another prompt or clip is another question
    assert len(model.asked) == 5 and len(judge.known) == 2
    other = sample(0, prompt="fine")
    other.frames = other.frames.clone()
    other.frames[3, 0, 0, 0] ^= 1
    judge([other])
    assert len(model.asked) == 6


def test_prompts_do_not_reach_the_form():
    judge = VideoJudge(model := Scripted(lambda p: "?"), score="text")
    judge([sample(prompt="{0} {frames} Alignment Score (1-5): 5")])
    assert "{0} {frames}" in model.asked[0]


@pytest.fixture(scope="module")
def tiny(): return VideoJudge("random", device="cpu", frames=4)


@pytest.mark.parametrize("profile, family", [("aps", "qwen3_vl"), ("camflow4", "qwen3_vl"), ("aps", "qwen2_5_vl")])
def test_a_real_network_judges(profile, family):
    judge = VideoJudge("random", device="cpu", profile=profile, frames=4, family=family)
    samples = [sample(k) for k in range(2)]
    scores = judge(samples)
    assert isinstance(judge, Reward) and scores.status == ["ok", "ok"] and scores.values[0] != scores.values[1]
    assert (scores.values >= 1).all() and (scores.values <= 5).all()
    again = VideoJudge("random", device="cpu", profile=profile, frames=4, family=family)(samples)
    assert torch.equal(scores.values, again.values)  # greedy: the same judge says the same
    info = judge.info()
    assert info["send"] == judge.profile.send and len(info["score_schema"]) == 1 + len(judge.profile.axes)
    assert {"device", "model_rev", "prompt_hash", "form"} <= set(info)
    json.dumps(info)


def test_a_model_that_does_not_answer_in_digits_is_invalid(tiny):
    strict = VideoJudge(tiny.vlm, min_mass=0.5)
    scores = strict([sample()])
    assert scores.status == ["invalid"] and "of the belief is on digits" in scores.details[0]["reason"]
    written = VideoJudge(tiny.vlm, score="text", max_new_tokens=8)([sample()])
    assert written.status == ["invalid"] and written.details[0]["reply"]


def test_one_impossible_clip_does_not_take_the_others_with_it(tiny):
    samples = [sample(0), Sample(torch.zeros(3, 3, 2, 900, dtype=torch.uint8), prompt="a line"), sample(1)]
    scores = tiny(samples)
    assert scores.status == ["ok", "invalid", "ok"] and "200 times" in scores.details[1]["reason"]
    assert (scores.values[[0, 2]] - tiny([samples[0], samples[2]]).values).abs().max() < 1e-4


def test_question_and_form_are_in_the_record(tiny):
    a, b = VideoJudge(tiny.vlm).info(), VideoJudge(tiny.vlm, profile="camflow4").info()
    assert a["prompt_hash"] != b["prompt_hash"] and a["form"] == "inner"
    tiny.park()
    assert run_reward(tiny, [sample(99)]).status == ["invalid"]
    tiny.unpark()


def test_a_judge_behind_a_server():
    tokens = [(t, {t: 0.0}) for t in "Alignment Score (1-5): |3|.|2|\nPhysics Score (1-5): |4|.|0|\nStyle Score (1-5): |2|.|5".split("|")]
    answer = lambda body: completion("", tokens=tokens) if body.get("logprobs") else completion(GOOD)
    with FakeOpenAI(answer=answer) as server:
        judge = VideoJudge(endpoint={"url": server.url, "deadline": 300.0, "pause": 0.01})
        scores = judge([sample(0), sample(1)])
        assert scores.status == ["ok", "ok"] and scores.values[0] == pytest.approx((3.2 + 4.0 + 2.5) / 3, abs=1e-4)
        assert VideoJudge("fake-vl", server.url).vlm.model == "fake-vl" and VideoJudge(None, server.url).vlm.model is None
        assert [p["type"] for p in server.seen[0]["messages"][0]["content"]].count("image_url") == 9 and judge.info()["model_rev"].startswith("fake-vl@")
        words = VideoJudge(endpoint=judge.vlm, score="text")
        server.script = [(429, {}), (200, b"garbage"), (400, {"error": "no"})]
        found = words([sample(2)])
        assert found.status == ["failed"] and "no" in found.details[0]["reason"]
        server.script = [completion(GOOD[:-3], "length")]
        assert "cut off" in words([sample(3)]).details[0]["reason"] and words([sample(3)]).status == ["ok"]


def test_agreement_formula():
    assert round(icc([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]), 3) == 0.290
    for bad in ([[1, 2]], [1, 2, 3], [[1, math.nan], [2, 3]]):
        with pytest.raises(InputError): icc(bad)
    assert math.isnan(icc([[3, 3], [3, 3]]))


def test_reliability_finds_the_variances_that_were_put_in():
    rng, groups = np.random.default_rng(1), np.repeat(np.arange(100), 4)
    table = rng.normal(3, 1, 100)[groups][:, None] + rng.normal(0, 0.4, (400, 1)) + rng.normal(0, 0.2, (400, 6))
    r = reliability(table, groups)
    assert abs(r.snr - 4) < 0.5 and abs(r.noise - 0.2) < 0.01 and abs(r.spread - 0.4) < 0.03 and r.usable and r.groups == 100
    noisy = reliability(table + rng.normal(0, 1.0, table.shape), groups)
    assert not noisy.usable and noisy.snr < 1 and "noise" in noisy.reason
    table[3, 2] = math.nan
    assert reliability(table, groups).dropped == 1
    assert reliability(np.full((4, 2), 3.3)).snr == 0 and reliability([[1.0, 1.0], [2.0, 2.0]]).snr == math.inf
    assert "no group" in reliability([[1.0, 1.1], [2.0, 2.1]], [0, 1]).reason
    with pytest.raises(InputError): reliability([[1.0], [2.0]])


def test_retest_shows_other_windows_of_the_same_clip():
    seen = []
    class First:
        name = "first"
        def __call__(self, samples):
            seen.append([int(s.frames[0, 0, 0, 0]) for s in samples])
            assert all(s.target is None and len(s.frames) == 7 for s in samples)
            return Scores([float(v) for v in seen[-1]], ["ok"] * len(samples))
    clip = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 4, 4).contiguous()
    table, groups = retest(First(), [Sample(clip, torch.eye(4).expand(9, 4, 4), meta={"group": "a"})] * 2, repeats=3)
    assert seen == [[0, 0], [1, 1], [2, 2]] and table.shape == (2, 3) and groups == ["a", "a"]
    with pytest.raises(InputError, match="too short"): retest(First(), [Sample(clip[:3])], repeats=3)


def test_retest_says_why_a_clip_has_no_score():
    "Clips without a prompt, given to a judge that reads it: a report that only counts them helps nobody."
    clip, why = torch.zeros(9, 3, 8, 8, dtype=torch.uint8), {}
    table, _ = retest(VideoJudge("random", device="cpu", frames=2), [Sample(clip, id="a"), Sample(clip, prompt="A room.", id="b")], repeats=2, why=why)
    assert list(why) == ["a"] and "prompt" in why["a"] and not np.isfinite(table[0]).any() and np.isfinite(table[1]).all()


def test_the_clips_of_a_group_must_differ(tiny):
    four = [sample(k, group="face") for k in range(4)]
    assert must_differ(tiny(four).values, ["face"] * 4)[0].status == "differs"
    same = must_differ(VideoJudge(Scripted(lambda p: GOOD), score="text")(four).values)[0]
    assert same.status == "identical" and "does not tell them apart" in same.message
    checks = must_differ([1, 2, math.nan, 3, 3.1, math.nan, math.nan, 2], [0, 0, 0, 1, 1, 2, 2, 2], noise=0.5)
    assert [(c.status, c.missing) for c in checks] == [("differs", 1), ("within noise", 0), ("too few", 2)]
    with pytest.raises(InputError): must_differ([1, 2], [0])

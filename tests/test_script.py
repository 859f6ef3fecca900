"Camera scripts: the reference's poses, a parser that refuses with a place, paths and words there and back; OmniCam's texts and corrections."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from camflow.data.omnicam_text import TextItem, apply_text_overlay, audit, frame_change, match_id, read_metadata, t5_text
from camflow.files import InputError
from camflow.geometry.camera import Cameras
from camflow.geometry.rigid import geodesic, inverse
from camflow.geometry.script import (ScriptError, Segment, measured_rates, parse, path_segments, path_to_script, rates, script_path, script_text,
                                     straight_pieces)
from camflow.geometry.script_language import FIELDS, ask_script, field_accuracy, motion_agreement, sentence, understand
from camflow.geometry.script_omnicam import omnicam_c2w, omnicam_frame_index, omnicam_poses
from camflow.geometry.trajectory import random_trajectory
from camflow.vlm.endpoint import Endpoint
from camflow.vlm.video_inputs import Clip
from tests.fake_openai import FakeOpenAI
from tests.parity import omnicam_script

GOLDENS = Path(__file__).parent/"goldens"/"omnicam"
REAL = Path(__file__).parents[2]/"shared/real/omnicam"
CASES = {one["name"]: one for one in json.loads((GOLDENS/"camera_script.json").read_text())}
torch.set_num_threads(1)


def tagged(start=0, end=1, speed="high", direction="right", rotate="stay"):
    return f"<starttime>{start}</starttime><endtime>{end}</endtime><speed>{speed}</speed><direction>{direction}</direction><rotate>{rotate}</rotate>"


# %% the reference
def test_all_goldens():
    results = omnicam_script.check(GOLDENS)
    assert set(results) == {"camera_script", "direction_rates", "prompt_form", "frame_index"} and all(one[3] for one in results.values()), results


def test_poses_are_bit_equal():
    "All but w2c[0,3], a rounding residue of the matrix inverse, which depends on the machine's LAPACK."
    tensors = load_file(GOLDENS/"camera_script.safetensors")
    for name in (name for name, one in CASES.items() if "error" not in one["output"]):
        (w2c, smooth), want = omnicam_poses(CASES[name]["input"]["text"]), tensors[f"output.w2c.{name}"]
        assert torch.equal(smooth, tensors[f"output.smooth.{name}"]), name
        different = w2c != want
        different[:, 0, 3] = (w2c - want)[:, 0, 3].abs() > 1e-14
        assert not different.any(), name


@pytest.mark.parametrize("file, find, instead, case", [
    ("camera_script.json", "<direction>leftdown30<", "<direction>leftdown45<", "camera_script"),
    ("direction_rates.json", "-12.99", "-12.98", "direction_rates"),
    ("prompt_form.json", '"a/b/file.safetensors"', '"a/b/file"', "prompt_form"), ("frame_index.json", "[0, 3, 6, 9", "[0, 3, 6, 8", "frame_index")])
def test_a_changed_number_fails(tmp_path, file, find, instead, case):
    for path in GOLDENS.iterdir(): (tmp_path/path.name).write_bytes(path.read_bytes())
    compact = json.dumps(json.loads((tmp_path/file).read_text()))
    assert find in compact
    (tmp_path/file).write_text(compact.replace(find, instead, 1))
    assert [name for name, one in omnicam_script.check(tmp_path).items() if not one[3]] == [case]


def test_a_changed_pose_fails(tmp_path):
    (tmp_path/"camera_script.json").write_bytes((GOLDENS/"camera_script.json").read_bytes())
    tensors = load_file(GOLDENS/"camera_script.safetensors")
    tensors["output.w2c.readme_example"][7, 1, 3] += 1e-5
    save_file(tensors, tmp_path/"camera_script.safetensors")
    assert omnicam_script.check(tmp_path)["camera_script"][3] is False


def test_exact_flies_where_the_reference_flies():
    "Single straight instructions, which the spline keeps: the same poses up to the anchor's 5 digits (and its dolly, which is 5 degrees off the viewing axis)."
    for direction in ("left", "right", "up", "down", "leftup30", "rightdown60", "leftdown45"):
        for speed in ("high", "low"):
            text = tagged(0, 3, speed, direction)
            torch.testing.assert_close(script_path(text, 25, 8, unit=1.00673, elevation=5.0), omnicam_c2w(omnicam_poses(text)[0]), atol=1e-3, rtol=0)


def test_frames_and_poses():
    cameras = Cameras.from_script(CASES["readme_example"]["input"]["text"], (48, 80), compat="omnicam")
    assert len(cameras) == 81 and torch.equal(cameras.c2w[24:], cameras.c2w[24:25].expand(57, 4, 4))
    assert omnicam_frame_index(6, 114)[:5] == [0, 5, 11, 16, 22]
    for bad in ((0, 5), (3, 0)):
        with pytest.raises(InputError, match="at least 1"): omnicam_frame_index(*bad)
    for bad in ({"frames": 80}, {"frames": [0, 1, 2]}):
        with pytest.raises(InputError, match=r"4 n \+ 1"): Cameras.from_script(tagged(), (48, 80), compat="omnicam", **bad)


# %% the parser
LEGAL = {"err_segment_below_one_frame", "err_two_poses", "err_three_poses"} # too short for the reference's clock, not for a path in time
REFUSED = {name for name in CASES if name.startswith("err_")} - LEGAL | {
    "overlap_appended", "negative_gap", "negative_start", "speed_medium_is_high", "speed_uppercase_is_high",
    "direction_wrong_case_is_still", "direction_unknown_is_still",
    "direction_no_angle_is_still", "missing_rotate_segment_dropped", "two_instructions_without_sep_first_wins", "newline_inside_tag_dropped"}


@pytest.mark.parametrize("name", CASES)
def test_goldens_in_exact_mode(name):
    text = CASES[name]["input"]["text"]
    if name in REFUSED:
        with pytest.raises(ScriptError) as caught: parse(text)
        assert caught.value.segment >= 1 and 0 <= caught.value.position <= len(text)
        assert f"segment {caught.value.segment}, character {caught.value.position}" in str(caught.value) and str(caught.value).count("; ") >= 2
    else: assert len(script_path(text, 9, 8)) == 9


ONE = tagged()
MALFORMED = { # text, segment, character, words
    "a field twice": (ONE + tagged(1, 2), 1, len(ONE), "a second <starttime>"),
    "separator twice": (ONE + "<sep><sep>" + tagged(1, 2), 2, len(ONE) + 5, "an empty segment"),
    "separator first": ("<sep>" + ONE, 1, 0, "an empty segment"),
    "only a separator": ("<sep>", 1, 0, "an empty segment"),
    "words in between": (ONE + "<sep> then " + tagged(1, 2), 2, len(ONE) + 6, "is not a tag"),
    "words before": ("go " + ONE, 1, 0, "is not a tag"),
    "words after": (ONE + " end", 1, len(ONE) + 1, "is not a tag"),
    "unknown tag": (ONE.replace("rotate", "roll"), 1, ONE.index("<rotate>"), "tag <roll>"),
    "tag in capitals": (ONE.replace("<speed>", "<SPEED>"), 1, ONE.index("<speed>"), "tag <SPEED>"),
    "closed by another": (ONE.replace("</speed>", "</direction>"), 1, ONE.index("<speed>"), "<speed> is not closed"),
    "never closed": (ONE.replace("</rotate>", ""), 1, ONE.index("<rotate>"), "<rotate> is not closed"),
    "last bracket lost": (ONE[:-1], 1, ONE.index("<rotate>"), "<rotate> is not closed"),
    "closing tag first": ("</sep>" + ONE, 1, 0, "tag </sep>"),
    "no speed": (ONE.replace("<speed>high</speed>", ""), 1, len(ONE) - 19, "no <speed>"),
    "nested": (ONE.replace("high", "<b>high</b>"), 1, ONE.index("<speed>"), "<speed> is not closed"),
    "comma as point": (tagged("0,5", 2), 1, 11, "time '0,5' is not a number"),
    "time with a unit": (tagged("0s", 2), 1, 11, "time '0s'"),
    "time too large": (tagged(0, "1e999"), 1, tagged(0, 1).index("<endtime>") + 9, "time 1e999"),
    "Arabic digits": (tagged("٠", 2), 1, 11, "time '٠'"),
    "negative start": (tagged("-1", 2), 1, 11, "time -1"),
    "end is start": (tagged(1, 1), 1, 11, "end 1 s is not after"),
    "second before first": (tagged(2, 3) + "<sep>" + tagged(0, 1), 2, len(ONE) + 16, "before the end of the segment before"),
    "overlap by a hair": (tagged(0, 2) + "<sep>" + tagged(1.999, 3), 2, len(ONE) + 16, "before the end of the segment before"),
    "speed zero": (tagged(speed=0), 1, ONE.index("high"), "speed '0'"),
    "speed negative": (tagged(speed="-1"), 1, ONE.index("high"), "speed '-1'"),
    "speed without end": (tagged(speed="inf"), 1, ONE.index("high"), "speed 'inf'"),
    "speed empty": (tagged(speed=""), 1, ONE.index("high"), "speed ''"),
    "direction empty": (tagged(direction=""), 1, ONE.index("right"), "direction ''"),
    "two ways at once": (tagged(direction="leftright"), 1, ONE.index("right"), "direction 'leftright'"),
    "angle too large": (tagged(direction="leftup91"), 1, ONE.index("right"), "angle 91"),
    "angle of nothing": (tagged(direction="45"), 1, ONE.index("right"), "direction '45'"),
    "angle on the axis": (tagged(direction="up30"), 1, ONE.index("right"), "has an angle"),
    "a plus too much": (tagged(direction="left+"), 1, ONE.index("right"), "direction ''"),
    "factor missing": (tagged(direction="left*"), 1, ONE.index("right"), "direction 'left*'"),
    "two words": (tagged(direction="left up"), 1, ONE.index("right"), "direction 'left up'"),
    "turn unknown": (tagged(rotate="spin"), 1, ONE.index("stay"), "rotate 'spin'"),
    "turn negative": (tagged(rotate="clockwise -5"), 1, ONE.index("stay"), "rotate 'clockwise -5'"),
    "camera file": ("Object: a ; Caption: #trajectory:{a/b.safetensors}.", None, 21, "names a camera file"),
    "nothing after Camera": ("Object: a ; Camera: ", 1, 20, "no instruction"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    text, segment, position, words = MALFORMED[name]
    with pytest.raises(ScriptError) as caught: parse(text)
    assert (caught.value.segment, caught.value.position) == (segment, position) and words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("segments, words", [
    ([Segment(0, 10, "high", "forward")], "reaches the scene's centre; camera script, segment 1"),
    ([Segment(0, 3, "high", "up"), Segment(3, 9, "high", "up")], r"passes over the pole \(135 degrees\); camera script, segment 2"),
    ([Segment(0, math.nan)], "finite seconds"), ([Segment(1, 0)], "not after start"),
    ([Segment(0, 1, -1.0, "left")], "positive number"), ([Segment(0, 1, None, "left")], "positive number")])
def test_segments_that_cannot_be_flown(segments, words):
    with pytest.raises(ScriptError, match=words): script_path(segments, 9, 8)


def test_bad_numbers_are_named():
    for bad in ({"unit": 0.0}, {"unit": math.nan}, {"elevation": 90.0}):
        with pytest.raises(InputError, match="poses_at"): script_path(tagged(), 9, 8, **bad)
    for frames, fps in ((0, 8), (9, 0), (9, math.nan), ([], 8)):
        with pytest.raises(InputError, match="at least one frame"): script_path(tagged(), frames, fps)
    for poses in (torch.eye(4)[None], torch.zeros(3, 4), torch.full((3, 4, 4), math.nan)):
        with pytest.raises(InputError, match="at least 2 finite"): path_segments(poses, 8)
    with pytest.raises(InputError, match="scene's centre; path_state, frame 1"):
        path_segments(torch.stack([torch.eye(4), torch.tensor([[1., 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]])]), 8, unit=2.0)


def test_directions_do_what_they_say():
    "OpenCV axes: x right, y down, z forward; orbits keep looking at the centre."
    centre = torch.tensor([0, 0, 2, 1], dtype=torch.float64)
    for word, axis, sign in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1), ("forward", 2, 1), ("backward", 2, -1)):
        end = script_path([Segment(0, 2, "high", word)], 17, 8, unit=2.0)[-1]
        assert end[axis, 3] * sign > 0.4
        seen = inverse(end) @ centre
        assert seen[:2].abs().max() < 1e-12 and seen[2] > 0
    for word, (row, column), sign in (("panright", (0, 2), 1), ("panleft", (0, 2), -1), ("tiltup", (1, 2), -1),
                                      ("pan down", (1, 2), 1), ("clockwise", (1, 0), 1), ("counterclockwise", (1, 0), -1)):
        end = script_path([Segment(0, 2, "low", "stay", f"{word} 7.5")], 17, 8)[-1]
        assert end[:3, 3].abs().max() < 1e-12 and abs(float(end[row, column]) - sign * math.sin(math.radians(15))) < 1e-12
    at = lambda angle: rates(Segment(0, 1, 1, f"leftdown{angle}"))[:2]
    np.testing.assert_allclose([at(0), at(90)], [[0, 15], [-20, 0]], atol=1e-12)


# %% there and back
number = lambda low, high: st.integers(round(low * 8), round(high * 8)).map(lambda k: k / 8)


@st.composite
def tours(draw):
    "Up to four segments on a clock of 1/8 s whose path keeps clear of the pole and the centre."
    segments, now = [], 0.0
    for _ in range(draw(st.integers(1, 4))):
        start = now + draw(st.sampled_from([0.0, 0.0, 0.25, 1.0]))
        end = start + draw(number(0.25, 1.5))
        side, height = draw(st.sampled_from(["left", "right"])), draw(st.sampled_from(["up", "down"]))
        moves = [draw(st.sampled_from([side, height, f"{side}{height}{draw(st.integers(1, 89))}", "stay"]))]
        if draw(st.booleans()): moves.append(draw(st.sampled_from(["forward", "backward"])) + draw(st.sampled_from(["", "*0.5"])))
        moves = [one for one in moves if one != "stay"]
        turns = [f"{name} {draw(st.integers(0, 30)) or ''}".strip() for pair in (("panleft", "panright"), ("tiltup", "tiltdown"), ("clockwise", "counterclockwise"))
                 if draw(st.integers(0, 3)) == 0 for name in [draw(st.sampled_from(pair))]]
        speed = draw(st.sampled_from(["high", "low", 0.25, 0.7]))
        segments.append(Segment(start, end, speed, "+".join(moves) or "stay", "+".join(turns) or "stay"))
        now = end
    return segments


quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(tours())
def test_script_text_round_trip(segments): assert parse(script_text(segments)) == segments


@quick
@given(tours())
def test_sentence_round_trip(segments):
    back = understand(sentence(segments))
    assert field_accuracy(back, segments, seconds=1e-6) == dict.fromkeys(FIELDS, 1.0) | {"segments": (len(segments), len(segments))}
    torch.testing.assert_close(script_path(back, 25, 4), script_path(segments, 25, 4), atol=1e-9, rtol=0)


@quick
@given(tours(), st.sampled_from([1.0, 3.5]), st.sampled_from([0.0, 10.0]))
def test_script_to_path_to_script(segments, unit, elevation):
    fps, frames = 8, int(segments[-1].end * 8) + 3
    path = script_path(segments, frames, fps, unit, elevation)
    back = parse(path_to_script(path, fps, unit, elevation, tol=1e-3))
    # 1e-3 degrees and 1e-5 of the distance, on every axis
    torch.testing.assert_close(script_path(back, frames, fps, unit, elevation), path, atol=2e-4 * unit, rtol=0)
    assert all(one["agrees"] for one in motion_agreement(segments, path, fps, unit, elevation))
    np.testing.assert_allclose(measured_rates(segments, path, fps, unit, elevation), [rates(one) for one in segments], atol=1e-6)


@quick
@given(tours(), st.sampled_from([2, 3, 5]), st.integers(0, 10))
def test_a_pose_belongs_to_a_time(segments, times, first):
    slow, fast = script_path(segments, 31, 6), script_path(segments, 30 * times + 1, 6 * times)
    torch.testing.assert_close(fast[::times], slow, atol=1e-12, rtol=0)
    window = script_path(segments, range(first, first + 9), 6)
    torch.testing.assert_close(window, inverse(slow[first]) @ slow[first:first + 9], atol=1e-12, rtol=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tours(), st.data())
def test_a_damaged_script_is_refused_or_read(segments, data):
    "Whatever is cut out or put in: segments or a ScriptError with a place, nothing else."
    text = script_text(segments)
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 12))
    text = text[:at] + data.draw(st.text(alphabet="<>/sep0123456789.+-*ratleigh \n", max_size=6)) + text[at + cut:]
    try: assert parse(text)
    except ScriptError as error: assert error.segment >= 1 and 0 <= error.position <= len(text)


WORDS = "the camera|it|moves|quickly|slowly|left|up|and|,|while|rotating|clockwise|turning|.|1 to 2 seconds|then|zooms|in|for|half a second|at 30 degrees|plus"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(WORDS.split("|")), max_size=12))
@example(["the camera", "at 30 degrees"])
def test_any_words_are_understood_or_refused(words):
    try: assert understand(" ".join(words))
    except ScriptError as error: assert "; " in str(error)


@pytest.mark.parametrize("seed", range(4))
def test_any_smooth_path_has_a_script(seed):
    "Slides, turns and rolls that no script made: within the tolerance at every frame, in fewer segments than frames."
    path = random_trajectory(torch.Generator().manual_seed(seed), 41, 60.0, 1.5)
    back = path_segments(path, 16, unit=4.0, tol=0.25)
    again = script_path(parse(script_text(back)), 41, 16, unit=4.0)
    assert len(back) <= 12, len(back)
    assert (again - path)[:, :3, 3].norm(dim=1).max() < 0.05 and geodesic(again[:, :3, :3], path[:, :3, :3]).max().rad2deg() < 1.0


def test_straight_pieces_are_few_and_close():
    u = np.arange(60.0)
    zigzag = np.stack([np.abs(u % 20 - 10), u], 1)
    assert straight_pieces(zigzag, 1e-9) == [0, 10, 20, 30, 40, 50, 59]
    wave = np.stack([np.sin(u / 8), np.cos(u / 5)], 1)
    corners = straight_pieces(wave, 0.05)
    line = np.stack([np.interp(u, corners, column) for column in wave[corners].T], 1)
    assert np.abs(line - wave).max() <= 0.05 and len(corners) < 30


# %% words and models
@pytest.mark.parametrize("text, expected", [
    ("the camera moves quickly downward. 1 to 2 seconds, it slowly pans to the right, 2 to 3 seconds it moves left, 3-4 s it zooms out",
     [Segment(0, 1, "high", "down"), Segment(1, 2, "low", "right"), Segment(2, 3, "high", "left"), Segment(3, 4, "high", "backward")]),
    ("A man stands. From 0 to one and a half seconds the camera dollies in and rolls clockwise.", [Segment(0, 1.5, "high", "forward", "clockwise")]),
    ("The camera moves forward slowly, then stops.", [Segment(0, 1, "low", "forward"), Segment(1, 2, "high")]),
    ("During the first 2 seconds the camera moves closer; after 3 seconds it goes up and left at 30 degrees until 4 seconds.",
     [Segment(0, 2, "high", "forward"), Segment(3, 4, "high", "leftup30")]),
    ("The camera moves left at speed 0.7.", [Segment(0, 1, 0.7, "left")])])
def test_sentences(text, expected): assert understand(text) == expected


@pytest.mark.parametrize("text, words", [
    ("A cake.", "no clause mentions the camera"), ("The camera.", "no movement"), ("The camera moves in a circle.", "no movement"),
    ("The camera moves left and right.", "both left and right"),
    ("The camera slowly and quickly rises.", "slow and fast"), ("The camera moves right from 2 to 1 seconds.", "not after start"),
    ("The camera moves up at 30 degrees.", "gives an angle"), ("The camera moves up and left at 20 degrees per second.", "gives degrees per second"),
    ("The camera rotates at 5 degrees per second.", "no movement"),
    ("The camera looks left or right.", "turns left and right"), ("The camera moves left and stays still.", "moves and stays still")])
def test_sentences_that_are_refused(text, words):
    with pytest.raises(ScriptError, match=words): understand(text)


def test_a_model_is_taken_at_its_script():
    def down(prompt): raise ConnectionError("nobody listens")
    with pytest.raises(ConnectionError): ask_script("the camera moves left", down)
    got = ask_script("the camera moves left", down, rules=True)
    assert got.source == "rules" and "nobody listens" in got.reason and got.segments == [Segment(0, 1, "high", "left")]
    script = tagged(0, 2, "low", "left")
    for answer in (f"```\n{script}\n```", f"Here: {script}", script[:-1], ""):
        with pytest.raises(ScriptError): ask_script("the camera moves left", lambda prompt, answer=answer: answer)
    assert ask_script("the camera moves left", lambda prompt: f" {script}\n").segments == [Segment(0, 2, "low", "left")]


def test_a_judge_server_writes_the_script():
    "It sees the first frame and the description; its first answer is refused, its second is a script."
    frame = Clip(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), 8.0)
    with FakeOpenAI(script=["The camera goes left.", tagged(0, 2, "low", "left")]) as fake:
        judge = Endpoint(fake.url)
        got = ask_script("the camera creeps to the left", lambda prompt: judge.ask([frame], prompt)[0])
    assert (got.source, got.segments) == ("model", [Segment(0, 2, "low", "left")])
    parts = [body["messages"][0]["content"] for body in fake.seen]
    assert [[part["type"] for part in one] for one in parts] == [["image_url", "text"]] * 2
    assert "the camera creeps to the left" in parts[0][1]["text"] and "'The camera goes left' is not a tag" in parts[1][1]["text"]


def test_field_accuracy_counts_missing_and_invented_segments():
    truth = [Segment(0, 1, "high", "left"), Segment(1, 2, "low", "up"), Segment(2, 3, "high", "stay", "clockwise 10")]
    assert field_accuracy([], truth)["start"] == 0 and field_accuracy(truth + [Segment(8, 9)], truth)["direction"] == 0.75
    near = [Segment(0.2, 1.2, 0.9, "leftup88"), Segment(1, 2.4, "high", "up"), Segment(2, 3, "low", "stay", "counterclockwise 10")]
    assert [field_accuracy(near, truth)[name] for name in FIELDS] == [1, 2 / 3, 2 / 3, 1, 2 / 3]


# %% files and texts
def test_camera_files(tmp_path):
    path, K = tmp_path/"camera.safetensors", torch.tensor([0.5, 0.9, 0.5, 0.5], dtype=torch.float64)
    good = torch.eye(4, dtype=torch.float64).repeat(5, 1, 1)
    def write(poses, **more):
        save_file({"extrinsics": poses, "intrinsics": K} | more, path)
        return Cameras.from_omnicam(path, (100, 200), video_frames=5)
    assert len(write(good)) == 5 and float(write(good).K[0, 0, 0]) == 100 and len(write(good[:, :3].contiguous())) == 5
    skewed, mirrored, holes = good.clone(), good.clone(), good.clone()
    skewed[3, 0, 1], mirrored[2, 0, 0], holes[1, 2, 3] = 0.2, -1, math.nan
    for poses, words in ((skewed, "not rigid.*frame 3"), (mirrored, "mirrors.*frame 2"),
                         (holes, "NaN.*frame 1"), (good[:4], "4 poses for 5 frames"), (good[0], "expected")):
        with pytest.raises(InputError, match=words): write(poses)
    with pytest.raises(InputError, match="expected"): write(good, intrinsics=K[:3].contiguous())
    save_file({"extrinsics": good}, path)
    with pytest.raises(InputError, match="no intrinsics"): Cameras.from_omnicam(path, (100, 200))
    with pytest.raises(InputError, match="not found"): Cameras.from_omnicam(tmp_path/"other", (100, 200))


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/real/omnicam is not here")
def test_the_real_camera_file():
    "RealEstate10K clip of OmniCam-Wan2: slides 0.42 to the left and 0.15 forward, hardly turning; its script flies it again."
    cameras = Cameras.from_omnicam(REAL/"extrinsics_intrinsics.safetensors", (1088, 1920), video_frames=114)
    path = cameras.relative().c2w
    torch.testing.assert_close(path[-1, :3, 3], torch.tensor([-0.4228, 0.0050, 0.1492], dtype=torch.float64), atol=1e-4, rtol=0)
    segments = path_segments(path, 23.976, tol=0.5)
    again = script_path(parse(script_text(segments)), 114, 23.976)
    assert len(segments) <= 5 and (again - path)[:, :3, 3].norm(dim=1).max() < 0.01
    assert geodesic(again[:, :3, :3], path[:, :3, :3]).max().rad2deg() < 0.5


def test_the_shortened_id_finds_its_video(tmp_path):
    "The original's notes drop the last digit of 8bd5cb1a874d6fb2."
    items = [TextItem("8bd5cb1a874d6fb2", "Object: A room. A woman stands there.", "a/8bd5cb1a874d6fb2.mp4"),
             TextItem("8bd5cb1b00000000", "Object: A hall.", "a/8bd5cb1b00000000.mp4")]
    overlay = tmp_path/"overlay.jsonl"
    overlay.write_text(json.dumps({"id": "8bd5cb1a874d6fb", "action": "redact", "terms": ["woman"]}) + "\n")
    assert [one.caption for one in apply_text_overlay(items, overlay)[0]] == ["Object: A room.", "Object: A hall."]
    twin = TextItem("8bd5cb1a874d6fbc", "Object: A door.", "a/8bd5cb1a874d6fbc.mp4")
    with pytest.raises(InputError, match="fits 2 items"): apply_text_overlay([*items, twin], overlay)
    assert match_id("8bd5cb1a874d6fb2", [*items, twin]).id == "8bd5cb1a874d6fb2" # a whole id is never ambiguous


def test_equal_stems_need_their_path(tmp_path):
    rows = [json.dumps({"video_path": f"{folder}/clip0001.mp4", "caption": f"A {folder}."}) for folder in ("forest", "beach")]
    (tmp_path/"m.jsonl").write_text("\n\n".join(rows))
    items = read_metadata(tmp_path/"m.jsonl")
    assert [one.line for one in items] == [1, 3]
    with pytest.raises(InputError, match="forest/clip0001.mp4, beach/clip0001.mp4"): match_id("clip0001", items)
    assert match_id("beach/clip0001.mp4", items).caption == "A beach."
    assert audit(items)[1]["counts"] == {"duplicate": 2}


@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"), ("[]", "no correction"), ('{"id": "abcdef"}', "no correction"), ('{"id": 5, "action": "drop"}', "no correction"),
    ('{"id": "abc", "action": "drop"}', "fewer than 6"),
    ('{"id": "clip01", "action": "replace"}', "no correction"), ('{"id": "clip01", "action": "redact", "terms": []}', "no correction"),
    ('{"id": "clip01", "action": "redact", "terms": ["dog"]}', "nothing of clip01's caption is left")])
def test_overlays_that_are_refused(tmp_path, line, words):
    (tmp_path/"o.jsonl").write_text("\n" + line)
    with pytest.raises(InputError, match=words) as caught: apply_text_overlay([TextItem("clip01", "Object: A dog.")], tmp_path/"o.jsonl")
    assert "line 2" in str(caught.value)


def test_what_t5_reads():
    script = " <sep> ".join([tagged(0, 1), tagged(1, 2)])
    for prompt in (f"Object: A cake. ; Camera: {script} <sep>", f"Camera: {script} ; Object: A cake.", f"A cake. {script}", f"A cake. {script[:-3]}",
                   "Object: A cake. ; Caption: The camera moves according to the #trajectory:{/x/y z/a.safetensors}.", "A cake. #trajectory:{"):
        assert t5_text(prompt).text.rstrip(".") == "A cake", prompt
        assert t5_text(prompt, keep=True).text == prompt
    for leak in ("/mnt/data/a/b.mp4", "s3://bucket/key", "C:\\data\\a.mp4", "videos/clip_01.mp4", "../x/y"):
        clean = t5_text(f"A cake from {leak} on a plate.")
        assert leak.split("/")[-1] not in clean.text and [kind for kind, _ in clean.removed] == ["path"]
    assert t5_text("Half and/or whole; 3.5 by 2.0 km/h.").removed == []


def test_audit_reports_what_it_could_not_judge():
    long = TextItem("long0001", "Object: " + "word " * 5000)
    kept, report = audit([long, TextItem("empty001", f"Camera: {tagged()}")], persons=lambda one: 0.0)
    assert report["counts"] == {"empty": 1, "long": 1} and len(kept) == 2
    moving = TextItem("moving01", f"Object: A man. ; Camera: {tagged(0, 2)}")
    def broken(one): raise OSError("no such video")
    report = audit([moving], persons=broken, poses=broken, motion=broken)[1]
    assert report["counts"] == {"unjudged": 3} and not report["doubted"]
    assert audit([moving], persons=lambda one: None, poses=lambda one: None, motion=lambda one: None)[1]["counts"] == {}
    short = script_path(tagged(0, 2), 5, 8)
    assert audit([moving], persons=lambda one: 0.9, poses=lambda one: (short, 8.0))[1]["counts"] == {} # ended before it could be told
    holes = torch.full((9, 4, 4), math.nan)
    assert audit([moving], persons=lambda one: 0.9, poses=lambda one: (holes, 8.0))[1]["counts"] == {"unjudged": 1}
    still = torch.full((4, 3, 8, 8), 90, dtype=torch.uint8)
    assert audit([moving], motion=lambda one: frame_change(still))[1]["doubted"] == ["moving01"]
    assert frame_change(torch.cat([still, still + 51])) == pytest.approx(0.2)

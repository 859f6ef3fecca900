"Priors of a video: bad input is refused with a reason, files come back as they went, sizes stay together, and GFlow's folders run unchanged."
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import camflow.gflow.layout as layout
from camflow.data.stereo_files import write_image
from camflow.files import InputError
from camflow.gflow.bootstrap import bootstrap_depth
from camflow.gflow.find_path import find_path
from camflow.gflow.fit_video import priors_hash
from camflow.gflow.masks import jaccard
from camflow.gflow.priors import Answer, depth_of_disparity, gather_priors, kept_priors, known_depth, read_priors, write_priors
from camflow.gflow.qa import annotations, guarded, judge, rows
from camflow.gflow.subsample import AlignConfig, AlignedScene, core_depth, normalised
from camflow.gflow.truth import truth_clip
from camflow.lab.registry import new_run
from camflow.media.frames import Depth, Flow, Frames


@pytest.fixture(scope="module")
def clip(): return truth_clip("plain", frames=3)


@pytest.fixture(scope="module")
def true(clip): return gather_priors(clip.frames, depth="truth", flow="truth", masks="truth", truth=clip)


@pytest.fixture()
def seq(tmp_path, true):
    write_priors(tmp_path/"ball"/"ball", true)
    return tmp_path/"ball"/"ball"


def foreign(seq):
    "As the original writes it: no note, translations in pixels of the network, no mask of the last frame."
    layout.beside(seq, "priors.json").unlink()
    for path in layout.beside(seq, layout.CAMERA).iterdir():
        fact = json.loads(path.read_text())
        for row in fact["pose"][:3]: row[3] *= 240 / 512
        path.write_text(json.dumps(fact))
    sorted(layout.beside(seq, layout.EPIPOLAR).iterdir())[-1].unlink()
    return seq


def test_what_the_fit_gets(true, clip):
    assert true.flow_forward.dtype == np.float32 and true.flow_forward.shape == true.flow_backward.shape == (2, 2, 136, 240)
    assert true.hidden_forward.dtype == bool and true.hidden_backward.shape == (2, 136, 240) and true.moving.shape == (3, 136, 240)
    assert true.depth.kind == "metric" and true.numbers == [0, 1, 2] and true.names["flow"] == "truth" and true.prompt is None
    assert true.frames.range == "byte" and np.allclose(true.c2w_T44, clip.cameras.c2w.numpy())


def test_mixed_sizes_are_named(seq):
    write_image(seq/"00001.png", torch.zeros(3, 240, 136, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"00001.png has \(240, 136\)"): layout.read_frames(seq)
    with pytest.raises(InputError, match="Frames"): gather_priors([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)])


@pytest.mark.parametrize("kind, name, what", [(layout.DEPTH, "00001.npy", "depth"), (layout.CAMERA, "00002.json", "camera"), (layout.FLOW, "00001_pred_bwd.flo", "flow"),
                                              (layout.EPIPOLAR, "00001_open.png", "mask")])
def test_missing_files_are_named(seq, kind, name, what):
    (layout.beside(seq, kind)/name).unlink()
    with pytest.raises(InputError, match=f"{name} does not exist; {what}"): read_priors(seq)


def test_files_of_another_size_are_named(seq):
    np.save(layout.beside(seq, layout.DEPTH)/"00001.npy", np.ones((240, 136), np.float32))
    with pytest.raises(InputError, match="00001.npy"): read_priors(seq)
    (layout.beside(seq, layout.DEPTH)/"00001.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="00001.npy is no readable"): read_priors(seq)


def test_depth_of_nothing_is_refused(clip):
    for value in (0., float("nan"), float("inf"), -1.):
        data = torch.ones(3, 1, 136, 240)
        data[1] = value
        with pytest.raises(InputError, match="frame 1"): gather_priors(clip.frames, fov=60, depth=Depth(data, "relative"))
    data[1], data[1, 0, :100] = 2., 0.
    kept = gather_priors(clip.frames, fov=60, depth=Depth(data, "relative")).depth.data
    assert kept[1, 0, :100].isnan().all() and (kept[1, 0, 100:] == 2).all()
    with pytest.raises(InputError, match="2 frames for 3"): known_depth(Depth(data[:2], "relative"), clip.frames, "here")
    with pytest.raises(InputError, match="pixels for frames"): known_depth(Depth(data[..., :100], "relative"), clip.frames, "here")


def test_flow_of_another_size_is_refused(clip):
    flow = lambda H, n=2: Flow(torch.zeros(n, 2, H, 240), "forward")
    depth = clip.depth
    with pytest.raises(InputError, match="backward flow of shape"): gather_priors(clip.frames, fov=60, depth=depth, flow=(flow(136), flow(100)))
    with pytest.raises(InputError, match="one entry less"): gather_priors(clip.frames, fov=60, depth=depth, flow=(flow(136, 3), flow(136, 3)))
    with pytest.raises(InputError, match="flow estimator gave"): gather_priors(clip.frames, fov=60, depth=depth, flow=lambda frames, bidirectional: flow(136))
    unknown = torch.zeros(2, 2, 136, 240)
    unknown[:, 0, :50] = torch.nan
    found = gather_priors(clip.frames, fov=60, depth=depth, flow=(Flow(unknown, "forward"), flow(136)))
    assert np.isnan(found.flow_forward[:, :, :50]).all() and found.hidden_forward[:, :50].all() and not found.hidden_forward[:, 60:].any()
    path = find_path(found)
    assert np.isfinite(path.c2w_T44).all() and not np.isnan(path.odds_THW).any()


def test_unknown_names_are_refused_before_the_flow_is_measured(clip, monkeypatch):
    monkeypatch.setattr("camflow.gflow.priors.both_flows", lambda *args: pytest.fail("the flow was measured"))
    for how, word in ((dict(depth="midas"), "depth prior 'midas'"), (dict(masks="sam"), "mask prior 'sam'")):
        with pytest.raises(InputError, match=word): gather_priors(clip.frames, truth=clip, **how)


def test_unknown_names_and_missing_means(clip):
    for how, word in ((dict(depth="midas"), "depth prior 'midas'"), (dict(flow="raft"), "flow estimator 'raft'"), (dict(depth="mono", masks="sam"), "mask prior 'sam'"), (dict(depth="truth"), "needs `truth`"),
                      (dict(depth="files"), "needs `folder`"), (dict(depth="da3"), "needs `weights`"), (dict(depth="mono", masks=np.zeros((3, 9, 9), bool)), "moving mask is"),
                      (dict(depth="mono", K=np.zeros((3, 3))), "intrinsics"), (dict(depth="depth_anything", weights="/nowhere"), "config.json")):
        with pytest.raises(InputError, match=word): gather_priors(clip.frames, **{"fov": 60, **how})
    with pytest.raises(InputError, match="fov"): gather_priors(clip.frames)
    with pytest.raises(InputError, match="the clip that the frames are of"): gather_priors(clip.frames[:2], depth="truth", truth=clip)


def test_one_frame_and_two_identical(clip):
    one = gather_priors(clip.frames[:1], fov=60, masks="rigid")
    assert one.flow_forward.shape == (0, 2, 136, 240) and one.hidden_backward.shape == (0, 136, 240) and not one.moving.any() and "flat" in one.names["note"]
    assert gather_priors(clip.frames[:1], fov=60, masks="epipolar").moving.shape == (1, 136, 240) and judge(one).numbers["known"] == 1
    two = gather_priors(clip.frames[[1, 1]], fov=60, masks="rigid")
    assert np.abs(two.flow_forward).max() < 0.1 and not two.moving.any() and "flat" in two.names["note"]


def test_portrait_stays_upright(tmp_path):
    clip = truth_clip("portrait", frames=2)
    priors = gather_priors(clip.frames, depth="truth", flow="truth", masks="truth", truth=clip)
    write_priors(tmp_path/"p"/"p", priors)
    back = read_priors(tmp_path/"p"/"p")
    assert back.size == (240, 136) and np.array_equal(back.flow_forward, priors.flow_forward) and np.array_equal(back.moving, priors.moving)
    half = back.resize((120, 68))
    assert half.K_33[0, 2] == 34 and half.K_33[1, 2] == 60 and half.flow_forward.shape == (1, 2, 120, 68)
    seen = gather_priors(clip.frames, fov=40, depth="mono")
    assert seen.depth.size == (240, 136) and abs(seen.K_33[0, 0] - 68 / np.tan(np.radians(20))) < 1e-9


def test_folders_of_the_original_run_unchanged(seq, true):
    frames, numbers, _ = layout.read_frames(foreign(seq))
    back = read_priors(seq)
    assert np.array_equal(back.depth.data, true.depth.data) and np.allclose(back.c2w_T44, true.c2w_T44) and back.depth.kind == "relative"
    assert len(back) == 3 and np.array_equal(back.moving[:2], true.moving[:2]) and jaccard(back.moving[2:], true.moving[2:]) > 0.85
    assert np.array_equal(back.hidden_backward, true.hidden_backward) and np.allclose(back.K_33, true.K_33)
    with pytest.raises(InputError, match="made by others"): write_priors(seq, true)
    shutil.rmtree(layout.beside(seq, layout.CAMERA))
    with pytest.raises(InputError, match="fov"): read_priors(seq)
    assert read_priors(seq, fov=60).c2w_T44 is None


def test_shrunk_frames_take_everything_with_them(seq, true):
    small, numbers, size = layout.read_frames(seq, short=68)
    back = read_priors(seq, small, numbers)
    assert size == (136, 240) and back.size == (68, 120) == back.depth.size and np.allclose(back.K_33[:2], true.K_33[:2] / 2)
    assert abs(np.median(back.flow_forward[:, 0]) / np.median(true.flow_forward[:, 0]) - 0.5) < 0.02
    assert find_path(back).residual < 0.3   # depth, lens and flow still agree


def test_some_frames_of_a_sequence(seq):
    frames, numbers, _ = layout.read_frames(seq, first=1)
    assert read_priors(seq, frames, numbers).numbers == [1, 2]
    frames, numbers, _ = layout.read_frames(seq, every=2)
    with pytest.raises(InputError, match="each frame to the next"): read_priors(seq, frames, numbers)
    assert read_priors(seq, frames, numbers, flow="dis").flow_forward.shape[0] == 1
    with pytest.raises(InputError, match="from number 7 on"): layout.read_frames(seq, first=7)


@pytest.mark.parametrize("which", [dict(first=-2), dict(every=0), dict(count=-1)])
def test_frames_that_cannot_be_counted_are_refused(seq, which):
    with pytest.raises(InputError, match=f"{next(iter(which))}={next(iter(which.values()))}"): layout.read_frames(seq, **which)


def test_a_users_mask_is_found(seq, true):
    drawn = torch.zeros(1, 136, 240, dtype=torch.bool)
    drawn[:, 20:50] = True
    layout.write_mask(layout.beside(seq, layout.MASK)/"00000.png", drawn)
    frames, numbers, _ = layout.read_frames(seq, short=68)
    assert np.array_equal(read_priors(seq, frames, numbers).prompt, drawn[0].numpy()[::2, ::2])
    mask, at = layout.read_prompt(seq, [0, 2])
    assert at == 0 and np.array_equal(mask, drawn[0].numpy()) and layout.read_prompt(seq, [1, 2]) is None and read_priors(seq, *layout.read_frames(seq, first=1)[:2]).prompt is None
    layout.beside(seq, layout.MASK).joinpath("00000.png").rename(seq.with_name("00002.png"))   # a mask of the last frame, elsewhere
    assert layout.read_prompt(seq) is None and layout.read_prompt(seq, [0, 2], seq.with_name("00002.png"))[1] == 1
    with pytest.raises(InputError, match="marks frame 2, which is not taken"): layout.read_prompt(seq, [0, 1], seq.with_name("00002.png"))
    with pytest.raises(InputError, match="does not exist; the user's mask"): layout.read_prompt(seq, None, seq.with_name("none.png"))


def test_a_users_mask_with_a_palette_and_an_empty_one(tmp_path):
    indexed = Image.new("P", (30, 20))
    indexed.putpalette([0, 0, 0, 128, 0, 0])   # DAVIS' dark red is darker than half
    indexed.paste(1, (5, 5, 15, 12))
    indexed.save(tmp_path/"davis.png")
    assert layout.user_mask(tmp_path/"davis.png", (20, 30)).sum() == 70
    Image.new("L", (30, 20)).save(tmp_path/"black.png")
    with pytest.raises(InputError, match="marks nothing"): layout.user_mask(tmp_path/"black.png", (20, 30))
    with pytest.raises(InputError, match=r"\(20, 30\) pixels"): layout.user_mask(tmp_path/"davis.png", (30, 20))


def test_kept_ones_are_found_and_others_made_anew(tmp_path, clip):
    home, how = tmp_path/"ball"/"ball", dict(fov=53, depth="mono", flow="dis")
    first = kept_priors(home, clip.frames, **how)
    stamp = (layout.beside(home, "priors.json")).stat().st_mtime_ns
    again = kept_priors(home, clip.frames, **how)
    assert layout.beside(home, "priors.json").stat().st_mtime_ns == stamp and np.array_equal(first.depth.data, again.depth.data) and again.moving is None and again.c2w_T44 is None
    assert again.names == first.names
    poses = [priors_hash(kept_priors(tmp_path/"moved"/"moved", clip.frames, fov=53)) for _ in range(2)]
    assert poses[0] == poses[1]   # poses are written as their inverse: what comes back must be what the first call gave, or a killed fit is refused
    other = kept_priors(home, clip.frames, **{**how, "flow": "dis-fast"})
    assert layout.beside(home, "priors.json").stat().st_mtime_ns != stamp and not np.array_equal(other.flow_forward, first.flow_forward)
    note = json.loads(layout.beside(home, "priors.json").read_text())
    layout.beside(home, "priors.json").unlink()          # killed while writing: the note is missing, what lies there is ours
    layout.write_json(layout.beside(home, "priors.json.part"), {"key": note["key"]})
    assert np.array_equal(kept_priors(home, clip.frames, **how).depth.data, first.depth.data)


def test_a_folder_that_cannot_be_made_is_told(tmp_path, true):
    (tmp_path/"file").write_text("no folder")
    with pytest.raises(InputError, match="cannot be made"): write_priors(tmp_path/"file"/"ball"/"ball", true)
    with pytest.raises(InputError, match="CAMFLOW_REPORTS"): new_run("gflow_fit", root=tmp_path/"file"/"reports")


def test_davis_is_organised_once(tmp_path, clip):
    for name in ("bear", "cat"): layout.write_frames(tmp_path/"DAVIS"/"JPEGImages"/"480p"/name, clip.frames)
    assert layout.organise_davis(tmp_path/"DAVIS", tmp_path/"sets", ["bear"]) == {"bear": "linked"}
    (tmp_path/"sets"/"cat"/".cat.part").mkdir(parents=True)   # a kill while linking
    assert layout.organise_davis(tmp_path/"DAVIS", tmp_path/"sets") == {"bear": "there", "cat": "linked"}
    assert [s.name for s in layout.sequences(tmp_path/"sets")] == ["bear", "cat"] and len(layout.frame_files(tmp_path/"sets"/"cat")) == 3
    with pytest.raises(InputError, match="dog"): layout.organise_davis(tmp_path/"DAVIS", tmp_path/"sets", ["dog"])
    (tmp_path/"file").write_text("")   # where a folder cannot be
    with pytest.raises(InputError, match="file.* cannot be written .*organise_davis; give a target"): layout.organise_davis(tmp_path/"DAVIS", tmp_path/"file"/"sets", ["bear"])


def test_networks_that_know_nothing_still_fit(clip):
    for name in ("depth_anything", "da3"):
        options = {"side": 56} if name == "depth_anything" else {"process_res": 56}
        found = gather_priors(clip.frames, fov=53, depth=name, weights="random", options=options)
        assert found.depth.size == (136, 240) and bool((found.depth.data > 0).all()) and found.names["note"] == "untrained"
    whole, parts = (gather_priors(clip.frames, fov=53, depth="da3", weights="random", options={"process_res": 56, "views": views}) for views in (24, 2))
    assert len(whole.depth) == len(parts.depth) == 3


def test_depth_anything_from_a_folder(tmp_path, clip):
    from camflow.gflow.priors import random_depth_anything
    random_depth_anything().save_pretrained(tmp_path/"tiny")
    found = [gather_priors(clip.frames, fov=53, depth="depth_anything", weights=w, options={"side": 56}).depth.data for w in ("random", str(tmp_path/"tiny"))]
    assert torch.allclose(*found)


def test_an_estimator_of_ones_own(clip):
    mine = lambda ask: Answer(Depth(torch.full((len(ask.frames), 1, *ask.frames.size), 2.), "metric"), np.diag([200., 200., 1.]))
    found = gather_priors(clip.frames, depth=mine)
    assert found.K_33[0, 0] == 200 and found.names["lens"] == "depth prior" and found.depth.kind == "metric"


def test_disparity_is_near_where_large():
    depth = depth_of_disparity(Depth(torch.tensor([1., 2., 3., 5.]).view(1, 1, 2, 2), "disparity"), ratio=10.)
    values = depth.data.flatten()
    assert depth.kind == "relative" and (values.diff() < 0).all() and 0.9 < values[-1] < 1.1 and 9 < values[0] < 11


def test_bootstrap_sees_depth_and_says_when_it_cannot(clip):
    longer = truth_clip("plain", frames=6)
    found = gather_priors(longer.frames, K=longer.cameras.K[0].numpy())
    z, d, rest = longer.depth.data[:, 0].numpy(), found.depth.data[:, 0].numpy(), ~longer.moving.numpy()
    error = lambda maps: np.mean([np.abs(np.median(a[r] / b[r]) * b[r] / a[r] - 1).mean() for a, b, r in zip(z, maps, rest)])
    assert error(d) < 0.08 and error(d) < 0.75 * error(np.ones_like(z)) and found.depth.kind == "relative" and abs(np.median(d) - 1) < 1e-3
    small = gather_priors(longer.frames, K=longer.cameras.K[0].numpy(), options={"short": 100}).depth
    assert small.size == (136, 240) and error(small.data[:, 0].numpy()) < 0.1
    turn = truth_clip("turn", frames=4)
    p = gather_priors(turn.frames, K=turn.cameras.K[0].numpy())
    assert p.names["note"].startswith("flat")
    nothing = bootstrap_depth(Frames(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "byte"), np.diag([60., 60, 1]), *np.zeros((2, 1, 2, 64, 64)), *np.zeros((2, 1, 64, 64), bool))
    assert nothing[2].startswith("flat")


def test_verdicts_of_bad_and_missing(tmp_path, true, clip):
    good = judge(true, "good", truth=clip.moving.numpy())
    assert good.suspicion < 1 and not good.reasons and good.numbers["J"] == 1
    bad = guarded("gone", lambda: judge(read_priors(tmp_path/"gone"), "gone"))
    assert bad.status == "failed" and "gone does not exist" in bad.reasons[0] and rows([good, bad])[0][1] == "failed"
    with pytest.raises(InputError, match="00000.png does not exist; annotations"): annotations(tmp_path, ["00000"], (136, 240))


@pytest.mark.parametrize("aligned, read", [(2, 8), (4, 8), (2, 4)])
def test_two_owners_of_subsample_break_the_assertion_and_one_does_not(aligned, read):
    rng = np.random.default_rng(1)
    depth = 3 + rng.normal(size=(96, 128)).cumsum(1) * 0.2
    ratio, _ = normalised(depth, aligned)
    assert (core_depth(ratio, aligned) == 1).all() and np.abs(core_depth(ratio, read) - 1).max() > 0.1
    scene = AlignedScene.of([depth], AlignConfig(aligned))
    found, good = scene.depth(0)
    assert good.mean() > 0.5 and np.array_equal(good, found > 0) and np.isnan(found[~good]).all()
    wrong = AlignedScene(AlignConfig(read), [normalised(depth, read)[0]], scene.factors)
    with pytest.raises(InputError, match="another subsample"): wrong.depth(0)


def test_priors_of_some_frames_only_are_named(tmp_path):
    "gflow_priors takes 12 frames unless told otherwise; a fit of all frames says so instead of 'run gflow_priors' alone."
    seq = tmp_path/"bear/bear"
    layout.write_frames(seq, Frames(torch.zeros(3, 3, 16, 24, dtype=torch.uint8), "byte"))
    with pytest.raises(InputError, match="00000.npy does not exist; depth of bear"): layout.read_depth(seq)
    layout.write_folders(seq, ["00000", "00001"], np.ones((2, 16, 24), np.float32))
    with pytest.raises(InputError, match="00002.npy does not exist; depth of bear, 2 .npy files lie in the folder; run gflow_priors .with count=0 for all frames"): layout.read_depth(seq)

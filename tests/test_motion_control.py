"Point tracks and motion control: bad tracks, files, maps, arms, asked paths, verdicts; ControlNets of depth and tracks; each clip's own frame rate."
import json

import numpy as np
import pytest
import torch

from camflow.device import generator
from camflow.files import InputError
from camflow.joint import controlnet_train as ct, motion_control as mc, svd_train, train
from camflow.joint.codecs import FlowCodec
from camflow.joint.controlnet_svd import ControlNetSpatioTemporal
from camflow.joint.data import Source, depth_estimator, shape_items, with_depth, world_items
from camflow.joint.motion_arms import AGAINST, ARMS, Rig, guided, make_videos, track_latents
from camflow.joint.shapes import shape_clip
from camflow.joint.tracks import Tracks, draw_starts, follow, read_tracks, sparse_flow, track_maps, write_tracks
from camflow.media.frames import Depth, Flow, Frames
from camflow.metrics.statistics import Interval

MID = dict(norm_groups=8, down_block_types=["DownBlockSpatioTemporal"], up_block_types=["UpBlockSpatioTemporal"])
TINY = dict(unet=MID, size=[8, 8], frames=3, batch_size=2, items=4, held_out=2, sample_steps=1, warmup=0)


def tracks(n=2, frames=3, size=(8, 8), step=1.0):
    start = torch.tensor([[1.5 + i, 2.5] for i in range(n)])
    return Tracks(start[:, None] + torch.arange(frames)[None, :, None] * torch.tensor([step, 0.5]), torch.ones(n, frames, dtype=torch.bool), size)


@pytest.mark.parametrize("points, visible, size, match", [
    (torch.full((1, 3, 2), 20.0), torch.ones(1, 3, dtype=torch.bool), (8, 8), "lies outside the 8 x 8 picture"),
    (torch.full((1, 3, 2), -0.1), torch.ones(1, 3, dtype=torch.bool), (8, 8), "lies outside"),
    (torch.full((1, 3, 2), 8.0), torch.ones(1, 3, dtype=torch.bool), (8, 8), "lies outside"),           # the right edge itself
    (torch.full((1, 3, 2), float("nan")), torch.ones(1, 3, dtype=torch.bool), (8, 8), "no finite place"),
    (torch.full((1, 3, 2), float("inf")), torch.ones(1, 3, dtype=torch.bool), (8, 8), "no finite place"),
    (torch.zeros(0, 3, 2), torch.zeros(0, 3, dtype=torch.bool), (8, 8), "no point"),
    (torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool), (8, 8), "visible in any frame"),
    (torch.ones(1, 3, 2), torch.ones(1, 2, dtype=torch.bool), (8, 8), "visible"),
    (torch.ones(1, 3, 2).long(), torch.ones(1, 3, dtype=torch.bool), (8, 8), "floating-point"),
    (torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), (0, 8), "rows, columns"),
])
def test_bad_tracks(points, visible, size, match):
    with pytest.raises(InputError, match=match): Tracks(points, visible, size)


def test_error_names_point_and_frame():
    points = tracks(3).points.clone()
    points[2, 1, 0] = torch.nan
    with pytest.raises(InputError, match="point 2 is visible but has no finite place in frame 1"): Tracks(points, torch.ones(3, 3, dtype=torch.bool), (8, 8))


def test_hidden_places_may_be_anything():
    points = tracks().points.clone()
    points[0, 2] = torch.nan
    one = Tracks(points, torch.tensor([[True, True, False], [True] * 3]), (8, 8))
    flow, known = sparse_flow(one)
    assert known.flatten(1).sum(1).tolist() == [2, 1] and torch.isfinite(flow.data[known.expand(-1, 2, -1, -1)]).all()
    assert torch.isfinite(track_maps(one).data).all()


@pytest.mark.parametrize("frames, size, match", [(4, (8, 8), "tracks of 3 frames for a video of 4"), (1, (8, 8), "one frame"), (3, (8, 16), "another shape of picture")])
def test_tracks_of_another_video(frames, size, match):
    with pytest.raises(InputError, match=match): tracks().fit(frames, size)


def test_tracks_move_with_the_picture():
    big = tracks().fit(3, (16, 16))
    assert big.size == (16, 16) and torch.equal(big.steps()[0], 2 * tracks().steps()[0])


def test_one_frame_has_no_steps():
    still = Tracks(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool), (8, 8))
    for use in (still.steps, lambda: sparse_flow(still), lambda: track_maps(still)):
        with pytest.raises(InputError, match="one frame"): use()


@pytest.mark.parametrize("content, match", [
    ({"size": [8, 8]}, "no points"), ({"points": [[[1, 1]]]}, "no size"), ([1], "holds a list"),
    ({"size": [8, 8], "points": [[[1, 1], [2, 2]], [[1, 1]]]}, "holds no tracks"),       # tracks of two lengths
    ({"size": [8, 8], "points": [[[1, 1, 1]]]}, "floating-point \\[N,T,2\\]"), ({"size": [8, 8], "points": [[[9, 1]]]}, "outside"),
    ({"size": [8, 8], "points": []}, "N,T,2"), ({"size": [8, 8], "points": 3}, "holds no tracks"), ({"size": [8, 8], "points": [[["a", 1]]]}, "holds no tracks")])
def test_bad_files(tmp_path, content, match):
    path = tmp_path/"mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=match) as error: read_tracks(path)
    assert "mine.json" in str(error.value)


def test_files_round_trip_and_refusals(tmp_path):
    points = tracks().points.clone()
    points[1, 2] = torch.nan
    one = Tracks(points, torch.tensor([[True] * 3, [True, True, False]]), (8, 8))
    for name in ("a.json", "a.npz"):
        write_tracks(one, tmp_path/name)
        again = read_tracks(tmp_path/name)
        assert torch.equal(again.visible, one.visible) and torch.equal(again.points[again.visible], one.points[one.visible]) and again.size == (8, 8)
    record = json.loads((tmp_path/"a.json").read_text())
    assert record["points"][1][2] is None
    del record["visible"]
    (tmp_path/"b.json").write_text(json.dumps(record))
    assert torch.equal(read_tracks(tmp_path/"b.json").visible, one.visible)     # null says it
    np.savez(tmp_path/"c.npz", points=np.array([object()]), size=[8, 8])
    for name, match in (("c.npz", "plain arrays"), ("none.json", "does not exist"), ("a.csv", "does not exist")):
        with pytest.raises(InputError, match=match): read_tracks(tmp_path/name)
    (tmp_path/"a.csv").write_text("")
    with pytest.raises(InputError, match="neither .json nor .npz"): read_tracks(tmp_path/"a.csv")
    with pytest.raises(InputError, match="neither .json nor .npz"): write_tracks(one, tmp_path/"a.txt")


def test_sparse_flow_is_the_displacement_at_the_point():
    flow, known = sparse_flow(tracks(1))
    assert known[0, 0].nonzero().tolist() == [[2, 1]] and known[1, 0].nonzero().tolist() == [[3, 2]]
    assert flow.data[0, :, 2, 1].tolist() == [1.0, 0.5] and torch.isnan(flow.data[~known.expand(-1, 2, -1, -1)]).all()
    wide, more = sparse_flow(tracks(1), radius=1.2)
    assert int(more[0].sum()) == 5 and torch.equal(wide.data[0, :, 3, 1], flow.data[0, :, 2, 1])


def test_nearest_point_wins():
    points = torch.tensor([[[2.5, 4.5], [3.5, 4.5]], [[6.5, 4.5], [6.5, 3.5]]])
    flow, known = sparse_flow(Tracks(points, torch.ones(2, 2, dtype=torch.bool), (8, 9)), radius=3)
    assert known[0, 0, 4, 2:7].all() and flow.data[0, 0, 4, 3] == 1 and flow.data[0, 0, 4, 6] == 0 and flow.data[0, 1, 4, 6] == -1


def test_maps_say_displacement_and_presence():
    maps = track_maps(tracks(1), sigma=1.0, share=0.25).data
    scale = 0.25 * float(np.hypot(8, 8))
    assert maps[0, :, 2, 1].tolist() == pytest.approx([1 / scale, 0.5 / scale, 1.0]) and torch.equal(maps[1], maps[2])
    assert float(maps[0, 2, 7, 7]) == pytest.approx(-1, abs=1e-3) and float(maps[0, :2, 7, 7].abs().max()) < 1e-3
    double = tracks(1)
    twin = Tracks(double.points.repeat(2, 1, 1), double.visible.repeat(2, 1), (8, 8))      # the same track twice is no faster
    assert torch.allclose(track_maps(twin, 1.0, 0.25).data[0, :, 2, 1], maps[0, :, 2, 1])
    with pytest.raises(InputError, match="positive"): track_maps(tracks(), sigma=0)


def test_follow_stops_at_the_edge_and_at_the_unknown():
    flow = Flow(torch.tensor([3.0, 0.0])[None, :, None, None].repeat(3, 1, 8, 8), "forward")
    path = follow(flow, torch.tensor([[1.5, 4.5], [3.5, 4.5]]))
    assert path.visible.tolist() == [[True, True, True, False], [True, True, False, False]]
    holes = flow.data.clone()
    holes[1, :, 4, 4] = torch.nan
    assert follow(Flow(holes, "forward"), torch.tensor([[1.5, 4.5]]), nearest=True).visible.tolist() == [[True, True, False, False]]
    with pytest.raises(InputError, match="backward"): follow(Flow(flow.data, "backward"), torch.ones(1, 2))


def test_starts_lie_where_it_moves():
    clip = shape_clip(3, frames=3)
    starts = draw_starts(clip.flow, generator(0, "t"), moving=20, anywhere=0).long()
    assert (clip.flow.data[0].norm(dim=0)[starts[:, 1], starts[:, 0]] > 0).all()
    still = Flow(torch.zeros(2, 2, 8, 8), "forward")
    assert len(draw_starts(still, generator(0, "t"), 2, 1)) == 3
    with pytest.raises(InputError, match="at least 1"): draw_starts(still, generator(0, "t"), 0, 0)


# arms

@pytest.fixture(scope="module")
def rig():
    config = train.configuration(dict(TINY, family="svd", rank=2, flow_share=0.2, flow_kind="uvm"), train.DEFAULTS)
    unet, adapter, frozen = train.build(config)
    plain = train.build(config | dict(mode="base"))[0]
    with torch.no_grad():
        for name, p in adapter.parameters_by_name().items(): p.add_(0.1 * torch.randn(p.shape, generator=generator(0, name)))
    branch = ControlNetSpatioTemporal.from_unet(plain, 1)
    for part in (unet, plain, branch): part.requires_grad_(False).eval()
    return Rig(unet, adapter, plain, branch, frozen, train.codecs_of(config), config | dict(radius=1.0, strength=1.0, sigma=1.0, map_share=0.2, sample_steps=3))


def pictures(n=2): return torch.stack([shape_clip(i, (8, 8)).frames.signed().data[0] for i in range(n)])


def test_replacement_keeps_what_was_asked(rig):
    asked = [tracks(1), tracks(2, step=0.5)]
    _, flow = make_videos(rig, "replacement", pictures(), asked)
    _, known, coded, pixels = track_latents(asked, rig.codecs["flow"], rig.frozen, 1.0)
    assert torch.allclose(flow * pixels.cpu(), coded.cpu() * pixels.cpu(), atol=0.02) and 0 < pixels.float().mean() < 0.5
    free = make_videos(rig, "free", pictures(), asked)[1]
    assert not torch.allclose(free * pixels.cpu(), coded.cpu() * pixels.cpu(), atol=0.1)


def test_without_strength_guidance_is_free(rig):
    asked = [tracks(1), tracks(2)]
    off = make_videos(rig._replace(config=rig.config | dict(strength=0.0)), "guidance", pictures(), asked)[0]
    assert torch.allclose(off, make_videos(rig, "free", pictures(), asked)[0], atol=1e-4)


def test_guidance_brings_the_flow_nearer(rig):
    asked = [tracks(1), tracks(2)]
    _, _, coded, pixels = track_latents(asked, rig.codecs["flow"], rig.frozen, 1.0)
    miss = {arm: float(((make_videos(rig, arm, pictures(), asked)[1] - coded.cpu()) * pixels.cpu()).norm()) for arm in ("free", "guidance")}
    assert miss["guidance"] < 0.8 * miss["free"]


def test_guidance_step_is_never_longer_than_the_error():
    rows = torch.randn(4, 2, 3, 4, 4, generator=generator(0)) # a network whose prediction jumps
    times = torch.full((4,), 0.25 * float(np.log(700.0)))
    frozen = type("Frozen", (), {"vae": type("Vae", (), {"identity": True})()})()
    wild = lambda x, t, guided, joint: (None, 1e4 * x)
    target, known = torch.zeros(2, 2, 3, 4, 4), torch.ones(2, 2, 1, 4, 4)
    out = guided(wild, frozen, target, known, 1.0)(rows, times, False)[1]
    change = ((out - 1e4 * rows) * -700 / (1 + 700**2) ** 0.5).unflatten(0, (2, -1)).square().sum((0, 2, 3, 4, 5)).sqrt()  # of the clean latents
    clean = -1e4 * rows * 700 / (1 + 700**2) ** 0.5 + rows / (1 + 700**2) ** 0.5
    assert (change <= clean[2:].flatten(1).norm(dim=1) * 1.01).all() and (change > 0).all()


def test_branch_off_is_the_base(rig):
    asked = [tracks(1), tracks(2)]
    off = make_videos(rig, "branch_off", pictures(), asked)[0]
    assert torch.equal(off, make_videos(rig, "branch", pictures(), asked)[0])   # zero convolutions: an untrained branch does nothing
    moved = rig.branch.controlnet_mid_block.weight
    moved.data.normal_(generator=generator(1))
    try: assert not torch.equal(off, make_videos(rig, "branch", pictures(), asked)[0]) and torch.equal(off, make_videos(rig, "branch_off", pictures(), asked)[0])
    finally: moved.data.zero_()


def test_arms_refuse(rig):
    with pytest.raises(InputError, match="one of"): make_videos(rig, "drag", pictures(), [tracks()] * 2)
    with pytest.raises(InputError, match="1 tracks for 2 pictures"): make_videos(rig, "free", pictures(), [tracks()])
    with pytest.raises(InputError, match="clip 1: tracks of 4 frames"): make_videos(rig, "free", pictures(), [tracks(), tracks(frames=4)])
    with pytest.raises(InputError, match="clip 0: tracks of 8 x 9"): make_videos(rig, "branch", pictures(), [Tracks(tracks().points, tracks().visible, (8, 9)), tracks()])
    with pytest.raises(InputError, match="are of type Tensor"): make_videos(rig, "free", pictures(), [tracks().points] * 2)
    with pytest.raises(InputError, match="no dense flow"): make_videos(rig, "dense", pictures(), [tracks()] * 2)
    assert set(AGAINST) | set(AGAINST.values()) == set(ARMS)


# asked paths, errors, verdicts

def test_measure_reads_zero_on_the_truth_and_the_shift_on_a_shift():
    clips = [shape_clip(i, (16, 16), frames=4, fast=2.0) for i in range(8)]
    video, paths = torch.stack([c.frames.signed().data for c in clips]), torch.stack([mc.object_path(c.flow) for c in clips])
    truth = mc.path_errors(video, video[:, 0], paths)
    assert torch.isfinite(truth).all() and truth.mean() < 0.25
    asked = paths + torch.tensor([3.0, 4.0]) * (torch.arange(4) > 0)[:, None]
    assert mc.path_errors(video, video[:, 0], asked).mean() == pytest.approx(5.0, abs=0.3)


def test_lost_object_is_missing():
    clip = shape_clip(0, (16, 16), frames=3)
    video = clip.frames.signed().data[None].clone()
    video[0, 2] = video[0, 0, :, :1, :1]       # only the wall
    assert torch.isnan(mc.path_errors(video, video[:, 0], torch.zeros(1, 3, 2))).all()
    row = mc.compare({"free": torch.tensor([1.0, float("nan")]), "guidance": torch.tensor([0.5, 0.5])}, torch.ones(2))[1]
    assert row["missing"] == 0 and row["gain"].missing == 1


def test_nobody_to_lend():
    "A clip whose only neighbour has its own motion has no foreign question."
    paths = torch.zeros(2, 3, 2)
    assert mc.lenders(paths, torch.full((2, 2), 8.0), (16, 16)) == [None, None]
    paths[1, 1:] = torch.tensor([2.0, 0.0])
    assert mc.lenders(paths, torch.full((2, 2), 8.0), (16, 16)) == [1, 0]
    assert mc.lenders(paths, torch.full((2, 2), 13.0), (16, 16)) == [None, 0]     # it would leave the picture


def test_other_tracks_move_only_what_moves():
    clip = shape_clip(2, (16, 16), frames=3)
    own = mc.own_tracks(clip.flow, generator(0, "t"), 3, 5)
    away = mc.other_tracks(own, clip.flow, torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    moved = (away.points[:, -1] - away.points[:, 0])
    on = mc.moving_pixels(clip.flow)[0][own.points[:, 0, 1].long(), own.points[:, 0, 0].long()]
    assert on[:3].all() and torch.allclose(moved[on], torch.tensor([2.0, 0.0]).expand(int(on.sum()), 2)) and (moved[~on] == 0).all()


@pytest.mark.parametrize("gain, over, verdict", [((0.1, 1), (0.1, 1), "follows"), ((0.1, 1), (-1, 1), "is nudged"), ((-1, -0.1), (-1, 1), "is harmed"), ((-1, 1), (0.1, 1), "shows no effect")])
def test_verdict_is_read_off_the_intervals(gain, over, verdict): assert mc.judged(Interval(0, *gain, n=5), Interval(0, *over, n=5)) == verdict


def test_nothing_measured_is_no_verdict(): assert mc.compare({"free": torch.full((3,), torch.nan), "guidance": torch.full((3,), torch.nan)}, torch.ones(3))[1]["verdict"] == "unmeasured"


@pytest.mark.parametrize("changes, match", [(dict(base="a", joint="b"), "give one of them"), (dict(frames=1), "frames"), (dict(joint="nowhere"), "does not exist"), (dict(held_out=1), "held_out")])
def test_run_refuses_early(changes, match):
    with pytest.raises(InputError, match=match): mc.checked(mc.DEFAULTS | changes)


def test_joint_that_sees_no_first_frame_is_refused(tmp_path):
    from camflow.files import write_json
    for told, match in ((dict(family="sd"), "family sd"), (dict(family="svd", condition="none"), "does not see a first frame"), (dict(family="svd", size=[12, 12], frames=4), "trained with other values")):
        write_json(tmp_path/"joint.json", told)
        with pytest.raises(InputError, match=match): mc.checked(mc.DEFAULTS | dict(joint=str(tmp_path)))


# ControlNets of depth and tracks, frame rates

@pytest.mark.parametrize("control", ["depth", "tracks"])
def test_controlnet_trains_and_exports(control, tmp_path):
    config = dict(TINY, family="svd", control=control, steps=1, schedule="constant")
    done = ct.main(config | dict(export=str(tmp_path/"out"), validate_every=1), tmp_path/"run")
    told = json.loads((tmp_path/"out"/"condition.json").read_text())
    assert told["control"] == control and ControlNetSpatioTemporal.from_pretrained(tmp_path/"out").config.conditioning_kind == control and done.step == 1
    assert np.isfinite(done.metrics["agreement"]) or control == "tracks"     # an untrained video may show no shape
    assert ("track_sigma" in told) == (control == "tracks")


def test_tracks_shown_follow_the_flow():
    config = ct.configuration(dict(TINY, family="svd", control="tracks", flow_share=0.2, track_points=[2, 0]), ct.DEFAULTS)
    codecs, clips = ct.codecs_of(config), [shape_clip(i, (8, 8), frames=3) for i in range(2)]
    coded = torch.stack([codecs["flow"].encode(c.flow).data for c in clips])
    maps = ct.steering_pictures(config, codecs, coded, generator(0, "t"))
    for clip, picture in zip(clips, maps):
        at = picture[0, 2].flatten().argmax()
        wanted = clip.flow.data[0].flatten(1)[:, clip.flow.data[0].norm(dim=0).argmax()] / FlowCodec("uv0", 0.2).scale((8, 8))
        assert torch.allclose(picture[0, :2].flatten(1)[:, at], wanted, atol=0.02)
    assert torch.equal(ct.steering_pictures(config | dict(control="flow"), codecs, coded, generator(0, "t")), coded)


@pytest.mark.parametrize("changes, match", [(dict(family="sd", control="tracks"), "sd is steered by depth"), (dict(family="svd", control="edges"), "steered"), (dict(family="svd", control="tracks", track_points=[0, 0]), "at least one"),
                                            (dict(family="svd", control="tracks", track_sigma=0), "positive"), (dict(family="svd", fps=0.5), "at least 1")])
def test_controlnet_refuses(changes, match):
    with pytest.raises(InputError, match=match): ct.checked(ct.DEFAULTS | changes)


def test_depth_of_drawn_videos():
    item = shape_items([0], (8, 8), 3)[0]
    assert isinstance(item["depth"], Depth) and len(item["depth"]) == len(item["video"]) and item["depth"].size == item["video"].size
    with pytest.raises(InputError, match="folder of a Depth Anything 3"): depth_estimator(None)


@pytest.mark.slow
def test_depth_of_rendered_and_of_any_videos():
    item = world_items([0], (16, 16), 2)[0]
    assert len(item["depth"]) == len(item["video"]) == 2 and item["depth"].kind == "metric"
    seen = with_depth(shape_items([0], (28, 28), 3), depth_estimator("random", 28))[0]
    assert len(seen["depth"]) == 3 and seen["depth"].size == (28, 28) and torch.isfinite(seen["depth"].data).all()


def rated(rates): # clips with these frame rates
    def read(i): return dict(shape_items([i], (8, 8), 3)[0], fps=rates[i], id=f"clip {i}")
    return Source(list(range(len(rates))), read)


def test_each_clip_is_told_at_its_own_rate():
    config = svd_train.configuration(dict(TINY, fps=None), svd_train.DEFAULTS)
    clips = svd_train.Clips(rated([6.0, 30.0]), svd_train.joint_config(config) | dict(fps=None), train.codecs_of(svd_train.joint_config(config)))
    video, flow = clips.batch([0, 1])[0].chunk(2)
    rates = clips.rates([0, 1])
    _, frozen, _ = svd_train.build(config)
    ids = svd_train.svd_conditions(frozen, video, torch.full((2,), 127.0), config, fps_B=rates)[2]
    assert ids[:, 0].tolist() == [5.0, 29.0] and set(clips.rates([0, 1], (8, 8)).tolist()) == {6.0, 30.0}
    slow, fast = svd_train.clip_speeds(train.codecs_of(svd_train.joint_config(config))["flow"], flow[:1].repeat(2, 1, 1, 1, 1), rates)
    assert fast == pytest.approx(5 * slow)      # the same pixels per frame, five times the frames
    with pytest.raises(InputError, match="no frame rate"): svd_train.svd_conditions(frozen, video, torch.full((2,), 127.0), config)


def test_unknown_rate_is_an_error_with_the_clip():
    config = svd_train.joint_config(svd_train.DEFAULTS | TINY) | dict(fps=None)
    clips = svd_train.Clips(rated([6.0, None]), config, train.codecs_of(config))
    with pytest.raises(InputError, match="item 1 of the data has no frame rate"): clips.rates([0, 1])
    assert svd_train.Clips(rated([6.0, None]), config | dict(fps=9.0), train.codecs_of(config)).rates([0, 1]).tolist() == [9.0, 9.0]


def test_training_at_own_rates(tmp_path):
    done = svd_train.main(dict(TINY, fps=None, steps=1, motion_bucket="quantile", motion_clips=4, trained="full", schedule="constant"), tmp_path)
    assert done.step == 1 and np.isfinite(done.metrics["held_loss"])


def test_flow_measure_follows_a_drifting_texture():
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 24, generator=generator(0, "texture")), scale_factor=4, mode="bicubic").clamp(0, 1)[0]
    video = torch.stack([noise[:, 20:68, 20 - 2 * t:68 - 2 * t] for t in range(3)])[None] * 2 - 1     # drifts right, two pixels per frame
    from camflow.flow.estimators import load_flow
    start = torch.tensor([[20.5, 24.5]])
    path = lambda v: Tracks((start[:, None] + torch.arange(3)[None, :, None] * torch.tensor([v, 0.0])), torch.ones(1, 3, dtype=torch.bool), (48, 48))
    right, wrong = (float(mc.track_errors(video, [path(v)], load_flow("dis"))) for v in (2.0, -2.0))
    assert right < 0.6 and wrong == pytest.approx(6.0, abs=0.7)
    late = Tracks(path(2.0).points, torch.tensor([[False, True, True]]), (48, 48))                    # drawn from the second frame on
    assert mc.track_errors(video.repeat(2, 1, 1, 1, 1), [late, path(2.0)], load_flow("dis")).isnan().tolist() == [True, False]
    assert Frames(video[0], "signed").size == (48, 48)


def test_controlnet_has_the_groups_of_its_network(tmp_path):
    "A copy with other groups would not be the copy."
    from camflow.joint.models import tiny_svd
    unet = tiny_svd(**MID)["unet"]
    controlnet = ControlNetSpatioTemporal.from_unet(unet, 1)
    controlnet.save_pretrained(tmp_path)
    for one in (controlnet, ControlNetSpatioTemporal.from_pretrained(tmp_path)):
        assert {m.num_groups for m in one.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    assert {m.num_groups for m in ControlNetSpatioTemporal.from_unet(tiny_svd()["unet"], 1).modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


# sets of files

def clip_folder(folder, count):
    from camflow.media.video import write_video
    for i in range(count): write_video(folder/f"{i}.mp4", shape_clip(i, (16, 16), frames=3).frames.byte())
    return dict(data="videos", folder=str(folder))


def test_clips_of_files_that_are_asked_are_trained_on_by_nobody(tmp_path):
    "They were, by all three stages."
    config = mc.checked(mc.DEFAULTS | TINY | clip_folder(tmp_path, 8) | dict(size=[16, 16], held_out=5))
    full = mc.joint_config(config)
    asked = {item["id"] for item in train.open_items(full | dict(held_out=mc.asked_count(config)), True)}
    assert asked == {"6.mp4", "7.mp4"}                       # a quarter of eight, not five
    for name, stage in mc.stages(config).items():
        open_items, defaults = (ct.open_items, ct.DEFAULTS) if name == "branch" else (train.open_items, train.DEFAULTS)
        seen = {item["id"] for item in open_items(ct.configuration(stage, defaults))}
        assert seen == {f"{i}.mp4" for i in range(6)}, name
    with pytest.raises(InputError, match="give more videos"): mc.checked(config | clip_folder(tmp_path/"few", 4))


@pytest.mark.parametrize("trainer", ["svd_train", "interpolate_train", "controlnet_train"])
def test_one_file_trains_without_held_out_clips(trainer, tmp_path):
    import importlib
    module = importlib.import_module(f"camflow.joint.{trainer}")
    own = {"svd_train": dict(target="flow"), "interpolate_train": {}, "controlnet_train": dict(family="svd")}[trainer]
    config = {k: v for k, v in TINY.items() if k in module.DEFAULTS} | clip_folder(tmp_path/"clips", 1) | own | dict(size=[16, 16], steps=1, export=str(tmp_path/"out"))
    assert module.main(config, tmp_path/"run").step == 1 and any((tmp_path/"out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd_finetune", "svd_interpolate", "controlnet_train"])
def test_a_run_without_held_out_clips_ends(name, tmp_path):
    "It failed after the training."
    from camflow.lab.run import run as execute
    run = execute(name, "smoke", {"held_out": 0}, root=tmp_path)
    result = json.loads((run.path/"result.json").read_text())
    assert run.status == "ok" and all(key in result for key in result["headline"])

"Flow: files, colours, DIS, consistency, estimators, motion buckets, rendered clips, errors by region, training."
import json
import math
import struct

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.flow.clips import SceneFlow, flow_bank, scene_flow
from camflow.flow.colour import colour_wheel, fixed_scale, flow_picture, flow_to_color, flow_to_image, legend, unit_colours
from camflow.flow.consistency import consistency_error, occlusion, occlusion_margin, warp, warp_error
from camflow.flow.dis import dis_flow
from camflow.flow.estimators import estimate_flow, load_flow
from camflow.flow.evaluate import endpoint_error, flow_errors, judge, numbers, read_clip, real_report, regions_of
from camflow.flow.files import read_flow, read_flows, write_flow, write_flows
from camflow.flow.motion_bucket import FixedBucket, LogMap, QuantileMap, ablation_arms, clip_speed, fit_map, flow_score, load_map, motion_bucket_ids, motion_speed, obedience, sampled_speed, save_map
from camflow.media.frames import Flow, Frames

NOTHING = math.nan


def constant(u, v, size=(12, 16), entries=1, direction="forward"): return Flow(torch.tensor([u, v], dtype=torch.float32).reshape(1, 2, 1, 1).repeat(entries, 1, *size), direction)


def texture(rows, columns, seed=0):
    x = torch.rand(1, 3, rows // 4, columns // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, (rows, columns), mode="bicubic").clamp(0, 1)[0]


def moving(size, step, frames=3, seed=0): # a texture that moves by `step` = (x, y) whole pixels a frame
    H, W = size
    far = max(map(abs, step)) * frames
    picture = texture(H + 2 * far + 4, W + 2 * far + 4, seed)
    return Frames(torch.stack([picture[:, far - t * step[1]:far - t * step[1] + H, far - t * step[0]:far - t * step[0] + W] for t in range(frames)]), "unit", 8.)


# files

@pytest.mark.parametrize("kind, most", [("flo", 0), ("png", 0.5 / 64 + 1e-5)])   # half a step of the file, and float32 of vectors near 100 px
def test_files_keep_vectors_and_holes(tmp_path, kind, most):
    flow = Flow(torch.randn(3, 2, 6, 9, generator=torch.Generator().manual_seed(0)) * 30, "backward")
    flow.data[0, :, 1, 2], flow.data[1, 0, 3, 4] = NOTHING, NOTHING     # one component unknown is unknown
    flow.data[2] = NOTHING                                              # a frame of which nothing is known
    write_flows(tmp_path, flow, kind)
    found = read_flows(tmp_path, "backward")
    hole = flow.data.isnan().any(1, keepdim=True).expand_as(flow.data)
    assert found.direction == "backward" and torch.equal(found.data.isnan(), hole)
    assert (found.data - flow.data)[~hole].abs().max() <= most


def test_flo_is_middlebury(tmp_path):
    write_flow(tmp_path/"a.flo", constant(1.5, -2, (2, 3)))
    data = (tmp_path/"a.flo").read_bytes()
    assert data[:12] == b"PIEH" + struct.pack("<ii", 3, 2) and np.frombuffer(data, "<f4", offset=12).tolist() == [1.5, -2] * 6
    (tmp_path/"b.flo").write_bytes(data[:12] + np.array([1666666752.] * 12, "<f4").tobytes())   # Middlebury's own mark
    assert read_flow(tmp_path/"b.flo").data.isnan().all()


def test_png_is_kitti(tmp_path):
    import cv2
    write_flow(tmp_path/"a.png", constant(1.5, -2, (2, 3)))
    picture = cv2.imread(str(tmp_path/"a.png"), cv2.IMREAD_UNCHANGED)   # blue, green, red
    assert picture.dtype == np.uint16 and picture[0, 0].tolist() == [1, 32768 - 128, 32768 + 96]


def test_bad_flow_files_are_named(tmp_path):
    import cv2
    flow = constant(1, 2)
    good = write_flow(tmp_path/"good.flo", flow).read_bytes()
    for name, data, message in (("cut.flo", good[:-3], "truncated"), ("head.flo", good[:9], "header"), ("no.flo", b"P6 3 2\n" + good[7:], "no .flo"), ("size.flo", good[:4] + struct.pack("<ii", -1, 2) + good[12:], "damaged"),
                                ("long.flo", good + b"1", "damaged"), ("text.png", b"hello", "cannot be decoded"), ("empty.png", b"", "cannot be decoded"), ("colour.png", cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes(), "16-bit")):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(InputError, match=message) as error: read_flow(tmp_path/name)
        assert name in str(error.value)
    with pytest.raises(InputError, match="does not exist"): read_flow(tmp_path/"none.flo")
    with pytest.raises(InputError, match="choose .flo or .png"): write_flow(tmp_path/"a.npz", flow)
    with pytest.raises(InputError, match="less than 512"): write_flow(tmp_path/"far.png", constant(513, 0))
    assert not (tmp_path/"far.png").exists()
    with pytest.raises(InputError, match="holds no"): read_flows(tmp_path/"nothing")
    for kind in ("flo", "png"): write_flows(tmp_path/"both", Flow(torch.zeros(2, 2, 4, 4), "forward"), kind)
    with pytest.raises(InputError, match="one format per folder"): read_flows(tmp_path/"both")
    write_flow(tmp_path/"two"/"a.flo", flow), write_flow(tmp_path/"two"/"b.flo", constant(1, 2, (3, 3)))
    with pytest.raises(InputError, match="b.flo has"): read_flows(tmp_path/"two")


# colours

def test_the_published_routines_do_not_change_their_argument_and_flicker():
    flow = np.random.default_rng(0).normal(size=(8, 9, 2))
    flow[2, 3] = NOTHING
    before = flow.copy()
    a, b = flow_to_image(flow), flow_to_image(flow / 4)
    flow_to_color(flow)
    assert np.array_equal(flow, before, equal_nan=True) and (a[2, 3] == 0).all()
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1                       # the length is lost
    pictures = [flow_picture(Flow(torch.from_numpy(f).permute(2, 0, 1)[None].float(), "forward"), 3.).data for f in (flow, flow / 4)]
    assert (pictures[0].int() - pictures[1].int()).abs().max() > 50 and (pictures[0][0, :, 2, 3] == 0).all()


def test_fixed_scale_colours_mean_the_same_in_every_frame():
    flow = Flow(torch.cat([constant(2, 0).data, constant(8, 0).data, constant(2, 0).data]), "forward")
    shown = flow_picture(flow, 4.)
    assert torch.equal(shown.data[0], shown.data[2]) and not torch.equal(shown.data[0], shown.data[1])
    with pytest.raises(InputError, match="greater than 0"): flow_picture(flow, 0)
    with pytest.raises(InputError, match="no vector"): fixed_scale(Flow(torch.full((1, 2, 3, 3), NOTHING), "forward"))
    assert fixed_scale(flow) == 10 and legend(10).size == (128, 128)


@pytest.mark.parametrize("vector, colour", [((1, 0), 0), ((-1, 0), 27)])
def test_directions_have_the_wheels_colours(vector, colour):
    # by the published rule the angle of (-v, -u) is looked up: to the right is the wheel's end next to red, to the left its middle
    u, v = (np.full((1, 1), float(c)) for c in vector)
    found = unit_colours(u, v)[0, 0].astype(int)
    assert np.abs(found - colour_wheel()[colour]).max() <= 2


# DIS, consistency

@pytest.mark.parametrize("size", [(48, 64), (64, 48), (33, 91)])
def test_dis_follows_a_texture_both_ways(size):
    forward, backward = dis_flow(moving(size, (2, -1)), True)
    for flow, sign in ((forward, 1), (backward, -1)):
        assert flow.size == size and len(flow) == 2
        assert (flow.data[..., 8:-8, 8:-8].median(-1).values.median(-1).values - sign * torch.tensor([2., -1])).abs().max() < 0.2


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (8, 8)])
def test_dis_takes_any_size(size):
    assert dis_flow(Frames(torch.rand(2, 3, *size), "unit")).size == size


def test_a_flow_does_not_depend_on_what_was_seen_before():
    clip = moving((64, 112), (2, -1))
    first = dis_flow(clip).data
    dis_flow(moving((32, 32), (1, 1)))   # so small that the search changes its scales
    assert torch.equal(dis_flow(clip).data, first)


@pytest.mark.parametrize("range, data", [("byte", lambda x: (x * 255).round().to(torch.uint8)), ("signed", lambda x: x * 2 - 1)])
def test_the_value_range_does_not_matter(range, data):
    clip = moving((40, 56), (1, 1))
    other = dis_flow(Frames(data(clip.data), range))
    assert (other.data - dis_flow(clip).data).abs().mean() < 0.02


def test_warp_looks_up_where_the_flow_points():
    clip = moving((32, 40), (3, 2))
    landed, valid = warp(clip.data[1:2], constant(3, 2, (32, 40)).data)
    assert (landed - clip.data[:1]).abs()[:, :, valid[0]].max() < 1e-4 and valid.sum() == 30 * 37
    assert not warp(clip.data[:1], torch.full((1, 2, 32, 40), NOTHING))[1].any()
    with pytest.raises(InputError, match="do not fit"): warp(clip.data[:1], constant(1, 1, (16, 20)).data)
    with pytest.raises(InputError, match="pixels"): warp(clip.data[:1], torch.zeros(1, 3, 32, 40))


def test_exact_flow_of_the_world_is_consistent_where_it_is_seen():
    from camflow.world.clips import random_move, scene_clips
    from camflow.world.render import render
    path, kind = random_move(torch.Generator().manual_seed(3), 3)
    clip = scene_clips(9, [(path, kind)], size=(48, 80))
    truth = render(clip.scene, (clip.scene.start @ path.numpy(), clip.K_33), clip.times_T, want=("flow",), size=(48, 80))
    there, back = truth.flow_forward.data.float(), truth.flow_backward.data.float()
    error, seen = consistency_error(there, back), ~truth.occlusion
    assert error[seen].median() < 0.05
    hidden, _ = occlusion(there, back)
    assert hidden[truth.occlusion].float().mean() > 3 * hidden[seen].float().mean()
    assert torch.equal(hidden, ~(occlusion_margin(there, back) <= 0))


def test_unknown_flow_is_not_visible():
    there, back = constant(1, 0), constant(-1, 0)
    back.data[0, :, 5, 6] = NOTHING
    hidden, _ = occlusion(there.data, back.data)
    assert hidden[0, 5, 5] and not hidden[0, 5, 8]
    with pytest.raises(InputError, match="both directions"): occlusion(there.data, back.data[..., :-1])


def test_warp_error_needs_fitting_flow():
    clip = moving((32, 40), (2, 0))
    right = constant(2, 0, (32, 40), 2)
    assert warp_error(clip, right)["warp_error"] < 1e-4 < warp_error(clip, constant(0, 0, (32, 40), 2))["warp_error"]
    everything = warp_error(clip, right, torch.ones(2, 32, 40, dtype=torch.bool))
    assert math.isnan(everything["warp_error"]) and everything["visible"] == 0
    for flow in (constant(2, 0, (32, 40), 3), constant(2, 0, (32, 40), 2, "backward"), constant(2, 0, (16, 20), 2)):
        with pytest.raises(InputError, match="forward flow of each frame"): warp_error(clip, flow)
    with pytest.raises(InputError, match="at least two"): warp_error(clip[:1], right)


# estimators

def test_estimators_are_checked():
    clip = moving((40, 56), (1, 0))
    for bad in (lambda f, b=False: torch.zeros(2, 2, 40, 56), lambda f, b=False: constant(0, 0, (40, 56), 3), lambda f, b=False: constant(0, 0, (20, 28), 2), lambda f, b=False: constant(0, 0, (40, 56), 2, "backward")):
        with pytest.raises(InputError, match="must give forward"): estimate_flow(bad, clip)
    one = lambda f, b=False: constant(0, 0, (40, 56), 2)
    with pytest.raises(InputError, match="must give forward and backward"): estimate_flow(one, clip, True)
    with pytest.raises(InputError, match="at least two"): estimate_flow(one, clip[:1])
    with pytest.raises(InputError, match="give Frames"): estimate_flow(one, clip.data)   # a bare tensor has no range
    with pytest.raises(InputError, match="known name"): load_flow("/nowhere/flow.pth")
    with pytest.raises(InputError, match="presets"): load_flow("dis-best")
    with pytest.raises(InputError, match="takes no size"): load_flow("dis", size=(32, 32))


def test_networks_by_name_take_any_size_and_range():
    clip = moving((40, 56), (1, 0), 3).byte()
    forward, backward = estimate_flow(load_flow("random"), clip, True)
    tall = estimate_flow(load_flow("random"), Frames(clip.unit().data.mT.contiguous(), "unit"))
    assert forward.size == (40, 56) and len(backward) == 2 and tall.size == (56, 40)
    assert (tall.data.mT.flip(1) - forward.data).abs().max() < 1e-2  # portrait: u and v change places; another range


def test_the_tiny_network_is_small_and_sees_motion():
    from camflow.assets import tiny_path
    assert (tiny_path("flow")/"model.safetensors").stat().st_size < 2e6
    clip = scene_flow(1_000_003, (64, 96), 3)
    found, still = (numbers(judge(e, [clip]))[0] for e in (load_flow("tiny"), lambda f, b=False: Flow(torch.zeros(len(f) - 1, 2, *f.size), "forward")))
    assert found < 0.8 * still


# motion buckets

def test_speed_is_independent_of_size_and_rate():
    r = motion_speed(constant(1, 0, (48, 64)), 8)
    assert r == pytest.approx(0.1) and motion_speed(constant(3, 0, (144, 192)), 8) == pytest.approx(r) and motion_speed(constant(2, 0, (48, 64)), 4) == pytest.approx(r)
    hole = constant(1, 0, (48, 64))
    hole.data[..., :32] = NOTHING
    assert motion_speed(hole, 8) == pytest.approx(r) and math.isnan(motion_speed(constant(NOTHING, 0), 8))


@pytest.mark.parametrize("fps", [None, 0, -1, math.nan])
def test_an_unknown_rate_is_an_error(fps):
    with pytest.raises(InputError, match="frame rate"): motion_speed(constant(1, 0), fps)
    if fps is None:
        with pytest.raises(InputError, match="frame rate"): clip_speed(load_flow("dis"), Frames(torch.rand(2, 3, 32, 32), "unit"))


@pytest.mark.parametrize("kind", ["quantile", "log"])
def test_the_median_is_127_and_order_is_kept(tmp_path, kind):
    speeds = torch.distributions.LogNormal(-2., 1.).sample((401,)).tolist()
    m = fit_map(speeds, kind)
    assert m.bucket(float(torch.tensor(speeds, dtype=torch.float64).median())) == 127
    values = [m.bucket(float(r)) for r in np.geomspace(1e-4, 50, 200)]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 255
    save_map(m, tmp_path/"map.json")
    assert load_map(tmp_path/"map.json") == m
    for wrong in (NOTHING, -0.1, None, math.inf):
        with pytest.raises(InputError, match="could not be measured"): m.bucket(wrong)


def test_ties_and_bad_maps(tmp_path):
    m = fit_map([0., 0., 0., 1.])
    assert m.bucket(0.) == 0 and m.bucket(2.) == 255 and isinstance(m, QuantileMap) and isinstance(fit_map([.1, .2, .4], "log"), LogMap)
    with pytest.raises(InputError, match="positive speeds"): fit_map([0., 0., 0.2], "log")
    with pytest.raises(InputError, match="at least two"): fit_map([0.1])
    with pytest.raises(InputError, match="2 of 3 speeds"): fit_map([-0.1, 0.2, float("nan")])
    with pytest.raises(InputError, match="choose quantile or log"): fit_map([.1, .2], "rank")
    (tmp_path/"a.json").write_text(json.dumps({"kind": "magic"}))
    with pytest.raises(InputError, match="no motion mapping"): load_map(tmp_path/"a.json")
    (tmp_path/"b.json").write_text(json.dumps({"kind": "log", "a": 1, "c": 2}))
    with pytest.raises(InputError, match="another version"): load_map(tmp_path/"b.json")


def test_a_clip_without_a_speed_names_itself_and_never_gets_127():
    clips = [moving((40, 56), (1, 0)), Frames(torch.rand(3, 3, 40, 56), "unit")]     # the second has no frame rate
    with pytest.raises(InputError, match="clip 1: .*frame rate"): motion_bucket_ids(load_flow("dis"), clips, fit_map([.1, .2]))
    assert motion_bucket_ids(load_flow("dis"), clips, FixedBucket(90)) == [90, 90]
    with pytest.raises(InputError, match="at least two"): sampled_speed(load_flow("dis"), lambda n: clips[0][n], 1, 8)


def test_the_arms_differ_only_in_their_buckets():
    speeds = [.05, .1, .2, .3]
    arms = ablation_arms(speeds, fit_map(speeds), seed=1)
    assert sorted(arms["shuffled"]) == sorted(arms["computed"]) and set(arms["fixed"]) == {127} and arms == ablation_arms(speeds, fit_map(speeds), seed=1)
    perfect = obedience([0, 0, 127, 255], [.1, .1, .2, .4])
    assert perfect["rank_correlation"] == pytest.approx(1) and perfect["speed_ratio"] == pytest.approx(4)
    assert obedience([0, 127, 255], [.3, .2, .1])["rank_correlation"] == pytest.approx(-1) and math.isnan(obedience([], [])["rank_correlation"])


def test_open_soras_score_turns_portrait_frames():
    wide = moving((36, 64), (2, 0), 31)
    tall = Frames(wide.data.mT.contiguous(), "unit", wide.fps)
    a, b = (flow_score(load_flow("dis"), c, (64, 112)) for c in (wide, tall))
    assert len(a["pair_scores"]) == 3 and a["score"] == pytest.approx(b["score"], rel=0.1) and a["flow"].size == b["flow"].size == (64, 112)
    with pytest.raises(InputError, match="longer clip"): flow_score(load_flow("dis"), wide[:30])


# rendered clips and errors

def test_rendered_flow_explains_the_frames(tmp_path):
    bank = flow_bank([3, 4], tmp_path, "scenes", (48, 80), 3)
    for clip in (bank[0], flow_bank([3], tmp_path, "stereo", (48, 96), 3)[0]):
        found = lambda flow: warp_error(Frames(clip["frames"], "byte"), Flow(flow, "forward"), clip["occluded"][:, 0])["warp_error"]
        assert found(clip["flow"]) < 0.8 * found(torch.zeros_like(clip["flow"]))
    assert isinstance(bank, SceneFlow) and len(flow_bank([3, 4], tmp_path, "scenes", (48, 80), 3)) == 2
    with pytest.raises(InputError, match="no hard cases"): flow_bank([1], tmp_path, "scenes", hard=["thin"])
    with pytest.raises(InputError, match="at least two"): flow_bank([1], tmp_path, frames=1)


def test_silence_is_not_rewarded():
    truth, found = constant(5, 0), constant(5, 0)
    found.data[..., :4] = NOTHING
    errors = flow_errors(found, truth)["all"]
    assert errors["epe"] == 0 and errors["missing"] == 25 and errors["fl"] == 25
    truth.data[..., 8:] = NOTHING                                    # unknown truth does not count
    assert flow_errors(found, truth)["all"]["missing"] == 50
    with pytest.raises(InputError, match="one direction"): endpoint_error(found, constant(1, 0, direction="backward"))
    with pytest.raises(InputError, match="one size"): endpoint_error(found, constant(1, 0, (6, 8)))


def test_outliers_are_kittis():
    truth = constant(100, 0)
    found = Flow(truth.data.clone(), "forward")
    found.data[0, 0, 0, :4], found.data[0, 0, 1, :2] = 104, 106      # 4 px of 100 is within 5 %
    assert flow_errors(found, truth)["all"]["fl"] == pytest.approx(100 * 2 / 192)


def test_regions_partition_the_pixels():
    clip = scene_flow(1_000_005, (48, 80), 3)
    masks = regions_of(clip)
    for parts in (("moving", "static"), ("occluded", "visible"), ("slow", "medium", "fast")):
        assert torch.equal(sum(masks[p].int() for p in parts), torch.ones_like(masks["all"], dtype=torch.int32))
    rows = judge(lambda f, b=False: Flow(clip["flow"], "forward"), [clip])
    assert numbers(rows) == [0.0] and len(numbers(rows, "occluded", "share")) == 1


def test_real_frames_from_a_folder(tmp_path):
    from PIL import Image
    clip = moving((40, 56), (2, 1), 4).byte()
    for t, frame in enumerate(clip.data): Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path/f"{t}.png")
    assert torch.equal(read_clip(tmp_path).data, clip.data) and len(read_clip(tmp_path, 2)) == 2 and read_clip(tmp_path, rows=20).size == (20, 28)
    report = real_report(load_flow("dis"), read_clip(tmp_path))
    assert report["warp_error"] < 0.5 * report["warp_error_still"] and report["cycle_median"] < 0.2
    with pytest.raises(InputError, match="holds no picture"): read_clip(tmp_path/"none" if (tmp_path/"none").mkdir() else tmp_path/"none")


# training

SMALL = dict(model=dict(feature_channels=16, num_transformer_layers=1, num_reg_refine=1, backbone_channels=(8, 8, 16), refine_channels=16, attn_splits=(1, 2)), clips=0, scenes=2, scene_size=[32, 48], scene_frames=3, held_out=0,
             held_out_scenes=1, size=[32, 48], batch_size=1, ema_decay=0.5, checkpoint_seconds=0)


def test_a_stopped_training_continues_bit_for_bit(tmp_path):
    from camflow.flow.train import main
    from camflow.training.checkpoint import load_checkpoint
    common = SMALL | dict(bank=str(tmp_path/"bank"))
    whole = main(common | dict(steps=3, checkpoint_every=2), tmp_path/"a")
    first = main(common | dict(steps=3, max_seconds=1e-6), tmp_path/"b")
    rest = main(common | dict(steps=3), tmp_path/"b")
    assert first.status == "time" and rest.resumed == 1 and whole.status == rest.status == "done"
    a, b = (load_checkpoint(tmp_path/name/"checkpoints").tensors["model"] for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_training_refuses_what_does_not_fit(tmp_path):
    from camflow.flow.train import main
    for changes, message in ((dict(size=[30, 48]), "multiples of 8"), (dict(size=[64, 64]), "smaller than the crop"), (dict(scenes=0), "no clips"), (dict(model=dict(channels=3)), "GMFlowConfig"), (dict(colour=1), "unknown configuration")):
        with pytest.raises(InputError, match=message): main(SMALL | dict(bank=str(tmp_path/"bank"), steps=1) | changes, tmp_path/"run")


def test_the_loss_ignores_what_is_not_known():
    from camflow.flow.train import crop_pair, flow_loss, recolor
    clip = scene_flow(2, (48, 64), 2)
    clip["flow"][0, :, 10:20] = NOTHING
    for i in range(8):
        pair = recolor(crop_pair(clip, (32, 48), torch.Generator().manual_seed(i)), torch.Generator().manual_seed(i))
        assert torch.isfinite(pair["flow"]).all() and 0 <= pair["images"].min() and pair["images"].max() <= 255
        off = pair["flow"][None] + torch.where(pair["known"], 0., 1e3)
        assert float(flow_loss([off], pair["flow"][None], pair["known"][None])[0]) == 0

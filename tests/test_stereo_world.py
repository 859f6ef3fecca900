"Stereo clips of the world: exact by formula, hard in the way their name says, the same from disk."
import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.world.clips import HELD_OUT
from camflow.world.render import View, pixel_centres
from camflow.world.stereo_clips import HARD, PRESETS, STEREO_FPS, clip_settings, stereo_bank, stereo_clip, stereo_scene, textureless

torch.set_num_threads(1)
TINY = PRESETS["tiny"]["size"]


def exact_views(clip, i):
    "Left and right views of frame i, rebuilt from the clip's own numbers."
    scene = stereo_scene(clip.seed, float(clip.K[0, 0]), clip.size, clip_settings(hard=clip.hard)[2], max((len(clip) - 1) / STEREO_FPS, 1 / STEREO_FPS))
    pose, right = [p[0] for p in scene.poses([i / STEREO_FPS])], clip.c2w[i].copy()
    right[:3, 3] += clip.baseline * clip.c2w[i][:3, 0]
    return View(scene, *pose, clip.c2w[i], clip.K, clip.size), View(scene, *pose, right, clip.K, clip.size)


@pytest.mark.parametrize("seed", range(HELD_OUT, HELD_OUT + 4))
def test_disparity_is_the_difference_of_two_projections(seed):
    clip = stereo_clip(seed, "tiny", both=True)
    for i in (0, 4):
        a, b = exact_views(clip, i)
        centres = pixel_centres(clip.size)
        color, depth, *where = a.see(centres)
        uv, _, visible = b.land(*where)
        assert np.abs(centres[:, 0] - uv[:, 0] - clip.K[0, 0] * clip.baseline / depth).max() < 1e-9 and np.abs(centres[:, 1] - uv[:, 1]).max() < 1e-9
        assert np.abs(b.see(uv[visible])[0] - color[visible]).max() < 1e-6
        assert (clip.occlusion[i].numpy().ravel() == ~visible).all()
        assert np.abs(clip.disparity[i].numpy().ravel() - (centres[:, 0] - uv[:, 0])).max() < 1e-4
        assert np.abs(clip.right_disparity[i].numpy().ravel() - clip.K[0, 0] * clip.baseline / b.see(centres)[1]).max() < 1e-4


def test_pictures_are_what_the_truth_says():
    "The right picture, looked up by the truth, is the left one (bytes of anti-aliased images with a grey level of noise)."
    clip = stereo_clip(HELD_OUT + 1)
    x = torch.arange(clip.size[1]) - clip.disparity
    low = x.floor().clamp(0, clip.size[1] - 2).long()
    take = lambda at: torch.gather(clip.right.float(), -1, at.expand(-1, 3, -1, -1))
    warped = take(low) + (x - low) * (take(low + 1) - take(low))
    seen = (~clip.occlusion).expand(-1, 3, -1, -1)
    assert float((warped - clip.left).abs()[seen].mean()) < 3 < float((warped - clip.left).abs()[~seen].mean())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    clip, (H, W), T = stereo_clip(HELD_OUT, preset), PRESETS[preset]["size"], PRESETS[preset]["frames"]
    assert clip.left.shape == clip.right.shape == (T, 3, H, W) and clip.left.dtype == torch.uint8
    assert clip.disparity.shape == (T, 1, H, W) and clip.disparity.dtype == torch.float32 and bool((clip.disparity > 0).all()) and bool(clip.valid.all())
    for name in ("occlusion", "moving", "textureless", "valid"): assert getattr(clip, name).shape == (T, 1, H, W) and getattr(clip, name).dtype == torch.bool
    assert clip.flow.shape == (T - 1, 2, H, W) and clip.flow_occlusion.shape == (T - 1, 1, H, W) and bool(torch.isfinite(clip.flow).all())
    assert clip.c2w.shape == (T, 4, 4) and clip.ids.max() > 0 and len(clip) == T


def test_disparities_are_of_a_sensible_size():
    clips = [stereo_clip(HELD_OUT + i, "tiny") for i in range(24)]
    mean = np.array([float(c.disparity[0].mean()) for c in clips]) * 256 / TINY[1]
    assert 3.5 < mean.min() and mean.max() < 21 and mean.std() > 2
    assert max(float(c.disparity[0].max()) for c in clips) < .3 * TINY[1] and .02 < np.mean([float(c.occlusion.float().mean()) for c in clips]) < .3
    assert .03 < np.mean([float(c.textureless.float().mean()) for c in clips]) < .5 and .03 < np.mean([float(c.moving.float().mean()) for c in clips]) < .6


def test_seeds_name_clips():
    a, b, c = (stereo_clip(seed, "tiny") for seed in (5, 5, 6))
    assert (a.left == b.left).all() and (a.disparity == b.disparity).all() and not (a.left == c.left).all()
    assert stereo_clip(5, "tiny", baseline=.2).baseline == .2 and torch.allclose(stereo_clip(5, "tiny", baseline=.2).disparity * a.baseline / .2, a.disparity, rtol=1e-5)


@pytest.fixture(scope="module")
def hard(): return {name: [stereo_clip(HELD_OUT + i, "tiny", hard=name) for i in range(3)] for name in (None, *HARD)}


def average(clips, measure): return float(np.mean([float(measure(c)) for c in clips]))


def test_hard_cases_are_hard_in_their_own_way(hard):
    share = lambda c: c.textureless.float().mean()
    assert average(hard["textureless"], share) > .4 > 2 * average(hard["repetitive"], share)
    speed = lambda c: c.flow.norm(dim=1).mean()
    assert average(hard["fast"], speed) > 1.5 * average(hard[None], speed)
    assert all(float(c.disparity[0].max()) > TINY[1] / 4 for c in hard["large_disparity"])
    assert all(len(set(c.ids.unique().tolist()) - set(o.ids.unique().tolist())) >= 3 for c, o in zip(hard["thin"], hard[None]))
    bright = lambda c: c.left.float().mean((1, 2, 3)).std()
    assert average(hard["flicker"], bright) > 3 * average(hard[None], bright)


def test_a_scene_cut_has_no_flow_across(hard):
    for clip in hard["cut"]:
        known = torch.isfinite(clip.flow).all(1).flatten(1).all(1)
        assert known.tolist() == [True, True, False, True] and bool(clip.flow_occlusion[2].all()) and not bool(clip.flow_occlusion[1].all())
        assert len(clip.c2w) == len(clip) and bool((clip.disparity > 0).all())


def test_the_occluder_comes_and_goes(hard):
    for clip in hard["occluder"]:
        board = [int((clip.ids[t] == clip.ids.max()).sum()) for t in range(len(clip))] # the last thing that was hung
        assert max(board[1:-1]) > 200 and max(board[1:-1]) > board[0] and max(board[1:-1]) > board[-1]


def test_a_bad_rectification_is_one_row_off():
    "The right picture of the hard case, one row up or down, is the ordinary one."
    good, bad = (stereo_clip(HELD_OUT + 7, "tiny", hard=name) for name in (None, "rectification"))
    a, b = good.right.float(), bad.right.float()
    off = [float((a[:, :, 2:-2] - torch.roll(b, s, 2)[:, :, 2:-2]).abs().mean()) for s in (-1, 0, 1)]
    assert min(off[0], off[2]) < .5 * off[1] and (good.disparity == bad.disparity).all()


def test_textureless_is_about_horizontal_contrast():
    columns = (torch.arange(40) % 4 < 2).float().mul(200).view(1, 1, 1, 40).expand(1, 3, 20, 40)
    assert not textureless(columns.to(torch.uint8)).any() and textureless(columns.transpose(-1, -2).contiguous().to(torch.uint8)).all()


def test_a_killed_rendering_goes_on(tmp_path, monkeypatch):
    from camflow.world import stereo_clips
    real, made = stereo_clips.stereo_clip, []

    def dies(seed, **k):
        if len(made) == 2: raise KeyboardInterrupt
        made.append(seed)
        return real(seed, **k)
    monkeypatch.setattr(stereo_clips, "stereo_clip", dies)
    with pytest.raises(KeyboardInterrupt): stereo_bank(range(4), tmp_path, hard=[None, "cut"], flow=True)
    again = []
    monkeypatch.setattr(stereo_clips, "stereo_clip", lambda seed, **k: (again.append(seed), real(seed, **k))[1])
    bank = stereo_bank(range(4), tmp_path, hard=[None, "cut"], flow=True)
    assert made == [0, 1] and again == [2, 3] and len(bank) == 4
    stereo_bank(range(4), tmp_path, hard=[None, "cut"], flow=True)
    assert again == [2, 3], "a finished bank is found"
    for i in (1, 2):
        clip, row = real(i, "tiny", hard=[None, "cut"][i % 2]), bank[i]
        for name in ("left", "right", "disparity", "valid", "occlusion", "moving", "textureless"): assert (row[name] == getattr(clip, name)).all(), name
        assert (row["flow_occlusion"][:-1] == clip.flow_occlusion).all() and torch.allclose(row["flow"], clip.flow, rtol=2e-3, atol=1e-3, equal_nan=True)
        assert np.allclose(bank.rigs[i], [clip.K[0, 0], clip.baseline])
    assert bank.batch([0, 3])["left"].shape == (2, 5, 3, *TINY) and bank.meta["seeds"] == [0, 1, 2, 3]
    assert stereo_bank(range(4), tmp_path).folder != bank.folder
    with pytest.raises(IndexError): bank[4]


def test_round_trips_of_hard_clips(tmp_path):
    "Every layout, with a cut, a large disparity and a clip of one frame."
    from camflow.data.stereo_sets import DynamicReplica, SceneFlow, Sintel
    from camflow.world.stereo_write import as_clip, clip_tracks, write_dynamic_replica, write_sceneflow, write_sintel_stereo
    clips = [stereo_clip(HELD_OUT, "tiny", hard="cut", both=True), stereo_clip(HELD_OUT + 1, "tiny", hard="large_disparity", both=True), stereo_clip(HELD_OUT + 2, "tiny", frames=1, both=True)]
    write_sceneflow(tmp_path / "f", clips, "test")
    write_sintel_stereo(tmp_path / "s", clips)
    write_dynamic_replica(tmp_path / "d", clips, "test")
    flow, sintel, replica = SceneFlow(tmp_path / "f", split="test"), Sintel(tmp_path / "s"), DynamicReplica(tmp_path / "d", "test", want=("disparity", "right", "flow", "mask"))
    assert len(flow) == len(sintel) == len(replica) == 3
    for i, clip in enumerate(clips):
        for back, line in ((flow[i], 0), (sintel[clip.name], 1e-4), (replica[clip.name], 1e-3)):
            assert (back.left.data == clip.left).all() and (back.right.data == clip.right).all()
            assert ((back.disparity - clip.disparity).abs() <= line * clip.disparity.clamp(min=1))[back.valid].all() and back.valid.float().mean() > .3
        assert torch.allclose(replica[clip.name].extras["right_disparity"], clip.right_disparity, rtol=1e-3)
        assert as_clip(clip).extras["flow"].shape == (len(clip), 2, *TINY) and "1 x 32" in repr(as_clip(clips[2]))
    with pytest.raises(InputError, match="cut"): clip_tracks(clips[0])
    source = replica.samples[1][0]
    assert source.trajectories(0)["traj_2d"].shape[1] == 2


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(InputError, match="tiny, small, demo"): stereo_clip(0, "huge")
    with pytest.raises(InputError, match="repetitive"): stereo_clip(0, "tiny", hard="dark")
    with pytest.raises(InputError, match="8 x 8"): stereo_clip(0, "tiny", size=(4, 64))
    with pytest.raises(InputError, match="metres"): stereo_clip(0, "tiny", baseline=-1.)
    with pytest.raises(InputError, match="hard case"): stereo_bank(range(2), tmp_path, hard=["dark"])
    assert not list(tmp_path.iterdir())

"""What a timeline is turned into: tracks, pictures, the viewer page, edits; and everything that a scene may lack."""
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.device import generator
from camflow.files import InputError
from camflow.gflow.gaussians import Gaussians
from camflow.gflow.ideal import ideal_timeline
from camflow.gflow.pictures import draw_tracks, hull_mask, write_pictures
from camflow.gflow.splat import shares
from camflow.gflow.timeline import Timeline
from camflow.gflow.tracks import between, follow, shares_at
from camflow.gflow.truth import truth_clip
from camflow.gflow.viewer import covariances, pack_timeline, read_viewer, serve_viser, unpack_timeline, viewer_html, write_viewer
from camflow.media.video import probe

T, SIZE = 5, (44, 70)


@pytest.fixture(scope="module")
def clip(): return truth_clip("crossing", frames=T, size=SIZE)


@pytest.fixture(scope="module")
def tl(clip): return ideal_timeline(clip)


def crowd(n, movers, frames, seed=0):
    "A timeline of n Gaussians over a view, some of which drift; the second half is born in frame 1."
    draw = lambda *shape: torch.rand(*shape, generator=generator(seed, "crowd", *shape))
    means = torch.cat([(draw(n, 2) - 0.5) * 4, 2 + 2 * draw(n, 1)], 1)
    moving, step = torch.zeros(n), torch.zeros(n, 3)
    if movers: moving[-movers:], step[-movers:] = 1., 0.05 * (draw(movers, 3) - 0.5)
    base = Gaussians(means, 0.01 + 0.05 * draw(n, 3), draw(n, 4) - 0.5, 0.3 + 0.7 * draw(n), draw(n, 3), moving)
    all_frames = [replace(base, means=means + t * step) for t in range(frames)]
    ids = [torch.arange(n // 2 if t == 0 and frames > 1 else n) for t in range(frames)]
    c2w = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    c2w[:, 0, 3] = 0.02 * torch.arange(frames)
    return Timeline([g[i] for g, i in zip(all_frames, ids)], ids, c2w, torch.tensor([[60., 0, 40], [0, 60, 30], [0, 0, 1]], dtype=torch.float64), (60, 80), list(range(frames)), 12.,
                    torch.zeros(frames, 60, 80, dtype=torch.bool), "test")


# ---- tracks

def test_shares_at_pixels_are_those_of_the_rasteriser(tl):
    from camflow.gflow.projection import project
    g, (w2c, K, size) = tl.frames[2], tl.view(2)
    _, dominant = shares(project(g.means, g.scales, g.quats, w2c, K, size), g.opacities, size)
    rows, columns = np.mgrid[2:size[0]:5, 2:size[1]:5].reshape(2, -1)
    who, share, *_ = shares_at(g, w2c, K, size, np.stack([columns, rows], 1) + 0.5)
    assert np.array_equal(who[:, 0], dominant.numpy()[rows, columns]) and (np.diff(share) <= 1e-12).all() and (share.sum(1) <= 1 + 1e-9).all()


@pytest.mark.parametrize("frame", [0, 2, 4])
def test_tracks_from_any_frame(clip, tl, frame):
    places = np.stack(np.meshgrid(np.arange(4, 70, 6) + 0.5, np.arange(4, 44, 6) + 0.5), -1).reshape(-1, 2)
    found, true = follow(tl, np.concatenate([np.full((len(places), 1), frame), places], 1)), clip.tracks(places, frame)
    assert np.allclose(found.points[frame], places, atol=1e-6) and found.visible[frame].mean() > 0.97
    rest = ~clip.moving[frame].numpy()[places[:, 1].astype(int), places[:, 0].astype(int)]
    off = np.where(true.visible, np.linalg.norm(found.points - true.uv, axis=2), np.nan)
    assert np.nanmedian(off[:, rest]) < 0.1 and np.nanmedian(off[:, ~rest]) < 0.3 and np.nanmean(off < 2) > 0.5
    assert (found.visible == true.visible)[np.isfinite(found.points).all(2)].mean() > 0.9


def test_occlusion_either_way_and_gone_gaussians():
    grid = torch.stack(torch.meshgrid(torch.linspace(-2, 2, 40), torch.linspace(-2, 2, 40), indexing="xy"), -1).reshape(-1, 2)
    wall = Gaussians(torch.cat([grid, torch.full((1600, 1), 4.)], 1), torch.full((1600, 3), 0.06), torch.tensor([1., 0, 0, 0]).repeat(1600, 1), torch.full((1600,), 0.99), torch.rand(1600, 3, generator=generator(0, "wall")))
    def with_shield(x): return Gaussians(*(torch.cat(pair) for pair in zip(
        (wall.means, wall.scales, wall.quats, wall.opacities, wall.colours, wall.moving),
        (torch.tensor([[x, 0., 2.]]), torch.full((1, 3), 0.1), torch.tensor([[1., 0, 0, 0]]), torch.tensor([0.99]), torch.ones(1, 3), torch.ones(1)))))
    frames = [with_shield(-1.), with_shield(0.), with_shield(1.)[:1600]]
    ids = [torch.arange(1601), torch.arange(1601), torch.arange(1600)]
    tl = Timeline(frames, ids, torch.eye(4, dtype=torch.float64).repeat(3, 1, 1), torch.tensor([[40., 0, 40], [0, 40, 30], [0, 0, 1]], dtype=torch.float64), (60, 80), [0, 1, 2], 5., torch.zeros(3, 60, 80, dtype=torch.bool))
    found = follow(tl, [[0, 40.5, 30.5], [0, 20.5, 30.5], [1, 40.5, 30.5]])
    assert found.visible[:, 0].tolist() == [True, False, True]          # the wall's point, behind the shield in frame 1
    assert found.moving.tolist() == [False, True, True] and found.points[1, 1, 0] == pytest.approx(40.5, abs=0.6)
    assert np.isnan(found.points[2, 1:]).all() and not found.visible[2, 1:].any()  # the shield is gone: NaN, not its old place
    with pytest.raises(InputError, match="frames 0 to 2"): follow(tl, [[3, 1, 1]])
    with pytest.raises(InputError, match="a query of frame 0.5; .*frames 0 to 2"): follow(tl, [[0, 1, 1], [0.5, 1, 1]])


def test_uncovered_pixels_take_the_nearest_and_say_so():
    tl = crowd(6, 0, 2)
    found = follow(tl, [[0, 0.5, 0.5], [1, 79.5, 59.5]])
    assert set(found.status) <= {"nearest", "ok"} and "nearest" in found.status and np.isfinite(found.points).all()


def test_between_is_half_way_and_keeps_what_is_new():
    tl = crowd(20, 6, 3)
    g, c2w = between(tl, 0.25)
    assert float(c2w[0, 3]) == pytest.approx(0.005) and len(g) == 10 + 4  # of the ten born in frame 1 the six movers are not there yet
    assert len(between(tl, 0.75)[0]) == 20
    with pytest.raises(InputError, match="0 to 2"): between(tl, 2.5)


# ---- pictures

def test_the_seeds_zero_size_crash_and_all_its_relatives(clip):
    "traj_visualizer.draw_tracks_on_video took tracks[query_frame, still_length:, 1].min() of 151 still tracks and no mover."
    tracks = np.random.default_rng(0).random((T, 151, 2)) * SIZE[::-1]
    with pytest.raises(ValueError, match="zero-size array to reduction operation minimum"): tracks[0, 151:, 1].min()
    before = clip.frames.data.clone()
    for n, movers, frames in ((151, 0, T), (151, 151, T), (0, 0, T), (1, 0, 1), (1, 1, 1), (2, 1, 1)):
        video = draw_tracks(clip.frames[list(range(frames))], tracks[:frames, :n], np.ones((frames, n), bool), np.arange(n) < movers)
        assert len(video) == frames and torch.equal(video.data, clip.frames.data[:frames]) == (n == 0)
    assert torch.equal(clip.frames.data, before), "the clip itself must not be drawn upon"


@pytest.mark.parametrize("make", [
    pytest.param(lambda: ideal_timeline(truth_clip("static", frames=2, size=SIZE)), id="no movers"),
    pytest.param(lambda: ideal_timeline(truth_clip("plain", frames=1, size=SIZE)), id="one frame"),
    pytest.param(lambda: ideal_timeline(truth_clip("portrait", frames=2, size=(70, 44))), id="portrait"),
    pytest.param(lambda: ideal_timeline(truth_clip("odd", frames=2, size=(35, 41))), id="odd size"),
    pytest.param(lambda: (lambda t: replace(t, frames=[g[:0] for g in t.frames], ids=[i[:0] for i in t.ids]))(crowd(4, 0, 2)), id="no points"),
    pytest.param(lambda: (lambda t: replace(t, c2w_T44=t.c2w_T44 @ torch.diag(torch.tensor([-1., 1, -1, 1], dtype=torch.float64))))(crowd(40, 5, 2)), id="all behind"),
    pytest.param(lambda: crowd(9, 9, 2), id="only movers"),
])
def test_every_output_of_every_odd_timeline(tmp_path, make):
    tl = make()
    files = write_pictures(tmp_path, tl)
    assert len(files) == 13 and all(probe(path).frames == len(tl) for path in files.values())
    assert len(list((tmp_path/"images").glob("img_0*.png"))) == len(tl) == len(list((tmp_path/"images_seg").glob("move_mask_erode_*.png")))
    kept = np.load(tmp_path/"sequence_traj.npz", allow_pickle=False)
    assert kept["points"].shape[:2] == kept["visible"].shape
    facts, back = read_viewer(write_viewer(tmp_path/"v.html", tl))
    assert facts["frames"] == len(tl) and back["positions"].shape[1] == facts["count"] == len(torch.unique(torch.cat(tl.ids)))
    assert np.isfinite(back["positions"]).all()


def test_hulls_of_shapes_are_the_shapes():
    rng = np.random.default_rng(0)
    points = rng.random((1500, 2)) * 80
    inside = ((points[:, 0] < 60) & (points[:, 1] < 25)) | ((points[:, 0] < 25) & (points[:, 1] < 60))  # an L
    mask = hull_mask(points[inside], (80, 80))
    y, x = np.mgrid[:80, :80] + 0.5
    truth = ((x < 60) & (y < 25)) | ((x < 25) & (y < 60))
    assert (mask & truth).sum() / (mask | truth).sum() > 0.85
    assert not hull_mask(np.full((40, 2), np.nan), (80, 80)).any()


# ---- viewer

def test_page_is_within_its_budget_and_needs_no_network():
    big = crowd(20_000, 20_000, 12)
    facts, data = pack_timeline(big)
    assert facts["still"] == 0 and len(viewer_html(big)) < 6_000_000
    mixed = crowd(20_000, 4_000, 12)
    page = viewer_html(mixed, poster=0)
    assert len(page) < 1_500_000 and "http:" not in page and "https:" not in page and "//cdn" not in page and not re.search(r"<(link|iframe|object)|\ssrc=(?!\"data:)", page)
    assert page.count("<script") == page.count("</script>") and page.count("<button") == page.count("</button>") == 4
    assert "WebGL" in page and "<noscript>" in page


def test_round_trip_is_within_the_quantisation():
    tl = crowd(300, 80, 4)
    tl.frames[2].means[5] = torch.tensor([900., -400., 2000.])   # a stray far away does not coarsen the rest
    tl.frames[1].means[5] = tl.frames[3].means[5] = tl.frames[2].means[5]
    facts, data = pack_timeline(tl)
    back = unpack_timeline(facts, data)
    first = torch.arange(300) >= 150
    assert sorted(map(tuple, back["life"].tolist())) == sorted(zip(first.long().tolist(), [3] * 300))
    for t in range(4):
        here = (back["life"][:, 0] <= t) & (t <= back["life"][:, 1])
        found, g = back["positions"][t, here], tl.frames[t]
        distance = torch.cdist(torch.from_numpy(found), g.means.double())
        off, match = distance.min(1)
        stray = torch.from_numpy(found).norm(dim=1) > 100
        assert sorted(match.tolist()) == list(range(len(g))) or stray.any()
        near = ~stray
        assert off[near].max() < 1.5e-3
        assert np.abs(back["rgba"][here][near.numpy(), :3] - g.colours[match[near]].numpy()).max() <= 0.5 / 255 + 1e-6
        ratio = back["scales"][here][near.numpy()] / g.scales[match[near]].numpy()
        assert np.abs(np.log(ratio)).max() < np.log(facts["scale"][1] - facts["scale"][0] + 2.8) * 0.02
        turn = (back["quats"][t, here][near.numpy()] * (g.quats / g.quats.norm(dim=1, keepdim=True))[match[near]].numpy()).sum(1)
        assert (np.abs(turn) > 0.99).all()
    assert pack_timeline(tl, most=100)[0]["left_out"] == 200 and "200 of the smallest" in viewer_html(tl, most=100, poster=0)


def test_titles_are_escaped():
    page = viewer_html(crowd(3, 1, 1), title="</script><b>x", poster=0)
    assert "</script><b>" not in page and page.count("<script") == page.count("</script>")


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: the page's program is not run")


def run_page(path, *more):
    out = subprocess.run(["node", str(Path(__file__).with_name("gflow_page.js")), str(path), *map(str, more)], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@needs_node
def test_the_pages_program_decodes_sorts_and_obeys(tmp_path):
    tl = crowd(700, 120, 4)
    seen = run_page(write_viewer(tmp_path/"v.html", tl, poster=1), "gl", 3)
    facts, back = read_viewer(tmp_path/"v.html")
    geo = np.array(seen["textures"][0]["data"]).reshape(-1, 12)[:700]
    here0 = back["life"][:, 0] == 0
    assert np.allclose(geo[here0, :3], back["positions"][0, here0], atol=1e-4) and seen["textures"][0]["width"] == 1536
    g = Gaussians(torch.from_numpy(back["positions"][0]).float(), torch.from_numpy(back["scales"]).float(), torch.from_numpy(back["quats"][0]).float(), torch.ones(700), torch.ones(700, 3))
    cov = covariances(g)
    assert np.allclose(geo[:, 4:10], cov[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]], rtol=2e-2, atol=2e-6)
    assert seen["draws"][0] == 350 and seen["draws"][1] == 700               # half of them are born in frame 1
    last = np.array(seen["textures"][2]["data"]).reshape(-1, 12)[:700, :3]   # moved to frame 3
    assert np.allclose(last, back["positions"][3], atol=1e-4)
    order, z = np.array(seen["orders"][1]), last[:, 2]
    assert sorted(order.tolist()) == list(range(700)) and (np.diff(z[order]) <= (z.max() - z.min()) / 65000).all()  # the furthest first
    view = np.array(seen["views"]).reshape(-1, 4, 4).transpose(0, 2, 1)
    assert np.allclose(view[0], np.eye(4), atol=1e-6) and np.allclose(view[1], np.linalg.inv(tl.c2w_T44[3].numpy()), atol=1e-6)
    for v in view: assert np.allclose(v[:3, :3] @ v[:3, :3].T, np.eye(3), atol=1e-5)
    eye = lambda v: -v[:3, :3].T @ v[:3, 3]
    assert eye(view[2])[0] < eye(view[1])[0] and eye(view[3])[1] < eye(view[2])[1]           # left, up (y points down)
    assert np.linalg.norm(eye(view[4])) != np.linalg.norm(eye(view[3])) and len(np.unique(view.round(4).reshape(len(view), -1), axis=0)) >= 9
    assert np.allclose(np.array(seen["home"]).reshape(4, 4).T, np.eye(4), atol=1e-6)
    assert seen["follow"] == "true" and seen["movers"] == "true" and "Gaussians" in seen["status"] and "fps" in seen["status"] and seen["time"] != 3


@needs_node
def test_without_webgl_the_page_says_so(tmp_path):
    seen = run_page(write_viewer(tmp_path/"v.html", crowd(5, 1, 2)), "nogl")
    assert "cannot draw" in seen["message"] and "WebGL 2" in seen["message"] and seen["said"] == ["plain"] and seen["draws"] == []


def test_viser_is_asked_for_or_used(monkeypatch):
    import sys
    tl = crowd(10, 2, 3)
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(InputError, match="viser is not installed"): serve_viser(tl)

    class Thing:
        visible, value = True, 0
        def on_update(self, function): self.function = function

    class Server:
        def __init__(self, port): self.port, self.scene, self.gui, self.made, self.slider = port, self, self, [], Thing()
        def add_gaussian_splats(self, name, centers, covariances, rgbs, opacities, visible):
            assert covariances.shape == (len(centers), 3, 3) and opacities.shape == (len(centers), 1)
            thing = Thing()
            thing.visible = visible
            self.made.append(thing)
            return thing
        def add_slider(self, name, min, max, step, initial_value): return self.slider
    monkeypatch.setitem(sys.modules, "viser", type("viser", (), {"ViserServer": Server}))
    server = serve_viser(tl, block=False)
    assert [s.visible for s in server.made] == [True, False, False]
    server.slider.value = 2
    server.slider.function()
    assert [s.visible for s in server.made] == [False, False, True]


# ---- edits

@pytest.fixture(scope="module")
def thing(clip): return clip.ids == 2, ideal_timeline(clip)


def test_shares_under_a_mask_are_those_of_the_blending(tl):
    from camflow.gflow.edit import mask_shares
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[10:30, 20:50] = True
    inside, total = mask_shares(tl, 1, mask)
    for i in (3, 200, 500):
        one = torch.zeros(len(tl.frames[1]), 1)
        one[i] = 1
        seen = tl.render(1, channels=one).channels_DHW[0]
        assert float(inside[i]) == pytest.approx(float(seen[mask].sum()), abs=1e-5) and float(total[i]) == pytest.approx(float(seen.sum()), abs=1e-5)
    with pytest.raises(InputError, match="resize the mask"): mask_shares(tl, 1, mask[:-1])


def test_a_mask_of_one_frame_is_followed_through_all(thing):
    from camflow.gflow.edit import movers, propagate, select
    truth, tl = thing
    masks, numbers = propagate(tl, truth[0])
    overlap = [float((masks[t] & truth[t]).sum() / (masks[t] | truth[t]).sum()) for t in range(T)]
    assert min(overlap) > 0.7 and torch.isin(numbers, movers(tl)).float().mean() > 0.95
    assert len(select(tl, torch.zeros(SIZE))) == 0
    everything = select(tl, torch.ones(SIZE))
    assert len(everything) == len(torch.unique(torch.cat(tl.ids)))
    with pytest.raises(InputError, match="0 to 4"): select(tl, truth[0], 5)


def test_edits_change_what_they_name_and_nothing_else(thing, tmp_path):
    from camflow.gflow.edit import keep_only, move, movers, recolour, remove, save_plys, shares_of
    _, tl = thing
    numbers = movers(tl)
    gone, alone = remove(tl, numbers), keep_only(tl, numbers)
    for t in range(T):
        assert not torch.isin(gone.ids[t], numbers).any() and torch.isin(alone.ids[t], numbers).all() and len(gone.ids[t]) + len(alone.ids[t]) == len(tl.ids[t])
    assert float(shares_of(gone, numbers).max()) == 0 and remove(tl, torch.unique(torch.cat(tl.ids))).render(0).alpha_HW.max() == 0
    there = move(move(tl, numbers, (0.3, 0, 0.1), (0, 0, 40)), numbers, (-0.3, 0, -0.1))
    back = move(there, numbers, turn=(0, 0, -40))
    for t in (0, T - 1):
        assert torch.allclose(back.frames[t].means, tl.frames[t].means, atol=1e-5) and not torch.allclose(there.frames[t].means, tl.frames[t].means, atol=1e-2)
        rest = ~torch.isin(tl.ids[t], numbers)
        assert torch.equal(there.frames[t].means[rest], tl.frames[t].means[rest])
        unit = lambda q: q / q.norm(dim=1, keepdim=True)
        assert ((unit(back.frames[t].quats) * unit(tl.frames[t].quats)).sum(1).abs() > 1 - 1e-5).all()
    red = recolour(tl, numbers, (1, 0, 0), 1.)
    assert torch.equal(red.frames[2].colours[torch.isin(tl.ids[2], numbers)].unique(dim=0), torch.tensor([[1., 0, 0]]))
    assert torch.equal(remove(tl, numbers[:0]).frames[0].means, tl.frames[0].means)
    assert [p.name for p in save_plys(tmp_path, tl)] == [f"{n:05d}.ply" for n in tl.numbers]

"""The warped first frame: exact for a plane, near hides far, nothing is invented; and the tiny depth network."""
import pytest
import torch

from camflow.depth.mono import MonoNet, depth_errors, level_loss, load_mono, main, picture, save_mono
from camflow.files import InputError
from camflow.geometry.trajectory import orbit, pan, static
from camflow.wan.depth_warp import fill_far, pixel_rays, restore_detail, splat_depth, warp_frame, warp_latents
from camflow.wan.omnicam import camera_rays, tiny_omnicam, with_warp
from camflow.wan.omnicam_clips import lens
from camflow.wan.omnicam_train import open_camera, sample
from camflow.wan.vae import tiny_vae
from camflow.world.clips import HELD_OUT

K = lens((48, 80))[None].float()
torch.set_num_threads(1)


def smooth(seed=0): # a picture without fine detail
    coarse = torch.rand(1, 3, 6, 10, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(48, 80), mode="bicubic", align_corners=False).clamp(-1, 1)


def test_a_plane_moves_by_f_over_z():
    "A step of 0.5 m to the right at 4 m moves a wall by f/8 pixels to the left; what comes in at the right is marked."
    path = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1)
    path[0, 1, 0, 3] = 0.5
    image, shift = smooth(), 0.5 / 4 * float(K[0, 0]) * 80
    video, shown = warp_frame(image, torch.full((1, 48, 80), 4.0), path, K)
    u = torch.arange(80) + shift
    low = u.floor().long().clamp(max=78)
    expected = image[..., low] * (1 - (u - low)) + image[..., low + 1] * (u - low)
    inside = u <= 79
    assert (video[:, :, 1] - expected)[..., inside].abs().max() < 1e-4 and shown[0, 1][:, inside].all() and not shown[0, 1][:, u > 80.5].any()
    assert (video[:, :, 0] - image).abs().max() < 1e-5


def test_a_turn_does_not_depend_on_depth():
    path = torch.as_tensor(pan(15, 5))[None]
    near, far = (warp_frame(smooth(), torch.full((1, 48, 80), z), path, K)[0] for z in (2.0, 10.0))
    assert (near - far).abs().max() < 1e-3


def test_near_things_hide_far_ones_and_leave_marked_holes():
    "A red post in front of a blue wall: after a step to the right it has moved further left than the wall, and its old shadow is filled with wall."
    image, depth = torch.zeros(1, 3, 48, 80), torch.full((1, 48, 80), 10.0)
    image[:, 2], depth[:, :, 38:42] = 1.0, 3.0
    image[:, :, :, 37:43] = torch.tensor([1.0, 0, 0])[:, None, None]
    path = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1)
    path[0, 1, 0, 3] = 0.6
    video, shown = warp_frame(image, depth, path, K)
    row, move = video[0, :, 1, 24], 0.6 / 3 * float(K[0, 0]) * 80
    red = (row[0] > 0.5).nonzero().flatten()
    assert abs(float(red.float().mean()) - (39.5 - move)) < 0.6 and len(red) <= 7
    hole = ~shown[0, 1, 24, 5:70]
    assert 4 <= int(hole.sum()) <= 14 and (row[2, 5:70][hole] > 0.8).all()


def test_fill_takes_the_farthest_neighbour():
    depth = torch.full((1, 1, 3, 5), float("inf"))
    depth[..., 0], depth[..., 4] = 2.0, 9.0
    filled, source = fill_far(depth)
    assert filled[0, 0, 1].tolist() == [2, 2, 9, 9, 9] and source.view(3, 5)[1].tolist()[2] % 5 == 4
    far, _ = fill_far(depth, reach=1)
    assert far[0, 0, 1, 2] == 9                                  # beyond reach: the frame's farthest depth


def test_points_behind_the_camera_are_not_seen():
    path = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1)
    path[0, 1, 2, 3] = 5.0
    assert not splat_depth(torch.full((1, 48, 80), 4.0), path.float(), K).isfinite()[0, 1].any()
    video, shown = warp_frame(smooth(), torch.full((1, 48, 80), 4.0), path, K)
    assert video.isfinite().all() and not shown[0, 1].any()


@pytest.mark.parametrize("depth, words", [(torch.zeros(1, 48, 80), "not above 0"), (torch.full((1, 48, 80), float("nan")), "not above 0"), (torch.ones(1, 24, 40), "one size")])
def test_bad_depth(depth, words):
    with pytest.raises(InputError, match=words): warp_frame(smooth(), depth, torch.as_tensor(static(5))[None], K)


def test_latents_of_a_still_camera_are_those_of_a_still_video():
    from camflow.wan.vae import encode_video
    vae, image = tiny_vae(0).eval(), smooth()
    warp = warp_latents(vae, image, torch.full((1, 48, 80), 5.0), torch.as_tensor(static(5))[None], K)
    with torch.no_grad(): still = encode_video(vae, image[:, :, None].expand(-1, -1, 5, -1, -1).contiguous())
    torch.testing.assert_close(warp[:, :16], still, atol=1e-3, rtol=1e-3)
    assert (warp[:, 16] == 1).all()


def test_warp_and_rays_must_fit():
    rays = camera_rays(torch.as_tensor(orbit(20, 4.0, 9)), K[0], (6, 10))
    with pytest.raises(InputError, match="one path and one size"): with_warp(rays, torch.zeros(1, 17, 2, 6, 10))


def test_start_one_is_noise_and_a_start_near_zero_is_the_warp():
    model, g = tiny_omnicam(0, num_layers=1, image_dim=None, added_kv_proj_dim=None, camera_warp=True).eval(), torch.Generator().manual_seed(2)
    open_camera(model)
    image, warp, text, other = (torch.randn(1, *shape, generator=g) for shape in ((16, 3, 6, 10), (17, 3, 6, 10), (64, 64), (17, 3, 6, 10)))
    path = camera_rays(torch.as_tensor(orbit(20, 4.0, 9)), K[0], (6, 10))
    run = lambda start, warp=warp, seed=0: sample(model, image, with_warp(path, warp), text, None, 2, 3.0, 1.0, seed, start)
    assert torch.equal(run(1.0), sample(model, image, with_warp(path, warp), text, None, 2, 3.0))
    torch.testing.assert_close(run(1.0), run(1.0 - 1e-6), atol=1e-3, rtol=1e-3)        # all noise: the warp is no part of it
    torch.testing.assert_close(run(1e-6), warp[:, :16], atol=1e-3, rtol=1e-3)          # no noise left, and no way to go
    away = lambda start: float((run(start) - warp[:, :16]).square().mean())
    assert away(0.1) < away(0.5) < away(1.0)
    assert (run(0.5) - run(0.5, other)).abs().max() > 0.1 and (run(0.5) - run(0.5, seed=1)).abs().max() > 0.1
    for bad in (0.0, -0.1, 1.5):
        with pytest.raises(InputError, match="no noise level"): run(bad)
    plain = tiny_omnicam(0, num_layers=1, image_dim=None, added_kv_proj_dim=None).eval()
    with pytest.raises(InputError, match="camera_warp=False"): sample(plain, image, path, text, None, 2, 3.0, warp_start=0.5)


def test_detail_comes_back_only_where_the_video_agrees_and_the_first_frame_shows():
    from camflow.wan.vae import decode_latents, encode_video
    vae, g, path = tiny_vae(0).eval(), torch.Generator().manual_seed(4), torch.as_tensor(pan(20, 5))[None]
    image, depth = (smooth() + 0.3 * torch.randn(1, 3, 48, 80, generator=g)).clamp(-1, 1), torch.full((1, 48, 80), 5.0)
    warp, shown = warp_frame(image, depth, path, K)
    with torch.no_grad(): seen = decode_latents(vae, encode_video(vae, warp))
    put = lambda video, detail=0.16: restore_detail(vae, video, image, depth, path, K, detail)
    inside = torch.nn.functional.avg_pool2d(shown.float(), 3, 1, 1) == 1                                # with all neighbours shown; the frame's border counts as unseen
    assert inside.any() and not shown[:, -1].all() and (warp - seen).abs().mean() > 0.02
    where = inside[:, None].expand_as(seen)
    torch.testing.assert_close(put(seen)[where], warp[where], atol=1e-5, rtol=0)                       # the VAE's picture of the warp becomes the warp
    hidden = (torch.nn.functional.max_pool2d(shown.float(), 3, 1, 1) == 0)[:, None].expand_as(seen)
    assert hidden.any() and torch.equal(put(seen)[hidden], seen[hidden])                               # nothing is added where the first frame shows nothing
    other = seen.clone()
    other[:, :, :, 10:30, 20:50] += 1.5                                                                # something else is there
    assert (put(other) - other)[:, :, :, 12:28, 22:48].abs().max() < 1e-6
    assert torch.equal(put(other, 0.0), other)
    with pytest.raises(InputError, match="detail=-1"): put(seen, -1)


def test_directions_are_those_of_the_intrinsics():
    rays = pixel_rays(K, 48, 80)
    assert rays.shape == (1, 48, 80, 3) and torch.allclose(rays[0, 0, 0, :2] * K[0, :2] + K[0, 2:], torch.tensor([0.5 / 80, 0.5 / 48]))


# ---- depth

def test_shipped_depth_network_on_held_out_scenes():
    rows = [picture(HELD_OUT + 400_000 + i) for i in range(8)]
    errors = depth_errors(load_mono(), torch.stack([r["image"] for r in rows]), torch.stack([r["depth"].float() for r in rows]))
    assert errors["relative_error"] < 0.15 and errors["median_error_near"] < 0.08


def test_depth_training_learns_resumes_and_is_written(tmp_path):
    config = dict(steps=6, scenes=4, held_out=2, batch_size=2, validate_every=0, warmup=0)
    whole = main(config, tmp_path/"whole")
    for _ in range(7): pieces = main({**config, "max_seconds": 1e-9, "cache_folder": str(tmp_path/"whole/pictures")}, tmp_path/"pieces")
    assert whole.step == pieces.step == 6 and pieces.status == "done"
    a, b = (load_mono(tmp_path/name/"model").state_dict() for name in ("whole", "pieces"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(InputError, match="held out"): main({**config, "first_scene": HELD_OUT}, tmp_path/"bad")


def test_bad_networks(tmp_path):
    with pytest.raises(InputError, match="0 < near < far"): MonoNet(near=3.0, far=2.0)
    save_mono(MonoNet(), tmp_path/"a")
    (tmp_path/"a/config.json").write_text('{"model": "PoseNet"}')
    with pytest.raises(InputError, match="no MonoNet"): load_mono(tmp_path/"a")


def test_loss_is_least_at_the_truth_and_clamps_what_is_beyond():
    net, depth = MonoNet(), torch.full((1, 2, 2), 4.0)
    at = lambda z: level_loss((-(net.inverse - 1 / z).abs() * 400).view(1, -1, 1, 1).expand(1, -1, 2, 2), depth, net.inverse)
    assert at(4.0) < at(5.0) and at(4.0) < at(3.3)
    assert level_loss(torch.zeros(1, 24, 2, 2), torch.full((1, 2, 2), 99.0), net.inverse).isfinite()

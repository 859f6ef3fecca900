"Cameras in and out of every convention, the ten presets against ReCamMaster's own file, and what broken files say."
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.geometry import trajectory as tr
from camflow.geometry.align import align_poses, umeyama
from camflow.geometry.camera import Cameras, focal_K, write_unreal_json
from camflow.geometry.focal import focal_of_fov
from camflow.geometry.plucker import plucker, rays
from camflow.geometry.rigid import inverse, quaternion, rotation, se3_exp, se3_log, so3_exp, so3_log
from camflow.geometry.script import parse # which gives Cameras from_script, whichever tests ran before
from tests.parity import cameras as parity

GOLDENS = Path(__file__).parent / "goldens"
SHARED = Path(__file__).resolve().parents[2] / "shared"
UNREAL = GOLDENS / "real" / "camera_extrinsics.json"
SIZE = (48, 80)
close = lambda a, b, eps=1e-9: torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), atol=eps, rtol=0)


def randoms(seed, shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def path():
    "Far from the origin, off-centre, anisotropic: nothing can be right by symmetry."
    c2w = se3_exp(torch.cat([randoms(1, (9, 3)), 20 * randoms(2, (9, 3))], 1))
    K = focal_K(30, SIZE).repeat(9, 1, 1) + torch.diag(torch.tensor([0.0, 7, 0])).double()
    K[:, 0, 2] += torch.arange(9)
    K[:, 1, 2] -= 2.5
    return Cameras(c2w, K, SIZE)


# %% parity
@pytest.mark.parametrize("system, cases", [("recam_cameras", 4), ("rl", 3), ("da3", 5)])
def test_parity(system, cases):
    rows = parity.check(GOLDENS / system)
    assert len(rows) >= cases
    assert not [(name, row) for name, row in rows.items() if row[3] is not True]


@pytest.mark.parametrize("system", ["recam", "rl", "da3"])
def test_parity_shared(system):
    if not (SHARED / "goldens" / system).exists(): pytest.skip("the shared goldens are not beside the repository")
    rows = parity.check(SHARED / "goldens" / system)
    assert rows and all(row[3] is True for row in rows.values()), rows


def test_parity_notices_a_changed_input(tmp_path):
    for file in (GOLDENS / "recam_cameras").iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "camera_extrinsics_synthetic.json").read_text())
    text = data["frame8"]["cam02"].replace("] [", "],[").split(",")
    text[3] = "[" + " ".join(str(float(word) + 0.01) if i < 3 else word for i, word in enumerate(text[3].strip("[] ").split())) + "] "
    data["frame8"]["cam02"] = " ".join(text)
    (tmp_path / "camera_extrinsics_synthetic.json").write_text(json.dumps(data))
    metrics = json.loads((tmp_path / "pose_metrics_cami2v.json").read_text())
    metrics[0]["input"]["est_c2w"][5][0][3] += 1e-4
    (tmp_path / "pose_metrics_cami2v.json").write_text(json.dumps(metrics))
    rows = parity.check(tmp_path)
    assert rows["camera_synthetic"][3] is False and rows["pose_metrics_cami2v"][3] is False and rows["camera_parse_matrix"][3] is True


# %% conventions
def test_round_trips(path, tmp_path):
    close(Cameras.from_w2c(path.w2c, path.K, SIZE).c2w, path.c2w)
    close(Cameras.from_opengl(path.to_opengl(), path.K, SIZE).c2w, path.c2w)
    for ndc in (False, True):
        d = path.to_pytorch3d(ndc)
        back = Cameras.from_pytorch3d(d["R"], d["T"], d["focal_length"], d["principal_point"], SIZE, ndc)
        close(back.c2w, path.c2w)
        close(back.K, path.K)
    path[[8, 0, 3]].to_colmap(tmp_path)
    back = Cameras.from_colmap(tmp_path)
    assert back.frames.tolist() == [0, 3, 8] and back.size == SIZE
    close(back.c2w, path.c2w[[0, 3, 8]])
    close(back.K, path.K[[0, 3, 8]])
    path.to_realestate10k(tmp_path / "clip.txt")
    back = Cameras.from_realestate10k(tmp_path / "clip.txt", SIZE)
    close(back.c2w, path.c2w, 1e-8)
    close(back.K, path.K, 1e-8)
    write_unreal_json(tmp_path / "c.json", {"cam01": path, "cam02": path.relative(3)})
    close(Cameras.from_unreal_json(tmp_path / "c.json", "cam01", K=path.K, size=SIZE).c2w, path.c2w, 1e-8)
    close(Cameras.from_unreal_json(tmp_path / "c.json", 2, frames=[3, 4]).c2w, path.relative(3).c2w[3:5], 1e-8)


def test_pytorch3d_formula():
    "x_view = x_world R + T with x left, y up: a point to the right and above is at negative x, positive y."
    d = Cameras(torch.eye(4)[None], focal_K(24, SIZE), SIZE).to_pytorch3d()
    close(torch.tensor([[1.0, -2, 5]], dtype=torch.float64) @ d["R"][0] + d["T"][0], [[-1, 2, 5]])


def test_colmap_reads_simple_pinhole(tmp_path):
    (tmp_path / "cameras.txt").write_text("# comment\n1 SIMPLE_PINHOLE 80 48 70.5 40 24\n")
    (tmp_path / "images.txt").write_text("# two lines per image\n2 1 0 0 0 0.5 0 1 1 clip_0007.png\n1 2 3\n1 0 1 0 0 0 0 0 1 clip_0002.png\n\n")
    cameras = Cameras.from_colmap(tmp_path)
    assert cameras.frames.tolist() == [2, 7]
    close(cameras.c2w[1, :3, 3], [-0.5, 0, -1])
    close(cameras.K[0], [[70.5, 0, 40], [0, 70.5, 24], [0, 0, 1]])
    (tmp_path / "cameras.txt").write_text("1 OPENCV 80 48 70 70 40 24 0.1 0 0 0\n")
    with pytest.raises(InputError, match="OPENCV.*line 1.*undistort"): Cameras.from_colmap(tmp_path)
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 80 48 70 40 24\n")
    with pytest.raises(InputError, match="3 parameters of a lens PINHOLE, it has 4.*line 1"): Cameras.from_colmap(tmp_path)


@pytest.mark.parametrize("pattern", ("frame_{:05d}.jp2", "my frame {}.png", "left/{:03d}.v2", "frame.{:04d}"))
def test_colmap_frame_numbers_are_those_of_the_name(path, tmp_path, pattern):
    path[2:5].to_colmap(tmp_path, pattern)
    assert Cameras.from_colmap(tmp_path).frames.tolist() == [2, 3, 4]


def test_lie_groups_at_every_angle():
    for angle in (0, 1e-9, 1e-5, 1, 3.0, math.pi - 1e-6, math.pi):
        w = angle * torch.nn.functional.normalize(randoms(5, (20, 3)), dim=1)
        R = so3_exp(w)
        close(R.mT @ R, torch.eye(3).expand(20, 3, 3), 1e-12)
        close(so3_exp(so3_log(R)), R, 1e-9)
        close(rotation(quaternion(R)), R, 1e-12)
        T = se3_exp(torch.cat([w, randoms(6, (20, 3))], 1))
        close(se3_exp(se3_log(T)), T, 1e-8)
        if angle < 3.1: close(se3_exp(torch.cat([w, torch.ones(20, 3)], 1)), torch.linalg.matrix_exp(torch.cat([torch.cat([
            torch.stack([torch.stack([0 * w[:, 0], -w[:, 2], w[:, 1]], 1), torch.stack([w[:, 2], 0 * w[:, 0], -w[:, 0]], 1),
                         torch.stack([-w[:, 1], w[:, 0], 0 * w[:, 0]], 1)], 1), torch.ones(20, 3, 1)], 2), torch.zeros(20, 1, 4)], 1)), 1e-9)


def test_relative_is_independent_of_the_world(path):
    world = se3_exp(randoms(9, (1, 6)))[0]
    moved = Cameras(world @ path.c2w, path.K, SIZE)
    close(moved.relative().c2w, path.relative().c2w, 1e-9)
    close(moved.interpolate(33).relative().c2w, path.interpolate(33).relative().c2w, 1e-9)
    assert path.embedding(frames=range(0, 9, 4)).shape == (3, 12) and path.embedding().dtype == torch.float32
    close(path.embedding(path.c2w[4])[4], torch.eye(4)[:3].flatten(), 1e-6)


def test_interpolation_is_constant_speed_and_keeps_the_ends(path):
    two = path[[0, 5]].interpolate(11)
    steps = se3_log(inverse(two.c2w[:-1]) @ two.c2w[1:])
    close(steps, steps[:1].expand(10, 6), 1e-8)
    close(two.c2w[[0, -1]], path.c2w[[0, 5]], 1e-9)
    straight = path[[0, 5]].interpolate(3, linear=True)
    close(straight.c2w[1, :3, 3], path.c2w[[0, 5], :3, 3].mean(0), 1e-9)
    close(path.interpolate(9).c2w, path.c2w, 1e-9)
    assert len(path[:1].interpolate(4)) == 4


def test_projection_agrees_with_rays_and_resizing(path):
    origin, direction = rays(path)
    point = (origin[:, None, None] + 3.7 * direction)[:, 10, 20]  # the centre of pixel (row 10, column 20) at (20.5, 10.5)
    pixels, depth = path.project(point[:, None])
    close(pixels[:, 0], torch.tensor([[20.5, 10.5]]).expand(9, 2), 1e-8)
    close(path.unproject(pixels, depth)[:, 0], point, 1e-8)
    half = path.resize((24, 40))
    close(half.project(point[:, None])[0][:, 0], torch.tensor([[10.25, 5.25]]).expand(9, 2), 1e-8)
    close(path.crop(4, 6, (20, 20)).project(point[:, None])[0][:, 0], torch.tensor([[14.5, 6.5]]).expand(9, 2), 1e-8)
    assert plucker(path).shape == (9, 6, *SIZE) and plucker(path).dtype == torch.float32


def test_plucker_of_three_frames_crosses_the_right_axis(path):
    close(plucker(path[:3]), plucker(path)[:3], 1e-5)


# %% presets
@pytest.mark.parametrize("i", range(1, 11))
def test_presets_equal_the_released_file(i):
    "Six printed digits: half a unit of the last one is 5e-7 in the rotations and 0.005 cm in the positions."
    released = Cameras.from_unreal_json(UNREAL, i)
    assert len(released) == 81
    ours = tr.preset(i)
    close(released.relative().c2w[:, :3, :3], ours[:, :3, :3], 6e-7)
    close(released.relative().c2w[:, :3, 3], ours[:, :3, 3], 5.1e-5)
    for frames in (2, 5, 9, 17, 41, 161):
        close(tr.preset(i, frames)[-1], ours[-1], 1e-12)
    close(tr.preset(i, 21), ours[::4], 1e-12)
    assert tr.describe(released.c2w) == tr.PRESETS[i - 1]


def test_paths_start_at_the_identity_and_are_rigid():
    draw = torch.Generator().manual_seed(0)
    paths = [tr.preset(n, 9, scale=0.3, speed=1.5) for n in tr.PRESETS] + [tr.arc(-50, 3, 9), tr.orbit(360, 2, 13, elevation=30), tr.spiral(3, frames=40), tr.roll(10, 5),
             tr.static(4), tr.preset(3, 1), tr.chain(tr.pan(10, 5), tr.dolly(1, 5)), *(tr.random_trajectory(draw, 9, 15, 0.5) for _ in range(50))]
    for c2w in paths:
        Cameras(c2w, focal_K(24, SIZE), SIZE)
        close(c2w[0], torch.eye(4), 1e-9)


def test_random_paths_stay_in_bounds_and_differ():
    draw = torch.Generator().manual_seed(1)
    many = [tr.random_trajectory(draw, 9, 15, 0.5) for _ in range(200)]
    far = torch.tensor([float(c2w[:, :3, 3].norm(dim=1).max()) for c2w in many])
    assert far.max() <= 0.5 + 1e-9 and far.min() < 0.1 and far.std() > 0.1
    # smooth: no step is longer than a third of the path
    assert all((c2w[1:, :3, 3] - c2w[:-1, :3, 3]).norm(dim=1).max() < 0.5 for c2w in many)


def test_chain_continues_in_the_new_direction():
    c2w = tr.chain(tr.pan(90, 5), tr.dolly(2, 5))
    close(c2w[-1, :3, 3], [2, 0, 0], 1e-9)


def test_report_figure(tmp_path):
    figure = tr.plot_paths({name: tr.preset(name, 9) for name in tr.PRESETS[4:]}, "presets")
    figure.savefig(tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 5000


# %% what broken input says
@pytest.fixture
def data(): return json.loads(UNREAL.read_text())


def test_missing_camera_and_frame(data, tmp_path):
    broken = copy.deepcopy(data)
    del broken["frame7"]["cam03"]
    (tmp_path / "camera_extrinsics.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match="cam03.*camera_extrinsics.json, frame 7.*cam04"): Cameras.from_unreal_json(tmp_path / "camera_extrinsics.json", 3)
    assert len(Cameras.from_unreal_json(broken, 4)) == 81
    del broken["frame40"]
    with pytest.raises(InputError, match="frame 40 is missing.*frames="): Cameras.from_unreal_json(broken, 4)
    with pytest.raises(InputError, match="frame 1 is missing"): Cameras.from_unreal_json({k: v for k, v in data.items() if k != "frame1"}, 4) # not: every second one
    with pytest.raises(InputError, match="frame 40 is missing"): Cameras.from_unreal_json(broken, 4, frames=range(81))
    with pytest.raises(InputError, match="cam11"): Cameras.from_unreal_json(data, 11)
    with pytest.raises(InputError, match="not found"): Cameras.from_unreal_json(tmp_path / "nothing.json", 1)
    (tmp_path / "half.json").write_text('{"frame0": {"cam01": "[1 0')
    with pytest.raises(InputError, match="half.json.*damaged"): Cameras.from_unreal_json(tmp_path / "half.json", 1)


@pytest.mark.parametrize("text, says", [
    ("[1 0 0 0] [0 1 0 0] [0 0 1 0] [3 1 2] ", "15 numbers instead of 16.*frame 5"),
    ("[1 0 0 0] [0 1 0 0] [0 0 1 0] [3 1 2 1 7] ", "17 numbers"),
    ("[1 0 0 0] [0 one 0 0] [0 0 1 0] [3 1 2 1] ", "not a camera matrix.*frame 5"),
    ("[nan 0 0 0] [0 1 0 0] [0 0 1 0] [3 1 2 1] ", "NaN.*frame 5"),
    ("[1.2 0 0 0] [0 1.2 0 0] [0 0 1.2 0] [3 1 2 1] ", "not rigid.*frame 5"),
    ("[1 0 0 0] [0 1 0 0] [0 0 -1 0] [3 1 2 1] ", "mirrors.*frame 5"),
    ("[1 0 0 3] [0 1 0 1] [0 0 1 2] [0 0 0 1] ", "0 0 0 1.*frame 5"),
])
def test_broken_matrix_names_the_frame(data, text, says):
    data["frame5"]["cam01"] = text
    with pytest.raises(InputError, match=says): Cameras.from_unreal_json(data, 1)


def test_broken_realestate10k(tmp_path):
    lines = (GOLDENS / "real" / "0f68374b76390082.txt").read_text().splitlines()
    for change, says in ((lambda w: w[:-1], "18 numbers instead of 19.*line 4"), (lambda w: [*w[:9], "abc", *w[10:]], "abc.*line 4"),
                         (lambda w: [*w[:7], "nan", *w[8:]], "NaN.*frame 2"), (lambda w: [*w[:7], "9.0", *w[8:]], "not rigid.*frame 2")):
        (tmp_path / "clip.txt").write_text("\n".join([*lines[:3], " ".join(change(lines[3].split())), *lines[4:]]))
        with pytest.raises(InputError, match=says): Cameras.from_realestate10k(tmp_path / "clip.txt", SIZE)
    (tmp_path / "clip.txt").write_text(lines[0] + "\n")
    with pytest.raises(InputError, match="no poses"): Cameras.from_realestate10k(tmp_path / "clip.txt", SIZE)


@pytest.mark.parametrize("change, says", [(dict(K=[[1.2, 0, 0.5], [0, 1.6, 0.5], [0, 0, 1]]), "fractions of the picture"), (dict(K=[[100, 0, 0], [0, 100, 0], [48, 32, 1]]), "is K transposed"),
    (dict(K=[100, 100, 48, 32]), r"shape \(4,\) for 3 poses"), (dict(K=torch.eye(3).repeat(2, 1, 1)), r"shape \(2, 3, 3\) for 3 poses"), (dict(size=(0, 96)), "size"), (dict(c2w=[["a"]]), "not an array of numbers")])
def test_cameras_of_other_conventions(change, says):
    with pytest.raises(InputError, match=says): Cameras(**dict(c2w=torch.eye(4).repeat(3, 1, 1), K=[[100, 0, 48], [0, 100, 32], [0, 0, 1]], size=(64, 96)) | change)


def test_lists_are_not_rounded_on_the_way():
    pose = torch.eye(4, dtype=torch.float64)
    pose[0, 3] = 500_000.123
    assert Cameras(pose[None].tolist(), [[100, 0, 48], [0, 100, 32], [0, 0, 1]], (64, 96)).c2w[0, 0, 3].item() == 500_000.123


def test_camera_files_of_editors(tmp_path):
    path = tmp_path / "cameras.json"
    path.write_text(json.dumps({"frame0": {"cam01": "[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [7, 0, 0, 1]"}}), encoding="utf-8-sig")
    assert len(Cameras.from_unreal_json(path, 1)) == 1
    path.write_text('{"frame0": ["cam01"]}')
    with pytest.raises(InputError, match="a list instead of cameras by name"): Cameras.from_unreal_json(path, 1)
    with pytest.raises(InputError, match="Is a directory"): Cameras.from_unreal_json(tmp_path, 1)
    with pytest.raises(InputError, match="radians"): focal_of_fov(0.9, (64, 96))


def test_cameras_check_their_parts():
    eye = torch.eye(4)[None]
    with pytest.raises(InputError, match="positive focal"): Cameras(eye, torch.zeros(3, 3), SIZE)
    with pytest.raises(InputError, match="frame number"): Cameras(eye, focal_K(24, SIZE), SIZE, [0, 1])
    with pytest.raises(InputError, match="4x4"): Cameras(torch.eye(4), focal_K(24, SIZE), SIZE)
    with pytest.raises(InputError, match="frame 40"): Cameras(eye * 2, focal_K(24, SIZE), SIZE, [40])
    assert Cameras(eye[:, :3].numpy(), focal_K(24, SIZE).numpy(), SIZE).c2w.shape == (1, 4, 4)


def test_numpy_numbers_are_numbers(path):
    n = np.int64(3)
    assert path[n].frames.tolist() == [3] and len(path.relative(n)) == 9
    close(path.relative(n).c2w[3], torch.eye(4))
    text = "<starttime>0</starttime> <endtime>1</endtime> <speed>high</speed> <direction>left</direction> <rotate>stay</rotate>"
    assert Cameras.from_script(parse(text), SIZE, frames=np.int64(5)).frames.tolist() == [0, 1, 2, 3, 4]


def test_realestate10k_options_that_were_passed_over(path, tmp_path):
    with pytest.raises(InputError, match="3 time stamps for 9 poses"): path.to_realestate10k(tmp_path / "clip.txt", times=[0, 1, 2])
    path.to_realestate10k(tmp_path / "clip.txt")
    with pytest.raises(InputError, match="compat 'camera_ctrl'"): Cameras.from_realestate10k(tmp_path / "clip.txt", SIZE, compat="camera_ctrl")


def test_rigid_motions_stay_on_their_device():
    for made in (so3_exp(torch.zeros(2, 3, device="meta")), se3_exp(torch.zeros(2, 6, device="meta"))): assert made.is_meta


def test_umeyama_refuses_every_preset():
    for name in tr.PRESETS:
        w2c = inverse(tr.preset(name))
        with pytest.raises(InputError, match="no rotation is determined"): align_poses(w2c, w2c)
    with pytest.raises(InputError, match="shapes"): umeyama(torch.zeros(4, 3), torch.zeros(5, 3))


def test_parity_replays_a_folder_it_has_never_seen(tmp_path, data):
    "Other cameras, other sizes, no training pairs; the expected numbers by plain numpy."
    import numpy as np
    from safetensors.torch import save_file
    (tmp_path / "poses.json").write_text(json.dumps(data))
    c2w = []
    for i in range(81):
        rows = np.array([[float(v) for v in row.strip("[] ").split()] for row in data[f"frame{i}"]["cam07"].strip().split("] [")]).T[:, [1, 2, 0, 3]]
        rows[:3, 1] *= -1
        rows[:3, 3] /= 100
        c2w.append(rows)
    c2w = np.ascontiguousarray(np.stack(c2w))
    inference = (np.linalg.inv(c2w[0]) @ c2w[:9:4])[:, :3].reshape(1, 3, 12).astype(np.float32)
    save_file({"output.c2w": torch.from_numpy(c2w[None]), "output.inference": torch.from_numpy(inference),
               "output.inference_bf16": torch.from_numpy(inference).bfloat16().float()}, tmp_path / "seventh.safetensors")
    text = (GOLDENS / "real" / "0f68374b76390082.txt").read_text()
    (tmp_path / "clip.txt").write_text(text)
    table = np.array([[float(word) for word in line.split()] for line in text.splitlines()[1:8]])
    w2c = np.concatenate([table[:, 7:].reshape(-1, 3, 4), np.tile([[[0, 0, 0, 1.0]]], (7, 1, 1))], 1)
    H, W, h, w = 36, 64, 20, 20  # the video is wider than the sample: fx grows by (W/H)/(w/h)
    K = np.stack([table[:, 1] * w * (W / H) / (w / h), table[:, 2] * h, table[:, 3] * w, table[:, 4] * h], 1)
    relative = np.linalg.inv(np.linalg.inv(w2c[0])) @ np.linalg.inv(w2c)
    v, u = np.meshgrid(np.arange(h) + 0.5, np.arange(w) + 0.5, indexing="ij")
    local = np.stack([(u - K[:, 2, None, None]) / K[:, 0, None, None], (v - K[:, 3, None, None]) / K[:, 1, None, None], np.ones((7, h, w))], -1)
    d = np.einsum("tij,thwj->thwi", relative[:, :3, :3], local / np.linalg.norm(local, axis=-1, keepdims=True))
    rays_T6HW = np.concatenate([np.cross(np.broadcast_to(relative[:, None, None, :3, 3], d.shape), d), d], -1).transpose(0, 3, 1, 2)
    save_file({k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in {
        "input.flip": np.zeros(7, np.uint8), "output.w2c": w2c, "output.c2w": np.linalg.inv(w2c), "output.intrinsics_normalised": table[:, 1:5], "output.K_pixels": K,
        "output.c2w_relative": relative, "output.plucker": rays_T6HW.astype(np.float32)}.items()}, tmp_path / "clip_a.safetensors")
    (tmp_path / "cases.json").write_text(json.dumps({
        "seventh": {"kind": "cam", "config": {"cameras": [7], "train_pairs": False}, "json_input": "poses.json"},
        "clip_a": {"kind": "re10k", "config": {"size": [h, w], "original_size": [H, W], "zero_t_first_frame": True, "flip": False}, "text_input": "clip.txt"},
        "lost": {"kind": "cam", "config": {"cameras": [1]}, "json_input": "real/elsewhere/none.json"}, "net": {"kind": "dit"}}))
    (tmp_path / "lost.safetensors").write_bytes((tmp_path / "seventh.safetensors").read_bytes())
    rows = parity.check(tmp_path)
    assert {name: row[3] for name, row in rows.items()} == {"seventh": True, "clip_a": True, "lost": None}, rows

"Stereo sets: files, sets, annotations, download and augmentation, against the reference's figures and by round trips."
import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.data import stereo_files as sf
from camflow.files import InputError

torch.set_num_threads(1)
HERE = Path(__file__).parent
FOLDERS = [HERE / "goldens" / "stereo", HERE.parent.parent / "shared" / "goldens" / "stereo"]


def golden(name):
    "Path of a golden file, or a skip that says why."
    for folder in FOLDERS:
        if (folder / name).exists(): return folder / name
    reason = f"{name} is neither in tests/goldens/stereo nor in ../shared/goldens/stereo"
    print(reason)
    pytest.skip(reason)


def cases(name):
    "(input, output) of a golden JSON file."
    return [(case["input"], case["output"]) for case in json.loads(golden(name).read_text())["cases"]]


def numbers(nested):
    "float64 array of nested lists in which nan, inf and -inf are strings."
    if isinstance(nested, list): return np.array([numbers(v) for v in nested])
    return float(nested)


# ---- files
def test_pfm_golden():
    for given, wanted in cases("pfm.json"):
        raw = base64.b64decode(given["file_base64"])
        if "error" in wanted:
            with pytest.raises(InputError): sf.parse_pfm(raw)
            continue
        array = numbers(wanted["array"])
        found = sf.parse_pfm(raw)
        assert np.array_equal(found.double().numpy(), array[None] if array.ndim == 2 else array.transpose(2, 0, 1)), given["case"]
        for little in (True, False): assert torch.equal(sf.parse_pfm(sf.pfm_bytes(found, little)), found)


def test_depth_png_golden(tmp_path):
    for given, wanted in cases("depth_png_decode.json"):
        (tmp_path / "d.png").write_bytes(base64.b64decode(given["png_base64"]))
        assert sf.read_png16(tmp_path / "d.png").reshape(-1).tolist() == given["uint16"]
        depth = sf.read_replica_depth(tmp_path / "d.png")
        assert np.array_equal(depth.double().numpy().reshape(-1), numbers(wanted["depth"]), equal_nan=True)
        sf.write_replica_depth(tmp_path / "again.png", depth)
        assert sf.read_png16(tmp_path / "again.png").reshape(-1).tolist() == given["uint16"]


def test_sintel_golden(tmp_path):
    for given, wanted in cases("sintel_disparity.json"):
        sf.write_image(tmp_path / "d.png", torch.tensor(given["disparity_rgb"], dtype=torch.uint8).permute(2, 0, 1))
        sf.write_mask(tmp_path / "o.png", torch.tensor(given["occlusion"], dtype=torch.uint8)[None])
        disparity, valid = sf.read_sintel(tmp_path / "d.png", tmp_path / "o.png")
        assert disparity[0].double().tolist() == wanted["disparity"] and valid[0].tolist() == wanted["valid"]
        sf.write_sintel(tmp_path / "again.png", disparity)
        assert torch.equal(sf.read_image(tmp_path / "again.png"), sf.read_image(tmp_path / "d.png"))


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 16)])
def test_round_trips(tmp_path, size):
    generator = torch.Generator().manual_seed(size[1])
    disparity = torch.rand(1, *size, generator=generator) * 200 + 0.01
    sf.write_pfm(tmp_path / "a.pfm", disparity)
    assert torch.equal(sf.read_disparity(tmp_path / "a.pfm")[0], disparity)
    sf.write_kitti(tmp_path / "k.png", disparity)
    assert (sf.read_kitti(tmp_path / "k.png")[0] - disparity).abs().max() <= 0.5 / 256
    sf.write_sintel(tmp_path / "s.png", disparity)
    assert (sf.read_sintel(tmp_path / "s.png")[0] - disparity).abs().max() <= 0.5 / 16384
    sf.write_vkitti_depth(tmp_path / "v.png", disparity)
    assert (sf.read_vkitti_depth(tmp_path / "v.png")[0] - disparity).abs().max() <= 0.0051
    sf.write_replica_depth(tmp_path / "r.png", disparity)
    assert torch.equal(sf.read_replica_depth(tmp_path / "r.png"), disparity.half().float())
    flow = (torch.rand(2, *size, generator=generator) - 0.5) * 40
    sf.write_replica_flow(tmp_path / "f.png", flow)
    assert torch.equal(sf.read_replica_flow(tmp_path / "f.png"), flow.half().float())


def test_bad_files(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    for read in (sf.read_image, sf.read_png16, sf.read_kitti, sf.read_sintel, sf.read_replica_depth, sf.read_mask):
        with pytest.raises(InputError, match="x.png"): read(tmp_path / "x.png")
        with pytest.raises(InputError, match="does not exist"): read(tmp_path / "absent.png")
    sf.write_png16(tmp_path / "deep.png", np.full((2, 3), 300, np.uint16))
    with pytest.raises(InputError, match="16 or 32 bits"): sf.read_image(tmp_path / "deep.png")
    sf.write_image(tmp_path / "flat.png", torch.zeros(1, 2, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="not 16-bit"): sf.read_kitti(tmp_path / "flat.png")
    with pytest.raises(InputError, match="odd"): sf.read_replica_flow(tmp_path / "deep.png")
    sf.write_image(tmp_path / "rgb.png", torch.zeros(3, 2, 3, dtype=torch.uint8))
    sf.write_mask(tmp_path / "wide.png", torch.zeros(1, 2, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="mask of"): sf.read_sintel(tmp_path / "rgb.png", tmp_path / "wide.png")
    with pytest.raises(InputError, match="row 0, column 1"): sf.write_kitti(tmp_path / "k.png", torch.tensor([[1.0, 256.0]]))
    assert not (tmp_path / "k.png").exists() and not list(tmp_path.glob(".*.tmp"))



# ---- sets
def test_sceneflow_sampling_golden():
    from camflow.data.stereo_sets import sceneflow_windows, validation_sequences
    for given, wanted in cases("sceneflow_sampling.json"):
        if given["kind"] == "append_sample":
            assert sceneflow_windows(given["n_frames"], given["sample_len"], "reference") == wanted["samples"]
            ours = sceneflow_windows(given["n_frames"], given["sample_len"])
            n, L = given["n_frames"], given["sample_len"]
            assert len(ours) == 2 * max(0, n - L + 1) and all(a == b[::-1] for a, b in zip(ours[::2], ours[1::2]))
        else: assert validation_sequences(given["n_sequences"]) == wanted["validation_indices_sorted"]


def test_replica_chunks_golden():
    from camflow.data.dynamic_replica import chunks
    for given, wanted in cases("dynamic_replica_chunks.json"):
        options = given["sample_len"], given["only_first_n_samples"]
        found = [[name, rows] for name, n in given["sequences"].items() for rows in chunks(n, *options, compat="reference")]
        assert found == wanted.get("samples", [])
        for n in given["sequences"].values(): # ours loses no frame
            ours = sum(chunks(n, options[0]), [])
            assert ours == list(range(n))


def test_camera_opencv_golden():
    from camflow.data.dynamic_replica import camera_viewpoint, depth_to_disparity, disparity_scale, viewpoint_camera
    for given, wanted in cases("camera_opencv.json"):
        if "error" in wanted:
            with pytest.raises(ValueError, match="intrinsics_format"): viewpoint_camera({"R": np.eye(3).tolist(), "T": [0, 0, 0], "focal_length": [1, 1], "principal_point": [0, 0], **given}, (4, 4))
            continue
        rows = [{"viewpoint": {**{k: given[k] for k in ("R", "focal_length", "principal_point", "intrinsics_format")}, "T": given[f"T_{eye}"]},
                 "image": {"size": given["size_hw"]}, "sequence_name": "golden", "frame_number": 0} for eye in ("left", "right")]
        for eye, row in zip(("left", "right"), rows):
            K, w2c = viewpoint_camera(row["viewpoint"], given["size_hw"])
            for found, name in ((K, "K"), (w2c[:3, :3], "R"), (w2c[:3, 3], "t")): assert np.allclose(found, wanted[f"{name}_{eye}"], atol=1e-6, rtol=3e-7), name
            back = viewpoint_camera(camera_viewpoint(K, w2c, given["size_hw"], given["intrinsics_format"]), given["size_hw"])
            assert torch.allclose(back[0], K) and torch.allclose(back[1], w2c)
            if eye == "left":
                points = torch.tensor(given["world_points"], dtype=torch.float64) @ w2c[:3, :3].mT + w2c[:3, 3]
                pixels = points @ K.mT
                assert np.allclose(torch.cat([pixels[:, :2] / pixels[:, 2:], points[:, 2:]], 1), wanted["aux_projection_u_v_z"], rtol=1e-6)
        scale = disparity_scale(*rows)
        assert abs(scale / wanted["depth_to_disparity_scale"] - 1) < 1e-6
        assert np.allclose(depth_to_disparity(torch.tensor(given["depths"], dtype=torch.float64), scale)[0], wanted["disparities"], rtol=1e-6)


def test_replica_dataset_golden(tmp_path):
    from safetensors import safe_open
    from camflow.data.dynamic_replica import DynamicReplica
    with safe_open(golden("dynamic_replica_dataset.safetensors"), "pt") as file:
        meta = file.metadata()
        data = {key: file.get_tensor(key) for key in file.keys()}
    for key, value in data.items():
        if key.startswith("file."):
            path = tmp_path / key[5:]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value.numpy().tobytes())
    found = DynamicReplica(tmp_path, meta["split"], int(meta["sample_len"]), int(meta["only_first_n_samples"]), ("disparity", "right", "mask"), compat="reference")
    assert len(found) == int(meta["n_samples"]) and found.names == json.loads(meta["sequences_in_list"])
    source, frames = found.samples[0]
    clip = found[0]
    wanted = {key[7:]: value for key, value in data.items() if key.startswith("output.")}
    assert torch.equal(torch.stack([clip.left.data, clip.right.data], 1).float(), wanted["img"].float())
    scale = clip.rig.fx * clip.rig.baseline
    for eye, (disparity, valid) in enumerate(((clip.disparity, clip.valid), (clip.extras["right_disparity"], clip.extras["right_valid"]))):
        raw = torch.stack([source.disparity_of(i, eye, scale)[0] for i in frames])
        assert torch.allclose(raw, -wanted["disp"][:, eye], rtol=1e-6, atol=0, equal_nan=True)       # as the reference stores it, NaN and all
        assert torch.equal(valid[:, 0], wanted["valid_disp"][:, eye] > 0.5)
        assert torch.allclose(disparity[valid], -wanted["disp"][:, eye][valid], rtol=1e-6, atol=0)
        assert torch.isfinite(disparity).all() and not disparity[~valid].any()                       # ours: nothing where nothing is known
    assert clip.unusable["nan"] and clip.unusable["valid"] == int(wanted["valid_disp"][:, 0].sum())
    for eye, name in enumerate(("mask", "right_mask")): assert torch.allclose(clip.extras[name][:, 0] / 255, wanted["mask"][:, eye])
    K, R, t = clip.rig.K_left, *(torch.linalg.inv(clip.extras["c2w"][0])[:3].split([3, 1], 1))
    for ours, name in ((K, "K_left0"), (R, "R_left0"), (t[:, 0], "t_left0")): assert torch.allclose(ours, wanted[name][0].double(), atol=1e-6)
    assert [len(c) for c in DynamicReplica(tmp_path, meta["split"], int(meta["sample_len"]))] == [3, 2, 2]

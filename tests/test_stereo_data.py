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


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


# ---- download
class _Server:
    "A local file server with faults: `faults[path]` is a list of things to do, one per request, then it behaves."
    def __init__(self, files):
        import threading
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
        self.files, self.faults, self.asked, self.tags = files, {}, [], {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_HEAD(self): self.answer(False)
            def do_GET(self): self.answer(True)

            def answer(self, body):
                path, span = self.path.split("?")[0], self.headers.get("Range")
                fault = outer.faults.get(path, []).pop(0) if body and outer.faults.get(path) else None
                data = outer.files.get(path)
                if body: outer.asked.append((path, span, fault))
                if data is None or isinstance(fault, int) and fault >= 400:
                    self.send_response(404 if data is None else fault)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                tag = outer.tags.get(path, '"one"')
                start = int(span[6:-1]) if span and self.headers.get("If-Range") == tag and fault != "no range" else 0
                if span and start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206 if start else 200)
                if start: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                if tag: self.send_header("ETag", tag)
                self.end_headers()
                if not body: return
                rest = data[start:] if fault != "garbage" else bytes(len(data) - start)
                self.wfile.write(rest[:fault] if isinstance(fault, int) else rest) # fewer bytes than promised: a broken connection

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    content = np.random.default_rng(0).bytes(20_000)
    one = _Server({"/a.zip": content})
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_download_resumes_a_broken_connection(server, tmp_path):
    import hashlib
    from camflow.data.download import Link, fetch
    content = server.files["/a.zip"]
    link = Link(f"{server.base}/a.zip?token=secret", "a.zip", len(content), hashlib.sha256(content).hexdigest())
    server.faults["/a.zip"] = [399, 399, 503, 1]
    seen = []
    assert fetch(link, tmp_path, wait=0.01, progress=lambda *a: seen.append(a)).read_bytes() == content
    assert [span for _, span, _ in server.asked] == [None, "bytes=399-", "bytes=798-", "bytes=798-", "bytes=799-"] and seen[-1] == ("a.zip", 20_000, 20_000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]
    count = len(server.asked)
    assert fetch(link, tmp_path).exists() and len(server.asked) == count  # there already: not asked again
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(InputError, match="1 bytes instead of 20000"): fetch(link, tmp_path)


def test_download_gives_up_and_continues_later(server, tmp_path):
    from camflow.data.download import Link, fetch
    link = Link(f"{server.base}/a.zip", "a.zip")
    server.faults["/a.zip"] = [300] + [0] * 4
    with pytest.raises(InputError, match="continues at byte 300"): fetch(link, tmp_path, retries=2, wait=0.01)
    server.faults["/a.zip"] = []
    assert fetch(link, tmp_path).read_bytes() == server.files["/a.zip"] and server.asked[-1][1] == "bytes=300-"


def test_download_never_mixes_versions(server, tmp_path):
    from camflow.data.download import Link, fetch
    link = Link(f"{server.base}/a.zip", "a.zip")
    for change in ("new version", "no range"):
        server.faults["/a.zip"] = [301] + [0] * 3
        with pytest.raises(InputError): fetch(link, tmp_path, retries=1, wait=0.01)
        server.faults["/a.zip"] = []
        if change == "new version": server.files["/a.zip"], server.tags["/a.zip"] = server.files["/a.zip"][::-1], '"two"'
        else: server.faults["/a.zip"] = ["no range"]
        assert fetch(link, tmp_path).read_bytes() == server.files["/a.zip"]
        (tmp_path / "a.zip").unlink()


def test_download_checksums_and_refusals(server, tmp_path):
    import hashlib
    from camflow.data.download import Link, fetch
    content, url = server.files["/a.zip"], f"{server.base}/a.zip"
    server.faults["/a.zip"] = ["garbage"]  # once wrong, then right
    assert fetch(Link(url, "a.zip", md5=hashlib.md5(content).hexdigest()), tmp_path / "once", wait=0.01).read_bytes() == content
    with pytest.raises(InputError, match="sha256 .* twice"): fetch(Link(url, "a.zip", sha256="0" * 64), tmp_path / "never", wait=0.01)
    assert not (tmp_path / "never" / "a.zip").exists()
    with pytest.raises(InputError, match="offers 20000 bytes, the list says 5"): fetch(Link(url, "a.zip", 5), tmp_path / "size", wait=0.01)
    with pytest.raises(InputError, match="404.*check the link"): fetch(Link(f"{server.base}/b.zip", "b.zip"), tmp_path / "absent")
    server.faults["/a.zip"] = [403]
    with pytest.raises(InputError, match="fresh links.json"): fetch(Link(f"{url}?key=secret", "a.zip"), tmp_path / "expired")
    with pytest.raises(InputError, match="gave up after 2"): fetch(Link("http://127.0.0.1:9/a.zip", "a.zip"), tmp_path / "down", retries=1, wait=0.01)


def test_download_splits(server, tmp_path, monkeypatch, capsys):
    import io
    import shutil
    import zipfile
    from camflow.data import download as dl
    for name, inside in (("/r0.zip", "real/one.txt"), ("/r1.zip", "two.txt")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive: archive.writestr(inside, name)
        server.files[name] = buffer.getvalue()
    (tmp_path / "links.json").write_text(json.dumps({"real": [f"{server.base}/r0.zip", f"{server.base}/r1.zip"], "train": {"t.zip": f"{server.base}/a.zip"}}))
    dl.main(["--links", str(tmp_path / "links.json"), "--folder", str(tmp_path / "set"), "--remove"])
    assert sorted(p.name for p in (tmp_path / "set" / "real").iterdir()) == ["one.txt", "two.txt"] and not list((tmp_path / "set" / "archives" / "real").glob("*.zip"))
    assert "real: 2 files" in capsys.readouterr().out
    asked = len(server.asked)
    assert dl.download(tmp_path / "links.json", tmp_path / "set")[0]["files"] == 0 and len(server.asked) == asked
    free = type("Usage", (), {"free": 10**12})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="1.8 TB needed.*1 TB free"): dl.download(tmp_path / "links.json", tmp_path / "set", ["train"])
    with pytest.raises(InputError, match="it has real, train"): dl.download(tmp_path / "links.json", tmp_path / "set", ["tset"])
    with pytest.raises(SystemExit): dl.main(["--links", str(tmp_path / "absent.json")])

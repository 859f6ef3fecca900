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


# ---- clips and sources
def _write(folder, names, size=(6, 8), seed=0):
    for i, name in enumerate(names): sf.write_image(folder / name, torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + i)))


@pytest.mark.parametrize("left,right,message", [
    (["0001.png", "0002.png", "0003.png"], ["0001.png", "0003.png"], "3 left frames, 2 right frames: the right view lacks frame 2"),
    (["0001.png", "0002.png", "0004.png"], ["0001.png", "0002.png", "0004.png"], "frame 3 missing"),
    (["0001.png", "1.png"], ["0001.png", "1.png"], "both frame 1"),
    (["a.png", "b.png"], ["a.png", "b.png"], "no frame number"),
    (["0001.png", "0002.png"], ["0003.png", "0004.png"], "right view lacks frames 1, 2 and the left view lacks frames 3, 4"),
])
def test_folders_that_do_not_fit(tmp_path, left, right, message):
    from camflow.data.stereo_clip import open_stereo
    _write(tmp_path / "left", left)
    _write(tmp_path / "right", right)
    with pytest.raises(InputError, match=message): open_stereo(tmp_path)


def test_folder_order_and_sizes(tmp_path):
    from camflow.data.stereo_clip import open_stereo
    names = [f"{i}.png" for i in (10, 9, 11)]
    _write(tmp_path / "left", names)
    _write(tmp_path / "right", names, seed=9)
    source = open_stereo(tmp_path)
    assert source.numbers == [9, 10, 11] and torch.equal(source[0].left.data[0], sf.read_image(tmp_path / "left" / "9.png"))
    assert len(list(source)) == 3 and source[1:].left.data.shape[0] == 2 and source.rig([0]) is None
    _write(tmp_path / "right", ["11.png"], size=(6, 9))
    assert len(source.check()) == 1
    with pytest.raises(InputError, match="11.png is"): source.load()
    (tmp_path / "right" / "11.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="11.png"): source.load([2])
    assert len(source.load([0, 1])) == 2  # the others can still be read
    (tmp_path / "K.txt").write_text("10 0 4 0 10 3 0 0 1\n0.1\n")
    assert abs(open_stereo(tmp_path)[0].rig.baseline - 0.1) < 1e-12
    (tmp_path / "calib.txt").write_text("")
    with pytest.raises(InputError, match="2 calibration files"): open_stereo(tmp_path)


def test_nan_truth_is_counted(tmp_path):
    from camflow.data.stereo_clip import StereoClip
    from camflow.media.frames import Frames
    frames = Frames(torch.zeros(1, 3, 2, 3, dtype=torch.uint8), "byte")
    truth = torch.tensor([[[[1.0, float("nan"), float("inf")], [0.0, -1.0, 2.0]]]])
    clip = StereoClip(frames, frames, truth, torch.ones_like(truth, dtype=torch.bool))  # a mask that lies
    assert clip.valid.sum() == 4 and clip.unusable == {"pixels": 6, "valid": 4, "nan": 1, "infinite": 1, "not_positive": 2, "other": 0}
    assert torch.isfinite(clip.disparity).all()


def test_bad_annotations(tmp_path):
    import gzip
    from camflow.data.dynamic_replica import DynamicReplica, annotation, camera_viewpoint, read_annotations, write_annotations
    view = camera_viewpoint([[10, 0, 4], [0, 10, 3], [0, 0, 1]], torch.eye(4), (6, 8))
    row = annotation("cat", "left", 0, "a.png", (6, 8), view)
    path = tmp_path / "valid" / "frame_annotations_valid.jgz"
    write_annotations(path, [row])
    with pytest.raises(InputError, match="looked in"): DynamicReplica(tmp_path)
    for rows, word in (([], "0 entries"), ({"a": 1}, "a dict"), ([row, 3], "row 1"), ([{**row, "viewpoint": {**view, "R": [[0] * 3] * 3}}], "no camera"), ([{**row, "sequence_name": 4}], "row 0 .4, left, frame 0")):
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        with pytest.raises(InputError, match=word): read_annotations(path)
    path.write_bytes(gzip.compress(json.dumps([row, 3]).encode()))
    rows, skipped = read_annotations(path, skip_bad=True)
    assert rows == [row] and len(skipped) == 1
    for raw in (b"", b"\x1f\x8bxx", b"[1,"):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="download it again"): read_annotations(path)
    with pytest.raises(InputError, match="do not exist"): DynamicReplica(tmp_path, "test")


# ---- truth
def test_truth_filter_on_the_world():
    from camflow.data.stereo_clip import StereoClip
    from camflow.data.stereo_truth import clean_truth, truth_report
    from camflow.media.frames import Frames
    from camflow.world.clips import HELD_OUT
    from camflow.world.stereo_clips import stereo_clip
    world = stereo_clip(HELD_OUT + 1, "tiny", size=(48, 160), frames=4, both=True)
    everywhere = torch.ones_like(world.valid)

    def clip(disparity, **extras): return StereoClip(Frames(world.left, "byte"), Frames(world.right, "byte"), disparity, world.valid, extras=extras)
    eyes, motion = {"right_disparity": world.right_disparity, "right_valid": everywhere}, {"flow": world.flow, "flow_occlusion": world.flow_occlusion}
    assert {row.status for row in truth_report(clip(world.disparity, **eyes, **motion))} == {"ok"}  # exact truth is never accused
    broken = world.disparity.clone()
    broken[0] = broken[0].flatten()[torch.randperm(broken[0].numel(), generator=torch.Generator().manual_seed(0))].reshape(broken[0].shape) * 2
    for extras in (eyes, motion, eyes | motion):
        cleaned, report = clean_truth(clip(broken, **extras))
        assert [row.status for row in report] == ["broken", "ok", "ok", "ok"], sorted(extras)
        assert not cleaned.valid[0].any() and cleaned.valid[1:].float().mean() > 0.97 * float(world.valid[1:].float().mean())
    from camflow.world.stereo_write import as_clip
    for whole in (clip(world.disparity, **motion), as_clip(world)):                                # T - 1 steps; T entries, the last unknown, and the other eye
        assert {row.status for row in truth_report(whole)} == {"ok"}
        part, gaps = truth_report(whole[1:3]), whole[::2]
        assert part[0].steps[1] == truth_report(whole)[1].steps[1] and "flow" not in {**gaps.extras, **whole[[-1, 0]].extras} and torch.equal(whole[1:3].extras["flow"][0], world.flow[1])
        masked = whole[torch.arange(4) % 2 == 1]
        assert len(masked) == 2 and torch.equal(masked.disparity, world.disparity[[1, 3]])
        assert all(step != step for row in truth_report(gaps) for step in row.steps)               # nobody compares two steps with the flow of one
    wall = world.disparity.clone()
    wall[2, :, :12] *= 2
    cleaned, report = clean_truth(clip(wall, **eyes))
    assert report[2].status != "ok" and cleaned.valid[2, :, :12].float().mean() < 0.7 and cleaned.valid[1].float().mean() > 0.97


def test_world_clips_come_back_from_every_layout(tmp_path):
    from camflow.data.dynamic_replica import WANTED
    from camflow.data.stereo_sets import DynamicReplica, SceneFlow, Sintel, open_stereo
    from camflow.data.stereo_truth import Checked
    from camflow.world.clips import HELD_OUT
    from camflow.world.stereo_clips import stereo_clip
    from camflow.world.stereo_write import write_dynamic_replica, write_folders, write_sceneflow, write_sintel_stereo
    world = stereo_clip(HELD_OUT + 3, "tiny", size=(32, 96), frames=3, both=True)
    write_sceneflow(tmp_path / "sf", [world], split="test")
    write_sintel_stereo(tmp_path / "si", [world])
    write_dynamic_replica(tmp_path / "dr", [world])
    write_folders(tmp_path / "own", world)
    replica = DynamicReplica(tmp_path / "dr", want=WANTED)
    for clip, tolerance in ((SceneFlow(tmp_path / "sf", split="test")[0], 0), (Sintel(tmp_path / "si")[0], 1 / 16384), (replica[0], 0.02)):
        assert torch.equal(clip.left.data, world.left) and torch.equal(clip.right.data, world.right)
        assert (clip.disparity - world.disparity)[clip.valid & world.valid].abs().max() <= tolerance
    clip = replica[0]
    assert clip.extras["flow"].shape[0] == 3 and abs(clip.rig.baseline - world.baseline) < 1e-5 and torch.allclose(clip.extras["c2w"], torch.as_tensor(world.c2w), atol=1e-6)
    checked = Checked(replica)
    assert len(list(checked)) == 1 and "0 broken" in checked.summary()
    assert torch.equal(open_stereo(tmp_path / "own")[:].right.data, world.right) and replica.check() == []


def test_videos(tmp_path):
    from camflow.data.stereo_clip import open_stereo
    from camflow.media.frames import Frames
    from camflow.media.video import write_video
    ramp = torch.linspace(0, 200, 5 * 32 * 64).reshape(5, 1, 32, 64)
    left, right = (Frames((ramp * k).byte().expand(-1, 3, -1, -1), "byte", 10) for k in (0.5, 1.0))
    for name, frames in (("l", left), ("r", right), ("short", right[:3]), ("small", right.resize((32, 32))), ("both", Frames(torch.cat([left.data, right.data], -1), "byte", 10))):
        write_video(tmp_path / f"{name}.mp4", frames, lossless=True)
    pair, packed = open_stereo(tmp_path / "l.mp4", tmp_path / "r.mp4"), open_stereo(tmp_path / "both.mp4", layout="side-by-side", swap=True)
    assert len(pair) == len(packed) == 5 and pair.size == packed.size == (32, 64) and abs(pair.fps - 10) < 1e-6
    assert (pair[1:4].left.data.int() - packed[1:4].right.data.int()).abs().max() <= 3  # the eyes are exchanged
    lefts, rights = pair.eyes()
    assert sum(len(a) for a, b in zip(lefts, rights)) == 5
    with pytest.raises(InputError, match="left has 5 frames, right 3"): open_stereo(tmp_path / "l.mp4", tmp_path / "short.mp4")
    with pytest.raises(InputError, match="one size"): open_stereo(tmp_path / "l.mp4", tmp_path / "small.mp4")
    with pytest.raises(InputError, match="say layout"): open_stereo(tmp_path / "both.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="bad.mp4"): open_stereo(tmp_path / "bad.mp4", layout="top-bottom")


# ---- augmentation
def test_augmentation_plans_and_ranges():
    from camflow.stereo.augment import Augment, draw_plan
    settings = Augment()  # the published command
    plans = [draw_plan(5, (540, 960), settings, torch.Generator().manual_seed(i)) for i in range(300)]
    assert plans[7] == draw_plan(5, (540, 960), settings, torch.Generator().manual_seed(7)) and plans[7] != plans[8]
    heights, widths = (torch.tensor([p["resized"][i] / n for p in plans]) for i, n in ((0, 540), (1, 960)))
    assert heights.min() >= 392 / 540 - 0.01 and heights.max() <= 2 ** 0.6 + 0.01 and widths.min() >= 2 ** -0.4 - 0.01
    for p in plans:
        (h, w), (y, x) = p["resized"], p["crop"]
        assert h >= 392 and w >= 520 and all(0 <= y + d and y + d + 384 <= h for d in p["slips"]) and 0 <= x and x + 512 <= w
    looks = [look for p in plans for look in p["looks"]]
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0, 1.4), ("hue", -0.16, 0.16)):
        values = torch.tensor([look[name] for look in looks])
        assert low - 1e-6 <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high + 1e-6
    share = sum(len(p["looks"]) > 1 for p in plans) / len(plans)
    boxes = [box for p in plans for boxes in p["erasers"][5:] for box in boxes]
    assert 0.13 < share < 0.28 and {len(p["slips"]) for p in plans} == {5} and {d for p in plans for d in p["slips"]} == {-2, -1, 0, 1, 2}
    assert not any(p["erasers"][t] for p in plans for t in range(5)) and min(b[2] for b in boxes) == 50 and max(b[3] for b in boxes) == 99
    assert 0.45 < sum(bool(b) for p in plans for b in p["erasers"][5:]) / 1500 < 0.55
    small = draw_plan(2, (20, 30), Augment(size=(24, 40)), torch.Generator().manual_seed(0))  # smaller than the crop: enlarged
    assert small["resized"][0] >= 32 and small["resized"][1] >= 48


def test_augmentation_keeps_the_truth():
    from camflow.data.stereo_truth import _difference
    from camflow.stereo.augment import Augment, augment, mirror, upside_down
    from camflow.world.clips import HELD_OUT
    from camflow.world.stereo_clips import stereo_clip
    world = stereo_clip(HELD_OUT + 2, "tiny", size=(64, 160), frames=3, both=True)
    clip = {"left": world.left, "right": world.right, "disparity": world.disparity, "valid": world.valid & ~world.occlusion, "right_disparity": world.right_disparity,
            "right_valid": torch.ones_like(world.valid), "flow": world.flow, "visible": ~world.flow_occlusion}
    plain = dict(size=(48, 96), brightness=0, contrast=0, saturation=(1, 1), hue=0, erase=0, yjitter=0)
    median = lambda c: max(_difference(l.float().mean(0, True), r.float().mean(0, True), d, v) for l, r, d, v in zip(c["left"], c["right"], c["disparity"], c["valid"]))
    base = median(clip)
    for seed in range(6):
        out = augment(clip, Augment(**plain, flip="v"), torch.Generator().manual_seed(seed))
        assert out["left"].shape == (3, 3, 48, 96) and out["flow"].shape == (2, 2, 48, 96) and out["visible"].dtype == torch.bool
        assert median(out) < base + 1 and torch.isfinite(out["disparity"]).all()
        values = augment(clip, Augment(**plain, compat="reference"), torch.Generator().manual_seed(seed))
        assert values["valid"].shape == out["valid"].shape
    mirrored = mirror(clip | {"valid": torch.ones_like(world.valid)})
    assert median(mirrored) < 3 * base + 3 and torch.equal(mirrored["left"], world.right.flip(-1)) and mirrored["flow"] is None
    assert torch.equal(upside_down(upside_down(clip))["flow"].nan_to_num(), clip["flow"].nan_to_num())
    from camflow.stereo.train import clip_tensors, some_frames             # as training has it: the right view's truth comes along
    flips = [augment(some_frames(clip_tensors(world), 3, g), Augment(**plain, flip="h"), g)["flow"] is None for g in map(torch.Generator().manual_seed, range(6))]
    assert any(flips) and not all(flips)


def test_resized_disparity_never_mixes():
    from camflow.stereo.augment import resize_disparity
    g = torch.Generator().manual_seed(0)
    d = torch.where(torch.rand(2, 1, 20, 30, generator=g) < 0.5, 10.0, 60.0)  # a checker of two depths
    valid = torch.rand(2, 1, 20, 30, generator=g) < 0.8
    for size in ((20, 30), (31, 44), (13, 17), (40, 60)):
        out, known = resize_disparity(d, valid, size)
        assert set((out[known] / (size[1] / 30)).round(decimals=3).tolist()) <= {10.0, 60.0} and not out[~known].any()
        if size == (20, 30): assert torch.equal(known, valid) and torch.equal(out[valid], d[valid])

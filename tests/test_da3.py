"""Depth Anything 3: parity with the reference on small goldens, names and shapes of the published sizes, files."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camflow.depth.da3 import CONFIGS, DepthAnything3, init_weights
from camflow.depth.da3_files import TOY, NestedDA3, convert_raw, load_da3, load_state, random_da3, save_da3
from camflow.depth.da3_video import DA3Cameras, predict
from camflow.files import InputError
from camflow.media.frames import Frames
from tests.parity import da3 as parity

GOLDENS = Path(__file__).parent / "goldens" / "da3"
SHARED = Path(__file__).parents[2] / "shared" / "goldens" / "da3"


def test_parity_with_the_reference():
    results = parity.check(GOLDENS)
    ran = {k: r for k, r in results.items() if r[3] is not None}
    assert {"full_tiny", "full_tiny_swiglu", "trace_tiny", "nested_tiny", "rope_d64", "ref_view", "pose_encoding", "ray_pose_24x32", "preprocess_down", "preprocess_sizes"} <= set(ran)
    assert all(r[3] for r in ran.values()), {k: r for k, r in ran.items() if not r[3]}


@pytest.mark.parametrize("what", ["weight", "input"])
def test_parity_notices_one_changed_number(what, monkeypatch):
    goldens = parity.Folder(GOLDENS)
    case = goldens.cases["full_tiny"]
    x, want = goldens.tensors("full_tiny")
    if what == "input": x["images"][0, 0, 0, 5, 5] += 0.5
    else: goldens.model("tiny").backbone["pretrained"].blocks[3].attn.qkv.weight.data[0, 0] += 0.05
    with torch.inference_mode(): result = parity.compare("full", parity.full(goldens, case, x), want)
    assert result[3] is False


@pytest.mark.parametrize("name, size", [("small", "da3-small"), ("base", "da3-base"), ("large", "da3-large"), ("giant", "da3-giant"), ("metric_large", "da3metric-large")])
def test_published_names_and_shapes(name, size):
    if not SHARED.exists(): pytest.skip(f"no folder {SHARED}")
    with torch.device("meta"): ours = DepthAnything3(size).state_dict()
    theirs = json.loads((SHARED / f"shapes_{name}.json").read_text())
    assert {f"model.{k}": list(v.shape) for k, v in ours.items()} == theirs


def test_bad_files_are_named(tmp_path):
    model = init_weights(DepthAnything3(replace(CONFIGS["da3-tiny"], embed_dim=32, num_heads=2, depth=4, out_layers=(3,))), torch.Generator().manual_seed(0))
    save_da3(model, tmp_path)
    assert next(load_da3(tmp_path).parameters()).dtype == torch.float32
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"embed_dim": 32', '"embed_dim": 48'))
    with pytest.raises(InputError, match="instead of"): load_da3(tmp_path)
    (tmp_path / "config.json").write_text('{"model_name": "da3-enormous"}')
    with pytest.raises(InputError, match="da3-enormous"): load_da3(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError): load_da3(tmp_path)


def golden(case):
    goldens = parity.Folder(GOLDENS)
    return goldens.model(goldens.cases[case]["config"]), *goldens.tensors(case)


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_the_plain_composition_is_the_reference(attention):
    from tests.oracles.da3_plain import load
    for case in ("full_tiny", "full_tiny_swiglu"):
        model, x, want = golden(case)
        got = load(model.state_dict(), model.config, attention)(x["images"])
        assert {"depth", "depth_conf", "ray", "ray_conf", "extrinsics", "intrinsics"} <= set(got) and parity.compare("full", got, {k: want[k] for k in got})[3]


def test_what_is_not_asked_for_changes_nothing():
    model, x, _ = golden("full_tiny")
    with torch.inference_mode():
        for view in ("saddle_balanced", "first", "middle"):
            whole = model(x["images"], view, ("camera", "depth", "rays"))
            part = model(x["images"], view, ("camera", "depth"), views=[2, 0])
            assert "ray" not in part and torch.equal(part["extrinsics"], whole["extrinsics"])
            for name in ("depth", "depth_conf"): assert torch.allclose(part[name], whole[name][:, [2, 0]], rtol=1e-4)
            assert "depth" not in model(x["images"], view, ("camera",))
        two = model(x["images"].expand(2, -1, -1, -1, -1).contiguous(), "middle", views=[1])       # a batch reorders its views another way
        assert torch.allclose(two["depth"][1], whole["depth"][0, 1:2], rtol=1e-4)


def test_global_blocks_turn_their_camera_tokens_back():
    from camflow.depth.da3 import _rope_table
    net = golden("full_tiny")[0].backbone["pretrained"]
    i, (S, h, w) = next(i for i in range(net.config.depth) if net.is_global(i)), (3, 2, 3)
    x = torch.randn(2, S, 1 + h * w, net.config.embed_dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        forward = net.blocks[i](x.flatten(1, 2), _rope_table(h, w, net.config.embed_dim // net.config.num_heads, S, False)[1:])   # the definition: every patch is turned
        assert torch.allclose(net.run_block(i, x, h, w), forward, atol=2e-6)


def test_tables_made_while_measuring_serve_training():
    model = random_da3(config=replace(TOY, alt_start=2))
    images = torch.randn(1, 3, 3, 56, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(): model(images, "first", ("camera", "depth", "rays"))
    out = model(images, "first", ("camera", "depth", "rays"))
    sum(v.float().mean() for k, v in out.items() if k in ("depth", "ray", "extrinsics")).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "qkv" in n or "projects" in n or "refinenet1" in n)


def raw_names(state):
    "Published tensors under the names of a raw checkpoint."
    back = [("model.backbone.", "module.net."), ("cam_dec.backbone", "cam_dec.more_mlps"), ("fc_qvec", "fc_rot"), ("model.cam_enc", "module.all_heads.camera_cond_head"),
            ("model.cam_dec", "module.all_heads.camera_head"), ("model.head", "module.all_heads.head"), ("_aux.", "_ray."), ("camera_token", "camera_token_extra")]
    out = {}
    for name, tensor in state.items():
        for new, old in back: name = name.replace(new, old)
        out[name] = tensor
    return out | {"module.net.pretrained.camera_token": torch.zeros(1), "module.gaussian_param_head.weight": torch.zeros(1)}


def test_raw_checkpoints_get_published_names(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "da3-small", replace(TOY, cam_enc=True, embed_dim=96))     # the published sizes are large; the names are the same
    model = random_da3(3, "da3-small")
    torch.save({"model": raw_names({f"model.{k}": v for k, v in model.state_dict().items()})}, tmp_path/"raw.pth")
    again = load_da3(convert_raw(tmp_path/"raw.pth", tmp_path/"published", "da3-small"))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert json.loads((tmp_path/"published/config.json").read_text()) == {"model_name": "da3-small"}
    with pytest.raises(InputError, match="da3-tall"): convert_raw(tmp_path/"raw.pth", tmp_path/"x", "da3-tall")


def test_nested_folders_load_and_answer_in_metres(tmp_path):
    goldens = parity.Folder(GOLDENS)
    branches = goldens.model("tiny_nested")
    pair = NestedDA3(branches["da3"].config, branches["da3_metric"].config)
    load_state(pair, goldens.weights("tiny_nested"))
    save_da3(pair, tmp_path, torch.float32)
    x, want = goldens.tensors("nested_tiny")
    with torch.inference_mode(): got = load_da3(tmp_path)(x["images"])
    assert parity.compare("nested", got, {k: want[k] for k in ("depth", "depth_conf", "extrinsics", "intrinsics")})[3]
    seen = predict(load_da3(tmp_path), torch.randint(0, 255, (5, 3, 42, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), views=3, process_res=56)
    assert seen.unit == 1 and seen.maps().kind == "metric" and seen.sky.shape == seen.depth.shape


def test_a_clip_of_the_sky_has_no_score_and_ends_nothing():
    "A reward meets such clips: they are missing, the others of the batch are judged."
    from camflow.geometry.trajectory import preset
    from camflow.rewards.protocol import Sample
    from camflow.rewards.segments import SegmentReward
    goldens = parity.Folder(GOLDENS)
    pair = NestedDA3(*(goldens.model("tiny_nested")[name].config for name in ("da3", "da3_metric")))
    load_state(pair, goldens.weights("tiny_nested"))
    real, clip = pair.da3_metric.forward, torch.randint(0, 255, (3, 3, 42, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = iter([True, False])
    pair.da3_metric.forward = lambda x, **how: (found := real(x, **how)) | {"sky": torch.full_like(found["sky"], float(next(seen)))}
    scores = SegmentReward(estimator=DA3Cameras(pair.eval(), 3, 56, depth=True), scale="metric")([Sample(Frames(clip, "byte"), target=preset("pan_left", 3)) for _ in range(2)])
    assert [status == "ok" for status in scores.status] == [False, True], scores


def test_incomplete_downloads_are_named(tmp_path):
    save_da3(random_da3(), tmp_path)
    whole = (tmp_path/"model.safetensors").read_bytes()
    for content in (whole[:1000], b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"):
        (tmp_path/"model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="download it again"): load_da3(tmp_path)
    (tmp_path/"config.json").write_text('{"config": {"embed": 3}}')
    with pytest.raises(InputError, match="embed"): load_da3(tmp_path)


def test_a_camera_that_was_not_read_is_no_pose():
    model = random_da3()
    with torch.no_grad(): model.cam_dec.fc_fov[0].bias.fill_(-1.0)                           # the last ReLU is silent
    clip = torch.randint(0, 255, (5, 3, 42, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert DA3Cameras(model, process_res=70).one(clip).isnan().all()
    from camflow.geometry.trajectory import preset
    from camflow.rewards.camera import CameraReward
    from camflow.rewards.protocol import Sample
    scores = CameraReward(DA3Cameras(model, process_res=70))([Sample(clip, preset("pan_left", 5))])
    assert scores.status == ["invalid"] and "missing" in scores.details[0]["reason"]


def test_long_clips_are_subsampled():
    seen = []
    class Eye(torch.nn.Module):
        def __init__(self): super().__init__(); self.inner = random_da3(); self.config = self.inner.config
        def forward(self, images, *a, **k): seen.append(tuple(images.shape)); return self.inner(images, *a, **k)
    clip = torch.randint(0, 255, (81, 3, 28, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    poses, depth = DA3Cameras(Eye().eval(), process_res=42, depth=True)([clip])
    assert seen == [(1, 21, 3, 28, 42)] and poses.shape == (1, 81, 4, 4) and poses.isfinite().all() and depth.isfinite().all()

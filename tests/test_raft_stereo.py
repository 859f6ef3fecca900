"RAFT-Stereo: its reference's numbers, published files, and its place in the evaluation and in stereo_depth."
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from camflow.files import InputError, read_json
from camflow.lab.published import PUBLISHED, state_of
from camflow.stereo import depth, evaluate
from camflow.stereo.baselines import per_frame
from camflow.stereo.network import CONFIGS as DYNAMIC
from camflow.stereo.network import DynamicStereo
from camflow.stereo.raft_stereo import CONFIGS, RAFTStereo, config_of, is_raft_stereo, load_raft_stereo
from camflow.world.clips import HELD_OUT
from tests.parity import raft_stereo as parity
from tests.parity.seeded import seeded_state_dict

GOLDENS = Path(__file__).parent/"goldens"/"raft_stereo"
torch.set_num_threads(1)
SMALL = dict(preset="tiny", clips=1, frames=3, samples=50, methods=["raft_stereo", "sgbm_filled"], raft_iters=2)


def published(config="default"):
    "A state dict as DataParallel saved it."
    shapes = json.loads((GOLDENS/f"shapes_{config}.json").read_text())
    state = seeded_state_dict(shapes)
    return {f"module.{k}": torch.from_numpy(state[k.replace("norm3", "downsample.1")]) for k in state} # one module, two names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A weights folder with two of the published files."
    out = tmp_path_factory.mktemp("weights")
    torch.save(published(), out/"raftstereo-sceneflow.pth")
    torch.save(published("realtime"), out/"raftstereo-realtime.pth")
    return out


# ---- numbers of the reference
def test_all_goldens():
    results = parity.check(GOLDENS)
    assert len(results) == 4 and all(r[3] for r in results.values()), results


def one_case(tmp_path, name, **changed):
    "A folder with one case, some of its tensors replaced."
    with safe_open(GOLDENS/f"{name}.safetensors", "pt") as file: meta = file.metadata()
    tensors = load_file(GOLDENS/f"{name}.safetensors")
    save_file({**tensors, **{k: f(tensors[k]) for k, f in changed.items()}}, tmp_path/f"{name}.safetensors", meta)
    for path in GOLDENS.glob("shapes*.json"): shutil.copy(path, tmp_path)
    return parity.check(tmp_path)[name]


def test_one_input_pixel_fails(tmp_path):
    def brighter(x):
        x = x.clone()
        x[..., 16, 40] = 255 - x[..., 16, 40]
        return x
    assert one_case(tmp_path, "default_33x70_it3", **{"input.left": brighter})[3] is False


@pytest.mark.parametrize("case, weight", [("realtime_40x120_it4", "update_block.gru16.convq.weight"), ("default_33x70_it3", "context_zqr_convs.2.weight"), ("instance_33x66_it3", "cnet.layer5.0.conv1.weight")])
def test_one_weight_fails(tmp_path, monkeypatch, case, weight):
    drawn = parity.seeded_state_dict
    def perturbed(shapes, gain=1.0):
        state = drawn(shapes, gain)
        state[weight][0] += 0.05
        return state
    monkeypatch.setattr(parity, "seeded_state_dict", perturbed)
    assert one_case(tmp_path, case)[3] is False


def test_unknown_case_is_not_covered(tmp_path):
    save_file({"input.x": torch.zeros(1)}, tmp_path/"new.safetensors", {"function": "something"})
    assert parity.check(tmp_path)["new"][3] is None


# ---- files
@pytest.mark.parametrize("name, count", [("default", 11_116_176), ("realtime", 9_865_568)])
def test_names_and_shapes_are_the_checkpoints(name, count):
    with torch.device("meta"): net = RAFTStereo(CONFIGS[name])
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == json.loads((GOLDENS/f"shapes_{name}.json").read_text())
    assert sum(p.numel() for p in net.parameters()) == count


def test_published_files_load_strictly(folder, tmp_path):
    state = published()
    net = load_raft_stereo(folder/"raftstereo-sceneflow.pth")
    assert net.config == CONFIGS["default"] and not net.training and all(torch.equal(v.cpu(), state[f"module.{k}"]) for k, v in net.state_dict().items())
    assert load_raft_stereo(folder/"raftstereo-realtime.pth").config == CONFIGS["realtime"]
    torch.save({k: v for k, v in state.items() if k != "module.cnet.layer5.1.conv2.bias"}, tmp_path/"less.pth")
    with pytest.raises(InputError, match="layer5.1.conv2.bias"): load_raft_stereo(tmp_path/"less.pth")
    torch.save(DynamicStereo(DYNAMIC["tiny"]).state_dict(), tmp_path/"other.pth")
    with pytest.raises(InputError, match="no RAFT-Stereo checkpoint"): load_raft_stereo(tmp_path/"other.pth")
    assert is_raft_stereo(folder/"raftstereo-realtime.pth") and not is_raft_stereo(tmp_path/"other.pth") and not is_raft_stereo(tmp_path)
    assert config_of({k.removeprefix("module."): v for k, v in published("instance").items()}).context_norm == "instance"


def test_the_command_knows_them(folder):
    names = [n for n in PUBLISHED if n.startswith("raft-stereo")]
    rows = {n: state_of(PUBLISHED[n], folder, check=True) for n in names}
    assert {n for n, r in rows.items() if r["loads"] == "yes"} == {"raft-stereo-sf", "raft-stereo-realtime"} and len(rows) == 5
    assert all(PUBLISHED[n].licence == "MIT" and "models.zip" in PUBLISHED[n].url for n in names)


# ---- the network's edges
def test_narrow_pictures_and_refusals():
    torch.manual_seed(0)
    net = RAFTStereo().eval()
    with torch.no_grad(): assert torch.isfinite(net(torch.rand(1, 3, 5, 7) * 255, torch.rand(1, 3, 5, 7) * 255, 2)).all()
    with pytest.raises(InputError, match="at least 1"): net(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), 0)
    with pytest.raises(InputError, match="differ"): net(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), 1)
    with pytest.raises(InputError, match="levels"): RAFTStereo(type(CONFIGS["default"])(levels=4))


def test_it_trains():
    torch.manual_seed(0)
    net = RAFTStereo(CONFIGS["realtime"])
    net(torch.rand(2, 3, 40, 70) * 255, torch.rand(2, 3, 40, 70) * 255, 2, every=True).abs().mean().backward()
    idle = ("cnet.layer5", "cnet.outputs32", "update_block.gru32")   # in the file, read by nothing
    assert all((p.grad is None) == n.startswith(idle) for n, p in net.named_parameters())


# ---- among the methods
def test_a_run_with_published_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CAMFLOW_WEIGHTS", str(folder))
    result = evaluate.main(SMALL, tmp_path/"a")
    assert result["raft_stereo"] == {"weights": "raftstereo-sceneflow.pth", "iters": 2} and math.isfinite(result["raft_stereo_epe"]) and "raft_stereo - sgbm_filled" in result["paired"]
    example = evaluate.world_example(HELD_OUT, "tiny", frames=3)
    alone = per_frame(load_raft_stereo(folder/"raftstereo-sceneflow.pth"), example.left, example.right, iters=2)
    assert float((alone - example.disparity).abs()[example.valid].mean()) == pytest.approx(result["raft_stereo_epe"], rel=1e-3) and float(alone.min()) >= 0
    fast = evaluate.main(SMALL | dict(raft_stereo=str(folder/"raftstereo-realtime.pth")), tmp_path/"a")
    assert fast["raft_stereo_epe"] != result["raft_stereo_epe"] and fast["rows"]["raft_stereo"] != result["rows"]["raft_stereo"] and fast["rows"]["sgbm_filled"] == result["rows"]["sgbm_filled"]
    assert evaluate.DEFAULTS["raft_iters"] == 32 and evaluate.main(SMALL | dict(raft_stereo="random"), tmp_path/"b")["raft_stereo"]["weights"] == "random"


def test_missing_weights_are_named_before_the_first_clip(tmp_path, monkeypatch):
    monkeypatch.setenv("CAMFLOW_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError, match=r"raftstereo-sceneflow\.pth.*models\.zip.*raft_stereo=FILE"): evaluate.main(SMALL, tmp_path/"a")
    with pytest.raises(InputError, match="nowhere.pth"): evaluate.main(SMALL | dict(raft_stereo=str(tmp_path/"nowhere.pth")), tmp_path/"b")
    with pytest.raises(InputError, match="raft_iters"): evaluate.main(SMALL | dict(raft_stereo="random", raft_iters=0), tmp_path/"c")
    assert "raft_stereo" not in evaluate.main(SMALL | dict(methods=["sgbm_filled"]), tmp_path/"d")


def test_depth_of_a_video(folder, tmp_path):
    from camflow.data.stereo_files import write_image
    example = evaluate.world_example(HELD_OUT, "tiny", frames=3)
    for side, view in (("left", example.left), ("right", example.right)):
        for i, frame in enumerate(view.data): write_image(tmp_path/side/f"{i:04d}.png", frame)
    result = depth.main(dict(left=str(tmp_path/"left"), right=str(tmp_path/"right"), weights=str(folder/"raftstereo-sceneflow.pth"), iters=2, orbit=False, confidence=False, rectify=False), tmp_path/"run")
    alone = per_frame(load_raft_stereo(folder/"raftstereo-sceneflow.pth"), example.left, example.right, iters=2)
    from camflow.data.stereo_files import read_npy
    assert result["frames"] == 3 and torch.allclose(torch.as_tensor(read_npy(tmp_path/"run/disparity/0001.npy")).reshape(1, 32, 128), alone[1].cpu(), atol=1e-3)
    assert read_json(tmp_path/"run/matching.json")["weights"].endswith("raftstereo-sceneflow.pth")

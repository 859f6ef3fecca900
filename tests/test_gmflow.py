"GMFlow against the reference's numbers and against the plain oracle; files of the family; sizes, portrait, bad input."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camflow.files import InputError
from camflow.flow.gmflow import GMFlow, GMFlowConfig, config_of, gmflow_flow, load_gmflow, save_gmflow, tiny_gmflow
from camflow.flow.gmflow_matching import LocalCorrelation
from camflow.media.frames import Frames
from camflow.training.checkpoint import load_whole
from tests.oracles.gmflow_plain import PlainGMFlow
from tests.parity import gmflow
from tests.parity.seeded import seeded_state_dict

GOLDENS = Path(__file__).parent/"goldens"/"gmflow"
torch.set_num_threads(1)


def test_all_goldens():
    results = gmflow.check(GOLDENS)
    assert set(results) == {p.stem for p in GOLDENS.glob("*.safetensors")} and all(v[3] for v in results.values()), results


def test_oracle():
    results = {k: v for k, v in gmflow.check(GOLDENS, "oracle").items() if v[3] is not None}
    assert {"full_64x96", "full_scale1_64x96"} <= set(results) and all(v[3] for v in results.values()), results


def _one_case(tmp_path, name, change=lambda tensors: tensors):
    save_file(change(load_file(GOLDENS/f"{name}.safetensors")), tmp_path/f"{name}.safetensors")
    for path in GOLDENS.glob("shapes*.json"): shutil.copy(path, tmp_path)
    (tmp_path/"cases.json").write_text(json.dumps({name: json.loads((GOLDENS/"cases.json").read_text())[name]}))
    return gmflow.check(tmp_path)[name]


def test_one_input_pixel_fails(tmp_path):
    def brighter(tensors):
        tensors["input.image0"][..., 32, 48] = 255 - tensors["input.image0"][..., 32, 48]
        return tensors
    assert _one_case(tmp_path, "full_scale1_64x96")[3] is True and _one_case(tmp_path, "full_scale1_64x96", brighter)[3] is False


def test_one_weight_fails(tmp_path, monkeypatch):
    drawn = gmflow.seeded_state_dict
    def perturbed(shapes, gain=1.0):
        state = drawn(shapes, gain)
        state["refine.gru.convq2.weight"][0, 0] += 0.05
        return state
    monkeypatch.setattr(gmflow, "seeded_state_dict", perturbed)
    assert _one_case(tmp_path, "refine_step")[3] is False


def test_what_is_not_covered_is_said(tmp_path):
    save_file({"input.x": torch.zeros(1)}, tmp_path/"new.safetensors")
    (tmp_path/"cases.json").write_text('{"lost": {"function": "normalize"}}')
    found = gmflow.check(tmp_path)
    assert found["new"][3] is None and found["lost"][3] is False


VARIANTS = {"refined": {}, "two scales": {"reg_refine": False}, "one scale": {"num_scales": 1, "reg_refine": False}, "no layers shifted": {"num_transformer_layers": 1}}


def _pictures(seed=0, size=(64, 96)):
    g = torch.Generator().manual_seed(seed)
    first = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 24, generator=g), size, mode="bicubic").clamp(0, 1) * 255
    return first, torch.roll(first, 5, 3)


def _soft(model):
    "Weights under which matching is soft, so that rounding stays rounding."
    state = {k: torch.from_numpy(v) for k, v in seeded_state_dict({k: list(v.shape) for k, v in model.state_dict().items()}, 0.5).items()}
    return load_whole(model, state).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_fast_equals_plain_and_files(name, tmp_path):
    model = _soft(tiny_gmflow(**VARIANTS[name]))
    plain = PlainGMFlow(model.state_dict(), refinements=model.config.num_reg_refine)
    first, second = _pictures()
    with torch.no_grad():
        for both in (False, True): assert (model(first, second, both) - plain(first, second, both)).abs().max() < 1e-3
    with torch.no_grad(): wanted = plain(first, second, train=True)
    found = model.train()(first, second)
    assert len(found) == len(wanted) and all((a - b).abs().max() < 1e-3 for a, b in zip(found, wanted))
    sum(p.abs().mean() for p in found).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path/"published.pth")
    save_gmflow(model, tmp_path/"ours", half=False)
    save_file(model.state_dict(), tmp_path/"plain.safetensors")
    for path in ("published.pth", "ours", "plain.safetensors"):
        again = load_gmflow(tmp_path/path)
        assert replace(again.config, num_reg_refine=model.config.num_reg_refine, refine_channels=model.config.refine_channels) == model.config
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_training_then_inference_share_tables():
    model, (first, second) = tiny_gmflow(), _pictures(size=(32, 64))
    with torch.inference_mode(): model(first, second)                  # tables made here serve training too
    model.train()(first, second)[-1].sum().backward()


def test_what_does_not_fit_is_listed(tmp_path):
    state = tiny_gmflow().state_dict()
    state["backbone.conv9.weight"] = state.pop("backbone.conv1.weight")
    with pytest.raises(InputError, match="no tensor 'backbone.conv1.weight'"): config_of(state)
    with pytest.raises(InputError, match=r"1 missing: backbone.conv1.weight; 1 unexpected: backbone.conv9.weight"): load_whole(tiny_gmflow(), state)
    with pytest.raises(InputError, match="of another shape"): load_whole(GMFlow(GMFlowConfig(reg_refine=True)), {**GMFlow().state_dict(), "refine_proj.bias": torch.zeros(3)})
    (tmp_path/"broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read safely"): load_gmflow(tmp_path/"broken.pth")
    with pytest.raises(InputError, match="does not exist"): load_gmflow(tmp_path/"none.pth")
    torch.save({"model": 3}, tmp_path/"odd.pth")
    with pytest.raises(InputError, match="no tensors by name"): load_gmflow(tmp_path/"odd.pth")


def test_bad_input():
    model, (first, second) = tiny_gmflow(), _pictures()
    with pytest.raises(InputError, match="multiples of 32"): model(first[..., :48, :], second[..., :48, :])
    with pytest.raises(InputError, match="one shape"): model(first, second[..., :64])
    with pytest.raises(InputError, match="0..255"): model(first[:, :1], second[:, :1])
    frames = Frames(torch.cat([first, second]).byte(), "byte")
    with pytest.raises(InputError, match="flow needs two"): gmflow_flow(model, frames[0])
    with pytest.raises(InputError, match="cannot tell a picture in 0..1"): gmflow_flow(model, frames.unit().data)
    with pytest.raises(InputError, match="compat"): gmflow_flow(model, frames, compat="old")
    with pytest.raises(InputError, match="training mode"): gmflow_flow(tiny_gmflow().train(), frames)
    with pytest.raises(InputError, match="NaN"): Frames(torch.full((2, 3, 8, 8), float("nan")), "unit")
    with pytest.raises(InputError, match="one number for each"): GMFlowConfig(num_scales=1, attn_splits=(2, 8))


def test_ranges_sizes_and_portrait():
    model, (first, second) = _soft(tiny_gmflow()), _pictures()
    clip = Frames(torch.cat([first, second]).byte()[..., :50, :90], "byte")
    flow = gmflow_flow(model, clip)
    assert flow.size == (50, 90) and len(flow) == 1 and torch.isfinite(flow.data).all()
    for same in (clip.unit(), clip.signed()): assert (gmflow_flow(model, same).data - flow.data).abs().max() < 5e-3  # the range is known, not guessed
    portrait = Frames(clip.data.mT.contiguous(), "byte")
    turned, reference = gmflow_flow(model, portrait), gmflow_flow(model, portrait, compat="reference")
    assert turned.size == (90, 50) and torch.equal(turned.data, reference.data.flip(1)) and (turned.data.flip(1).mT - flow.data).abs().max() < 1e-3
    small = gmflow_flow(model, clip, size=(32, 64))
    assert small.size == clip.size
    still = gmflow_flow(model, Frames(clip.data[:1].expand(3, -1, -1, -1), "byte"), bidirectional=True)
    assert len(still[0]) == 2 and (still[0].data - still[1].data).abs().max() < 1e-3   # identical frames: both directions are the same question
    grey = Frames(clip.data[:, :1], "byte")
    assert torch.isfinite(gmflow_flow(model, grey).data).all()


def test_ways_of_correlation_agree():
    g = torch.Generator().manual_seed(0)
    f0, f1, flow = torch.randn(2, 32, 12, 18, generator=g), torch.randn(2, 32, 12, 18, generator=g), 5 * torch.randn(2, 2, 12, 18, generator=g)
    with torch.no_grad():
        found = {way: LocalCorrelation(f0, f1, 4, way)(flow) for way in ("pairs", "rows", "compiled")}
        assert all((v - found["pairs"]).abs().max() < 1e-5 for v in found.values()) and LocalCorrelation(f0, f1, 4).way == "compiled"
    assert LocalCorrelation(f0, f1, 4).way == "pairs"

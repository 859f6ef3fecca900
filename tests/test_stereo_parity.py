"The stereo network, its loss, schedule and windows against the reference's numbers, and against the plain oracle where there are none."
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from camflow.stereo.network import CONFIGS, DynamicStereo
from tests.oracles import dynamic_stereo as plain
from tests.parity import stereo

GOLDENS = Path(__file__).parent/"goldens"/"stereo"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def results(): return stereo.check(GOLDENS)


def test_all_goldens(results):
    failed = {k: v for k, v in results.items() if v[3] is False}
    assert not failed, failed
    assert len(results) == len([p for p in GOLDENS.iterdir() if not p.name.startswith("shapes")]) and all(v[3] for v in results.values())


def test_oracle():
    results = stereo.check(GOLDENS, "oracle")
    assert all(v[3] for v in results.values()) and {"net_t1_it2_stack", "sst_t3", "window_schedule"} <= set(results), results


def _one_case(tmp_path, name, **changed):
    "A folder with one case, some of its tensors replaced."
    with safe_open(GOLDENS/f"{name}.safetensors", "pt") as file: meta = file.metadata()
    tensors = load_file(GOLDENS/f"{name}.safetensors")
    save_file({**tensors, **{k: f(tensors[k]) for k, f in changed.items()}}, tmp_path/f"{name}.safetensors", meta)
    for path in GOLDENS.glob("shapes*.json"): shutil.copy(path, tmp_path)
    return stereo.check(tmp_path)[name]


def test_one_input_pixel_fails(tmp_path):
    def brighter(x):
        x = x.clone()
        x[..., 16, 100] = 255 - x[..., 16, 100]
        return x
    assert _one_case(tmp_path, "net_t1_it2_stack", **{"input.left": brighter})[3] is False


def test_one_weight_fails(tmp_path, monkeypatch):
    drawn = stereo.seeded_state_dict
    def perturbed(shapes, gain=1.0):
        state = drawn(shapes, gain)
        state["update_block04.gru.convq3.weight"][0, 0] += 0.05
        return state
    monkeypatch.setattr(stereo, "seeded_state_dict", perturbed)
    assert _one_case(tmp_path, "net_t1_it2_stack")[3] is False


def test_unknown_case_is_not_covered(tmp_path):
    save_file({"input.x": torch.zeros(1)}, tmp_path/"new.safetensors", {"function": "something", "config": "{}", "params": "{}"})
    (tmp_path/"other.json").write_text('{"note": "", "cases": []}')
    assert {k: v[3] for k, v in stereo.check(tmp_path).items()} == {"new": None, "other": None}


CASES = {"tiny": (CONFIGS["tiny"], {}), "published signs": (replace(CONFIGS["tiny"], cascade_sign=-1.0, vertical=True, head=None), {}),
         "flat": (replace(CONFIGS["tiny"], use_3d_update_block=False, different_update_blocks=False, attention_type="self_stereo_temporal", vertical=True, depth=2), {}),
         "no attention": (replace(CONFIGS["tiny"], attention_type=None, vertical=True), {}), "warm start": (replace(CONFIGS["tiny"], vertical=True), {"warm": True})}


@pytest.mark.parametrize("case", CASES)
def test_fast_equals_plain(case):
    config, how = CASES[case]
    config = replace(config, dim=32)
    torch.manual_seed(0)
    fast = DynamicStereo(config).eval()
    state = {k: torch.randn_like(v) * v[0].numel() ** -0.5 if v.dim() > 1 else torch.randn_like(v) * 0.1 + ("norm" in k and k.endswith("weight")) for k, v in fast.state_dict().items()}
    fast.load_state_dict(state)
    shapes = {k: list(v.shape) for k, v in state.items()}
    oracle = plain.load(shapes, state, num_frames=config.num_frames, attention_type=config.attention_type, use_3d_update_block=config.use_3d_update_block,
                        different_update_blocks=config.different_update_blocks, cascade_sign=config.cascade_sign, vertical=config.vertical)
    g = torch.Generator().manual_seed(1)
    left, right = (torch.rand(2, 3, 3, 32, 256, generator=g) * 255 for _ in range(2))
    start = torch.randn(6, 2, 16, 128, generator=g) if how.get("warm") else None
    with torch.no_grad(): a, b = (net(left, right, 4, start, every=True) for net in (fast, oracle))
    assert a.shape == b.shape == ((4 if how.get("warm") else 8), 2, 3, 1, 32, 256)
    assert (a - b).abs().max() <= 1e-4 * max(1, b.abs().max() / 10), (a - b).abs().max()

"""Depth Anything 3: parity with the reference on small goldens, names and shapes of the published sizes, files."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camflow.depth.da3 import CONFIGS, DepthAnything3, init_weights
from camflow.depth.da3_files import load_da3, save_da3
from camflow.files import InputError
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
    with pytest.raises(InputError, match="wanted"): load_da3(tmp_path)
    (tmp_path / "config.json").write_text('{"model_name": "da3-enormous"}')
    with pytest.raises(InputError, match="da3-enormous"): load_da3(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError): load_da3(tmp_path)

"""Devices, generators and the environment record."""
import json
import subprocess
import sys

import pytest
import torch

from camflow import device as dev
from camflow.files import InputError


def test_device_names(monkeypatch):
    assert dev.device("cpu").type == "cpu"
    monkeypatch.setenv("CAMFLOW_DEVICE", "cpu")
    assert dev.device() == torch.device("cpu") and dev.visible_devices() == [torch.device("cpu")]
    assert dev.launcher() == "torchrun" and dev.collective_backend() == "gloo"
    for wrong in ("quantum", "meta", "cpu:x"):
        with pytest.raises(InputError, match="cpu"):
            dev.device(wrong)


def test_the_ranks_take_their_own_device(monkeypatch):
    monkeypatch.delenv("CAMFLOW_DEVICE", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert dev.device() == torch.device("xpu", 3) and dev.device("xpu:1").index == 1 and dev.device("cpu").type == "cpu"
    assert len(dev.visible_devices()) == 4 and dev.launcher() == "accelerate"
    with pytest.raises(InputError, match="4 visible"):
        dev.device("xpu:4")


def test_generator_is_named_by_its_key():
    def draw(*key):
        return torch.randn(4, generator=dev.generator(*key))

    assert torch.equal(draw(0, "noise", 1), draw(0, "noise", 1))
    keys = [(0, "noise", 1), (0, "noise", 2), (0, "data", 1), (1, "noise", 1), (0, "noise", 1, 0), ("0", "noise", 1)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)
    # golden: the same key must give the same draw in every release
    assert dev.generator(0, "noise", 1).initial_seed() == 2826978214677109370
    with pytest.raises(InputError, match="list"):
        dev.generator([1])


def test_environment_is_json_and_names_the_code():
    info = dev.env_info()
    assert json.loads(json.dumps(info)) == info
    assert info["versions"]["torch"] == torch.__version__.split("+")[0] or info["versions"]["torch"] == torch.__version__
    assert any(info["sdpa"].values()) and info["threads"] >= 1 and info["memory"]["peak_bytes"] >= info["memory"]["current_bytes"]


def test_import_names_no_device_and_stays_light():
    code = "import sys, camflow.device; assert not torch_initialised(); assert 'diffusers' not in sys.modules and 'matplotlib' not in sys.modules"
    code = "import torch\ndef torch_initialised(): return torch.cuda.is_initialized()\n" + code
    subprocess.run([sys.executable, "-c", code], check=True)

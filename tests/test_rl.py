"""RL: parity with the reference implementations, plans, rollouts, the trainer, resume."""
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camflow.files import InputError
from camflow.rl.sampler import plan
from tests.parity.rl import check

GOLDENS = Path(__file__).parent / "goldens" / "rl"


def test_parity():
    results = check(GOLDENS)
    failed = {case: result for case, result in results.items() if result[3] is False}
    assert not failed
    assert sum(result[3] is True for result in results.values()) > 60


def test_parity_notices_one_changed_number(tmp_path):
    for name in ("configs.json", "sde_step_sd3.safetensors"): shutil.copy(GOLDENS / name, tmp_path / name)
    tensors = load_file(tmp_path / "sde_step_sd3.safetensors")
    tensors["input.c0.v"][3, 0, 0, 0] += 1e-4
    save_file(tensors, tmp_path / "sde_step_sd3.safetensors")
    results = check(tmp_path)
    assert results["sde_step_sd3.c0"][3] is False and results["sde_step_sd3.c1"][3] is True


def test_unknown_cases_are_reported_not_passed(tmp_path):
    save_file({"input.c0.x": torch.zeros(1)}, tmp_path / "something_new.safetensors")
    assert check(tmp_path)["something_new"][3] is None


@pytest.mark.parametrize("counts, advice", [
    (dict(world=8, batch=2, k=5), "set batch to one of"), (dict(batch=4, k=1), "set k to 2 or more"), (dict(batch=8, micro_batch=3), "set micro_batch to one of [1, 2, 4, 8]"),
    (dict(batch=8, updates=2), "set updates to a divisor of 1"), (dict(batch=8, k=2, conditions=3), "raise k, lower batch, or add data"), (dict(batch=0), "positive integer")])
def test_impossible_plans_say_what_to_change(counts, advice):
    with pytest.raises(InputError, match="impossible batch plan") as error: plan(**counts)
    assert advice in str(error.value)

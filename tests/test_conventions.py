"Every deliberate swap of conventions is found, nothing is said about a right path however noisy, and every lineage reads the known distortion."
import math

import pytest
import torch

from camflow.files import InputError
from camflow.geometry import trajectory as tr
from camflow.geometry.camera import UNREAL_WORLD, Cameras, focal_K
from camflow.geometry.rigid import inverse, se3_exp, so3_exp
from camflow.metrics.conventions import LINEAGES, camera_errors, curves, diagnose, segment_errors
from camflow.metrics.pose import cami2v_errors

GL, P3D = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1, -1, -1, 1], [-1, -1, 1, 1]))
UE = torch.tensor([[0, 1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)  # columns forward, right, up in OpenCV axes


def randoms(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(c2w, degrees, metres, seed=0):
    out = c2w.clone()
    out[:, :3, :3] = c2w[:, :3, :3] @ so3_exp(math.radians(degrees) * torch.nn.functional.normalize(randoms(seed, len(c2w), 3), dim=1))
    out[:, :3, 3] += metres * torch.nn.functional.normalize(randoms(seed + 1, len(c2w), 3), dim=1)
    return out


PATHS = {"spiral": tr.compose(tr.spiral(0.75, 0.5, 1.2, frames=21, speed=1.5), tr.roll(8.0, 21, speed=-1.0)),
         "random": tr.random_trajectory(torch.Generator().manual_seed(4), 21)}
SWAPS = {"world-to-camera": lambda c: inverse(c), "OpenGL axes": lambda c: c @ GL, "PyTorch3D axes": lambda c: c @ P3D, "Unreal axes": lambda c: UNREAL_WORLD.mT @ c @ UE,
         "transposed": lambda c: c.mT, "transposed world-to-camera": lambda c: inverse(c).mT, "reversed": lambda c: c.flip(0),
         "3 frames late": lambda c: torch.cat([c[:1].expand(3, 4, 4), c[:-3]]), "2 frames early": lambda c: torch.cat([c[2:], c[-1:].expand(2, 4, 4)])}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("noise", [0.1])
def test_every_swap_is_found(path, swap, noise):
    truth = PATHS[path]
    given = SWAPS[swap](noisy(se3_exp(randoms(3, 6)) @ truth, noise, 0.01 * noise))
    found = diagnose(truth, given)
    assert swap in found.readings and found.given > 3 * found.best and swap in found.warning


def test_rotations_alone_transposed_are_found():
    given = PATHS["spiral"].clone()
    given[:, :3, :3] = given[:, :3, :3].mT.clone()
    assert diagnose(PATHS["spiral"], given).warning


@pytest.mark.parametrize("name", [*PATHS, *tr.PRESETS])
@pytest.mark.parametrize("seed", range(1))
def test_no_false_alarm(name, seed):
    truth = PATHS[name] if name in PATHS else tr.preset(name, 21)
    world = se3_exp(randoms(seed, 6))
    for degrees, metres in ((0.0, 0.0), (1.0, 0.03), (4.0, 0.2)):
        found = diagnose(truth, world @ noisy(truth, degrees, metres, seed) )
        assert not found.warning, (degrees, found)
    bad = noisy(truth, 0.1, 0.002, seed)
    bad[0] = bad[0] @ se3_exp(torch.tensor([0.2, 0.2, 0, 0.3, 0, 0], dtype=torch.float64))  # a bad first frame is not a shift
    assert not diagnose(truth, bad).warning


def test_still_paths_and_few_frames_say_nothing():
    still = tr.static(21)
    for given in (noisy(still, 1.0, 0.05), tr.preset("pan_left", 21), inverse(noisy(still, 0.1, 0.01))): assert not diagnose(still, given).warning
    assert not diagnose(tr.preset("pan_left", 3), inverse(tr.preset("pan_left", 3))).warning
    missing = PATHS["spiral"].clone()
    missing[3:6] = math.nan
    assert not diagnose(PATHS["spiral"], missing).warning
    assert "world-to-camera" in diagnose(PATHS["spiral"], inverse(missing)).warning
    with pytest.raises(InputError, match="21 true and 20"): diagnose(still, still[:20])


def test_one_degree_reads_one_degree_in_every_lineage():
    truth = tr.preset("arc_left", 17)
    given = noisy(truth, 1.0, 0.0)
    given[0] = truth[0]
    row = camera_errors(truth, given)
    assert abs(row["rot_mean_deg"] - 1) < 1e-9 and abs(row["rot_sum_deg"] - 16) < 1e-8 and abs(row["rot_sum_rad"] - math.radians(16)) < 1e-9
    assert abs(camera_errors(truth, given, "cameractrl")["RotErr_sum_rad"] - math.radians(16)) < 1e-9
    assert abs(camera_errors(truth, given, "cami2v")["RotErr"] - math.radians(16)) < 1e-6
    assert abs(camera_errors(truth, given, "cameraflow")["RotErr_mean_rad"] - math.radians(1)) < 1e-9
    assert camera_errors(truth, truth, "da3")["auc03"] == 1


@pytest.mark.parametrize("lineage", LINEAGES)
def test_truth_reads_zero(lineage):
    truth = tr.preset("translate_up", 17)
    row = camera_errors(truth, se3_exp(randoms(1, 6)) @ truth, lineage)
    rest = {k: v for k, v in row.items() if not k.startswith(("scale", "auc", "drift"))}
    assert all(abs(v) < 1e-6 for v in rest.values()), rest
    if lineage == "da3": assert set(row.values()) == {1.0}


def test_cammc_agrees_with_cami2v():
    "Max-norm is its `rel`."
    truth = tr.preset("arc_right", 17)
    given = noisy(tr.rescale(truth, translation=0.7), 0.5, 0.01)
    row, theirs = camera_errors(truth, given), cami2v_errors(truth, given)
    assert abs(row["cammc_max_sum"] - theirs["CamMC_rel"]) < 1e-6 and abs(row["trans_max_sum"] - theirs["TransErr_rel"]) < 1e-6
    assert len(curves(truth, given)["trans_ls"]) == 17 and list(segment_errors(truth, given)["rot_deg"]) == [1, 4]


def test_missing_poses_and_unknown_lineages_are_refused():
    truth = tr.preset("arc_right", 9)
    broken = truth.clone()
    broken[3] = math.nan
    with pytest.raises(InputError, match="missing"): camera_errors(truth, broken)
    with pytest.raises(InputError, match="one of camflow"): camera_errors(truth, truth, "best")
    half = Cameras(truth, focal_K(24, (48, 80)), (48, 80))[::2]
    with pytest.raises(InputError, match="missing"): camera_errors(Cameras(truth, focal_K(24, (48, 80)), (48, 80)), half)

"Calibration files of every kind, disparity and metres, and whether a pair is rectified."
from pathlib import Path

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.geometry.rectify import estimate_rectifier, fit_rows, moved_rig, rectification_report, rectify
from camflow.geometry.rigid import so3_exp
from camflow.geometry.stereo_rig import Calibration, StereoRig, read_calibration, read_rig, write_k_txt, write_kitti_calib, write_middlebury_calib, write_opencv_yaml
from camflow.media.frames import Frames
from camflow.world.render import default_K, render
from camflow.world.scene import random_scene

REAL = Path(__file__).resolve().parents[2]/"shared/real"
SIZE = (210, 280)


def a_rig(doffs=0.0, size=(360, 640), fx=713.25, fy=711.5, baseline=0.1234):
    K = torch.tensor([[fx, 0, 331.2], [0, fy, 177.9], [0, 0, 1]], dtype=torch.float64)
    right = K.clone()
    right[0, 2] += doffs
    return StereoRig(K, right, baseline, size)


def zed_text(res=("HD",), baseline=119.9):
    from camflow.geometry.stereo_rig import ZED_SIZES
    out = [f"[{side}_CAM_{r}]\nfx={ZED_SIZES[r][1] * .55}\nfy={ZED_SIZES[r][1] * .55}\ncx={ZED_SIZES[r][1] / 2}\ncy={ZED_SIZES[r][0] / 2}\nk1=-0.1\nk2=0.02\n" for r in res for side in ("LEFT", "RIGHT")]
    return "\n".join(out) + f"[STEREO]\nBaseline={baseline}\nTY=0.2\nTZ=-0.1\n" + "".join(f"RX_{r}=0.004\nCV_{r}=0.006\nRZ_{r}=-0.003\n" for r in res)


@pytest.mark.parametrize("writer, doffs", [(write_k_txt, 0.0), (write_middlebury_calib, 41.5), (write_kitti_calib, -3.25), (write_kitti_calib, 0.0)])
def test_round_trips(tmp_path, writer, doffs):
    rig = a_rig(doffs)
    writer(tmp_path/"file", rig)
    found = read_rig(tmp_path/"file", rig.size)
    for a, b in ((found.K_left, rig.K_left), (found.K_right, rig.K_right)): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert found.baseline == pytest.approx(rig.baseline, abs=1e-8) and found.doffs == pytest.approx(doffs, abs=1e-5) and found.size == rig.size


def test_opencv_yaml_round_trip(tmp_path):
    raw = Calibration([[700, 0, 320], [0, 700, 180], [0, 0, 1]], [.1, -.05, .001, 0, .01], [[705, 0, 322], [0, 705, 181], [0, 0, 1]], [.09, -.04, 0, 0, 0],
                      so3_exp(torch.tensor([.01, .02, -.01], dtype=torch.float64)).numpy(), [-.12, .001, .002], (360, 640))
    write_opencv_yaml(tmp_path/"c.yaml", raw)
    found = read_calibration(tmp_path/"c.yaml")
    for name in ("K_left", "D_left", "K_right", "D_right", "R", "T"): np.testing.assert_allclose(np.ravel(getattr(found, name)), np.ravel(getattr(raw, name)), atol=1e-12)
    assert found.size == raw.size and found.rig().baseline == pytest.approx(np.linalg.norm(raw.T), rel=1e-4)
    R1, R2, P1, P2 = raw.rectified()   # a file of an already rectified pair
    import cv2
    file = cv2.FileStorage(str(tmp_path/"p.yaml"), cv2.FILE_STORAGE_WRITE)
    for name, value in (("P1", P1), ("P2", P2)): file.write(name, value)
    file.release()
    assert read_rig(tmp_path/"p.yaml", (360, 640)).depth(torch.tensor(10.)) == pytest.approx(float(raw.rig().depth(torch.tensor(10.))), rel=1e-6)


def test_zed(tmp_path):
    (tmp_path/"SN1.conf").write_text(zed_text(("HD", "VGA")))
    assert read_calibration(tmp_path/"SN1.conf", (376, 672)).size == (376, 672)
    assert read_rig(tmp_path/"SN1.conf").baseline == pytest.approx(0.1199, rel=1e-4)
    assert read_rig(tmp_path).size == (720, 1280)       # a folder stands for the one file in it


@pytest.mark.parametrize("text, told", [
    ("", "unknown kind"), ("hello\n", "unknown kind"), ("700 0 320 0 700 180 0 0 1\n", "has two"), ("700 0 320 0 700 180 0 0\n0.1\n", "line 1"), ("700 0 a 0 700 180 0 0 1\n0.1\n", "line 1"),
    ("700 0 320 0 700 180 0 0 1\n63\n", "unit='mm'"), ("700 0 320 0 700 180 0 0 1\n0\n", "baseline"), ("nan 0 320 0 700 180 0 0 1\n0.1\n", "unknown kind"), ("0 0 320 0 700 180 0 0 1\n0.1\n", "focal"),
    ("cam0=[700 0 320; 0 700 180; 0 0 1]\nbaseline=120\n", "no cam1"), ("cam0=[700 0 320; 0 700 180]\ncam1=[700 0 320; 0 700 180; 0 0 1]\nbaseline=120\n", "cam0"),
    ("cam0=[700 0 320; 0 700 180; 0 0 1]\ncam1=[700 0 350; 0 700 180; 0 0 1]\ndoffs=3\nbaseline=120\n", "doffs"),
    ("P2: 1 2 3\nP3: 1 2 3\n", "P2"), ("P2: 700 0 320 0 0 700 180 0 0 0 1 0\n", "no P3"),
    ("P2: 700 0 320 0 0 700 180 0 0 0 1 0\nP3: 700 0 320 70 0 700 180 0 0 0 1 0\n", "swapped"),
    ("%YAML:1.0\n---\nK1: 3\n", "no K1"), ("[STEREO]\nBaseline=120\n", "LEFT_CAM_HD"), (zed_text().replace("fx=", "gx="), "no fx"),
])
def test_broken_files_say_what_is_wrong(tmp_path, text, told):
    (tmp_path/"calib").write_text(text)
    with pytest.raises(InputError, match="(?s).*".join([told.replace("[", r"\[")])) as error: read_rig(tmp_path/"calib", (360, 640))
    assert "calib" in str(error.value)


def test_binary_and_absent_files(tmp_path):
    (tmp_path/"K.txt").write_bytes(b"\x89PNG\xff\xfe\x00")
    for path, told in ((tmp_path/"K.txt", "not a text file"), (tmp_path/"no.txt", "does not exist")):
        with pytest.raises(InputError, match=told): read_rig(path)


@pytest.mark.parametrize("doffs", [0.0, 25.0, -7.5])
def test_depth_and_disparity_are_inverse_and_scale(doffs):
    rig, z = a_rig(doffs), torch.rand(2, 1, 360, 640, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9 + 1
    torch.testing.assert_close(rig.depth(rig.disparity(z)), z)
    assert float(rig.disparity(torch.tensor(2.0))) == pytest.approx(rig.fx * rig.baseline / 2 - doffs)
    half = rig.resize((180, 320))
    torch.testing.assert_close(half.depth(rig.disparity(z)[..., ::2, ::2] / 2), z[..., ::2, ::2])
    assert half.of((360, 640)).doffs == pytest.approx(doffs)


def test_doffs_of_few_decimals_may_be_resized_at_will():
    "Whether it agrees with the matrices is a question at the size of the file."
    K = lambda x: [[1000., 0, x], [0, 1000, 300], [0, 0, 1]]
    large = StereoRig(K(500), K(531.115), 0.1, (600, 1000), doffs=31.1).resize((2400, 4000))
    assert large.doffs == pytest.approx(4 * 31.1) and large.of((600, 1000)).doffs == pytest.approx(31.1)
    with pytest.raises(InputError, match="doffs is 31.000"): StereoRig(K(500), K(531.115), 0.1, (600, 1000), doffs=31.0)


def test_half_precision_does_not_shorten_the_reach():
    K = [[1000., 0, 500], [0, 1000, 300], [0, 0, 1]]
    found = StereoRig(K, K, 0.1).depth(torch.tensor([[0.001, 33.3]]).half())
    torch.testing.assert_close(found, 100 / torch.tensor([[0.001, 33.3]]).half().float(), rtol=1e-6, atol=0)


def test_sizes(tmp_path):
    write_k_txt(tmp_path/"K.txt", a_rig())
    with pytest.raises(InputError, match="principal point"): read_rig(tmp_path/"K.txt", (1080, 1920))
    with pytest.raises(InputError, match="rig.of"): read_rig(tmp_path/"K.txt").resize((10, 10))
    with pytest.raises(InputError, match="aspect ratio"): a_rig().of((480, 640))
    with pytest.raises(InputError, match=r"resize\(\(4, 4\)\)"): a_rig().depth(torch.zeros(1, 1, 4, 4))


# --- rectification, on pairs of the world whose error is known ---

def pair(roll=0., pitch=0., yaw=0., baseline=0.3, seed=1_000_003, size=SIZE):
    scene, move = random_scene(seed, detail=2.0), torch.eye(4, dtype=torch.float64)
    move[:3, :3], move[0, 3] = so3_exp(torch.tensor([pitch, yaw, roll], dtype=torch.float64).deg2rad()), baseline
    see = lambda c2w: render(scene, (c2w[None], default_K(size)), [0.], size=size).frames.byte()
    start = torch.as_tensor(scene.start, dtype=torch.float64)
    return see(start), see(start @ move), move


@pytest.fixture(scope="module")
def good(): return pair()[:2]


def moved(frames, rows=0, columns=0): return Frames(frames.data.roll((rows, columns), (-2, -1)), "byte")


@pytest.mark.parametrize("rows", [-1, 1, 4])
def test_row_shift_is_measured_and_removed(good, rows):
    found = rectify(good[0], moved(good[1], rows))
    assert found.before.status == "unrectified" and found.before.vertical_px == pytest.approx(rows, abs=0.15)
    assert found.after.status == "ok" and found.after.error_px < 0.25 and abs(found.after.vertical_px) < 0.1


@pytest.mark.parametrize("seed", [1_000_000, 1_000_003, 1_000_005])
def test_roll_is_measured_and_removed(seed):
    left, right, _ = pair(roll=0.5, seed=seed)
    found = rectify(left, right)
    assert found.before.roll_deg == pytest.approx(-0.5, abs=0.1) and found.before.status == "unrectified"
    assert found.after.status == "ok" and abs(found.after.roll_deg) < 0.1


def test_zoom_is_measured(good):
    import cv2
    H, W = SIZE
    bigger = cv2.warpAffine(good[1].data[0].permute(1, 2, 0).numpy(), cv2.getRotationMatrix2D((W / 2 - .5, H / 2 - .5), 0, 1.02), (W, H), flags=cv2.INTER_CUBIC)
    found = rectification_report(good[0], Frames(torch.from_numpy(bigger).permute(2, 0, 1)[None].contiguous(), "byte"))
    assert found.status == "unrectified" and found.scale == pytest.approx(1.02, abs=2e-3)


def test_good_swapped_same_blank_and_foreign(good):
    left, right = good
    assert rectification_report(left, right).status == "ok"
    swapped = rectification_report(right, left)
    assert swapped.swapped and swapped.negative > 0.9 and "exchange" in swapped.advice
    plan, after = estimate_rectifier(right, left)
    assert plan.swap and after.status == "ok" and torch.equal(plan(right, left)[0].data, left.data)
    assert rectification_report(left, left).status == "same"
    blank = Frames(torch.full((1, 3, *SIZE), 127, dtype=torch.uint8), "byte")
    noise = Frames(torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), "byte")
    for other in (blank, noise, pair(seed=1_000_007)[0]):
        found = rectification_report(left, other)
        assert found.status == "unknown" and np.isnan(found.vertical_px) and "too little texture" in found.advice
    with pytest.raises(InputError, match="one size and length"): rectification_report(left, Frames(left.data[..., :-2], "byte"))


def test_converging_views_are_shifted_and_metres_kept(good):
    near = rectification_report(*good).disparity[1]
    right = moved(good[1], columns=round(near * .6))       # both views moved apart, as in 3-D films
    plan, after = estimate_rectifier(good[0], right)
    assert rectification_report(good[0], right).status == "converging" and after.status == "ok" and after.negative < 0.02
    rig = moved_rig(a_rig(size=SIZE), plan)
    assert rig.doffs == -plan.shift and moved_rig(None, plan) is None
    assert float(rig.depth(torch.tensor(10. + plan.shift))) == pytest.approx(float(a_rig(size=SIZE).depth(torch.tensor(10.))))


def test_a_calibration_rectifies_turned_cameras_and_keeps_metres():
    left, right, move = pair(roll=2., pitch=1.5, yaw=-2., size=(240, 320))
    K, R = default_K((240, 320)) - np.array([[0, 0, .5], [0, 0, .5], [0, 0, 0]]), move[:3, :3].T
    found = rectify(left, right, Calibration(K, [0.] * 5, K, [0.] * 5, R.numpy(), (-R @ move[:3, 3]).numpy(), (240, 320)))
    assert found.before.status == "unrectified" and found.after.status == "ok" and found.after.error_px < 0.3
    assert found.rig.baseline == pytest.approx(0.3, rel=1e-3)


def test_strong_turns_without_calibration_are_measured_again():
    left, right, _ = pair(yaw=10, pitch=1, seed=1_000_005, size=(240, 320))
    plan, after = estimate_rectifier(left, right)
    assert after.status == "ok" and after.error_px < 0.6 and (plan.metric or moved_rig(a_rig(), plan) is None)


def test_fit_survives_wrong_matches():
    draw = np.random.default_rng(0)
    right = draw.uniform([0, 0], [280, 210], (200, 2))
    left = np.column_stack([right[:, 0] + draw.uniform(2, 30, 200), 105 + .999 * (right[:, 1] - 105) - .01 * (right[:, 0] - 140) + .8 + draw.normal(0, .1, 200)])
    left[:90] = draw.uniform([0, 0], [280, 210], (90, 2))
    fit = fit_rows(left, right, SIZE)
    assert (fit.alpha, fit.beta, fit.gamma) == pytest.approx((.999, -.01, .8), abs=3e-2) and fit.beta == pytest.approx(-.01, abs=1e-3)
    assert fit_rows(left[:2], right[:2], SIZE) is None


def test_real_pairs():
    if not (REAL/"stereo").is_dir(): pytest.skip(f"no real stereo data in {REAL}")
    from camflow.data.stereo_clip import open_stereo
    clip = open_stereo(REAL/"stereo").load([0])
    report = rectification_report(clip.left, clip.right)
    assert report.status == "ok" and report.error_px < 0.3 and report.inliers > 200
    assert rectification_report(clip.right, clip.left).swapped
    rig = read_rig(REAL/"stereo_single/K.txt", (540, 960))
    assert float(rig.depth(torch.tensor(92.25))) == pytest.approx(754.668 * .063 / 92.25, rel=1e-4)

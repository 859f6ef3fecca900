"Every run notebook that the package ships, on its smoke profile: it ends, its result and its report are there, and the report opens without a network."
import json
import re
import shutil

import pytest
import torch

from camflow.assets import list_profiles, list_runs, tiny_path
from camflow.lab.report import needs_network
from camflow.lab.run import prepare
from camflow.lab.run import run as execute
from camflow.world.write import write_multicam
from tests.test_benchmarks import PROMISED


SHOWN = {"recam_generate": "cam_type5, zoom_in", "joint_sample": "samples: image above depth", "gflow_fit": '<a href="viewer.html">'} # what a report has to show beside its numbers


@pytest.mark.parametrize("name", list_runs())
def test_smoke(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = execute(name, "smoke", root=tmp_path/"reports")
    if run.status == "killed": raise KeyboardInterrupt   # the run took the signal that was meant for all tests
    errors = capfd.readouterr().err
    assert run.status == "ok", run.info.get("traceback") or run.info["error"]
    page = (run.path/"report.html").read_text(encoding="utf-8")
    assert needs_network(page) == [] and "Traceback (most recent call last)" not in page and "nothing to plot yet" not in page
    assert SHOWN.get(name, "") in page
    result = json.loads((run.path/"result.json").read_text(encoding="utf-8"))
    assert result["headline"] and all(key in result for key in result["headline"])
    if name in PROMISED: assert result["headline"] == PROMISED[name] and any("seconds" in key and result[key] for key in result)
    assert "ERROR" not in errors, errors


@pytest.mark.parametrize("name, profile", [(name, profile) for name in list_runs() for profile in list_profiles(name)])
def test_profiles_fit_their_notebooks(name, profile): prepare(name, profile)


@pytest.mark.parametrize("profile", ["npu8", "npu32", "mix"])
def test_a_training_finds_what_multicam_prepare_encoded(profile):
    "Latents are found again only in the same folder, of the same size and by the same tiles."
    made, wanted = prepare("multicam_prepare", "npu8")[1], prepare("recam_finetune", profile)[1]
    for name in ("cache_folder", "tiles", "frames", "size"): assert wanted[name] == made[name], name


def test_an_estimator_of_flow_may_be_a_relative_path():
    "Notebooks and trainings run in folders of their own."
    asked = 0
    for name in list_runs():
        notebook, values, _ = prepare(name)
        cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        if not re.search(r"^flow: .*(estimator|path)", cells[0], re.M): continue
        asked += 1
        assert re.search(r"user_path\(flow\)|flow_named\(flow\)", "\n".join(cells[1:])), name
    assert asked == 7


# ---- runs that are asked for something beside their profile, from a folder of one's own

@pytest.fixture
def ask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    def ask(name, **params):
        run = execute(name, "smoke", params, root=tmp_path/"reports")
        assert run.status == "ok", run.info.get("traceback") or run.info["error"]
        return run.path, json.loads((run.path/"result.json").read_text(encoding="utf-8"))
    return ask


@pytest.mark.slow
def test_captions_of_a_relative_root(ask):
    write_multicam("set", scenes=2, frames=5, cameras=2, size=(32, 48), val=False)
    assert ask("multicam_caption", root="set")[1]["in_clean_table"] == 4


@pytest.mark.slow
def test_a_prompt_names_its_camera_by_a_relative_path(ask):
    from safetensors.torch import save_file
    save_file({"extrinsics": torch.eye(4).repeat(5, 1, 1), "intrinsics": torch.tensor([1.0, 1.6, 0.5, 0.5])}, "still.safetensors")
    assert ask("omnicam_generate", cameras=["Object: a room ; Camera: #trajectory:{still.safetensors}"])[1]["written"] == 1


@pytest.mark.slow
def test_several_conditions_are_sampled_at_the_size_of_their_base(ask):
    from PIL import Image
    shutil.copytree(tiny_path("joint")/"image_depth", "base", ignore=shutil.ignore_patterns("joint*"))
    config = json.loads(open("base/unet/config.json").read())
    with open("base/unet/config.json", "w") as file: json.dump(config | {"sample_size": 32}, file)
    path, _ = ask("joint_sample", folder="base", models={"depth": str(tiny_path("joint")/"image_depth")})
    assert Image.open(path/"samples.png").size == (4 * 32, 2 * 32)


@pytest.mark.slow
def test_untrained_depth_beside_flow_from_files(ask):
    from camflow.gflow.priors import gather_priors, write_priors
    from camflow.gflow.truth import truth_clip
    clip = truth_clip("plain", frames=3, size=(48, 72))
    write_priors("set/plain/plain", gather_priors(clip.frames, truth=clip, depth="truth", flow="truth"))
    assert ask("gflow_priors", sequences="set", flow="files", depth="da3", weights="random")[1]["failed"] == 0


@pytest.mark.slow
def test_gflow_of_a_video_of_ones_own(ask):
    "Frames that are left out are compared after the videos of the fit at work are written."
    from camflow.gflow.truth import truth_clip
    from camflow.media.video import write_video
    write_video("mine.mp4", truth_clip("plain", frames=7, size=(48, 72)).frames, 8)
    path, result = ask("gflow_fit", sequence="mine.mp4", frame_start=1, frame_range=3, skip_interval=2, heldout=3, depth="bootstrap", videos=True)
    assert result["heldout_psnr"] > 15 and (path/"pictures/sequence_traj_vis.mp4").exists()


@pytest.mark.slow
def test_all_held_out_clips_count(ask):
    "The report judges the clips that the training judged."
    path, result = ask("stereo_train", held_out=6)
    last = json.loads((path/"train/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert result["epe"] == pytest.approx(last["held_epe"], rel=1e-3)   # weights are written as float16


@pytest.mark.slow
def test_two_pictures_to_go_between_need_no_clips(ask):
    from PIL import Image
    from camflow.joint.interpolate_train import start_base
    start_base("svd", 0, 3)
    for name, colour in (("a", "red"), ("b", "blue")): Image.new("RGB", (16, 16), colour).save(f"{name}.png")
    path, result = ask("svd_interpolate", base="svd", data="webvid", steps=0, mode="fusion", first="a.png", last="b.png")
    assert (path/"between.mp4").is_file() and result["held_out"] == 0


@pytest.mark.slow
def test_depth_of_pictures_that_have_none(ask):
    from camflow.joint.shapes import shape_clip
    from camflow.media.frames import to_pil
    for i in range(4):
        to_pil(shape_clip(100000 + i).frames, 0).save(f"{i}.png")
    assert "silhouettes_gap" not in (found := ask("joint_sample", mode="second_given_first", data="images", source=".")[1]) and found["calls"] == 3

"Every run notebook that the package ships, on its smoke profile: it ends, its result and its report are there, and the report opens without a network."
import json
import re
import shutil

import pytest
import torch

from camflow.assets import list_profiles, list_runs, tiny_path, user_options
from camflow.files import InputError
from camflow.flow.estimators import flow_named
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
        assert re.search(r"flow_named\(flow[,)]", "\n".join(cells[1:])), name
    assert asked == 7


def test_a_published_flow_network_lies_in_the_folder_itself(tmp_path, monkeypatch):
    "Its file's name begins with what is also a name of an estimator."
    monkeypatch.setenv("CAMFLOW_CWD", str(tmp_path))
    for name in ("gmflow-scale2-regrefine6-mixdata-train320x576-4e7b215d.pth", "tiny-mine"): assert flow_named(name, "gmflow") == str(tmp_path.resolve()/name)
    assert [flow_named(name, "gmflow") for name in ("dis", "dis-fast", "tiny", "random", "gmflow")] == ["dis", "dis-fast", "tiny", "random", "gmflow"]


# ---- what cannot be done is said before anything is trained

def cells_of(name, run_dir, **params):
    "(code cells behind the parameters, their variables) of a run on its smoke profile; nothing is executed yet."
    notebook, values, _ = prepare(name, "smoke", params)
    first, *cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    space = {"display": lambda *shown: None}
    exec(first, space)
    return cells, space | values | {"run_dir": str(run_dir)}


@pytest.mark.parametrize("name, params, words", [
    ("motion_ablation", dict(data="world"), "drawn shapes only"), ("motion_ablation", dict(measure="nosuch"), "no known name"), ("motion_ablation", dict(asked=[20]), "two different buckets"),
    ("motion_ablation", dict(data="videos", measure="dis"), "give folder"), ("svd_interpolate", dict(data="videos", base_steps=1), "give folder"),
    ("motion_buckets", dict(map="nosuch.json"), "does not exist"), ("video_edit", dict(keyframes=[0, 9], interpolator_steps=1), "frames 0 to 3"),
    ("video_edit", dict(join="adapter", interpolator_steps=1), "appearance"), ("judge_reliability", dict(groups=0), "at least 1"), ("judge_reliability", dict(judges={}), "at least 1"),
    ("tiny_pose", dict(clips=0), "clips=0"), ("tiny_vae", dict(clips=0), "clips=0"), ("da3_smoke", dict(frames=1), "at least two"), ("da3_smoke", dict(views=1), "at least two"),
    ("gflow_fit", dict(heldout=1), "at least 2"), ("gflow_fit", dict(preset="paper"), "has no setting"), ("gflow_fit", dict(window=2), "at least 3"), ("recam_grpo", dict(data="videos", arms=["finetune"]), "no arm"), ("gflow_evaluate", dict(data="davis", root="x", fits=["a", "b"], names=["bear"] * 2), "more than once")])
def test_refused_before_anything_is_trained(name, params, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMFLOW_RUN_DIR", "")
    for way in ("camflow.lab.launch.launch", "camflow.flow.motion_bucket.sampled_speed", "camflow.rewards.reliability.retest", "camflow.world.write.write_scene", "camflow.gflow.truth.truth_clip"):
        monkeypatch.setattr(way, lambda *args, **more: pytest.fail("work was begun"))
    cells, space = cells_of(name, tmp_path/"run", **params)
    with pytest.raises(InputError, match=words):
        for cell in cells: exec(cell, space)


def test_the_worlds_videos_are_as_long_as_asked(tmp_path, monkeypatch):
    "Without a table the run ends with whatever is asked of the videos, as by default."
    monkeypatch.setenv("CAMFLOW_RUN_DIR", "")
    cells, space = cells_of("webvid_prepare", tmp_path, min_seconds=25.0)
    for cell in cells: exec(cell, space)
    assert space["result"]["videos"] == 2


def test_videos_of_several_lengths_are_compared_over_the_same_frames(tmp_path, monkeypatch):
    from camflow.media.video import read_video, write_video
    monkeypatch.setenv("CAMFLOW_RUN_DIR", "")
    write_multicam(tmp_path/"set", scenes=1, frames=9, cameras=2, size=(32, 48), val=False)
    scene = next((tmp_path/"set/train").glob("*/*"))
    short = scene/"videos/cam02.mp4"
    write_video(short, read_video(short, range(6)), 8)
    cells, space = cells_of("da3_smoke", tmp_path/"run", videos=str(scene/"videos"), cameras=str(scene/"cameras/camera_extrinsics.json"), frames=0)
    for cell in cells[:2]: exec(cell, space)
    assert [len(clip) for clip in space["clips"].values()] == [len(path) for path in space["truth"].values()] == [6, 6]


def test_options_may_name_relative_folders(tmp_path, monkeypatch):
    "Notebooks run in folders of their own; what is no folder here, or a name on a server, stays."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMFLOW_CWD", str(tmp_path))
    (tmp_path/"models/qwen").mkdir(parents=True)
    asked = {"vlm": {"model": "models/qwen", "profile": "models", "frames": 4}, "near": {"roots": ["models", "gone/x"]}, "far": {"model": "models/qwen", "endpoint": "http://127.0.0.1:1/v1"}, "untrained": {"weights": "random"}}
    assert user_options(asked) == asked | {"vlm": asked["vlm"] | {"model": str(tmp_path.resolve()/"models/qwen")}, "near": {"roots": [str(tmp_path.resolve()/"models"), "gone/x"]}}
    cells, space = cells_of("judge_reliability", tmp_path/"a", options=asked)
    monkeypatch.setenv("CAMFLOW_RUN_DIR", "")
    exec(cells[0], space)
    assert space["options"] == user_options(asked)
    cells, space = cells_of("recam_grpo", tmp_path/"b", reward_options=asked, arms=[])
    with pytest.raises(InputError, match="no arm"): exec(cells[0], space)
    assert space["reward_options"] == user_options(asked)


def test_clips_that_stand_still_have_buckets(tmp_path, monkeypatch):
    "They have no logarithm; the quantiles stay."
    monkeypatch.setenv("CAMFLOW_RUN_DIR", "")
    speeds = iter([0.0, 0.0, 0.3])
    monkeypatch.setattr("camflow.flow.motion_bucket.sampled_speed", lambda *args: next(speeds))
    cells, space = cells_of("motion_buckets", tmp_path, clips=3)
    for cell in cells: exec(cell, space)
    assert set(space["maps"]) == {"quantile"} and sorted(b["quantile"] for b in space["result"]["buckets"].values())[-1] == 255


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recam_finetune", "tiny_vae"])
def test_no_held_out_clip_counts_twice(ask, name):
    assert ask(name, clips=5)[1]["held_out_clips"] == 2


@pytest.mark.slow
def test_priors_of_small_clips_of_the_world(ask):
    assert ask("gflow_priors", world=["odd"], short=48, masks="epipolar")[1]["failed"] == 0

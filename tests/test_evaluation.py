"Evaluation: layouts good and broken, tables of known effects, the comparison of two runs, published weights, and a kill in the middle."
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from camflow.data.webvid import write_presets
from camflow.files import InputError, write_json
from camflow.geometry.camera import Cameras, focal_K, write_unreal_json
from camflow.geometry.trajectory import preset
from camflow.lab import published
from camflow.lab.evaluation import compare_page, failure_table, lacking_table, metric_table
from camflow.lab.report import needs_network
from camflow.media.frames import Frames
from camflow.media.video import write_video
from camflow.metrics.layouts import find_clips
from camflow.metrics.statistics import mcnemar
from camflow.metrics.tables import COLUMNS, checked, failures, paired, paired_sets, read_table, set_lines, summary, wide
from tests.holding import held

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


def clip(path, frames=5, size=(16, 24), seed=0):
    g = torch.Generator().manual_seed(seed)
    return write_video(path, Frames(torch.randint(0, 256, (frames, 3, *size), generator=g, dtype=torch.uint8), "byte", fps=8))


# ---- layouts
@pytest.fixture
def cameraflow(tmp_path):
    "Two sources along three paths, .WebVID beside the results."
    for name in ("video01", "video02"):
        clip(tmp_path/".WebVID/videos"/f"{name}.mp4")
        for k in (1, 2, 10): clip(tmp_path/f".results/cam_type{k}"/f"{name}.mp4")
    (tmp_path/".WebVID/metadata.csv").write_text("file_name,text\nvideo01.mp4,one\nvideo02.mp4,two\n")
    write_presets(tmp_path/".WebVID/cameras/camera_extrinsics.json", 5)
    return tmp_path


def test_cameraflow_layout(cameraflow):
    for given in (cameraflow, cameraflow/".results"):                      # the folder of both, or the results
        found = find_clips(given)
        assert found.layout == "cameraflow" and found.notes == {} and found.unused == [] and [c.group for c in found[::2]] == ["cam_type1", "cam_type2", "cam_type10"]
        last = found[-1]
        assert (last.id, last.cluster, last.prompt, last.source.name) == ("cam_type10/video02", "video02", "two", "video02.mp4")
        assert torch.allclose(last.cameras.relative().c2w, preset(10, 5), atol=1e-9) and last.cameras.size == (16, 24)
        assert float(last.cameras.K[0, 0, 0]) == pytest.approx(24 / 23.76 * 24)


def test_what_is_missing_is_noted_and_stays(cameraflow):
    (cameraflow/".results/cam_type2/video02.mp4").unlink()
    (cameraflow/".WebVID/videos/video01.mp4").unlink()
    (cameraflow/".WebVID/metadata.csv").write_text("file_name,text\nvideo02.mp4,two\nvideo07.mp4\n")
    clip(cameraflow/".results/cam_type11/video01.mp4")
    (cameraflow/".results/cam_type1/video01.mp4").write_bytes(b"no video")
    clip(cameraflow/".results/cam_type10/video01.mp4", frames=9)
    found = find_clips(cameraflow)
    assert len(found) == 8
    notes = found.notes
    assert notes["cam_type2/video02"] == ["no video: cam_type2 has none of video02"]
    assert any(n.startswith("no camera: camera_extrinsics.json has no cam11") for n in notes["cam_type11/video01"])
    assert any("cannot be opened" in n for n in notes["cam_type1/video01"]) and any("5 poses for 9 frames" in n for n in notes["cam_type10/video01"])
    assert all("no source: videos has no video01" in notes[c.id] and c.source is None for c in found if c.cluster == "video01")
    assert any("wrong number of columns" in u for u in found.unused)
    assert "2 without video" in repr(found) and "lacking" in lacking_table(notes)   # cam_type2 and cam_type11 have no video02


def test_results_of_recam_generate(tmp_path):
    for k in (1, 9): clip(tmp_path/f"results/cam_type{k}/a.mp4")
    clip(tmp_path/"results/source/a.mp4")
    write_json(tmp_path/"results/cameras.json", {f"cam_type{k}": preset(k, 5).tolist() for k in (1, 9)})
    found = find_clips(tmp_path)
    assert [c.id for c in found] == ["cam_type1/a", "cam_type9/a"] and found[0].source.parent.name == "source"
    assert torch.allclose(found[1].cameras.c2w, preset(9, 5)) and found.notes["cam_type1/a"] == ["no prompt: there is no caption table"]


def test_shorter_videos_sample_the_path_when_asked(cameraflow):
    write_presets(cameraflow/".WebVID/cameras/camera_extrinsics.json", 81)
    assert all("81 poses for 5 frames" in n[0] for n in find_clips(cameraflow).notes.values())
    found = find_clips(cameraflow, poses="spread")
    assert found.notes == {} and torch.allclose(found[0].cameras.relative().c2w, preset(1, 81)[::20], atol=1e-9) and found[0].cameras.frames.tolist() == [0, 1, 2, 3, 4]


def test_multicam_pairs(tmp_path):
    scene = tmp_path/"train/f35_aperture2.4/scene2"
    paths = {f"cam{k:02d}": Cameras(preset(k, 5), focal_K(35., (16, 24)), (16, 24)) for k in (1, 2, 3)}
    write_unreal_json(tmp_path/"x.json", paths)
    (scene/"cameras").mkdir(parents=True)
    shutil.move(tmp_path/"x.json", scene/"cameras/camera_extrinsics.json")
    for name in ("cam01", "cam02"): clip(scene/"videos"/f"{name}.mp4")
    found = find_clips(tmp_path)
    assert [c.id for c in found] == ["f35_aperture2.4/scene2/cam01-cam02", "f35_aperture2.4/scene2/cam01-cam03"] and found.notes[found[1].id][0] == "no video: there is no cam03.mp4"
    assert float(found[0].cameras.K[0, 0, 0]) == pytest.approx(35 / 23.76 * 24) and found[0].reference is None
    assert len(find_clips(tmp_path, pairs="all")) == 6 and len(find_clips(scene)) == 2 and len(find_clips(scene.parent)) == 2
    assert "no prompt: there is no caption table" in found.notes[found[0].id]
    (tmp_path/"metadata-f35-test.csv").write_text("file_name,text\nf35_aperture2.4/scene2/videos/cam02.mp4,A man dances.\n")
    assert f"metadata={tmp_path}/metadata-f35-test.csv" in find_clips(tmp_path).notes[found[0].id][-1]
    assert find_clips(tmp_path, metadata=str(tmp_path/"metadata-f35-test.csv"))[0].prompt == "A man dances."
    clip(tmp_path/"made/scene2/cam01-cam02.mp4")
    judged = find_clips(tmp_path, results=str(tmp_path/"made"))
    assert judged[0].video.parent.parent.name == "made" and judged[0].reference == scene/"videos/cam02.mp4"
    shutil.copytree(scene.parent, scene.parents[1]/"f18_aperture10")
    with pytest.raises(InputError, match="for f18_aperture10 and for f35_aperture2.4"): find_clips(tmp_path, results=str(tmp_path/"made"))
    assert len(find_clips(tmp_path)) == 4 and len(find_clips(scene.parent, results=str(tmp_path/"made"))) == 2


def test_any_folder(tmp_path):
    for name in ("a/x.mp4", "b/x.mp4", "b/10.mp4", "b/9.mp4", ".hidden/y.mp4"): clip(tmp_path/"made"/name)
    clip(tmp_path/"true/b/x.mp4")
    clip(tmp_path/"true/9.mp4")
    write_json(tmp_path/"prompts.json", {"made/a/x.mp4": "one", "9.mp4": "nine"})
    found = find_clips(tmp_path/"made", sources=str(tmp_path/"true"), metadata=str(tmp_path/"prompts.json"))
    assert [c.id for c in found] == ["a/x", "b/9", "b/10", "b/x"] and [c.group for c in found] == ["a", "b", "b", "b"]
    assert [c.source and c.source.name for c in found] == ["x.mp4", "9.mp4", None, "x.mp4"] and found[1].prompt == "nine"
    assert len(find_clips(tmp_path/"made", limit=2)) == 2
    write_json(tmp_path/"prompts.json", {"c/x.mp4": "one", "d/x.mp4": "another", "c/9.mp4": "nine", "d/9.mp4": "nine"})
    assert [c.prompt for c in find_clips(tmp_path/"made", metadata=str(tmp_path/"prompts.json"))] == [None, "nine", None, None], "two captions called x"


def test_realestate_texts(tmp_path):
    clip(tmp_path/"videos/k.mp4")
    Cameras(preset(5, 5), focal_K(24., (16, 24)), (16, 24)).to_realestate10k(tmp_path/"k.txt")
    (tmp_path/"poses").mkdir()
    shutil.move(tmp_path/"k.txt", tmp_path/"poses/k.txt")
    found = find_clips(tmp_path)
    assert torch.allclose(found[0].cameras.relative().c2w, preset(5, 5), atol=1e-6)


def test_broken_layouts_say_what_is_wrong(tmp_path):
    (tmp_path/"empty").mkdir()
    (tmp_path/"r/cam_type1").mkdir(parents=True)
    clip(tmp_path/"twice/a.mp4")
    clip(tmp_path/"twice/a.mkv")
    for call, words in ((lambda: find_clips(tmp_path/"nowhere"), "is no folder"), (lambda: find_clips(tmp_path/"empty"), "no videos in"), (lambda: find_clips(tmp_path/"r"), "hold no videos"),
                        (lambda: find_clips(tmp_path/"empty", layout="multicam"), "no scenes"), (lambda: find_clips(tmp_path/"empty", layout="cameraflow"), "no cam_type1"),
                        (lambda: find_clips(tmp_path/"twice"), "several formats"), (lambda: find_clips(tmp_path/"twice", layout="plain"), "auto, cameraflow"),
                        (lambda: find_clips(tmp_path/"twice", poses="some"), "exact"), (lambda: find_clips(tmp_path/"twice", sources=str(tmp_path/"none")), "does not exist"),
                        (lambda: find_clips(tmp_path/"twice", metadata=str(tmp_path/"none.csv")), "not found")):
        with pytest.raises(InputError, match=words): call()


# ---- tables
def long(values: dict, sources=40, paths=2, status=None, weights="", better=True, seed=0) -> pd.DataFrame:
    "A table with one metric per entry: name -> function of (source numbers, generator) -> values."
    rows = []
    for k in range(paths):
        for name, draw in values.items():
            found = draw(np.arange(sources), np.random.default_rng([seed, k, len(name)]))
            for i, v in enumerate(found):
                s = (status or {}).get((name, i, k), "failed" if math.isnan(v) else "ok")
                rows.append(dict(clip=f"p{k}/v{i:03d}", video="", cluster=f"v{i:03d}", group=f"p{k}", metric=name, value=v, status=s, reason="" if s == "ok" else f"because {s}", seconds=.1, weights=weights,
                                 version="1", frames=81, fps=30., higher_is_better=better, details="{}"))
    return pd.DataFrame(rows)


HARD = np.random.default_rng(9).normal(0, 1, 200)


def test_a_shift_is_found_and_chance_is_not():
    noise = {f"m{i}": (lambda s, g: HARD[s] + .1 * g.standard_normal(len(s))) for i in range(8)}
    a, b = long(noise, seed=1), long(noise | {"moved": lambda s, g: HARD[s] + .15 + .1 * g.standard_normal(len(s))}, seed=2)
    a = pd.concat([a, long({"moved": noise["m0"]}, seed=3)])
    found = paired(a, b, n=2000).set_index("metric")
    assert found.loc["moved", "verdict"] == "better" and .1 < found.loc["moved", "low"] < .15 < found.loc["moved", "high"] < .2
    assert (found.drop("moved")["verdict"] == "no clear difference").all() and (found["p_holm"] >= found["p"] - 1e-12).all()
    assert found.loc["moved", "pairs"] == 80 and found.loc["moved", "sources"] == 40
    back = paired(b, a, n=2000).set_index("metric")
    assert back.loc["moved", "verdict"] == "worse" and back.loc["moved", "difference"] == pytest.approx(-found.loc["moved", "difference"])


def test_holm_keeps_the_whole_family_honest():
    "Twelve metrics without an effect, 24 pairs of runs: uncorrected p-values raise an alarm in nearly half of them."
    alarms = raw = 0
    for trial in range(24):
        draw = {f"m{i:02d}x{'y' * i}": (lambda s, g: g.standard_normal(len(s))) for i in range(12)}
        found = paired(long(draw, 12, 1, seed=trial), long(draw, 12, 1, seed=1000 + trial), n=200)
        alarms, raw = alarms + (found["verdict"] != "no clear difference").any(), raw + (found["p"] < .05).any()
    assert alarms <= 4 and raw >= 6


def test_paths_of_one_source_are_not_independent():
    "A difference that is drawn once per source and repeated along ten paths is one observation."
    shared = lambda seed: (lambda s, g: np.random.default_rng(seed).normal(0, 1, len(s)))
    few = sum(paired(long({"m": shared(k)}, 8, 10), long({"m": shared(100 + k)}, 8, 10), n=400)["p"].iloc[0] < .05 for k in range(24))
    assert few <= 4


def test_worst_case_stands_beside_complete_cases():
    lost = lambda s, g: np.where(s < 6, np.nan, HARD[s] - .5)
    a, b = long({"m": lambda s, g: HARD[s]}, better=False), long({"m": lost}, better=False)
    row = paired(a, b, n=1000).iloc[0]
    assert row["difference"] == pytest.approx(-.5) and row["verdict"] == "better" and row["lost_b"] == 12 and row["lost_a"] == 0 and row["worst_difference"] > -.3
    line = summary(b).iloc[0]
    assert line["numbers"] == 68 and line["state"] == "partial" and line["worst_case_mean"] > line["mean"] and line["statuses"] == {"failed": 12, "ok": 68}
    assert failures(b).iloc[0].to_dict() == {"metric": "m", "status": "failed", "reason": "because failed", "clips": 12, "example": "p0/v000"}
    assert wide(b)["m"].isna().sum() == 12 and wide(b)["m"].dtype == np.float64


def test_yes_and_no_by_mcnemar():
    a, b = (long({"dynamic_degree": lambda s, g, k=k: (s < k).astype(float)}, 30, 1) for k in (10, 22))
    row = paired(a, b, n=500).iloc[0]
    assert row["test"] == "McNemar" and row["p"] == mcnemar(a["value"], b["value"]) == 2 / 2**12 and row["verdict"] == "better"
    assert paired(long({"dynamic_degree": lambda s, g: (s < 10.).astype(float)}), long({"dynamic_degree": lambda s, g: (s < 22.).astype(float)}), n=500).iloc[0]["test"] == "permutation of sources"


def test_what_cannot_be_compared_is_not():
    m = {"m": lambda s, g: HARD[s] + g.standard_normal(len(s))}
    a = long(m, seed=1)
    assert "weights differ" in paired(a.assign(weights="x:1"), long(m, seed=2, weights="y:2"), n=100).iloc[0]["note"]
    drawn = paired(a, long(m, seed=2).assign(status="random_weights"), n=100).iloc[0]
    assert drawn["verdict"] == "not comparable" and drawn["note"] == "random weights" and math.isnan(drawn["p"])
    assert "different length" in paired(a, long(m, seed=2).assign(frames=41), n=100).iloc[0]["note"]
    none = a.assign(value=math.nan, status="no_weights")
    assert paired(a, none, n=100).iloc[0]["verdict"] == "no common number" and summary(none).iloc[0]["state"] == "no_weights"
    assert summary(a.assign(status="random_weights")).iloc[0]["state"] == "random_weights"
    one = paired(long(m, 1, 5, seed=1), long(m, 1, 5, seed=2), n=100).iloc[0]
    assert "fewer than 2 sources" in one["test"] and one["verdict"] == "not comparable" or one["verdict"] == "no clear difference"


def test_sets_and_files(tmp_path):
    a = long({"m": lambda s, g: HARD[s]}, 3, 1)
    fid = dict(a.iloc[0]) | dict(clip="", cluster="", group="", metric="fid", value=8., details=json.dumps(dict(n_fake=10, n_real=20, floor=dict(mean=7., std=1., n=10))))
    table = pd.concat([a, pd.DataFrame([fid])], ignore_index=True)
    assert set_lines(table).iloc[0][["value", "floor", "n_fake"]].tolist() == [8., 7., 10] and "fid" not in summary(table)["metric"].tolist()
    assert paired_sets(table, table.assign(value=table["value"] + 1)).iloc[0]["difference"] == 1
    parts = tmp_path/"run/table.parquet"
    parts.mkdir(parents=True)
    table.iloc[:2].to_parquet(parts/"part-1.parquet")
    table.iloc[1:].assign(value=5.).to_parquet(parts/"part-2.parquet")
    again = read_table(tmp_path/"run")
    assert len(again) == 4 and again["value"].tolist()[1:] == [5., 5., 5.] and set(COLUMNS) <= set(again.columns)   # the last row of a number counts
    for place, words in ((tmp_path/"none", "no table.parquet"), (tmp_path, "no table.parquet")):
        with pytest.raises(InputError, match=words): read_table(place)
    with pytest.raises(InputError, match="columns value"): checked(table.drop(columns="value"))
    with pytest.raises(InputError, match="no clip is in both"): paired(table, table.assign(clip="z"))


def test_reports_escape_and_need_no_network(tmp_path):
    evil = "<script src='https://x'></script>"
    a = long({evil: lambda s, g: HARD[s]}, 4, 1)
    b = a.assign(value=[math.nan, *a["value"].iloc[1:]], status=["failed", "ok", "ok", "ok"], reason=[evil, "", "", ""])
    compare_page(a, b, tmp_path/"c.html", (evil, "B"), n=100)
    page = (tmp_path/"c.html").read_text(encoding="utf-8")
    assert needs_network(page) == [] and "<script" not in page and evil not in metric_table(b) + failure_table(b)


# ---- published weights
def test_published_list():
    names = {w.name: w for w in published.chosen()}
    assert {"clip-b32", "raft-things", "amt-s", "musiq-spaq", "i3d", "inception-fid", "lpips-alex", "dino-b16", "gim-dkm", "aesthetic", "recam-dit", "wan-vae", "umt5", "qwen3-vl", "stereo-dr-sf", "da3-giant-1.1"} <= set(names)
    for w in names.values():
        assert w.needed_for and w.url and w.licence and all(c in "0123456789abcdef" for c in w.sha256)
        if len(w.sha256) == 64: assert w.sha256 in w.url                       # digests are the publisher's own
        elif w.sha256: assert f"-{w.sha256}." in w.file


def test_weights_are_checked(tmp_path):
    from camflow.metrics.raft import RAFT
    torch.save(RAFT().state_dict(), tmp_path/"raft-things.pth")
    torch.save({"weight": torch.zeros(1, 767), "bias": torch.zeros(2)}, tmp_path/"sa_0_4_vit_l_14_linear.pth")
    (tmp_path/"musiq_spaq_ckpt-358bb6af.pth").write_bytes(b"x")
    rows = {n: published.state_of(published.PUBLISHED[n], tmp_path, check=True) for n in ("raft-things", "aesthetic", "musiq-spaq", "i3d")}
    assert rows["raft-things"]["loads"] == "yes" and "no published digest" in rows["raft-things"]["sha256"]
    assert rows["aesthetic"]["loads"].startswith("no: InputError") and "DIFFERS, published 358bb6af" in rows["musiq-spaq"]["sha256"] and not rows["i3d"]["present"]
    done = subprocess.run([sys.executable, "-m", "camflow.lab.cli", "weights", "raft-things", "aesthetic", "--folder", str(tmp_path), "--check", "--json"], capture_output=True, text=True)
    assert done.returncode == 1 and [r["loads"][:3] for r in json.loads(done.stdout)] == ["yes", "no:"] and "not what they should be: aesthetic" in done.stderr
    assert subprocess.run([sys.executable, "-m", "camflow.lab.cli", "weights", "nonsense"], capture_output=True, text=True).returncode == 2


# ---- whole runs
SMALL = ["-p", "world_sources=2", "-p", "world_paths=[1,5,9]", "-p", "world_frames=9", "-p", "world_size=[32,48]", "-p", "samples=100", "-p", "count=1", "-p", 'metrics=["temporal_flickering","psnr","ssim"]']


def camflow(reports, *words, **env):
    return subprocess.Popen([sys.executable, "-m", "camflow.lab.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env, "CAMFLOW_REPORTS": str(reports)})


def ended(process, status=0):
    out, err = process.communicate(timeout=900)
    assert process.returncode == status, err[-2000:]
    return out.strip(), err


def measured(run):
    "What a table says, without the time that it took."
    rows = read_table(run).drop(columns=["seconds", "video", "job"], errors="ignore")
    return rows.sort_values(["clip", "metric"], ignore_index=True)


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_table_and_two_runs_compare(tmp_path):
    whole, flickering = (Path(ended(camflow(tmp_path/name, "run", "recam_evaluate", "-q", *SMALL, *more))[0]).parent
                         for name, more in (("whole", []), ("flickering", ["-p", "fault=flicker", "-p", "amount=60"])))
    process, parts = camflow(tmp_path/"killed", "run", "recam_evaluate", "-q", *SMALL, **held(tmp_path/"held", "camflow.metrics.evaluation", "part-000002.parquet")), []
    while len(parts) < 2 and process.poll() is None:
        time.sleep(0.01)
        parts = list((tmp_path/"killed").glob("recam_evaluate/*/evaluate/table.parquet/part-*"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = next((tmp_path/"killed").glob("recam_evaluate/*"))
    assert 0 < len(read_table(killed)) < len(read_table(whole)) and not (killed/"evaluate/result.json").exists()
    ended(camflow(tmp_path/"killed", "resume", str(killed), "-q"))
    pd.testing.assert_frame_equal(measured(killed), measured(whole))
    results = [json.loads((run/"result.json").read_text(encoding="utf-8")) for run in (killed, whole)]
    assert results[0]["metrics"].keys() == results[1]["metrics"].keys() and results[0]["mean.temporal_flickering"] == results[1]["mean.temporal_flickering"]

    out, err = ended(camflow(tmp_path, "compare", str(whole), str(flickering), "--json"))
    rows = {r["metric"]: r for r in json.loads(out)}
    assert rows["temporal_flickering"]["difference"] < -.02 and rows["temporal_flickering"]["pairs"] == 6
    page = Path(err.strip().splitlines()[-1])
    assert page.parent == whole.parent and needs_network(page.read_text(encoding="utf-8")) == [] and "data:video/mp4" in page.read_text(encoding="utf-8")
    assert "verdict" in ended(camflow(tmp_path, "compare", str(whole/"evaluate"), str(whole/"evaluate/table.parquet"), "-n", "100"))[0]
    assert "is no run" in ended(camflow(tmp_path, "compare", str(whole), "nothing"), 2)[1]


def test_whatever_is_asked_wrongly_stops_before_measuring(tmp_path):
    from camflow.metrics.evaluation import main
    clip(tmp_path/"v/a.mp4")
    for config, words in ((dict(folder=str(tmp_path/"v"), metrics=["nonsense"]), "nonsense"), (dict(folder=str(tmp_path/"w")), "is no folder"), (dict(), "no folder"),
                          (dict(folder=str(tmp_path/"v"), foldr=""), "unknown settings"), (dict(folder=str(tmp_path/"v"), weights="x", random_weights=True), "drawn weights")):
        with pytest.raises(InputError, match=words): main(config, tmp_path/"run")
    assert not (tmp_path/"run/table.parquet").exists()


def test_the_suites_files_are_all_listed():
    from camflow.metrics.suite import WEIGHTS
    listed = {f for w in published.PUBLISHED.values() for f in (w.file, *w.parts)}                        # files, and folders of models
    for w in WEIGHTS.values():
        for alternatives in w.files: assert {part for name in alternatives.split("|") for part in (name, name.split("/")[0])} & listed, alternatives


def test_infinite_is_a_number_that_no_mean_can_take():
    "PSNR of equal frames."
    a = long({"psnr": lambda s, g: np.where(s < 3, np.inf, 30 + HARD[s])}, 10, 1)
    line = summary(a).iloc[0]
    assert (line["numbers"], line["infinite"], line["state"], line["clips"]) == (7, 3, "ok", 10) and math.isfinite(line["mean"]) and failures(a).empty
    every = summary(a.assign(value=np.inf)).iloc[0]
    assert every["state"] == "ok" and math.isnan(every["mean"]) and every["infinite"] == 10
    b = a.assign(value=np.where(np.isinf(a["value"]), 20.0, a["value"]))
    row = paired(a, b, n=200).iloc[0]
    assert row["pairs"] == 10 and row["lost_a"] == 0 and row["difference"] < 0

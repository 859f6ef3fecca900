"""Pages in a real headless browser: the viewer of a timeline, reports, the index of all runs, the camera viewer. Needs node, Debian's chromium and playwright-core (`make browser`)."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from camflow.gflow.ideal import ideal_timeline
from camflow.gflow.timeline import Timeline
from camflow.gflow.truth import truth_clip
from camflow.gflow.viewer import write_viewer
from camflow.lab.registry import build_index, close_run, new_run, write_result
from camflow.lab.report import write_report
from camflow.lab.views import camera_viewer, video_grid
from camflow.processes import free_port

HERE = Path(__file__).with_name("browser")
CHROMIUM = next((found for name in (os.environ.get("CAMFLOW_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome") if name and (found := shutil.which(name))), None)
PLAYWRIGHT = next((folder for folder in (os.environ.get("CAMFLOW_PLAYWRIGHT"), HERE) if folder and (Path(folder)/"node_modules/playwright-core/package.json").is_file()), None)
MISSING = [why for found, why in ((shutil.which("node"), "node is not installed"), (CHROMIUM, "chromium is not installed (apt install chromium, or CAMFLOW_CHROMIUM)"),
                                  (PLAYWRIGHT, "playwright-core is not installed (make browser, or CAMFLOW_PLAYWRIGHT)")) if not found]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING) + ": pages are not opened in a browser")]


def drive(task, page, folder, **options):
    "What tests/browser/drive.js saw; its pictures lie in `folder`."
    env = {**os.environ, "CAMFLOW_CHROMIUM": CHROMIUM, "CAMFLOW_PLAYWRIGHT": str(PLAYWRIGHT)}
    out = subprocess.run(["node", str(HERE/"drive.js"), task, str(page), str(folder), json.dumps(options)], capture_output=True, text=True, timeout=900, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


def picture(path): return np.asarray(Image.open(path).convert("RGB")).astype(float) / 255


def psnr(a, b): return float(-10 * np.log10(((a - b) ** 2).mean()))


# ---- the viewer of a timeline

def as_the_page_shows(tl, t, size):
    "The rasteriser's picture of frame t on a canvas of another shape: the whole view, and what lies beside it."
    (H, W), (h, w), K = tl.size, size, tl.K_33.clone()
    k = min(w / W, h / H)
    K[:2] *= k
    K[0, 2], K[1, 2] = w / 2 + (tl.K_33[0, 2] - W / 2) * k, h / 2 + (tl.K_33[1, 2] - H / 2) * k
    return tl.render(t, K=K, size=size).colour_3HW.clamp(0, 1).permute(1, 2, 0).numpy()


def test_the_viewer_shows_what_the_rasteriser_does_and_obeys(tmp_path):
    tl = ideal_timeline(truth_clip("crossing", frames=4, size=(68, 120)))
    seen = drive("viewer", write_viewer(tmp_path/"viewer.html", tl, title="crossing"), tmp_path, size={"width": 480, "height": 404})
    assert seen["said"] == [] and seen["requests"] == [] and seen["phone"]["said"] == []
    assert seen["renderer"] and not seen["plain"] and seen["message"] == ""     # WebGL 2 was there, and the shaders compiled and linked
    assert [seen["canvas"]["width"], seen["canvas"]["height"]] == seen["canvas"]["client"]
    for name, t in (("first", 0), ("last", 3), ("home", 0), ("follow", 0), ("resized", seen["stopped"]["time"])):
        shot = picture(tmp_path/f"{name}.png")
        assert shot.std() > 0.1 and psnr(shot, as_the_page_shows(tl, t, shot.shape[:2])) > 33, name   # measured: 35.4 where a wall of one depth fills the view, 42.6 elsewhere
    shot = picture(tmp_path/"last.png")
    assert psnr(shot[:, 1:], as_the_page_shows(tl, 3, shot.shape[:2])[:, :-1]) < 34 < psnr(shot, as_the_page_shows(tl, 3, shot.shape[:2]))     # one pixel beside it would be seen
    assert all(seen["steps"].values()), seen["steps"]
    assert seen["first"]["follow"] == "true" and seen["last"]["time"] == 3 and seen["slider"]["movers"] == "true"
    assert seen["home_again"] and seen["still_when_released"] and seen["following"]["follow"] == "true" and (seen["next"], seen["back"]) == (1, 0)
    assert seen["playing"] == "true" and len(set(seen["times"])) > 2 and seen["stopped"]["playing"] == "false"
    assert all(size[:2] == size[2:] for size in (seen["squeezed"], seen["resized"])) and "lost" in seen["lost"] and seen["poster"]
    phone = seen["phone"]
    assert phone["overflow"]["page"] <= phone["overflow"]["width"] == 390 and phone["canvas"][0] == 390 and phone["canvas"][1] > 400 and phone["tools"] <= 780
    assert phone["touch"] and phone["pinch"]


def test_viewers_of_odd_timelines_are_silent(tmp_path):
    tl = ideal_timeline(truth_clip("portrait", frames=2, size=(70, 44)))
    nothing = Timeline([g[:0] for g in tl.frames], [i[:0] for i in tl.ids], tl.c2w_T44, tl.K_33, tl.size, tl.numbers, tl.fps, tl.moving, "none")
    one = ideal_timeline(truth_clip("plain", frames=1, size=(40, 60)))
    behind = replace(one, c2w_T44=one.c2w_T44 @ torch.diag(torch.tensor([-1., 1, -1, 1], dtype=torch.float64)))
    named = {"portrait": tl, "nothing": nothing, "one": one, "behind": behind}
    pages = [str(write_viewer(tmp_path/f"{name}.html", x, poster=0)) for name, x in named.items()]
    seen = drive("silent", pages[0], tmp_path, pages=pages, size={"width": 300, "height": 300})
    assert len(seen) == 4 and all(page["said"] == [] and page["requests"] == [] and not page["plain"] for page in seen.values()), seen


# ---- reports, the index, the comparison, camera paths

def run_folder(root, name, status, result=None, seconds=None, cells=()):
    "A run that looks as `camflow run` leaves it, or as it looks on the way."
    import nbformat
    run_dir = new_run(name, {"steps": 3, "folder": "/a/long/path/" * 8}, root, changed={"steps": 3})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {name}\n\n## Clips"), *cells])
    nbformat.write(notebook, run_dir/"run.ipynb")
    (run_dir/"metrics.jsonl").write_text("".join(json.dumps({"step": k, "loss": 1 / (k + 1)}) + "\n" for k in range(20)))
    if result: write_result(run_dir, result)
    if status != "running":
        close_run(run_dir, status, **({"error": "InputError: " + "x" * 300} if status == "failed" else {}))
        info = json.loads((run_dir/"run.json").read_text())
        (run_dir/"run.json").write_text(json.dumps({**info, "seconds": seconds}))
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    "Three runs: one with clips as WebP and MP4, one failed, one running in this process."
    import nbformat
    root = tmp_path_factory.mktemp("reports")
    clip = truth_clip("crossing", frames=4, size=(68, 120)).frames
    wide = pd.DataFrame({f"a column with a long name {k}": [0.5] * 3 for k in range(14)})
    shows = [video_grid({"as WebP": clip, "again": clip}, kind="webp"), video_grid({"as MP4": clip, "again": clip}, kind="mp4"), camera_viewer({"path": truth_clip("crossing", frames=4, size=(68, 120)).cameras})]
    shown = [*(str(x) for x in shows), wide.to_html()]
    cells = [nbformat.v4.new_code_cell("y = " + "1 + " * 60 + "1", outputs=[nbformat.v4.new_output("display_data", {"text/html": x})]) for x in shown]
    return root, run_folder(root, "clips", "ok", {"psnr": 31.5}, 75.0, cells), run_folder(root, "broken", "failed", None, 8.0), run_folder(root, "training", "running")


def fits(seen): return seen["said"] == [] and seen["requests"] == [] and seen["phone"]["width"] == 390 and seen["phone"]["page"] <= 390 and seen["phone"]["out"] == []


def test_a_report_plays_offline_and_fits_a_narrow_screen(reports, tmp_path):
    seen = drive("report", reports[1]/"report.html", tmp_path)
    assert fits(seen), seen
    assert seen["images"] == [True, True] and seen["videos"] == [True, True]
    assert seen["focus"] == "A" and seen["opened"]
    assert fits(drive("report", reports[2]/"report.html", tmp_path))


def test_the_index_sorts_filters_and_leads_to_a_running_run(reports, tmp_path):
    root, clips, broken, training = reports
    seen = drive("index", build_index(root), tmp_path, follow="training")
    assert fits(seen), seen
    assert sorted(seen["statuses"]) == ["failed", "ok", "running"] and seen["filtered"] == ["running"]
    took = [training.name, broken.name, clips.name]
    assert seen["orders"]["took"] == took and seen["orders"]["took_down"] == took[::-1]
    begun = [clips.name, broken.name, training.name]
    assert seen["orders"]["started"] == begun and seen["orders"]["started_down"] == begun[::-1] and seen["aria"] == "descending" and not seen["took_aria"]
    assert seen["tabs"][:2] == ["INPUT", "TH"] and seen["followed"] == "training" and seen["status"] == "running"


def test_the_page_of_a_running_run_renews_itself_until_it_is_final(tmp_path):
    root = tmp_path/"reports"
    env = {**os.environ, "CAMFLOW_REPORTS": str(root), "OMP_NUM_THREADS": "1"}   # trained for a time, not for a number of steps, which a fast machine takes between two looks
    process = subprocess.Popen([sys.executable, "-m", "camflow.lab.cli", "run", "flow_train", "-f", "smoke", "-q", "-p", "steps=100000", "-p", "max_seconds=25", "-p", "validate_every=100000"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        for _ in range(600):
            if (root/"index.html").exists() or process.poll() is not None: break
            time.sleep(0.1)
        seen = drive("live", root/"index.html", tmp_path, follow="flow_train", patience=240)
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out
    assert fits(seen), seen
    assert seen["listed"] == ["running"] and seen["listed_last"] == ["ok"] and seen["first"]["status"] == "running" and seen["first"]["elapsed"]
    looks = seen["looks"]
    assert looks[-1]["status"] == "ok" and len({look.get("words") for look in looks}) > 3 and seen["loads"] > 4, looks
    assert any("step " in (look["words"] or "") and look["curves"] for look in looks[:-1]), looks   # a step and curves were seen while it ran
    shares = [look["share"] for look in looks[:-1]]
    assert all(0 <= share <= 1 for share in shares) and len(set(shares)) > 2
    assert seen["rests"] and seen["sections"] > 1


def test_camera_paths_turn_and_play_by_keyboard(tmp_path):
    clip = truth_clip("crossing", frames=4, size=(68, 120))
    page = tmp_path/"cameras.html"
    page.write_text(f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>cameras</title><body>{camera_viewer({"path": clip.cameras}, clips={"path": clip.frames}, fps=12)}</body></html>')
    seen = drive("cameras", page, tmp_path)
    assert fits(seen) and seen["drawn"] and seen["focus"] == "CANVAS" and all(seen["steps"].values()), seen
    assert [f["at"] for f in seen["frames"]] == [0, 1, 0, 3, 0] and [f["at"] for f in seen["slider"]] == [0, 1, 3]
    assert len({f["picture"] for f in seen["frames"]}) == 3 and seen["slider"][2]["picture"] == seen["frames"][3]["picture"]
    assert seen["slider"][2]["said"].startswith("frame 3; path: right ") and seen["button"] == "BUTTON" and seen["played"] == 3 and seen["stopped"]


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory):
    "A JupyterLab of our own: a folder, and how to open a notebook that lies in it."
    folder = tmp_path_factory.mktemp("lab")
    port = free_port()
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder/".config"), "JUPYTER_DATA_DIR": str(folder/".data"), "JUPYTER_RUNTIME_DIR": str(folder/".runtime"), "JUPYTERLAB_SETTINGS_DIR": str(folder/".settings"),
           "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    words = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *(["--allow-root"] if os.geteuid() == 0 else [])]
    with open(folder/"server.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(1200):
            if process.poll() is not None: raise RuntimeError((folder/"server.log").read_text()[-2000:])
            with socket.socket() as door:
                if door.connect_ex(("127.0.0.1", port)) == 0: break
            time.sleep(0.1)
        yield folder, lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?reset"
    finally:
        try: os.killpg(process.pid, signal.SIGTERM); process.wait(15)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL); process.wait()


def test_the_cameras_tutorial_runs_in_jupyterlab(jupyterlab, tmp_path):
    import nbformat
    folder, address = jupyterlab
    tutorial = nbformat.read(HERE.parents[1]/"nbs/tutorials/cameras.ipynb", 4)
    tutorial.cells.append(nbformat.v4.new_code_cell('f"Python sees frame {widget.frame}"'))
    nbformat.write(tutorial, folder/"cameras.ipynb")
    seen = drive("lab", address("cameras.ipynb"), tmp_path, wanted="Python sees frame 3", **{"from": "frame 8;"})   # where the tutorial itself moves the slider
    assert seen["widgets"] >= 1 and seen["errors"] == 0
    assert [w.split(";")[0] for w in seen["words"]] == [f"frame {k}" for k in range(4)] and len(set(seen["pictures"])) == 4
    assert seen["turned"] and seen["last_cell"] == seen["cell"], (seen["turned"], seen["cell"], seen["last_cell"])   # JupyterLab did not take the arrow keys for its cells
    assert seen["told"].strip("'") == "Python sees frame 3"
    ours = [line for line in seen["said"] if any(word in line for word in ("cameraView", "cameraScene", "anywidget", "uncaught")) and "to activate" not in line]   # JupyterLab counts its plugins' seconds
    assert ours == [], ours


def test_the_gallery_filters_sorts_and_shows_its_pictures(tmp_path):
    gallery = HERE.parents[1]/"reports/gallery"
    seen = drive("gallery", gallery/"index.html", tmp_path, word="omnicam")
    assert fits(seen), seen
    assert len(seen["files"]) == len(list(gallery.glob("*.html"))) - 1 and seen["files"] == sorted(seen["files"])
    assert len(seen["pictures"]) > 8 and all(seen["pictures"]) and seen["filtered"] == ["omnicam_generate"] and seen["count"] == "1"
    assert seen["by_title"] == sorted(seen["by_title"], key=str.lower) and seen["focus"] == ["INPUT", "SELECT", "A"]
    assert seen["opened"] == "OmniCam: generate" and seen["back"].startswith("Gallery")


def test_a_comparison_fits_a_narrow_screen(tmp_path):
    from camflow.lab.evaluation import compare_page
    from tests.test_evaluation import long
    a = long({"psnr": lambda s, g: 20. + s, "a metric with a long name": lambda s, g: 0.1 * s}, 6, 1)
    compare_page(a, a.assign(value=a["value"] + 1), tmp_path/"c.html", ("first", "second"), n=100)
    assert fits(drive("report", tmp_path/"c.html", tmp_path))

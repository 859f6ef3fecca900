"""Pages in a real headless browser: the viewer of a timeline, reports, the index of all runs, the camera viewer. Needs node, Debian's chromium and playwright-core (`make browser`)."""
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from camflow.gflow.ideal import ideal_timeline
from camflow.gflow.timeline import Timeline
from camflow.gflow.truth import truth_clip
from camflow.gflow.viewer import write_viewer

HERE = Path(__file__).with_name("browser")
CHROMIUM = next((found for name in (os.environ.get("CAMFLOW_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome") if name and (found := shutil.which(name))), None)
PLAYWRIGHT = next((folder for folder in (os.environ.get("CAMFLOW_PLAYWRIGHT"), HERE) if folder and (Path(folder)/"node_modules/playwright-core/package.json").is_file()), None)
MISSING = [why for found, why in ((shutil.which("node"), "node is not installed"), (CHROMIUM, "chromium is not installed (apt install chromium, or CAMFLOW_CHROMIUM)"),
                                  (PLAYWRIGHT, "playwright-core is not installed (make browser, or CAMFLOW_PLAYWRIGHT)")) if not found]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING) + ": pages are not opened in a browser")]


def drive(task, page, folder, **options):
    "What tests/browser/drive.js saw; its pictures lie in `folder`."
    env = {**os.environ, "CAMFLOW_CHROMIUM": CHROMIUM, "CAMFLOW_PLAYWRIGHT": str(PLAYWRIGHT)}
    out = subprocess.run(["node", str(HERE/"drive.js"), task, str(page), str(folder), json.dumps(options)], capture_output=True, text=True, timeout=400, env=env)
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
    seen = drive("viewer", write_viewer(tmp_path/"viewer.html", tl, title="crossing"), tmp_path, size={"width": 480, "height": 380})
    assert seen["said"] == [] and seen["requests"] == [] and seen["phone"]["said"] == []
    assert seen["renderer"] and not seen["plain"] and seen["message"] == ""     # WebGL 2 was there, and the shaders compiled and linked
    assert [seen["canvas"]["width"], seen["canvas"]["height"]] == seen["canvas"]["client"]
    for name, t in (("first", 0), ("last", 3), ("home", 0), ("follow", 0), ("resized", 0)):
        shot = picture(tmp_path/f"{name}.png")
        assert shot.std() > 0.1 and psnr(shot, as_the_page_shows(tl, t, shot.shape[:2])) > 28, name   # measured: 31.5 and more
    assert psnr(picture(tmp_path/"first.png"), picture(tmp_path/"last.png")) < 25    # so that 28 dB means something
    assert all(seen["steps"].values()), seen["steps"]
    assert seen["first"]["follow"] == "true" and seen["last"]["time"] == 3 and seen["slider"]["movers"] == "true"
    assert seen["home_again"] and seen["still_when_released"] and seen["following"]["follow"] == "true" and (seen["next"], seen["back"]) == (1, 0)
    assert seen["playing"] == "true" and len(set(seen["times"])) > 2 and seen["stopped"]["playing"] == "false"
    assert seen["resized"][:2] == seen["resized"][2:] and "lost" in seen["lost"] and seen["poster"]
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

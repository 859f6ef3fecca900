"The documentation site in a real browser, from the disk: search, dark, narrow, nothing said on the console, nothing fetched. Needs what tests/test_browser.py needs, and the extra docs."
import json
import os
import subprocess
import sys

import pytest

from camflow.assets import repo_root
from tests.test_browser import CHROMIUM, HERE, MISSING, PLAYWRIGHT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING) + ": the site is not opened in a browser")]
PAGES = ["book/geometry/camera.html", "book/rl/advantage.html", "tutorials/cameras.html", "index.html", "systems/recam.html", "systems/gflow.html", "coming_from/recammaster.html", "where.html", "runs/recam_grpo.html", "gallery.html", "reference/geometry.html"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A site of four notebooks and the overview, executed but for the run, and all prose pages."
    pytest.importorskip("myst_nb", reason="the extra docs is not installed")
    pytest.importorskip("pydata_sphinx_theme", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("docs")
    chosen = ["geometry/01_camera", "rl/04_advantage", "tutorials/cameras", "runs/recam_grpo.ipynb"]
    done = subprocess.run([sys.executable, "-m", "camflow.lab.docs", "--out", folder/"site", "--execute", "--kept", folder/"kept", "--only", *chosen], cwd=repo_root(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "4 notebooks executed" in done.stdout and " 0 problems" in done.stdout, (done.stdout + done.stderr)[-3000:]
    env = {**os.environ, "CAMFLOW_CHROMIUM": CHROMIUM, "CAMFLOW_PLAYWRIGHT": str(PLAYWRIGHT)}
    out = subprocess.run(["node", HERE/"site.js", folder/"site", json.dumps({"pages": PAGES, "words": ["Cameras", "advantage"]})], capture_output=True, text=True, timeout=900, env=env, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)


def test_nothing_is_said_and_nothing_fetched(site): assert site["said"] == [] and site["requests"] == []


def test_search_finds_what_was_asked_for(site):
    assert site["found"] == {"Cameras": ["book/geometry/camera.html#camflow-geometry-camera-cameras", "camera#"], "advantage": ["book/rl/advantage.html#camflow-rl-advantage-advantage", "advantage#"]}


def test_pages_fit_and_are_readable(site):
    for name, looks in site["pages"].items():
        assert all(look["page"] <= look["window"] for look in looks.values()), name     # wide tables and code scroll inside their boxes
        assert all(look["broken"] == [] for look in looks.values()), name
        assert looks["wide"]["background"] > 240 > 90 > looks["wide"]["ink"] and looks["dark"]["background"] < 40 < 180 < looks["dark"]["ink"], name
    assert looks["wide"]["menu"] >= 6 and {"Systems", "Tutorials", "The book"} <= set(site["drawer"])


def test_a_page_of_the_book_has_outputs_tables_and_formulas(site):
    page = site["pages"]["book/geometry/camera.html"]["wide"]
    assert page["outputs"] >= 3 and page["tables"] > 20 and page["formula"][1] > 12 and site["source"] > 40
    assert site["pages"]["tutorials/cameras.html"]["wide"]["outputs"] >= 4 and site["pages"]["tutorials/cameras.html"]["phone"]["images"] > 0
    assert site["pages"]["runs/recam_grpo.html"]["wide"]["outputs"] == 0
    assert site["pages"]["systems/gflow.html"]["wide"]["images"] > 0 and site["pages"]["gallery.html"]["wide"]["images"] > 3

"""The documentation site: pages from notebooks, links that lead somewhere, nothing fetched from elsewhere."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from camflow.assets import repo_root
from camflow.files import InputError
from camflow.lab.doc_pages import Site, Symbols, convert, escape, lookup, page_name, reference, sources
from camflow.lab.doc_outputs import execute_notebooks, fill, modules_of, output_key
from camflow.lab.docs import external, main, mathml, names_index

ROOT = repo_root()


def cell(source, kind="code", **more):
    return {"cell_type": kind, "source": source, "metadata": {}, **({"outputs": [], "execution_count": None} if kind == "code" else {}), **more}


@pytest.fixture
def book(tmp_path):
    "A checkout with one notebook of a real module, one prose page and one report."
    for name in ("nbs/media", "docs/howto", "reports/gallery", "servers/one"): (tmp_path / name).mkdir(parents=True)
    picture = {"output_type": "display_data", "data": {"image/png": "aGk=", "application/vnd.jupyter.widget-view+json": {}}, "metadata": {}}
    cells = [cell("# files\n\n> Files\n\nSee `write_json` and `nothing_here`.", "markdown"), cell("#| default_exp files"), cell("#| hide\nsecret = 1"),
             cell("#| export\ndef write_json(path, obj):\n    return 1\n\ndef _inner(): ..."), cell("write_json", outputs=[picture])]
    (tmp_path / "nbs/00_files.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "nbs/index.ipynb").write_text(json.dumps({"cells": [cell("# camflow", "markdown")], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    (tmp_path / "docs/howto/data.md").write_text("# Your data\n\nRead [files](../../nbs/00_files.ipynb), `camflow.files.write_json`, $x_t$.\n")
    (tmp_path / "reports/gallery/run.html").write_text("<title>A run</title>")
    (tmp_path / "servers/one/README.md").write_text("# One\n")
    return tmp_path


def page_of(book, source="nbs/00_files.ipynb"):
    site = Site(book, sources(book))
    notebook = json.loads((book / source).read_text())
    site.symbols.add(notebook, site.pages[source])
    return convert(notebook, source, site.pages[source], site), site


def test_a_notebook_becomes_a_page(book):
    page, site = page_of(book)
    texts = [c["source"] for c in page["cells"]]
    assert "[`write_json`](#camflow.files.write_json)" in texts[0] and "`nothing_here`." in texts[0]
    assert texts[1].startswith("(camflow.files.write_json)=\n## write\\_json") and "| `path` |" in texts[1]
    assert not any("secret" in t or "default_exp" in t or "#|" in t for t in texts)
    assert page["cells"][2]["metadata"]["tags"] == ["hide-input"] and "_inner" in texts[2]
    assert list(page["cells"][3]["outputs"][0]["data"]) == ["image/png"], "a widget without a kernel is dead, its picture stays"
    assert site.problems == []


def test_a_notebook_that_is_not_there(book):
    assert list(sources(book, ["00_fi"]).values())[0] == "book/base/files"
    with pytest.raises(InputError, match="'00_flies'"): sources(book, ["files", "00_flies"])


def test_links_follow_their_targets(book):
    _, site = page_of(book)
    def go(link): return site.prose(f"[words]({link})", "docs/howto/data.md", "howto/data")
    assert go("../../nbs/00_files.ipynb") == "[words](/book/base/files.ipynb)" == go("../../camflow/files.py")
    assert go("../../reports/gallery/run.html#top") == '<a href="../gallery/run.html#top">words</a>' and site.files["reports/gallery/run.html"] == "gallery/run.html"
    assert go("https://example.org/a.html") == "[words](https://example.org/a.html)" and go("../../servers") == "words"
    assert go("../../servers/one/README.md") == "[words](/servers/one.md)" and site.problems == []
    assert go("../gone.md") == "words" and "docs/howto/data.md: the link ../gone.md" in site.problems[0]
    assert site.prose("![a < b](../reports/gallery/run.html)", "docs/x.md", "x").startswith('<img src="gallery/run.html" alt="a &lt; b"')


def test_code_and_formulas_are_left_alone(book):
    _, site = page_of(book)
    text = "```python\n[a](b) `camflow.files.gone`\n```\n$[a](b)$ ``[a](b)``"
    assert site.prose(text, "docs/x.md", "x") == text and site.problems == []


def test_a_full_name_that_is_gone_is_a_problem(book):
    _, site = page_of(book)
    assert site.prose("`camflow.files.InputError` `camflow.files`", "docs/x.md", "x").count("](/book/base/files.ipynb)") == 2
    site.prose("`camflow.files.no_such_name` `camflow.no_module`", "docs/x.md", "x")
    assert [p.split()[-1] for p in site.problems] == ["camflow.files.no_such_name", "camflow.no_module"]


def test_names_that_differ_in_case_keep_their_own_labels():
    symbols = Symbols()
    symbols.add({"cells": [cell("#| default_exp toy"), cell("#| export\nclass Tiles:\n    def grow(self): ...\ndef tiles(): ...")]}, "toy")
    labels = [symbols.find(n, "camflow.toy") for n in ("Tiles", "tiles")]
    assert len({label.lower() for label in labels}) == 2 and symbols.find("Tiles.grow") == labels[0]


def test_reference_takes_text_literally():
    def sample(a: "int | None" = None,  # a < b, [T,3] and a|b
               *, path=Path("x")) -> dict: # where to
        "Uses *stars*, $money$ and `code|here`."
    text = reference(sample, "sample")
    assert "sample(a=None, *, path=" in text and r"\*stars\*, \$money\$ and `code|here`" in text
    assert r"| `a` | `int \| None` | `None` | a \< b, \[T,3\] and a\|b |" in text and "| where to |" in text
    assert escape("`a|b` <x>") == r"`a|b` \<x\>"


def test_reference_gives_each_parameter_of_a_line_its_comment():
    def sample(self, a, b: tuple,          # pixels; (H, W)
               *, c=1, d=np.zeros(2),      # share; of both; of all
               e: int = 0, **more) -> int: # steps; others
        return 1
    rows = {row.split("`")[1]: row.split(" | ")[-1].removesuffix(" |") for row in reference(sample, "sample").splitlines() if row.startswith("| `")}
    both = "`c`, `d`: share; of both; of all"
    assert rows == {"a": "pixels", "b": "(H, W)", "c": both, "d": both, "e": "steps", "**more": "others"}
    assert "| **returns** | `int` |  |  |" in reference(sample, "sample")


def test_reference_of_a_patched_class_method():
    text = reference(lookup("camflow.geometry.camera", "Cameras.from_w2c"), "Cameras.from_w2c")
    assert "Cameras.from_w2c(w2c, K, size, frames=None)" in text and "| `K` |  |  | `K`, `size`: as in Cameras |" in text


def test_two_sources_of_one_page_are_refused(book):
    (book / "nbs/01_files.ipynb").write_text((book / "nbs/00_files.ipynb").read_text())
    with pytest.raises(InputError, match="both become the page book/base/files"): sources(book)


def test_every_source_of_the_repository_has_its_own_page():
    pages = sources(ROOT)
    assert len(pages) == len(set(pages.values())) > 300 and pages["nbs/index.ipynb"] in ("index", "overview")
    assert all(page_name(s) == p for s, p in pages.items() if s != "nbs/index.ipynb")


def test_every_system_has_a_picture_and_says_how_it_is_made():
    from tools.doc_pictures import DRAWN
    pictures = {p.stem: p for p in (ROOT / "docs/pictures").iterdir()}
    assert pictures.keys() == DRAWN.keys() == {p.stem for p in (ROOT / "docs/systems").glob("*.md")}
    for name, path in pictures.items():
        page = (ROOT / f"docs/systems/{name}.md").read_text("utf-8")
        assert path.stat().st_size < 61_000 and f"](../pictures/{path.name})" in page and f"`python -m tools.doc_pictures {name}`" in page and "## Measured" in page, name


def test_pictures_are_taken_from_small_and_large_clips_of_a_report():
    import torch
    from camflow.lab.views import video_grid
    from camflow.media.frames import Frames
    from tools.doc_pictures import page_clips
    grey = Frames(torch.stack([torch.full((3, 32, 48), value, dtype=torch.uint8) for value in (40, 120, 200)]), "byte", 8)
    for kind in ("webp", "mp4"): # video_grid chooses by size; a report of gflow_fit has been both
        clips = page_clips(video_grid({"a": grey, "b": grey}, kind=kind)._repr_html_())
        assert [tuple(c.shape) for c in clips] == [(3, 3, 32, 48)] * 2
        for clip in clips: assert (clip.float().mean((1, 2, 3)) - torch.tensor([40., 120., 200.])).abs().max() < 4


def test_what_would_be_fetched_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://x.org">no</a> <script src="/local.js"></script> <link rel="stylesheet" href="https://cdn.org/a.css">')
    (tmp_path / "b.css").write_text("@import url(//fonts.org/f.css); a {background: url(https://x.org/p.png)} b {background: url(data:image/png;base64,aa)}")
    assert [a for _, a in external(tmp_path)] == ["//cdn.org/a.css", "//fonts.org/f.css", "//x.org/p.png"]
    assert external(ROOT / "reports/gallery") == []


def test_index_of_names(book):
    _, site = page_of(book)
    assert "- [`write_json`](#camflow.files.write_json):" in names_index(site)["base"]


def test_formulas_are_mathml():
    pytest.importorskip("latex2mathml", reason="the extra docs is not installed")
    assert mathml(r"\frac{a}{b}").startswith("<math") and "<mfrac>" in mathml(r"\frac{a}{b}")
    with pytest.raises(InputError, match="nosuchcommand"): mathml(r"\nosuchcommand{x}")


def notebook(*sources, kind="code"):
    return {"cells": [{**cell(s, kind), "id": f"c{k}"} for k, s in enumerate(sources)], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_notebooks_are_executed_once(tmp_path):
    "Outputs are kept by content; what fails or hangs has a status and is tried again."
    (tmp_path / "nbs/runs").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "toy"\n[tool.nbdev]\nnbs_path = "nbs"\ntst_flags = ["slow"]\n')
    texts = {"good": ("print('hello')\n6 * 7", "#| slow\n1 / 0", "#| eval: false\n1 / 0"), "bad": ("1 / 0",), "hang": ("import time\ntime.sleep(60)",), "runs/long": ("1 / 0",)}
    paths = [f"nbs/{name}.ipynb" for name in texts]
    for path, cells in zip(paths, texts.values()): (tmp_path / path).write_text(json.dumps(notebook(*cells)))
    said = []
    for seconds in (8, 40, 200):                         # a busy machine may need longer than 8 s for the good one
        said.clear()
        first = execute_notebooks(tmp_path, paths, tmp_path / "kept", workers=2, seconds=seconds, tell=said.append)
        if "timeout" not in [first.status[p][0] for p in paths[:2]]: break
    assert [first.status[p][0].replace("kept", "ok") for p in paths] == ["ok", "failed", "timeout", "run"] and len(said) == 2
    assert "division by zero" in first.problems()[0] and "hang.ipynb" in first.problems()[1]
    shown = fill(json.loads((tmp_path / paths[0]).read_text()), first.notebooks[paths[0]])["cells"]
    assert "".join(shown[0]["outputs"][0]["text"]) == "hello\n" and "42" in str(shown[0]["outputs"][1]) and not shown[1]["outputs"] and not shown[2]["outputs"]
    (tmp_path / paths[1]).write_text(json.dumps(notebook("1 + 1")))
    second = execute_notebooks(tmp_path, paths[:2], tmp_path / "kept", tell=said.append)
    assert [second.status[p][0] for p in paths[:2]] == ["kept", "ok"] and second.notebooks[paths[0]] == first.notebooks[paths[0]] and len(said) == 2


def test_outputs_are_kept_until_code_that_they_reach_changes(tmp_path):
    for folder in ("camflow/a", "nbs", "data/tiny/m"): (tmp_path / folder).mkdir(parents=True)
    files = {"camflow/a/top.py": "from .low import f", "camflow/a/low.py": "def f():\n    from ..far import g", "camflow/far.py": "tiny_path('m')", "camflow/a/named.py": "x = 1", "camflow/other.py": "", "data/tiny/m/w.safetensors": "w", "data/tiny/m/card.md": "c"}
    for name, text in files.items(): (tmp_path / name).write_text(text)
    code, words = "from camflow.a.top import f\nrun('camflow.a.named')", {"cell_type": "markdown", "source": "words", "metadata": {}}
    reached = modules_of(code, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in reached] == ["camflow/a/low.py", "camflow/a/named.py", "camflow/a/top.py", "camflow/far.py"]
    def key():
        book = notebook(code)
        book["cells"].append(words)
        return output_key(book, "nbs/x.ipynb", tmp_path)
    last = key()
    for name, matters in {"camflow/other.py": False, "data/tiny/m/card.md": False, "data/tiny/m/w.safetensors": True, "camflow/far.py": True, "camflow/a/named.py": True}.items():
        (tmp_path / name).write_text(files[name] + "  # longer")
        now = key()
        assert (now != last) == matters, name
        last = now
    words["source"] = "other words"
    assert key() == last


@pytest.mark.slow
def test_site(tmp_path):
    "The whole site: no warning, every symbol a heading, every local link a file, nothing fetched."
    pytest.importorskip("myst_nb", reason="the extra docs is not installed")
    pytest.importorskip("pydata_sphinx_theme", reason="the extra docs is not installed")
    done = subprocess.run([sys.executable, "-m", "camflow.lab.docs", "--out", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " 0 problems" in done.stdout, (done.stdout + done.stderr)[-4000:]
    dead = []
    for path in (tmp_path / "site").rglob("*.html"):
        if "gallery" in path.parts or "files" in path.parts: continue
        for link in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', re.sub(r"<pre>.*?</pre>", "", path.read_text("utf-8"), flags=re.S)): # code may speak of links
            if not re.match(r"[a-z]+:", link) and not (path.parent / link).exists(): dead.append((path.name, link))
    assert dead == []
    assert external(tmp_path / "site") == []
    assert "<math" in (tmp_path / "site/book/geometry/camera.html").read_text("utf-8")


@pytest.mark.slow
def test_a_broken_page_fails_the_build(book, monkeypatch, tmp_path, capsys):
    pytest.importorskip("myst_nb", reason="the extra docs is not installed")
    import sphinx.application # noqa: F401 - what it says goes to the stream of now, not to that of its first import
    monkeypatch.setattr("camflow.lab.docs.repo_root", lambda: book)
    (book / "docs/howto/bad.md").write_text("# Bad\n\n[gone](nowhere.md) and $\\nosuchcommand$\n")
    assert main(["--out", str(tmp_path / "bad")]) == 1
    said = capsys.readouterr()
    assert "nowhere.md" in said.out and "nosuchcommand" in said.err and " 2 problems" in said.out

"The gallery's index is what its reports say."
from pathlib import Path

from camflow.lab.gallery import command, facts, gallery_page
from camflow.lab.report import needs_network

GALLERY = Path(__file__).resolve().parents[1]/"reports"/"gallery"


def test_the_index_is_current():
    "python -m camflow.lab.gallery writes it."
    page = (GALLERY/"index.html").read_text(encoding="utf-8")
    assert page == gallery_page(GALLERY) and needs_network(page) == []


def test_every_report_tells_its_command():
    for path in GALLERY.glob("*.html"):
        found = facts(path.read_text(encoding="utf-8"))
        if found["run"]: assert command(found).startswith(f"camflow run {found['run']}"), path.name

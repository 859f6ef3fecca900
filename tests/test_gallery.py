"The gallery's index is what its reports say."
from pathlib import Path

from camflow.lab.gallery import command, facts, gallery_page, thumbnail
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


def test_a_page_of_large_clips_alone_has_a_picture():
    "Clips above 200,000 pixels are mp4 in reports: their cards showed a number instead."
    import base64, io
    import numpy as np
    import torch
    from PIL import Image
    from camflow.lab.views import video
    from camflow.media.frames import Frames
    red = torch.zeros(3, 3, 48, 64, dtype=torch.uint8)
    red[:, 0] = 200
    page = video(Frames(red, "byte", 8), kind="mp4")._repr_html_()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(thumbnail(page).split(",")[1]))), float)
    assert picture.shape == (48, 64, 3) and np.abs(picture.mean((0, 1)) - (200, 0, 0)).max() < 12

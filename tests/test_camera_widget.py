"The camera widget's state, its static page, and its script in node when there is one."
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.geometry.camera import Cameras, focal_K
from camflow.geometry.trajectory import preset
from camflow.lab.camera_widget import WIDGET, CameraWidget
from camflow.lab.report import needs_network
from camflow.lab.views import camera_viewer, viewer_data
from camflow.media.frames import Frames

SIZE = (24, 40)
CAMERAS = Cameras(preset("arc_left", 5), focal_K(30, SIZE), SIZE)
CLIP = Frames(torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, *SIZE) * 50, "byte", 6)


def test_state_is_shared_by_frame_and_data():
    widget, heard = CameraWidget({"path": CAMERAS}, {"path": CLIP}), []
    assert (widget.frame, widget.last, widget.data["fps"]) == (0, 4, 6)
    assert len(widget.data["clips"]["path"]) == len(set(widget.data["clips"]["path"])) == 5 and all(u.startswith("data:image/webp;base64,") for u in widget.data["clips"]["path"])
    assert {"frame", "data", "_esm"} <= set(widget.get_state()) and widget.get_state()["frame"] == 0
    widget.observe(lambda change: heard.append((change["old"], change["new"])), "frame")
    widget.set_state({"frame": 3})   # what a page sends
    assert widget.frame == 3 and heard == [(0, 3)]
    for wrong in (-1, 5):
        with pytest.raises(InputError, match="none of 0 to 4"): widget.frame = wrong
    assert widget.frame == 3
    widget.data = viewer_data({"short": CAMERAS.c2w[:2]})
    assert (widget.frame, widget.last) == (1, 1)


def test_what_is_drawn_is_what_was_given():
    data = viewer_data({"path": CAMERAS, "poses": CAMERAS.c2w[:3]})
    assert np.allclose(np.array(data["paths"]["path"]).reshape(5, 3, 4), CAMERAS.c2w[:, :3], atol=1e-5) and len(data["paths"]["poses"]) == 3
    left, top, right, bottom = data["lenses"]["path"]
    assert np.allclose([left, top, right, bottom], [-0.396, -0.2376, 0.396, 0.2376], atol=1e-6) and data["frame"] == 4   # 30 mm on a sensor of 23.76 mm: 0.792 wide; the last, where no clip is seen
    with pytest.raises(InputError, match="no camera paths"): viewer_data({})
    with pytest.raises(InputError, match="uint8"): viewer_data({"path": CAMERAS}, {"path": np.zeros((5, 3, 4, 4))})


def test_without_a_kernel_the_page_holds_it_all():
    widget = CameraWidget({"</script><b>": CAMERAS}, {"</script><b>": CLIP}, frame=2)
    bundle, *_ = widget._repr_mimebundle_()
    page = bundle["text/html"]
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    assert page == str(widget.static()) and '"frame": 2' in page and page.count("</script>") == 1 and page.count("<svg") == 3 and "<b>" not in page
    assert needs_network(page) == [] and "http" not in page and "import " not in WIDGET and "http" not in WIDGET
    assert str(camera_viewer({"a": CAMERAS}, clips={"a": CLIP}, frame=2)) == str(CameraWidget({"a": CAMERAS}, {"a": CLIP}, frame=2).static())   # one script for both


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed: the script is only read by browsers")
def test_the_script_is_valid(tmp_path):
    (tmp_path/"widget.mjs").write_text(WIDGET)
    (tmp_path/"run.mjs").write_text("import widget from './widget.mjs'; console.log(JSON.stringify(Object.keys(widget)))")
    assert json.loads(subprocess.run(["node", str(tmp_path/"run.mjs")], capture_output=True, text=True, check=True).stdout) == ["render"]

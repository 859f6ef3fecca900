"The evaluation engine: one pass, resume after a kill, crashes that stay where they belong, and every kind of bad video."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from camflow.geometry.camera import Cameras
from camflow.media.frames import Frames
from camflow.media.video import write_video
from camflow.metrics.clips import Clip
from camflow.metrics.engine import evaluate
from camflow.metrics.table import Table
from tests.engine_metrics import PSNR, Bug, Crash, Ends, Flicker, Levels, Needy, Slow

ROOT = Path(__file__).resolve().parents[1]
SAME = ["clip", "video", "cluster", "group", "metric", "value", "status", "reason", "weights", "version", "frames", "fps", "higher_is_better", "details", "job"]


def noise(seed, frames=12, h=48, w=64, level=256):
    return torch.randint(0, level, (frames, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def video(folder, name, data, fps=16): return write_video(Path(folder) / f"{name}.mp4", Frames(data, "byte", fps), lossless=True)


@pytest.fixture
def clips(tmp_path):
    source = video(tmp_path, "source", noise(9))
    cameras = Cameras(torch.eye(4).repeat(12, 1, 1), torch.tensor([[80.0, 0, 32], [0, 80, 24], [0, 0, 1]]), (48, 64))
    return [Clip(f"c{i}", video(tmp_path, f"v{i}", noise(i)), source=source, reference=source if i else None, cameras=cameras, group="even" if i % 2 == 0 else "odd")
            for i in range(3)]


def value(rows, clip, metric):
    row = rows[(rows["clip"] == clip) & (rows.metric == metric)]
    assert len(row) == 1, (clip, metric, len(row))
    return row.iloc[0]


def test_workers_and_this_process_agree(clips, tmp_path):
    metrics = [Flicker(), PSNR(), Ends(), Levels()]
    here = evaluate(clips, metrics, tmp_path / "a", processes=0)
    there = evaluate(clips, metrics, tmp_path / "b", processes=2)
    pd.testing.assert_frame_equal(here[SAME], there[SAME])
    assert value(here, "c0", "psnr").status == "skipped" and "no reference" in value(here, "c0", "psnr").reason
    assert value(here, "c1", "ends.focal").value == 40 # 64 pixels wide, looked at at 32
    level = value(here, "", "levels")
    assert json.loads(level.details)["n_fake"] == 3 and json.loads(level.details)["n_real"] == 1 and level["cluster"] == ""
    assert set(here["cluster"]) == {str(clips[0].source), ""} and (here[here["clip"] != ""].frames == 12).all()


def test_kill_and_resume_give_the_same_table(clips, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    more = [Clip(f"m{i}", clips[i % 3].video, source=clips[0].source, prompt=f"text {i}") for i in range(12)] # the text makes them different jobs
    code = (f"from pathlib import Path\nfrom camflow.metrics.clips import read_clips\nfrom camflow.metrics.engine import evaluate\nfrom tests.engine_metrics import *\n"
            f"if __name__ == '__main__': evaluate(read_clips({str(tmp_path / 'clips.json')!r}), [Flicker(), Slow({str(marks)!r}), Levels()], {str(tmp_path / 'out')!r}, processes=1)")
    from camflow.metrics.clips import write_clips
    write_clips(tmp_path / "clips.json", more)
    script = tmp_path / "run.py"
    script.write_text(code)
    child = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    parts = lambda: Table(tmp_path / "out/table.parquet").parts()
    deadline = time.monotonic() + 120
    while len(parts()) < 4 and child.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before, made = Table(tmp_path / "out/table.parquet").read(), len(list(marks.iterdir()))
    assert 4 <= len(set(before["clip"])) < 12, "killed in the middle"
    again = evaluate(more, [Flicker(), Slow(marks), Levels()], tmp_path / "out", processes=0)
    whole = evaluate(more, [Flicker(), Slow(marks), Levels()], tmp_path / "other", processes=0)
    pd.testing.assert_frame_equal(again[SAME], whole[SAME])
    assert len(again) == 12 * 2 + 1 and not again.duplicated(["clip", "metric"]).any()
    kept = Table(tmp_path / "out/table.parquet").read()
    assert kept[kept["clip"].isin(set(before["clip"]))].merge(before, on=["clip", "metric", "seconds"]).shape[0] == len(before), "finished rows were not touched"
    assert made >= 4


@pytest.mark.parametrize("how", ["abort", "segfault"])
def test_a_crash_costs_one_cell(clips, tmp_path, how):
    dark = Clip("dark", video(tmp_path, "dark", noise(5, level=20)), reference=clips[0].source)
    rows = evaluate([clips[0], dark, clips[2]], [Flicker(), Crash(how), PSNR(), Needy(), Bug(), Levels()], tmp_path / "out", processes=1)
    for metric in ("crash", "needy"):
        row = value(rows, "dark", metric)
        assert row.status == "failed" and ("SIGABRT" if how == "abort" and metric == "crash" else "SIGSEGV") in row.reason and np.isnan(row.value)
        assert value(rows, "c0", metric).status == value(rows, "c2", metric).status == "ok"
    assert value(rows, "dark", "flicker").status == value(rows, "dark", "psnr").status == "ok"
    assert set(rows[rows.metric == "bug"].status) == {"failed"} and "ZeroDivisionError" in value(rows, "dark", "bug").reason
    lost = json.loads(value(rows, "", "levels").details) if value(rows, "", "levels").status == "ok" else {}
    assert lost.get("n_fake") == 2 and lost["clips_lost"] == 1 and "no source" in lost["lost"]["dark"]


def test_a_hang_is_a_timeout(clips, tmp_path):
    dark = Clip("dark", video(tmp_path, "dark", noise(5, level=20)))
    rows = evaluate([dark, clips[1]], [Crash("hang"), Flicker()], tmp_path / "out", processes=1, patience=3)
    assert value(rows, "dark", "crash").status == "timeout" and value(rows, "dark", "flicker").status == "ok" and value(rows, "c1", "crash").status == "ok"

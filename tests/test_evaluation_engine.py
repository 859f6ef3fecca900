"The evaluation engine: one pass, resume after a kill, crashes that stay where they belong, and every kind of bad video."
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from camflow.files import read_json
from camflow.geometry.camera import Cameras
from camflow.media.frames import Frames
from camflow.media.video import write_video
from camflow.metrics import engine
from camflow.metrics.clips import Clip
from camflow.metrics.engine import evaluate
from camflow.metrics.feature_cache import describe
from camflow.metrics.streaming import as_metric, signature
from camflow.metrics.table import Table
from tests.engine_metrics import PSNR, Answer, Bug, Crash, Distance, Ends, Flicker, Levels, Needy, Slow

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
    (tmp_path / "hold").touch()
    child = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    parts = lambda: Table(tmp_path / "out/table.parquet").parts()
    deadline = time.monotonic() + 600
    while len(parts()) < 4 and child.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (tmp_path / "hold").unlink()
    before, made = Table(tmp_path / "out/table.parquet").read(), len(list(marks.iterdir()))
    assert 4 <= len(set(before["clip"])) < 12, "killed in the middle"
    again = evaluate(more, [Flicker(), Slow(marks), Levels()], tmp_path / "out", processes=0)
    whole = evaluate(more, [Flicker(), Slow(marks), Levels()], tmp_path / "other", processes=0)
    pd.testing.assert_frame_equal(again[SAME], whole[SAME])
    assert len(again) == 12 * 2 + 1 and not again.duplicated(["clip", "metric"]).any()
    kept = Table(tmp_path / "out/table.parquet").read()
    assert kept[kept["clip"].isin(set(before["clip"]))].merge(before, on=["clip", "metric", "seconds"]).shape[0] == len(before), "finished rows were not touched"
    assert made >= 4


@pytest.mark.parametrize("how", ["abort", pytest.param("segfault", marks=pytest.mark.slow)])
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


def test_a_hang_is_a_timeout(clips, tmp_path, monkeypatch):
    "The engine's clock runs 10,000 times as fast while the metric hangs, and only then: nothing else can be late on a slow machine."
    mark, skipped, last = tmp_path / "hangs", [0.0], [time.monotonic()]
    def clock():
        now = time.monotonic()
        if mark.exists() and Path(f"/proc/{read_json(mark)}").exists(): skipped[0] += 10_000 * (now - last[0])
        last[0] = now
        return now + skipped[0]
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=clock))
    dark = Clip("dark", video(tmp_path, "dark", noise(5, level=20)))
    rows = evaluate([dark, clips[1]], [Crash("hang", mark), Flicker()], tmp_path / "out", processes=1, patience=3600)
    assert skipped[0] > 3600 and "no progress for 3600 s" in value(rows, "dark", "crash").reason
    assert value(rows, "dark", "crash").status == "timeout" and value(rows, "dark", "flicker").status == "ok" and value(rows, "c1", "crash").status == "ok"


def plain_file(path, frames=12, h=48, w=64, pix_fmt="yuv420p", rate=16):
    "A file that another program has written."
    import av
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = h, w, pix_fmt
        for picture in noise(3, frames, h, w).permute(0, 2, 3, 1).contiguous().numpy():
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")): out.mux(packet)
        for packet in stream.encode(): out.mux(packet)
    return path


def test_every_kind_of_bad_video(tmp_path):
    good = video(tmp_path, "good", noise(1))
    (tmp_path / "text.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:good.stat().st_size // 2])
    files = {"text": tmp_path / "text.mp4", "empty": tmp_path / "empty.mp4", "cut": tmp_path / "cut.mp4", "absent": tmp_path / "absent.mp4", "one": video(tmp_path, "one", noise(2, 1)),
             "other_size": video(tmp_path, "small", noise(3, 12, 32, 32)), "shorter": video(tmp_path, "shorter", noise(4, 5)), "portrait": video(tmp_path, "portrait", noise(5, 12, 96, 32)),
             "ten_bit": plain_file(tmp_path / "ten.mp4", pix_fmt="yuv420p10le"), "good": good}
    clips = [Clip(k, f, reference=good) for k, f in files.items()] + [Clip("alone", good)]
    from camflow.metrics.suite import build
    rows = evaluate(clips, build("vbench, reference", random=False), tmp_path / "out", processes=0)
    status = {c: dict(zip(part.metric, part.status)) for c, part in rows.groupby("clip")}
    for bad in ("text", "empty", "cut", "absent"):
        assert {status[bad][m] for m in ("temporal_flickering", "psnr", "ssim")} == {"failed"}, bad
        assert all(str(files[bad]) in r for r in rows[(rows["clip"] == bad) & (rows.status == "failed")].reason)
    assert status["one"]["temporal_flickering"] == "failed" and "1 frames" in value(rows, "one", "temporal_flickering").reason
    for pair in ("other_size", "shorter", "portrait"):
        assert status[pair]["temporal_flickering"] == "ok" and status[pair]["psnr"] == "failed" and "alike" in value(rows, pair, "psnr").reason
    assert status["ten_bit"]["temporal_flickering"] == status["ten_bit"]["psnr"] == "ok" and status["alone"]["psnr"] == "skipped"
    assert status["good"]["subject_consistency"] == "no_weights" and "dino_vitbase16_pretrain.pth" in value(rows, "good", "subject_consistency").reason
    assert rows[~rows.status.isin(["ok"])].value.isna().all() and len(rows) == len(clips) * 10 and rows["seconds"].notna().all()


def test_without_a_frame_rate(tmp_path, monkeypatch):
    from dataclasses import replace

    import camflow.metrics.features as features
    from camflow.metrics.suite import build
    file, real = video(tmp_path, "v", noise(1)), features.probe
    monkeypatch.setattr(features, "probe", lambda path: replace(real(path), fps=float("nan")))
    rows = evaluate([Clip("v", file)], build("temporal_flickering, dynamic_degree", random=True, raft_iters=1), tmp_path / "out", processes=0)
    assert rows.status.tolist() == ["ok", "skipped"] and "fps" in rows.reason[1] and rows.fps.isna().all()


def test_second_evaluation_opens_no_video(clips, tmp_path, monkeypatch):
    from camflow.metrics.suite import build
    make = lambda: [*build("temporal_flickering, subject_consistency, clip_f, clip_v, clip_t, psnr", random=True), Ends()]
    clips = [Clip.of(c.record() | {"prompt": "noise"}) for c in clips]
    first = evaluate(clips, make(), tmp_path / "a", processes=0, cache=tmp_path / "cache")
    assert set(first.status) == {"ok", "random_weights", "skipped"}
    import camflow.media.video as module
    def closed(path): raise AssertionError(f"{path} was opened")
    with monkeypatch.context() as m:
        m.setattr(module, "_open", closed)
        again = evaluate(clips, make(), tmp_path / "b", processes=0, cache=tmp_path / "cache")
    pd.testing.assert_frame_equal(first[SAME], again[SAME])
    for entry in (tmp_path / "cache").rglob("*.safetensors"): entry.write_bytes(entry.read_bytes()[:-3])
    repaired = evaluate(clips, make(), tmp_path / "c", processes=0, cache=tmp_path / "cache")
    pd.testing.assert_frame_equal(first[SAME], repaired[SAME])


def test_one_decode_and_one_pass_for_all(clips, tmp_path, monkeypatch):
    "Every file is walked through once; CLIP sees a frame once, whoever asks."
    import camflow.metrics.features as features
    from camflow.metrics.suite import build
    walked, real, seen = [], features.video_chunks, []
    monkeypatch.setattr(features, "video_chunks", lambda path, size: walked.append(str(path)) or real(path, size))
    metrics = build("background_consistency, clip_t, clip_f, clip_v, temporal_flickering, psnr", random=True, clip="clip_b32", clip_input="clip", clip_frames=5)
    net = next(m for m in metrics if m.name == "clip_f").needs["rows"].feature.network
    images = type(net).image
    monkeypatch.setattr(type(net), "image", lambda self, x: seen.append(len(x)) or images(self, x))
    one = Clip("one", clips[1].video, source=clips[1].source, reference=clips[1].reference, prompt="noise")
    rows = evaluate([one], metrics, tmp_path / "out", processes=0)
    assert sorted(walked) == sorted({str(one.video), str(one.source)}) and set(rows.status) == {"ok", "random_weights"}
    assert sum(seen) == 12 + 5, "all frames of the video for the background, five of the source"


def test_resume_measures_only_what_is_missing(clips, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    evaluate(clips[:2], [Slow(marks)], tmp_path / "out", processes=0)
    assert len(list(marks.iterdir())) == 2
    rows = evaluate(clips, [Flicker(), Slow(marks)], tmp_path / "out", processes=0)
    assert len(list(marks.iterdir())) == 3 and len(rows) == 6
    clips[0].video.write_bytes(clips[1].video.read_bytes())            # another video under the same name, known already by its content
    again = evaluate(clips, [Flicker(), Slow(marks)], tmp_path / "out", processes=0)
    assert value(again, "c0", "flicker").value == value(again, "c1", "flicker").value != value(rows, "c0", "flicker").value
    assert len(Table(tmp_path / "out/table.parquet").read()) == 6


@pytest.mark.parametrize("processes", (0, 1))
def test_redo_and_no_resume_ask_plain_metrics_again(clips, tmp_path, processes):
    marks, calls = tmp_path / "marks", lambda: len(list(marks.iterdir()))
    marks.mkdir()
    again = lambda **how: evaluate(clips[:2], [Slow(marks)], tmp_path / "out", processes=processes, **how)
    again(), again(), again(redo=("failed",))
    assert calls() == 2
    again(redo=("ok",))
    assert calls() == 4
    again(resume=False)
    assert calls() == 6


OWN = """
import functools, json, sys
import numpy as np
import torch
from camflow.files import content_hash
from camflow.metrics.feature_cache import describe
def empty():
    def function(): return late
    if sys.argv[2:]: late = 1
    return function
def judge(low=str.lower):
    import json                 # a module is captured, too
    return lambda x: json.dumps(low(x) in {"alpha", "beta", "gamma"})
class Named:
    def __init__(self): self.words = np.array(["a", None, ("b", 1)], dtype=object)
    def __call__(self, x): return "a" if x in ("c", frozenset({"d", "e", "f"})) else super().__repr__()
own = dict(judge=judge(), judge_of_another=judge(str.upper), named=Named(), tensors=torch.Tensor, empty=empty(), part=functools.partial(judge, str.upper))
print(json.dumps({k: content_hash(describe(v), 12) for k, v in own.items()}))
"""


def test_keys_of_users_own_functions_are_the_same_in_every_process():
    "Sets among constants, modules, methods of built-in types, cells without content, arrays of objects."
    of = lambda seed: json.loads(subprocess.run([sys.executable, "-c", OWN], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    one, two = of("1"), of("2")
    assert one == two and len(set(one.values())) == len(one) == 6


PROGRAM = """
import sys
import numpy as np
from camflow.metrics.clips import read_clips
from camflow.metrics.engine import evaluate
from camflow.metrics.features import Differences
from camflow.metrics.interface import Result
from camflow.metrics.streaming import Need, SetMetric
class Own(Differences): pass
class Whole(SetMetric):
    name, needs = "whole", {"fake": Need(Own()), "real": Need(Own())}
    def score(self, fake, real, **labels): return Result("whole", float(np.mean([one["differences"].mean() for one in fake])))
if __name__ == "__main__": print(evaluate(read_clips("clips.json"), [Whole()], sys.argv[1], processes=int(sys.argv[1]), cache="features").value[0])
"""


def test_a_program_with_features_of_its_own(clips, tmp_path):
    "Workers know the program's module by another name; what they have measured is found."
    from camflow.metrics.clips import write_clips
    write_clips(tmp_path / "clips.json", clips)
    (tmp_path / "program.py").write_text(PROGRAM)
    def run(processes):
        done = subprocess.run([sys.executable, "program.py", str(processes)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True)
        return float(done.stdout), sum(path.is_file() for path in (tmp_path / "features").rglob("*"))
    value, files = run(1)
    assert value > 1 and run(0) == (value, files)


def test_sources_are_read_once_for_the_keys_of_all_metrics():
    from camflow.metrics.feature_cache import code_hash
    from camflow.metrics.streaming import signature
    from camflow.metrics.suite import build
    code_hash.cache_clear()
    for metric in build("all"): signature(metric)
    assert code_hash.cache_info().misses == 2    # with and without what lies below


def test_labels_follow_the_clips(clips, tmp_path):
    evaluate(clips, [Flicker()], tmp_path / "out", processes=0)
    clips[0].group, clips[0].cluster = "new", "another source"
    rows = evaluate(clips, [Flicker()], tmp_path / "out", processes=0)
    assert rows.group.tolist() == ["new", "odd", "even"] and rows["cluster"].nunique() == 2
    assert Table(tmp_path / "out/table.parquet").read().group.tolist().count("new") == 1


def test_weights_that_arrive_later_are_measured(clips, tmp_path):
    from camflow.metrics.suite import build
    none = evaluate(clips, build("subject_consistency"), tmp_path / "out", processes=0)
    some = evaluate(clips, build("subject_consistency", random=True), tmp_path / "out", processes=0)
    assert set(none.status) == {"no_weights"} and set(some.status) == {"random_weights"} and len(Table(tmp_path / "out/table.parquet").read()) == 3


def test_set_metrics_say_how_many_are_missing(clips, tmp_path):
    from camflow.metrics.suite import build
    rows = evaluate(clips, build("fvd_videogpt", random=True, fvd_frames=9, minimum=5), tmp_path / "out", processes=0)
    for r in rows.itertuples(): assert r.status == "skipped" and "3 generated and 1 real videos" in r.reason and "needs 5" in r.reason
    bad = evaluate(clips, build("fvd_common_metrics", random=True, fvd_frames=16), tmp_path / "out", processes=0)
    assert bad.status.tolist() == ["skipped"] and "12 frames" in bad.reason[0]


def test_a_set_metric_may_answer_a_plain_number(clips, tmp_path, monkeypatch):
    rows = evaluate(clips, [Distance()], tmp_path / "out", processes=0)
    assert rows.status.tolist() == ["ok"] and rows.value[0] == 3.5 and json.loads(rows.details[0])["clips"] == len(clips)
    monkeypatch.setattr(Distance, "answer", None)
    rows = evaluate(clips, [Distance()], tmp_path / "out", processes=0)
    assert rows.status.tolist() == ["failed"] and "NoneType" in rows.reason[0]


@pytest.mark.parametrize("metric, setting", [(Flicker, "scale"), (Answer, "answer")])
def test_another_setting_of_a_class_is_another_metric(metric, setting, monkeypatch):
    "Also one that stands in the class, as in `class Mine: threshold = 0.5`."
    key = lambda: signature(as_metric(metric()))
    before = key()
    assert before == key()
    monkeypatch.setattr(metric, setting, 2.0)
    assert key() != before


def test_a_class_that_holds_itself_has_a_key():
    class Node:
        def __init__(self, depth): self.depth = depth
    Node.first, Node.kind = Node(1), Node
    assert describe(Node(2)) == describe(Node(2)) != describe(Node(3))


def test_the_logger_of_a_class_is_its_name():
    "A logger leads to all others of the process: the key took seconds, and was another one after each import."
    class Mine: log = logging.getLogger("mine")
    before = describe(Mine())
    logging.getLogger("mine.later")
    assert describe(Mine()) == before and len(str(before)) < 1000


MEMORY = """
import sys, torch
from pathlib import Path
from camflow.device import memory_stats, set_threads
from camflow.metrics.clips import Clip
from camflow.metrics.engine import evaluate
from camflow.metrics.suite import build
set_threads(1)
if __name__ == "__main__":
    evaluate([Clip("short", sys.argv[1])], build("temporal_flickering, subject_consistency, background_consistency", random=True), sys.argv[3] + "/a", processes=0)
    before = memory_stats()["peak_bytes"]
    evaluate([Clip("long", sys.argv[2])], build("temporal_flickering, subject_consistency, background_consistency", random=True), sys.argv[3] + "/b", processes=0)
    print(before, memory_stats()["peak_bytes"])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path):
    h, w = 240, 416
    wide = (torch.nn.functional.interpolate(torch.rand(1, 3, 40, 200, generator=torch.Generator().manual_seed(0)), (h, w + 800), mode="bicubic").clamp(0, 1)[0] * 255).to(torch.uint8)
    for name, n in (("short", 81), ("long", 800)): write_video(tmp_path / f"{name}.mp4", Frames(torch.stack([wide[:, :, i:i + w] for i in range(n)]), "byte", 16), crf=30)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "short.mp4"), str(tmp_path / "long.mp4"), str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    short, long = map(int, done.stdout.split()[-2:])
    assert long - short < 24e6, f"{(long - short) / 1e6:.0f} MB more for ten times the length; the frames alone are {800 * 3 * h * w / 1e6:.0f} MB"


def test_suite_metric_is_a_reward_and_is_served():
    from camflow.metrics.vbench import temporal_flickering
    from camflow.rewards.metric_reward import MetricReward
    from camflow.rewards.protocol import Reward, Sample, run_reward
    from camflow.servers.worker import describe, make_reward
    reward = make_reward("camflow.rewards.metric_reward:MetricReward", {"metric": "temporal_flickering"})  # how a server makes it
    assert isinstance(reward, Reward) and isinstance(reward, MetricReward) and describe(reward)["model_rev"] == "none"
    scores = run_reward(reward, [Sample(noise(1)), Sample(noise(2)[:1])])
    assert scores.status == ["ok", "invalid"] or scores.status == ["ok", "failed"]
    assert abs(float(scores.values[0]) - temporal_flickering(noise(1))) < 1e-6

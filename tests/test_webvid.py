"WebVid: table, downloads against a local server that misbehaves, selection, the evaluation layout."
import csv
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from camflow.data.multicam import UnpairedVideos
from camflow.data.webvid import Entry, Pace, download_videos, read_webvid, select, write_evaluation
from camflow.files import InputError, read_json, sha256_file
from camflow.geometry.camera import Cameras
from camflow.geometry.trajectory import PRESETS, preset
from camflow.media.frames import Frames
from camflow.media.video import write_video

ROOT = Path(__file__).resolve().parents[1]


class Web(ThreadingHTTPServer):
    "Serves one video under many names; how depends on the name."
    def __init__(self, data):
        self.data, self.asked, self.times, self.lock, self.go = data, [], [], threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name): return f"http://127.0.0.1:{self.server_port}/{name}.mp4"


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        name, web = self.path.strip("/").removesuffix(".mp4").rstrip("0123456789"), self.server
        with web.lock:
            web.asked.append((self.path, self.headers.get("Range")))
            web.times.append(time.monotonic())
            turn = sum(path == self.path for path, _ in web.asked)
        if name == "missing": return self.send_error(404)
        if name == "busy" and turn == 1:
            self.send_response(429), self.send_header("Retry-After", "1"), self.send_header("Content-Length", "0")
            return self.end_headers()
        if name == "weak" and turn == 1: return self.send_error(500)
        if name == "down": return self.send_error(503)
        data = b"<html>This video was removed.</html>" if name == "page" else web.data
        start = int(self.headers["Range"].split("=")[1].rstrip("-")) if self.headers.get("Range") else 0
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start)), self.send_header("ETag", '"v1"'), self.end_headers()
        try:
            if name == "broken" and turn < 3: self.wfile.write(data[start:start + len(data) // 3])      # the connection ends early
            elif name == "slow":
                half = max(start, len(data) // 2)
                self.wfile.write(data[start:half]), self.wfile.flush(), web.go.wait(600)   # the second half when the test says so
                self.wfile.write(data[half:])
            else: self.wfile.write(data[start:])
        except (BrokenPipeError, ConnectionResetError): pass


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    return write_video(tmp_path_factory.mktemp("v")/"a.mp4", Frames(torch.randint(0, 255, (12, 3, 48, 64), generator=g, dtype=torch.uint8), "byte", 4)).read_bytes()


@pytest.fixture
def web(video):
    server = Web(video)
    yield server
    server.shutdown()


def entries(web, *names): return [Entry(str(i), web.url(name), 3.0, "page", f"Words, about {name}") for i, name in enumerate(names, 1)]
QUICK = dict(per_second=0, retries=2, wait=0.01)


def test_each_download_ends_in_a_status(web, tmp_path):
    asked = entries(web, "good1", "missing1", "busy1", "weak1", "broken1", "page1", "down1", "good2")
    got = download_videos(asked, tmp_path/"videos", **QUICK)
    assert [got[str(i)]["status"] for i in range(1, 9)] == ["ok", "failed", "ok", "ok", "ok", "failed", "failed", "ok"]
    assert "404" in got["2"]["reason"] and "no video" in got["6"]["reason"] and "503" in got["7"]["reason"] and got["2"]["final"] and not got["7"]["final"]
    assert len({sha256_file(tmp_path/f"videos/{i}.mp4") for i in (1, 3, 4, 5, 8)}) == 1 and (got["1"]["frames"], got["1"]["seconds"]) == (12, 3.0)
    ranges = [r for path, r in web.asked if "broken" in path]
    assert ranges[0] is None and len(ranges) == 3 and all(int(r.split("=")[1][:-1]) > 0 for r in ranges[1:])        # continued, not begun again
    assert {p.name for p in tmp_path.iterdir()} == {"videos"} and {p.name for p in (tmp_path/"videos").glob("*.mp4")} == {f"{i}.mp4" for i in (1, 3, 4, 5, 8)}
    before = len(web.asked)
    download_videos(asked, tmp_path/"videos", **QUICK)
    assert {path for path, _ in web.asked[before:]} == {"/down1.mp4"}                                                # what may come later, and nothing else
    download_videos(asked, tmp_path/"videos", retry=True, **QUICK)
    assert "/missing1.mp4" in {path for path, _ in web.asked[before + 3:]}
    (tmp_path/"videos/1.mp4").write_bytes(b"cut")
    assert download_videos(asked[:1], tmp_path/"videos", **QUICK)["1"]["status"] == "ok" and (tmp_path/"videos/1.mp4").stat().st_size == got["1"]["bytes"]


def test_all_threads_share_one_rate(web, tmp_path):
    begin = time.monotonic()
    download_videos(entries(web, *(f"good{i}" for i in range(8))), tmp_path, parallel=8, per_second=20)
    assert len(web.times) == 8 and all(came - begin >= n / 20 for n, came in enumerate(sorted(web.times)))          # counted from the first, however late a slow machine begins with it
    pace, begin = Pace(1000), time.monotonic()
    for _ in range(5): pace.wait(50)
    assert time.monotonic() - begin >= 0.19                                                                          # bytes are shared out like requests


def test_too_large_is_refused(web, video, tmp_path):
    got = download_videos(entries(web, "good1"), tmp_path, max_bytes=len(video) - 1, **QUICK)
    assert got["1"]["status"] == "failed" and "raise max_bytes" in got["1"]["reason"] and not (tmp_path/"1.mp4").exists()


KILLED = """
import sys
from camflow.data.webvid import Entry, download_videos
download_videos([Entry(str(i), url, 3.0, "p", "t") for i, url in enumerate(sys.argv[2:], 1)], sys.argv[1], parallel=1, per_second=0)
"""


def test_a_killed_pass_continues_in_the_middle_of_a_file(web, video, tmp_path):
    urls = [web.url("good1"), web.url("slow1")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), *urls], env={**os.environ, "PYTHONPATH": str(ROOT)})
    part, until = tmp_path/".2.mp4.part", time.monotonic() + 600
    while not (part.exists() and part.stat().st_size > 1000) and time.monotonic() < until: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    web.go.set()
    assert 1000 < part.stat().st_size < len(video)
    have, before = part.stat().st_size, len(web.asked)
    got = download_videos([Entry(str(i), url, 3.0, "p", "t") for i, url in enumerate(urls, 1)], tmp_path, **QUICK)
    assert web.asked[before:] == [("/slow1.mp4", f"bytes={have}-")] and got["2"]["status"] == "ok" and (tmp_path/"2.mp4").read_bytes() == video


def test_the_table_is_read_with_its_faults(tmp_path):
    rows = [["1", "https://h/a.mp4", "PT00H00M31S", "p", "Waves, and \"foam\""], ["../../2", "https://h/b.mp4", "PT9S", "p", "x"], ["3", "file:///etc/passwd", "", "p", "x"], ["4", "https://h/c.mp4", "soon", "p", "x"],
            ["1", "https://h/a.mp4", "PT9S", "p", "again"], ["5", "https://h/d.mp4", "PT9S", "p", ""], ["6", "https://h/e.mp4", "PT1M0S", "p", "Café"]]
    with open(tmp_path/"t.csv", "w", encoding="cp1252", newline="") as file: csv.writer(file).writerows([["videoid", "contentUrl", "duration", "page_dir", "name"], *rows])
    found, bad = read_webvid(tmp_path/"t.csv")
    assert [(e.id, e.text) for e in found] == [("1", 'Waves, and "foam"'), ("4", "x"), ("6", "Café")] and found[0].seconds == 31 and found[1].seconds != found[1].seconds and found[2].seconds == 60
    assert len(bad) == 4 and any("no plain name" in r for r in bad.values()) and any("no http(s) URL" in r for r in bad.values())
    (tmp_path/"t.csv").write_text("id,url\n1,x\n")
    with pytest.raises(InputError, match="columns.*are missing"): read_webvid(tmp_path/"t.csv")


def test_the_evaluation_layout(web, tmp_path):
    asked = entries(web, "good1", "missing1", "good2", "good3")
    got = download_videos(asked, tmp_path/"down", **QUICK)
    got["3"] |= {"seconds": 2.0}
    chosen, why = select(asked, got, min_seconds=2.5, min_frames=9)
    assert [e.id for e in chosen] == ["1", "4"] and why["3"].startswith("2.0 s") and "404" in why["2"]
    assert select(asked, got, 2.5, 81)[0] == [] and [e.id for e in select(asked, got, 1, 9, limit=2)[0]] == ["1", "3"]
    names = write_evaluation(chosen, tmp_path/"down", tmp_path/".WebVID")
    assert names == {"1": "video01.mp4", "4": "video02.mp4"}
    data = UnpairedVideos(tmp_path/".WebVID", frames=9)
    assert len(data) == 2 and data.load("video02.mp4").caption == "Words, about good3" and not data.absent
    for i, kind in enumerate(PRESETS, 1):
        made = Cameras.from_unreal_json(tmp_path/".WebVID/cameras/camera_extrinsics.json", f"cam{i:02d}").relative().c2w
        torch.testing.assert_close(made, torch.as_tensor(preset(kind, 81)), atol=1e-4, rtol=1e-4)
    assert read_json(tmp_path/".WebVID/sources.json")["video02.mp4"]["url"] == web.url("good3")
    assert write_evaluation(chosen[:1], tmp_path/"down", tmp_path/".WebVID") and [p.name for p in (tmp_path/".WebVID/videos").iterdir()] == ["video01.mp4"]
    (tmp_path/"own/videos").mkdir(parents=True)
    (tmp_path/"own/videos/video01.mp4").write_bytes(b"mine")
    with pytest.raises(InputError, match="did not make"): write_evaluation(chosen, tmp_path/"down", tmp_path/"own")
    with pytest.raises(InputError, match="no video is left"): write_evaluation([], tmp_path/"down", tmp_path/"none")


def test_generation_reads_the_set_and_fills_the_results_folder(tmp_path, monkeypatch):
    "The set's folder as it is: videos/ and the prompts of metadata.csv; results where CameraFlow's evaluators look; other settings do not pass for finished ones."
    from camflow.wan import generate
    home, asked = tmp_path/".WebVID", {}
    for i, level in enumerate((40, 90), 1): write_video(home/f"videos/video{i:02d}.mp4", Frames(torch.full((9, 3, 48, 80), level, dtype=torch.uint8), "byte"), 8)
    (home/"metadata.csv").write_text('file_name,text\nvideo01.mp4,"A pier, at night"\nother/video02.mp4,A room\n')
    def rerender(pipe, source, paths, prompt, config, name):
        asked.setdefault(name, []).append(prompt)
        return [source for _ in paths]
    monkeypatch.setattr(generate, "rerender", rerender)
    monkeypatch.setattr(generate, "load_pipeline", lambda weights: torch.nn.Identity())
    config = dict(videos=str(home), out=str(tmp_path/".results"), preset=[1, 2], size=[48, 80], frames=9, steps=1)
    assert generate.main(config, tmp_path/"run") == {"videos": 2, "cameras": 2, "written": 4, "without_prompt": 0, "skipped": {}, "weights": "tiny"}
    assert asked == {"video01": ["A pier, at night"], "video02": ["A room"]}
    assert {p.relative_to(tmp_path/".results").as_posix() for p in (tmp_path/".results").rglob("*.mp4")} == {f"{folder}/video0{i}.mp4" for folder in ("cam_type1", "cam_type2", "source") for i in (1, 2)}
    assert generate.main({**config, "preset": [2, 3]}, tmp_path/"more")["written"] == 2 and list(read_json(tmp_path/".results/cameras.json")) == ["cam_type1", "cam_type2", "cam_type3"]
    for other, words in ((dict(steps=2, seed=1), "another seed, steps"), (dict(prompts={"video01.mp4": "A beach"}), "another prompt of video01.mp4"),
                         (dict(metadata=str(tmp_path/"none.csv")), "caption table not found")):
        with pytest.raises(InputError, match=words): generate.main({**config, **other}, tmp_path/"refused")
    (home/"metadata.csv").write_text("file_name,text\na/video01.mp4,one\nb/video01.mp4,two\n")
    with pytest.raises(InputError, match="2 rows are about a video01.mp4, such as 'a/video01.mp4'"): generate.main({**config, "out": ""}, tmp_path/"new")
    (tmp_path/"table.csv").write_text("file_name,text\nvideo09.mp4,nine\n")
    with pytest.raises(InputError, match="no row of .*table.csv is about video01.mp4"): generate.main({**config, "out": "", "metadata": str(tmp_path/"table.csv")}, tmp_path/"new")

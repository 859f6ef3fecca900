"Caption tables: every injected defect is found, nothing else is; overlays, splits, contradictions; captioning in shares."
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from camflow.data.caption import Measured, caption_videos, write_captions
from camflow.data.captions import KINDS, clean, read_table, scene_of, split_scenes, write_clean
from camflow.data.contradictions import read_luminance, scene_findings
from camflow.data.multicam import read_captions
from camflow.data.prepare import list_items
from camflow.files import InputError, read_json
from camflow.geometry.camera import Cameras, focal_K, write_unreal_json
from camflow.geometry.trajectory import preset
from camflow.media.video import read_video
from camflow.world.write import write_multicam

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(__file__).parents[2]/"shared/real/recammaster"
SAY = ["A person dances on a pier, alone.", "A person in red dances on a pier by the sea.", "A dancer turns on a wooden pier.", "A person dances, then turns; palms sway.", "A person raises one arm.", "A person bends down and rises."]
NAMES = [f"f24_aperture5/scene{s}/videos/cam{c:02d}.mp4" for s in (1, 2) for c in range(1, 7)]
ROWS = [f'{name},"{SAY[i % 6]}"'.encode() for i, name in enumerate(NAMES)]


def table(path, rows, header=b"file_name,text"):
    path.write_bytes(b"\n".join([header, *rows]) + b"\n")
    return path


def changed(row, data): return [*ROWS[:row], data, *ROWS[row + 1:]]


DEFECTS = {
    "blank line": ([*ROWS[:3], b"", *ROWS[3:]], {"blank": 1}),
    "row of separators": ([*ROWS[:3], b'"",""', *ROWS[3:]], {"blank": 1}),
    "GB18030 apostrophe": (changed(2, f'{NAMES[2]},"The person\'s arm"'.encode().replace(b"'s", b"\xa1\xafs")), {"encoding": 1}),
    "Windows-1252 apostrophe": (changed(2, f'{NAMES[2]},"The person'.encode() + b'\x92s arm rises."'), {"encoding": 1}),
    "Latin accent": (changed(2, f'{NAMES[2]},"A person in a caf'.encode() + b'\xe9."'), {"encoding": 1}),
    "lost apostrophe": (changed(2, f'{NAMES[2]},"The person\ufffd\ufffds arm rises."'.encode()), {"replacement": 1}),
    "null byte": (changed(2, ROWS[2].replace(b"turns", b"tu\x00rns")), {"control": 1}),
    "exclamation marks": (changed(2, f'{NAMES[2]},"!!!!!!!!!!!!!!!!"'.encode()), {"exclamation": 1}),
    "exclamation marks inside": (changed(2, f'{NAMES[2]},"A person!!!!!!!! stands"'.encode()), {"exclamation": 1}),
    "full-width exclamation marks": (changed(2, f'{NAMES[2]},"！！！！！"'.encode()), {"exclamation": 1}),
    "no caption": (changed(2, f"{NAMES[2]},".encode()), {"empty": 1}),
    "quoted nothing": (changed(2, f'{NAMES[2]},"  "'.encode()), {"empty": 1}),
    "commas outside quotes": (changed(2, f"{NAMES[2]},A person dances, alone".encode()), {"quoting": 1}),
    "quote never closed": (changed(2, f'{NAMES[2]},"A person dances alone'.encode()), {"quoting": 1}),
    "quotes inside not doubled": (changed(2, f'{NAMES[2]},"A person under a sign "Bar" dances"'.encode()), {"quoting": 1}),
    "backslash quotes": (changed(2, f'{NAMES[2]},"A person under \\"Bar\\" dances"'.encode()), {"quoting": 1}),
    "a column too many": (changed(2, f'{NAMES[2]},"A person dances.",'.encode()), {"quoting": 1}),
    "row quoted as a whole": (changed(2, f'"{NAMES[2]},""A person dances."""'.encode()), {}),
    "the row again": ([*ROWS, ROWS[4]], {"duplicate": 1}),
    "another caption for the file": ([*ROWS, f'{NAMES[4]},"A person sits on a bench."'.encode()], {"conflict": 1}),
    "bad first, good later": ([*changed(4, f'{NAMES[4]},"!!!!!!"'.encode()), ROWS[4]], {"exclamation": 1, "duplicate": 1}),
    "caption without a file": ([*ROWS[:3], b',"A person dances."', *ROWS[3:]], {"name": 1}),
    "two people": (changed(2, f'{NAMES[2]},"Two people dance on a pier."'.encode()), {"people": 1}),
    "a man and a woman": (changed(2, f'{NAMES[2]},"A man and a woman dance on a pier."'.encode()), {"people": 1}),
    "runs to the camera": (changed(2, f'{NAMES[2]},"A person runs towards the camera."'.encode()), {"running": 1}),
    "comes closer": (changed(2, f'{NAMES[2]},"A person comes closer to the viewer."'.encode()), {"running": 1}),
    "falls": (changed(2, f'{NAMES[2]},"A person loses balance and falls backwards."'.encode()), {"falling": 1}),
    "collapses": (changed(2, f'{NAMES[2]},"A person collapses on the planks."'.encode()), {"falling": 1}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_an_injected_defect_is_found_and_nothing_else(tmp_path, defect):
    rows, expected = DEFECTS[defect]
    raw = table(tmp_path/"raw.csv", rows).read_bytes()
    cleaned = clean(tmp_path/"raw.csv", contradictions=scene_findings)
    assert cleaned.counts == expected
    assert list(cleaned.captions) == NAMES and all(text and "!!!!" not in text and "\ufffd" not in text for text in cleaned.captions.values())
    write_clean(cleaned, tmp_path/"raw.csv", tmp_path/"out")
    assert (tmp_path/"raw.csv").read_bytes() == raw and {p.name for p in tmp_path.iterdir()} == {"raw.csv", "out"}
    captions, skipped = read_captions(tmp_path/"out/metadata.csv")                     # the reader of the trainings takes the clean table as it is
    assert captions == cleaned.captions and not skipped
    assert not {k for k in clean(tmp_path/"out/metadata.csv").counts}                  # and a second pass finds nothing
    report = read_json(tmp_path/"out/report.json")
    assert report["counts"] == expected and report["kept"] == 12 and all(report["examples"][k] for k in expected)
    assert len(list(csv.DictReader(open(tmp_path/"out/report.csv", encoding="utf-8")))) == sum(expected.values())


def test_a_sound_table_has_no_findings(tmp_path):
    sound = [*ROWS[:-1], f'{NAMES[-1]},"Soft light falls on a dancer, who says ""hi""; the pier runs into the sea.\nA painting shows two people running."'.encode()]
    for header in (b"file_name,text", b"filename,text", b"\xef\xbb\xbffile_name,text"):
        cleaned = clean(table(tmp_path/"t.csv", sound, header), contradictions=scene_findings)
        assert cleaned.findings == [] and cleaned.captions[NAMES[-1]].endswith("sea. A painting shows two people running.")
    (tmp_path/"t.csv").write_bytes((tmp_path/"t.csv").read_bytes().replace(b"\n", b"\r\n"))
    assert clean(tmp_path/"t.csv").findings == []
    (tmp_path/"t.csv").write_bytes(b"\n".join(sound) + b"\n")
    assert clean(tmp_path/"t.csv").counts == {"header": 1} and len(clean(tmp_path/"t.csv").captions) == 12


@pytest.mark.parametrize("sign", [";", "\t"])
def test_columns_may_be_divided_as_spreadsheets_do(tmp_path, sign):
    "As in the reader of the trainings; what stands between the columns is no defect, and commas in a caption are not."
    divided = lambda name, text: f"{name}{sign}{text}".encode()
    rows = [divided(name, f'"{SAY[i % 6]}"') for i, name in enumerate(NAMES)]
    cleaned = clean(table(tmp_path/"t.csv", rows, divided("file_name", "text")), contradictions=scene_findings)
    assert cleaned.findings == [] and cleaned.captions == clean(table(tmp_path/"commas.csv", ROWS)).captions == read_captions(tmp_path/"t.csv")[0]
    assert clean(table(tmp_path/"t.csv", rows[1:], rows[0])).counts == {"header": 1}
    rows[2:6] = [divided(NAMES[2], f"A person dances{sign} alone."), divided(NAMES[3], "A person dances, alone."), sign.encode(), divided(NAMES[4], '"A person raises one arm.')]
    cleaned = clean(table(tmp_path/"t.csv", rows, divided("filename", "text")))
    assert cleaned.counts == {"quoting": 2, "blank": 1} and cleaned.captions[NAMES[3]] == "A person dances, alone." and cleaned.captions[NAMES[4]] == "A person raises one arm."
    write_clean(cleaned, tmp_path/"t.csv", tmp_path/"out")
    assert read_captions(tmp_path/"out/metadata.csv")[0] == cleaned.captions


def test_a_table_without_a_single_video_is_refused(tmp_path):
    "Empty, or columns in another order: nothing would be kept, and the run would end well."
    for data, words in ((b"", "it is empty"), (b"text,file_name\nA man walks.,a/videos/1.mp4\n", "line 2 is 'A man walks"), (b"<html>\n", "line 1 is .*html")):
        (tmp_path/"t.csv").write_bytes(data)
        with pytest.raises(InputError, match=f"{words}.*t.csv.*in this order"): clean(tmp_path/"t.csv")
    (tmp_path/"t.csv").write_bytes(b"file_name,text\n")
    assert clean(tmp_path/"t.csv").captions == {}


def test_tables_of_several_nodes_are_merged(tmp_path):
    "A header each, exclamation marks, a blank row and a byte that is not UTF-8: what 32 processes leave, in one pass; findings say in which part."
    parts = tmp_path/"parts"
    parts.mkdir()
    table(parts/"node2.csv", [*ROWS[:2], f'{NAMES[2]},"!!!!!!!!"'.encode(), *ROWS[3:6]], b"filename,text")
    table(parts/"node10.csv", [*ROWS[6:8], b"", f'{NAMES[8]},"The person'.encode() + b'\xa1\xafs arm rises."', *ROWS[9:], ROWS[0]], b"filename,text")
    for given in (parts, f"{parts}/node*.csv", [parts/"node2.csv", str(parts/"node10.csv")]):
        cleaned = clean(given)
        assert list(cleaned.captions) == NAMES and cleaned.rows == 13 and cleaned.counts == {"blank": 1, "encoding": 1, "exclamation": 1, "duplicate": 1}
        assert {f.kind: f.row for f in cleaned.findings} == {"exclamation": "node2.csv:4", "blank": "node10.csv:4", "encoding": "node10.csv:5", "duplicate": "node10.csv:9"}
        assert [f.detail for f in cleaned.findings if f.kind == "duplicate"] == ["first in line node2.csv:2"]
    report = write_clean(clean(parts), parts, tmp_path/"out")
    assert report["kept"] == 12 and len(report["sha256"]) == 2 and clean(tmp_path/"out/metadata.csv").counts == {}
    with pytest.raises(InputError, match="stays as it is"): write_clean(clean(parts), parts, parts)
    for nothing in (tmp_path/"out/none*.csv", tmp_path):
        with pytest.raises(InputError, match="no caption tables in"): clean(nothing)
    (tmp_path/"more").mkdir()
    table(tmp_path/"more/node2.csv", ROWS)
    with pytest.raises(InputError, match="several of them called node2.csv"): clean([parts, tmp_path/"more"])


def test_a_manifest_of_something_else(tmp_path):
    (tmp_path/"m.csv").write_text("file_name,status,luminance\na.mp4,ok,12.5\nb.mp4,failed,\n")
    assert read_luminance(tmp_path/"m.csv") == {"a.mp4": 12.5}
    for text, words in (("text,file_name\n", "luminance.*missing"), ("file_name,luminance\na.mp4,dark\n", "no number.*line 2")):
        (tmp_path/"m.csv").write_text(text)
        with pytest.raises(InputError, match=words): read_luminance(tmp_path/"m.csv")
    with pytest.raises(InputError, match="cannot be read"): read_luminance(tmp_path/"none.csv")


def test_all_defects_at_once(tmp_path):
    rows = [*ROWS, b"", *(d for name in ("GB18030 apostrophe", "exclamation marks", "commas outside quotes") for d in [DEFECTS[name][0][2].replace(b"scene1/videos/cam03", b"scene3/videos/cam0" + str(len(name)).encode())])]
    assert clean(table(tmp_path/"t.csv", rows)).counts == {"blank": 1, "encoding": 1, "quoting": 1, "exclamation": 1}


def test_a_lost_caption_comes_from_the_sibling_that_agrees_best(tmp_path):
    rows = changed(2, f'{NAMES[2]},"!!!!!!!!"'.encode())
    rows[0] = f'{NAMES[0]},"Two men run."'.encode()                                     # a sibling in doubt is not copied
    cleaned = clean(table(tmp_path/"t.csv", rows), contradictions=scene_findings)
    [found] = [f for f in cleaned.findings if f.kind == "exclamation"]
    assert cleaned.captions[NAMES[2]] == found.after in SAY and cleaned.captions[NAMES[2]] != "Two men run." and found.action.startswith("copied from cam")
    alone = clean(table(tmp_path/"t.csv", [f'{NAMES[0]},"!!!!"'.encode(), b'1.mp4,"!!!!!"']))
    assert alone.captions == {} and all("dropped" in f.action for f in alone.findings)


def test_files_and_rows_are_compared(tmp_path):
    for name in (*NAMES[:-1], "f24_aperture5/scene2/videos/cam07.mp4"):
        (tmp_path/"train"/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"train"/name).touch()
    cleaned = clean(table(tmp_path/"t.csv", ROWS), root=tmp_path, items=list_items(tmp_path))
    assert cleaned.counts == {"missing_file": 1, "no_caption": 1}
    assert NAMES[-1] not in cleaned.captions and cleaned.captions["f24_aperture5/scene2/videos/cam07.mp4"] in SAY
    empty = clean(table(tmp_path/"e.csv", [*ROWS[:-1], f'{NAMES[-1]},""'.encode()]), root=tmp_path)
    assert [f.action for f in empty.findings if f.kind == "empty"] == ["dropped with its video"]                                      # there was no overlay


def test_an_overlay_corrects_and_the_raw_table_stays(tmp_path):
    rows = changed(2, f'{NAMES[2]},"Two people dance on a pier."'.encode())
    rows[3] = f'{NAMES[3]},"!!!!!!"'.encode()
    cleaned = clean(table(tmp_path/"t.csv", rows), contradictions=scene_findings)
    write_clean(cleaned, tmp_path/"t.csv", tmp_path/"out")
    suggested = read_table(tmp_path/"out/overlay.suggested.csv")[0]
    assert [(row.name, row.text in SAY) for row in suggested] == [(NAMES[2], True)] and cleaned.captions[NAMES[2]].startswith("Two")   # a suggestion, not a change
    overlay = table(tmp_path/"overlay.csv", [f'{NAMES[2]},"A person dances."'.encode(), f'{NAMES[3]},"A person sings."'.encode(), f"{NAMES[4]},".encode(), b'f24_aperture5/scene9/videos/cam01.mp4,"Nobody"'])
    again = clean(tmp_path/"t.csv", overlay=overlay, contradictions=scene_findings)
    assert again.counts == {"exclamation": 1, "overlay": 1} and again.findings[0].action == "corrected by the overlay" and again.captions[NAMES[2]] == "A person dances." and again.captions[NAMES[3]] == "A person sings." and NAMES[4] not in again.captions
    with pytest.raises(InputError, match="overlay.*row without content"): clean(tmp_path/"t.csv", overlay=table(tmp_path/"bad.csv", [b"", overlay.read_bytes().split(b"\n")[1]]))
    with pytest.raises(InputError, match="raw table"): write_clean(again, tmp_path/"out/metadata.csv", tmp_path/"out")


@pytest.mark.parametrize("first", ["# captions; 2024", "name;text", "file_name\ttext", "My shots\tv2"])
@pytest.mark.parametrize("sign", [",", ";"])
def test_the_rows_say_what_divides_columns_whatever_stands_above(first, sign, tmp_path):
    (tmp_path/"m.csv").write_text(f"{first}\na.mp4{sign}one\nb.mp4{sign}two\n")
    assert [(row.name, row.text) for row in read_table(tmp_path/"m.csv")[0]] == [("a.mp4", "one"), ("b.mp4", "two")]


def test_poses_are_asked_about_moving_cameras(tmp_path):
    folder = tmp_path/"train/f24_aperture5/scene1/cameras"
    folder.mkdir(parents=True)
    cameras = {f"cam{i:02d}": Cameras(preset(kind, 9), focal_K(24, (80, 80)), (80, 80)) for i, kind in enumerate(["pan_left", "zoom_in", "tilt_up", "pan_right", "pan_left", "pan_right"], 1)}
    write_unreal_json(folder/"camera_extrinsics.json", cameras)
    texts = dict(zip(NAMES[:6], SAY))
    texts[NAMES[1]], texts[NAMES[2]], texts[NAMES[3]] = "A person runs towards us.", "A person falls.", "A person walks away."
    details = {f.file_name: f.detail for f in scene_findings(texts, tmp_path)}
    assert "moved 2.0 m forward" in details[NAMES[1]] and "tilted by 10 degrees" in details[NAMES[2]] and "did not move forward" in details[NAMES[3]]


def test_scenes_without_a_majority_and_scenes_that_agree():
    two = dict(zip(NAMES[:6], ["A man sits.", "Two men sit."] * 3))
    assert len(scene_findings(two)) == 6 and all("no majority" in f.detail for f in scene_findings(two))
    assert scene_findings(dict.fromkeys(NAMES, "Two women run along a beach and fall.")) == []
    assert scene_findings({"1.mp4": "Two men.", "2.mp4": "One man."}) == []                # videos of no scene contradict nobody


def test_splits_keep_scenes_together_and_are_stable(tmp_path):
    names = [f"f{lens}_aperture5/scene{s}/videos/cam{c:02d}.mp4" for lens in (24, 18) for s in range(40) for c in (1, 2)]
    train, test = split_scenes(names, 0.1, seed=3)
    assert not {scene_of(n) for n in train} & {scene_of(n) for n in test} and train | test == set(names) and 2 <= len(test) <= 40
    assert split_scenes(names[::-1], 0.1, seed=3) == (train, test) and split_scenes(names, 0.1, seed=4)[1] != test
    assert split_scenes(names[:4], 0.01)[1] and split_scenes(names, 0.0)[1] == set()
    report = write_clean(clean(table(tmp_path/"t.csv", [f'{n},"A person."'.encode() for n in names])), tmp_path/"t.csv", tmp_path/"out", 0.1)
    assert report["written"] == ["metadata.csv", "metadata-f18-train.csv", "metadata-f18-test.csv", "metadata-f24-train.csv", "metadata-f24-test.csv"]


@pytest.mark.skipif(not REAL.exists(), reason="the published tables are not beside this checkout")
def test_the_published_tables():
    "What is there: four apostrophes in GB18030, and one of ten cameras that sees a standing dancer walk. Nothing else."
    assert clean(REAL/"metadata.csv", contradictions=scene_findings).findings == []
    found = clean(REAL/"metadata-f24-test.csv", contradictions=scene_findings)
    assert found.counts == {"encoding": 4, "running": 1} and len(found.captions) == 50
    assert {f.after for f in found.findings if f.kind == "encoding"} == {"stall’s", "individual’s", "room’s", "man’s"}
    assert [f.file_name for f in found.findings if f.kind == "running"] == ["f24_aperture5/scene100/videos/cam06.mp4"]


@pytest.mark.skipif(not REAL.exists(), reason="the published tables are not beside this checkout")
def test_broken_copies_of_the_published_table(tmp_path):
    lines, base = (REAL/"metadata-f24-test.csv").read_bytes().split(b"\n"), {"encoding": 4, "running": 1}
    name = lambda line: line.split(b",")[0].decode()
    for kind, broken in {"blank": [*lines[:9], b"", *lines[9:]], "exclamation": [*lines[:9], name(lines[9]).encode() + b',"!!!!!!!!"', *lines[10:]], "duplicate": [*lines[:9], lines[8], *lines[9:]],
                         "quoting": [*lines[:8], lines[8].rstrip(b"\r").rstrip(b'"'), *lines[9:]], "empty": [*lines[:9], name(lines[9]).encode() + b",", *lines[10:]]}.items():
        (tmp_path/"t.csv").write_bytes(b"\n".join(broken))
        assert clean(tmp_path/"t.csv", contradictions=scene_findings).counts == {k: n for k in KINDS if (n := ({**base, kind: 1}).get(k))}, kind


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    write_multicam(root, scenes=2, frames=5, cameras=3, size=(32, 48), val=False)
    return root, list_items(root)


class Counting(Measured):
    def __init__(self): self.asked = 0
    def ask(self, clips, prompts, max_new_tokens):
        self.asked += len(clips)
        return super().ask(clips, prompts)


def test_ranks_share_the_questions(videos, tmp_path):
    _, items = videos
    models, meet = [Counting(), Counting()], threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool: made, other = pool.map(lambda r: caption_videos(tmp_path, items, lambda: models[r], "m", rank=r, world=2, wait=meet.wait), (0, 1))
    assert other.captions == made.captions and len(list(tmp_path.glob("part-*"))) == 2
    assert [m.asked for m in models] == [3, 3] and len(made.captions) == 6 and not made.failed
    alone = caption_videos(tmp_path/"alone", items, Counting, "m")
    assert alone.captions == made.captions
    write_captions(tmp_path/"metadata.csv", made, items)
    assert read_captions(tmp_path/"metadata.csv") == (made.captions, [])


SLOW = """
import sys, time
from camflow.data.caption import Measured, caption_videos
from camflow.data.prepare import list_items
class Slow(Measured):
    asked = 0
    def ask(self, *args, **options):
        self.asked += 1
        if self.asked == 5: time.sleep(600)              # it cannot come to its end before it is killed
        return super().ask(*args)
caption_videos(sys.argv[2], list_items(sys.argv[1]), Slow, "m", batch=1)
"""


def test_a_killed_pass_continues(videos, tmp_path):
    root, items = videos
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(root), str(tmp_path/"l")], env={**os.environ, "PYTHONPATH": str(ROOT)})
    part, until = tmp_path/"l/part-00000.jsonl", time.monotonic() + 600
    count = lambda: part.read_text().count('"caption:') if part.exists() else 0
    while count() < 2 and time.monotonic() < until: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(part, "ab") as file: file.write(b'{"key": "caption:')
    had, model = count() - 1, Counting()
    made = caption_videos(tmp_path/"l", items, lambda: model, "m", batch=1)
    assert 2 <= had < 6 and model.asked == 6 - had and made.captions == caption_videos(tmp_path/"whole", items, Counting, "m").captions


def test_garbage_and_failures_are_kept_apart_and_asked_again(videos, tmp_path):
    _, items = videos
    class Moody(Measured):
        bad = True
        def ask(self, clips, prompts, max_new_tokens):
            if self.bad and len(clips) > 1: raise InputError("a batch of several is refused")
            if self.bad and float(clips[0].data.float().mean()) == self.worst: raise InputError("too dark to tell")
            return ["!!!!!!!!"] if self.bad and not self.told.append(1) and len(self.told) == 1 else super().ask(clips, prompts)
    model = Moody()
    model.told, model.worst = [], float(read_video(items[5].path).data.float().mean())
    first = caption_videos(tmp_path, items, lambda: model, "m", frames=0, batch=3)
    assert (len(first.captions), list(first.garbage), first.failed) == (4, [items[0].name], {items[5].name: "too dark to tell"})
    Moody.bad = False
    assert caption_videos(tmp_path, items, lambda: model, "m", frames=0).asked == 0
    again = caption_videos(tmp_path, items, lambda: model, "m", frames=0, retry=True)
    assert again.asked == 2 and len(again.captions) == 6


def test_a_server_that_is_down_ends_the_pass(videos, tmp_path):
    class Down:
        def ask(self, *args, **options): raise ConnectionError("nobody listens")
    with pytest.raises(InputError, match="questions in a row were not answered"): caption_videos(tmp_path, videos[1], Down, "m", batch=1)
    again = caption_videos(tmp_path, videos[1], Measured, "m", retry=True)
    assert len(again.captions) == 6


def test_a_question_that_was_lost_is_not_asked_twice(videos, tmp_path):
    "An endpoint has waited for its deadline already; one lost question takes no other with it."
    from camflow.vlm.prompt import Reply
    class Server:
        asked = 0
        def replies(self, clips, prompts, tokens):
            self.asked += len(clips)
            return [Reply("", status="timeout", reason="no answer within 600 s") if n == 1 else Reply("A person walks.") for n in range(len(clips))]
    server = Server()
    made = caption_videos(tmp_path, videos[1], lambda: server, "m", batch=6)
    assert server.asked == 6 and len(made.captions) == 5 and list(made.failed.values()) == ["no answer within 600 s"]


def test_any_openai_compatible_server_is_a_captioner(videos, tmp_path):
    from camflow.vlm.caption import main
    class Fake(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200), self.send_header("content-length", str(len(data))), self.end_headers(), self.wfile.write(data)
        def do_GET(self): self.answer({"data": [{"id": "qwen"}]})
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            pictures = str(asked["messages"]).count("image_url")
            self.answer({"choices": [{"message": {"content": f"A person in {pictures > 0} pictures."}, "finish_reason": "stop"}], "model": "qwen"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = dict(root=str(videos[0]), urls=[f"http://127.0.0.1:{server.server_port}/v1"], options={"model": "qwen"}, frames=2, workers=0)
    result = main(config, tmp_path/"run")
    server.shutdown()
    assert (result["captions"], result["asked"], result["garbage"]) == (6, 6, 0)
    assert main(config, tmp_path/"run")["asked"] == 0                       # the server may be gone: nothing is left to ask
    for bad, words in ((dict(root=""), "needs root"), (dict(captioner="a:b"), "exclude each other"), (dict(options={}), "served model's name"), (dict(prompts="x"), "unknown settings")):
        with pytest.raises(InputError, match=words): main(config | bad, tmp_path/"run")

"Runs executed for real: done, failed and resumed, out of time, terminated, killed; and what is left of them."
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from camflow.files import InputError, content_hash, read_json, write_json
from camflow.lab import run as running
from camflow.lab.launch import LaunchError, launch
from camflow.lab.registry import Run, build_index, close_run, find_run, new_run, process_mark, scan, update
from camflow.lab.report import needs_network, write_report
from camflow.lab.sweep import known

TRAINING = '''
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[sys.argv.index("--config") + 1]); run = path.parent; config = json.loads(path.read_text())
checkpoint = run/"checkpoint.json"
state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "w": 1.0}
while state["step"] < config["steps"]:
    state = {"step": state["step"] + 1, "w": state["w"]*(1 - config["lr"])}
    checkpoint.write_text(json.dumps(state))
    with open(run/"metrics.jsonl", "a") as file: print(json.dumps({"step": state["step"], "loss": state["w"], "time": time.time()}), file=file)
    if config["mode"] == "fail" and state["step"] == 3 and os.environ.get("CAMFLOW_RESUME") != "1": raise ValueError("a NaN at step 3")
    if config["mode"] == "hang":
        import signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as stubborn as a rank inside a collective, with a worker in a session of its own
        worker = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"], start_new_session=True)
        (run/"pids.tmp").write_text(json.dumps([os.getpid(), worker.pid])); os.rename(run/"pids.tmp", run/"pids.json"); time.sleep(600)
'''
PARAMETERS = '''steps: int = 5        # optimizer steps
lr: float = 0.1       # learning rate
mode: str = "ok"      # ok, fail, hang
run_dir: str = ""     # filled in by camflow run'''
CELLS = ['''from camflow.lab.launch import launch
from camflow.lab.registry import open_run, write_result
run_dir = open_run(run_dir, "toy")''', '''done = launch("toy_training", dict(steps=steps, lr=lr, mode=mode), run_dir/"train", tick=0.1)
done.returncode''', 'write_result(run_dir, {"loss": done.metrics[-1]["loss"], "records": len(done.metrics), "seconds": done.seconds}, headline=["loss"])']


def make_toy(folder: Path) -> Path:
    "A run notebook with a training module beside it."
    (folder/"toy_training.py").write_text(TRAINING)
    cells = [new_markdown_cell("# A toy training"), new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(CELLS[0]),
             new_markdown_cell("## Training"), new_code_cell(CELLS[1]), new_markdown_cell("## Results"), new_code_cell(CELLS[2])]
    nbformat.write(new_notebook(cells=cells), folder/"toy.ipynb")
    (folder/"toy.smoke.yaml").write_text("steps: 4\nlr: 1e-1\n")
    return folder/"toy.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A toy notebook and an empty reports folder."
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMFLOW_REPORTS", str(folder/"reports"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CAMFLOW_GRACE", "1")
        patch.setattr(running, "_kernel_words", lambda run_dir: [sys.executable, "-m", "ipykernel_launcher"])   # a toy needs no torch
        yield make_toy(folder)


def wait_for(condition, seconds: float = 240):
    "The first true value of `condition`."
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def gone(pids) -> bool: return all(process_mark(p)["ticks"] is None for p in pids)


@pytest.fixture(scope="module")
def hanging(lab):
    "Three runs whose training hangs, started together by the command line: {purpose: (process, run, pids of training and worker)}."
    found = {}
    for purpose in ("terminate", "kill", "timeout"):
        reports = lab.parent/purpose
        process = subprocess.Popen([sys.executable, "-m", "camflow.lab.cli", "run", str(lab), "-q", "-p", "mode=hang", *(["--timeout", "9"] if purpose == "timeout" else [])],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "CAMFLOW_REPORTS": str(reports)})
        found[purpose] = process, reports
    yield found
    for process, _ in found.values():
        if process.poll() is None: process.kill()
        process.communicate()


def pids_of(reports: Path): return read_json(wait_for(lambda: next(reports.glob("toy/*/train/pids.json"), None)))


def test_a_run_leaves_everything_and_repeats(lab):
    run = running.run(str(lab), "smoke")
    assert run.status == "ok" and run.result["records"] == 4 and run.config["parameters"] == {"steps": 4, "lr": 0.1, "mode": "ok"}
    for name in ("run.ipynb", "report.html", "config.json", "metrics.jsonl", "result.json", "env.json", "train.log", "run.json"):
        assert (run.path/name).exists(), name
    page = (run.path/"report.html").read_text()
    assert not (run.path/"live.log").exists() and "location.reload" not in page
    assert needs_network(page) == [] and "<h1>A toy training</h1>" in page and 'href="#Results"' in page and "optimizer steps" in page
    assert "0.6561" in (run.path.parents[1]/"index.html").read_text()
    again, comparison = running.rerun(str(run))
    assert comparison["verdict"] == "bit-equal" and comparison["compared"] >= 9 and again.info["rerun_of"] == str(run)
    result = again.result
    write_json(again.path/"result.json", {**result, "loss": result["loss"]*(1 + 1e-5)})
    assert running.compare(run, again)["verdict"] == "within tolerance" and running.compare(run, again, rtol=0, atol=0)["verdict"] == "different"


def test_a_failed_run_says_why_and_resumes(lab):
    run = running.run(str(lab), params={"mode": "fail"})
    info = run.info
    assert run.status == "failed" and info["error"].endswith("ValueError: a NaN at step 3") and info["cell"] == 4 and info["cells"] == 5
    assert run.result == {} and "a NaN at step 3" in (run.path/"report.html").read_text()
    resumed = running.resume(run.id)
    assert resumed.path == run.path and resumed.status == "ok" and [r["step"] for r in resumed.metrics] == [1, 2, 3, 4, 5]
    assert resumed.info["attempts"][0]["status"] == "failed" and len((run.path/"metrics.jsonl").read_text().splitlines()) == 5
    with pytest.raises(InputError, match="is complete"): running.resume(run.id)


def test_videos_are_compared_too(tmp_path):
    from camflow.media.frames import Frames
    from camflow.media.video import write_video
    clip = (torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 255).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(4, -1, -1, -1)
    def run_with(change):
        folder = new_run("filmed", root=tmp_path)
        write_json(folder/"result.json", {"written": 1})
        write_video(folder/"results/a.mp4", Frames(change(clip).clamp(0, 255).byte(), "byte", 8))
        close_run(folder, "ok")
        return Run(folder)
    one = run_with(lambda x: x)
    for change, verdict in ((lambda x: x, "bit-equal"), (lambda x: x + 1, "within tolerance"), (lambda x: x.flip(-1), "different"), (lambda x: x[:3], "different")):
        found = running.compare(one, run_with(change))
        assert found["verdict"] == verdict and found["compared"] == 2 and ("videos.results/a.mp4" in found["differences"]) == (verdict != "bit-equal")


@pytest.mark.parametrize("params, words", [({"stps": 3}, "did you mean 'steps'"), ({"steps": 2.5}, "steps must be int, got float"), ({"run_dir": "x"}, "unknown parameter 'run_dir'")])
def test_wrong_parameters_start_nothing(lab, params, words):
    before = len(scan())
    with pytest.raises(InputError, match=words): running.run(str(lab), params=params)
    assert len(scan()) == before


def test_wrong_profiles_name_the_file(lab):
    (lab.parent/"toy.bad.yaml").write_text("steps: many\nlrr: 1\n")
    with pytest.raises(InputError) as error: running.run(str(lab), "bad")
    assert "toy.bad.yaml: steps must be int" in str(error.value) and "did you mean 'lr'" in str(error.value)
    with pytest.raises(InputError, match="its profiles: bad, smoke"): running.run(str(lab), "smke")


def test_infinite_parameters_come_back_as_they_were(lab, monkeypatch):
    monkeypatch.setattr(running, "_execute", lambda run_dir, notebook, injected, *_, **__: (given.append(injected), Run(run_dir))[1])
    given, inf = [], float("inf")
    for value in (inf, -inf):
        one = running.run(str(lab), params={"lr": value})
        assert one.config["parameters"]["lr"] == one.info["parameters"]["lr"] == value
        update(one.path, status="failed", sweep="s")
        assert known("s", one.config["parameters"], lab).path == one.path
        running.resume(str(one))
        running.run(str(lab), params=one.config["parameters"])     # as `rerun` does
    assert given == [{"lr": inf}]*3 + [{"lr": -inf}]*3
    assert len({content_hash([value]) for value in (None, inf, -inf, float("nan"))}) == 4
    one = running.run(str(lab), params={"lr": float("nan")})
    assert math.isnan(one.config["parameters"]["lr"]) and math.isnan(given[-1]["lr"])


def test_termination_leaves_no_orphans(hanging):
    process, reports = hanging["terminate"]
    pids = pids_of(reports)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 143 and gone(pids), err
    run = scan(reports)[0]
    assert f"`camflow resume {run}` continues it" in err
    assert run.status == "killed" and run.info["error"] == "stopped by SIGTERM" and "location.reload" not in (run.path/"report.html").read_text()


def test_kill_nine_leaves_no_orphans_and_no_lie(hanging):
    process, reports = hanging["kill"]
    pids = pids_of(reports)
    run = scan(reports)[0]
    page = run.path/"report.html"
    assert run.status == "running" and "location.reload" in page.read_text() and 'class="status running"' in (reports/"index.html").read_text()
    wait_for(lambda: "step 1 of 5" in page.read_text())
    process.kill()
    process.wait()
    assert run.status == "killed" and "left no status" in run.info["error"]
    wait_for(lambda: gone(pids))
    wait_for(lambda: "location.reload" not in page.read_text() and 'class="status running"' not in (reports/"index.html").read_text())   # without anybody's command
    assert "left no status" in page.read_text() and "<h1>A toy training</h1>" in page.read_text() and not (run.path/"live.log").exists()
    assert "killed" in build_index(reports).read_text() and (write_report(run.path)).exists()


def test_time_limit(hanging):
    process, reports = hanging["timeout"]
    out, err = process.communicate(timeout=240)
    run = scan(reports)[0]
    assert process.returncode == 124 and run.status == "timeout" and "stopped after 9.0 s" in err
    for path in run.path.glob("train/pids.json"): assert gone(read_json(path))


def test_notebook_that_cannot_take_a_folder_is_refused(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("x: int = 1", metadata={"tags": ["parameters"]})]), tmp_path/"x.ipynb")
    with pytest.raises(InputError, match="run_dir"): running.prepare(str(tmp_path/"x.ipynb"))
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1")]), tmp_path/"y.ipynb")
    with pytest.raises(InputError, match="0 code cells tagged"): running.prepare(str(tmp_path/"y.ipynb"))


def test_launch_follows_and_times_out(tmp_path, lab):
    seen = []
    done = launch("toy_training", {"steps": 3, "lr": 0.5, "mode": "ok"}, tmp_path/"a", on_tick=seen.append, tick=0.05)
    assert seen[-1] == done.metrics and done.metrics[-1]["loss"] == 0.125
    with pytest.raises(LaunchError, match="timeout"): launch("toy_training", {"steps": 3, "lr": 0.5, "mode": "hang"}, tmp_path/"b", timeout=1.5, tick=0.1)
    if (tmp_path/"b/pids.json").exists(): assert gone(read_json(tmp_path/"b/pids.json"))
    with pytest.raises(LaunchError, match="No module named no_such_module"): launch("no_such_module", {}, tmp_path/"c")


RANKS = '''
import json, os, pathlib, sys, time
import torch.distributed as dist
config = json.loads(pathlib.Path(sys.argv[2]).read_text())
dist.init_process_group("gloo")
os.write(1, f"world {dist.get_world_size()}\\n".encode())        # one write: two ranks share the log, and print writes word by word
if dist.get_rank() == 1: raise ValueError("row 3 holds a NaN")
dist.barrier()
'''


def test_two_ranks_and_the_error_that_matters(tmp_path, monkeypatch):
    (tmp_path/"toy_ranks.py").write_text(RANKS)
    with pytest.raises(LaunchError) as error: launch("toy_ranks", {}, tmp_path/"run", num_processes=2, env={"PYTHONPATH": tmp_path})
    assert "world 2" in error.value.log and "ChildFailedError" in error.value.log        # torchrun's own words end the log
    assert "[rank1]" in str(error.value) and str(error.value).endswith("ValueError: row 3 holds a NaN")
    assert str(error.value).startswith("ValueError: row 3 holds a NaN\n(toy_ranks ended with exit status 1; the whole log is")


def test_refused_input_is_the_first_sentence(tmp_path):
    (tmp_path/"toy_refuses.py").write_text("import sys\nprint('error: no videos; x/; give a folder', file=sys.stderr)\nsys.exit(2)")
    with pytest.raises(LaunchError) as error: launch("toy_refuses", {}, tmp_path/"run", env={"PYTHONPATH": tmp_path})
    assert str(error.value).splitlines()[0] == "no videos; x/; give a folder" and len(str(error.value).splitlines()) == 2


def test_panels_only_for_metrics_that_exist():
    from camflow.lab.views import metric_plots
    page = metric_plots([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}], ["reward_mean", "loss"])
    assert page.count("<svg") == 1 and "nothing to plot" not in page and "no metrics yet" in metric_plots([{"step": 1}], ["loss"])


def test_dry_run_prints_lines_for_many_devices(tmp_path, capsys):
    plan = launch("camflow.wan.finetune", {}, tmp_path, dry_run=True)
    assert plan.returncode is None and len(plan.lines) == 6 and not (tmp_path/"train.log").exists()
    assert "--num_machines 4 --num_processes 32 --machine_rank 3 --main_process_ip NODE0" in capsys.readouterr().out


def test_index_survives_a_broken_folder(tmp_path):
    good, bad = new_run("a", root=tmp_path), new_run("b", root=tmp_path)
    close_run(good, "ok")
    (bad/"env.json").write_text("{")
    (new_run("c", root=tmp_path)/"run.json").write_text("{")
    page = build_index(tmp_path).read_text()
    assert page.count("<tr>") == 3 and "unreadable" in page
    assert find_run("a", tmp_path).path == good


def test_links_to_the_parts_of_a_report_may_go_on_in_the_next_line():
    from camflow.lab.report import _contents
    assert re.search(r"</a>\s+<a", _contents("<!--contents--><h2>Training</h2><h2>Before and after</h2>"))


def test_camera_plot_of_any_size():
    "A reach of 0.4 to 0.5 metres had no round length that fits, and ended the notebook."
    import torch

    from camflow.lab.views import camera_plot
    for reach in torch.logspace(-4, 2, 61):
        path = torch.eye(4).repeat(3, 1, 1)
        path[:, 0, 3] = torch.tensor([0, 0.5, 1.0]) * reach
        assert "svg" in camera_plot({"asked": path}, size=100)

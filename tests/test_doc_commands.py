"""Every command of README.md and docs/ is executed as it is written, and every block of Python too. How, and what cannot run here: tests/doc_commands.py.

Slow: a quarter of an hour of CPU at the most. `pytest tests/test_doc_commands.py -k stereo` runs those of a system; what is skipped prints its reason.
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camflow.lab.registry import Run
from tests.doc_commands import ROOT, RULES, all_commands, as_run, cut, python_blocks, rule, user_folder
from tests.holding import held
from tests.test_lab import wait_for

COMMANDS = sorted(all_commands(), key=lambda c: c.text.startswith(("camflow resume", "camflow rerun", "camflow compare")) + 2 * c.text.startswith("camflow serve down"))
RUNNING = [c for c in COMMANDS if not c.how.skip]
BLOCKS = python_blocks()
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A user's folder with data, and `camflow` on the path."
    folder = tmp_path_factory.mktemp("user")
    user_folder(folder)
    (folder/"bin").mkdir()
    for name, module in (("camflow", "-m camflow.lab.cli"), ("python", "")):
        (folder/"bin"/name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (folder/"bin"/name).chmod(0o755)
    for _, _, code in BLOCKS:
        if "class KeepLight" in code: (folder/"my_rewards.py").write_text(code) # what the page tells the reader to do
        if "write_unreal_json(" in code:                                         # the page before the command that reads it
            (folder/"block.py").write_text(code)
            assert bash("python block.py", folder)[0].returncode == 0
    yield folder
    bash("camflow serve down servers/servers.toml", folder)


def environment(folder): return {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "CAMFLOW_REPORTS": str(folder/"reports"), "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "CAMFLOW_DEVICE": "cpu"}


def bash(line, folder):
    "Runs a line as its reader would; returns what it did, and its CPU seconds."
    env = environment(folder)
    line = line.replace("PYTHONPATH=$PWD", f"PYTHONPATH=$PWD:{ROOT}")   # the checkout is on the path in place of an installation
    before = os.times()
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    after = os.times()
    return done, after.children_user + after.children_system - before.children_user - before.children_system


@pytest.fixture
def newest(home):
    "Name of a notebook -> its newest run, a smoke run where there is none yet; stopped -> a run that was cut short."
    def find(name):
        if name == "stopped":
            before = set((home/"reports/recam_finetune").glob("*"))
            env = environment(home) | {"CAMFLOW_GRACE": "1"}                      # no machine is so fast that it ends before it is stopped
            env["PYTHONPATH"] = f"{held(home/'held', 'camflow.wan.finetune', 'result.json')['PYTHONPATH']}{os.pathsep}{env['PYTHONPATH']}"
            process = subprocess.Popen(["camflow", "run", "recam_finetune", "-f", "smoke"], cwd=home, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            trains = lambda: [run for run in set((home/"reports/recam_finetune").glob("*")) - before if any(file.stat().st_size for file in run.glob("*/metrics.jsonl"))]
            wait_for(lambda: trains() or process.poll() is not None, 900)
            process.terminate()                                                   # not --timeout, which a resumed run keeps
            assert process.wait() == 143 and trains()
            return find("recam_finetune")
        runs = sorted((p for p in (home/"reports"/name).glob("*") if (p/"run.json").is_file()), key=lambda p: p.name)
        if not runs:
            done, _ = bash(f"camflow run {name} -f smoke", home)
            assert done.returncode == 0, done.stderr[-2000:]
            return find(name)
        return f"{name}/{runs[-1].name}"
    return find


@slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.id)
def test_command(command, home, newest):
    if command.how.skip: pytest.skip(f"{command.text}: {command.how.skip}")
    links = []
    for name, target in command.how.link:
        if (home/name).is_symlink(): (home/name).unlink()
        if not (home/name).exists():
            (home/name).symlink_to(home/target if (home/target).exists() else ROOT/target)
            links.append(home/name)
    line = as_run(command, newest)
    begun = time.time()
    done, seconds = bash(line, home)
    for link in links: link.unlink()
    print(f"{seconds:6.1f} s of CPU: {line}" + (f"   # only checked: {command.how.why}" if command.how.why else ""))
    said = f"$ {line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0 and "Traceback (most recent call last)" not in done.stderr, said
    if re.match(r"(PYTHONPATH=\S+ )?camflow (run|rerun|resume) ", line) and "--dry-run" not in line and "--parameters" not in line:
        folder = Path(done.stdout.strip().splitlines()[-1])
        run = Run(folder if folder.is_dir() else folder.parent)
        assert run.status == "ok" and (run.path/"report.html").is_file() and run.path.stat().st_mtime >= begun - 60, said
    elif "serve up" in line: assert all(state in ("ready", "off") for state in re.findall(r"\b(ready|off|failed|starting|lost)\b", done.stdout)), said
    elif "> audit.json" in line: assert (home/"audit.json").stat().st_size > 2
    elif "serve down" not in line: assert done.stdout.strip() or done.stderr.strip(), said


@slow
@pytest.mark.parametrize("page, number, code", BLOCKS, ids=lambda x: re.sub(r"\W+", "_", str(x.relative_to(ROOT))) if isinstance(x, Path) else str(x)[:20].replace("\n", " ") if isinstance(x, str) else str(x))
def test_python(page, number, code, home):
    "A block runs as a file of the user's would; one that only shows calls as comments too."
    (home/"block.py").write_text(code, encoding="utf-8")
    done, _ = bash("python block.py", home)
    if "run_main(main)" in code: assert "Traceback" not in done.stderr or "usage" in done.stderr or "config" in done.stderr, done.stderr[-2000:]
    else: assert done.returncode == 0, done.stderr[-2000:]


def test_every_command_has_a_rule_and_every_rule_a_command():
    assert len(COMMANDS) > 120 and len(RUNNING) > 60 and len({c.id for c in COMMANDS}) >= len(COMMANDS) - 3
    used = {c.how.pattern for c in COMMANDS}
    assert not [how.pattern for how in RULES if how.pattern not in used and how.pattern != r"\.\.\."], "rules without a command"


def test_lines_are_cut_as_bash_does():
    assert cut("camflow resume RUN; camflow rerun RUN  # again") == ["camflow resume RUN", "camflow rerun RUN"]
    assert cut("camflow run x -p 'a=\"b; c\"' # d") == ["camflow run x -p 'a=\"b; c\"'"]
    assert rule("camflow run recam_grpo -f npu8").skip and not rule("camflow run recam_grpo -f npu8 --dry-run").skip and rule("camflow run stereo_depth -p left=a").add
    with pytest.raises(LookupError, match="no rule"): rule("rm -rf /")

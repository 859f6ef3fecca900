"A child process that hangs, aborts, devours memory or loses its parent must take nobody along and leave nobody behind."
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from camflow.files import InputError
from camflow.metrics.budget import run_within
from camflow.processes import children

HERE = "tests.test_budget"


def hang(leave="", **_):
    "Starts a grandchild, notes both pids, and waits for ever."
    grandchild = subprocess.Popen(["sleep", "600"])
    Path(leave).write_text(f"{os.getpid()} {grandchild.pid}")
    signal.pause()


def devour():
    return {"hog": np.ones(2**29)}


def segfault():
    import ctypes
    ctypes.string_at(0)


def refuse():
    raise InputError("no frames; the clip; give some")


def spin():
    while True: pass


def environment():
    return {name: os.environ[name] for name in ("OMP_NUM_THREADS", "TMPDIR")} | {"modules": sorted(sys.modules), "group": os.getpgrp()}


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.02)


def test_hang_is_a_timeout_and_the_grandchild_goes_too(tmp_path):
    before = set(children())
    for seconds in (4, 16, 64, 256):                     # the limit counts from the start of the process, which on a busy machine may take longer than 4 s
        answer = run_within(f"{HERE}:hang", {"leave": str(tmp_path/"pids")}, seconds=seconds)
        assert (answer.status, answer.kind) == ("timeout", "timeout") and f"{seconds} s" in answer.reason and seconds <= answer.seconds < seconds + 120
        if (tmp_path/"pids").exists() and (tmp_path/"pids").read_text(): break
    pids = [int(p) for p in (tmp_path/"pids").read_text().split()]
    until(lambda: not any(map(alive, pids)))
    assert set(children()) == before


@pytest.mark.parametrize("target,kind", [("os:abort", "SIGABRT"), (f"{HERE}:segfault", "SIGSEGV"), (f"{HERE}:devour", "memory"),
                                         (f"{HERE}:refuse", "InputError"), ("os:nothing", "AttributeError")])
def test_deaths_are_typed(target, kind):
    answer = run_within(target, {}, seconds=300, memory_mb=2048)
    assert (answer.status, answer.kind, answer.value) == ("failed", kind, None) and answer.reason
    if kind == "InputError": assert answer.reason == "no frames; the clip; give some"
    if kind == "memory": assert "2048 MB" in answer.reason


def test_spinning_is_stopped_by_cpu_time():
    answer = run_within(f"{HERE}:spin", {}, seconds=300, cpu_seconds=1)
    assert answer.status == "timeout" and "CPU" in answer.reason and answer.cpu_seconds < 3


def test_child_has_its_own_group_folder_threads_and_small_imports():
    answer = run_within("tests.test_budget:environment", {}, threads=2, seconds=300)
    value = answer.value
    assert value["OMP_NUM_THREADS"] == "2" and value["group"] != os.getpgrp() and not Path(value["TMPDIR"]).exists()
    assert "torch" not in value["modules"] and "cv2" not in value["modules"]


def test_child_dies_with_its_parent(tmp_path):
    "The parent is killed with SIGKILL, which it cannot answer."
    code = "from camflow.metrics.budget import run_within; run_within('signal:pause', {}, seconds=600)"
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        until(lambda: children(parent.pid))
        child = children(parent.pid)[0]
        until(lambda: "camflow.metrics.budget" in Path(f"/proc/{child}/cmdline").read_text())
        until(lambda: not re.search("Max cpu time +unlimited", Path(f"/proc/{child}/limits").read_text()))  # past the start of the interpreter: it has set its limits
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not alive(child))


def test_bad_limits():
    with pytest.raises(InputError, match="positive limits"): run_within("os:abort", {}, seconds=0)

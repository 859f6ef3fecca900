"camflow serve: eight fake devices on the CPU, what dies is started again, and nothing is left behind."
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from camflow.files import InputError
from camflow.processes import die_with_parent, free_port, outgoing_ports, started
from camflow.servers import supervisor
from camflow.servers.plan import check_venvs, read_plan
from camflow.servers.supervisor import ask, down, prepare, status, supervisor_pid, up
from tests.serving import ENV, ROOT, wait_for

os.environ.setdefault("OMP_NUM_THREADS", "1")


def write(tmp_path, **servers):
    "A servers.toml with stub servers."
    text = "[supervisor]\nlog_mb = 0.5\nrestarts = 2\nstart_s = 240\n"
    for name, keys in servers.items(): text += f"[servers.{name}]\nmodule = \"tests.stub_server\"\n" + "".join(f"{k} = {json.dumps(v)}\n" for k,
            v in keys.items())
    (tmp_path/"servers.toml").write_text(text)
    return tmp_path/"servers.toml"


def state(path, name): return next(row for row in status(path) if row["name"] == name)


def test_eight_devices(tmp_path):
    "Up, told apart, one killed and back, down by pid; a second `up` is refused while they run."
    first = free_port(8)
    path = write(tmp_path, camera={"port": first, "devices": 8})
    rows = up(path, wait_s=240)
    pids = [row["pid"] for row in rows]
    try:
        assert [row["state"] for row in rows] == ["ready"] * 8 and [row["port"] for row in rows] == list(range(first, first + 8))
        told = [json.loads(ask(row["port"], "/v1/info")[1]) for row in rows]
        assert [t["device"] for t in told] == [str(n) for n in range(8)] and [t["pid"] for t in told] == pids
        assert [int((tmp_path/f".run/servers/camera-{n}.pid").read_text()) for n in range(8)] == pids
        with pytest.raises(InputError, match="are up already"): up(path)
        os.kill(pids[3], signal.SIGKILL)
        wait_for(lambda: state(path, "camera-3")["restarts"] == 1 and state(path, "camera-3")["state"] == "ready")
        again = status(path)
        assert again[3]["pid"] not in pids and [row["pid"] for n, row in enumerate(again) if n != 3] == [pid for n, pid in enumerate(pids) if n != 3]
        table = subprocess.run([sys.executable, "-m", "camflow.lab.cli", "serve", "status", str(path)], env=ENV, capture_output=True, text=True)
        assert table.returncode == 0 and table.stdout.count("ready") == 8
        pids = [row["pid"] for row in again]
    finally: assert down(path)
    assert all(started(pid) is None for pid in pids) and supervisor_pid(tmp_path/".run/servers") is None and not list((tmp_path/".run/servers").glob("*.pid"))
    assert {row["state"] for row in status(path)} == {"stopped"} and down(path) is False


def test_budget_logs_and_bad_settings(tmp_path):
    "A server that always dies is given up after its budget, with its last line; a wrong configuration at once; logs stay small; the good server goes on."
    first = free_port(4)
    path = write(tmp_path, good={"port": first, "chatter": True}, dying={"port": first + 1, "die_after": 0.1}, wrong={"port": first + 2, "wrong": True})
    try:
        up(path, wait_s=0)
        wait_for(lambda: len(status(path)) == 3 and state(path, "dying-0")["state"] == "failed" and state(path, "good-0")["state"] == "ready")
        assert state(path, "dying-0")["restarts"] == 2 and "status 7: going down" in state(path, "dying-0")["reason"]
        assert state(path, "wrong-0")["state"] == "failed" and state(path, "wrong-0")["restarts"] == 0 and "configuration is wrong" in state(path,
                "wrong-0")["reason"]
        log = tmp_path/".run/servers/good-0.log"
        wait_for(lambda: log.with_suffix(".log.1").exists())
        wait_for(lambda: log.stat().st_size < 600_000)
    finally: assert down(path)


def test_nothing_outlives_the_supervisor(tmp_path):
    "Its servers get a signal when it is killed; `status` says lost and `down` finds nothing."
    path = write(tmp_path, a={"port": free_port(2), "devices": 2})
    process = subprocess.Popen([sys.executable, "-m", "camflow.lab.cli", "serve", "up", "--foreground", str(path)], env=ENV, cwd=ROOT,
                               preexec_fn=die_with_parent)
    wait_for(lambda: [row["state"] for row in status(path)] == ["ready"] * 2)
    pids = [row["pid"] for row in status(path)]
    process.kill(), process.wait()
    wait_for(lambda: all(started(pid) is None for pid in pids))
    assert {row["state"] for row in status(path)} == {"lost"} and down(path) is False


def test_a_full_disk_ends_no_server(tmp_path, monkeypatch, capsys):
    "One that cannot be started again, or written down, waits; the supervisor and the others go on."
    plan = read_plan(write(tmp_path, camera={"port": free_port(2), "devices": 2}))
    first, second = children = [supervisor.Child(plan, supervisor.Process(**vars(one))) for one in plan.processes]
    for child in children: child.state = "waiting"
    def no_room(child): raise OSError(errno.ENOSPC, "No space left on device") if child is first else AssertionError("started")
    monkeypatch.setattr(supervisor.Child, "start", no_room)
    supervisor.tend(first)
    assert first.state == "waiting" and "No space left" in first.reason and first.next > time.monotonic() + 4 and "camera-0" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="started"): supervisor.tend(second)


def test_a_port_that_is_taken(tmp_path):
    first = free_port(2)
    path = write(tmp_path, a={"port": first, "devices": 2})
    with socket.socket() as s:
        s.bind(("127.0.0.1", first + 1)), s.listen()
        with pytest.raises(InputError, match=rf"taken: {first + 1} \(a-1\); \S*servers.toml"): prepare(path)
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()) as link:   # an outgoing connection's own port
        port = link.getsockname()[1]
        with pytest.raises(InputError, match=rf"taken: {port} \(a-0\); the system gives ports \d+ to \d+ to outgoing connections too"): prepare(write(tmp_path, a={"port": port}))
    assert all(one.port < 32768 for one in read_plan(ROOT/"servers/servers.toml").processes)                       # Linux' first outgoing port


def test_who_knocks_is_not_who_answers():
    "A connection to a port that nobody listens on may be lent that port as its own; it says nothing, and does not keep the server out."
    class Same(socket.socket):
        def connect(self, address):
            self.bind(address)
            super().connect(address)
    port = outgoing_ports()[0] + 2 * (free_port() % 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.create_connection", lambda address, *_, **__: connected(Same(), address))
        assert ask(port, "/readyz") is None
    with socket.create_server(("127.0.0.1", port)): pass


def connected(link, address):
    link.connect(address)
    assert link.getsockname() == link.getpeername() == address
    return link


def test_environments(tmp_path):
    "Built once and on request, and not trusted when the requirements change."
    (tmp_path/"need.txt").write_text("# nothing yet\n")
    path = write(tmp_path, a={"port": free_port(), "venv": "venvs/a", "requirements": "need.txt", "system_site_packages": True})
    with pytest.raises(InputError, match="serve up --install"): check_venvs(path)
    check_venvs(path, install=True)
    python = tmp_path/"venvs/a/bin/python"
    assert read_plan(path).processes[0].python == str(python)
    born = python.lstat().st_mtime_ns
    check_venvs(path), check_venvs(path, install=True)
    assert python.lstat().st_mtime_ns == born
    assert subprocess.run([python, "-c", "import camflow.files, numpy"], cwd=tmp_path, env={k: v for k,
                                                                                            v in os.environ.items() if k != "PYTHONPATH"}).returncode == 0
    (tmp_path/"need.txt").write_text("--no-index\nno-such-package-of-camflow==1\n")
    with pytest.raises(InputError, match="other requirements"): check_venvs(path)


def test_paths_in_requirements_are_read_from_their_folder(tmp_path, monkeypatch):
    "`-e ../..` of servers/NAME/requirements.txt is the repository, from wherever `camflow serve up --install` is called."
    from pathlib import Path
    (tmp_path/"need").mkdir()
    (tmp_path/"need/need.txt").write_text("-e ../..\n")
    path, asked = write(tmp_path, a={"port": free_port(), "venv": "venvs/a", "requirements": "need/need.txt"}), []
    def fake(words, **options):
        asked.append((words, options["cwd"]))
        Path(words[-1] if "venv" in words else tmp_path/"venvs/a", "lib/python3/site-packages").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(words, 0, "", "")
    monkeypatch.setattr(supervisor.subprocess, "run", fake)
    check_venvs(path, install=True)
    assert [("pip" in words, cwd) for words, cwd in asked] == [(False, tmp_path/"need"), (True, tmp_path/"need")]


@pytest.mark.slow
def test_an_environment_that_cannot_be_built(tmp_path):
    (tmp_path/"need.txt").write_text("--no-index\nno-such-package-of-camflow==1\n")
    path = write(tmp_path, a={"port": free_port(), "venv": "venvs/a", "requirements": "need.txt"})
    with pytest.raises(InputError, match="no-such-package-of-camflow"): check_venvs(path, install=True)


GOOD = '[servers.a]\nreward = "camflow.servers.fakes:SleepReward"\nport = 35000\n'


@pytest.mark.parametrize("text, words", [
    ("", "no server is described"), ("[servers\n", "not TOML"), ("servers = [1]\n", "servers is no table"), ("[servers]\na = 3\n", "a is no table"),
    ("[servers.a]\nport = 35000\n", "reward is missing"), (GOOD + "devicess = 2\n", "unknown settings"), (GOOD + "env = [1]\n", "a table of variables"),
    (GOOD + "roots = \"x\"\n", "a list of folders"), (GOOD + "batch = \"eight\"\n", "batch='eight'.*a number"), (GOOD + "batch = 0\n", "above 0"), (GOOD + "queue = 1.5\n", "a whole number"),
    (GOOD + "limits = {items = 0}\n", "items=0"), ("[supervisor]\nrestarts = \"many\"\n" + GOOD, "restarts='many'"), (GOOD.replace("servers.a", 'servers."a/b"'), "letters, digits"),
    (GOOD + "host = \"0.0.0.0\"\n", "without a token")])
def test_mistakes_in_the_file(tmp_path, text, words):
    "Each is told by `camflow serve up` before anything starts, with the place and what to do."
    (tmp_path/"servers.toml").write_text(text)
    with pytest.raises(InputError, match=words) as told: read_plan(tmp_path/"servers.toml")
    assert "servers.toml" in str(told.value)


def test_addresses(tmp_path):
    "A server is asked where it listens; an address that is none is not taken for a busy port."
    path = write(tmp_path, a={"port": free_port(), "host": "127.0.0.2"})
    row = up(path, wait_s=240)[0]
    try: assert row["state"] == "ready" and ask(row["port"], "/healthz", host="127.0.0.2") and ask(row["port"], "/healthz") is None
    finally: assert down(path)
    for host, words in (("no.such.host.invalid", "is no address"), ("192.0.2.1", "cannot listen on")):
        path = write(tmp_path, a={"port": free_port(), "host": host})
        with pytest.raises(InputError, match=words): prepare(path)


def test_a_server_whose_worker_is_given_up_is_started_again(tmp_path):
    "/healthz answers, and yet no sample will be judged: that is no server that is ready."
    path = write(tmp_path, a={"port": free_port(), "broken_after": 0.5})
    try:
        up(path, wait_s=240)
        wait_for(lambda: state(path, "a-0")["state"] == "failed")
        assert "its worker is broken: out of luck" in state(path, "a-0")["reason"]
    finally: assert down(path)


def test_settings_that_the_reward_refuses(tmp_path):
    "Given up at once and with the reward's own words: starting again would not help."
    (tmp_path/"servers.toml").write_text(f'[servers.a]\nreward = "camflow.servers.fakes:SleepReward"\noptions = {{ speed = 3 }}\nport = {free_port()}\n')
    try: row = up(tmp_path/"servers.toml", wait_s=600)[0]
    finally: down(tmp_path/"servers.toml")
    assert row["state"] == "failed" and row["restarts"] == 0 and "speed" in row["reason"] and "it takes seconds" in row["reason"]


def test_the_file_of_the_repository():
    "servers/servers.toml plans, and every folder it names has what it promises."
    path = ROOT/"servers/servers.toml"
    plan = read_plan(path)
    assert len({one.port for one in plan.processes}) == len(plan.processes)
    assert "ExecStart" in supervisor.systemd_unit(path)
    for folder in [p for p in (ROOT/"servers").iterdir() if p.is_dir() and not p.name.startswith(".")]:
        assert (folder/"README.md").is_file() and (folder/"requirements.txt").is_file()
        assert len([line for line in (folder/"serve.py").read_text().splitlines() if line.strip()]) <= 8

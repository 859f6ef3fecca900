"What goes wrong with reward servers, made to go wrong: no sample lost, none judged into the books twice, no number that nobody measured."
import asyncio
import contextlib
import errno
import io
import json
import os
import queue
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from camflow.processes import die_with_parent, resident, started
from camflow.rewards.client import RemoteReward
from camflow.rewards.protocol import RewardStop, Sample, no_scores, run_reward
from camflow.rewards.wire import SHM, Limits, SharedMemory
from camflow.servers.service import ServerConfig, Service
from camflow.servers.worker import Broken, Worker, WorkerSpec, read_ahead
from tests.serving import ENV, GATE, ROOT, Process, clip, running, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def server(folder):
    with running(roots=[str(folder)], restarts=1000, hang_s=60, idle_s=0.2) as server: yield server


@pytest.fixture
def impatient(server, monkeypatch):
    "The server, which kills a worker that is silent for 3 s; only where a worker shall hang, as a busy machine looks like that, too."
    monkeypatch.setattr(server.service.worker.spec, "hang_s", 3.0)
    return server


def sample(value, prompt="", group=0): return Sample(torch.full((1, 3, 32, 32), value, dtype=torch.uint8), prompt=prompt, id=f"{value}", meta={"group": group})


def true(scores, samples):
    "Every ok is the brightness of its own sample."
    for value, status, one in zip(scores.values.tolist(), scores.status, samples):
        assert (status == "ok") == (value == value) and (status != "ok" or abs(value - float(one.frames[0, 0, 0, 0]) / 255) < 1e-6)


def test_worker_killed_under_a_batch(server, folder):
    "The batch is judged again by the next worker; the client sees a delay."
    samples = [sample(n, f"die once:{folder}/died" if n == 3 else "") for n in range(8)]
    before, reward = server.service.worker.died, RemoteReward(server.url)
    scores = reward(samples)
    true(scores, samples)
    assert scores.status == ["ok"] * 8 and server.service.worker.died == before + 1


def test_a_batch_in_the_moment_of_a_death():
    "The process is gone and its end not yet read: the worker that is started now must not be taken for it."
    async def run():
        worker = Worker(WorkerSpec("camflow.servers.fakes:SleepReward", {"seconds": 0.0}))
        await worker.start()
        os.kill(worker.process.pid, signal.SIGKILL)
        while worker.process.poll() is None: time.sleep(0.001)      # the loop reads nothing meanwhile
        answer = await worker.call("score", items=[])
        found = answer["rows"], worker.state, worker.died, worker.alive
        await worker.stop()
        return found
    assert asyncio.run(run()) == ([], "active", 1, True)


def test_a_reader_that_ends_badly_ends_its_process():
    todo = queue.Queue(1)
    with pytest.raises(ValueError): read_ahead(io.BytesIO(struct.pack(">I", 2) + b"{]"), todo, (), Limits())
    assert todo.get_nowait() is None


def test_a_server_that_is_closed_under_a_batch_starts_no_worker(folder):
    "What flew was put back into the queue, and the queue started a worker that nobody ended; `close` could wait for that one for good."
    async def run():
        service = Service(ServerConfig(GATE, {"gate": str(folder/"never"), "seconds": 0}, roots=[str(folder)]))
        await service.begin()
        asking = asyncio.create_task(service.score([{"id": "a", "video": clip(folder)}], time.monotonic() + 240))
        while not service.batcher.flying: await asyncio.sleep(0.01)
        stop = service.worker.stop
        service.worker.stop = lambda: stop(grace=0)
        await asyncio.wait_for(service.close(), 60)
        with pytest.raises(Broken, match="shutting down"): await asyncio.wait_for(asking, 60)
        return service.worker.alive, service.worker.state
    assert asyncio.run(run()) == (False, "off")


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch):
    "For want of memory, say: the keeper ended with that error, and nothing was parked or started again."
    async def run():
        service, refused, real = Service(ServerConfig("camflow.servers.fakes:SleepReward", {"seconds": 0.0})), [], subprocess.Popen
        await service.begin()
        def popen(*words, **options):
            if len(refused) < 2: refused.append(1); raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            return real(*words, **options)
        monkeypatch.setattr("camflow.servers.worker.subprocess.Popen", popen)
        os.kill(service.worker.pid, signal.SIGKILL)
        while len(refused) < 2 and not service.keeper.done(): await asyncio.sleep(0.01)
        while service.worker.state != "active" and not service.keeper.done(): await asyncio.sleep(0.01)
        found = service.worker.state, service.keeper.done()
        await service.close()
        return found
    assert asyncio.run(run()) == ("active", False)


def test_a_sample_that_always_kills(server):
    "It gets an error of its own; its neighbours in the batch lose nothing."
    samples = [sample(n, "die" if n == 5 else "") for n in range(8)]
    scores = RemoteReward(server.url)(samples)
    true(scores, samples)
    assert scores.status == ["failed" if n == 5 else "ok" for n in range(8)] and "signal 9" in scores.details[5]["reason"]


def test_a_hang_is_killed(impatient, folder):
    "A model that hangs for longer than hang_s is killed with its batch, which is judged again; health answers all the while."
    server = impatient
    samples, begun, pid, answered = [sample(n, f"hang once:{folder}/hung" if n == 1 else "") for n in range(4)], time.monotonic(), server.service.worker.pid, False
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(RemoteReward(server.url), samples)
        wait_for(lambda: (folder/"hung").exists() or call.done())
        while not call.done():
            assert server.http.get("/healthz").status_code == 200
            if started(pid) is not None: answered = True       # while it hung: an answer that waits for the model comes after its end
        scores = call.result()
    true(scores, samples)
    assert answered and scores.status == ["ok"] * 4 and time.monotonic() - begun > 3 and started(pid) is None


def test_budget_of_restarts(server):
    "A worker that dies again and again is given up: 503, so that clients go elsewhere; nothing is invented."
    spec = server.service.worker.spec
    kept, spec.restarts = spec.restarts, 0
    try:
        server.service.worker.deaths.clear()
        with pytest.raises(RewardStop, match="no score"):
            RemoteReward(server.url, deadline_s=4, backoff_s=0.1)([sample(n, "die") for n in range(4)])
        reply = server.http.post("/v1/score", json={"items": [{"id": "x", "video": {"path": "/nothing"}}]})
        assert reply.status_code == 200                      # refused unread: needs no worker
        wait_for(lambda: server.http.get("/readyz").json()["worker"] == "broken")
        assert server.http.get("/readyz").status_code == 503
    finally:
        spec.restarts = kept
        server.service.worker.deaths.clear()
        server.service.worker.state = "dead"
    scores = RemoteReward(server.url)([sample(9)])
    assert scores.status == ["ok"]


def test_too_many_invalid_stop_the_training(server):
    "Half may fail; more ends the run with the reason, also through `run_reward` and `combine`."
    from camflow.rewards.combine import combine
    reward = RemoteReward(server.url, name="judge", max_invalid=0.5)
    assert reward([sample(n, "raise" if n < 2 else "") for n in range(4)]).counts() == {"ok": 2, "failed": 2}
    many = [sample(n, "raise" if n < 3 else "") for n in range(4)]
    for call in (lambda: reward(many), lambda: run_reward(reward, many), lambda: combine({"judge": reward})(many)):
        with pytest.raises(RewardStop, match="judge.*3 of 4 samples got no score.*as asked.*resume"): call()


GARBAGE = [b"", b"{", b"[]", b"null", b"<html>proxy error</html>", b'{"items": 7}', b'{"items": []}',
           b'{"items": [{"id": "ID", "status": "ok", "scores": {}}]}', b'{"items": [{"id": "ID", "status": "ok", "scores": {"score": NaN}}]}',
           b'{"items": [{"id": "ID", "status": "ok", "scores": {"score": "5"}}]}', b'{"items": [{"id": "ID", "status": "fine", "scores": {"score": 5}}]}', b'{"items": [{"id": "other", "status": "ok", "scores": {"score": 5}}]}',
           b'{"items": [{"id": "ID", "status": "invalid", "scores": {"score": 5}}]}', b'{"items": [{"id": "ID", "status": "ok", "scores": {"score": 1e999}}]}', b"\xff\xfe\x00"]


@contextlib.contextmanager
def liar():
    "A server that answers every request with the next piece of garbage."
    asked = []
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words): pass
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = GARBAGE[len(asked) % len(GARBAGE)].replace(b"ID", body["items"][0]["id"].encode())
            asked.append(data)
            self.send_response(200), self.send_header("content-length", str(len(data))), self.end_headers(), self.wfile.write(data)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally: server.shutdown(), server.server_close()


def test_clips_of_a_killed_training_do_not_stay(server, folder):
    "Servers look for them when they begin; one that lives on would let the shared memory fill up."
    with subprocess.Popen([sys.executable, "-c", ""]) as killed: pass
    left = SHM/f"camflow-{os.getuid()}"/f"{killed.pid}-left.npy"
    left.write_bytes(b"clip")
    assert RemoteReward(server.url)([sample(51)]).status == ["ok"] and not left.exists()


def test_clips_of_another_container_stay_for_a_day(tmp_path):
    "Its processes cannot be seen from here, and shared memory is the same for all that were started with --ipc=host."
    shared = SharedMemory(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended: pass
    mine = Path(shared(torch.zeros(2).numpy())["shm"])
    assert mine.name.startswith(f"{os.getpid()}-{shared.space()}-")
    theirs, old, ours = (tmp_path/f"{ended.pid}-{space}-{name}.npy" for space, name in ((shared.space() + 1, "a"), (shared.space() + 1, "b"), (shared.space(), "c")))
    for path in (theirs, old, ours): path.write_bytes(b"clip")
    os.utime(old, (time.time() - 90000,) * 2)
    assert shared.sweep() == 2 and sorted(tmp_path.iterdir()) == sorted([mine, theirs])


def test_a_reward_that_gives_up_at_once_is_asked_again_after_a_pause(monkeypatch):
    "Without one, a judge that does not answer was asked a hundred times a second until the deadline."
    now, asked, url = [0.0], [], "http://127.0.0.1:9"
    def sleep(seconds): now[0] += seconds
    def ask(url, items, put, limit):
        asked.append(limit)
        sleep(0.01)
        return no_scores(len(items), "timeout")
    monkeypatch.setattr("camflow.rewards.client.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    reward = RemoteReward(url)
    monkeypatch.setattr(reward, "ask", ask)
    assert reward.try_server(url, [{}], None, 60.0).status == ["timeout"]
    assert 10 < len(asked) < 50 and 60 <= now[0] < 61


def test_garbage_answers(server):
    "A server that answers nonsense is like one that does not answer: the honest one is asked, and without one there is no score."
    with liar() as (url, asked):
        reward = RemoteReward([url, server.url], rank=0, breaker_after=100)
        for n in range(len(GARBAGE)):
            scores = reward([sample(n)])
            assert scores.status == ["ok"] and abs(float(scores.values[0]) - n / 255) < 1e-6
        assert len(asked) == len(GARBAGE)
        with pytest.raises(RewardStop, match="1 of 1 samples got no score"): RemoteReward(url, deadline_s=1.0, backoff_s=0.01, breaker_after=100)([sample(1)])


def test_a_server_killed_then_all_down(server, folder):
    """One of two servers is killed while it judges: its group is scored by the other. Then the only server is gone for a while (20 s in the long test below): the call waits, says
    so once, and ends with every sample scored when the server is back. A worker dies with its server."""
    outage(server, folder, 2.0)


@pytest.mark.slow
def test_all_down_for_twenty_seconds(server, folder): outage(server, folder, 20.0)


def outage(server, folder, seconds):
    said, samples, gate = [], [sample(n, group=n // 8) for n in range(16)], folder/f"gate {seconds}"
    with Process(folder, GATE, {"gate": str(gate)}, batch=2) as first, ThreadPoolExecutor(1) as pool:
        worker = first.worker()
        call = pool.submit(RemoteReward([first.url, server.url], rank=0, deadline_s=600, parallel=2), samples)
        wait_for(first.busy)
        first.kill(), gate.touch()
        scores = call.result()
        true(scores, samples)
        assert scores.status == ["ok"] * 16
        wait_for(lambda: started(worker) is None, what="the end of the worker of a killed server")
        alone = RemoteReward(first.url, deadline_s=600, breaker_s=30.0, backoff_max_s=0.5, parallel=2)
        announce, alone.announce = alone.announce, lambda down, last: said.append(down) or announce(down, last)
        call, begun = pool.submit(alone, samples), time.monotonic()
        time.sleep(seconds)
        assert not call.done()
        first.start(wait=False)
        scores = call.result()
        true(scores, samples)
        assert scores.status == ["ok"] * 16 and time.monotonic() - begun >= seconds
        assert said.count(True) >= 1 and said[-1] is False
    assert not list((SHM/f"camflow-{os.getuid()}").glob(f"{os.getpid()}-*"))


TRAINER = """
import sys, time, torch
from camflow.rewards.client import RemoteReward
from camflow.rewards.protocol import Sample
reward = RemoteReward(sys.argv[1], lease_s=600.0)
reward.hold(reward.urls[0], 300)
print("held", flush=True)
reward([Sample(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), prompt="", id=str(n)) for n in range(4)])
"""


def test_trainer_killed_while_it_holds_a_lease(folder):
    "The lease runs out, the model parks and then goes, its memory is free; the next trainer gets its scores."
    gate = folder/"gate"
    with running(GATE, {"gate": str(gate), "ballast_mb": 200}, roots=[str(folder)], state="off", idle_s=0.1) as server:
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER, server.url], env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                   preexec_fn=die_with_parent)
        assert trainer.stdout.readline() == "held\n" and server.service.leases.held() == 1
        pid = server.service.worker.pid
        assert resident(pid) > 200 * 2**20
        wait_for(lambda: server.service.batcher.flying, what="a batch in flight")
        trainer.kill(), trainer.wait(), trainer.stdout.close()
        gate.touch()
        wait_for(lambda: server.service.batcher.idle)
        assert server.service.leases.held() == 1 and server.service.mode == "active"
        server.service.leases.clock = lambda: time.monotonic() + 1000             # ten minutes later
        wait_for(lambda: server.service.mode == "off", what="the end of the lease")
        assert started(pid) is None and resident(pid) == 0 and server.service.leases.held() == 0


def soak(server, folder, requests, seed, rate=0.01):
    "Requests with faults among them, sixteen at a time; each is answered exactly once, and only a faulty one may lack a score. Returns how many were judged and how many were faulty."
    draw = random.Random(seed)
    faults = ("die", "hang", "raise", "nan", "short", "missing", "outside", "half", "garbage", "killed")
    work = [(n, draw.choice(faults) if draw.random() < rate else "") for n in range(requests)]
    books, lock = {}, threading.Lock()
    before = server.service.batcher.counts.items
    def one(job):
        n, fault = job
        value = n % 256
        video = {"missing": {"path": f"{folder}/none.npy"}, "outside": {"path": "/etc/passwd"}}.get(fault) or clip(folder, f"{value}.npy", value, 1, 16)
        item = {"id": f"soak {seed} {n}", "video": video, "prompt": fault if fault in ("die", "hang", "raise", "nan", "short") else ""}
        body = {"items": [item], "deadline_ms": 60_000}
        if fault == "killed": server.service.worker.kill("killed by the test")
        if fault in ("half", "garbage"):
            with socket.create_connection(("127.0.0.1", server.service.config.port)) as link:
                data = json.dumps(body).encode()
                link.sendall(f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + (data[:-3] if fault == "half" else b"\x00" * len(data)))
        for _ in range(1000):
            with contextlib.suppress(httpx.HTTPError):
                reply = server.http.post("/v1/score", json=body)
                if reply.status_code == 200:
                    rows = reply.json()["items"]
                    with lock: books.setdefault(n, []).append((fault, value, rows))
                    return
                assert reply.status_code in (429, 503), reply.text
            time.sleep(0.05)
        raise AssertionError(f"sample {n} was never answered")
    with ThreadPoolExecutor(16) as pool: list(pool.map(one, work))
    judged = server.service.batcher.counts.items - before
    assert sorted(books) == list(range(requests)) and all(len(rows) == 1 for rows in books.values())
    lost = []
    for n, [(fault, value, [row])] in books.items():
        assert row["id"] == f"soak {seed} {n}"
        if fault in ("die", "hang", "raise", "nan", "short", "missing", "outside"): assert row["status"] in ("error",
                "invalid") and "score" not in row["scores"], (fault, row)
        elif row["status"] == "error" and "killed by the test" in row["raw"]["reason"]: lost.append(n)   # hit twice, the second time alone: it looks like its worker's killer
        else: assert row["status"] == "ok" and abs(row["scores"]["score"] - value / 255) < 1e-6, (fault, row)
    assert len(lost) <= requests // 2000, lost
    return judged, sum(bool(fault) for _, fault in work)


def test_soak(server, folder):
    "500 requests, one in a hundred faulty: every one is accounted for."
    judged, faulty = soak(server, folder, 500, seed=5)            # none of them hangs
    assert judged >= 490 and faulty >= 1


@pytest.mark.slow
def test_soak_of_ten_thousand(impatient, folder):
    judged, faulty = soak(impatient, folder, 10_000, seed=1)
    assert judged >= 9_900 and 60 <= faulty <= 140

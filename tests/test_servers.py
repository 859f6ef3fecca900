"The protocol of reward servers: what is answered, what is refused, what is remembered, and who holds the model."
import contextlib
import hashlib
import http.client
import json
import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch

from camflow.files import InputError
from camflow.geometry.rigid import se3_exp
from camflow.media.frames import Frames
from camflow.media.video import write_video
from camflow.processes import resident, started
from camflow.rewards.client import RemoteReward
from camflow.rewards.protocol import RewardStop, Sample
from camflow.rewards.wire import SharedMemory
from camflow.servers.fakes import SleepReward
from camflow.servers.service import ServerConfig, read_token
from camflow.servers.worker import make_reward
from tests.serving import GATE, SLEEP, clip, running, wait_for

TOKEN = "a-long-random-word-for-tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def server(folder):
    token = folder.parent/"token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    with running(roots=[str(folder)], token_file=str(token), restarts=1000, limits={"body": 3_000_000, "text": 200_000, "items": 16, "frames": 16,
                                                                                    "pixels": 10_000, "volume": 4_000_000}, idle_s=0.2, body_s=1.0, queue=40, cameraflow="video") as server:
        server.http.headers["Authorization"] = f"Bearer {TOKEN}"
        server.token = str(token)
        yield server


def ask(server, *items, **more):
    "Rows of a request; items without an id get one."
    items = [{"id": f"{time.monotonic_ns()}-{n}", **item} for n, item in enumerate(items)]
    reply = server.http.post("/v1/score", json={"items": items, **more})
    assert reply.status_code == 200, reply.text
    assert [row["id"] for row in reply.json()["items"]] == [item["id"] for item in items]
    return reply.json()["items"]


def reason(row): return row["raw"]["reason"]


def test_partial_answers(server, folder):
    "One request, five fates: each row says its own, and nobody gets a number that was not measured."
    rows = ask(server, {"video": clip(folder)}, {"video": {"path": str(folder/"none.npy")}}, {"video": clip(folder), "prompt": "raise"},
               {"vidoe": clip(folder)},
               {"video": clip(folder), "prompt": "nan"})
    assert [row["status"] for row in rows] == ["ok", "invalid", "error", "invalid", "error"]
    assert abs(rows[0]["scores"]["score"] - 0.2) < 1e-6 and all("score" not in row["scores"] for row in rows[1:])
    assert "does not exist" in reason(rows[1]) and "as asked" in reason(rows[2]) and "vidoe" in reason(rows[3]) and "finite" in reason(rows[4])


def test_information(server):
    info = server.http.get("/v1/info").json()
    assert info["protocol"] == "v1" and info["name"] == "sleep" and info["scores"][0]["higher_better"] and info["limits"]["items"] == 16 and info["device"] == "cpu"
    schema = httpx.get(server.url + "/openapi.json").json()
    assert schema["openapi"].startswith("3.1") and {"/v1/score", "/v1/state", "/v1/info", "/healthz", "/readyz", "/metrics"} <= set(schema["paths"])
    assert "items" in schema["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    text = server.http.get("/metrics").text
    for name in ("camflow_queue_waiting", "camflow_request_seconds_bucket", 'camflow_state{state="active"} 1', 'camflow_samples_total{status="ok"}',
                 "camflow_worker_resident_bytes"): assert name in text
    assert all(len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0 for line in text.splitlines())


def test_ways_of_sending(server, folder):
    "By path (.npy and mp4), shared memory, multipart and raw bytes: the same pixels."
    pixels = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(folder/"clip.mp4", Frames(pixels, "byte", 8), lossless=True)
    np.save(folder/"same.npy", pixels.permute(0, 2, 3, 1).numpy())
    shared = SharedMemory()
    data = (folder/"same.npy").read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    rows = ask(server, {"video": {"path": str(folder/"clip.mp4")}}, {"video": {"path": str(folder/"same.npy")}}, {"video": shared(pixels.permute(0, 2, 3,
            1).numpy())})
    assert [row["status"] for row in rows] == ["ok"] * 3, rows
    by = [row["scores"]["score"] for row in rows]
    shared.close()
    parts = [("request", (None, json.dumps({"items": [{"id": "multi", "video": {"sha256": sha}}, {"id": "none", "video": {"sha256": "0" * 64}}]}))), (sha,
            ("c.npy", data))]
    multi = server.http.post("/v1/score", files=parts).json()["items"]
    raw = server.http.post("/v1/score", content=(folder/"clip.mp4").read_bytes(), headers={"content-type": "application/octet-stream",
                                                                                           "x-item": '{"id": "raw"}'}).json()["items"]
    assert multi[1]["status"] == "invalid" and "SHA-256" in reason(multi[1])
    assert len({*by, multi[0]["scores"]["score"], raw[0]["scores"]["score"]}) == 1
    damaged = server.http.post("/v1/score", files=[parts[0], (sha, ("c.npy", data[:-1]))])
    assert damaged.status_code == 400 and "SHA-256" in damaged.text
    assert not list(server.service.config.folder.glob(f"{os.getpid()}-*")) and server.service.spooled == 0  # nothing is left of what was uploaded


def test_everything_of_a_sample_arrives(server):
    "What a reward sees behind a server is bit for bit what it sees without one."
    from camflow.servers.fakes import TroubleReward
    clip = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8)
    path = se3_exp(torch.linspace(0, 0.3, 5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 2, 0, 0.5, 0], dtype=torch.float64))
    K = torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]])
    samples = [Sample(Frames(clip, "byte", 8), path, "echo", Frames(clip.flip(0), "byte", 8), torch.rand(16, 24) + 1, K, "s", {"group": 1, "metres": 1.25}),
               Sample(clip, path.float(), "echo", id="t"), Sample(clip, prompt="echo")]
    here = TroubleReward(0)(samples)
    for transport in ("shm", "bytes"):
        there = RemoteReward(server.url, transport=transport, token_file=server.token)(samples)
        assert there.status == ["ok"] * 3 and torch.equal(here.values, there.values) and there.details == here.details


def test_token(server, folder):
    good = {"items": [{"id": "t", "video": clip(folder)}]}
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": f"Bearer {TOKEN}x"}):
        with httpx.Client(base_url=server.url, headers=header, trust_env=False) as stranger:
            assert [stranger.post("/v1/score", json=good).status_code, stranger.post("/v1/state", json={"target": "off"}).status_code,
                    stranger.get("/v1/info").status_code] == [401] * 3
            assert stranger.get("/healthz").status_code == 200
    with pytest.raises(RewardStop, match="token is missing or wrong"): RemoteReward(server.url)([Sample(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))])
    assert RemoteReward(server.url, token_file=server.token)([Sample(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))]).status == ["ok"]


def test_token_files(tmp_path):
    path = tmp_path/"token"
    for text, mode, says in ((TOKEN, 0o644, "read by others"), ("short", 0o600, "at least 16"), ("two words that are long", 0o600, "one word")):
        path.write_text(text)
        path.chmod(mode)
        with pytest.raises(InputError, match=says): read_token(str(path))
    with pytest.raises(InputError, match="cannot be read"): read_token(str(tmp_path/"none"))


def test_paths_outside(server, folder):
    "`..`, symbolic links out of the root, special files and folders are not read, and nothing is said about what exists elsewhere."
    secret = folder.parent/"secret.npy"
    clip(folder.parent, "secret.npy")
    (folder/"link.npy").symlink_to(secret)
    (folder/"inner.npy").symlink_to(clip(folder)["path"])
    os.mkfifo(folder/"pipe.npy")
    paths = [secret, folder/"../secret.npy", folder/"link.npy", "/etc/passwd", "/etc/not-there", "clip.npy", folder, folder/"pipe.npy",
             f"{folder}x/clip.npy", "/dev/zero", "/proc/self/environ", f"{folder}/\0.npy"]
    rows = ask(server, *({"video": {"path": str(path)}} for path in paths), {"video": {"path": str(folder/"inner.npy")}})
    assert [row["status"] for row in rows] == ["invalid"] * len(paths) + ["ok"]
    assert len({reason(rows[n]).split("is ")[-1] for n in (0, 3, 4)}) == 1


def test_relative_paths(server): assert "relative" in reason(ask(server, {"video": {"path": "clip.npy"}})[0])


def test_bombs(server, folder):
    "Small files that promise much: refused by their headers, in milliseconds, without the memory."
    with open(folder/"bomb.npy", "wb") as file: np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**4, 10**4,
            10**4, 3)})
    with open(folder/"short.npy", "wb") as file: np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (4, 32, 32, 3)})
    np.save(folder/"objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(folder/"nan.npy", np.full((2, 32, 32, 3), np.nan, np.float32))
    np.save(folder/"grey.npy", np.zeros((2, 32, 32), np.uint8))
    np.save(folder/"empty.npy", np.zeros((0, 32, 32, 3), np.uint8))
    np.save(folder/"long.npy", np.zeros((17, 8, 8, 3), np.uint8))
    (folder/"header.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 1000)
    def npy(header): return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    (folder/"half.npy").write_bytes(npy(b"{'descr': ("))                     # each of these ended the thread that reads, and the server with it was silent
    (folder/"list.npy").write_bytes(npy(b"{[]: 1}"))
    (folder/"true.npy").write_bytes(npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (True, 4, 8, 3)}") + b"\0" * 96)
    black = Frames(torch.zeros(400, 3, 64, 64, dtype=torch.uint8), "byte", 8)
    write_video(folder/"bomb.mp4", black)                                   # a few kB, 400 frames
    write_video(folder/"wide.mp4", Frames(torch.zeros(1, 3, 128, 256, dtype=torch.uint8), "byte", 8))
    (folder/"cut.mp4").write_bytes((folder/"bomb.mp4").read_bytes()[:2000])
    (folder/"codec.mp4").write_bytes((folder/"bomb.mp4").read_bytes().replace(b"avc1", b"none"))
    (folder/"list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    before, names = resident(server.service.worker.pid), ["bomb.npy", "short.npy", "objects.npy", "nan.npy", "grey.npy", "empty.npy", "long.npy",
                                                          "header.npy", "half.npy", "list.npy", "true.npy", "bomb.mp4", "wide.mp4", "cut.mp4", "codec.mp4", "list.mp4"]
    rows = ask(server, *({"video": {"path": str(folder/name)}} for name in names))
    assert {name: row["status"] for name, row in zip(names, rows)} == dict.fromkeys(names, "invalid")
    assert resident(server.service.worker.pid) - before < 100 * 2**20
    for name, words in {"bomb.npy": "allowed", "objects.npy": "array of object", "nan.npy": "array of float32", "half.npy": "not a .npy file", "true.npy": "(True, 4, 8, 3)", "codec.mp4": "shows nothing", "bomb.mp4": "400 frames",
                        "wide.mp4": "128x256", "list.mp4": "no mp4"}.items():
        assert words in reason(rows[names.index(name)]), reason(rows[names.index(name)])


def test_cameras(server, folder):
    video, eye = clip(folder), [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    camera = lambda **change: {"video": video, "camera": {"c2w": [eye, eye], "frame_idx": [0, 1], "convention": "opencv_c2w"} | change}
    rows = ask(server, camera(), camera(c2w=[eye], frame_idx=[1]), camera(frame_idx=[0, 2]), camera(frame_idx=[1, 0]), camera(c2w=[eye, eye[:11]]),
               camera(convention="unreal"),
               camera(c2w=[eye, [2.0, *eye[1:]]]), camera(frame_idx=[0]))
    assert [row["status"] for row in rows] == ["ok", "ok"] + ["invalid"] * 6 and "pose 1 has 11 numbers" in rows[4]["raw"]["reason"]
    assert server.http.post("/v1/score", content=b'{"items": [{"id": "a", "camera": {"c2w": [[NaN]]}}]}').status_code == 400


def test_large_bodies(server):
    "Two gigabytes by Content-Length are refused before a byte is read; chunked, as soon as the limit is passed."
    before = resident(os.getpid())
    link = http.client.HTTPConnection("127.0.0.1", server.service.config.port, timeout=240)
    for kind in ("application/json", "application/octet-stream"):
        link.putrequest("POST", "/v1/score")
        for name, value in {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind, "Content-Length": str(2 * 2**30)}.items(): link.putheader(name, value)
        link.endheaders()
        assert link.getresponse().status == 413
        link.close()
    sent = 0
    def flood():
        nonlocal sent
        while sent < 2 * 2**30:
            sent += 2**16
            yield b"x" * 2**16
    for kind in ("application/json", "application/octet-stream", "multipart/form-data; boundary=x"):
        sent = 0
        try: assert server.http.post("/v1/score", content=flood(), headers={"content-type": kind, "x-item": '{"id": "a"}'}).status_code == 413
        except httpx.WriteError: pass        # the server hung up first
        assert sent < 64 * 2**20
    assert resident(os.getpid()) - before < 200 * 2**20 and server.service.spooled == 0
    assert server.http.post("/v1/score", content=b"x", headers={"content-encoding": "gzip"}).status_code == 415
    assert server.http.post("/v1/score", content=b"{}", headers={"content-type": "application/x-pickle"}).status_code == 415


def test_half_a_body_and_slow_writers(server, folder):
    "Silence costs one connection for a second; the others are served meanwhile."
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/octet-stream\r\nx-item: {{\"id\": \"h\"}}\r\nContent-Length: 1000\r\n\r\n".encode()
    half, slow = (socket.create_connection(("127.0.0.1", server.service.config.port)) for _ in range(2))
    half.sendall(head + b"x" * 500), half.close()
    slow.sendall(head + b"x" * 10)
    assert ask(server, {"video": clip(folder)})[0]["status"] == "ok"
    slow.settimeout(240)
    assert b" 408 " in slow.recv(1000)
    slow.close()
    assert not list(server.service.config.folder.glob(f"{os.getpid()}-*"))


def test_strange_uploads(server):
    "Refused with a reason, and nothing of them is left in the spool folder."
    left = lambda: list(server.service.config.folder.glob(f"{os.getpid()}-*"))
    for text in ("", "[]", '{"id": "a", "video": "x"}', '{"id": "a", "video": [1]}', "[" * 20_000):
        reply = server.http.post("/v1/score", content=b"x" * 100, headers={"content-type": "application/octet-stream", "x-item": text})
        assert reply.status_code == 400 and "x-item" in reply.json()["detail"]
    sha = hashlib.sha256(b"same").hexdigest()
    parts = "".join(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{data}\r\n' for name, data in
                    ((sha, "same"), (sha, "same"), ("request", '{"items": [{"id": "twice sent", "video": {"sha256": "' + sha + '"}}]}'))) + "--b--\r\n"
    assert server.http.post("/v1/score", content=parts.encode(), headers={"content-type": "multipart/form-data; boundary=b"}).json()["items"][0]["status"] == "invalid"
    wait_for(lambda: not left())


def test_slow_reader(server, folder):
    "A client that never reads its answers holds nobody up."
    link = socket.create_connection(("127.0.0.1", server.service.config.port))
    body = json.dumps({"items": [{"id": "slow", "video": clip(folder)}]}).encode()
    one = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    link.setblocking(False)
    try:
        for _ in range(2000): link.send(one)
    except BlockingIOError: pass
    assert ask(server, {"video": clip(folder)})[0]["status"] == "ok"      # or this client's patience ends
    assert ask(server, {"id": "slow", "video": clip(folder)})[0]["status"] == "ok"    # its own sample may be read later than this one's: the next test counts
    link.close()
    wait_for(lambda: server.service.batcher.idle)


def test_asked_twice_judged_once(server, folder):
    judged = lambda: server.service.batcher.counts.items
    wait_for(lambda: server.service.batcher.idle)
    item, before = {"id": "twice", "video": clip(folder)}, judged()
    with ThreadPoolExecutor(8) as pool: rows = list(pool.map(lambda _: ask(server, item)[0], range(8)))
    assert all(row == rows[0] for row in rows) and judged() == before + 1
    assert ask(server, item | {"prompt": "other"})[0]["status"] == "invalid"
    assert ask(server, {"id": "broken", "video": clip(folder), "prompt": f"raise once:{folder}/raised"})[0]["status"] == "error"
    assert ask(server, {"id": "broken", "video": clip(folder), "prompt": f"raise once:{folder}/raised"})[0]["status"] == "ok"   # a failure is no verdict
    assert server.http.post("/v1/score", json={"items": [item, item]}).status_code == 400


@pytest.fixture(scope="module")
def slow(folder):
    "A server whose model is busy inside `slow.busy()`, however fast or slow the machine is."
    gate = folder.parent/"gate"
    gate.touch()
    @contextlib.contextmanager
    def busy():
        gate.unlink()
        try: yield
        finally: gate.touch()
    with running(GATE, {"gate": str(gate), "seconds": 0}, roots=[str(folder)], queue=8, batch=4, depth=1) as server:
        server.busy, server.counts = busy, server.service.batcher.counts
        yield server


def test_deadline_then_the_same_id(slow, folder):
    "What came too late is a timeout without a number; asked again, it is there and was judged once. What expired in the queue is never judged."
    with slow.busy(): rows = ask(slow, {"id": "late", "video": clip(folder)}, deadline_ms=200)
    assert rows[0]["status"] == "timeout" and rows[0]["scores"] == {}
    assert ask(slow, {"id": "late", "video": clip(folder)})[0]["status"] == "ok" and slow.counts.items == 1
    wait_for(lambda: slow.service.batcher.idle)
    expired = slow.counts.expired
    with slow.busy(), ThreadPoolExecutor(12) as pool: codes = list(pool.map(lambda n: ask(slow, {"video": clip(folder)}, deadline_ms=600)[0]["status"], range(9)))
    wait_for(lambda: slow.service.batcher.idle)             # what expired is found when its turn comes
    assert codes == ["timeout"] * 9 and slow.counts.expired - expired >= 8 and slow.counts.items - 1 + slow.counts.expired - expired == 9   # the first to come was begun, the eight behind it never were
    assert ask(slow, {"video": clip(folder)})[0]["status"] == "ok"


def test_full_queue(slow, folder):
    "429 with Retry-After, nothing half accepted; the client waits and every sample is scored once."
    post = lambda n: slow.http.post("/v1/score", json={"items": [{"id": f"{n} {i}", "video": clip(folder)} for i in range(4)]})
    wait_for(lambda: slow.service.batcher.idle)
    before, no = slow.counts.items, slow.counts.refused
    with ThreadPoolExecutor(8) as pool:
        with slow.busy():
            calls = [pool.submit(post, n) for n in range(8)]
            wait_for(lambda: sum(call.done() for call in calls) == 5)      # four items are being judged, eight wait
        replies = [call.result() for call in calls]
    refused = [reply for reply in replies if reply.status_code == 429]
    assert len(refused) == 5 and all(float(reply.headers["retry-after"]) > 0 for reply in refused)
    assert slow.counts.items - before == 4 * (8 - len(refused)) and slow.counts.refused - no == 20
    many = slow.http.post("/v1/score", json={"items": [{"id": f"m {i}", "video": clip(folder)} for i in range(9)]})
    assert many.status_code == 400 and "1 to 8 samples" in many.json()["detail"]    # of a queue of 8: trying again would not help
    reward = RemoteReward(slow.url, parallel=8, backoff_s=0.02)
    samples = [Sample(torch.full((1, 3, 32, 32), n, dtype=torch.uint8), id=str(n), meta={"group": n // 4}) for n in range(24)]
    with ThreadPoolExecutor(1) as pool:
        with slow.busy():
            call = pool.submit(reward, samples)
            wait_for(lambda: slow.counts.refused - no > 20 or call.done())
            assert not call.done() and slow.http.get("/healthz").status_code == 200
        assert torch.allclose(call.result().values, torch.arange(24) / 255)
    assert slow.counts.items - before == 12 + 24


def test_states_and_memory(folder):
    "Parked and off give memory back for real; a sample wakes the model; a lease that runs out parks it; two clients hold it together."
    with running(SLEEP, {"seconds": 0, "ballast_mb": 300}, roots=[str(folder)], idle_s=0.1) as server:
        state = lambda **body: server.http.post("/v1/state", json=body).json()
        pid = server.service.worker.pid
        full = resident(pid)
        assert full > 300 * 2**20
        assert state(target="parked", client="a")["state"] == "parked" and resident(pid) < full - 290 * 2**20
        assert ask(server, {"video": clip(folder)})[0]["status"] == "ok" and server.service.worker.pid == pid
        wait_for(lambda: server.service.mode == "parked")            # back to its rest
        assert state(target="active", client="a", lease_s=600)["leases"] == 1 and state(target="active", client="b", lease_s=600)["leases"] == 2
        assert state(target="active", client="a", lease_s=600)["leases"] == 2        # twice is once
        assert state(target="off", client="a")["state"] == "active"                   # b needs it
        state(target="active", client="b", lease_s=0.5)
        wait_for(lambda: server.service.mode == "off")                                # b never came back
        assert started(pid) is None and resident(pid) == 0
        ready = server.http.get("/readyz")                                            # off on purpose: a sample sent now would wake it
        assert ready.status_code == 200 and ready.json()["state"] == "off" and server.http.get("/healthz").status_code == 200
        assert ask(server, {"video": clip(folder)})[0]["status"] == "ok"
        for bad in ({"target": "asleep"}, {}, {"target": "off", "lease_s": -1}, {"target": "off", "force": True}): assert server.http.post("/v1/state",
                json=bad).status_code == 400
        moves = [{"target": t, "client": str(n)} for n, t in enumerate(["parked", "active", "parked", "active", "parked"])]
        with ThreadPoolExecutor(12) as pool:                                          # states change under load: nothing is lost
            rows = [pool.submit(ask, server, {"video": clip(folder)}) for _ in range(40)]
            list(pool.map(lambda move: server.http.post("/v1/state", json=move), moves))
            assert all(row.result()[0]["status"] == "ok" for row in rows)


class Full(SleepReward):
    "Parks, and then finds its place taken."
    def unpark(self):
        if hasattr(self, "ballast"): raise RuntimeError("no room")
        super().unpark()


class Sticky(Full):
    "Cannot let go of its memory."
    def park(self): raise RuntimeError("it sticks")


@pytest.mark.parametrize("reward", ["Sticky", "Full"])
def test_a_reward_that_parks_badly(folder, reward):
    "Its process ends instead, so the memory is free all the same; the next sample starts another."
    with running(f"tests.test_servers:{reward}", {"seconds": 0}, roots=[str(folder)], idle_s=0.1) as server:
        pid = server.service.worker.pid
        assert server.http.post("/v1/state", json={"target": "parked"}).json()["state"] == "parked"
        assert (started(pid) is None) == (reward == "Sticky")
        assert ask(server, {"video": clip(folder)})[0]["status"] == "ok" and server.service.worker.pid != pid
        wait_for(lambda: server.service.mode == "parked")         # by itself: the keeper lives


def test_open_addresses_need_a_token(tmp_path):
    (tmp_path/"token").write_text(TOKEN)
    with pytest.raises(InputError, match="without a token"): ServerConfig(SLEEP, host="0.0.0.0")
    for config in ({"host": "0.0.0.0", "token_file": str(tmp_path/"token")}, {"host": "127.0.0.2"}, {"host": "localhost"}, {"host": "::1"}): ServerConfig(SLEEP, **config)


def test_a_reward_that_cannot_be_made():
    for reward, options in (("camflow.servers.fakes:Nothing", {}), ("no.such:Module", {}), ("nothing", {}), (SLEEP, {"second": 1})):
        with pytest.raises(InputError): make_reward(reward, options)


def test_cameraflow_video(server, folder):
    "Its shapes; what cannot be scored is an error with a reason; one client's unload does not take the model from another."
    post = lambda path, **body: server.http.post(path, json=body)
    video = clip(folder)["path"]
    assert post("/evaluate_video", video_path=video, prompt="", fps=30).json() == {"output_text": "<answer>0.20</answer>"}
    for code, body in ((500, {"video_path": video, "prompt": "raise"}), (422, {"video_path": "/etc/passwd", "prompt": ""}), (422, {"video_path": video}),
                       (422, {"video_path": 3, "prompt": ""})):
        reply = post("/evaluate_video", **body)
        assert reply.status_code == code and "Traceback" not in reply.text and reply.json()["detail"]
    assert httpx.post(server.url + "/evaluate_video", json={"video_path": video,
                                                            "prompt": ""}).status_code == 401 and server.http.get("/health").json() == {"status": "healthy",
                                                                    "model_loaded": True}
    assert [post("/load_model").json()["leases"] for _ in range(2)] == [1, 2]
    assert post("/unload_model").json()["state"] == "active"
    post("/unload_model")
    wait_for(lambda: not server.http.get("/health").json()["model_loaded"])
    def thread(n):
        for _ in range(3):
            post("/load_model")
            assert post("/evaluate_video", video_path=video, prompt=str(n)).json()["output_text"] == "<answer>0.20</answer>"
            post("/unload_model")
    with ThreadPoolExecutor(8) as pool: list(pool.map(thread, range(8)))
    server.http.post("/v1/state", json={"target": "active"})


def test_cameraflow_pose(folder):
    "The errors are those of the camera reward, poses of every fourth frame included."
    from camflow.rewards.camera import CameraReward
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 16, generator=torch.Generator().manual_seed(0)), (48, 88))
    frames = torch.cat([pixels[..., n:n + 80] for n in range(9)]).mul(255).byte()
    np.save(folder/"pan.npy", frames.permute(0, 2, 3, 1).contiguous().numpy())
    path = se3_exp(torch.linspace(0, 0.2, 9, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0, 0, 0.5, 0], dtype=torch.float64))
    text = lambda poses: {f"frame{n}": " ".join(f"[{' '.join(map(repr, row))}]" for row in pose.tolist()) + " " for n, pose in enumerate(poses)}
    with running("camflow.rewards.camera:CameraReward", {"limit": 4.0}, roots=[str(folder)], cameraflow="pose") as server:
        for at in (list(range(9)), [0, 4, 8]):
            here = CameraReward()([Sample(frames[at], path[at])]).details[0]
            reply = server.http.post("/evaluate_pose", json={"video_path": str(folder/"pan.npy"), "gt_json_data": text(path[at])})
            assert reply.status_code == 200, reply.text
            assert abs(reply.json()["rot_err_mean"] - np.deg2rad(here["rot_deg"])) < 1e-5 and abs(reply.json()["trans_err_mean"] - here["trans_m"]) < 1e-5
        assert server.http.post("/evaluate_pose", json={"video_path": str(folder/"pan.npy"), "gt_json_data": text(path[:4])}).status_code == 422


def test_client_refuses_bad_settings():
    for wrong in ({"urls": []}, {"urls": ["127.0.0.1:80"]}, {"urls": ["http://a", "http://a/"]}, {"urls": "http://a", "transport": "pickle"},
                  {"urls": "http://a", "deadline_s": 0}):
        with pytest.raises(InputError): RemoteReward(**wrong)


def test_poses_as_the_data_set_has_them_are_told_apart(tmp_path):
    "camera_extrinsics.json sent as it stands: transposed, centimetres, other axes. The refusal says what to send, and that is taken."
    from camflow.files import read_json
    from camflow.geometry.camera import Cameras, focal_K, write_unreal_json
    from camflow.geometry.trajectory import preset
    from camflow.servers.cameraflow import parse_poses
    file = tmp_path/"camera_extrinsics.json"
    write_unreal_json(file, {"cam01": Cameras(preset("arc_left", 5), focal_K(24.0, (48, 80)), (48, 80))})
    with pytest.raises(InputError, match="centimetres and other axes.*from_unreal_json"): parse_poses({frame: poses["cam01"] for frame, poses in read_json(file).items()})
    sent = Cameras.from_unreal_json(file, "cam01").relative().c2w
    numbers, poses = parse_poses({f"frame{i}": " ".join(f"[{' '.join(map(str, row.tolist()))}]" for row in pose) for i, pose in enumerate(sent)})
    assert numbers == [0, 1, 2, 3, 4] and torch.allclose(torch.tensor(poses).view(5, 3, 4), torch.as_tensor(preset("arc_left", 5))[:, :3].float(), atol=1e-4)

"Reward servers for tests: in a thread of this process, or as a process of their own; always on the loopback interface, always gone afterwards."
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np

from camflow.processes import die_with_parent, free_port
from camflow.servers.app import make_server
from camflow.servers.service import ServerConfig

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SLEEP, TROUBLE, GATE = "camflow.servers.fakes:SleepReward", "camflow.servers.fakes:TroubleReward", "tests.gate:Gate"


def wait_for(condition, limit=240.0, what="the condition"):
    "Returns the first true value of condition(); the limit is for what hangs, not for what is slow."
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if value := condition(): return value
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not come within {limit} s")


@contextlib.contextmanager
def running(reward=TROUBLE, options=None, **config):
    "A server in a thread: yields its uvicorn server with `url`, `service` and `http`."
    config = ServerConfig(reward, options or {"seconds": 0}, port=free_port(), **config)
    server = make_server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive(), what="the server")
    assert server.started
    server.url, server.service = f"http://127.0.0.1:{config.port}", server.config.app.app.state.service
    try:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=240) as server.http: yield server
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


class Process:
    "A server that can be killed and started again on the same port."
    def __init__(self, folder, reward=TROUBLE, options=None, **config):
        self.port = config.pop("port", None) or free_port()
        self.url, self.path = f"http://127.0.0.1:{self.port}", Path(folder)/f"server-{self.port}.json"
        self.path.write_text(json.dumps({"reward": reward, "options": options or {"seconds": 0}, "port": self.port, **config}))
        self.process = None

    def start(self, wait=True):
        self.process = subprocess.Popen([sys.executable, "-m", "camflow.servers.app", "--config", str(self.path)], cwd=ROOT, env=ENV,
                                        preexec_fn=die_with_parent)
        if wait: wait_for(self.ready, what="the server")
        return self

    def ready(self):
        assert self.process.poll() is None, "the server ended"
        with contextlib.suppress(httpx.HTTPError): return httpx.get(self.url + "/readyz", trust_env=False, timeout=5).status_code == 200
        return False

    def busy(self): return httpx.get(self.url + "/readyz", trust_env=False, timeout=60).json()["flying"]

    def worker(self): return httpx.get(self.url + "/readyz", trust_env=False, timeout=60).json()["pid"]

    def kill(self):
        if self.process: self.process.kill(), self.process.wait()

    def __enter__(self): return self.start()
    def __exit__(self, *_): self.kill()


def clip(folder, name="clip.npy", value=51, frames=2, size=32):
    "A grey clip of known brightness, and the item that asks for it."
    path = Path(folder)/name
    if not path.exists(): np.save(path, np.full((frames, size, size, 3), value, np.uint8))
    return {"path": str(path)}

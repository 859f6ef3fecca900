"""A small post-training on two ranks that is killed or poisoned: `python -m tests.train_rl_small FOLDER KILLS STEPS`. Ranks are forked, so that a start costs no imports."""
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

from camflow.processes import die_with_parent, end_quickly
from camflow.rl import recam_grpo
from camflow.rl.faults import replay_batch
from camflow.training.heartbeat import Heartbeat

CONFIG = {"model": "random", "size": [16, 16], "frames": 5, "groups": 2, "k": 2, "sampling_steps": 4, "window_high": 3, "micro_batch": 1, "eval_conditions": 1, "conditions": 2, "lr": 1e-3, "kl": 0.01,
          "checkpoint_every": 2}
PHASES = ("update", "reward", "checkpoint", "rollout", "waiting for rewards", "decode", "waiting for gradients", "between steps", "eval rollout")


def brightness(samples): return torch.stack([sample.frames.unit().data.mean() for sample in samples])


class Brightness:
    "A reward; told to, its rank 1 hangs at the third call."
    name = "brightness"
    def __init__(self, hang=False): self.hang, self.calls = hang, 0

    def ask_the_judge(self): time.sleep(600)

    def __call__(self, samples):
        from camflow.rewards.protocol import Scores
        self.calls += 1
        if self.hang and self.calls == 3 and os.environ.get("RANK") == "1": self.ask_the_judge()
        return Scores(brightness(samples), ["ok"] * len(samples))


def doom(phase, nth, delay):
    "This process ends itself by SIGKILL, `delay` seconds after the nth time that it enters the phase."
    beat, left = Heartbeat.__call__, [nth]

    def call(self, name, step=None):
        beat(self, name, step)
        left[0] -= name == phase
        if left[0] == 0 and name == phase: threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    Heartbeat.__call__ = call


def poison(healthy): # answers with a gradient before the first that has none
    "The policy's slope becomes infinite, while what it answers stays the same."
    plain, left = recam_grpo.make_fn, [healthy]

    def make_fn(guidance=1.0):
        def bind(model):
            inner = plain(guidance)(model)
            def model_fn(x, sigma, cond):
                v = inner(x, sigma, cond)
                left[0] -= v.requires_grad
                return v + (v - v.detach()).abs().sqrt() if v.requires_grad and left[0] < 0 else v
            return model_fn
        return bind
    recam_grpo.make_fn = make_fn
    return lambda: setattr(recam_grpo, "make_fn", plain)


def rank_main(rank, world, config, run_dir, store, prepare):
    "Runs one rank in a forked process; does not return."
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
        sys.stderr = open(run_dir/f"rank{rank}.log", "a")
        die_with_parent()
        prepare(rank)
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        recam_grpo.main(config, run_dir, brightness)
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid, seconds):
    "The exit status, or None while it runs."
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found: return status
        if time.monotonic() > until: return None
        time.sleep(0.005)


def attempt(config, run_dir, number, prepare=lambda rank: None, how="wait", world=2): # called in each rank; what the launcher does to the others when one ends badly: "wait", "term" or "kill"
    "Runs all ranks until one ends badly or all are done; returns ({rank: exit status}, ranks that hung)."
    run_dir.mkdir(parents=True, exist_ok=True)
    store, pids, states, hung = run_dir/f"store{number}", {}, {}, []
    for rank in range(world):
        pids[rank] = os.fork()
        if pids[rank] == 0: rank_main(rank, world, config, run_dir, store, prepare)
    while len(states) < world:
        states |= {rank: status for rank, pid in pids.items() if rank not in states and (status := ended(pid, 0)) is not None}
        for rank in [r for r in pids if r not in states] if any(states.values()) else []:
            if how != "wait": os.kill(pids[rank], signal.SIGTERM if how == "term" else signal.SIGKILL)
            states[rank] = ended(pids[rank], 300)
            if states[rank] is None:
                hung.append(rank)
                os.kill(pids[rank], signal.SIGKILL)
                states[rank] = ended(pids[rank], 300)
        time.sleep(0.005)
    store.unlink(missing_ok=True)
    return states, hung


def logs(run_dir): return [path.read_text()[-2000:] for path in sorted(run_dir.glob("rank*.log"))]


def storm(folder, kills, steps, seed=0):
    "Two runs of the same configuration: one left alone, one killed; returns what happened."
    rng, config, counts, hung = random.Random(seed), {**CONFIG, "steps": steps, "eval_every": 2}, {}, []
    assert not any(attempt(config, folder/"whole", 0)[0].values()), logs(folder/"whole")
    for number in range(kills):
        phase = PHASES[number % len(PHASES)]
        victim = 0 if phase in ("checkpoint", "eval rollout") else rng.choice((0, 1))  # rank 0 writes, and judges the one request
        fate = phase, rng.randint(1, 2), rng.choice((0, rng.expovariate(100)))
        states, silent = attempt(config, folder/"storm", number, lambda rank: doom(*fate) if rank == victim else None, rng.choice(("wait", "term", "kill")))
        hung += silent
        assert states[victim] == signal.SIGKILL, logs(folder/"storm")
        counts[phase] = counts.get(phase, 0) + 1
    assert not any(attempt(config, folder/"storm", kills)[0].values()), logs(folder/"storm")
    return {"kills": sum(counts.values()), "phases": counts, "hung": hung}


def poisoned(folder):
    "Rank 1's second rollout has an infinite slope: how the run ends, what is saved, what the replay finds with the poison and without."
    config = {**CONFIG, "steps": 3}
    states, hung = attempt(config, folder/"poisoned", 0, lambda rank: poison(4) if rank == 1 else None)  # 2 micro-batches of 2 points per rollout
    saved, rows = sorted((folder/"poisoned/broken").glob("*/step-*")), {}
    for name, cure in (("poisoned", poison(0)), ("mended", None)):
        rows[name] = [replay_batch(recam_grpo.build(config, folder/"poisoned", brightness)[0], path) for path in saved]
        if cure: cure()
    return {"states": states, "hung": hung, "saved": [str(path.relative_to(folder)) for path in saved], "rows": rows, "logs": logs(folder/"poisoned")}


if __name__ == "__main__":
    end_quickly()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as warm: recam_grpo.main({**CONFIG, "steps": 1}, warm, brightness)  # everything is imported and compiled once, before the forks
    found = {"storm": storm(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])), "poisoned": poisoned(Path(sys.argv[1]))}
    (Path(sys.argv[1])/"found.json").write_text(json.dumps(found))

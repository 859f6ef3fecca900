"""A small training program for the tests of the loop: `python -m tests.train_small --config run_dir/config.json`, or with --storm to be killed often."""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from camflow.training.loop import TrainConfig, fit, item_noise, positions, run_main, shuffled

DATA = torch.randn(23, 5, generator=torch.Generator().manual_seed(1))  # an epoch is no multiple of the batch


class Net(torch.nn.Module):
    def __init__(self, dropout=0.0, blocks=0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 5))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(blocks))
        self.register_buffer("seen", torch.zeros(()))
        self.checkpointing = False

    def enable_gradient_checkpointing(self): self.checkpointing = True

    def forward(self, x):
        self.seen += 1
        x = self.layers[:2](x)
        for block in self.blocks: x = x + torch.tanh(block(x))
        return self.layers[2:](x)


def main(config, run_dir):
    cfg, pause, hold = TrainConfig.pick(config), config.get("pause", 0.), config.get("hold")

    def batch_fn(step, rank, world, micro):
        while hold and step >= hold[0] and not Path(hold[1]).exists(): time.sleep(0.01)  # [step, file]: goes on when the file is there
        items = positions(step, rank, world, micro, cfg.batch_size, cfg.accumulation)
        return DATA[[shuffled(i, len(DATA), cfg.seed) for i in items]], items

    def step_fn(model, batch, noise):
        x, items = batch
        time.sleep(pause)
        out = model(x + 0.3 * item_noise((5,), cfg.seed, items))
        return (out.float() - x).square().mean(), {"size": out.abs().mean()}

    def validate(model, step): return {"val": (model(DATA) - DATA).square().mean().item(), "draw": torch.rand(()).item()}

    model, frozen = Net(config.get("dropout", 0.), config.get("blocks", 0)), config.get("frozen")
    if frozen: model.get_submodule(frozen).to(torch.bfloat16)  # as a large model's frozen part is loaded
    return fit(run_dir, model, step_fn, batch_fn, cfg, validate=validate, trainable=frozen and (lambda name: not name.startswith(frozen)))


def several(config, run_dir):
    "Trainings in turn, in one group of ranks: {'runs': [[folder, changes], ...]}."
    results = [main(config | changes, Path(run_dir)/name).as_dict() for name, changes in config.pop("runs")]
    return {"results": results}


def storm(config_path, kills, longest, seed=0):
    "Runs the program in forked children, killing it with SIGKILL at random moments, then lets it finish; prints how often it had to be killed."
    torch.set_num_threads(1)
    import accelerate  # noqa: F401  imported once, before the forks
    from torch import _dynamo  # noqa: F401  torch.optim imports it
    rng, config, run_dir, done = random.Random(seed), json.loads(Path(config_path).read_text()), Path(config_path).parent, 0
    while True:
        child = os.fork()
        if child == 0:
            main(config, run_dir)
            os._exit(0)
        if done < kills:
            time.sleep(rng.uniform(0.02, longest))
            os.kill(child, signal.SIGKILL)
            done += 1
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(json.dumps({"kills": done, "code": os.WEXITSTATUS(status)}))
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    if "--storm" in sys.argv:
        at = sys.argv.index("--storm")
        storm(sys.argv[sys.argv.index("--config") + 1], int(sys.argv[at + 1]), float(sys.argv[at + 2]))
    else:
        torch.set_num_threads(1)
        run_main(lambda config, run_dir: (several if "runs" in config else main)(config, run_dir))

"Metrics that worker processes can import, for the tests of the evaluation engine: two honest ones and several that break."
import os
import signal
import time
from pathlib import Path

import numpy as np

from camflow.files import write_json
from camflow.metrics.features import Differences, Feature, PairValues
from camflow.metrics.interface import Result
from camflow.metrics.perceptual import psnr
from camflow.metrics.streaming import Need, SetMetric, StreamMetric


class Flicker(StreamMetric):
    name, needs = "flicker", {"neighbours": Need(Differences())}
    scale = 1.0
    def score(self, sample, neighbours): return self.scale * (255 - neighbours["differences"].mean()) / 255


def psnr_values(a, b): return psnr(a, b, "byte", per_frame=True)


class PSNR(StreamMetric):
    name, inputs, needs = "psnr", ("video", "reference"), {"frames": Need(PairValues("PSNR", psnr_values), ("video", "reference"))}
    def score(self, sample, frames): return frames["values"].mean()


class Ends:
    "A plain metric with two numbers."
    name, higher_is_better, inputs, longest = "ends", True, ("video", "cameras"), 32
    def indices(self, total, fps): return [0, total - 1]

    def __call__(self, video, cameras):
        assert len(video) == len(cameras) == 2 and tuple(video.shape[-2:]) == cameras.size
        return [Result("ends.first", float(video[0].float().mean())), Result("ends.focal", float(cameras.K[0, 0, 0]))]


class Slow:
    "A tenth of a second, and a mark in a folder for every call; where a file `hold` lies beside the folder, the ninth call does not end."
    name, higher_is_better, inputs = "slow", True, ("video",)
    def __init__(self, folder): self.folder = str(folder)

    def __call__(self, video):
        time.sleep(600 if Path(self.folder).with_name("hold").exists() and len(os.listdir(self.folder)) >= 8 else 0.1)
        (Path(self.folder) / f"{time.time_ns()}-{os.getpid()}").touch()
        return float(video.float().mean())


class Crash:
    "Takes the whole process with it where a clip is dark, or hangs there and writes its number into a file."
    name, higher_is_better, inputs = "crash", True, ("video",)
    def __init__(self, how="abort", mark=""): self.how, self.mark = how, str(mark)

    def __call__(self, video):
        if video.float().mean() < 20:
            if self.how == "abort": os.abort()
            if self.how == "hang": write_json(self.mark, os.getpid()), time.sleep(600)
            os.kill(os.getpid(), signal.SIGSEGV)
        return 1.0


class CrashingFeature(Feature):
    name = "crashing"
    def start(self, wanted, info): return self
    done = False
    def push(self, chunk):
        if chunk.data.float().mean() < 20: os.kill(os.getpid(), signal.SIGSEGV)
    def finish(self): return {"rows": np.zeros(1)}


class Needy(StreamMetric):
    name, needs = "needy", {"x": Need(CrashingFeature())}
    def score(self, sample, x): return 2.0


class Answer:
    "A plain metric whose setting stands in the class."
    name, higher_is_better, inputs, answer = "answer", True, ("video",), 7.0
    def __call__(self, video): return self.answer


class Distance(SetMetric):
    name, needs, answer = "distance", {"fake": Need(Differences()), "real": Need(Differences())}, 3.5
    def score(self, fake, real, **labels): return self.answer


class Bug:
    name, higher_is_better, inputs = "bug", True, ("video",)
    def __call__(self, video): return 1 / 0


class Levels(SetMetric):
    "Difference of the mean flicker of both sets, with the numbers of videos."
    name, needs = "levels", {"fake": Need(Differences()), "real": Need(Differences(), "source")}

    def score(self, fake, real, fake_sources, real_sources):
        mean = lambda rows: np.mean([r["differences"].mean() for r in rows])
        return Result(self.name, float(mean(fake) - mean(real)), details={"n_fake": len(fake), "n_real": len(real)})

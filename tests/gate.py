"A reward that waits until a file is there: a test sees a server busy for as long as it likes."
import time
from pathlib import Path

from camflow.servers.fakes import SleepReward


class Gate(SleepReward):
    "The brightness, once the file `gate` exists."
    def __init__(self, gate: str, **options):
        self.gate = Path(gate)
        super().__init__(**options)

    def __call__(self, samples: list):
        while not self.gate.exists(): time.sleep(0.01)
        return super().__call__(samples)

"A program that waits before it puts a certain file into its place: it can be killed there, however fast the machine is."
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOLD = '''import sys, time
def hold(event, words):
    if event == "os.rename" and str(words[1]).endswith({name!r}): time.sleep(600)
if {module!r} in sys.orig_argv and "--guard" not in sys.orig_argv: sys.addaudithook(hold)
'''


def held(folder,              # of the test
         module: str,         # python -m MODULE
         name: str) -> dict:  # end of the file's path
    "The environment of the program, or of whoever starts it."
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder)/"sitecustomize.py").write_text(HOLD.format(name=name, module=module))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}

"""`nbdev-test` for many notebooks, with its options: `python -m tools.nbtest --n-workers 2`.

What most notebooks import is imported once, before the workers are forked; they share it, and their garbage collector leaves it alone."""
import gc

gc.disable()
import cv2  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import numba  # noqa: E402, F401
import pandas  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401
from diffusers import AutoencoderKLWan, UNet2DConditionModel, WanTransformer3DModel  # noqa: E402, F401
from nbdev.test import nbdev_test  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__": nbdev_test()

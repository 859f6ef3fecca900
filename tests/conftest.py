"The collector of garbage rests while test modules are imported, and later leaves alone what they brought: hundreds of thousands of objects that live to the end."
import gc

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()
    try: return (yield)
    finally:
        gc.freeze()
        gc.enable()

"""The plain network of tests/oracles against the goldens, by the harness of stereo.py: is the oracle that the fast path is compared with right itself?"""
from tests.parity import stereo


def check(folder) -> dict:
    "{case: (worst difference, atol, rtol, ok)} of the network cases."
    return stereo.check(folder, "oracle")

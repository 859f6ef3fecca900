"""Stand-in weights for parity tests: every tensor is drawn from a generator seeded by its own name."""
import hashlib
import math

import numpy as np


def seeded_array(name: str, shape, gain: float = 1.0) -> np.ndarray:
    """float32 array for one tensor; norm weights near 1, variances positive, matrices scaled by 1/sqrt(fan_in)."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    x = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(tuple(shape), dtype=np.int64)
    if leaf == "running_var":
        return np.exp(np.float32(0.1) * x)
    if leaf == "running_mean" or leaf == "bias" or leaf.endswith("_bias"):
        return np.float32(0.05) * x
    if x.ndim <= 1:
        return np.float32(1.0) + np.float32(0.1) * x if leaf in ("weight", "gamma", "g") else np.float32(0.1) * x
    fan_in = int(np.prod(shape[1:]))
    return np.float32(gain / math.sqrt(max(fan_in, 1))) * x


def seeded_state_dict(shapes: dict, gain: float = 1.0) -> dict:
    """`{name: array}` for every name in `shapes`."""
    return {name: seeded_array(name, shape, gain) for name, shape in shapes.items()}

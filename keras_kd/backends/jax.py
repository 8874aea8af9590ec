"""What only the JAX backend needs; imported when that backend is in use."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def process_index() -> int:
    """The number of this process among those that train together."""
    return int(jax.process_index())


def whole(array: jax.Array) -> np.ndarray:
    """A value in NumPy, gathered where each process holds a part; all of them must call."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))

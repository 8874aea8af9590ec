"""What only the JAX backend needs; imported when that backend is in use."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
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


def compiled(function: Callable[[Any], Any], variables: Sequence[Any], x: Any) -> Any:
    """What a function that reads these variables makes of `x`, by one compiled program."""

    @jax.jit
    def run(values: list[Any], x: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(x)

    return run([variable.value for variable in variables], x)


def gradient(function: Callable[[list[Any]], Any], x: list[Any], differentiable: bool) -> Any:
    """The gradient of a scalar function; on JAX it may always be differentiated in turn."""
    return jax.grad(function)(x)

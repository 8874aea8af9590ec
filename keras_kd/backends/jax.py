"""What only the JAX backend needs; imported when that backend is in use."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

FILLS_FORWARD = True
"""Whether `filled` runs in the forward pass, beside the values."""


def filled(
    function: Callable[[Any, Any], tuple[jax.Array, ...]],
    parts: int,
    likes: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Write what is computed of each group of rows into arrays, one group after the other.

    XLA writes into what a loop carries in place; results that `lax.map` stacks would have to be cut
    to length, and so be copied.

    Args:
        function: `fn(start, size)`: `size` new rows of each array.
        parts: Into how many groups the rows are divided, at most.
        likes: Arrays `(rows, ...)`: the shapes and types of the results.

    Returns:
        The arrays.
    """
    count = likes[0].shape[0]
    size = max(-(-count // parts), 1)

    def body(wholes: Any, group: Any) -> tuple[Any, None]:
        # The last group reaches back into the one before it, so that all have one size.
        start = jnp.minimum(group * size, count - size)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
            for whole, part in zip(wholes, function(start, size), strict=True)
        ), None

    # Filled with a number that this function alone gives, all of it to be overwritten: XLA makes
    # the zeros of two loops one array, ahead of both, and then a copy of it for each.
    wholes = tuple(
        jnp.full_like(like, part.ravel()[0])
        for like, part in zip(likes, function(0, size), strict=True)
    )
    # A scan, of which JAX leaves out the arrays that nobody asks for.
    return jax.lax.scan(body, wholes, jnp.arange(-(-count // size)))[0]


def process_index() -> int:
    """The number of this process among those that train together."""
    return int(jax.process_index())


def whole(array: jax.Array) -> np.ndarray:
    """A value in NumPy, gathered where each process holds a part; all of them must call."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))

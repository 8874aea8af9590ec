"""What only the PyTorch backend needs; imported when that backend is in use."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch

FILLS_FORWARD = False
"""Whether `filled` runs in the forward pass: PyTorch does not say if a gradient will follow."""


def filled(
    function: Callable[[int, int], tuple[torch.Tensor, ...]],
    parts: int,
    likes: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Write what is computed of each group of rows into tensors, one group after the other.

    Args:
        function: `fn(start, size)`: `size` new rows of each tensor.
        parts: Into how many groups the rows are divided, at most.
        likes: Tensors `(rows, ...)`: the shapes and types of the results.

    Returns:
        The tensors.
    """
    wholes = tuple(torch.empty_like(like) for like in likes)
    count = len(likes[0])
    size = max(-(-count // parts), 1)
    for start in range(0, count, size):
        length = min(size, count - start)
        for whole, part in zip(wholes, function(start, length), strict=True):
            whole[start : start + length] = part
    return wholes


def without_gradients() -> AbstractContextManager[None]:
    """A context in which no graph for gradients is recorded."""
    return torch.no_grad()


def permutation(count: int) -> np.ndarray:
    """Row numbers in the order in which Keras draws those of arrays."""
    return np.array(list(torch.utils.data.RandomSampler(range(count))))


def random_state() -> np.ndarray:
    """The state of PyTorch's random numbers, in bytes."""
    return torch.get_rng_state().numpy().copy()


def set_random_state(state: np.ndarray) -> None:
    """Go on from a state that `random_state` returned."""
    torch.set_rng_state(torch.from_numpy(np.ascontiguousarray(state)))

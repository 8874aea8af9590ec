"""What only the PyTorch backend needs; imported when that backend is in use."""

from contextlib import AbstractContextManager

import numpy as np
import torch


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

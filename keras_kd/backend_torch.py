"""What only the PyTorch backend needs; imported when that backend is in use."""

from contextlib import AbstractContextManager

import torch


def without_gradients() -> AbstractContextManager[None]:
    """A context in which no graph for gradients is recorded."""
    return torch.no_grad()

"""What only the PyTorch backend needs; imported when that backend is in use."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from keras_kd.utils.types import Tensor

Compared = Callable[[torch.Tensor], tuple[torch.Tensor, Callable[..., torch.Tensor]]]
"""From logits to values, and to `fn(upstream, start, size)`, the gradient of some rows."""


def going_on() -> Callable[[], None]:
    """What puts the generator on the processor back to where it is now."""
    state = torch.get_rng_state()

    def put_back() -> None:
        torch.set_rng_state(state)

    return put_back


def with_slopes(
    compared: Compared, logits: torch.Tensor, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with a gradient that is computed for one group of rows after the other.

    The logits come back for another loss to read: the gradient of these values is added to that
    of the other in place, where PyTorch would hold both, and their sum beside them. So what
    reads them may keep nothing of the gradient that it gives them; no loss of this package does.

    Args:
        compared: `fn(logits)`: the values `(rows, 1)`, and `fn(upstream, start, size)`: from their
            gradient `(rows, 1)` to that of some rows of logits, `(size, classes)`.
        logits: `(rows, classes)`.
        parts: Into how many groups the rows are divided, at most.

    Returns:
        The values and the logits.
    """
    values, passed = _WithSlopes.apply(logits, compared, parts)
    return values, passed


class _WithSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, compared: Compared, parts: int) -> Any:
        values, ctx.slopes = compared(logits.detach())
        ctx.like, ctx.parts = logits.detach(), parts
        ctx.set_materialize_grads(False)
        return values, logits

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, whole: torch.Tensor) -> Any:
        if upstream is None:
            return whole, None, None
        # That of another loss may be differentiated in turn, or be one number for many entries.
        if whole is not None and (torch.is_grad_enabled() or not whole.is_contiguous()):
            whole = whole.clone(memory_format=torch.contiguous_format)
        filled = torch.empty_like(ctx.like) if whole is None else whole
        size = max(-(-len(filled) // ctx.parts), 1)
        for start in range(0, len(filled), size):
            rows = filled[start : start + size]
            new = ctx.slopes(upstream, start, len(rows))
            if whole is None:
                rows.copy_(new)
            else:
                rows.add_(new)
        return filled, None, None


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


def gradient(
    function: Callable[[list[torch.Tensor]], torch.Tensor],
    x: list[torch.Tensor],
    differentiable: bool,
) -> list[torch.Tensor]:
    """The gradient of a scalar function; that of no weight is touched."""
    with torch.enable_grad():
        if not differentiable:
            x = [each.detach() for each in x]
        x = [each if each.requires_grad else each.detach().requires_grad_() for each in x]
        value = function(x)
        if not value.requires_grad:
            return [torch.zeros_like(each) for each in x]
        found = torch.autograd.grad(value, x, create_graph=differentiable, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(x, found, strict=True)]


def with_memory_of(held: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
    """Those Variables and NumPy arrays that are a second name for the memory of a weight."""

    def place(thing: Tensor) -> int:
        tensor = torch.from_numpy(thing) if isinstance(thing, np.ndarray) else thing.value
        return int(tensor.untyped_storage().data_ptr())

    theirs = {place(weight) for weight in weights}
    return [
        thing
        for thing in held
        if not (isinstance(thing, np.ndarray) and thing.dtype.kind not in "fiub")
        and place(thing) in theirs
    ]


@torch.compiler.disable
def host_call(
    function: Callable[..., Sequence[np.ndarray]], x: Sequence[Any]
) -> Sequence[np.ndarray]:
    """What a function of NumPy says of a batch; see `keras_kd.backends.host_call`."""
    return function(*(each.detach().cpu().numpy() if torch.is_tensor(each) else each for each in x))

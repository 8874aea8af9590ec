"""Lengths, angles and grids of features, safe where a feature is zero or constant."""

import keras
import numpy as np
from keras import ops

from keras_kd.utils.types import Tensor


def precise(x: Tensor) -> Tensor:
    """`x` in float32 where it is a half: sums of products past 65504 overflow in float16."""
    half = keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16")
    return ops.cast(x, "float32") if half else x


def scaled(x: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    """`x` divided by its largest size along `axis`, which counts as a constant.

    For what does not depend on the scale: squares of features past 1e19 overflow.
    """
    largest = ops.stop_gradient(ops.max(ops.abs(x), axis=axis, keepdims=True))
    return x / ops.where(ops.equal(largest, 0), ops.ones_like(largest), largest)


def unit(x: Tensor, axis: int | tuple[int, ...] = -1) -> Tensor:
    """`x` divided by its Euclidean length along `axis`.

    A vector of zeros stays zero and gets a gradient of order one, where the
    division by a small constant would give one of that constant's inverse.

    Args:
        x: Tensor of any shape.
        axis: Along which the length becomes 1.

    Returns:
        Tensor of the same shape.
    """
    x = scaled(x, axis)
    squares = ops.sum(ops.square(x), axis=axis, keepdims=True)
    return x / ops.sqrt(ops.where(ops.equal(squares, 0), ops.ones_like(squares), squares))


def rounding(dtype: str) -> float:
    """The relative rounding error of a dtype: half the gap between 1 and the next number."""
    bits = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
    return float(2.0 ** -bits[keras.backend.standardize_dtype(dtype)])


def huber(difference: Tensor, delta: float = 1.0) -> Tensor:
    """`d**2 / 2` up to `delta`, `delta * (|d| - delta / 2)` beyond it, entry by entry."""
    size = ops.abs(difference)
    # min(d, delta) keeps the square finite on the branch that is not taken.
    near = ops.minimum(size, delta)
    return 0.5 * ops.square(near) + delta * (size - near)


def flattened(x: Tensor) -> Tensor:
    """`(batch, ...)` as `(batch, features)`."""
    if len(x.shape) == 2:
        return x
    return ops.reshape(x, (ops.shape(x)[0], -1))


def averaged_to(x: Tensor, size: int, axis: int) -> Tensor:
    """Average one axis down to `size` cells, adaptively where it is no multiple of it.

    Cell `i` averages the entries from `floor(i * n / size)` up to, not
    including, `ceil((i + 1) * n / size)`.

    Args:
        x: Tensor whose `axis` has a known length `n`.
        size: Number of cells.
        axis: The axis.

    Returns:
        Tensor with `size` entries along `axis`.
    """
    length = x.shape[axis]
    if length == size:
        return x
    cells = np.zeros((length, size))
    for cell in range(size):
        start, stop = cell * length // size, -(-(cell + 1) * length // size)
        cells[start:stop, cell] = 1.0 / (stop - start)
    # The matrix is small, so one product an axis is quicker than slices.
    return ops.moveaxis(
        ops.tensordot(x, ops.convert_to_tensor(cells, dtype=x.dtype), axes=[[axis], [0]]), -1, axis
    )


def common_grid(teacher: Tensor, student: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Average the larger of two feature maps to the grid of the smaller, axis by axis.

    Args:
        teacher: `(batch, ..., channels)` with any number of grid axes.
        student: The same number of axes.
        name: Name of the loss, for the error.

    Returns:
        Both maps on one grid.

    Raises:
        ValueError: If the numbers of axes differ, or a grid is unknown on one side alone.
    """
    if len(teacher.shape) != len(student.shape):
        raise ValueError(
            f"`{name}` compares feature maps with equally many axes. Received: teacher "
            f"{tuple(teacher.shape)}, student {tuple(student.shape)}. Tap layers of one kind."
        )
    for axis in range(1, len(teacher.shape) - 1):
        theirs, ours = teacher.shape[axis], student.shape[axis]
        if theirs == ours:
            continue
        if theirs is None or ours is None:
            raise ValueError(
                f"`{name}` needs to know both grids to bring one to the other. Received: teacher "
                f"{tuple(teacher.shape)}, student {tuple(student.shape)}. Give the models inputs "
                "of a fixed size."
            )
        teacher = averaged_to(teacher, min(theirs, ours), axis)
        student = averaged_to(student, min(theirs, ours), axis)
    return teacher, student


def require_maps(name: str, *shapes: tuple[int | None, ...], rank: int = 3) -> None:
    """Raise `ValueError` unless every shape has a grid: at least `rank` axes."""
    for shape in shapes:
        if len(shape) < rank:
            raise ValueError(
                f"`{name}` compares feature maps `(batch, height, width, channels)` or "
                f"`(batch, positions, channels)`. Received: {tuple(shape)}. Tap a layer before "
                "the pooling."
            )

"""Which positions of a batch count in a loss, with which weight, and what the sum is divided by.

One rule for all losses, `docs/data.md` has it as a table. A position, which is a row of a
classifier and a token or pixel of other models, counts where no Keras mask of student or teacher
leaves it out and its label is not one that the hard loss ignores; sums are weighted and divided as
Keras does it: by the positions that count, whatever their weights, or by the sum of the weights
for `reduction="mean_with_sample_weight"`. A row of which the hard loss reads no label at all is
unlabeled: it counts in the distillation loss alone.
"""

from typing import NamedTuple

import keras
from keras import ops

from keras_kd.utils.masks import keras_mask
from keras_kd.utils.types import Shape, Tensor


class Counted(NamedTuple):
    """What counts of one output of a batch.

    Attributes:
        mask: Boolean `(batch, ..., positions)`, or `None` where all positions count.
        weight: `(batch,)` or `(batch, ..., positions)`, or `None` where all weigh 1.
    """

    mask: Tensor = None
    weight: Tensor = None

    def over(self, values: Tensor) -> Tensor:
        """What a mean over values of this output is weighted by, 0 where they do not count.

        Args:
            values: `(batch, ..., positions)`, of whatever dtype.

        Returns:
            A floating-point tensor of their shape, or `None` where all weigh 1.
        """
        weight: Tensor = None
        for part in self:
            if part is not None:
                part = ops.cast(expanded(part, len(values.shape)), keras.config.floatx())
                weight = part if weight is None else weight * part
        if weight is None:
            return None
        return weight * ops.ones_like(values, dtype=weight.dtype)


def counted(
    teacher: Tensor, student: Tensor, sample_weight: Tensor = None, labeled: Tensor = None
) -> Counted:
    """Which positions of one output count, and with which weight.

    Args:
        teacher: The teacher's output or logits, with the Keras mask that they carry; `None`
            where there is no teacher.
        student: The student's.
        sample_weight: `(batch,)`, `(batch, 1)` or the shape of the positions.
        labeled: Boolean, the shape of the positions: where the hard loss reads a label; `None`
            where it reads all of them, or there is none.

    Returns:
        What counts in the distillation loss and in the agreement.
    """
    mask = joint_mask(teacher, student)
    weight = None if sample_weight is None else without_ones(ops.convert_to_tensor(sample_weight))
    # Of a classifier's row there is one label: without it the row is unlabeled, and goes on.
    if labeled is not None and len(labeled.shape) > 1:
        unlabeled = ops.logical_not(rows_of(both(labeled, mask)))
        mask = both(mask, ops.logical_or(labeled, expanded(unlabeled, len(labeled.shape))))
    return Counted(mask, weight)


def joint_mask(teacher: Tensor, student: Tensor) -> Tensor:
    """Positions that are valid on both sides; the student's where the shapes differ."""
    masks = [
        next((m for m in map(keras_mask, keras.tree.flatten(side)) if m is not None), None)
        for side in (student, teacher)
        if side is not None
    ]
    found = [mask for mask in masks if mask is not None]
    if len(found) == 2 and len(found[0].shape) == len(found[1].shape):
        same = all(a in (b, None) or b is None for a, b in zip(*(m.shape for m in found)))
        if same:
            return ops.logical_and(*found)
    return found[0] if found else None


def both(first: Tensor, second: Tensor) -> Tensor:
    """Where both are true; `None` is true everywhere, and one with fewer axes speaks of rows."""
    if first is None or second is None:
        return second if first is None else first
    rank = max(len(first.shape), len(second.shape))
    return ops.logical_and(expanded(first, rank), expanded(second, rank))


def expanded(tensor: Tensor, rank: int) -> Tensor:
    """`tensor` with trailing axes of length 1, up to so many axes."""
    while len(tensor.shape) < rank:
        tensor = ops.expand_dims(tensor, -1)
    return tensor


def without_ones(tensor: Tensor) -> Tensor:
    """`tensor` without trailing axes of length 1, but for the first axis."""
    while len(tensor.shape) > 1 and tensor.shape[-1] == 1:
        tensor = ops.squeeze(tensor, -1)
    return tensor


def rows_of(mask: Tensor) -> Tensor:
    """`(batch,)`: the samples of which any position or entry counts."""
    if len(mask.shape) < 2:
        return mask
    return ops.any(mask, axis=tuple(range(1, len(mask.shape))))


def fits(tensor: Tensor, positions: Shape) -> bool:
    """Whether a mask or weights are of these positions, or of their first axes.

    Args:
        tensor: `(batch, ...)`.
        positions: Shape `(batch, ..., positions)`.
    """
    shape = tuple(tensor.shape)
    return len(shape) <= len(positions) and all(
        a is None or b is None or a == b for a, b in zip(shape[1:], positions[1:])
    )


def per_value(weight: Tensor, mask: Tensor, rank: int) -> Tensor:
    """Weights of positions as weights of values that lack these axes.

    Args:
        weight: `(batch, ..., positions)`, or `None`.
        mask: Boolean of the same shape, or whatever else acts on the values.
        rank: How many axes the values have.

    Returns:
        The mean over the positions that count, those of weight 0 among them.
    """
    if weight is None or len(weight.shape) <= rank:
        return weight
    axes = tuple(range(rank, len(weight.shape)))
    if mask is None or len(mask.shape) != len(weight.shape):
        return ops.mean(weight, axis=axes)
    valid = ops.cast(mask, weight.dtype)
    return ops.sum(weight * valid, axis=axes) / ops.maximum(ops.sum(valid, axis=axes), 1)


def reduced(
    values: Tensor,
    sample_weight: Tensor,
    mask: Tensor,
    reduction: str | None,
    name: str,
    dtype: str,
) -> Tensor:
    """Weigh values and reduce them, as Keras does.

    Args:
        values: `(batch, ...)`.
        sample_weight: `(batch,)` or the shape of the values, or `None`.
        mask: Boolean, `(batch,)` or the shape of the values: which of them count; or `None`.
        reduction: As in `keras.losses.Loss`.
        name: Of the loss, for messages.
        dtype: Of the result. Values in a wider one are added up in that.

    Returns:
        A scalar, or the weighted values where `reduction` is `None`.

    Raises:
        ValueError: If weights or the mask do not fit the values.
    """
    weight = _weight(values, sample_weight, mask, reduction, name)
    wide = keras.backend.result_type(values.dtype, dtype)
    return _narrowed(_Reduction(name, reduction, wide)(values, values, weight), dtype)


class _Reduction(keras.losses.Loss):
    """Keras's own weighting and reduction of values that are already computed."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_pred


def _narrowed(value: Tensor, dtype: str) -> Tensor:
    """`value` in this dtype; what is too large for float16 becomes its largest number."""
    if keras.backend.standardize_dtype(value.dtype) == dtype:
        return value
    if dtype == "float16":
        # The bound leaves the gradient as it is.
        value = value + ops.stop_gradient(ops.clip(value, -65504.0, 65504.0) - value)
    return ops.cast(value, dtype)


def _weight(
    values: Tensor, sample_weight: Tensor, mask: Tensor, reduction: str | None, name: str
) -> Tensor:
    """Sample weights in the shape of the values; what does not count weighs nothing."""
    weight = None
    if mask is not None:
        # Counts past 65504 overflow in float16.
        dtype = keras.backend.standardize_dtype(values.dtype)
        precise = "float64" if dtype == "float64" else "float32"
        weight = ops.cast(_aligned("mask", mask, values, name), precise)
        if reduction in ("mean", "sum_over_batch_size"):
            # The mean divides by all values; those that count make up for it.
            total = ops.cast(ops.size(weight), precise)
            weight = weight * (total / ops.maximum(ops.sum(weight), 1.0))
        weight = ops.cast(weight, values.dtype)
    if sample_weight is not None:
        given = ops.convert_to_tensor(sample_weight, dtype=values.dtype)
        given = _aligned("sample_weight", given, values, name)
        weight = given if weight is None else given * weight
    # Broadcast, so that "mean_with_sample_weight" divides by the weight of every value.
    return None if weight is None else weight * ops.ones_like(values)


def _aligned(argument: str, tensor: Tensor, values: Tensor, name: str) -> Tensor:
    """`tensor` with as many axes as the values: trailing axes of one added or taken away."""
    tensor = ops.convert_to_tensor(tensor)
    rank = len(values.shape)
    while len(tensor.shape) > rank and tensor.shape[-1] == 1:
        tensor = ops.squeeze(tensor, -1)
    if len(tensor.shape) > rank or any(
        a not in (None, 1) and b not in (None, 1) and a != b
        for a, b in zip(tensor.shape, values.shape)
    ):
        raise ValueError(
            f"`{name}` gives values of shape {tuple(values.shape)}. Received: {argument} of shape "
            f"{tuple(tensor.shape)}. Pass one number a sample, or one a value."
        )
    return expanded(tensor, rank)


def zeroed(tensors: Tensor, mask: Tensor) -> Tensor:
    """Set what does not count to zero in every tensor that has the mask's axes."""

    def zero(tensor: Tensor) -> Tensor:
        rank = len(mask.shape)
        # A mask of entries has one of an axis for all, as of the heads of attention.
        alike = (None, 1) if len(tensor.shape) == rank else (None,)
        if len(tensor.shape) < rank or any(
            a is not None and b not in alike and a != b
            for a, b in zip(tensor.shape[:rank], mask.shape)
        ):
            return tensor
        keep = expanded(mask, len(tensor.shape))
        return ops.where(keep, tensor, ops.zeros_like(tensor))

    return keras.tree.map_structure(zero, tensors)

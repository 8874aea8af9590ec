"""Divergences over large vocabularies, computed for a few tokens at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import ops

from keras_kd.utils.types import Tensor

LARGE = 4096
"""Classes from which on the logits of tokens are compared in parts."""

PARTS = 256
"""Into how many parts the tokens of a batch are divided."""

Rows = Callable[..., Any]


def is_large(logits: Tensor) -> bool:
    """Whether these are logits of tokens over a vocabulary of at least `LARGE` classes."""
    return len(logits.shape) > 2 and logits.shape[-1] is not None and logits.shape[-1] >= LARGE


def is_half(logits: Tensor) -> bool:
    """Whether this is a tensor in float16 or bfloat16."""
    return ops.is_tensor(logits) and _dtype(logits) in ("float16", "bfloat16")


def in_parts(
    value: Rows, slope: Rows, teacher: Tensor, student: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """A divergence of `(batch, tokens, classes)` without copies of all its logits.

    The logits are read in groups of tokens, and only the group at hand is softened,
    in float32 whatever the logits are. Besides the logits there is one tensor of
    their size and precision, the gradient of the student's, which is filled group by
    group (at once by TensorFlow on a GPU without XLA).

    Args:
        value: `fn(teacher, student, temperature)`: logits `(tokens, classes)` and
            a scalar or `(tokens, 1)` to the divergence `(tokens, 1)`.
        slope: The same arguments to the derivative of `value` with respect to the
            student's logits, `(tokens, classes)`.
        teacher: Logits `(batch, ..., tokens, classes)`, unnormalized, or whatever
            else `value` reads of each token; no gradient reaches it.
        student: Logits `(batch, ..., tokens, classes)`.
        temperature: Positive scalar, or `(batch, ..., 1)`, dimensionless; no
            gradient reaches it.

    Returns:
        Values `(batch, ..., tokens)`, float32 or float64; and the student's logits, for
        another loss to read: the gradient of this one is then added to that of the other
        in place, where the sum of both would take the memory of each.
    """
    classes = student.shape[-1]
    shape = ops.shape(student)[:-1]
    precise = "float64" if _dtype(student) == "float64" else "float32"
    temperature = ops.stop_gradient(ops.cast(temperature, precise))
    each = len(temperature.shape) > 0
    if each:
        temperature = ops.reshape(ops.broadcast_to(temperature, (*shape, 1)), (-1, 1))
    theirs = ops.reshape(ops.stop_gradient(teacher), (-1, teacher.shape[-1]))

    def reading(ours: Tensor) -> Rows:
        def read(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            def part(tensor: Tensor) -> Tensor:
                return ops.cast(_rows(tensor, start, size), precise)

            return part(theirs), part(ours), part(temperature) if each else temperature

        return read

    def compared(ours: Tensor) -> tuple[Tensor, Rows]:
        """The values, and what computes of their gradient that of some rows of the logits."""
        read = reading(ours)

        def slopes(upstream: Tensor, start: Tensor, size: Tensor) -> Tensor:
            # In half precision a small slope is lost unless it is multiplied by the scaled
            # loss first.
            scale = _rows(upstream, start, size)
            return ops.cast(scale * slope(*read(start, size)), _dtype(ours))

        return _values(lambda start, size: value(*read(start, size)), ours), slopes

    @ops.custom_gradient
    def with_logits(ours: Tensor) -> Any:
        values, slopes = compared(ours)

        def gradient(*upstream: Tensor) -> Tensor:
            of_values, of_logits = keras.tree.flatten(upstream)
            # Where nobody else reads the logits these are zeros, which XLA would make ahead of
            # the forward pass, and hold all along, if they did not depend on what comes after it.
            of_logits = ops.where(ops.isnan(of_values[:1]), float("nan"), of_logits)
            return _added(of_logits, partial(slopes, of_values))

        return (values, ours), gradient

    @ops.custom_gradient
    def filled_at_first(ours: Tensor) -> Any:
        read = reading(ours)

        def both(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
            rows = read(start, size)
            return value(*rows), slope(*rows)

        likes = ops.cast(ours[:, :1], precise), ours
        values, slopes = _tensorflow().filled(both, PARTS, likes)
        return values, lambda upstream: slopes * upstream

    @ops.custom_gradient
    def filled_at_last(ours: Tensor) -> Any:
        values, slopes = compared(ours)

        def gradient(upstream: Tensor) -> Tensor:
            def part(start: Tensor, size: Tensor) -> tuple[Tensor]:
                return (slopes(upstream, start, size),)

            if _tensorflow().fills():
                return _tensorflow().filled(part, PARTS, (ours,))[0]
            return part(0, ops.shape(ours)[0])[0]

        return values, gradient

    ours = ops.reshape(student, (-1, classes))
    if keras.config.backend() == "torch":
        from keras_kd.backends import torch as backend_torch

        values, passed = backend_torch.with_slopes(compared, ours, PARTS)
    elif keras.config.backend() == "jax" or _tensorflow().in_xla():
        values, passed = with_logits(ours)
    else:
        # So that the teacher's logits are free when the gradient begins.
        at_first = _tensorflow().fills() and not is_half(ours)
        values, passed = (filled_at_first if at_first else filled_at_last)(ours), ours
    return ops.reshape(values, shape), ops.reshape(passed, (*shape, classes))


def label_or_rest(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of two classes, the label and all others, with the crossentropy of all classes.

    `log p_y - log(1 - p_y)` and 0, `p = softmax(logits)`, without copies of all the logits.

    Args:
        labels: Integers `(batch, ..., tokens)` or `(batch, ..., tokens, 1)`; one that is no class
            gives a crossentropy of 0.
        logits: `(batch, ..., tokens, classes)`, unnormalized.

    Returns:
        Tensor `(batch, ..., tokens, 2)`, of which the first is the label's; and the logits, for
        another loss to read, as from `in_parts`.
    """
    labels = ops.reshape(labels, (*ops.shape(logits)[:-1], 1))
    # Class numbers are exact in float32 up to 2**24, cast with the logits.
    margin, logits = in_parts(_margin, _margin_slope, labels, logits, 1.0)
    return ops.stack([margin, ops.zeros_like(margin)], axis=-1), logits


def _margin(labels: Tensor, logits: Tensor, _: Tensor) -> Tensor:
    chosen, rest = _label_and_rest(labels, logits)
    label = ops.sum(ops.where(chosen, logits, 0.0), axis=-1, keepdims=True)
    margin = label - ops.logsumexp(rest, axis=-1, keepdims=True)
    # Keras's crossentropy of a label that is no class, on JAX, is 0, and so is its gradient.
    return ops.where(ops.any(chosen, axis=-1, keepdims=True), margin, 1e30)


def _margin_slope(labels: Tensor, logits: Tensor, _: Tensor) -> Tensor:
    chosen, rest = _label_and_rest(labels, logits)
    return ops.cast(chosen, logits.dtype) - ops.softmax(rest, axis=-1)


def _label_and_rest(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where the label is, and the logits with minus infinity there."""
    chosen = ops.equal(ops.arange(logits.shape[-1], dtype=logits.dtype), labels)
    return chosen, ops.where(chosen, -float("inf"), logits)


def fills() -> bool:
    """Whether the crossentropy is computed in parts: everywhere but on TensorFlow without XLA.

    There TensorFlow's own keeps the gradient alone, and fuses what leads to it.
    """
    return keras.config.backend() != "tensorflow" or bool(_tensorflow().in_xla())


def _values(function: Rows, like: Tensor) -> Tensor:
    """`function(start, size)` of all groups of rows, of which the last may reach into another.

    Args:
        function: Gives `(size, 1)`.
        like: `(rows, ...)`.

    Returns:
        Tensor `(rows, 1)`.
    """
    count = ops.shape(like)[0]
    size = (count + PARTS - 1) // PARTS
    groups = (count + size - 1) // size
    values = ops.map(
        lambda group: function(ops.minimum(group * size, count - size), size), ops.arange(groups)
    )
    row = ops.arange(count)
    before = row // size * size
    rows = before + row - ops.minimum(before, count - size)
    return ops.take(ops.reshape(values, (-1, 1)), rows, axis=0)


def _rows(tensor: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Rows `start` to `start + size` of `(rows, columns)`."""
    # JAX wants both beginnings as integers of one type.
    return ops.slice(tensor, (start, start * 0), (size, tensor.shape[-1]))


def _added(whole: Tensor, part: Rows) -> Tensor:
    """`whole` and what is computed of each group of its rows, which XLA adds in place.

    Args:
        whole: `(rows, columns)`.
        part: `fn(start, size)`, `(size, columns)`.
    """
    count = ops.shape(whole)[0]
    size = (count + PARTS - 1) // PARTS

    def add(group: Tensor, whole: Tensor) -> Tensor:
        # The last group reaches back into the one before it, so that all have one size.
        start = ops.minimum(group * size, count - size)
        new = ops.reshape(start + ops.arange(size) >= group * size, (-1, 1))
        rows = _rows(whole, start, size)
        rows = ops.where(new, rows + part(start, size), rows)
        return ops.slice_update(whole, (start, start * 0), rows)

    return ops.fori_loop(0, (count + size - 1) // size, add, whole)


def _tensorflow() -> Any:
    """What only TensorFlow needs."""
    from keras_kd.backends import tensorflow as backend_tensorflow

    return backend_tensorflow


def _dtype(tensor: Tensor) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))

"""Divergences over large vocabularies, computed for a few tokens at a time."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_kd.typing import Tensor

LARGE = 4096
"""Classes from which on the logits of tokens are compared in parts."""

PARTS = 256
"""Into how many parts the tokens of a batch are divided."""

Rows = Callable[[Tensor, Tensor, Tensor], Tensor]


def is_large(logits: Tensor) -> bool:
    """Whether these are logits of tokens over a vocabulary of at least `LARGE` classes."""
    return len(logits.shape) > 2 and logits.shape[-1] is not None and logits.shape[-1] >= LARGE


def is_half(logits: Tensor) -> bool:
    """Whether this is a tensor in float16 or bfloat16."""
    return ops.is_tensor(logits) and _dtype(logits) in ("float16", "bfloat16")


def in_parts(
    value: Rows, slope: Rows, teacher: Tensor, student: Tensor, temperature: Tensor
) -> Tensor:
    """A divergence of `(batch, tokens, classes)` without copies of all its logits.

    The logits are read in groups of tokens, and only the group at hand is softened,
    in float32 whatever the logits are. Besides the logits there is one tensor of
    their size and precision, the gradient of the student's, which TensorFlow on the
    CPU fills group by group; XLA, JAX and PyTorch compute it at once from the logits.

    Args:
        value: `fn(teacher, student, temperature)`: logits `(tokens, classes)` and
            a scalar or `(tokens, 1)` to the divergence `(tokens,)`.
        slope: The same arguments to the derivative of `value` with respect to the
            student's logits, `(tokens, classes)`.
        teacher: Logits `(batch, ..., tokens, classes)`, unnormalized, or whatever
            else `value` reads of each token; no gradient reaches it.
        student: Logits `(batch, ..., tokens, classes)`.
        temperature: Positive scalar, or `(batch, ..., 1)`, dimensionless; no
            gradient reaches it.

    Returns:
        Tensor `(batch, ..., tokens)`, float32 or float64.
    """
    classes = student.shape[-1]
    shape = ops.shape(student)[:-1]
    precise = "float64" if _dtype(student) == "float64" else "float32"
    temperature = ops.stop_gradient(ops.cast(temperature, precise))
    each = len(temperature.shape) > 0
    if each:
        temperature = ops.reshape(ops.broadcast_to(temperature, (*shape, 1)), (-1, 1))
    theirs = ops.reshape(ops.stop_gradient(teacher), (-1, teacher.shape[-1]))

    @ops.custom_gradient
    def divergence(ours: Tensor) -> Any:
        def read(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            def part(tensor: Tensor) -> Tensor:
                return ops.cast(_rows(tensor, start, size), precise)

            return part(theirs), part(ours), part(temperature) if each else temperature

        def both(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
            rows = read(start, size)
            return value(*rows), slope(*rows)

        backend, slopes = _filler(), None
        # Forward where it can be, so that the teacher's logits are free when the gradient begins.
        # In half precision a small slope is lost unless it is multiplied by the scaled loss first.
        if backend is not None and backend.FILLS_FORWARD and not is_half(ours):
            values, slopes = backend.filled(both, PARTS, (ops.cast(ours[:, 0], precise), ours))
        else:
            values = _values(lambda start, size: value(*read(start, size)), ours)

        def gradient(*args: Tensor, upstream: Tensor = None) -> Tensor:
            upstream = ops.expand_dims(args[0] if upstream is None else upstream, -1)
            if slopes is not None:
                return slopes * upstream
            if backend is None:
                t, s = (ops.cast(z, precise) for z in (theirs, ours))
                return ops.cast(upstream * slope(t, s, temperature), _dtype(ours))

            def part(start: Tensor, size: Tensor) -> tuple[Tensor]:
                scale = _rows(upstream, start, size)
                return (ops.cast(scale * slope(*read(start, size)), _dtype(ours)),)

            return backend.filled(part, PARTS, (ours,))[0]

        return values, gradient

    return ops.reshape(divergence(ops.reshape(student, (-1, classes))), shape)


def label_or_rest(labels: Tensor, logits: Tensor) -> Tensor:
    """Logits of two classes, the label and all others, with the crossentropy of all classes.

    `log p_y - log(1 - p_y)` and 0, `p = softmax(logits)`, without copies of all the logits.

    Args:
        labels: Integers `(batch, ..., tokens)` or `(batch, ..., tokens, 1)`; one that is no class
            gives a crossentropy of 0.
        logits: `(batch, ..., tokens, classes)`, unnormalized.

    Returns:
        Tensor `(batch, ..., tokens, 2)`, of which the first is the label's.
    """
    labels = ops.reshape(labels, (*ops.shape(logits)[:-1], 1))
    # Class numbers are exact in float32 up to 2**24, cast with the logits.
    margin = in_parts(_margin, _margin_slope, labels, logits, 1.0)
    return ops.stack([margin, ops.zeros_like(margin)], axis=-1)


def _margin(labels: Tensor, logits: Tensor, _: Tensor) -> Tensor:
    chosen, rest = _label_and_rest(labels, logits)
    margin = ops.sum(ops.where(chosen, logits, 0.0), axis=-1) - ops.logsumexp(rest, axis=-1)
    # Keras's crossentropy of a label that is no class, on JAX, is 0, and so is its gradient.
    return ops.where(ops.any(chosen, axis=-1), margin, 1e30)


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
    if keras.config.backend() != "tensorflow":
        return True
    from keras_kd.backends import tensorflow as backend_tensorflow

    return backend_tensorflow.in_xla()


def _values(function: Callable[[Tensor, Tensor], Tensor], like: Tensor) -> Tensor:
    """`function(start, size)` of all groups of rows, of which the last may reach into another."""
    count = ops.shape(like)[0]
    size = (count + PARTS - 1) // PARTS
    groups = (count + size - 1) // size
    values = ops.map(
        lambda group: function(ops.minimum(group * size, count - size), size), ops.arange(groups)
    )
    row = ops.arange(count)
    before = row // size * size
    return ops.take(values, before + row - ops.minimum(before, count - size))


def _rows(tensor: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """Rows `start` to `start + size` of `(rows, columns)`."""
    # JAX wants both beginnings as integers of one type.
    return ops.slice(tensor, (start, start * 0), (size, tensor.shape[-1]))


def _filler() -> Any:
    """The module of the backend, where it can fill a tensor group by group, or `None`."""
    kind = keras.config.backend()
    if kind == "jax":
        from keras_kd.backends import jax as backend_jax

        return backend_jax
    if kind == "torch":
        from keras_kd.backends import torch as backend_torch

        return backend_torch
    from keras_kd.backends import tensorflow as backend_tensorflow

    return backend_tensorflow if backend_tensorflow.fills() else None


def _dtype(tensor: Tensor) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))

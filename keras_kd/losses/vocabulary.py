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
        teacher: Logits `(batch, ..., tokens, classes)`, unnormalized; no
            gradient reaches them.
        student: Logits of the same shape.
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
    theirs = ops.reshape(ops.stop_gradient(teacher), (-1, classes))

    @ops.custom_gradient
    def divergence(ours: Tensor) -> Any:
        count = ops.shape(ours)[0]
        size = (count + PARTS - 1) // PARTS
        # The last group repeats the last token until it is as long as the others.
        groups = ops.minimum(ops.arange((count + size - 1) // size * size), count - 1)
        groups = ops.reshape(groups, (-1, size))

        def rows(group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            t, s = (ops.cast(ops.take(z, group, axis=0), precise) for z in (theirs, ours))
            return t, s, ops.take(temperature, group, axis=0) if each else temperature

        def both(group: Tensor) -> tuple[Tensor, Tensor]:
            read = rows(group)
            return value(*read), ops.cast(slope(*read), _dtype(ours))

        slopes = None
        if _fills_in_place():
            from keras_kd.backends import tensorflow as backend_tensorflow

            # Forward, so that the logits are free when the gradient begins.
            values, slopes = backend_tensorflow.filled(both, groups, ours)
        else:
            values = ops.map(lambda group: value(*rows(group)), groups)

        def gradient(*args: Tensor, upstream: Tensor = None) -> Tensor:
            upstream = ops.expand_dims(args[0] if upstream is None else upstream, -1)
            if slopes is not None:
                return slopes * ops.cast(upstream, _dtype(ours))
            t, s = (ops.cast(z, precise) for z in (theirs, ours))
            return ops.cast(upstream * slope(t, s, temperature), _dtype(ours))

        return ops.reshape(values, (-1,))[:count], gradient

    return ops.reshape(divergence(ops.reshape(student, (-1, classes))), shape)


def _fills_in_place() -> bool:
    """Whether this is TensorFlow where `keras_kd.backends.tensorflow` writes in place."""
    if keras.config.backend() != "tensorflow":
        return False
    from keras_kd.backends import tensorflow as backend_tensorflow

    return backend_tensorflow.fills_in_place()


def _dtype(tensor: Tensor) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))

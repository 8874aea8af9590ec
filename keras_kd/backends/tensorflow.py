"""What only the TensorFlow backend needs; imported when that backend is in use."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

# TensorFlow shows through no public door whether a function is traced for XLA.
from tensorflow.python.ops import control_flow_util

FILLS_FORWARD = True
"""Whether `filled` gives the values as well, in the forward pass."""


def in_xla() -> bool:
    """Whether the function being traced is for XLA."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def fills() -> bool:
    """Whether `filled` runs here: on the CPU, or under XLA."""
    return in_xla() or not tf.config.list_physical_devices("GPU")


def filled(
    function: Callable[[Any, Any], tuple[Any, ...]], parts: int, likes: tuple[Any, ...]
) -> tuple[tf.Tensor, ...]:
    """Write what is computed of each group of rows into tensors, one group after the other.

    `keras.ops.map` keeps the results apart until it joins them, which takes twice
    the memory, and computes ten groups at once.

    Args:
        function: `fn(start, size)`: `size` new rows of each tensor.
        parts: Into how many groups the rows are divided, at most.
        likes: Tensors `(rows, ...)`: the shapes and types of the results.

    Returns:
        The tensors.
    """
    xla_compiles = in_xla()

    def sizes() -> tuple[Any, Any]:
        # Of the shape anew wherever it is needed: XLA has to see that a size is a constant.
        count = tf.shape(likes[0])[0]
        return count, tf.maximum((count + parts - 1) // parts, 1)

    def written(whole: Any, start: Any, size: Any, part: Any) -> Any:
        if xla_compiles:
            # In place too, as XLA does with what a loop carries. Only this op of XLA's own, which
            # has no public door, writes where it is told in the course of the loop.
            from tensorflow.compiler.tf2xla.python import xla

            indices = tf.stack([start] + [0] * (len(whole.shape) - 1))
            return xla.dynamic_update_slice(whole, part, indices)
        # Nobody else has seen `whole`, so that nothing is written under anyone's eyes.
        return tf.raw_ops.InplaceUpdate(x=whole, i=tf.range(start, start + size), v=part)

    def body(i: Any, *wholes: Any) -> Any:
        count, size = sizes()
        # A group begins when the one before it is written. The last one reaches back into
        # the one before it, so that all have one size.
        with tf.control_dependencies([] if xla_compiles else list(wholes)):
            start = tf.minimum(i * size, count - size)
        new = function(start, size)
        return i + 1, *(
            written(whole, start, size, part) for whole, part in zip(wholes, new, strict=True)
        )

    count, size = sizes()
    groups = (count + size - 1) // size
    if xla_compiles:
        # Filled with a number that this function alone gives, all of it to be overwritten: XLA
        # makes the zeros of two loops one tensor, ahead of both, and then a copy of it for each.
        seeds = [tf.reshape(part, (-1,))[0] for part in function(tf.constant(0), size)]
        wholes = [tf.fill(tf.shape(like), seed) for like, seed in zip(likes, seeds, strict=True)]
    else:
        wholes = [tf.raw_ops.Empty(shape=tf.shape(like), dtype=like.dtype) for like in likes]
    _, *wholes = tf.while_loop(
        lambda i, *_: i < groups, body, (tf.constant(0), *wholes), parallel_iterations=1
    )
    for whole, like in zip(wholes, likes, strict=True):
        whole.set_shape(like.shape)
    return tuple(wholes)

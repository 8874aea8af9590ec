"""What only the TensorFlow backend needs; imported when that backend is in use."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

# TensorFlow shows through no public door whether a function is traced for XLA.
from tensorflow.python.ops import control_flow_util


def fills_in_place() -> bool:
    """Whether `filled` runs here: on the CPU, outside XLA, which knows no writing in place."""
    in_xla = control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    return not in_xla and not tf.config.list_physical_devices("GPU")


def filled(
    function: Callable[[Any], tuple[Any, Any]], groups: Any, like: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Write what is computed of each group of rows into one tensor, one group after the other.

    `keras.ops.map` keeps the results apart until it joins them, which takes twice
    the memory, and computes ten groups at once.

    Args:
        function: `fn(group)`: values `(group,)` and new rows `(group, columns)`.
        groups: Row numbers `(groups, group)`; together they name every row.
        like: Tensor `(rows, columns)`: the shape and type of the result.

    Returns:
        The values `(groups, group)`, and the rows, shaped like `like`.
    """
    rows = tf.raw_ops.Empty(shape=tf.shape(like), dtype=like.dtype)
    count = tf.shape(groups)[0]
    values = tf.TensorArray("float64" if like.dtype == tf.float64 else "float32", size=count)

    def body(i: Any, rows: Any, values: Any) -> Any:
        # A group begins when the one before it is written.
        with tf.control_dependencies([rows]):
            group = tf.identity(groups[i])
        value, new = function(group)
        # Nobody else has seen `rows`, so that nothing is written under anyone's eyes.
        return i + 1, tf.raw_ops.InplaceUpdate(x=rows, i=group, v=new), values.write(i, value)

    _, rows, values = tf.while_loop(
        lambda i, *_: i < count, body, (tf.constant(0), rows, values), parallel_iterations=1
    )
    rows.set_shape(like.shape)
    return values.stack(), rows

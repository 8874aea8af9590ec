"""What only the TensorFlow backend needs; imported when that backend is in use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

# TensorFlow shows through no public door whether a function is traced for XLA.
from tensorflow.python.ops import control_flow_util

from keras_kd.utils.types import Tensors

if TYPE_CHECKING:
    import keras
_NO_SEED = 87654321
"""What TensorFlow answers for its global seed where none was set."""


def in_xla() -> bool:
    """Whether the function being traced is for XLA."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def beginning_again() -> Callable[[], None]:
    """What begins the global generator again from the seed that it has now, if it has one."""
    seed, _ = tf.compat.v1.random.get_seed(0)

    def begin() -> None:
        if seed != _NO_SEED:
            tf.random.set_seed(seed)

    return begin


def replicas() -> int:
    """How many replicas run this step."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def fills() -> bool:
    """Whether `filled` runs here: on the CPU without XLA."""
    return not in_xla() and not tf.config.list_physical_devices("GPU")


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
    count = tf.shape(likes[0])[0]
    size = tf.maximum((count + parts - 1) // parts, 1)
    groups = (count + size - 1) // size

    def body(i: tf.Tensor, *wholes: tf.Tensor) -> Any:
        # A group begins when the one before it is written. The last one reaches back into
        # the one before it, so that all have one size.
        with tf.control_dependencies(list(wholes)):
            start = tf.minimum(i * size, count - size)
        indices = tf.range(start, start + size)
        # Nobody else has seen `wholes`, so that nothing is written under anyone's eyes.
        return i + 1, *(
            tf.raw_ops.InplaceUpdate(x=whole, i=indices, v=part)
            for whole, part in zip(wholes, function(start, size), strict=True)
        )

    wholes = [tf.raw_ops.Empty(shape=tf.shape(like), dtype=like.dtype) for like in likes]
    _, *wholes = tf.while_loop(
        lambda i, *_: i < groups, body, (tf.constant(0), *wholes), parallel_iterations=1
    )
    for whole, like in zip(wholes, likes, strict=True):
        whole.set_shape(like.shape)
    return tuple(wholes)


def read(variable: keras.Variable) -> np.ndarray:
    """What a variable holds, outside of any program."""
    value = variable.value
    if isinstance(value, tf.distribute.DistributedValues):
        tensor = value.read_value()
    else:
        # By its operation alone: every step is watched by this, and the variable's own `numpy`
        # takes six times as long.
        tensor = tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)
    # NumPy's `asarray` fails at a scalar in bfloat16.
    return np.asarray(tensor.numpy())


def first_of_greatest(values: tf.Tensor) -> tf.Tensor:
    """See `keras_kd.backends.first_of_greatest`: one operation, where Keras takes nine.

    Those put -0.0 beneath 0.0.
    """
    return tf.argmax(values, axis=-1, output_type=tf.int32)


def program(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function, compiled once for each set of shapes."""
    # TensorFlow counts traces by the code of a function, and would warn of one that is traced again
    # and again where each is that of another model. A partial function has no code.
    # As Keras runs its steps: AutoGraph would write every function anew, and files beside it.
    return tf.function(functools.partial(function), autograph=False)


def gradient(
    function: Callable[[list[Any]], Any], x: list[Any], differentiable: bool
) -> list[tf.Tensor]:
    """The gradient of a scalar function; a tape outside, if there is one, records it."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        value = function(x)
    found = tape.gradient(value, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    # Of rows that are gathered a gradient comes row by row.
    return [tf.convert_to_tensor(each) for each in found]


def host_call(
    function: Callable[..., Sequence[np.ndarray]],
    in_step: Callable[..., Sequence[np.ndarray]],
    x: Sequence[Any],
    like: Sequence[tuple[tuple[int, ...], str]],
) -> list[tf.Tensor]:
    """What a function of NumPy says of a batch; see `keras_kd.backends.host_call`."""
    if tf.executing_eagerly():
        return [tf.convert_to_tensor(each) for each in function(*map(np.asarray, x))]
    if in_xla():
        raise ValueError(
            "A step that XLA compiles on TensorFlow cannot call the host, where this teacher is "
            "asked. Leave `jit_compile` out, or write the answers once with "
            "`keras_kd.cache.write` and train from `CachedTeacher`."
        )
    found = tf.numpy_function(in_step, list(x), [tf.as_dtype(dtype) for _, dtype in like])
    rows = tf.convert_to_tensor(x[0]).shape[:1]
    for tensor, (shape, _) in zip(found, like, strict=True):
        tensor.set_shape(rows.concatenate(shape))
    return list(found)


def paged(
    model: keras.Model,
    plain: Callable[[Any], Any],
    pages: Callable[[], Any],
    batch: Callable[..., Any],
) -> Callable[[Any], Any]:
    """A train function that takes all steps of a page of row numbers in one program.

    Args:
        model: What is trained.
        plain: The function that Keras made, for all other data.
        pages: `fn()`: what `keras_kd.cache.join_arrays.Pages` is being trained on, or `None`.
        batch: `fn(held, take)`: one batch of what the pages hold.

    Returns:
        `fn(iterator)`, as Keras calls it.
    """
    step = model.train_step
    if model.jit_compile:
        step = tf.function(step, autograph=False, jit_compile=True, reduce_retracing=True)

    @tf.function(autograph=False, reduce_retracing=True)
    def steps(iterator: tf.data.Iterator, held: Tensors, size: tf.Tensor) -> Any:
        rows = iterator.get_next()
        count = tf.size(rows, out_type=tf.int64)

        def one(start: tf.Tensor) -> Any:
            chosen = rows[start : start + size]
            step(batch(held, lambda leaf: tf.gather(leaf, chosen)))
            return [start + size]

        tf.while_loop(
            lambda start: start < count,
            one,
            [tf.constant(0, tf.int64)],
            parallel_iterations=1,
        )
        return model.get_metrics_result()

    def function(iterator: tf.data.Iterator) -> Any:
        now = pages()
        if now is None or not isinstance(iterator, tf.data.Iterator):
            return plain(iterator)
        return steps(iterator, now.held, tf.constant(now.batch_size, tf.int64))

    return function

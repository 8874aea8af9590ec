"""How the teacher runs inside the step of each backend.

TensorFlow records gradients on a tape, and the teacher runs before it starts.
PyTorch records wherever weights are trainable, so it is told not to. JAX traces
the step once, and weights that it meets while tracing become constants of the
program: a second copy in memory, and stale as soon as the teacher changes. So
they come as arguments of the step, beside the batch, which Keras neither
donates to the step nor returns from it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np


class Supplied(NamedTuple):
    """One batch and the teacher's weights, as the compiled step of JAX takes them."""

    data: Any
    weights: list[Any]


def supplying(function: Any, variables: Callable[[], Sequence[Any]]) -> Any:
    """The train or test function, with the teacher's weights beside every batch.

    Args:
        function: What `make_train_function` or `make_test_function` made.
        variables: `fn()`: the teacher's variables.

    Returns:
        The same function on all backends but JAX.
    """
    if keras.config.backend() != "jax" or function is None:
        return function

    def step(state: Any, iterator: Any) -> Any:
        weights = [variable.value for variable in variables()]
        return function(state, (Supplied(data, weights) for data in iterator))

    return step


def supplied(data: Any) -> tuple[Any, list[Any] | None]:
    """The batch, and the weights that came beside it."""
    return (data.data, data.weights) if isinstance(data, Supplied) else (data, None)


@contextlib.contextmanager
def inference_only(values: Sequence[tuple[Any, Any]] = ()) -> Iterator[None]:
    """Run a teacher for its answers alone.

    Args:
        values: Variables and what they hold in this step, on JAX.
    """
    if values:
        with keras.StatelessScope(state_mapping=values):
            yield
    elif keras.config.backend() == "torch":
        from keras_kd.backends import torch as backend_torch

        with backend_torch.without_gradients():
            yield
    else:
        yield


def answers(model: Any, x: Any, batch_size: int = 256) -> Any:
    """What a model says of rows, in inference mode, as NumPy arrays.

    Keras's `predict` compiles each model anew. That pays on JAX, where each operation by itself
    would be compiled; elsewhere models that are asked once are run as they are.

    Args:
        model: A built model with one input.
        x: Rows, `(samples, ...)`, one at least.
        batch_size: Rows at once.

    Returns:
        The outputs, structured as the model's.
    """
    if keras.config.backend() == "jax":
        # Another model over the same layers, since the given one may be compiled for something.
        asked = keras.Model(model.inputs[0], model.output)
        return asked.predict(x, batch_size=batch_size, verbose=0)
    with inference_only():
        parts = [
            keras.tree.map_structure(
                keras.ops.convert_to_numpy, model(x[i : i + batch_size], training=False)
            )
            for i in range(0, len(x), batch_size)
        ]
    return keras.tree.map_structure(lambda *each: np.concatenate(each), *parts)


def gradient(fn: Callable[[Any], Any], x: Any, differentiable: bool = False) -> Any:
    """The gradient of a function with respect to its input, inside or outside of a step.

    Args:
        fn: `fn(x)`: a tensor of any shape, whose entries are summed. Values per sample so give
            each sample the gradient of its own value.
        x: A floating-point tensor, or a structure of them.
        differentiable: Whether the result may be differentiated in turn, as a penalty on gradients
            is. Without it no gradient goes through the result.

    Returns:
        The gradient, structured like `x`; zeros for what `fn` does not read.

    Raises:
        TypeError: If a tensor of `x` is not of floating point.
    """
    flat = [keras.ops.convert_to_tensor(leaf) for leaf in keras.tree.flatten(x)]
    for leaf in flat:
        dtype = keras.backend.standardize_dtype(leaf.dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(
                f"Only floating-point inputs have a gradient. Received: a tensor of {dtype}."
            )

    def value(leaves: list[Any]) -> Any:
        return keras.ops.sum(fn(keras.tree.pack_sequence_as(x, leaves)))

    backend = keras.config.backend()
    found: Any
    if backend == "tensorflow":
        from keras_kd.backends import tensorflow as backend_tensorflow

        found = backend_tensorflow.gradient(value, flat, differentiable)
    elif backend == "jax":
        from keras_kd.backends import jax as backend_jax

        found = backend_jax.gradient(value, flat, differentiable)
    else:
        from keras_kd.backends import torch as backend_torch

        found = backend_torch.gradient(value, flat, differentiable)
    if not differentiable:
        found = [keras.ops.stop_gradient(leaf) for leaf in found]
    return keras.tree.pack_sequence_as(x, found)


def with_memory_of(held: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
    """Find what was made of weights without a copy, and so is no record of what they were.

    On PyTorch it follows the weight through the training, on JAX it is gone after the first step.

    Args:
        held: Variables and NumPy arrays.
        weights: Variables.

    Returns:
        Those that are a second name for the memory of a weight.
    """
    backend = keras.config.backend()
    if backend == "torch":
        from keras_kd.backends import torch as backend_torch

        return backend_torch.with_memory_of(held, weights)
    if backend == "jax":
        from keras_kd.backends import jax as backend_jax

        return backend_jax.with_memory_of(held, weights)
    return []


def in_one_program(function: Callable[[Any], Any], models: Sequence[Any], x: Any) -> Any:
    """What a function computes of a batch outside of any step.

    JAX compiles each operation by itself, which takes longer than the whole, on
    an accelerator many times longer, so there it is compiled as one. Models
    that are not built run as they are.

    Args:
        function: `fn(x)`, which runs the models.
        models: Those that it runs; their weights are arguments of the program.
        x: The batch.
    """
    built = all(layer.built for model in models for layer in model._flatten_layers())
    if keras.config.backend() != "jax" or not models or not built:
        return function(x)
    from keras_kd.backends import jax as backend_jax

    return backend_jax.compiled(function, [v for model in models for v in model.variables], x)

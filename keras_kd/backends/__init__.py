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

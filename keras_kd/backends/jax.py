"""What only the JAX backend needs; imported when that backend is in use."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from keras_kd.utils.types import Tensor, Tensors


def process_index() -> int:
    """The number of this process among those that train together."""
    return int(jax.process_index())


def whole(array: jax.Array) -> np.ndarray:
    """A value in NumPy, gathered where each process holds a part; all of them must call."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def compiled(function: Callable[[Any], Any], variables: Sequence[Any], x: Tensors) -> Any:
    """What a function that reads these variables makes of `x`, by one compiled program."""

    @jax.jit
    def run(values: list[Any], x: Tensors) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(x)

    return run([variable.value for variable in variables], x)


def program(function: Callable[..., Any], variables: Sequence[Any]) -> Callable[..., Any]:
    """A function that reads these variables, compiled once for each set of shapes."""

    @jax.jit
    def run(values: list[Any], tensors: tuple[Any, ...]) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*tensors)

    return lambda *tensors: run([variable.value for variable in variables], tensors)


class _Through(keras.StatelessScope):
    """Takes note of changes of variables, and reads the others as the scope around it does."""

    def __enter__(self) -> Any:
        """Begin, with nothing changed."""
        self.changed: dict[int, Any] = {}
        return super().__enter__()

    def add_update(self, update: tuple[Any, Any]) -> None:
        """Note a change."""
        self.changed[id(update[0])] = update[0]
        super().add_update(update)

    def get_current_value(self, variable: keras.Variable) -> Any:
        """What a variable holds, or `None` where that is its own value."""
        if id(variable) in self.changed:
            return super().get_current_value(variable)
        around = self.original_scope
        return None if around is None else around.get_current_value(variable)


def gradient(function: Callable[[list[Any]], Any], x: list[Any], differentiable: bool) -> Any:
    """The gradient of a scalar function; on JAX it may always be differentiated in turn.

    What the function assigns to variables leaves the trace as its result, and is assigned then.
    """
    changed: list[Any] = []

    def traced(x: list[Any]) -> tuple[Any, list[Any]]:
        with _Through() as scope:
            value = function(x)
        changed[:] = scope.changed.values()
        return value, [scope.get_current_value(variable) for variable in changed]

    found, values = jax.grad(traced, has_aux=True)(x)
    for variable, value in zip(changed, values, strict=True):
        variable.assign(value)
    return found


def with_memory_of(held: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
    """Those Variables whose array is also that of a weight, which the step takes as its own."""
    theirs = {id(weight.value) for weight in weights}
    return [each for each in held if isinstance(each, keras.Variable) and id(each.value) in theirs]


def local_program(function: Callable[[Any], Any], variables: Sequence[Any]) -> Callable[[Any], Any]:
    """A function that reads these variables as one program on the devices of this process."""
    values = [variable.value for variable in variables]
    if jax.process_count() > 1:
        if not all(value.is_fully_replicated for value in values):
            raise ValueError("a process holds but a part of the teacher's weights")
        values = [np.asarray(value.addressable_data(0)) for value in values]

    @jax.jit
    def run(values: list[Any], x: Tensors) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(x)

    return lambda x: run(values, x)


def agreed(decision: bool) -> bool:
    """Whether all processes decide so; all of them must call."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.process_allgather(np.array(decision)).all())


class Same:
    """A value, equal to itself alone."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def host_call(
    function: Callable[..., Sequence[np.ndarray]],
    in_step: Callable[..., Sequence[np.ndarray]],
    x: Sequence[Any],
    like: Sequence[tuple[tuple[int, ...], str]],
) -> list[jax.Array]:
    """What a function of NumPy says of a batch; see `keras_kd.backends.host_call`."""
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in x):
        return [jax.numpy.asarray(each) for each in function(*map(np.asarray, x))]
    rows = x[0].shape[0]
    results = [jax.ShapeDtypeStruct((rows, *shape), dtype) for shape, dtype in like]

    def called(*leaves: Tensor) -> list[np.ndarray]:
        return list(in_step(*map(np.asarray, leaves)))

    # Without a gradient to ask for, which a callback has none of.
    return jax.pure_callback(called, results, *map(jax.lax.stop_gradient, x))

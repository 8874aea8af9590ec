"""How the teacher runs inside the step of each backend.

TensorFlow records gradients on a tape, and the teacher runs before it starts.
PyTorch records wherever weights are trainable, so it is told not to. JAX traces
the step once, and weights that it meets while tracing become constants of the
program: a second copy in memory, and stale as soon as the teacher changes. So
they come as arguments of the step, beside the batch, which Keras neither
donates to the step nor returns from it.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.utils.types import Tensor, Tensors

# Bytes of a variable of which all are compared, and none added up.
_SMALL = 4096

HostFunction = Callable[..., Sequence[np.ndarray]]
"""From the arrays of one batch to those of its answer."""


class Supplied(NamedTuple):
    """One batch and the teacher's weights, as the compiled step of JAX takes them."""

    data: Any
    weights: list[Any]


def supplying(function: Callable[..., Any] | None, variables: Callable[[], Sequence[Any]]) -> Any:
    """The train or test function, with the teacher's weights beside every batch.

    Args:
        function: What `make_train_function` or `make_test_function` made.
        variables: `fn()`: the teacher's variables.

    Returns:
        The same function on all backends but JAX.
    """
    if keras.config.backend() != "jax" or function is None:
        return function

    def step(state: tuple[list[Tensor], ...], iterator: Iterable[Tensors]) -> Any:
        weights = [variable.value for variable in variables()]
        return function(state, (Supplied(data, weights) for data in iterator))

    return step


def supplied(data: Tensors | Supplied) -> tuple[Any, list[Any] | None]:
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


@contextlib.contextmanager
def shuffles_kept() -> Iterator[None]:
    """Afterwards rows are shuffled as if what happened in between had not.

    PyTorch's generator is put back where it was. TensorFlow's is begun again from its seed, which
    is the same where nothing was drawn from it since, and has nothing to begin from without one.
    """
    if keras.config.backend() == "tensorflow":
        from keras_kd.backends import tensorflow as backend_tensorflow

        restore = backend_tensorflow.beginning_again()
    elif keras.config.backend() == "torch":
        from keras_kd.backends import torch as backend_torch

        restore = backend_torch.going_on()
    else:
        # Rows are shuffled by NumPy there.
        def restore() -> None:
            return None

    try:
        yield
    finally:
        restore()


def replicas() -> int:
    """Over how many replicas of the step Keras divides a loss, under `tf.distribute`."""
    if keras.config.backend() != "tensorflow":
        return 1
    from keras_kd.backends import tensorflow as backend_tensorflow

    return backend_tensorflow.replicas()


def variable_scope(model: keras.Model) -> contextlib.AbstractContextManager[Any]:
    """Where variables of a model are created, under `tf.distribute` too."""
    if keras.config.backend() == "tensorflow":
        scope: contextlib.AbstractContextManager[Any] = model.distribute_strategy.scope()
        return scope
    return contextlib.nullcontext()


def answers(model: keras.Model, x: Tensors, batch_size: int = 256) -> Any:
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
    return answers_as_called(model, x, batch_size)


def answers_as_called(model: keras.Model, x: Tensors, batch_size: int = 256) -> Any:
    """The same of any model, called as it is on every backend.

    Args:
        model: A model; it may be a `Distiller`, which answers as its student does.
        x: Rows, `(samples, ...)` each, structured as the model reads them.
        batch_size: Rows at once.

    Returns:
        The outputs, structured as the model's.
    """
    count = len(keras.tree.flatten(x)[0])
    parts = []
    with inference_only():
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            batch = keras.tree.map_structure(lambda leaf, rows=rows: leaf[rows], x)
            outputs = model(batch, training=False)
            parts.append(keras.tree.map_structure(keras.ops.convert_to_numpy, outputs))
    return keras.tree.map_structure(lambda *each: np.concatenate(each), *parts)


def gradient(fn: Callable[[Any], Any], x: Tensors, differentiable: bool = False) -> Any:
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


@contextlib.contextmanager
def beside_the_gradient(variables: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """Compute something inside of a step whose gradient with respect to weights nobody takes.

    TensorFlow cuts a gradient where its result is stopped, and PyTorch is told not to record. JAX
    would carry the tangents of the weights through all of it, so they are cut where they enter.

    Args:
        variables: `fn()`: what is read in there.
    """
    backend = keras.config.backend()
    if backend == "jax":
        values = [(v, keras.ops.stop_gradient(v.value)) for v in variables()]
        with keras.StatelessScope(state_mapping=values):
            yield
    elif backend == "torch":
        from keras_kd.backends import torch as backend_torch

        with backend_torch.without_gradients():
            yield
    else:
        yield


def program(function: Callable[..., Any], models: Sequence[Any]) -> Callable[..., Any]:
    """A function that runs models, compiled once for the shapes that it is called with.

    Args:
        function: `fn(*tensors)`, which changes nothing.
        models: The built models that it runs; it reads their weights as they are at each call.

    Returns:
        The same function.
    """
    backend = keras.config.backend()
    if backend == "tensorflow":
        from keras_kd.backends import tensorflow as backend_tensorflow

        return backend_tensorflow.program(function)
    if backend == "jax":
        from keras_kd.backends import jax as backend_jax

        return backend_jax.program(function, [v for m in models for v in m.variables])

    def run(*tensors: Tensor) -> Any:
        with inference_only():
            return function(*tensors)

    return run


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


def in_one_program(function: Callable[[Any], Any], models: Sequence[Any], x: Tensors) -> Any:
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


def local_program(function: Callable[[Any], Any], models: Sequence[Any]) -> Callable[[Any], Any]:
    """A function of batches as one program, for many batches outside of any step.

    On JAX each process computes on its own devices, whatever the others do.

    Args:
        function: `fn(x)`, which runs the models, to a structure of tensors.
        models: Those that it runs.

    Returns:
        `fn(x)`: from NumPy arrays to NumPy arrays.

    Raises:
        ValueError: If a process holds but a part of a weight.
    """
    variables = [v for model in models for v in model.variables]
    backend = keras.config.backend()
    run: Callable[[Any], Any]
    if backend == "tensorflow":
        from keras_kd.backends import tensorflow as backend_tensorflow

        run = backend_tensorflow.program(function)
    elif backend == "jax":
        from keras_kd.backends import jax as backend_jax

        run = backend_jax.local_program(function, variables)
    else:

        def run(x: Tensors) -> Any:
            with inference_only():
                return function(keras.tree.map_structure(keras.ops.convert_to_tensor, x))

    return lambda x: keras.tree.map_structure(keras.ops.convert_to_numpy, run(x))


def agreed(decision: bool) -> bool:
    """Whether all processes that train together decide so; each of them has to ask."""
    if keras.config.backend() != "jax":
        return decision
    from keras_kd.backends import jax as backend_jax

    return backend_jax.agreed(decision)


def marks(variables: Sequence[Any]) -> list[Any]:
    """What tells whether variables have changed: equal lists, unless one has.

    On JAX a value that is assigned is another object; elsewhere small ones are told by their bytes,
    and others by the sum of their bits, and the checksum of their beginning.
    """
    backend = keras.config.backend()
    if backend == "jax":
        from keras_kd.backends import jax as backend_jax

        return [backend_jax.Same(variable.value) for variable in variables]
    read = _read
    if backend == "tensorflow":
        from keras_kd.backends import tensorflow as backend_tensorflow

        read = backend_tensorflow.read
    found: list[Any] = []
    for variable in variables:
        data = np.ascontiguousarray(read(variable)).reshape(-1).view("u1")
        if len(data) <= _SMALL:
            found.append(data.tobytes())
            continue
        whole = data[: len(data) // 8 * 8].view("uint64")
        found.append(
            (int(whole.sum()), zlib.crc32(data[:_SMALL]), zlib.crc32(data[len(whole) * 8 :]))
        )
    return found


def _read(variable: keras.Variable) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable.value))


def first_of_greatest(values: Tensor) -> Any:
    """The index of the greatest number along the last axis, of several the first, in a step."""
    if keras.config.backend() != "tensorflow":
        return keras.ops.argmax(values, axis=-1)
    from keras_kd.backends import tensorflow as backend_tensorflow

    return backend_tensorflow.first_of_greatest(values)


def host_call(
    function: HostFunction,
    in_step: HostFunction,
    x: Sequence[Any],
    like: Sequence[tuple[tuple[int, ...], str]],
) -> list[Any]:
    """What a function on the host says of a batch, from inside or outside of a compiled step.

    It is called once a batch. No gradient goes through it, and it must not run the backend that the
    step runs on, which waits for it.

    Args:
        function: `fn(*arrays)`: from arrays of NumPy to one array for each entry of `like`; called
            where nothing is compiled, so that what it raises comes through.
        in_step: The same for a compiled step, out of which no error comes as it was: it raises
            none.
        x: Flat tensors or arrays of one batch.
        like: Shape of one row and dtype of each result.

    Returns:
        Tensors `(batch, ...)`.

    Raises:
        ValueError: In a step that is compiled by XLA on TensorFlow, which calls no host.
    """
    backend = keras.config.backend()
    if backend == "tensorflow":
        from keras_kd.backends import tensorflow as backend_tensorflow

        return backend_tensorflow.host_call(function, in_step, x, like)
    if backend == "jax":
        from keras_kd.backends import jax as backend_jax

        return backend_jax.host_call(function, in_step, x, like)
    from keras_kd.backends import torch as backend_torch

    return [keras.ops.convert_to_tensor(each) for each in backend_torch.host_call(function, x)]


def host_calls_in_jit() -> bool:
    """Whether a step can call the host where it is compiled with `jit_compile=True`."""
    return keras.config.backend() != "tensorflow"

"""How a model ends: the names of its outputs, and whether these are logits."""

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd.models.taps import Tap, activated, run, tapped
from keras_kd.utils.types import Tensor, Tensors


class Output(NamedTuple):
    """How one output of a model is made.

    Attributes:
        kind: `"logits"`, `"softmax"`, `"sigmoid"`, or `"unknown"` where it
            cannot be told from the layers.
        tap: The tap that reads the logits, `None` where the output itself is
            all there is.
        axis: The axis that a softmax runs over, as its layer has it.
        probabilities: Whether an unknown output is known to be made of
            probabilities, so that its values need not be looked at.
    """

    kind: str
    tap: Tap | None
    axis: Any = -1
    probabilities: bool = False


UNKNOWN = Output("unknown", None)
LOGITS = Output("logits", None)
MADE_OF_PROBABILITIES = Output("unknown", None, probabilities=True)


def outputs_of(model: keras.Model) -> list[Output]:
    """How each output of a model is made, in the order of its flat outputs.

    Args:
        model: A Keras model. Its graph is read where it has one.

    Returns:
        One `Output` each; a single unknown one for a subclassed model.
    """
    tensors = graph_outputs(model)
    if tensors is None:
        return [UNKNOWN]
    return [_made_by(tensor, {}) for tensor in keras.tree.flatten(tensors)]


def graph_outputs(model: keras.Model) -> Any:
    """The symbolic outputs of a Functional or built Sequential model, else `None`."""
    # A subclass may be Functional by construction and yet compute something
    # else in a `call` of its own.
    plain = type(model).call in (keras.Model.call, keras.Sequential.call, _functional_call())
    if not plain or not getattr(model, "built", False):
        return None
    return getattr(model, "outputs", None) or None


@cache
def _functional_call() -> Any:
    """The `call` of Functional models, whose class Keras does not export."""
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs)).call


# What hands its input on in inference, value by value.
_PASSING = (
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.AlphaDropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.ActivityRegularization,
)

# What makes logits of logits, and hides those before a softmax: it moves them elsewhere,
_MOVING = (
    keras.layers.Reshape,
    keras.layers.Flatten,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
)

# or is linear and leaves the axis of the classes where it was.
_MIXING = (
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Cropping3D,
    keras.layers.UpSampling1D,
    keras.layers.UpSampling2D,
    keras.layers.UpSampling3D,
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
    keras.layers.Add,
    keras.layers.Subtract,
    keras.layers.Average,
    keras.layers.Concatenate,
)

_SOFTMAX = (keras.activations.softmax, ops.softmax)
_SIGMOID = (keras.activations.sigmoid, ops.sigmoid)
_LOG_SOFTMAX = (keras.activations.log_softmax, ops.log_softmax)


class _Operations(NamedTuple):
    """The classes behind functions of `keras.ops`, which Keras does not export."""

    softmax: type
    sigmoid: type
    log_softmax: type
    log: type
    passing: tuple[type, ...]
    moving: tuple[type, ...]
    mixing: tuple[type, ...]


@cache
def _operations() -> _Operations:
    x = keras.KerasTensor((2, 1, 3))

    def behind(made: keras.Operation) -> type:
        return type(keras.tree.flatten(made)[0]._keras_history.operation)

    return _Operations(
        softmax=behind(ops.softmax(x)),
        sigmoid=behind(ops.sigmoid(x)),
        log_softmax=behind(ops.log_softmax(x)),
        log=behind(ops.log(x)),
        passing=(behind(ops.cast(x, "float16")), behind(ops.stop_gradient(x))),
        mixing=(behind(ops.add(x, x)), behind(ops.subtract(x, x))),
        moving=tuple(
            behind(made)
            for made in (
                ops.reshape(x, (2, 3)),
                ops.transpose(x),
                ops.moveaxis(x, 1, 2),
                ops.swapaxes(x, 1, 2),
                ops.squeeze(x, 1),
                ops.expand_dims(x, 1),
                ops.concatenate([x, x]),
                ops.stack([x, x]),
                ops.split(x, 2),
                x[0],
                ops.mean(x, 1),
            )
        ),
    )


def _made_by(tensor: keras.KerasTensor, known: dict[int, Output]) -> Output:
    """How a symbolic tensor is made; what is known of tensors so far is kept by their ids."""
    if id(tensor) not in known:
        known[id(tensor)] = _traced(tensor, known)
    return known[id(tensor)]


def _traced(tensor: keras.KerasTensor, known: dict[int, Output]) -> Output:
    # The operation behind a symbolic tensor is in no public attribute.
    history = tensor._keras_history
    operation = history.operation
    # One layer or operation may be called several times.
    inputs = operation._inbound_nodes[history.node_index].input_tensors
    if len(inputs) == 1 and _passes_on(operation):
        return _made_by(inputs[0], known)
    told = _from_operation(operation, history.tensor_index)
    if isinstance(operation, (keras.layers.Activation, _operations().sigmoid)):
        # It acts on each number by itself, wherever the units lie.
        axis = _made_by(inputs[0], known).axis
        return told._replace(axis=axis) if told.kind == "sigmoid" else told
    if isinstance(operation, keras.layers.Softmax) and len(inputs) > 1:
        # A mask, beside which logits do not tell which classes there are.
        return MADE_OF_PROBABILITIES
    if told.kind == "logits" and len(inputs) == 1 and _is_linear(operation):
        before_it = _made_by(inputs[0], known)
        # A matrix from fine classes to coarse ones, or of the noise of labels, makes probabilities
        # of probabilities: the values tell.
        likely_still = before_it.kind == "softmax" or before_it.probabilities
        return UNKNOWN if likely_still else told
    if told is not UNKNOWN or not inputs or not _is_weightless(operation):
        return told
    before = [_made_by(each, known) for each in inputs]
    likely = [output.kind in ("softmax", "sigmoid") or output.probabilities for output in before]
    others = _operations()
    mixes = isinstance(operation, (*_MIXING, *others.mixing))
    if mixes or isinstance(operation, (*_MOVING, *others.moving)):
        if all(output.kind == "logits" for output in before):
            return LOGITS._replace(axis=before[0].axis) if mixes else LOGITS
        # Of both, values alone would tell nothing of the part that is probabilities.
        return MADE_OF_PROBABILITIES if any(likely) else UNKNOWN
    # The logarithm of a softmax is as good as its logits.
    of_softmax = isinstance(operation, others.log) and before[0].kind != "sigmoid"
    return MADE_OF_PROBABILITIES if all(likely) and not of_softmax else UNKNOWN


def _is_keras(operation: keras.Operation) -> bool:
    """Whether this is a layer or operation of Keras's own, whose `call` is known."""
    return type(operation).__module__.startswith("keras.")


def _is_weightless(operation: keras.Operation) -> bool:
    """Whether this is Keras's own, computes from its inputs alone, and calls nobody else's code."""
    elsewhere = (keras.Model, keras.layers.Lambda, keras.layers.Wrapper, keras.layers.Activation)
    if not _is_keras(operation) or isinstance(operation, elsewhere):
        return False
    # Operations of `keras.ops` have none.
    return not (isinstance(operation, keras.layers.Layer) and operation.weights)


def _is_linear(operation: keras.Operation) -> bool:
    """Whether this multiplies by weights and ends there."""
    own: Any = activated(operation)
    inner = own.layer if isinstance(own, keras.layers.TimeDistributed) else own
    return getattr(inner, "activation", None) is keras.activations.linear


def _passes_on(operation: keras.Operation) -> bool:
    """Whether an operation returns the values that it is given, rounded at most."""
    if getattr(operation, "only_rounds", False) or getattr(operation, "passes_values", False):
        return True
    if not _is_keras(operation):
        return False
    if isinstance(operation, keras.layers.Activation):
        return operation.activation is keras.activations.linear
    return isinstance(operation, (*_PASSING, *_operations().passing))


def _from_operation(operation: keras.Operation, index: int) -> Output:
    """How a layer or operation makes its output number `index`, told without its inputs."""
    if isinstance(operation, keras.Model):
        inner_outputs = graph_outputs(operation)
        if inner_outputs is None:
            return UNKNOWN
        return _made_by(keras.tree.flatten(inner_outputs)[index], {})
    wrapped = hasattr(operation, "activated_layer")
    own: Any = activated(operation)
    if not _is_keras(own) and not (wrapped and own is operation):
        return UNKNOWN
    if isinstance(own, keras.layers.TimeDistributed):
        return _at_every_step(own)
    if isinstance(own, keras.layers.SpectralNormalization):
        return _from_operation(own.layer, index)
    others: Any = _operations()
    if isinstance(own, (keras.layers.Softmax, others.softmax)):
        return Output("softmax", Tap(own, "input"), own.axis)
    if isinstance(own, others.sigmoid):
        return Output("sigmoid", Tap(own, "input"))
    if isinstance(own, others.log_softmax):
        # log_softmax leaves softened distributions as they are.
        return LOGITS._replace(axis=own.axis)
    return _by_activation(own, getattr(own, "activation", None))


def _by_activation(layer: keras.Layer, activation: Callable[..., Tensor] | None) -> Output:
    """How a layer with an activation of its own makes its output."""
    if isinstance(layer, keras.layers.RNN):
        # Its activation acts inside the cell, at every step.
        return UNKNOWN
    # Compared by identity: a function of the user's own may bear the same name.
    if isinstance(activation, keras.layers.Softmax):
        return Output("softmax", Tap(layer, "preactivation"), activation.axis)
    if any(activation is function for function in _SOFTMAX):
        return Output("softmax", Tap(layer, "preactivation"))
    axis = 1 if getattr(layer, "data_format", None) == "channels_first" else -1
    if any(activation is function for function in _SIGMOID):
        return Output("sigmoid", Tap(layer, "preactivation"), axis)
    if any(activation is function for function in _LOG_SOFTMAX):
        return LOGITS
    # Weights of its own make any number of any input, if nothing bounds it afterwards.
    if activation is keras.activations.linear and layer.weights:
        return LOGITS._replace(axis=axis)
    return UNKNOWN


def _at_every_step(layer: keras.Layer) -> Output:
    """How `TimeDistributed` makes its output: as the layer in it makes that of one step."""
    inner = _from_operation(layer.layer, 0)
    if not is_last(inner.axis, None):
        return UNKNOWN
    if inner.tap is None:
        return inner
    # It calls the layer once a step: logits are what it returns if the layer leaves out its end.
    return inner._replace(tap=Tap(layer, "unactivated", inner.tap))


def is_last(axis: object, rank: int | None) -> bool:
    """Whether an axis, as Keras layers and losses have it, is the last one and no other.

    Args:
        axis: A number, a list of numbers, or `None` for all axes.
        rank: How many axes there are, `None` if that is not known.
    """
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    last = [-1] if rank is None else [-1, rank - 1]
    return len(axes) == 1 and axes[0] in last


def watch_outputs(model: keras.Model, x: Tensors) -> tuple[Any, list[Output]]:
    """What a model without a graph returns and how that is made, seen in one eager pass.

    An output that is the very tensor that an inner layer returned was made by
    that layer.

    Args:
        model: A subclassed model.
        x: A batch that the model reads.

    Returns:
        What the model returned, and one `Output` for each flat output.
    """
    made: dict[int, Any] = {}
    kept = []
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers(include_self=False):
            # Kept alive, since a freed tensor's id may be given to another.
            def keep(result: Tensors, layer: keras.Layer = layer) -> None:
                kept.append(result)
                if ops.is_tensor(result):
                    made.setdefault(id(result), layer)

            stack.enter_context(tapped(Tap(layer, "output"), keep))
        output = run(model, x, False)
    return output, [
        _from_operation(made[id(tensor)], 0) if id(tensor) in made else UNKNOWN
        for tensor in keras.tree.flatten(output)
    ]


def symbolic_outputs(model: keras.Model) -> Any:
    """The structure of a model's symbolic outputs, `None` where the model has no graph."""
    structure = getattr(model, "output", None)
    if structure is None:
        outputs = getattr(model, "outputs", None)
        if not outputs:
            return None
        structure = outputs[0] if len(outputs) == 1 else list(outputs)
    return structure


def output_template(model: keras.Model) -> Any:
    """The structure of a model's outputs with their names at the leaves.

    Args:
        model: A Keras model.

    Returns:
        A name, or a list, tuple or dict of names; `None` where the model has
        no graph.
    """
    structure = symbolic_outputs(model)
    return None if structure is None else named(structure, getattr(model, "output_names", None))


def named(structure: Tensors, names: Sequence[str] | None) -> Any:
    """A structure of outputs with their names at the leaves: a flat dict's keys are its names."""
    if isinstance(structure, dict) and not any(map(keras.tree.is_nested, structure.values())):
        return {key: key for key in structure}
    flat = keras.tree.flatten(structure)
    if not names or len(names) != len(flat):
        names = [f"output_{i}" for i in range(len(flat))]
    return keras.tree.pack_sequence_as(structure, list(names))

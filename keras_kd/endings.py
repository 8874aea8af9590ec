"""How a model ends: the names of its outputs, and whether these are logits."""

import contextlib
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd.taps import Tap, activated, run, tapped


class Output(NamedTuple):
    """How one output of a model is made.

    Attributes:
        kind: `"logits"`, `"softmax"`, `"sigmoid"`, or `"unknown"` where it
            cannot be told from the layers.
        tap: The tap that reads the logits, `None` where the output itself is
            all there is.
    """

    kind: str
    tap: Tap | None


def outputs_of(model: Any) -> list[Output]:
    """How each output of a model is made, in the order of its flat outputs.

    Args:
        model: A Keras model. Its graph is read where it has one.

    Returns:
        One `Output` each; a single unknown one for a subclassed model.
    """
    tensors = graph_outputs(model)
    if tensors is None:
        return [Output("unknown", None)]
    return [_made_by(tensor) for tensor in keras.tree.flatten(tensors)]


def graph_outputs(model: Any) -> Any:
    """The symbolic outputs of a Functional or built Sequential model, else `None`."""
    # A subclass may be Functional by construction and yet compute something
    # else in a `call` of its own.
    plain = type(model).call in (keras.Model.call, keras.Sequential.call, _functional_call())
    if not plain or not getattr(model, "built", False):
        return None
    return getattr(model, "outputs", None) or None


def _functional_call() -> Any:
    """The `call` of Functional models, whose class Keras does not export."""
    global _FUNCTIONAL_CALL
    if _FUNCTIONAL_CALL is None:
        inputs = keras.Input((1,))
        _FUNCTIONAL_CALL = type(keras.Model(inputs, inputs)).call
    return _FUNCTIONAL_CALL


_FUNCTIONAL_CALL: Any = None

# Layers that end a model and neither make probabilities nor hide any.
_TRANSPARENT = (
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.Reshape,
    keras.layers.Flatten,
)


def _made_by(tensor: Any) -> Output:
    # The operation behind a symbolic tensor is in no public attribute.
    history = tensor._keras_history
    if getattr(history.operation, "only_rounds", False):
        # One such layer may round several tensors.
        node = history.operation._inbound_nodes[history.node_index]
        return _made_by(node.input_tensors[0])
    if isinstance(history.operation, _TRANSPARENT):
        inner = _made_by(history.operation.input)
        if isinstance(history.operation, keras.layers.Identity):
            return inner
        # The logits before a reshape have another shape than the output.
        return inner if inner.kind == "logits" else Output("unknown", None)
    return _from_operation(history.operation, history.tensor_index)


def _from_operation(operation: Any, index: int) -> Output:
    """How a layer or operation makes its output number `index`."""
    if isinstance(operation, keras.Model):
        inner_outputs = graph_outputs(operation)
        if inner_outputs is None:
            return Output("unknown", None)
        return _made_by(keras.tree.flatten(inner_outputs)[index])
    wrapped = hasattr(operation, "activated_layer")
    operation = activated(operation)
    name = type(operation).__name__
    if isinstance(operation, keras.layers.Softmax) or name in ("Softmax", "Sigmoid", "LogSoftmax"):
        if name == "LogSoftmax":
            # log_softmax leaves softened distributions as they are.
            return Output("logits", None)
        return Output(name.lower(), Tap(operation, "input"))
    activation = getattr(operation, "activation", None)
    if activation is None:
        known = isinstance(operation, keras.layers.Layer) and not isinstance(
            operation, keras.layers.Lambda | keras.layers.Wrapper
        )
        builtin = known and type(operation).__module__.startswith("keras.")
        return Output("logits" if builtin else "unknown", None)
    kind = getattr(activation, "__name__", type(activation).__name__).lower()
    if kind in ("softmax", "sigmoid"):
        if not wrapped and not type(operation).__module__.startswith("keras."):
            return Output("unknown", None)
        return Output(kind, Tap(operation, "preactivation"))
    return Output("logits", None)


def watch_outputs(model: Any, x: Any) -> tuple[Any, list[Output]]:
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
            def keep(result: Any, layer: Any = layer) -> None:
                kept.append(result)
                if ops.is_tensor(result):
                    made.setdefault(id(result), layer)

            stack.enter_context(tapped(Tap(layer, "output"), keep))
        output = run(model, x, False)
    return output, [
        _from_operation(made[id(tensor)], 0) if id(tensor) in made else Output("unknown", None)
        for tensor in keras.tree.flatten(output)
    ]


def output_template(model: Any) -> Any:
    """The structure of a model's outputs with their names at the leaves.

    Args:
        model: A Keras model.

    Returns:
        A name, or a list, tuple or dict of names; `None` where the model has
        no graph.
    """
    structure = getattr(model, "output", None)
    if structure is None:
        outputs = getattr(model, "outputs", None)
        if not outputs:
            return None
        structure = outputs[0] if len(outputs) == 1 else list(outputs)
    return named(structure, getattr(model, "output_names", None))


def named(structure: Any, names: Any) -> Any:
    """A structure of outputs with their names at the leaves: a flat dict's keys are its names."""
    if isinstance(structure, dict) and not any(map(keras.tree.is_nested, structure.values())):
        return {key: key for key in structure}
    flat = keras.tree.flatten(structure)
    if not names or len(names) != len(flat):
        names = [f"output_{i}" for i in range(len(flat))]
    return keras.tree.pack_sequence_as(structure, list(names))

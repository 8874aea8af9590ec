"""The graph of a Functional or Sequential model, and the same graph with other layers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_kd.utils.types import Tensor

OUTPUT = ""
"""Stands for the outside of the model where a consumer's name is expected."""

Make = Callable[[Any, "Graph"], Any]
Call = Callable[..., Tensor]


def is_graph(model: object) -> bool:
    """Whether a model's layers and connections are known, as in Functional and Sequential models.

    Args:
        model: Any object.

    Returns:
        True for a built `keras.Sequential` and for a Functional model that runs its graph as it
        stands; False for subclassed models, whose `call` is Python code.
    """
    if isinstance(model, keras.Sequential):
        return bool(model.built and model.inputs)
    if not isinstance(model, keras.Model):
        return False
    functional = _functional_class()
    return isinstance(model, functional) and type(model).call is functional.call


@functools.cache
def _functional_class() -> Any:
    # Keras exports no name for it; what `keras.Model(inputs, outputs)` returns is that class.
    probe = keras.Input((1,))
    return type(keras.Model(probe, probe))


class Graph:
    """One level of a model: its layers by name, their calls, and who reads their outputs.

    Nested models are single layers here; each has a graph of its own.

    Args:
        model: Model for which `is_graph` holds.
        outermost: Whether the model is nested in no other.
    """

    def __init__(self, model: keras.Model, outermost: bool = True) -> None:
        self.outermost = outermost
        if isinstance(model, keras.Sequential):
            inputs, outputs = model.inputs[0], model.outputs[0]
        else:
            inputs, outputs = model.input, model.output
        # A second model over the same tensors: no layer is called again, so the given model keeps
        # its nodes, and the copy made from this one carries no compile state.
        self.model = keras.Model(inputs, outputs, name=model.name)
        self.layers: dict[str, Any] = {layer.name: layer for layer in self.model.operations}
        self.consumers: dict[str, list[str]] = {name: [] for name in self.layers}
        self.producers: dict[str, list[str]] = {name: [] for name in self.layers}
        self.calls: dict[str, list[Any]] = {}
        config = self.model.get_config()
        for layer in config["layers"]:
            self.calls[layer["name"]] = layer["inbound_nodes"]
            for tensor in tensors_of(layer["inbound_nodes"]):
                producer = tensor["keras_history"][0]
                self.consumers[producer].append(layer["name"])
                self.producers[layer["name"]].append(producer)
        self.output_names = list(_output_names(config["output_layers"]))
        self.input_names = list(_output_names(config["input_layers"]))
        for producer in self.output_names:
            self.consumers[producer].append(OUTPUT)

    def fresh_inputs(self) -> Any:
        """New inputs of the same structure, shapes and names as the model's."""
        names = {
            id(layer.output): layer.name
            for layer in self.layers.values()
            if isinstance(layer, keras.layers.InputLayer)
        }
        return keras.tree.map_structure(
            lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=names[id(t)]),
            self.model.input,
        )

    def called_once(self, name: str) -> bool:
        """Whether the layer stands at exactly one place of the graph."""
        return len(self.calls[name]) == 1

    def only_consumer(self, name: str) -> Any | None:
        """The single layer that reads the output of `name`, itself called once; else None."""
        readers = self.consumers[name]
        if len(readers) != 1 or readers[0] == OUTPUT or not self.called_once(name):
            return None
        return self.layers[readers[0]] if self.called_once(readers[0]) else None

    def input_shape(self, name: str) -> tuple[int | None, ...] | None:
        """Shape of the first tensor that the layer reads; None for layers that read none."""
        for tensor in tensors_of(self.calls[name][:1]):
            return tuple(tensor["shape"])
        return None

    def fixed_argument(self, name: str, argument: str) -> Any:
        """The value of a keyword argument written into the graph at the layer's first call."""
        calls = self.calls[name]
        return calls[0]["kwargs"].get(argument) if calls else None


def tensors_of(node: Any) -> Iterator[dict[str, Any]]:
    """Descriptions of the tensors that serialized calls read, one for each reading.

    Args:
        node: A call of `Graph.calls`, some of them, or a part of one.

    Yields:
        For each tensor its `shape`, `dtype` and `keras_history`: layer, call and index.
    """
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            yield node["config"]
            return
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from tensors_of(item)


def _output_names(outputs: Any) -> Iterator[str]:
    """Names of the layers in a serialized structure of `[name, node, tensor]` triples."""
    if isinstance(outputs, dict):
        for item in outputs.values():
            yield from _output_names(item)
    elif len(outputs) == 3 and isinstance(outputs[0], str) and isinstance(outputs[1], int):
        yield outputs[0]
    else:
        for item in outputs:
            yield from _output_names(item)


def occurrences(model: keras.Model) -> Counter[int]:
    """How many graphs, the model's own and those nested in it, hold each layer (by `id`).

    Args:
        model: Model for which `is_graph` holds.

    Returns:
        Counter from `id(layer)` to the number of graphs; a nested model that is called twice is
        one graph.
    """
    counts: Counter[int] = Counter()
    seen: set[int] = set()

    def visit(graph: keras.Model) -> None:
        if id(graph) in seen:
            return
        seen.add(id(graph))
        for layer in graph.layers:
            counts[id(layer)] += 1
            if is_graph(layer):
                visit(layer)

    visit(model)
    return counts


def copy_layer(layer: keras.Layer) -> Any:
    """A new layer or operation of the same configuration, without the weights.

    Args:
        layer: Keras layer or operation.

    Returns:
        The copy, not yet built.

    Raises:
        ValueError: If the layer does not describe itself in `get_config`.
    """
    if type(layer) is keras.layers.Lambda:
        # Its config holds marshaled code, which safe mode does not read back. The function itself
        # is at hand.
        config = layer.get_config()
        return keras.layers.Lambda(
            layer.function, arguments=layer.arguments, name=layer.name, dtype=config["dtype"]
        )
    try:
        return type(layer).from_config(layer.get_config())
    except Exception as error:
        raise ValueError(
            f"Layer `{layer.name}` of class `{type(layer).__name__}` cannot be copied from its "
            f"configuration: {error} Give the class a `get_config` that holds its constructor "
            "arguments."
        ) from error


def copy_built(layer: keras.Layer) -> Any:
    """A new layer of the same configuration with the same weights.

    Args:
        layer: Built Keras layer, or an operation.

    Returns:
        The copy, built.

    Raises:
        ValueError: If the layer does not describe itself in `get_config`, or cannot be built from
            its shapes.
    """
    new = copy_layer(layer)
    if isinstance(layer, keras.layers.Layer) and layer.weights:
        new.build_from_config(layer.get_build_config())
        if len(new.weights) != len(layer.weights):
            raise ValueError(
                f"Layer `{layer.name}` of class `{type(layer).__name__}` cannot be copied: built "
                f"from its configuration it has {len(new.weights)} weights in place of "
                f"{len(layer.weights)}. Create all weights in its `build`."
            )
        give_weights(new, layer.get_weights())
    return new


def give_weights(layer: keras.Layer, weights: list[Any]) -> None:
    """`set_weights`, and the constants that a `Normalization` computes from its weights.

    Keras makes these when a layer is adapted or loaded, not when its weights are set, so that a
    copy would let everything through as it is.

    Args:
        layer: Built layer or model.
        weights: Arrays, as `get_weights` returns them.
    """
    layer.set_weights(weights)
    for inner in layer._flatten_layers():
        if isinstance(inner, keras.layers.Normalization):
            inner.finalize_state()


def rebuild(model: keras.Model, make: Make, call: Call | None = None) -> keras.Model:
    """Build a model's graph again out of other layers, nested models included.

    Args:
        model: Model for which `is_graph` holds. It is not changed.
        make: `make(layer, graph)` returns the new layer that stands for `layer`. It is called once
            for each layer, also where the layer is shared, and not for nested models, which are
            rebuilt themselves.
        call: `call(layer, new_layer, graph, args, kwargs)` calls the new layer and returns its
            output. Defaults to `new_layer(*args, **kwargs)`.

    Returns:
        New Functional model of the same name, inputs and output structure, not compiled. The
        weights are those that `make` left in its layers.
    """
    made: dict[int, Any] = {}

    def visit(inner: keras.Model) -> keras.Model:
        graph = Graph(inner, outermost=inner is model)
        sources: dict[int, Any] = {}

        def clone(layer: keras.Layer) -> Any:
            if id(layer) not in made:
                made[id(layer)] = visit(layer) if is_graph(layer) else make(layer, graph)
            sources[id(made[id(layer)])] = layer
            return made[id(layer)]

        def connect(new: keras.Layer, *args: object, **kwargs: object) -> Tensor:
            if call is None:
                return new(*args, **kwargs)
            return call(sources[id(new)], new, graph, args, kwargs)

        clone_of = keras.models.clone_model(
            graph.model,
            input_tensors=graph.fresh_inputs(),
            clone_function=clone,
            call_function=connect,
        )
        if not inner.trainable:
            # Setting True would thaw layers that are frozen one by one.
            clone_of.trainable = False
        return clone_of

    return visit(model)

"""Which layers read a mask, followed into nested models and out of them."""

from __future__ import annotations

from typing import Any

import keras

from keras_kd.models.graph import Graph, is_graph
from keras_kd.models.weight_wrapper import base_layer
from keras_kd.utils.types import Tensors


def masked_layers(model: keras.Model) -> frozenset[int]:
    """The layers to which Keras hands a mask while the model runs.

    Masks are made by `Masking`, `Embedding(mask_zero=True)` and some custom layers, and travel with
    the tensors. A graph does not show them all: those that enter a nested model, or come out of
    one, are attached only while it runs.

    Args:
        model: Model for which `is_graph` holds.

    Returns:
        The `id` of every such layer at any depth, without wrappers of this package. A layer called
        several times counts if one of the calls reads a mask.

    Examples:
        >>> tokens = keras.Input((4,), dtype="int32")
        >>> recurrent = keras.layers.GRU(2)
        >>> embedding = keras.layers.Embedding(9, 2, mask_zero=True)
        >>> model = keras.Model(tokens, recurrent(embedding(tokens)))
        >>> masked_layers(model) == {id(recurrent)}
        True
    """
    found: set[int] = set()
    _follow(model, False, found)
    return frozenset(found)


def _follow(model: keras.Model, masked: bool, found: set[int]) -> list[bool]:
    """Whether each output of a model carries a mask, given whether its inputs do."""
    graph = Graph(model)
    carrying: set[tuple[str, int]] = set()
    if masked:
        carrying.update((name, 0) for name, calls in graph.calls.items() if not calls)
    before = -1
    # A shared layer may read its own output, so its calls have no order: again until nothing is
    # added, which is the second time as a rule.
    while len(carrying) != before:
        before = len(carrying)
        for name, calls in graph.calls.items():
            for call in calls:
                flags = _outputs(graph.layers[name], call, carrying, found)
                carrying.update((name, index) for index, flag in enumerate(flags) if flag)
    made = [tensor._keras_history for tensor in graph.model.outputs]
    return [(m.operation.name, m.tensor_index) in carrying for m in made]


def _outputs(
    layer: keras.Layer, call: dict[str, Any], carrying: set[tuple[str, int]], found: set[int]
) -> list[bool]:
    """Whether each output of one call carries a mask. The layer is noted if it reads one."""
    inputs, masks = _tensors(call["args"], carrying)
    given = call["kwargs"].get("mask")
    named = _tensors(list(call["kwargs"].values()), carrying)[1]
    masked = given is not None or any(m is not None for m in keras.tree.flatten([masks, named]))
    base = base_layer(layer)
    if masked:
        found.add(id(base))
    if is_graph(base):
        return _follow(base, masked, found)
    if not isinstance(base, keras.layers.Layer) or not base.supports_masking:
        # Keras takes the mask off.
        return [False]
    if type(base).compute_mask is keras.layers.Layer.compute_mask:
        return [masked]
    first, mask = (inputs[0], masks[0]) if inputs else (None, None)
    if given is not None and mask is None and isinstance(first, keras.KerasTensor):
        mask = keras.KerasTensor(first.shape[:2], "bool")
    try:
        result = base.compute_mask(first, mask)
    except Exception:  # of a layer that computes it from values, say
        return [masked]
    return [m is not None for m in keras.tree.flatten(result)]


def _tensors(value: Tensors, carrying: set[tuple[str, int]]) -> tuple[Any, Any]:
    """Serialized arguments as symbolic tensors, and the same structure of their masks."""
    if isinstance(value, (list, tuple)):
        pairs = [_tensors(item, carrying) for item in value]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if not isinstance(value, dict):
        return value, None
    if value.get("class_name") != "__keras_tensor__":
        pairs_of = {key: _tensors(item, carrying) for key, item in value.items()}
        return ({k: p[0] for k, p in pairs_of.items()}, {k: p[1] for k, p in pairs_of.items()})
    config = value["config"]
    name, _, index = config["keras_history"]
    tensor = keras.KerasTensor(config["shape"], config["dtype"])
    mask = keras.KerasTensor(config["shape"][:2], "bool") if (name, index) in carrying else None
    return tensor, mask

"""Which layers of a model are meant."""

from __future__ import annotations

from typing import Any

import keras

from keras_kd.compress.quantized import Quantized
from keras_kd.models.graph import is_graph
from keras_kd.models.weight_wrapper import base_layer, every_layer, kernels
from keras_kd.utils.errors import did_you_mean


def require_graph(model: keras.Model, action: str) -> None:
    """Refuse a model whose layers and connections are not known.

    Args:
        model: Built Keras model.
        action: What was asked for, for the message: `"prune"`.

    Raises:
        ValueError: If the model, or one nested in it, is subclassed.
    """
    if not is_graph(model):
        raise ValueError(
            f"Model `{model.name}` is of class `{type(model).__name__}`, whose `call` is Python "
            f"code: its layers cannot be exchanged to {action} it. Build it with the Functional "
            "API or `keras.Sequential`; custom layers are welcome inside."
        )


def paths(model: keras.Model) -> dict[str, Any]:
    """Layers of a model, nested ones included, by path.

    Args:
        model: Model whose graph is known.

    Returns:
        Mapping from `"backbone/block3"` to the layer in the graph, wrapper or not.
    """
    found: dict[str, Any] = {}
    for path, layer in every_layer(model):
        found.setdefault(path, layer)
    return found


def look_up(model: keras.Model, name: str, argument: str) -> Any:
    """The layer of a path, or an error with what is close.

    Args:
        model: Model whose graph is known.
        name: Path of a layer.
        argument: The argument that held the name, for the message.

    Returns:
        The layer.

    Raises:
        ValueError: If there is none.
    """
    known = paths(model)
    if name in known:
        return known[name]
    raise ValueError(
        f"`{name}` in `{argument}` is not a layer of `{model.name}`.{did_you_mean(name, known)} "
        "Nested layers are named by path, `backbone/block3`."
    )


def chosen_layers(model: keras.Model, names: list[str] | None, action: str) -> dict[int, str]:
    """The layers whose kernels are to be changed.

    Args:
        model: Built model.
        names: Paths of layers, or None for every layer with a kernel.
        action: What is done to them, for messages: `"prune"`.

    Returns:
        Mapping from `id(layer)` to the layer's path.

    Raises:
        ValueError: If the model's graph is not known, a name is unknown or has no kernel, the model
            is quantization-aware already, or nothing is left to change.
    """
    require_graph(model, action)
    for path, layer in every_layer(model):
        if isinstance(layer, Quantized):
            raise ValueError(
                f"Layer `{path}` of `{model.name}` is quantized already. {action.capitalize()} "
                "first, then call `quantize_aware` on the result, which keeps zeros and clusters."
            )
    if names is not None:
        if not names:
            raise ValueError(
                f"`layers` is empty, so there is nothing to {action}. Name layers of "
                f"`{model.name}`, or pass None for all with kernels."
            )
        chosen = {}
        for name in names:
            layer = look_up(model, name, "layers")
            if not kernels(layer):
                raise ValueError(
                    f"Layer `{name}` of class `{type(base_layer(layer)).__name__}` has no kernel "
                    f"to {action}. Leave it out of `layers`."
                )
            chosen[id(layer)] = name
        return chosen
    chosen = {
        id(layer): path
        for path, layer in paths(model).items()
        if not isinstance(layer, keras.Model) and kernels(layer)
    }
    if not chosen:
        raise ValueError(
            f"Model `{model.name}` has no layer with a kernel to {action}. Expected at least one "
            "Dense, convolution, recurrent, attention or Embedding layer."
        )
    return chosen

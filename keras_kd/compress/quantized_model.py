"""The model that `quantize_aware` returns, and the borders of its float regions."""

from __future__ import annotations

from typing import Any

import keras

from keras_kd.compress.tflite_rounding import as_float
from keras_kd.utils.types import Shape, Tensor, Tensors


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedModel(keras.Model):
    """A Functional model whose outputs are named after the layers that compute them.

    Keras names an output after the layer that gives it. Of a quantization-aware model that is what
    rounds it, and losses, metrics and exported files address outputs by name.

    Args:
        inputs: Symbolic inputs, in any structure.
        outputs: Symbolic outputs, in any structure.
        name: Name of the model.
        **kwargs: Arguments of `keras.Model`.
    """

    def __init__(
        self, inputs: Tensors, outputs: Tensors, name: str | None = None, **kwargs: object
    ) -> None:
        super().__init__(inputs=inputs, outputs=outputs, name=name, **kwargs)
        self.output_names = [_computed_by(tensor).name for tensor in self.outputs]


def _computed_by(tensor: Tensor) -> Any:
    history = tensor._keras_history
    while _passes(history.operation):
        (source,) = history.operation._inbound_nodes[history.node_index].input_tensors
        history = source._keras_history
    return history.operation


def _passes(operation: keras.Operation) -> bool:
    return getattr(operation, "only_rounds", False) or isinstance(operation, FloatBorder)


@keras.saving.register_keras_serializable(package="keras_kd")
class FloatBorder(keras.layers.Layer):
    """The identity, on both sides of which TFLite's converter computes on its own.

    Before a float layer it keeps the scale of what comes in from reaching it, behind one the scale
    that its output is rounded to.

    Args:
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    passes_values = True
    """What is told of a layer's output holds behind it too."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        """Pass the values."""
        return as_float(inputs)

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """That of the input."""
        return input_shape

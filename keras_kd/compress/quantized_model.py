"""The model that `quantize_aware` returns, and the borders of its float regions."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_kd.compress.tflite_rounding import where_run
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
    while getattr(history.operation, "only_rounds", False):
        (source,) = history.operation._inbound_nodes[history.node_index].input_tensors
        history = source._keras_history
    return history.operation


@keras.saving.register_keras_serializable(package="keras_kd")
class FloatBorder(keras.layers.Layer):
    """The identity, behind which TFLite's converter computes in float.

    An operator whose tensors share one scale the converter makes int8 as soon as it knows the scale
    of one of them. Behind `relu(x) - relu(-x)`, which is `x`, it knows none.

    Args:
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        """Pass the values."""
        return where_run(
            lambda: ops.convert_to_tensor(inputs), lambda: ops.relu(inputs) - ops.relu(-inputs)
        )

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """That of the input."""
        return input_shape

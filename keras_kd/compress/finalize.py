"""Back to a plain Keras model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.compress.cluster import zero_share
from keras_kd.compress.fake_quantize import FakeQuantize
from keras_kd.compress.quantized import Quantized
from keras_kd.compress.quantized_layers import QuantizedLayer
from keras_kd.compress.quantized_model import FloatBorder
from keras_kd.compress.selection import require_graph
from keras_kd.models.folding import folded_weights, require_built, scale_and_shift
from keras_kd.models.graph import Graph, copy_built, give_weights, rebuild
from keras_kd.models.weight_wrapper import WeightWrapper, base_layer, every_layer, kernels
from keras_kd.utils.types import Tensor


def finalize(model: keras.Model) -> keras.Model:
    """Make a plain Keras model with the final weights of a compressed one.

    Masks, clusters and rounded weights are written into layers of Keras's own classes, folded
    BatchNormalization into the weights before it. Zeros stay zeros. The outputs are those of
    `model`; of a quantization-aware model, those without the rounding of activations, which no
    layer of Keras does (export the quantization-aware model itself to keep its ranges).

    Args:
        model: Result of `quantize_aware`, `prune` or `cluster`, trained or not. It is not changed.

    Returns:
        New Functional model, not compiled, that loads without this package.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If its graph is not known.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> [type(layer).__name__ for layer in finalize(prune(model)).layers]
        ['InputLayer', 'Dense']
    """
    require_built(model)
    require_graph(model, "finalize")
    dropped: set[int] = set()

    def make(layer: keras.Layer, graph: Graph) -> Any:
        if isinstance(layer, (FakeQuantize, FloatBorder)):
            dropped.add(id(layer))
            return keras.layers.Identity(name=layer.name)
        return baked(layer) if isinstance(layer, WeightWrapper) else copy_built(layer)

    def call(
        layer: keras.Layer,
        new: keras.Layer,
        graph: Graph,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        return args[0] if id(layer) in dropped else new(*args, **kwargs)

    return rebuild(model, make, call)


def baked(layer: WeightWrapper) -> Any:
    """A plain layer that computes what a wrapper does at inference.

    Args:
        layer: Built wrapper, such as a `PrunedLayer` or `QuantizedLayer`.

    Returns:
        Built layer of the innermost layer's class.
    """
    base = base_layer(layer)
    config = base.get_config()
    norm = layer.norm if isinstance(layer, QuantizedLayer) else None
    if norm is not None:
        config["use_bias"] = True
    if isinstance(layer, QuantizedLayer) and layer.activation is not None:
        config["activation"] = keras.activations.serialize(layer.activation)
    regularizer = layer.regularizer if isinstance(layer, QuantizedLayer) else None
    regularizer = regularizer or layer.activity_regularizer
    if regularizer is not None:
        config["activity_regularizer"] = keras.regularizers.serialize(regularizer)
    plain = type(base).from_config(config)
    plain.build_from_config(base.get_build_config())
    if norm is None:
        pairs = layer.final_pairs() if isinstance(layer, Quantized) else layer.effective(False)
        values = {id(v): ops.convert_to_numpy(t) for v, t in pairs}
        give_weights(
            plain,
            [values.get(id(v), ops.convert_to_numpy(v)).astype("float32") for v in base.weights],
        )
        return plain
    bias = folded_weights(base, norm)[-1]
    scale, _ = scale_and_shift(norm)
    scale = np.where(np.abs(scale) < 1e-6, 1e-6, scale).astype("float32")
    scaled = layer.quantized_pairs(False, ops.convert_to_tensor(scale))
    values = {id(v): ops.convert_to_numpy(t) for v, t in scaled}
    kept = [v for v in base.weights if not (base.use_bias and v is base.bias)]
    plain.set_weights([*(values.get(id(v), ops.convert_to_numpy(v)) for v in kept), bias])
    return plain


def sparsity(model: keras.Model) -> float:
    """The fraction of a model's kernels that is zero, masks counted.

    Args:
        model: Built Keras model.

    Returns:
        Fraction from 0 to 1 over all kernels, weighted by size.
    """
    zeros = total = 0.0
    seen: set[int] = set()
    for _, layer in every_layer(model):
        if id(base_layer(layer)) in seen or isinstance(layer, keras.Model):
            continue
        seen.add(id(base_layer(layer)))
        for kernel in kernels(layer):
            size = int(np.prod(kernel.shape))
            total += size
            zeros += zero_share(layer, kernel) * size
    return zeros / max(total, 1.0)

"""BatchNormalization written into the weights of the layer before it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_kd.models.graph import Graph, copy_layer, give_weights, is_graph, occurrences, rebuild
from keras_kd.models.weight_wrapper import base_layer
from keras_kd.utils.types import Tensor

CHANNEL_AXIS = {
    keras.layers.Conv1D: -1,
    keras.layers.Conv2D: -1,
    keras.layers.Conv3D: -1,
    keras.layers.SeparableConv1D: -1,
    keras.layers.SeparableConv2D: -1,
    keras.layers.Conv1DTranspose: -2,
    keras.layers.Conv2DTranspose: -2,
    keras.layers.Conv3DTranspose: -2,
    # Two axes, input channel and multiplier, which together are the output channel.
    keras.layers.DepthwiseConv1D: None,
    keras.layers.DepthwiseConv2D: None,
    keras.layers.Dense: -1,
}
"""Axis of the kernel (the last kernel of a separable layer) that counts output channels."""


def foldable_into(layer: keras.Layer, graph: Graph, uses: dict[int, int]) -> Any | None:
    """The BatchNormalization that follows a layer and may be written into its weights.

    Args:
        layer: Layer of the graph, or a wrapper of one.
        graph: The graph it stands in.
        uses: Result of `occurrences`: a layer shared between graphs is left alone.

    Returns:
        The normalization layer; None if there is none, if either layer is called at more than one
        place, if another layer reads what stands between them, if an activation does, or if they
        do not share the channel axis.
    """
    base = base_layer(layer)
    if type(base) not in CHANNEL_AXIS or uses[id(layer)] != 1:
        return None
    norm: Any = graph.only_consumer(layer.name)
    if type(norm) is not keras.layers.BatchNormalization or uses[id(norm)] != 1:
        return None
    if graph.fixed_argument(norm.name, "training"):
        return None
    config = base.get_config()
    if config["activation"] != "linear" or config.get("lora_rank") is not None:
        return None
    if type(base.dtype_policy) is not keras.dtype_policies.DTypePolicy:
        return None
    rank = len(graph.input_shape(norm.name) or ())
    channels_first = config.get("data_format") == "channels_first"
    return norm if norm.axis % rank == (1 if channels_first else rank - 1) else None


def scale_and_shift(norm: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """The affine map that a BatchNormalization applies at inference.

    `scale = gamma / sqrt(variance + epsilon)`, `shift = beta - mean * scale`.

    Args:
        norm: Built layer.

    Returns:
        Float64 arrays `(channels,)`: scale and shift.
    """
    variance = keras.ops.convert_to_numpy(norm.moving_variance).astype("float64")
    mean = keras.ops.convert_to_numpy(norm.moving_mean).astype("float64")
    scale = 1.0 / np.sqrt(variance + norm.epsilon)
    if norm.gamma is not None:
        scale = scale * keras.ops.convert_to_numpy(norm.gamma).astype("float64")
    shift = -mean * scale
    if norm.beta is not None:
        shift = shift + keras.ops.convert_to_numpy(norm.beta).astype("float64")
    return scale, shift


def kernel_scale(layer: keras.Layer, kernel_shape: tuple[int, ...], scale: np.ndarray) -> Any:
    """Shape a per-channel scale so that it multiplies a layer's kernel.

    Args:
        layer: Layer of a class in `CHANNEL_AXIS`.
        kernel_shape: Shape of its (last) kernel.
        scale: Array or tensor `(channels,)`.

    Returns:
        `scale` with ones for the kernel's other axes.
    """
    axis = CHANNEL_AXIS[type(layer)]
    if axis is None:
        shape = [1] * (len(kernel_shape) - 2) + list(kernel_shape[-2:])
    else:
        shape = [1] * len(kernel_shape)
        shape[axis] = kernel_shape[axis]
    return keras.ops.reshape(scale, shape)


def folded_weights(layer: keras.Layer, norm: keras.layers.BatchNormalization) -> list[np.ndarray]:
    """The weights of a layer with the normalization after it written in.

    `kernel' = kernel * scale`, `bias' = bias * scale + shift`, in float64.

    Args:
        layer: Built layer of a class in `CHANNEL_AXIS`.
        norm: Built normalization of its output.

    Returns:
        Float32 arrays in the order of the same layer built with a bias.
    """
    scale, shift = scale_and_shift(norm)
    weights = [np.asarray(value, "float64") for value in layer.get_weights()]
    bias = weights.pop() if layer.use_bias else np.zeros_like(shift)
    kernel = weights[-1]
    shaped = keras.ops.convert_to_numpy(kernel_scale(layer, kernel.shape, np.ones_like(scale)))
    weights[-1] = kernel * np.reshape(scale, shaped.shape)
    weights.append(bias * scale + shift)
    return [value.astype("float32") for value in weights]


def fold_batch_normalization(model: keras.Model) -> keras.Model:
    """Make an inference copy with every BatchNormalization folded into the layer before it.

    `conv(x, kernel) * scale + shift = conv(x, kernel * scale) + shift`, with
    `scale = gamma / sqrt(variance + epsilon)`. Folded are Conv1D/2D/3D, depthwise, separable and
    transposed convolutions and Dense whose output goes to one BatchNormalization only, in nested
    models as well. The normalization's place is taken by an `Identity` of the same name, so layers
    are found under the names they had. All other weights are copied as they are.

    Args:
        model: Built model. It is not changed. A subclassed model, whose graph is not known, is
            copied without folding.

    Returns:
        A new model, not compiled, sharing no weight with `model`; its outputs with
        `training=False` agree to float rounding.

    Raises:
        TypeError: If `model` is not a `keras.Model`.
        ValueError: If `model` is not built, or a layer (or the subclassed model) cannot be made
            from its configuration.

    Examples:
        >>> inputs = keras.Input((8, 8, 3))
        >>> x = keras.layers.Conv2D(4, 3, use_bias=False)(inputs)
        >>> model = keras.Model(inputs, keras.layers.BatchNormalization()(x))
        >>> folded = fold_batch_normalization(model)
        >>> len(folded.weights)
        2

    Reference:
        - [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), section 3.2
    """
    require_built(model)
    if not is_graph(model):
        return _copy_subclassed(model)
    uses = occurrences(model)
    norms: set[int] = set()
    finish: list[tuple[Any, list[np.ndarray]]] = []

    def make(layer: keras.Layer, graph: Graph) -> Any:
        if id(layer) in norms:
            return keras.layers.Identity(name=layer.name, dtype=layer.dtype_policy.name)
        norm = foldable_into(layer, graph, uses) if type(layer) in CHANNEL_AXIS else None
        if norm is None:
            new = copy_layer(layer)
            if isinstance(layer, keras.layers.Layer):
                finish.append((new, layer.get_weights()))
            return new
        norms.add(id(norm))
        new = type(layer).from_config({**layer.get_config(), "use_bias": True})
        finish.append((new, folded_weights(layer, norm)))
        return new

    def call(
        layer: keras.Layer,
        new: keras.Layer,
        graph: Graph,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        # The arguments `mask` and `training` of a normalization mean nothing to its stand-in.
        return new(args[0]) if id(layer) in norms else new(*args, **kwargs)

    folded = rebuild(model, make, call)
    for layer, weights in finish:
        give_weights(layer, weights)
    return folded


def require_built(model: keras.Model) -> None:
    """Refuse what is not a built Keras model.

    Args:
        model: Any object.

    Raises:
        TypeError: If it is not a `keras.Model`.
        ValueError: If its weights do not exist yet.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected a `keras.Model`. Received: {model!r} (of type {type(model).__name__}). "
            "Models of other frameworks and of `tf_keras` must be converted to Keras 3 first."
        )
    if not model.built:
        raise ValueError(
            f"Model `{model.name}` is not built: it has no weights yet. "
            "Call it once on a batch, or give it an `Input`."
        )


def _copy_subclassed(model: keras.Model) -> keras.Model:
    try:
        copy = keras.models.clone_model(model)
        copy.build_from_config(model.get_build_config())
        give_weights(copy, model.get_weights())
    except Exception as error:
        raise ValueError(
            f"Model `{model.name}` of class `{type(model).__name__}` cannot be copied: {error} "
            "Give the class a `get_config` that holds its constructor arguments, or build the "
            "model with the Functional API."
        ) from error
    return copy

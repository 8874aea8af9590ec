"""Quantized layers of a single product: Dense, convolutions, Embedding, affine maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_kd.compress.cluster import is_clustered
from keras_kd.compress.convolutions import convolve, has_single_form
from keras_kd.compress.fake_quantize import FakeQuantize, quantized_weights, swish
from keras_kd.compress.operators import INT8_ACTIVATIONS
from keras_kd.compress.quantized import Quantized, Treatment
from keras_kd.compress.tflite_rounding import (
    ReadsIntegers,
    as_float,
    channel_steps,
    for_tflite,
    rounded_bias,
    where_run,
)
from keras_kd.models.folding import kernel_scale
from keras_kd.models.graph import Graph
from keras_kd.models.weight_wrapper import base_layer, kernels, run_with
from keras_kd.utils.types import Shape, Tensor

FUSED_ACTIVATIONS = {"linear", "relu", "relu6"}
"""Activations that TFLite computes inside the operator before them."""

TRANSPOSED = {keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose}

CHANNEL_AXES: dict[type, dict[str, tuple[int, ...]]] = {
    keras.layers.Conv1D: {"kernel": (-1,)},
    keras.layers.Conv2D: {"kernel": (-1,)},
    keras.layers.Conv1DTranspose: {"kernel": (-2,)},
    keras.layers.Conv2DTranspose: {"kernel": (-2,)},
    keras.layers.DepthwiseConv1D: {"kernel": (-2, -1)},
    keras.layers.DepthwiseConv2D: {"kernel": (-2, -1)},
    keras.layers.Dense: {"kernel": (-1,)},
    # A row is looked up, not multiplied: the table has one step in all.
    keras.layers.Embedding: {"embeddings": ()},
}
"""Kernels that are quantized, and their axes that have a step for each index."""


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedLayer(ReadsIntegers, Quantized):
    """A layer whose weights are rounded to integers on the way, its BatchNormalization folded in.

    `y = layer(x, kernel')` with `kernel'` from `quantized_weights`. With a normalization the kernel
    is rounded after `scale = gamma / sqrt(variance + epsilon)` is multiplied in, which is what the
    device holds. In training the product is divided by the same scale and normalized by the
    statistics of the batch, so gamma, beta and the moving statistics go on learning; from when the
    observers are frozen, the moving statistics are used as they stand.

    Args:
        layer: Conv1D/2D, their transposed and depthwise forms, Dense, Embedding, a wrapper of one,
            or any layer if `axes` names its weights.
        norm: BatchNormalization that follows the layer, or None.
        weight_bits: Integer width of the weights, 2 to 8.
        axes: Weight names, each with the axes that have a step for each index; None for those of
            the layer's class.
        activation: Activation after the layer (and its normalization), computed on a quantized
            input of its own unless TFLite fuses it.
        activation_bits: Integer width of that input; None to leave it float.
        regularizer: Activity regularizer of what the layer, before its normalization, and its
            activation give; in the place of the wrapped layer's own, which would see the product
            alone.
        **kwargs: Arguments of `keras.layers.Layer`.

    Reference:
        - [Jacob et al., 2018](https://arxiv.org/abs/1712.05877), section 3.2
        - [Krishnamoorthi, 2018](https://arxiv.org/abs/1806.08342), section 3.2.2
    """

    def __init__(
        self,
        layer: keras.Layer,
        norm: Any | None = None,
        weight_bits: int = 8,
        axes: dict[str, Any] | None = None,
        activation: Callable[..., Tensor] | str | None = None,
        activation_bits: int | None = 8,
        regularizer: keras.Regularizer | str | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(layer, **kwargs)
        self.regularizer = keras.regularizers.get(regularizer)
        if axes is None:
            axes = CHANNEL_AXES[type(base_layer(layer))]
        self.norm: Any = norm
        self.weight_bits: int = weight_bits
        self.axes = {name: tuple(value) for name, value in axes.items()}
        # `keras.activations.get(None)` is the identity, which would count as an activation.
        self.activation = None if activation is None else keras.activations.get(activation)
        self.activation_bits = activation_bits
        self.linear_quantizer = (
            FakeQuantize(activation_bits, name="linear_quantizer", dtype=self.dtype_policy)
            if activation_bits is not None
            and activation is not None
            and getattr(self.activation, "__name__", "") not in FUSED_ACTIVATIONS
            else None
        )
        if norm is not None:
            self.frozen = self.add_weight(
                shape=(),
                initializer="zeros",
                trainable=False,
                autocast=False,
                dtype="float32",
                aggregation="mean",
                name="observer_frozen",
            )

    def build(self, input_shape: Shape) -> None:
        """Build the layer and its normalization."""
        super().build(input_shape)
        if self.norm is not None and not self.norm.built:
            self.norm.build(self.layer.compute_output_shape(input_shape))

    def call(
        self, inputs: Tensor, *args: object, training: bool | None = None, **kwargs: object
    ) -> Any:
        """Run the layer with rounded weights."""
        if self.norm is not None:
            outputs = self._normalized(inputs, training)
        else:
            outputs = self._plain(inputs, training, *args, **kwargs)
        if self.linear_quantizer is not None:
            outputs = self.linear_quantizer(outputs, training=training)
        if self.activation is not None:
            outputs = self._activate(outputs, training)
        if self.norm is None:
            self._regularize(outputs)
        return outputs

    def _activate(self, outputs: Tensor, training: bool | None) -> Tensor:
        activation: Any = self.activation
        if self.activation_bits is None:
            return activation(outputs)
        if activation is keras.activations.silu:
            return swish(outputs, self.activation_bits)
        if training or getattr(activation, "__name__", "") in INT8_ACTIVATIONS:
            return activation(outputs)
        # Of its operators, int8 ones where scales are known on both sides, some round in between.
        return as_float(activation(as_float(outputs)))

    def activated_layer(self) -> Any:
        """This layer where the activation is its own, else the innermost one."""
        # No property: loading follows attributes, and would go round in circles.
        return self.base if self.activation is None else self

    def _regularize(self, outputs: Tensor) -> None:
        if self.regularizer is not None:
            # As Keras does it, for each sample of the batch.
            value = self.regularizer(outputs)
            self.add_loss(value / ops.cast(ops.shape(outputs)[0], value.dtype))

    def _plain(self, inputs: Tensor, training: bool | None, *args: object, **kwargs: object) -> Any:
        base = self.base
        pairs = self.quantized_pairs(training)
        if type(base) in TRANSPOSED and not training:
            zeros = ops.zeros((base.filters,), self.compute_dtype)
            bias = ops.cast(base.bias, self.compute_dtype) if base.use_bias else zeros
            shift = _never_zero(self._as_integers(bias, pairs))
            return self._with_bias(inputs, pairs, shift, training)
        if type(base) in CHANNEL_AXES and getattr(base, "bias", None) is not None and not training:
            bias = self._as_integers(ops.convert_to_tensor(base.bias), pairs)
            pairs = [*(pair for pair in pairs if pair[0] is not base.bias), (base.bias, bias)]
        if type(base) is keras.layers.Dense:
            return self._dense(inputs, pairs)
        outputs = self._run(inputs, pairs, training, *args, **kwargs)
        if type(base) is keras.layers.Embedding and self.activation_bits and for_tflite():
            # The rows lie on the table's grid already; saying so tells TFLite's converter the grid,
            # while ONNX has no operator for it.
            limit = ops.max(ops.abs(pairs[0][1]))
            outputs = keras.quantizers.fake_quant_with_min_max_vars(
                outputs, -limit, limit, num_bits=self.weight_bits, narrow_range=True
            )
        return outputs

    def _run(
        self,
        inputs: Tensor,
        pairs: list[tuple[Any, Tensor]],
        training: bool | None,
        *args: object,
        **kwargs: object,
    ) -> Any:
        """The layer with other weights, in a form that converters know."""
        base = self.base
        if training or not has_single_form(base):
            return run_with(base, pairs, inputs, *args, **kwargs)
        values = {id(variable): tensor for variable, tensor in pairs}
        kernel, bias = (
            None if v is None else values.get(id(v), ops.convert_to_tensor(v))
            for v in (base.kernel, base.bias)
        )
        return where_run(
            lambda: run_with(base, pairs, inputs, *args, **kwargs),
            lambda: convolve(base, kernel, bias, inputs),
        )

    def _as_integers(self, bias: Tensor, pairs: list[tuple[Any, Tensor]]) -> Tensor:
        """The bias as the file has it."""
        targets = kernels(self.layer, tuple(self.axes))
        if self.activation_bits is None or is_clustered(self.layer) or not targets:
            # A clustered kernel has steps of its own.
            return bias
        kernel = {id(v): t for v, t in pairs}[id(targets[-1])]
        axes = CHANNEL_AXES[type(self.base)][targets[-1].name]
        return rounded_bias(bias, self.input_step, channel_steps(kernel, axes))

    def _dense(self, inputs: Tensor, pairs: list[tuple[Any, Tensor]]) -> Tensor:
        # As a matrix: with more axes the converter leaves the bias outside the int8 product.
        if len(inputs.shape) == 2:
            return run_with(self.base, pairs, inputs)
        shape = tuple(inputs.shape[1:-1])
        if None in shape:
            shape = tuple(ops.shape(inputs)[1:-1])
        flat = run_with(self.base, pairs, ops.reshape(inputs, (-1, inputs.shape[-1])))
        return ops.reshape(flat, (-1, *shape, flat.shape[-1]))

    def quantized_pairs(
        self, training: bool | None, scale: Tensor | None = None
    ) -> list[tuple[Any, Tensor]]:
        """The variables whose value is replaced, with rounded kernels.

        Args:
            training: As in `call`.
            scale: Tensor `(channels,)` multiplied into the last kernel before it is rounded.

        Returns:
            Pairs of variable and tensor.
        """
        pairs = self.effective(training)
        values = {id(variable): tensor for variable, tensor in pairs}
        targets = kernels(self.layer, tuple(self.axes))
        result = [(v, t) for v, t in pairs if all(v is not k for k in targets)]
        for variable in targets:
            kernel = values.get(id(variable))
            if kernel is None:
                kernel = ops.convert_to_tensor(variable)
            shaped = None
            if scale is not None and variable is targets[-1]:
                shaped = ops.cast(kernel_scale(self.base, kernel.shape, scale), kernel.dtype)
            result.append((variable, self._rounded(variable.name, kernel, shaped)))
        return result

    def _rounded(self, name: str, kernel: Tensor, scale: Tensor | None) -> Tensor:
        scaled = kernel if scale is None else kernel * scale
        if not is_clustered(self.layer):
            return quantized_weights(scaled, self.weight_bits, self.axes[name])
        # One step for all the shared values, so that they stay as few as they are: after the
        # normalization's scale a channel has the same integers, only its step is scaled.
        limit = ops.maximum(ops.max(ops.abs(ops.stop_gradient(kernel))), 1e-12)
        if scale is None:
            return keras.quantizers.fake_quant_with_min_max_vars(
                kernel, -limit, limit, num_bits=self.weight_bits, narrow_range=True
            )
        limits = ops.maximum(limit * ops.abs(ops.stop_gradient(scale)), 1e-12)
        if type(self.base) is not keras.layers.Conv2D and type(self.base) is not keras.layers.Dense:
            # The converter has no such operator for a channel axis other than the last.
            return quantized_weights(scaled, self.weight_bits, limit=limits)
        # The converter must be told the step, for it is not that of the channel's largest weight.
        limits = ops.reshape(limits, (-1,))
        return keras.quantizers.fake_quant_with_min_max_vars(
            scaled, -limits, limits, num_bits=self.weight_bits, narrow_range=True, axis=-1
        )

    def _normalized(self, inputs: Tensor, training: bool | None) -> Tensor:
        norm, base = self.norm, self.base
        mean = ops.cast(norm.moving_mean, "float32")
        variance = ops.cast(norm.moving_variance, "float32")
        gamma = 1.0 if norm.gamma is None else ops.cast(norm.gamma, "float32")
        beta = 0.0 if norm.beta is None else ops.cast(norm.beta, "float32")
        scale = gamma * ops.rsqrt(variance + norm.epsilon)
        # The product is divided by it; a dead channel's gamma can be 0.
        scale = ops.where(ops.abs(scale) < 1e-6, 1e-6, scale)
        bias = ops.cast(base.bias, "float32") if base.use_bias else ops.zeros_like(mean)
        pairs = self.quantized_pairs(training, scale)
        if not training:
            shift = self._as_integers((bias - mean) * scale + beta, pairs)
            if type(base) in TRANSPOSED:
                shift = _never_zero(shift)
            outputs = self._with_bias(inputs, pairs, shift, training)
            if self.regularizer is not None:
                shape = self._along_channels(outputs)
                product = ops.cast(outputs, "float32") - ops.reshape(shift, shape)
                self._regularize(product / ops.reshape(scale, shape) + ops.reshape(bias, shape))
            return outputs
        product = ops.cast(self._with_bias(inputs, pairs, None, training), "float32")
        rank = len(product.shape)
        channel = norm.axis % rank
        shape = self._along_channels(product)
        product = product / ops.reshape(scale, shape) + ops.reshape(bias, shape)
        self._regularize(product)
        others = [axis for axis in range(rank) if axis != channel]
        batch_mean, batch_variance = ops.moments(product, axes=others)
        still = ops.logical_or(ops.convert_to_tensor(self.frozen) > 0.0, not norm.trainable)
        kept = ops.where(still, 1.0, norm.momentum)
        norm.moving_mean.assign(kept * mean + (1.0 - kept) * batch_mean)
        norm.moving_variance.assign(kept * variance + (1.0 - kept) * batch_variance)
        batch_mean = ops.where(still, mean, batch_mean)
        batch_variance = ops.where(still, variance, batch_variance)
        unit = (product - ops.reshape(batch_mean, shape)) * ops.reshape(
            ops.rsqrt(batch_variance + norm.epsilon), shape
        )
        scaled = unit * (gamma if norm.gamma is None else ops.reshape(gamma, shape))
        shifted = scaled + (beta if norm.beta is None else ops.reshape(beta, shape))
        return ops.cast(shifted, self.compute_dtype)

    def _with_bias(
        self,
        inputs: Tensor,
        pairs: list[tuple[Any, Tensor]],
        bias: Tensor | None,
        training: bool | None,
    ) -> Tensor:
        base = self.base
        if base.use_bias:
            value = ops.zeros_like(ops.convert_to_tensor(base.bias)) if bias is None else bias
            pairs = [*pairs, (base.bias, value)]
            bias = None
        if type(base) is keras.layers.Dense:
            outputs = self._dense(inputs, pairs)
        else:
            outputs = self._run(inputs, pairs, training)
        if bias is None:
            return outputs
        shape = self._along_channels(outputs)
        return outputs + ops.cast(ops.reshape(bias, shape), outputs.dtype)

    def _along_channels(self, outputs: Tensor) -> list[int]:
        """The shape in which a value for each channel broadcasts against an output."""
        shape = [1] * len(outputs.shape)
        first = getattr(self.base, "data_format", "channels_last") == "channels_first"
        shape[1 if first else -1] = -1
        return shape

    def final_pairs(self) -> list[tuple[Any, Tensor]]:
        """As in `Quantized`."""
        return self.quantized_pairs(False)

    def get_config(self) -> dict[str, Any]:
        """Configuration, the layer's and its normalization's included."""
        activation = self.activation
        return {
            **super().get_config(),
            "norm": keras.saving.serialize_keras_object(self.norm) if self.norm else None,
            "weight_bits": self.weight_bits,
            "axes": {name: list(value) for name, value in self.axes.items()},
            "activation": None if activation is None else keras.activations.serialize(activation),
            "activation_bits": self.activation_bits,
            "regularizer": keras.regularizers.serialize(self.regularizer)
            if self.regularizer
            else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make the wrapper from `get_config`."""
        config = dict(config)
        if config.get("norm") is not None:
            config["norm"] = keras.saving.deserialize_keras_object(config["norm"])
        return super().from_config(config)


def _never_zero(bias: Tensor) -> Tensor:
    """A bias that the converter does not drop as zero.

    Without a bias it leaves the ReLU behind a transposed convolution apart, and both in float. In
    the file's 32-bit integers the value is zero all the same.
    """
    return ops.where(bias == 0.0, ops.cast(1e-30, bias.dtype), bias)


@keras.saving.register_keras_serializable(package="keras_kd")
class QuantizedAffine(ReadsIntegers, Quantized):
    """A BatchNormalization that stands alone, a Rescaling or a Normalization, for int8.

    All three are `y = x * scale + shift` for each channel at inference, which is computed as a 1x1
    depthwise convolution: TFLite's int8 form of that has an exact weight for each channel and a
    32-bit bias, while a product and a sum with constants stay float.

    Args:
        layer: The layer; channels on the last axis, input of rank 2, 3 or 4.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    kind = "affine"
    stands_for = (
        keras.layers.BatchNormalization,
        keras.layers.Rescaling,
        keras.layers.Normalization,
    )

    @classmethod
    def treat(
        cls, layer: keras.Layer, config: dict[str, Any], name: str, graph: Graph, masked: bool
    ) -> Treatment:
        """As in `Quantized`."""
        shape = graph.input_shape(name) or ()
        rank = len(shape) if graph.called_once(name) else 0
        if rank not in (2, 3, 4):
            return Treatment("float", "called more than once, or its input is not of rank 2 to 4")
        axis = config.get("axis", -1)
        axes = [axis] if isinstance(axis, int) else list(axis or [])
        if type(layer) is not keras.layers.Rescaling and [a % rank for a in axes] != [rank - 1]:
            return Treatment("float", "normalizes over another axis than the last")
        if config.get("invert") or not isinstance(shape[-1], int):
            return Treatment("float", "no int8 form of this normalization is known")
        if type(layer) is keras.layers.Rescaling and not all(
            isinstance(config[key], (int, float)) for key in ("scale", "offset")
        ):
            return Treatment("float", "rescales by arrays; use Normalization")
        return Treatment("affine", fuses=type(layer) is keras.layers.BatchNormalization)

    def call(  # type: ignore[override]
        self, inputs: Tensor, training: bool | None = None
    ) -> Tensor:
        """Run the layer itself where its statistics learn, else its affine map."""
        if training and type(self.layer) is keras.layers.BatchNormalization:
            return self.layer(inputs, training=training)
        channels = inputs.shape[-1]
        scale, shift = self.scale_and_shift(channels)
        shift = rounded_bias(shift, self.input_step, channel_steps(scale, (0,)))
        return per_channel_affine(inputs, scale, shift)

    def scale_and_shift(self, channels: int) -> tuple[Tensor, Tensor]:
        """The map's two tensors `(channels,)`.

        Args:
            channels: Size of the last axis.

        Returns:
            Scale and shift.
        """
        layer = self.layer
        if type(layer) is keras.layers.BatchNormalization:
            scale = ops.rsqrt(ops.convert_to_tensor(layer.moving_variance) + layer.epsilon)
            if layer.gamma is not None:
                scale = scale * layer.gamma
            shift = -ops.convert_to_tensor(layer.moving_mean) * scale
            return scale, shift if layer.beta is None else shift + layer.beta
        if type(layer) is keras.layers.Rescaling:
            wide = ops.ones((channels,))
            return wide * layer.scale, wide * layer.offset
        mean, variance = (ops.reshape(v, (-1,)) for v in (layer.mean, layer.variance))
        scale = 1.0 / ops.maximum(ops.sqrt(variance), keras.config.epsilon())
        wide = ops.ones((channels,))
        return wide * scale, wide * (-mean * scale)


def per_channel_affine(inputs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`inputs * scale + shift` on the last axis, as a 1x1 depthwise convolution.

    Args:
        inputs: Tensor of rank 2, 3 or 4, channels last.
        scale: Tensor `(channels,)`.
        shift: Tensor `(channels,)`.

    Returns:
        Tensor of the shape of `inputs`.
    """
    rank, channels = len(inputs.shape), inputs.shape[-1]
    image = inputs
    if rank == 2:
        image = ops.reshape(inputs, (-1, 1, 1, channels))
    elif rank == 3:
        image = ops.expand_dims(inputs, 1)
    kernel = ops.cast(ops.reshape(scale, (1, 1, channels, 1)), inputs.dtype)
    outputs = ops.depthwise_conv(image, kernel, 1, "valid", data_format="channels_last")
    outputs = outputs + ops.cast(shift, inputs.dtype)
    if rank == 2:
        return ops.reshape(outputs, (-1, channels))
    return ops.squeeze(outputs, 1) if rank == 3 else outputs

"""Convolutions as single operators, for the converters.

With a dilation TensorFlow surrounds a convolution by SPACE_TO_BATCH_ND and BATCH_TO_SPACE_ND, and
with groups it calls a function compiled by XLA. TFLite's converter undoes the first only where
nothing is rounded in between and the batch is fixed; of the rest it computes in float. Its own
operators have dilation and groups as attributes, and so have those of TensorFlow, which lacks some
of their kernels on CPU.
"""

from __future__ import annotations

import keras
from keras import ops

from keras_kd.utils.types import Tensor

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


def has_single_form(layer: keras.Layer) -> bool:
    """Whether a layer is a convolution that TensorFlow computes by several operators.

    Args:
        layer: Layer without wrappers.

    Returns:
        True for one- and two-dimensional convolutions with dilation or groups.
    """
    if type(layer) not in (keras.layers.Conv1D, keras.layers.Conv2D, *_DEPTHWISE):
        return False
    return max(layer.dilation_rate) > 1 or (type(layer) not in _DEPTHWISE and layer.groups > 1)


def convolve(layer: keras.Layer, kernel: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """What such a layer computes, in one operator of TensorFlow.

    Args:
        layer: Layer for which `has_single_form` holds.
        kernel: In the place of the layer's own.
        bias: The same, or None.
        inputs: As the layer takes it.

    Returns:
        The layer's output, activated.
    """
    import tensorflow as tf

    first = layer.data_format == "channels_first"
    spatial = len(inputs.shape) - 2
    image, padding = inputs, layer.padding
    if first:
        image = ops.transpose(image, (0, *range(2, spatial + 2), 1))
    if padding == "causal":
        before = (layer.kernel_size[0] - 1) * layer.dilation_rate[0]
        image, padding = ops.pad(image, ((0, 0), (before, 0), (0, 0))), "valid"
    strides, dilations = tuple(layer.strides), tuple(layer.dilation_rate)
    if spatial == 1:
        image, kernel = ops.expand_dims(image, 1), ops.expand_dims(kernel, 0)
        strides, dilations = (1, *strides), (1, *dilations)
    if type(layer) in _DEPTHWISE:
        # One stride for both axes is all that TensorFlow's operator takes.
        strides = (max(strides),) * 2 if 1 in (image.shape[1], kernel.shape[0]) else strides
        outputs = tf.raw_ops.DepthwiseConv2dNative(
            input=image,
            filter=kernel,
            strides=[1, *strides, 1],
            padding=padding.upper(),
            dilations=[1, *dilations, 1],
        )
    else:
        outputs = tf.nn.conv2d(
            image, kernel, [1, *strides, 1], padding.upper(), dilations=[1, *dilations, 1]
        )
    if bias is not None:
        outputs = outputs + bias
    if spatial == 1:
        outputs = ops.squeeze(outputs, 1)
    if first:
        outputs = ops.transpose(outputs, (0, spatial + 1, *range(1, spatial + 1)))
    return layer.activation(outputs)

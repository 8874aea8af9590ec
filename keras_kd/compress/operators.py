"""Layers and operations of Keras that become operators of TFLite with one scale for all tensors.

TFLite prescribes one scale and zero point for inputs and output of its operators that move, choose
or mix values: CONCATENATION, GATHER, MAXIMUM, MAX_POOL_2D, AVERAGE_POOL_2D, MINIMUM, MIRROR_PAD,
PACK, PAD, REDUCE_MAX, RESHAPE, RESIZE_BILINEAR, RESIZE_NEAREST_NEIGHBOR, REVERSE_V2, SELECT_V2,
SLICE, SPACE_TO_DEPTH, SPLIT, SQUEEZE, STRIDED_SLICE, TRANSPOSE, UNPACK and their kin. Given two
ranges the converter drops one of them without a word, so a model must have one as well.

Reference:
    - [TensorFlow Lite's 8-bit quantization specification](
      https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec)
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.utils.types import Tensor

MOVES = {
    "ActivityRegularization",
    "AlphaDropout",
    "Cropping1D",
    "Cropping2D",
    "Dropout",
    "ExpandDims",
    "Flatten",
    "GaussianDropout",
    "GaussianNoise",
    "GlobalMaxPooling1D",
    "GlobalMaxPooling2D",
    "Identity",
    "MaxPooling1D",
    "MaxPooling2D",
    "Permute",
    "RandomBrightness",
    "RandomColorJitter",
    "RandomContrast",
    "RandomErasing",
    "RandomFlip",
    "RandomHue",
    "RandomRotation",
    "RandomSaturation",
    "RandomShear",
    "RandomTranslation",
    "RandomZoom",
    "RepeatVector",
    "Reshape",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "Squeeze",
    "Transpose",
    "UpSampling1D",
    "ZeroPadding1D",
    "ZeroPadding2D",
}
"""Those whose output values are input values (or zero), at the same scale."""

KEEPS = {
    "AdaptiveMaxPool",
    "AdaptiveMaxPooling1D",
    "AdaptiveMaxPooling2D",
    "Amax",
    "Amin",
    "BroadcastTo",
    "Copy",
    "CropImages",
    "DepthToSpace",
    "Diagonal",
    "Flip",
    "Fliplr",
    "Flipud",
    "GetItem",
    "Max",
    "MaxPool",
    "Min",
    "Moveaxis",
    "PadImages",
    "Ravel",
    "Repeat",
    "Roll",
    "Rot90",
    "Slice",
    "SpaceToDepth",
    "StopGradient",
    "Swapaxes",
    "Take",
    "TakeAlongAxis",
    "Tile",
}
"""The same, but the converter may want to be told the scale behind them too."""

PARTS = {"ArraySplit", "Dsplit", "Hsplit", "Split", "Unstack", "Vsplit"}
"""Those that move values too, into several tensors."""

AVERAGES = {"AveragePool", "AveragePooling1D", "AveragePooling2D"}
"""Those that mix values by averaging and keep their scale."""

JOINS = {
    "Append",
    "Concatenate",
    "Dstack",
    "Fmax",
    "Fmin",
    "Hstack",
    "Maximum",
    "Minimum",
    "SliceUpdate",
    "Stack",
    "Vstack",
    "Where",
}
"""Those whose inputs, tensors or constants, and output have one scale."""

ELEMENTWISE = {
    "Absolute",
    "Add",
    "BatchNormalization",
    "Cbrt",
    "Celu",
    "Cos",
    "Divide",
    "ELU",
    "Elu",
    "Exp",
    "Expm1",
    "Fabs",
    "Log",
    "Log10",
    "Log1p",
    "Log2",
    "Logaddexp",
    "Multiply",
    "Negative",
    "Normalization",
    "Power",
    "Reciprocal",
    "Rescaling",
    "Rsqrt",
    "Selu",
    "Sin",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Square",
    "Squareplus",
    "Subtract",
    "TrueDivide",
}
"""Those whose first operator has no scale in common with its input, nor one that is prescribed."""

INT8_ACTIVATIONS = {
    "gelu",
    "hard_swish",
    "hard_silu",
    "leaky_relu",
    "linear",
    "log_softmax",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "softmax",
    "swish",
    "tanh",
}
"""Activations for which the converter has an int8 form."""

AVERAGED_LAST = {
    "AdaptiveAveragePool",
    "AdaptiveAveragePooling1D",
    "AdaptiveAveragePooling2D",
    "AdaptiveAveragePooling3D",
    "AveragePooling3D",
    "Resize",
    "Resizing",
    "UpSampling2D",
}
"""Those that stay float and may end with an operator that mixes values at one scale."""

_RESIZES = {"Resize", "Resizing", "UpSampling2D"}

_REPEATS = (keras.layers.UpSampling1D, keras.layers.UpSampling2D, keras.layers.RepeatVector)


def same_scale(operation: keras.Operation) -> str:
    """How a layer or operation passes on the scale of its input.

    Args:
        operation: Layer without wrappers, or operation.

    Returns:
        `"moves"`, its output values are input values; `"keeps"`, the same, and it is said again
        behind it; `"average"`, it mixes them and the output lies on the input's grid; `"joins"`,
        several inputs or constants share a scale; or `""`.
    """
    kind = type(operation).__name__
    if kind in MOVES:
        return "moves"
    if kind in KEEPS or kind in PARTS:
        return "keeps"
    if kind in AVERAGES:
        return "average"
    if kind in JOINS:
        return "joins"
    if kind in _RESIZES:
        return _resized(operation)
    if kind == "Pad":
        return "keeps" if operation.mode in ("constant", "reflect", "symmetric") else ""
    if kind == "Clip":
        # From 0 it ends with a ReLU, which has a scale of its own.
        return "" if np.ndim(operation.x_min) == 0 and operation.x_min == 0 else "average"
    return ""


def _resized(operation: keras.Operation) -> str:
    if getattr(operation, "antialias", False):
        return ""
    return {"nearest": "keeps", "bilinear": "average"}.get(operation.interpolation, "")


def mixes_last(operation: keras.Operation) -> bool:
    """Whether the last operator of a float layer may be one that averages at one scale.

    The converter hands the scale of what rounds its output back to its input, which such a layer
    computes in a range of its own. What a layer that is not Keras's ends with is not known, nor is
    that of a layer within another.

    Args:
        operation: Layer without wrappers, or operation, that stays float.
    """
    if not type(operation).__module__.startswith("keras."):
        return True
    kind = type(operation).__name__
    return kind in AVERAGED_LAST or isinstance(operation, keras.layers.Wrapper)


def rounds_halves(operation: keras.Operation) -> str:
    """Which way TFLite's kernel rounds what lies half-way between two integers.

    Args:
        operation: Layer without wrappers, or operation.

    Returns:
        `"out"`, away from the integer zero; `"up"`; or `""` where halves are rare.
    """
    kind = type(operation).__name__
    if kind in AVERAGES:
        return "out"
    return "up" if kind in _RESIZES and same_scale(operation) == "average" else ""


def leak(operation: keras.Operation) -> float | None:
    """The slope below zero of a leaky ReLU at the end of a layer; None for any other end.

    Args:
        operation: Layer without wrappers, or operation.
    """
    if type(operation).__name__ in ("LeakyReLU", "LeakyRelu"):
        return float(operation.negative_slope)
    activation = getattr(operation, "activation", None)
    return 0.2 if activation is keras.activations.leaky_relu else None


def repeats(layer: keras.Layer) -> bool:
    """Whether a layer repeats each value, which Keras computes by TILE.

    The converter writes int8 TILE in a version that LiteRT 2.3 does not have, so these are computed
    by RESIZE_NEAREST_NEIGHBOR.

    Args:
        layer: Layer without wrappers.
    """
    return isinstance(layer, _REPEATS) and getattr(layer, "interpolation", "nearest") == "nearest"


def rewritten(operation: keras.Operation, values: Tensor) -> Any | None:
    """What some operations compute, by operators that LiteRT has in int8.

    `ops.tile` and `ops.repeat` become joined copies, `depth_to_space` a transposition: TILE and
    DEPTH_TO_SPACE are written in versions that LiteRT 2.3 does not have.

    Args:
        operation: Operation of a graph.
        values: What it reads.

    Returns:
        The tensor; None for other operations, or where shapes are not known.
    """
    maker = _REWRITTEN.get(type(operation).__name__)
    return None if maker is None else maker(operation, values)


def _tiled(operation: keras.Operation, values: Tensor) -> Any | None:
    counts, rank = operation.repeats, len(values.shape)
    counts = [counts] if isinstance(counts, int) else list(counts)
    if len(counts) > rank or not all(isinstance(count, int) for count in counts):
        return None
    for axis, count in enumerate(counts, rank - len(counts)):
        values = values if count == 1 else ops.concatenate([values] * count, axis=axis)
    return values


def _repeated(operation: keras.Operation, values: Tensor) -> Any | None:
    shape = list(values.shape)
    if not isinstance(operation.repeats, int) or operation.axis is None or None in shape[1:]:
        return None
    axis = operation.axis % len(shape)
    if axis == 0:
        return None
    apart = ops.expand_dims(values, axis + 1)
    joined = ops.concatenate([apart] * operation.repeats, axis=axis + 1)
    shape[axis] *= operation.repeats
    return ops.reshape(joined, (-1, *shape[1:]))


def _spread(operation: keras.Operation, values: Tensor) -> Any | None:
    block, shape = operation.block_size, list(values.shape)
    if operation.data_format != "channels_last" or len(shape) != 4 or None in shape[1:]:
        return None
    _, height, width, channels = shape
    rows = []
    # Row by row, for a transposition of six axes has few kernels.
    parts = ops.split(values, block, axis=-1)
    for part in parts:
        rows.append(ops.reshape(part, (-1, height, 1, width * channels // block)))
    joined = ops.concatenate(rows, axis=2)
    return ops.reshape(joined, (-1, height * block, width * block, channels // block**2))


_REWRITTEN = {"DepthToSpace": _spread, "Repeat": _repeated, "Tile": _tiled}

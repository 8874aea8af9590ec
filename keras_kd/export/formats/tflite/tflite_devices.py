"""Which runtimes take a TFLite file, told from what is in it.

`make runtimes` runs small students in the runtimes themselves and compares. LiteRT.js is told from
its documented data types, MediaPipe is run by `make mediapipe`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from keras_kd.export.formats.onnx.onnx_devices import OPENVINO_INT8
from keras_kd.export.formats.tflite import operator_versions
from keras_kd.export.formats.tflite.contents import read
from keras_kd.export.formats.tflite.known_since import TYPES_SINCE
from keras_kd.export.formats.tflite.operator_versions import Operator

# Where a size comes from that an operator takes as an input.
_SIZES = {"FILL": 0, "RESHAPE": 1, "BROADCAST_TO": 1, "TILE": 1, "RESIZE_BILINEAR": 1}

_INTEGERS = ("INT8", "UINT8", "INT16")

# What moves numbers without computing, and shapes.
_BOOKKEEPING = ("SHAPE", "PACK", "FILL", "STRIDED_SLICE", "UNPACK", "TRANSPOSE")


class TFLiteFile:
    """What the answers need to know of a TFLite file.

    Args:
        path: The file.
        steps: How far its answers lie apart with and without XNNPACK, in steps of the output;
            `None` where the output is no integer.
        images: Names of the inputs whose normalization the file says.
    """

    def __init__(self, path: Path, steps: float | None, images: frozenset[str]) -> None:
        from ai_edge_litert import schema_py_generated as schema

        model = read(path)
        kinds = {value: name for name, value in vars(schema.TensorType).items() if name.isupper()}
        self.steps = steps
        self.images = images
        self.operators = list(operator_versions.operators(model))
        self.minimum, self.unknown = operator_versions.minimum(model)
        self._buffers = model.buffers
        graph = model.subgraphs[0]
        tensors = [tensor for inner in model.subgraphs for tensor in inner.tensors]
        self.inputs = [graph.tensors[i] for i in graph.inputs]
        self.outputs = [graph.tensors[i] for i in graph.outputs]
        self.input_types = [kinds[tensor.type] for tensor in self.inputs]
        self.output_types = [kinds[tensor.type] for tensor in self.outputs]
        self.free = any(
            tensor.shapeSignature is not None and min(tensor.shapeSignature, default=0) < 0
            for tensor in self.inputs
        )
        self.sparse = any(tensor.sparsity is not None for tensor in tensors)
        self.types = {kinds[tensor.type] for tensor in tensors}
        scales = [
            float(scale)
            for tensor in tensors
            if tensor.quantization is not None and tensor.quantization.scale is not None
            for scale in tensor.quantization.scale
        ]
        self.odd_scales = [s for s in scales if not (_LEAST_SCALE < s < math.inf)]
        self.custom = sorted({operator.name for operator in self.operators if operator.custom})

    def constant(self, operator: Operator, slot: int) -> bool:
        """Whether an input of an operator is stored in the file."""
        if slot >= len(operator.inputs) or not operator.inputs[slot]:
            return True
        data = self._buffers[operator.tensor(slot).buffer].data
        return data is not None and len(data) > 0

    def without(self, known: frozenset[str]) -> list[str]:
        """Return the operators that a runtime lacks."""
        return sorted({operator.name for operator in self.operators} - known)

    def hybrid(self) -> list[str]:
        """Return the operators that multiply floats by int8 weights."""
        return sorted(
            {
                operator.name
                for operator in self.operators
                if operator.first == "FLOAT32"
                and "INT8" in operator.inputs[1:]
                and operator.outputs[0] == "FLOAT32"
            }
        )

    def computed_sizes(self) -> list[str]:
        """Return the operators whose target size is computed while running."""
        return sorted(
            {
                operator.name
                for operator in self.operators
                if operator.name in _SIZES and not self.constant(operator, _SIZES[operator.name])
            }
        )

    def several_rows(self) -> str:
        """Say which operators make several rows of a sample, where a free batch has them as one.

        Their sizes in the file are then those of no batch, and who goes by them computes on
        less than there is.

        Returns:
            A sentence that begins with `no`; empty if there are none.
        """
        found = set()
        for operator in self.operators:
            if operator.name not in ("RESHAPE", "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"):
                continue
            before, after = operator.tensor(0), operator.tensors[operator.source.outputs[0]]
            more = _count(after) - _count(before)
            # Of the two others one may pad and one may crop.
            if more and (operator.name == "RESHAPE" or (more < 0) == operator.name.startswith("S")):
                found.add(operator.name)
        moved = sorted(found - {"RESHAPE"})
        if moved:
            return f"no: {', '.join(moved)} of a free batch, computed wrongly (batch=1 runs)"
        if found:
            return "no: RESHAPE of a free batch into several rows (batch=1 runs)"
        return ""

    def rounding(self) -> str:
        """Say how far integer answers are from LiteRT's where its XNNPACK is not what computes."""
        if self.steps is None or round(self.steps) <= 2:
            return "yes"
        return f"yes: up to {self.steps:.0f} steps of the output from LiteRT with XNNPACK"


def litert(file: TFLiteFile) -> str:
    """Answer for LiteRT 2, which ran the file in the export."""
    if file.custom:
        return f"only with Flex: {', '.join(file.custom)}"
    return "yes"


def tensorflow_lite(file: TFLiteFile, version: tuple[int, int]) -> str:
    """Answer for a TensorFlow Lite, by the versions of the operators."""
    if file.custom:
        return f"only with Flex: {', '.join(file.custom)}"
    for operator in file.operators:
        first = operator_versions.since(operator.name, operator.version)
        if first is None:
            return f"no: {operator.name} version {operator.version}, newer than is known here"
        if first > version:
            return "no: {} version {}, since {}.{}".format(operator.name, operator.version, *first)
        typed = TYPES_SINCE.get((operator.name, operator.first), first)
        if typed > version:
            return "no: {} of {}, known to run since {}.{}".format(
                operator.name, operator.first, *typed
            )
    if file.sparse and version < _SPARSE:
        return "no: sparse weights, on which 2.14 crashed"
    return file.rounding()


def micro(file: TFLiteFile) -> str:
    """Answer for TensorFlow Lite for Microcontrollers."""
    lacking = file.without(_MICRO)
    if lacking:
        return f"no: {', '.join(lacking)}"
    for operator in file.operators:
        if operator.name == "DEQUANTIZE" and operator.first in ("FLOAT16", "INT4"):
            return f"no: DEQUANTIZE of {operator.first}"
        # It is run and takes the first scale for all channels.
        if operator.name == "DEQUANTIZE" and operator.scales[0] > 1:
            return "no: DEQUANTIZE with a scale for each channel, computed wrongly"
        if operator.name == "RESIZE_BILINEAR" and operator.first == "INT16":
            return "no: RESIZE_BILINEAR of INT16"
    hybrid = file.hybrid()
    if hybrid:
        return f"no: {', '.join(hybrid)} of floats with int8 weights"
    computed = file.computed_sizes()
    if computed:
        return f"no: {', '.join(computed)} to a size that is computed (batch=1 runs)"
    rows = file.several_rows()
    if rows:
        return rows
    if sum(operator.name == "WHILE" for operator in file.operators) > 1:
        return "no: several WHILE, computed wrongly"
    answer = file.rounding()
    if not set(file.input_types) & set(_INTEGERS):
        answer = "slow: float"
    return (
        f"only batch 1{answer.removeprefix('yes')}"
        if file.free and answer != "slow: float"
        else answer
    )


def ethos(file: TFLiteFile, known: frozenset[str]) -> str:
    """Answer for an Ethos-U, by what its compiler Vela puts on it."""
    if "INT4" in file.types:
        return "no: INT4"
    if file.sparse:
        return "no: sparse weights"
    if not any(operator.outputs[0] in _INTEGERS for operator in file.operators):
        return "no: float, nothing runs on the NPU"
    rows = file.several_rows()
    if rows:
        return rows
    if file.odd_scales:
        return f"no: a scale of {file.odd_scales[0]:.2g}"
    swishes = {operator.first for operator in file.operators if operator.name == "HARD_SWISH"}
    if swishes - {"INT8", "UINT8"}:
        return f"no: HARD_SWISH of {', '.join(sorted(swishes - {'INT8', 'UINT8'}))}"
    left = sorted(
        {
            operator.name
            for operator in file.operators
            if operator.name not in known
            or (known is ETHOS_U55 and _stride(operator) > 3)
            or (operator.name == "GATHER" and _gathers_across(operator))
            or "FLOAT32" in (operator.first, operator.outputs[0])
            or (file.free and operator.name in _BOOKKEEPING and file.computed_sizes())
        }
    )
    if left:
        hint = " (batch=1 puts them on the NPU)" if file.free and file.computed_sizes() else ""
        return f"slow: {', '.join(left)} on the CPU{hint}"
    return "only batch 1" if file.free else "yes"


def mediapipe(file: TFLiteFile) -> str:
    """Answer for MediaPipe's `ImageClassifier`."""
    if len(file.inputs) != 1 or len(file.outputs) != 1:
        return "no: several inputs or outputs"
    (source,), (kind,) = file.inputs, file.input_types
    if source.shape is None or len(source.shape) != 4 or source.shape[3] != 3:
        return "no: its image classifier takes one image of three channels"
    if kind not in ("FLOAT32", "UINT8"):
        return f"no: {kind} input"
    if kind == "FLOAT32" and not file.images:
        return "no: float input without `normalization`"
    return "yes"


def litert_js(file: TFLiteFile) -> str:
    """Answer for LiteRT.js, whose tensors are float32, int32 or uint8."""
    if file.custom:
        return f"no: {', '.join(file.custom)}"
    foreign = sorted({*file.input_types, *file.output_types} - {"FLOAT32", "INT32", "UINT8"})
    if foreign:
        return f"no: {', '.join(foreign)} at its borders"
    return "only batch 1" if file.free else "yes"


def openvino(file: TFLiteFile) -> str:
    """Answer for OpenVINO's reader of TFLite files."""
    if file.sparse:
        return "no: sparse weights"
    convolutions = {"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"}
    if "INT4" in file.types and convolutions & {operator.name for operator in file.operators}:
        return "no: convolutions with INT4 weights"
    if "INT16" in {*file.input_types, *file.output_types}:
        return "no: INT16, computed wrongly in some files"
    if set(file.output_types) & {"INT8", "UINT8"}:
        return OPENVINO_INT8
    return "yes"


def _stride(operator: Operator) -> int:
    # Of other operators there is no such limit, or they have no stride.
    if operator.name != "DEPTHWISE_CONV_2D":
        return 1
    return max(int(operator.option("strideW", 1)), int(operator.option("strideH", 1)))


def _gathers_across(operator: Operator) -> bool:
    # Whether it picks along another axis than the one behind those of the batch.
    return int(operator.option("axis", 0)) != int(operator.option("batchDims", 0))


def _count(tensor: Any) -> int:
    # 1 stands where a size is free.
    return math.prod([] if tensor.shape is None else [int(size) for size in tensor.shape])


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What lies below has lost digits, and its inverse is infinite.
_LEAST_SCALE = 1.2e-38

# The first TensorFlow Lite of which nothing bad about sparse files is known is LiteRT's own.
_SPARSE = (2, 18)

_MICRO = _names(
    """
    ABS ADD ADD_N ARG_MAX ARG_MIN ASSIGN_VARIABLE AVERAGE_POOL_2D BATCH_MATMUL BATCH_TO_SPACE_ND
    BROADCAST_ARGS BROADCAST_TO CALL_ONCE CAST CEIL CONCATENATION CONV_2D COS CUMSUM
    DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV DYNAMIC_UPDATE_SLICE ELU EMBEDDING_LOOKUP EQUAL
    EXP EXPAND_DIMS FILL FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GATHER_ND GREATER
    GREATER_EQUAL HARD_SWISH IF L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LESS LESS_EQUAL LOG
    LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX MAXIMUM MAX_POOL_2D MEAN MINIMUM
    MIRROR_PAD MUL NEG NOT_EQUAL PACK PAD PADV2 PRELU QUANTIZE READ_VARIABLE REDUCE_ALL REDUCE_MAX
    REDUCE_MIN RELU RELU6 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 ROUND RSQRT
    SELECT_V2 SHAPE SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE
    SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM SVDF TANH TRANSPOSE TRANSPOSE_CONV
    UNIDIRECTIONAL_SEQUENCE_LSTM UNPACK VAR_HANDLE WHILE ZEROS_LIKE
    """
)
"""Operators with a kernel in TensorFlow Lite for Microcontrollers of October 2026."""

ETHOS_U55 = _names(
    """
    ABS ADD ARG_MAX AVERAGE_POOL_2D BATCH_MATMUL CONCATENATION CONV_2D DEPTHWISE_CONV_2D ELU EXP
    EXPAND_DIMS FULLY_CONNECTED GELU HARD_SWISH LEAKY_RELU LOG LOGISTIC MAXIMUM MAX_POOL_2D MEAN
    MINIMUM MIRROR_PAD MUL NEG PACK PAD PADV2 PRELU QUANTIZE REDUCE_MAX REDUCE_MIN RELU RELU6
    RELU_0_TO_1 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT SLICE
    SOFTMAX SPLIT SPLIT_V SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM TANH TILE TRANSPOSE
    TRANSPOSE_CONV UNIDIRECTIONAL_SEQUENCE_LSTM UNPACK
    """
)
"""Operators that Vela 5.2 puts on an Ethos-U55 or U65, from its own report and what it compiles."""

ETHOS_U85 = ETHOS_U55 | _names(
    """
    ASSIGN_VARIABLE CAST DIV EQUAL GATHER GREATER GREATER_EQUAL LESS LESS_EQUAL LOGICAL_AND
    LOGICAL_NOT LOGICAL_OR NOT_EQUAL READ_VARIABLE REDUCE_ALL REDUCE_ANY REVERSE_V2 SCATTER_ND
    SELECT SELECT_V2
    """
)
"""The same for an Ethos-U85."""

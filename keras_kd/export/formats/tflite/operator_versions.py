"""Operator versions of TFLite files: what the tensors need, and which runtime knows it.

A TFLite file says for each operator which version of it is meant, and in its metadata which
TensorFlow Lite is the first to know all of them. A runtime refuses a version that it does not know
and trusts one that it does: a file that says too little is loaded and computed wrongly. The tables
here say what `op_version.cc` and `runtime_version.cc` of TensorFlow say, for the operators that
Keras models come to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from keras_kd.export.formats.tflite.known_since import SINCE, TYPES_SINCE

_METADATA = b"min_runtime_version"
# The size that TensorFlow gives the text, whatever its length.
_LENGTH = 16
# The last operator that the older, narrower field of the format can name.
_PLACEHOLDER = 127


@dataclass(frozen=True)
class Operator:
    """One operator of a TFLite file.

    Args:
        name: Such as `"CONV_2D"`; of an operator that is not built in, its own name.
        version: As the file says it.
        inputs: Type of each input, such as `"INT8"`; empty for one that is left out.
        outputs: Type of each output.
        shapes: Of the inputs, as the file has them: 1 stands where a size is free.
        scales: How many scales each input has; 0 for one that is not quantized.
        custom: Whether it is not built in.
        graph: Index of the subgraph.
        source: The operator as an object of the schema.
        tensors: All tensors of the subgraph, as objects of the schema.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    scales: tuple[int, ...]
    custom: bool
    graph: int
    source: Any
    tensors: Any

    @property
    def first(self) -> str:
        """Type of the first input, empty if there is none."""
        return self.inputs[0] if self.inputs else ""

    def option(self, name: str, default: object = 0) -> Any:
        """Return a setting of the operator, or the default where the file has no settings."""
        return getattr(self.source.builtinOptions, name, default)

    def tensor(self, slot: int) -> Any:
        """Return the tensor that an input reads."""
        return self.tensors[self.source.inputs[slot]]


def operators(model: Any) -> Iterator[Operator]:
    """Yield the operators of all graphs of a file.

    Args:
        model: A `ModelT` of LiteRT's schema.
    """
    from ai_edge_litert import schema_py_generated as schema

    kinds = {value: name for name, value in vars(schema.TensorType).items() if name.isupper()}
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if name.isupper()}
    for number, graph in enumerate(model.subgraphs):
        for source in graph.operators or []:
            code = model.operatorCodes[source.opcodeIndex]
            custom = code.customCode is not None
            name = (
                code.customCode.decode()
                if custom
                else names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")
            )
            inputs = [] if source.inputs is None else list(source.inputs)
            outputs = [] if source.outputs is None else list(source.outputs)
            read = [graph.tensors[i] if i >= 0 else None for i in inputs]
            yield Operator(
                name,
                code.version,
                tuple("" if tensor is None else kinds[tensor.type] for tensor in read),
                tuple(kinds[graph.tensors[i].type] for i in outputs),
                tuple(() if tensor is None else _shape(tensor) for tensor in read),
                tuple(0 if tensor is None else _scales(tensor) for tensor in read),
                custom,
                number,
                source,
                graph.tensors,
            )


def needed(operator: Operator) -> int:
    """Return the lowest version that says what an operator of these types computes."""
    if operator.custom:
        return 1
    rule = _RULES.get(operator.name)
    if rule is not None:
        return rule(operator)
    return _BY_TYPE.get(operator.name, {}).get(operator.first, 1)


def since(name: str, version: int) -> tuple[int, int] | None:
    """Return the first TensorFlow Lite that knows a version of an operator, such as `(2, 17)`.

    Returns:
        `None` if it is not known: the operator is newer than this table, or is not built in.
    """
    known = SINCE.get(name, "").split()
    if not 1 <= version <= len(known):
        return None
    major, _, minor = known[version - 1].partition(".")
    return int(major), int(minor)


def minimum(model: Any) -> tuple[tuple[int, int], list[str]]:
    """Return the first TensorFlow Lite that knows all operators of a file.

    Args:
        model: A `ModelT` of LiteRT's schema.

    Returns:
        The version, and the operators of which it is not known who runs them.
    """
    least, unknown = (1, 5), set()
    for operator in operators(model):
        found = since(operator.name, operator.version)
        if found is not None:
            found = max(found, TYPES_SINCE.get((operator.name, operator.first), found))
        if found is None:
            unknown.add(operator.name)
        else:
            least = max(least, found)
    return least, sorted(unknown)


def mend(model: Any) -> None:
    """Make a file say truly which operators and versions it holds, and since when they exist.

    Other tools leave what they add to a file unsaid: ai-edge-quantizer, for one, raises no
    version and names its `DEQUANTIZE` in the newer of two fields only, so that a reader of the
    older one takes it for `ADD`.

    - Versions are raised to what the tensors need, and never lowered.
    - Both fields that name an operator say the same.
    - Entries that no operator uses, over which a runtime may stumble, are gone.
    - `min_runtime_version` of the metadata is what follows from the versions.

    Args:
        model: A `ModelT` of LiteRT's schema, changed in place.
    """
    from ai_edge_litert import schema_py_generated as schema

    used: dict[int, int] = {}
    for operator in operators(model):
        place = operator.source.opcodeIndex
        code = model.operatorCodes[place]
        code.version = max(code.version, needed(operator))
        used.setdefault(place, len(used))
    for code in model.operatorCodes:
        code.builtinCode = max(code.builtinCode, code.deprecatedBuiltinCode)
        code.deprecatedBuiltinCode = min(code.builtinCode, _PLACEHOLDER)
    codes = model.operatorCodes
    model.operatorCodes = [codes[place] for place in used]
    for graph in model.subgraphs:
        for source in graph.operators or []:
            source.opcodeIndex = used[source.opcodeIndex]
    least, _ = minimum(model)
    text = "{}.{}.0".format(*least).encode()
    entries = [entry for entry in model.metadata or [] if entry.name == _METADATA]
    if entries:
        buffer = model.buffers[entries[0].buffer]
    else:
        buffer, entry = schema.BufferT(), schema.MetadataT()
        entry.name, entry.buffer = _METADATA, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata = [*(model.metadata or []), entry]
    buffer.data = list(text.ljust(_LENGTH, b"\0"))


def said(model: Any) -> str:
    """Return the `min_runtime_version` that a file claims, empty if it claims none."""
    for entry in model.metadata or []:
        if entry.name == _METADATA:
            return bytes(model.buffers[entry.buffer].data).rstrip(b"\0").decode()
    return ""


def _shape(tensor: Any) -> tuple[int, ...]:
    return () if tensor.shape is None else tuple(int(size) for size in tensor.shape)


def _scales(tensor: Any) -> int:
    quantization = tensor.quantization
    return 0 if quantization is None or quantization.scale is None else len(quantization.scale)


def _per_channel(operator: Operator, slot: int, axis: int) -> bool:
    # As many scales as channels; a single channel counts where TensorFlow counts it.
    shape = operator.shapes[slot]
    return bool(shape) and operator.scales[slot] == shape[axis]


def _several(operator: Operator, slot: int) -> bool:
    return operator.scales[slot] > 1


def _hybrid(operator: Operator, weights: int) -> bool:
    kinds = (operator.first, operator.inputs[weights], operator.outputs[0])
    return kinds == ("FLOAT32", "INT8", "FLOAT32")


def _all(operator: Operator, first: str, weights: str, result: str) -> bool:
    return (operator.first, operator.inputs[1], operator.outputs[0]) == (first, weights, result)


def _broadcasts(operator: Operator) -> bool:
    wide = max(len(shape) for shape in operator.shapes) > 4
    return wide and len(operator.shapes) > 1 and operator.shapes[0] != operator.shapes[1]


def _convolution(operator: Operator) -> int:
    if _all(operator, "INT16", "INT8", "INT16") and operator.option("quantizedBiasType"):
        return 8
    source, kernel = operator.shapes[:2]
    if source and source[3] != kernel[3]:
        return 6
    if _hybrid(operator, 1):
        return 5 if _per_channel(operator, 1, 0) else 2
    if _all(operator, "INT8", "INT4", "INT8"):
        return 7
    return 3 if _all(operator, "INT8", "INT8", "INT8") else 1


def _depthwise(operator: Operator) -> int:
    if _hybrid(operator, 1):
        return 6 if _per_channel(operator, 1, 3) else 4
    if _all(operator, "INT8", "INT8", "INT8"):
        return 3
    if _all(operator, "INT8", "INT4", "INT8"):
        return 7
    dilated = (
        operator.option("dilationWFactor", 1) != 1 or operator.option("dilationHFactor", 1) != 1
    )
    return 2 if dilated else 1


def _fully_connected(operator: Operator) -> int:
    if _all(operator, "INT16", "INT4", "INT16"):
        return 13
    hybrid = _hybrid(operator, 1)
    if hybrid and _per_channel(operator, 1, 0):
        return 12
    if _all(operator, "INT16", "INT8", "INT16") and operator.option("quantizedBiasType"):
        return 11
    if operator.tensor(1).sparsity is not None:
        return 8
    if _all(operator, "INT16", "INT16", "INT16"):
        return 7
    if len(operator.inputs) == 2:
        return 6
    if operator.option("keepNumDims", False):
        return 5
    if _all(operator, "INT8", "INT8", "INT8"):
        return 4
    if _all(operator, "INT8", "INT4", "INT8"):
        return 10
    if hybrid:
        return 9 if operator.option("asymmetricQuantizeInputs", False) else 3
    return 2 if operator.option("weightsFormat") else 1


def _transposed_convolution(operator: Operator) -> int:
    integers = operator.inputs[1:3] == ("INT8", "INT16") and operator.outputs[0] == "INT16"
    if integers and operator.option("quantizedBiasType"):
        return 5
    if operator.option("fusedActivationFunction"):
        return 4
    if len(operator.inputs) == 4 and operator.inputs[3]:
        return 3
    return 2 if operator.inputs[1] == "INT8" else 1


def _gather(operator: Operator) -> int:
    if operator.first == "INT4":
        return 7
    if operator.inputs[1] == "INT16":
        return 6
    if operator.option("batchDims"):
        return 5
    return {"INT16": 4, "BOOL": 3, "INT8": 2}.get(operator.first, 1)


def _add(operator: Operator) -> int:
    if operator.first == "INT16":
        if operator.tensor(0).quantization is None:
            return 5
        return 1 if operator.option("potScaleInt16", True) else 3
    return {"INT64": 4, "INT8": 2}.get(operator.first, 1)


def _subtract(operator: Operator) -> int:
    if operator.first == operator.outputs[0] == "INT16" and not operator.option(
        "potScaleInt16", True
    ):
        return 5
    if operator.first == "INT64":
        return 4
    if _broadcasts(operator):
        return 3
    return 2 if operator.first == "INT8" else 1


def _multiply(operator: Operator) -> int:
    quantized = any(operator.tensor(slot).quantization is not None for slot in (0, 1))
    if (operator.first == "INT16" and not quantized) or operator.first == "UINT32":
        return 7
    if operator.first in ("COMPLEX64", "INT64", "INT16"):
        return {"COMPLEX64": 6, "INT64": 5, "INT16": 4}[operator.first]
    made = operator.tensors[operator.source.outputs[0]]
    if operator.scales[0] and operator.scales[1] and _scales(made):
        one, two = (operator.tensor(slot).quantization.scale[0] for slot in (0, 1))
        if one * two / made.quantization.scale[0] >= 1.0:
            return 3
    return 2 if operator.first == "INT8" else 1


def _largest(operator: Operator) -> int:
    if operator.first == operator.outputs[0] == "INT16":
        return 4
    if _broadcasts(operator):
        return 3
    return 2 if operator.first == "INT8" else 1


def _transpose(operator: Operator) -> int:
    rank = len(operator.shapes[0])
    if operator.first == "INT4":
        return 7
    if rank > 5:
        return 6
    if operator.first == "INT16":
        return 5
    if rank > 4:
        return 4
    return {"BOOL": 3, "INT8": 2}.get(operator.first, 1)


def _pad(operator: Operator) -> int:
    if operator.first == "BOOL":
        return 5
    if len(operator.shapes[0]) > 4:
        return 4
    return {"INT16": 3, "INT8": 2}.get(operator.first, 1)


def _blocks(operator: Operator) -> int:
    if operator.first == "INT16":
        return 4
    if len(operator.shapes[0]) != 4:
        return 3
    return 2 if operator.first == "INT8" else 1


def _slice(operator: Operator) -> int:
    if operator.first == "UINT32":
        return 6
    if len(operator.shapes[0]) > 4:
        return 5
    return {"INT16": 4, "STRING": 3, "INT8": 2}.get(operator.first, 1)


def _strided_slice(operator: Operator) -> int:
    if operator.option("offset", False):
        return 8
    if operator.first == "UINT32":
        return 7
    if operator.option("ellipsisMask") or operator.option("newAxisMask"):
        return 6
    if operator.first == "STRING":
        return 5
    if len(operator.shapes[0]) > 4:
        return 4
    return {"BOOL": 3, "INT8": 2}.get(operator.first, 1)


def _split(operator: Operator) -> int:
    # The first input is the axis.
    return {"INT16": 4, "INT32": 3, "INT8": 2}.get(operator.inputs[1], 1)


def _resize(operator: Operator) -> int:
    if operator.first == "INT16":
        return 4
    corners = operator.name == "RESIZE_NEAREST_NEIGHBOR" and operator.option("alignCorners", False)
    if operator.option("halfPixelCenters", False) or corners:
        return 3
    return 2 if operator.first == "INT8" else 1


def _dequantize(operator: Operator) -> int:
    if operator.first == "INT4":
        return 6
    if operator.first in ("INT16", "FLOAT16"):
        return 3
    if operator.first == "INT8":
        return 5 if _several(operator, 0) else 2
    return 1


def _quantize(operator: Operator) -> int:
    made = operator.tensors[operator.source.outputs[0]]
    if "INT4" in (operator.first, operator.outputs[0]):
        return 4
    if _scales(made) > 1:
        return 3
    return 2 if operator.outputs[0] == "INT16" else 1


def _matrices(operator: Operator) -> int:
    if operator.first in ("INT16", "INT8"):
        return 3 if operator.first == "INT16" else 2
    return 4 if _hybrid(operator, 1) and operator.option("asymmetricQuantizeInputs", False) else 1


def _sequence(operator: Operator) -> int:
    kinds = (operator.first, operator.inputs[2], operator.outputs[0])
    if kinds == ("INT16", "INT8", "INT16"):
        return 5
    if operator.option("diagonalRecurrentTensors", False):
        return 4
    if kinds == ("FLOAT32", "INT8", "FLOAT32"):
        return 3 if operator.option("asymmetricQuantizeInputs", False) else 2
    return 1


def _embedding(operator: Operator) -> int:
    rows = _several(operator, 1) and _per_channel(operator, 1, 0)
    return 4 if operator.inputs[1] == "INT4" or rows else 1


def _cast(operator: Operator) -> int:
    ends = {operator.first, operator.outputs[0]}
    if "BFLOAT16" in ends:
        return 7
    if operator.first == "INT4" and operator.outputs[0] == "FLOAT32":
        return 6
    steps = ({"FLOAT64", "FLOAT16"}, {"UINT16"}, {"INT8"}, {"UINT32"})
    return next((5 - i for i, kinds in enumerate(steps) if ends & kinds), 1)


def _absolute(operator: Operator) -> int:
    if operator.first == "INT16":
        return 4 if operator.tensor(0).quantization is None else 3
    return {"INT32": 5, "INT8": 2, "UINT8": 2}.get(operator.first, 1)


def _fill(operator: Operator) -> int:
    kinds = {"FLOAT16": 4, "INT8": 3, "INT16": 3, "BOOL": 2, "STRING": 2}
    return kinds.get(operator.inputs[1], 1)


def _select(operator: Operator) -> int:
    if operator.first == "UINT32":
        return 4
    if any(len(shape) == 5 for shape in operator.shapes):
        return 3
    return 2 if operator.first == "INT8" else 1


def _divide(operator: Operator) -> int:
    return 2 if _broadcasts(operator) else 1


_RULES: dict[str, Callable[[Operator], int]] = {
    "ABS": _absolute,
    "ADD": _add,
    "BATCH_MATMUL": _matrices,
    "BATCH_TO_SPACE_ND": _blocks,
    "CAST": _cast,
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEQUANTIZE": _dequantize,
    "DIV": _divide,
    "EMBEDDING_LOOKUP": _embedding,
    "FILL": _fill,
    "FULLY_CONNECTED": _fully_connected,
    "GATHER": _gather,
    "MAXIMUM": _largest,
    "MINIMUM": _largest,
    "MUL": _multiply,
    "PAD": _pad,
    "PADV2": _pad,
    "QUANTIZE": _quantize,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "SELECT": _select,
    "SLICE": _slice,
    "SPACE_TO_BATCH_ND": _blocks,
    "SPLIT": _split,
    "STRIDED_SLICE": _strided_slice,
    "SUB": _subtract,
    "TRANSPOSE": _transpose,
    "TRANSPOSE_CONV": _transposed_convolution,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _sequence,
}

_BYTES = {"INT8": 2}
_WORDS = {"INT8": 2, "INT16": 3}
_BOTH = {"INT8": 2, "INT16": 2}
_CHOICES = {"INT8": 2, "BOOL": 3}

# Version by the type of the first input, where nothing else counts.
_BY_TYPE: dict[str, dict[str, int]] = {
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D", "LOGISTIC", "TANH", "SOFTMAX"), _WORDS),
    **dict.fromkeys(("MEAN", "MIRROR_PAD", "REDUCE_MAX", "REDUCE_MIN", "RELU6", "RSQRT"), _WORDS),
    **dict.fromkeys(("SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "SPLIT_V", "SUM", "LOG_SOFTMAX"), _BYTES),
    **dict.fromkeys(("GREATER", "LESS_EQUAL", "SQUARED_DIFFERENCE", "L2_NORMALIZATION"), _BYTES),
    **dict.fromkeys(("GREATER_EQUAL", "LESS"), _WORDS),
    **dict.fromkeys(("EXP", "LOG", "REDUCE_PROD"), _BOTH),
    **dict.fromkeys(("ARG_MAX", "ARG_MIN"), _CHOICES),
    "BROADCAST_TO": {"": 2, "INT8": 3, "INT16": 3, "FLOAT32": 2, "INT32": 2, "INT64": 2, "BOOL": 2},
    "CONCATENATION": {"UINT32": 4, "INT16": 3, "INT8": 2},
    "EQUAL": {"INT16": 4, "STRING": 3, "INT8": 2},
    "FLOOR_DIV": {"INT16": 3, "INT8": 3, "FLOAT32": 2},
    "FLOOR_MOD": {"INT16": 2, "INT8": 2},
    "GATHER_ND": {"BOOL": 5, "INT16": 3, "STRING": 2},
    "GELU": {"INT8": 2, "UINT8": 2},
    "LEAKY_RELU": {"INT16": 2},
    "NOT_EQUAL": {"STRING": 3, "INT8": 2},
    "PACK": {"UINT32": 4, "INT16": 3, "INT8": 2},
    "RANGE": {"INT64": 2},
    "RELU": {"INT16": 3, "INT8": 2, "UINT8": 2},
    "REVERSE_V2": {"INT8": 3, "BOOL": 2},
    "SELECT_V2": {"UINT32": 2},
    "SIGN": {"INT32": 2},
    "SQUEEZE": {"STRING": 2},
    "TILE": {"INT8": 3, "STRING": 2},
    "TOPK_V2": {"INT16": 3, "INT8": 2},
    "UNPACK": {"INT16": 4, "BOOL": 3, "INT8": 2, "UINT8": 2},
    "WHERE": {"FLOAT32": 2, "INT32": 2, "INT64": 2},
}

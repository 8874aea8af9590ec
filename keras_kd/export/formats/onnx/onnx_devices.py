"""Which runtimes take an ONNX file, told from what is in it.

`make runtimes` runs small students in the runtimes themselves and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_kd.export.formats.onnx.graph import MOVERS

if TYPE_CHECKING:
    import onnx


class ONNXFile:
    """What the answers need to know of an ONNX file.

    Args:
        path: The file.
        steps: How far its answers lie apart with ONNX Runtime's fused kernels and node by node, in
            steps of the output; `None` where the output is not quantized.
    """

    def __init__(self, path: Path, steps: float | None) -> None:
        import onnx
        import onnx.numpy_helper

        model = onnx.load(str(path))
        self.steps = steps
        self.ir = int(model.ir_version)
        self.opset = max(
            (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
            default=1,
        )
        self.nodes = list(_nodes(model.graph))
        self.made = {name: node for node in self.nodes for name in node.output}
        self.types = {entry.name: int(entry.data_type) for entry in model.graph.initializer}
        self._whole = {
            entry.name: onnx.numpy_helper.to_array(entry).reshape(-1).tolist()
            for entry in model.graph.initializer
            if entry.data_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
        }
        self.kinds = {node.op_type for node in self.nodes}
        self.contributed = sorted(
            {node.op_type for node in self.nodes if node.domain not in ("", "ai.onnx")}
        )
        self.free = any(
            entry.type.tensor_type.shape.dim and not entry.type.tensor_type.shape.dim[0].dim_value
            for entry in model.graph.input
        )
        self.half = onnx.TensorProto.FLOAT16 in self.types.values()
        self._unsigned = int(onnx.TensorProto.UINT8)

    def source(self, name: str, through: frozenset[str]) -> Any:
        """Return the node behind a tensor, past nodes of some kinds; `None` if there is none."""
        node = self.made.get(name)
        while node is not None and node.op_type in through:
            node = self.made.get(node.input[0])
        return node

    def float_convolutions(self) -> bool:
        """Whether quantized convolutions have unsigned weights."""
        for node in self.nodes:
            weights = self.made.get(node.input[1]) if node.op_type == "Conv" else None
            if weights is None or weights.op_type != "DequantizeLinear":
                continue
            if self.types.get(weights.input[0]) == self._unsigned:
                return True
        return False

    def quantized_softmax(self) -> bool:
        """Whether a softmax stands between two pairs of quantize and dequantize nodes."""
        read = {name: node for node in self.nodes for name in node.input}
        for node in self.nodes:
            if node.op_type == "Softmax":
                before = self.source(node.input[0], _MOVERS)
                after = read.get(node.output[0])
                if (
                    before is not None
                    and before.op_type == "DequantizeLinear"
                    and after is not None
                    and after.op_type == "QuantizeLinear"
                ):
                    return True
        return False

    def computed_reshapes(self) -> bool:
        """Whether a Reshape goes to a size that is computed while running."""
        return any(
            node.op_type == "Reshape" and node.input[1] in self.made
            for node in self.nodes
            if len(node.input) > 1
        )

    def repeated_products(self) -> bool:
        """Whether a product reads what was repeated, as it is or only moved."""
        for node in self.nodes:
            if node.op_type in ("MatMul", "Gemm", "MatMulNBits"):
                sources = (self.source(name, _MOVERS) for name in node.input[:2])
                if any(each is not None and each.op_type in ("Tile", "Expand") for each in sources):
                    return True
        return False

    def slices_of_a_free_batch(self) -> bool:
        """Whether a Slice takes the batch to an end that stands for any size."""
        for node in self.nodes:
            if not self.free or node.op_type != "Slice":
                continue
            ends = self._whole.get(node.input[2], [])
            named = self._whole.get(node.input[3], []) if len(node.input) > 3 else []
            axes = named or list(range(len(ends)))
            if any(axis == 0 and end == _TO_THE_END for axis, end in zip(axes, ends)):
                return True
        return False

    def both_ways(self) -> bool:
        """Whether a recurrent layer reads its input from both ends."""
        return any(
            entry.name == "direction" and entry.s == b"bidirectional"
            for node in self.nodes
            for entry in node.attribute
        )

    def turned_blocks(self) -> bool:
        """Whether 4-bit weights in full blocks of 32 multiply a transposed and flat tensor."""
        for node in self.nodes:
            if node.op_type != "MatMulNBits":
                continue
            settings = {entry.name: entry.i for entry in node.attribute}
            last = self.made.get(node.input[0])
            flat = last is not None and last.op_type in ("Reshape", "Flatten")
            if flat and settings["block_size"] == 32 and settings["K"] % 32 == 0:
                while last is not None and last.op_type not in _PRODUCTS:
                    if last.op_type == "Transpose":
                        return True
                    last = self.made.get(last.input[0]) if last.input else None
        return False

    def rounding(self) -> str:
        """Say how far integer answers are from ONNX Runtime's where others compute them."""
        if self.steps is None or round(self.steps) <= 2:
            return "yes"
        return f"yes: up to {self.steps:.0f} steps of the output from ONNX Runtime"


def minimum(file: ONNXFile) -> tuple[int, int]:
    """Return the first ONNX Runtime that knows the operator set, the format and the operators."""
    first = max(
        next((version for opset, version in _OPSETS if opset >= file.opset), _UNKNOWN),
        next((version for ir, version in _FORMATS if ir >= file.ir), _UNKNOWN),
    )
    # Its own operators came one by one; this is the oldest in which all of ours were run.
    return max(first, (1, 17)) if file.contributed else first


def onnxruntime(file: ONNXFile, version: tuple[int, int]) -> str:
    """Answer for a version of ONNX Runtime."""
    first = minimum(file)
    if first == _UNKNOWN:
        return f"no: operator set {file.opset} or IR {file.ir}, newer than is known here"
    if first > version:
        what = ", ".join(file.contributed) or f"operator set {file.opset}, IR {file.ir}"
        return "no: {}, since {}.{}".format(what, *first)
    if version < _PLANNED and not file.free and any(n.startswith("Q") for n in file.contributed):
        return "only with enable_mem_pattern=False: else it answers some such files wrongly"
    return "yes"


def web(file: ONNXFile) -> str:
    """Answer for ONNX Runtime in WebAssembly."""
    if "DynamicQuantizeLSTM" in file.kinds:
        return "yes: rounds DynamicQuantizeLSTM differently, by up to 2 % of the output"
    return file.rounding()


def openvino(file: ONNXFile) -> str:
    """Answer for OpenVINO's reader of ONNX files."""
    known = {"MatMulNBits", "DynamicQuantizeLSTM"}
    lacking = [name for name in file.contributed if name not in known]
    if lacking:
        return f"no: {', '.join(lacking)}"
    if "Loop" in file.kinds:
        return "no: Loop"
    if "DynamicQuantizeLSTM" in file.kinds:
        return "yes: rounds DynamicQuantizeLSTM differently, by up to 2 % of the output"
    if file.float_convolutions():
        return "slow: convolutions with unsigned weights are computed in float"
    if "QuantizeLinear" in file.kinds:
        return OPENVINO_INT8
    return "yes"


def tract(file: ONNXFile) -> str:
    """Answer for tract."""
    lacking = [name for name in file.contributed if name != "MatMulNBits"]
    if lacking:
        return f"no: {', '.join(lacking)}"
    missing = sorted(file.kinds & {"Loop", "ReverseSequence"})
    if missing:
        return f"no: {', '.join(missing)}"
    if file.repeated_products():
        return "no: a product of what Tile or Expand repeats, computed wrongly or refused"
    if file.slices_of_a_free_batch():
        return "no: Slice to the end of a free batch (batch=1 runs)"
    if file.quantized_softmax():
        return "no: a quantized Softmax, computed wrongly"
    if file.computed_reshapes():
        return "no: Reshape to a size that is computed" + (" (batch=1 runs)" if file.free else "")
    if file.turned_blocks():
        return "no: MatMulNBits behind Transpose and Reshape, computed wrongly"
    if file.half and "Gemm" in file.kinds:
        return "no: Gemm in float16"
    return file.rounding()


def ncnn(file: ONNXFile) -> str:
    """Answer for ncnn, by way of its converter pnnx."""
    if file.contributed:
        return f"no: {', '.join(file.contributed)}"
    lacking = sorted(file.kinds & {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
    if lacking:
        return f"no: {', '.join(lacking)}"
    if "Loop" in file.kinds:
        return "no: Loop"
    if file.half:
        return "no: float16"
    if file.both_ways():
        return "no: an LSTM or GRU in both directions"
    unseen = sorted(file.kinds - _NCNN)
    if unseen:
        wrong = sorted(_NCNN_WRONG.intersection(unseen))
        told = "computed wrongly in some files" if wrong else "not seen to run"
        return f"no: {', '.join(wrong or unseen)}, {told}"
    return "only batch 1" if file.free else "yes"


def _nodes(graph: onnx.GraphProto) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


OPENVINO_INT8 = (
    "only with LP_TRANSFORMS_MODE=NO, then up to 3 steps of the output away: else its int8 answers "
    "depend on the processor"
)
"""Its kernels compute in float what others compute in integers: halves go either way."""

_MOVERS = frozenset(MOVERS)

# What tf2onnx writes for a slice of -1 elements, all that there are.
_TO_THE_END = 1_000_000_000

# What students of `make runtimes` that ran there are made of: pnnx writes the rest down, too, and
# ncnn then does not load it.
_NCNN = frozenset(
    {
        *("Add", "AveragePool", "Clip", "Concat", "Conv", "Elu", "Erf", "Expand"),
        *("GlobalAveragePool", "LSTM", "LeakyRelu", "MatMul", "MaxPool", "Mul", "Neg"),
        *("Reciprocal", "ReduceMean", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice"),
        *("Softmax", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze"),
    }
)

# It loads these, and a normalization that is made of them is a quarter of its range off.
_NCNN_WRONG = frozenset({"Min", "ReduceSum"})

# Behind these nothing is left of how their inputs lay.
_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulNBits", "LSTM", "GRU")

_UNKNOWN = (99, 0)

# Its plan of memory for fixed sizes was right in this version, and wrong in 1.17.3 for one file.
_PLANNED = (1, 20)

# The first ONNX Runtime that takes an operator set, and a version of the format (IR).
_OPSETS = (
    *((13, (1, 6)), (14, (1, 8)), (15, (1, 9)), (16, (1, 11)), (17, (1, 12)), (18, (1, 14))),
    *((19, (1, 15)), (20, (1, 17)), (21, (1, 18)), (22, (1, 21)), (23, (1, 22))),
)
_FORMATS = ((7, (1, 6)), (8, (1, 9)), (9, (1, 15)), (10, (1, 18)), (11, (1, 22)))

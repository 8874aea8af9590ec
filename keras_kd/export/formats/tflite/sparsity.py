"""TFLite files of pruned models without their zeros.

TFLite has a format for sparse weights: the values that are not zero, their places along one axis,
and where each row of them begins. `DENSIFY` operators write the zeros back when the file is loaded,
so that the other operators run as they always do. TensorFlow's converter has a flag for it
(`EXPERIMENTAL_SPARSITY`), which is not used here: it knows nothing of weights that other tools
quantized, it leaves `DENSIFY` out where zeros come in blocks, which gives NaN or wrong answers for
several precisions, and it encodes int8 weights where LiteRT then refuses the file.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_SAVING = 0.05
"""Share of the file that must be saved: unpacking weights takes time and memory at the start."""

# Where an operator takes its weights. Others, such as GATHER, read parts of a constant in place.
_WEIGHTS = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1}

# Values that stand together behind one index. Wider ones pay where zeros come in blocks.
_RUNS = (1, 2, 4, 8, 16)

# What the tables of a sparse tensor, of its dense form and of the operator between them take.
_OVERHEAD = 400
# The same for the two RESHAPE around a product that becomes a convolution.
_RESHAPES = 700

# No layout saves anything below: an index of one byte beside a float of four.
_LEAST_ZEROS = 0.2

_INDEX_TYPES = (("Uint8Vector", np.uint8), ("Uint16Vector", np.uint16), ("Int32Vector", np.int32))


@dataclass(frozen=True)
class Layout:
    """How an array is stored without zeros.

    Args:
        axis: The axis whose places are indices; the others are gone through in their order.
        run: Values along the axis that stand behind one index.
        bytes: Of values, indices and beginnings of rows.
    """

    axis: int
    run: int
    bytes: int


def smallest(array: np.ndarray) -> Layout:
    """Return the layout of an array that takes the least bytes.

    Args:
        array: Weights, of any shape but that of a scalar.
    """
    nonzero = array != 0
    options = []
    for axis, run in itertools.product(range(array.ndim), _RUNS):
        length = array.shape[axis]
        if length % run:
            continue
        kept = int(np.count_nonzero(_runs(nonzero, axis, run).any(axis=-1)))
        size = kept * (run * array.itemsize + _index_type(length // run - 1)[1].itemsize)
        size += (array.size // length + 1) * _index_type(kept)[1].itemsize
        options.append(Layout(axis, run, size))
    return min(options, key=lambda option: option.bytes)


def encode(blob: bytes) -> tuple[bytes | None, dict[str, Any]]:
    """Store the weights of a TFLite file without zeros, where that saves bytes.

    What the file computes does not change. Weights in int8 that multiply floating-point
    activations stay as they are, since LiteRT refuses them behind a `DENSIFY`; so does it in
    `FULLY_CONNECTED` operators, which become convolutions over one pixel in int8 files.

    Args:
        blob: The file.

    Returns:
        The file, or `None` if less than 5 % would be saved; and `sparsity`, the share of zeros
        among all weights of the file's layers, `tensors`, how many of them are stored sparse, and
        `refused`, how many bytes are not saved because LiteRT would not run it.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    file = _File(model)
    zeros = total = stored = refused = 0
    for kernel in list(file.kernels()):
        array = file.array(kernel.tensor)
        if array is None or not array.size:
            continue
        here = int(array.size - np.count_nonzero(array))
        zeros, total = zeros + here, total + array.size
        if here < _LEAST_ZEROS * array.size:
            continue
        layout = smallest(array)
        saved = array.nbytes - layout.bytes - _OVERHEAD - (_RESHAPES if kernel.product else 0)
        if saved > 0 and kernel.runs:
            file.make_sparse(kernel, array, layout)
            stored += 1
        elif saved > 0:
            refused += saved
    facts = {"sparsity": zeros / max(total, 1), "tensors": stored, "refused": refused}
    if not stored:
        return None, facts
    smaller = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    return (smaller if len(smaller) <= (1 - LEAST_SAVING) * len(blob) else None), facts


def compact(blob: bytes, notes: list[str]) -> tuple[bytes | None, float | None]:
    """Store a file's weights without their zeros, where that makes it smaller.

    Args:
        blob: The file.
        notes: Receives a sentence where zeros stay.

    Returns:
        The smaller file, or `None`; and the share of zeros among its weights.
    """
    try:
        smaller, facts = encode(blob)
    except Exception as error:
        # The file itself is made and may be all that is wanted.
        notes.append(f"its zeros could not be left out ({type(error).__name__})")
        return None, None
    if facts["refused"] > LEAST_SAVING * len(blob):
        notes.append(
            f"{facts['refused']} bytes of zeros stay in weights that LiteRT does not run "
            "sparse, such as int8 ones that multiply floats"
        )
    return smaller, None if smaller is None else facts["sparsity"]


@dataclass
class _Kernel:
    # Index of the constant, who reads it, whether LiteRT runs these behind a DENSIFY, and the
    # int8 product that must become a convolution first.
    tensor: int
    readers: list[Any]
    runs: bool
    product: Any = None


class _File:
    """The main graph of a TFLite file, as the objects of its schema."""

    def __init__(self, model: Any) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema = schema
        self._model = model
        self._graph = model.subgraphs[0]
        self._types = {
            schema.TensorType.FLOAT32: np.dtype(np.float32),
            schema.TensorType.FLOAT16: np.dtype(np.float16),
            schema.TensorType.INT8: np.dtype(np.int8),
        }
        self._names = {
            value: name for name, value in vars(schema.BuiltinOperator).items() if name.isupper()
        }
        self._shared = Counter(
            tensor.buffer for graph in model.subgraphs for tensor in graph.tensors
        )
        self._uses: dict[int, list[tuple[Any, int]]] = {}
        for operator in self._graph.operators or []:
            for slot, index in enumerate([] if operator.inputs is None else operator.inputs):
                self._uses.setdefault(index, []).append((operator, slot))

    def array(self, index: int) -> np.ndarray | None:
        """Return the values of a constant tensor; `None` if it has none of its own."""
        tensor = self._graph.tensors[index]
        data = self._model.buffers[tensor.buffer].data
        kind = self._types.get(tensor.type)
        if kind is None or data is None or tensor.sparsity is not None:
            return None
        shape = [] if tensor.shape is None else list(tensor.shape)
        if not shape or len(data) != kind.itemsize * int(np.prod(shape)):
            return None
        return np.frombuffer(bytes(data), kind).reshape(shape)

    def kernels(self) -> Iterator[_Kernel]:
        """Yield the constants that layers take their weights from, dequantized or not."""
        for index, tensor in enumerate(self._graph.tensors):
            uses = self._uses.get(index, [])
            if not uses or self._model.buffers[tensor.buffer].data is None:
                continue
            read = [self._reads_weights(operator, slot) for operator, slot in uses]
            if not any(read):
                continue
            operators = [operator for operator, _ in uses]
            runs = all(read) and self._shared[tensor.buffer] == 1
            product = None
            if runs and tensor.type == self._schema.TensorType.INT8:
                runs = not any(self._is_float(operator) for operator in operators)
                products = [operator for operator in operators if self._is_int8_product(operator)]
                if products:
                    product = products[0]
                    runs = runs and len(operators) == 1 and self._is_known(product)
            yield _Kernel(index, operators, runs, product)

    def make_sparse(self, kernel: _Kernel, array: np.ndarray, layout: Layout) -> None:
        """Give a constant its sparse form, and its readers the output of a `DENSIFY`."""
        schema, graph = self._schema, self._graph
        if kernel.product is not None:
            self._make_convolution(kernel.product, kernel.tensor)
            array = array[:, None, None]
            layout = Layout(layout.axis and 3, layout.run, layout.bytes)
        sparse = graph.tensors[kernel.tensor]
        dense = schema.TensorT()
        dense.name, dense.type, dense.shape = sparse.name, sparse.type, sparse.shape
        # Buffer 0 is the empty one.
        dense.buffer, dense.quantization = 0, sparse.quantization
        graph.tensors.append(dense)
        # The scales belong to what is computed with; a second copy would be as large as the bias.
        sparse.name, sparse.quantization = sparse.name + b"_sparse", None
        sparse.sparsity, values = self._sparsity(array, layout)
        self._model.buffers[sparse.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
        densify = self._operator("DENSIFY", [kernel.tensor], len(graph.tensors) - 1)
        for reader in kernel.readers:
            reader.inputs = [
                densify.outputs[0] if index == kernel.tensor else index for index in reader.inputs
            ]
        graph.operators = [densify, *graph.operators]

    def _reads_weights(self, operator: Any, slot: int) -> bool:
        if self._name(operator) == "DEQUANTIZE":
            # XNNPACK unpacks such a chain only for operators that it runs itself, and leaves others
            # with memory that nobody wrote: so it is with TRANSPOSE_CONV of a free batch.
            uses = self._uses.get(operator.outputs[0], [])
            return bool(uses) and all(
                self._name(reader) not in ("DEQUANTIZE", "TRANSPOSE_CONV")
                and self._reads_weights(reader, place)
                for reader, place in uses
            )
        return _WEIGHTS.get(self._name(operator)) == slot

    def _is_float(self, operator: Any) -> bool:
        # Of TRANSPOSE_CONV the first input is a shape, so look at what comes out.
        made = self._graph.tensors[operator.outputs[0]].type
        return self._name(operator) != "DEQUANTIZE" and made == self._schema.TensorType.FLOAT32

    def _is_int8_product(self, operator: Any) -> bool:
        # Those with int16 activations are not XNNPACK's, and need no help.
        made = self._graph.tensors[operator.outputs[0]].type
        return self._name(operator) == "FULLY_CONNECTED" and made == self._schema.TensorType.INT8

    def _is_known(self, operator: Any) -> bool:
        # (batch, ..., outputs): a RESHAPE can infer one size, which is that of the batch.
        source, target = (self._graph.tensors[i] for i in (operator.inputs[0], operator.outputs[0]))
        sizes = target.shape if target.shapeSignature is None else target.shapeSignature
        known = sizes is not None and len(sizes) > 1 and min(sizes[1:]) > 0
        return bool(source.type == target.type) and known

    def _make_convolution(self, operator: Any, weights: int) -> None:
        # LiteRT's XNNPACK, which runs int8 convolutions behind a DENSIFY, fails to load a file
        # with such a FULLY_CONNECTED. Over one pixel both compute the same integers.
        schema, graph = self._schema, self._graph
        source, target = operator.inputs[0], operator.outputs[0]
        kernel = graph.tensors[weights]
        outputs, inputs = (int(size) for size in kernel.shape)
        sizes = [int(size) for size in graph.tensors[target].shape]
        batch = int(np.prod(sizes[:-1]))
        free = graph.tensors[target].shapeSignature is not None

        def pixel(of: int, channels: int, suffix: bytes) -> int:
            flat = graph.tensors[of]
            new = schema.TensorT()
            new.name, new.type, new.buffer = flat.name + suffix, flat.type, 0
            new.shape, new.quantization = [batch, 1, 1, channels], flat.quantization
            if free:
                new.shapeSignature = [-1, 1, 1, channels]
            graph.tensors.append(new)
            return len(graph.tensors) - 1

        before = pixel(source, inputs, b"_pixel_in")
        after = pixel(target, outputs, b"_pixel_out")
        fused = operator.builtinOptions.fusedActivationFunction
        kernel.shape = [outputs, 1, 1, inputs]
        bias = operator.inputs[2] if len(operator.inputs) > 2 else -1
        if bias < 0:
            bias = self._zero_bias(source, kernel, outputs)
        options = schema.Conv2DOptionsT()
        options.padding = schema.Padding.VALID
        options.strideW = options.strideH = 1
        options.dilationWFactor = options.dilationHFactor = 1
        options.fusedActivationFunction = fused
        operator.opcodeIndex = self._code("CONV_2D", 3)
        operator.inputs, operator.outputs = [before, weights, bias], [after]
        operator.builtinOptionsType = schema.BuiltinOptions.Conv2DOptions
        operator.builtinOptions = options
        place = next(i for i, other in enumerate(graph.operators) if other is operator)
        graph.operators = [
            *graph.operators[:place],
            self._reshape(source, before, [-1, 1, 1, inputs]),
            operator,
            self._reshape(after, target, [-1, *sizes[1:]]),
            *graph.operators[place + 1 :],
        ]

    def _zero_bias(self, source: int, kernel: Any, outputs: int) -> int:
        # XNNPACK takes no convolution without a bias.
        scale = np.float32(self._graph.tensors[source].quantization.scale[0])
        scales = np.asarray(kernel.quantization.scale, np.float32)
        bias = self._constant(kernel.name + b"_bias", np.zeros(outputs, np.int32))
        quantization = self._schema.QuantizationParametersT()
        quantization.scale = scale * scales
        quantization.zeroPoint = np.zeros(len(scales), np.int64)
        self._graph.tensors[bias].quantization = quantization
        return bias

    def _reshape(self, source: int, target: int, shape: list[int]) -> Any:
        name = self._graph.tensors[target].name + b"_shape"
        constant = self._constant(name, np.asarray(shape, np.int32))
        operator = self._operator("RESHAPE", [source, constant], target)
        operator.builtinOptionsType = self._schema.BuiltinOptions.ReshapeOptions
        operator.builtinOptions = self._schema.ReshapeOptionsT()
        operator.builtinOptions.newShape = shape
        return operator

    def _constant(self, name: bytes, values: np.ndarray) -> int:
        buffer, tensor = self._schema.BufferT(), self._schema.TensorT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        tensor.name, tensor.type = name, self._schema.TensorType.INT32
        tensor.shape, tensor.buffer = list(values.shape), len(self._model.buffers) - 1
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _operator(self, name: str, inputs: list[int], output: int) -> Any:
        operator = self._schema.OperatorT()
        operator.opcodeIndex = self._code(name, 1)
        operator.inputs, operator.outputs = inputs, [output]
        return operator

    def _code(self, name: str, version: int) -> int:
        codes = self._model.operatorCodes
        wanted = getattr(self._schema.BuiltinOperator, name)
        for index, code in enumerate(codes):
            if code.builtinCode == wanted and code.version >= version:
                return index
        code = self._schema.OperatorCodeT()
        # All operators used here are older than the wider field.
        code.builtinCode = code.deprecatedBuiltinCode = wanted
        code.version = version
        codes.append(code)
        return len(codes) - 1

    def _name(self, operator: Any) -> str:
        code = self._model.operatorCodes[operator.opcodeIndex]
        return self._names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "")

    def _sparsity(self, array: np.ndarray, layout: Layout) -> tuple[Any, np.ndarray]:
        # (rows, places along the axis, run): rows are the other axes in their order.
        blocks = _runs(array, layout.axis, layout.run)
        blocks = blocks.reshape(-1, *blocks.shape[-2:])
        kept = (blocks != 0).any(axis=-1)
        begins = np.concatenate([[0], np.cumsum(np.count_nonzero(kept, axis=1))])
        places = np.nonzero(kept)[1]
        schema = self._schema
        result = schema.SparsityParametersT()
        others = [axis for axis in range(array.ndim) if axis != layout.axis]
        result.traversalOrder = [*others, layout.axis]
        result.blockMap = []
        result.dimMetadata = [self._dense(array.shape[axis]) for axis in others]
        rows = schema.DimensionMetadataT()
        rows.format = schema.DimensionType.SPARSE_CSR
        rows.arraySegmentsType, rows.arraySegments = self._vector(begins)
        rows.arrayIndicesType, rows.arrayIndices = self._vector(places)
        result.dimMetadata.append(rows)
        if layout.run > 1:
            result.traversalOrder.append(array.ndim)
            result.blockMap = [layout.axis]
            result.dimMetadata.append(self._dense(layout.run))
        return result, blocks[kept]

    def _dense(self, size: int) -> Any:
        metadata = self._schema.DimensionMetadataT()
        metadata.format, metadata.denseSize = self._schema.DimensionType.DENSE, int(size)
        return metadata

    def _vector(self, values: np.ndarray) -> tuple[int, Any]:
        name, kind = _index_type(int(values.max(initial=0)))
        vector = getattr(self._schema, f"{name}T")()
        vector.values = values.astype(kind)
        return getattr(self._schema.SparseIndexVector, name), vector


def _runs(array: np.ndarray, axis: int, run: int) -> np.ndarray:
    # (other axes ..., places along the axis, run)
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, run)


def _index_type(greatest: int) -> tuple[str, Any]:
    for name, kind in _INDEX_TYPES:
        if greatest <= np.iinfo(kind).max:
            return name, np.dtype(kind)
    raise ValueError(f"an index of {greatest} does not fit into 32 bits")

"""Reshapes of a free batch, written so that every runtime can follow them.

Keras reshapes to `(batch, ...)`, and the converters write down how the batch is computed: the shape
of a tensor, a slice of it, and a list with the other sizes. Simple runtimes refuse such arithmetic,
compilers put it on the CPU, and LiteRT gives everything behind it memory of unknown size. A target
shape with one size left open says the same: `-1`, or in ONNX `0`, the size that the input has
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


Sizes = list[int | str]
"""Entries of a small integer vector: known ones as numbers, others as names of what they are."""

# Between a number and the name of a free size: no name holds it.
_TIMES = "\n"

# Longer vectors are no shapes.
_RANK = 16


def tflite(model: Any) -> None:
    """Give `RESHAPE` operators constant shapes where a single size is free.

    Args:
        model: A `ModelT` of LiteRT's schema, changed in place.
    """
    for graph in model.subgraphs:
        _TFLite(model, graph).settle()


def onnx(model: ModelProto) -> None:
    """Give nodes that read a shape a constant one, or one that is put together without detours.

    What cannot be constant, such as the first state of an `LSTM`, becomes a list with the free size
    in it, in the one type that shapes have.

    Args:
        model: An `onnx.ModelProto` whose free sizes have names, changed in place.
    """
    # A shape that is known now tells of those behind it.
    while _ONNX(model).settle():
        pass
    _ONNX(model).settle(straighten=True)


class _TFLite:
    def __init__(self, model: Any, graph: Any) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema = schema
        self._model, self._graph = model, graph
        self._names = {
            value: name for name, value in vars(schema.BuiltinOperator).items() if name.isupper()
        }
        self._made = {
            index: operator
            for operator in graph.operators or []
            for index in ([] if operator.outputs is None else operator.outputs)
        }

    def settle(self) -> None:
        changed = False
        for operator in self._graph.operators or []:
            if self._name(operator) != "RESHAPE" or len(operator.inputs) < 2:
                continue
            index = operator.inputs[1]
            if index not in self._made:
                continue
            sizes = self._sizes(index)
            if sizes is None or sum(isinstance(size, str) for size in sizes) != 1 or 0 in sizes:
                continue
            shape = [-1 if isinstance(size, str) else size for size in sizes]
            operator.inputs = [operator.inputs[0], self._constant(shape)]
            operator.builtinOptionsType = self._schema.BuiltinOptions.ReshapeOptions
            operator.builtinOptions = self._schema.ReshapeOptionsT()
            operator.builtinOptions.newShape = shape
            changed = True
        if changed:
            self._clean()

    def _name(self, operator: Any) -> str:
        code = self._model.operatorCodes[operator.opcodeIndex]
        return self._names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "")

    def _sizes(self, index: int) -> Sizes | None:
        operator = self._made.get(index)
        if operator is None:
            return self._constants(index)
        name, inputs = self._name(operator), operator.inputs
        if name == "SHAPE":
            tensor = self._graph.tensors[inputs[0]]
            sizes = tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature
            if sizes is None:
                return None
            return [
                int(size) if size >= 0 else f"{inputs[0]}:{axis}" for axis, size in enumerate(sizes)
            ]
        if name not in _VECTORS:
            return None
        read = [self._sizes(i) for i in inputs]
        if any(sizes is None for sizes in read):
            return None
        known = [sizes for sizes in read if sizes is not None]
        if name == "UNPACK":
            return [known[0][list(operator.outputs).index(index)]]
        if name in ("PACK", "CONCATENATION"):
            return [size for sizes in known for size in sizes]
        if name == "STRIDED_SLICE":
            return self._slice(operator, known)
        if name in ("GATHER", "SLICE"):
            return _picked(known[0], known[1], known[2] if name == "SLICE" else None)
        if name in ("MUL", "REDUCE_PROD"):
            return _product(known if name == "MUL" else [known[0]], f"product {index}")
        return known[0]

    def _slice(self, operator: Any, known: list[Sizes]) -> Sizes | None:
        options = operator.builtinOptions
        numbers = [_whole(sizes) for sizes in known[1:4]]
        if None in numbers or any(len(sizes or []) != 1 for sizes in numbers):
            return None
        (begin,), (end,), (stride,) = (list(sizes or []) for sizes in numbers)
        if options.ellipsisMask or options.newAxisMask:
            return None
        if options.shrinkAxisMask:
            return [known[0][begin]]
        first = None if options.beginMask else begin
        return known[0][first : None if options.endMask else end : stride]

    def _constants(self, index: int) -> Sizes | None:
        tensor = self._graph.tensors[index]
        kinds = {self._schema.TensorType.INT32: np.int32, self._schema.TensorType.INT64: np.int64}
        data = self._model.buffers[tensor.buffer].data
        if tensor.type not in kinds or data is None or len(data) > 8 * _RANK:
            return None
        return [int(value) for value in np.frombuffer(bytes(data), kinds[tensor.type])]

    def _constant(self, shape: list[int]) -> int:
        buffer, tensor = self._schema.BufferT(), self._schema.TensorT()
        buffer.data = np.frombuffer(np.asarray(shape, np.int32).tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        tensor.name, tensor.type = b"shape", self._schema.TensorType.INT32
        tensor.shape, tensor.buffer = [len(shape)], len(self._model.buffers) - 1
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _clean(self) -> None:
        graph = self._graph
        while True:
            read = {i for operator in graph.operators for i in operator.inputs}
            read |= set(graph.outputs)
            kept = [
                operator
                for operator in graph.operators
                if self._name(operator) not in (*_VECTORS, "SHAPE")
                or any(i in read for i in operator.outputs)
            ]
            if len(kept) == len(graph.operators):
                break
            graph.operators = kept
        used = set(graph.inputs) | set(graph.outputs)
        for operator in graph.operators:
            for indices in (operator.inputs, operator.outputs, operator.intermediates):
                used |= set([] if indices is None else indices)
        places = [i for i in range(len(graph.tensors)) if i in used]
        new = {old: place for place, old in enumerate(places)} | {-1: -1}
        number = next(i for i, other in enumerate(self._model.subgraphs) if other is graph)
        graph.tensors = [graph.tensors[i] for i in places]
        graph.inputs = [new[i] for i in graph.inputs]
        graph.outputs = [new[i] for i in graph.outputs]
        for operator in graph.operators:
            operator.inputs = [new[i] for i in operator.inputs]
            operator.outputs = [new[i] for i in operator.outputs]
            if operator.intermediates is not None:
                operator.intermediates = [new[i] for i in operator.intermediates]
        for definition in self._model.signatureDefs or []:
            if definition.subgraphIndex == number:
                for entry in (*definition.inputs, *definition.outputs):
                    entry.tensorIndex = new[entry.tensorIndex]


# Operators that take small vectors apart and put them together.
_VECTORS = (
    *("CAST", "CONCATENATION", "EXPAND_DIMS", "GATHER", "MUL", "PACK", "REDUCE_PROD", "RESHAPE"),
    *("SLICE", "SQUEEZE", "STRIDED_SLICE", "UNPACK"),
)


class _ONNX:
    def __init__(self, model: ModelProto) -> None:
        import onnx as package

        self._package = package
        self._graph = model.graph
        self._made = {name: node for node in model.graph.node for name in node.output}
        self._values = {entry.name: entry for entry in model.graph.initializer}
        self._shapes = dict(self._inferred(model))
        self._recognize()
        # Where a named size can be read.
        self._free = {
            size: (entry.name, axis)
            for entry in model.graph.input
            for axis, size in enumerate(self._shapes.get(entry.name, []))
            if isinstance(size, str)
        }
        self._added: list[Any] = []

    def settle(self, *, straighten: bool = False) -> bool:
        changed = False
        for node in list(self._graph.node):
            slot = _SHAPES.get(node.op_type)
            if slot is None or len(node.input) <= slot or node.input[slot] not in self._made:
                continue
            sizes = self._sizes(node.input[slot])
            if sizes is None or (node.op_type == "Reshape" and 0 in sizes):
                continue
            whole = _whole(sizes) or (
                self._open(node, sizes) if node.op_type == "Reshape" else None
            )
            if whole is not None:
                node.input[slot] = self._constant(f"{node.output[0]}_shape", whole)
                changed = True
            elif straighten and all(isinstance(size, int) or size in self._free for size in sizes):
                node.input[slot] = self._vector(f"{node.output[0]}_shape", sizes)
        nodes = [*self._added, *self._graph.node]
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self._graph.node[:]
        self._graph.node.extend(copies)
        self._clean()
        return changed

    def _inferred(self, model: ModelProto) -> Iterator[tuple[str, Sizes]]:
        try:
            graph = self._package.shape_inference.infer_shapes(model, data_prop=True).graph
        except Exception:
            # It gives up on operators it does not know; then nothing is settled.
            graph = model.graph
        for entry in (*graph.input, *graph.value_info, *graph.output):
            if entry.type.tensor_type.HasField("shape"):
                dims = entry.type.tensor_type.shape.dim
                yield (
                    entry.name,
                    [
                        dim.dim_value
                        if dim.HasField("dim_value")
                        else dim.dim_param or f"{entry.name}:{axis}"
                        for axis, dim in enumerate(dims)
                    ],
                )

    def _recognize(self) -> None:
        # The inference gives a size behind a reshape a name of its own, though it follows.
        known: dict[str, int | str] = {}
        for node in self._graph.node:
            for name in node.output:
                sizes = self._shapes.get(name)
                if sizes is not None:
                    self._shapes[name] = [known.get(str(size), size) for size in sizes]
            if node.op_type == "MatMul":
                one, two = (self._shapes.get(name, [])[:-2] for name in node.input)
                product = self._shapes.get(node.output[0], [])
                if one == two:
                    pairs = list(zip(product, one, strict=False))
                    known.update({size: new for size, new in pairs if isinstance(size, str)})
                    product = [known.get(str(size), size) for size in product]
                    self._shapes[node.output[0]] = product
            target = self._constants(node.input[1]) if node.op_type == "Reshape" else None
            source, made = (self._shapes.get(name) for name in (*node.input[:1], *node.output[:1]))
            if not target or source is None or made is None or len(target) != len(made):
                continue
            if all(size != 0 or axis < len(source) for axis, size in enumerate(target)):
                copied = [source[i] if size == 0 else size for i, size in enumerate(target)]
                for before, after in zip(made, _closed(copied, source), strict=True):
                    if isinstance(before, str) and after != -1:
                        known[before] = after
                self._shapes[node.output[0]] = [known.get(str(size), size) for size in made]

    def _open(self, node: NodeProto, sizes: Sizes) -> list[int] | None:
        # A size that the input has at the same place, and another one that follows from the rest.
        if any(entry.name == "allowzero" and entry.i for entry in node.attribute):
            return None
        source = self._shapes.get(node.input[0], [])
        sizes = _closed(sizes, source)
        shape = []
        for axis, size in enumerate(sizes):
            same = axis < len(source) and size == source[axis]
            shape.append(size if isinstance(size, int) else 0 if same else -1)
        return shape if shape.count(-1) <= 1 else None

    def _constant(self, name: str, values: list[int]) -> str:
        array = np.asarray(values, np.int64)
        self._graph.initializer.append(self._package.numpy_helper.from_array(array, name))
        return name

    def _vector(self, name: str, sizes: Sizes) -> str:
        parts = []
        for place, size in enumerate(sizes):
            if isinstance(size, int):
                parts.append(self._constant(f"{name}_{place}", [size]))
                continue
            entry, axis = self._free[size]
            part = f"{size}_size"
            if not any(part in node.output for node in self._added):
                begin, end = (
                    self._constant(f"{part}_{end}", [axis + i])
                    for i, end in enumerate(("at", "to"))
                )
                make = self._package.helper.make_node
                self._added.append(make("Shape", [entry], [f"{part}_all"]))
                self._added.append(make("Slice", [f"{part}_all", begin, end], [part]))
            parts.append(part)
        self._added.append(self._package.helper.make_node("Concat", parts, [name], axis=0))
        return name

    def _sizes(self, name: str) -> Sizes | None:
        node = self._made.get(name)
        if node is None:
            return self._constants(name)
        kind = node.op_type
        if kind == "Constant":
            return None
        if kind == "Shape":
            sizes = self._shapes.get(node.input[0])
            return None if sizes is None or node.attribute else list(sizes)
        if kind not in _PARTS:
            return None
        read = [self._sizes(entry) for entry in node.input if entry]
        if any(sizes is None for sizes in read):
            return None
        known = [sizes for sizes in read if sizes is not None]
        if kind == "Concat":
            return [size for sizes in known for size in sizes]
        if kind == "Gather":
            return _picked(known[0], known[1], None)
        if kind == "Slice":
            return _sliced(known)
        if kind in ("Mul", "ReduceProd"):
            return _product(known if kind == "Mul" else [known[0]], f"product {name}")
        if kind == "Max":
            return known[0] if all(sizes == known[0] for sizes in known) else None
        return known[0]

    def _constants(self, name: str) -> Sizes | None:
        entry = self._values.get(name)
        if entry is None:
            return None
        array = self._package.numpy_helper.to_array(entry)
        if array.dtype.kind != "i" or array.size > _RANK or array.ndim > 1:
            return None
        return [int(value) for value in array.ravel()]

    def _clean(self) -> None:
        while True:
            read = set(_reads(self._graph))
            kept = [node for node in self._graph.node if any(name in read for name in node.output)]
            if len(kept) == len(self._graph.node):
                return
            copies = [type(node).FromString(node.SerializeToString()) for node in kept]
            del self._graph.node[:]
            self._graph.node.extend(copies)


# The input that is a shape.
_SHAPES = {"Reshape": 1, "Expand": 1, "Tile": 1, "ConstantOfShape": 0}
_PARTS = (
    *("Cast", "Concat", "Gather", "Identity", "Max", "Mul", "ReduceProd", "Reshape", "Slice"),
    *("Squeeze", "Unsqueeze"),
)


def _reads(graph: GraphProto) -> Iterator[str]:
    # Graphs within nodes read the tensors of those around them.
    yield from (entry.name for entry in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _reads(inner)


def _whole(sizes: Sizes) -> list[int] | None:
    found = [size for size in sizes if isinstance(size, int)]
    return found if len(found) == len(sizes) else None


def _picked(sizes: Sizes, places: Sizes, lengths: Sizes | None) -> Sizes | None:
    numbers = _whole(places)
    if numbers is None:
        return None
    if lengths is not None:
        counts = _whole(lengths)
        if counts is None or len(numbers) != 1 or len(counts) != 1:
            return None
        begin, count = numbers[0], counts[0]
        return sizes[begin:] if count == -1 else sizes[begin : begin + count]
    if any(not -len(sizes) <= place < len(sizes) for place in numbers):
        return None
    return [sizes[place] for place in numbers]


def _sliced(known: list[Sizes]) -> Sizes | None:
    # Data, starts, ends, and perhaps axes and steps.
    numbers = [_whole(sizes) for sizes in known[1:]]
    if any(entry is None or len(entry) != 1 for entry in numbers):
        return None
    begin, end, *rest = (entry[0] for entry in numbers if entry is not None)
    step = rest[1] if len(rest) > 1 else 1
    return known[0][begin : min(end, len(known[0])) : step]


def _total(sizes: Sizes) -> tuple[int, str] | None:
    # A number times a name, which is empty if all sizes are known.
    number, names = 1, []
    for size in sizes:
        if isinstance(size, int):
            number *= size
            continue
        factor, _, name = size.rpartition(_TIMES)
        number *= int(factor or 1)
        names.append(name)
    return (number, names[0] if names else "") if len(names) < 2 else None


def _closed(sizes: Sizes, source: Sizes) -> Sizes:
    # An entry of -1 follows from the others where both sides have the same free size in them.
    if sizes.count(-1) != 1:
        return sizes
    whole, rest = _total(source), _total([size for size in sizes if size != -1])
    if not source or whole is None or rest is None or rest[0] < 1 or whole[0] % rest[0]:
        return sizes
    if rest[1] not in ("", whole[1]):
        return sizes
    free = "" if rest[1] else whole[1]
    return [_times(whole[0] // rest[0], free) if size == -1 else size for size in sizes]


def _times(number: int, name: str) -> int | str:
    if not name:
        return number
    return name if number == 1 else f"{number}{_TIMES}{name}"


def _product(factors: list[Sizes], name: str) -> Sizes | None:
    if len(factors) == 1:
        total = _total(factors[0])
        if total is None:
            return [name]
        return [_times(*total)]
    one, two = factors
    if len(one) != 1 or len(two) != 1:
        return None
    return _product([[one[0], two[0]]], name)

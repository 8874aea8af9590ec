"""Keras to ONNX, through tf2onnx, and ONNX Runtime's quantizers. Runs in the worker process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .signature import Arrays, Signature
from .source import Source

OPSETS = range(13, 19)
"""Operator sets that tf2onnx writes and that per-channel quantization can live in."""

DEFAULT_OPSET = 17


class ONNX:
    """Converts a model to ONNX.

    Args:
        source: The model.
        calibration: Samples by input name for static quantization.
        opset: Operator set of the file.
        scratch: Folder for intermediate files.
    """

    def __init__(
        self, source: Source, calibration: Arrays | None, opset: int, scratch: Path
    ) -> None:
        self._source = source
        self._calibration = calibration
        self._opset = opset
        self._scratch = scratch
        self._float: Path | None = None

    def convert(self, precision: str) -> tuple[bytes, dict[str, Any]]:
        """Return the file's bytes and what is worth saying about it."""
        notes: list[str] = []
        path = self._float_file()
        if precision == "float32":
            blob = path.read_bytes()
        elif precision == "float16":
            blob = _float16(path)
        elif precision == "dynamic":
            blob = self._dynamic(path)
        else:
            blob = self._static(path)
        return blob, {"batch": "dynamic", "notes": notes}

    def _float_file(self) -> Path:
        if self._float is None:
            model = _from_keras(self._source, self._opset)
            path = self._scratch / "float32.onnx"
            path.write_bytes(model.SerializeToString())
            _load(path)
            self._float = path
        return self._float

    def _dynamic(self, path: Path) -> bytes:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        target = self._scratch / "dynamic.onnx"
        # Convolutions stay float: their dynamic form was measured 12 times slower than float32.
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Gather", "LSTM", "Attention"],
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return target.read_bytes()

    def _static(self, path: Path) -> bytes:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        target = self._scratch / "int8.onnx"
        quantize_static(
            self._prepared(path),
            target,
            _Reader(self._source.signature, self._calibration or {}),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()

    def _prepared(self, path: Path) -> Path:
        # Folding and fusing first keeps BatchNorm and activations out of the quantized graph.
        from onnxruntime.quantization.shape_inference import quant_pre_process

        target = self._scratch / "prepared.onnx"
        if not target.exists():
            try:
                quant_pre_process(str(path), str(target))
            except Exception:
                # Symbolic shape inference gives up on loops and some reshapes; it only helps.
                quant_pre_process(str(path), str(target), skip_symbolic_shape=True)
        return target


class _Reader:
    """Feeds calibration samples one by one, as ONNX Runtime's calibrator asks for them."""

    def __init__(self, signature: Signature, arrays: Arrays) -> None:
        self._arrays = arrays
        self._count = len(next(iter(arrays.values()))) if arrays else 0
        self._next = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._next >= self._count:
            return None
        i = self._next
        self._next += 1
        return {name: array[i : i + 1] for name, array in self._arrays.items()}


def _from_keras(source: Source, opset: int) -> Any:
    import tf2onnx

    function, specs = source.function()
    concrete = function.get_concrete_function(*specs)
    model, _ = tf2onnx.convert.from_function(
        function,
        input_signature=specs,
        opset=opset,
        custom_op_handlers={"Erfc": (_erfc, [])},
    )
    _fold_captures(model, concrete)
    _rename(model, concrete, source.signature)
    return model


def _erfc(context: Any, node: Any, _name: str, _args: Any) -> None:
    # tf2onnx knows no Erfc, which TensorFlow's GELU is made of: erfc(x) = 1 - erf(x).
    dtype = context.get_dtype(node.output[0])
    shape = context.get_shape(node.output[0])
    source, target = node.input[0], node.output[0]
    consumers = context.find_output_consumers(target)
    erf = context.make_node("Erf", [source], shapes=[shape], dtypes=[dtype])
    one = context.make_const(f"{node.name}_one", np.array(1.0, np.float32))
    context.remove_node(node.name)
    result = context.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=[target],
        shapes=[shape],
        dtypes=[dtype],
    )
    for consumer in consumers:
        context.replace_input(consumer, target, result.output[0])


def _fold_captures(model: Any, concrete: Any) -> None:
    # Constants that a layer made eagerly (Normalization's mean) are captured by the traced
    # function and come out as inputs that every caller would have to supply.
    from onnx import numpy_helper

    values = {
        inner.name.split(":")[0]: outer
        for outer, inner in concrete.graph.captures
        if str(outer.dtype.name) != "resource"
    }
    kept = []
    for entry in model.graph.input:
        base = entry.name.split(":")[0]
        if base in values:
            array = np.asarray(values[base].numpy())
            model.graph.initializer.append(numpy_helper.from_array(array, entry.name))
        else:
            kept.append(entry)
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _rename(model: Any, concrete: Any, signature: Signature) -> None:
    # tf2onnx keeps the order of the function's arguments and results.
    inputs = {
        entry.name: info.name
        for entry, info in zip(model.graph.input, signature.inputs, strict=True)
    }
    outputs = {
        entry.name: info.name
        for entry, info in zip(model.graph.output, signature.outputs, strict=True)
    }
    wanted = {**inputs, **outputs}
    taken = set(wanted.values()) - set(wanted)
    # An inner tensor that already has one of these names moves out of the way.
    shift = {name: f"{name}__inner" for name in taken}

    def new(name: str) -> str:
        return wanted.get(name) or shift.get(name) or name

    _rename_graph(model.graph, new)
    batch = "batch"
    for entries, infos in (
        (model.graph.input, signature.inputs),
        (model.graph.output, signature.outputs),
    ):
        for entry, info in zip(entries, infos, strict=True):
            dims = entry.type.tensor_type.shape.dim
            if len(dims) != len(info.shape):
                # tf2onnx lost the rank, as it does behind some loops.
                del dims[:]
                for _ in info.shape:
                    dims.add()
            for axis, (dim, size) in enumerate(zip(dims, info.shape, strict=True)):
                dim.Clear()
                if axis == 0:
                    dim.dim_param = batch
                elif size is None:
                    dim.dim_param = f"{info.name}_{axis}"
                else:
                    dim.dim_value = size


def _rename_graph(graph: Any, new: Any) -> None:
    for node in graph.node:
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_graph(attribute.g, new)
            for inner in attribute.graphs:
                _rename_graph(inner, new)
    for entries in (graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in entries:
            entry.name = new(entry.name)


def _float16(path: Path) -> bytes:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    return model.SerializeToString()


def _load(path: Path) -> None:
    # tf2onnx writes files with operators it could not convert and only logs so.
    import onnx
    import onnxruntime

    model = onnx.load(path)
    known = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
    foreign = sorted({node.op_type for node in model.graph.node if node.domain not in known})
    if foreign:
        raise ValueError(f"ONNX has no form for the operators {', '.join(foreign)}")
    onnx.checker.check_model(model)
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

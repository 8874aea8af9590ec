"""Keras to ONNX, through tf2onnx, and ONNX Runtime's quantizers. Runs in the worker process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from . import reshapes
from .metrics import sqnr
from .naming import layer_of
from .onnx_aware import quantize_on_grid
from .onnx_graph import name_borders, name_inside, slim
from .onnx_int4 import pack_int4
from .signature import Arrays, Signature
from .source import Source


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

    def convert(self, precision: str, keep: Collection[str] = ()) -> tuple[bytes, dict[str, Any]]:
        """Return the file's bytes and what is worth saying about it.

        Args:
            precision: One of those of `checks.KNOWN`, or `"mixed"`: int8 but for some layers.
            keep: Layers that `"mixed"` leaves in float.
        """
        notes: list[str] = []
        path = self._float_file()
        if precision == "float32":
            blob = path.read_bytes()
        elif precision == "float16":
            blob = _float16(path)
        elif precision == "dynamic":
            blob = self._dynamic(path)
        elif precision == "weight_int4":
            blob = _weight_int4(path)
        elif precision == "int8" and self._source.quantized:
            blob = self._aware()
        else:
            blob = self._static(path, precision, notes, keep)
        return blob, {"batch": "static" if self._source.batch else "dynamic", "notes": notes}

    def _float_file(self) -> Path:
        if self._float is None:
            model = _from_keras(self._source, self._opset, "float")
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
            # Signed weights saturate on x86 without VNNI, as in static files.
            weight_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        import onnx

        return _slimmed(onnx.load(target), path)

    def _static(self, path: Path, precision: str, notes: list[str], keep: Collection[str]) -> bytes:
        from onnxruntime.quantization import QuantFormat

        layout = QuantFormat.QOperator if precision == "int8_qoperator" else QuantFormat.QDQ
        # Signed 8-bit weights are left out: on x86 without VNNI, ONNX Runtime adds pairs of their
        # products in 16 bits and saturates (39 dB became 18), so answers would depend on the
        # processor. Unsigned weights take another path, and 7-bit ones stay within 16 bits.
        found = {}
        for name, unsigned in (("8-bit unsigned weights", True), ("7-bit weights", False)):
            blob = self._quantize(path, layout, keep, unsigned=unsigned)
            found[name] = (self._sqnr(blob, path), blob)
        best = max(found, key=lambda name: found[name][0])
        others = ", ".join(f"{name} {found[name][0]:.1f} dB" for name in found)
        notes.append(f"{best} chosen by their SQNR on the calibration data ({others})")
        return found[best][1]

    def _aware(self) -> bytes:
        # The learned ranges come along as quantize and dequantize nodes; tf2onnx folds the weights,
        # which lie on an integer grid, back to floats.
        model = _from_keras(self._source, self._opset, "quantized")
        keep = {name for node in model.graph.node for name in node.output}
        quantize_on_grid(model)
        slim(model, keep)
        return model.SerializeToString()

    def _quantize(self, path: Path, layout: Any, keep: Collection[str], *, unsigned: bool) -> bytes:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_static

        target = self._scratch / "static.onnx"
        kind = QuantType.QUInt8 if unsigned else QuantType.QInt8
        prepared = self._prepared(path)
        layers = self._source.layers | {info.name for info in self._source.signature.outputs}
        graph = onnx.load(prepared).graph
        weights = {entry.name for entry in graph.initializer}

        def owner(node: Any) -> str | None:
            # An output may have lost its layer on the way; the weights still tell it.
            names = [node.output[0], *(name for name in node.input if name in weights)]
            found = (layer_of(name, layers) for name in names)
            return next((layer for layer in found if layer is not None), None)

        floats = [node.name for node in graph.node if owner(node) in keep]
        quantize_static(
            prepared,
            target,
            _Reader(self._source.signature, self._calibration or {}),
            quant_format=layout,
            per_channel=True,
            activation_type=kind,
            weight_type=kind,
            reduce_range=not unsigned,
            nodes_to_exclude=floats,
        )
        return _slimmed(onnx.load(target), path)

    def _sqnr(self, blob: bytes, path: Path) -> float:
        # Against the float file, on the calibration samples: the evaluation data must not choose.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        outputs = []
        arrays = self._calibration or {}
        feed = {name: array[:64] for name, array in arrays.items()}
        count = len(next(iter(feed.values())))
        step = self._source.batch or count
        for model in (str(path), blob):
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            parts = [
                session.run(None, {name: array[i : i + step] for name, array in feed.items()})
                for i in range(0, count, step)
            ]
            outputs.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        return min(sqnr(a, b) for a, b in zip(*outputs, strict=True))

    def _prepared(self, path: Path) -> Path:
        # Folding and fusing first keeps BatchNorm and activations out of the quantized graph.
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        target = self._scratch / "prepared.onnx"
        if not target.exists():
            _import_shape_inference()
            try:
                # Where it gives up, the inference leaves half a graph in the current folder.
                with contextlib.chdir(self._scratch):
                    quant_pre_process(str(path.absolute()), str(target.absolute()))
            except Exception:
                # Symbolic shape inference gives up on loops and some reshapes; it only helps.
                quant_pre_process(str(path), str(target), skip_symbolic_shape=True)
            model = onnx.load(target)
            for node in model.graph.node:
                # Nodes are told apart by name when some of them stay float.
                node.name = node.output[0]
            onnx.save(model, target)
        return target


def _import_shape_inference() -> None:
    # Its package imports PyTorch wherever that is installed, for a tool that nobody calls here:
    # two thirds of the time that a small int8 file takes.
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        # Missing sympy is met where it is needed.
        with contextlib.suppress(ImportError):
            import onnxruntime.tools.symbolic_shape_infer  # noqa: F401
    finally:
        if absent:
            del sys.modules["torch"]


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


def _from_keras(source: Source, opset: int, form: str) -> Any:
    import tf2onnx

    function, specs = source.function(form)
    concrete = function.get_concrete_function(*specs)
    model, _ = tf2onnx.convert.from_function(
        function,
        input_signature=specs,
        opset=opset,
        custom_op_handlers={"Erfc": (_erfc, [])},
    )
    _fold_captures(model, concrete)
    # tf2onnx keeps the order of the function's arguments and results.
    name_borders(model, source.signature, source.batch)
    reshapes.onnx(model)
    name_inside(model, source.layers)
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


def _slimmed(model: Any, original: Path) -> bytes:
    # The names of the float file stay: they say which layer a tensor comes from.
    import onnx

    graph = onnx.load(original).graph
    slim(model, {name for node in graph.node for name in node.output})
    return model.SerializeToString()


def _float16(path: Path) -> bytes:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return _slimmed(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def _weight_int4(path: Path) -> bytes:
    import onnx

    model = onnx.load(path)
    pack_int4(model)
    return _slimmed(model, path)


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

"""Keras to ONNX, through tf2onnx, and ONNX Runtime's quantizers. Runs in the worker process."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.absent_packages import without
from keras_kd.export.formats.onnx import contents, pads, resizes
from keras_kd.export.formats.onnx.exact_products import (
    PROVEN,
    fitting_scales,
    keep_float,
    make_unsigned,
    prove,
    this_processor,
)
from keras_kd.export.formats.onnx.graph import (
    before_convolutions,
    graphs,
    name_borders,
    name_inside,
    slim,
)
from keras_kd.export.formats.onnx.int4 import pack_int4
from keras_kd.export.formats.onnx.quantization_aware import channel_axis, quantize_on_grid
from keras_kd.export.formats.reasons import no_operator
from keras_kd.export.signature import Arrays, Signature
from keras_kd.export.source import reshapes
from keras_kd.export.source.graph_def import make_plain, needs_plain
from keras_kd.export.source.source_model import Source
from keras_kd.export.tensor_names import layer_of, shorten
from keras_kd.export.verification.metrics import lowest_sqnr

if TYPE_CHECKING:
    import onnx


_GOOD = 30.0
"""The SQNR in dB that signed weights are taken with, whatever unsigned ones have."""

_LOSS = 1.0
"""Decibels that signed weights may cost otherwise."""


class Converter:
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
        self.source = source
        self._calibration = calibration
        self._opset = opset
        self._scratch = scratch
        self._float: Path | None = None
        self._tried: dict[frozenset[str], tuple[dict[bool, bytes], dict[bool, float]]] = {}

    def convert(
        self, precision: str, keep: Collection[str] = ()
    ) -> tuple[bytes, str, list[str], dict[str, Any]]:
        """Return the file's bytes, its kind of batch, notes, and what its row says besides.

        Args:
            precision: One of those of `ONNX.precisions`, or `"mixed"`: int8 but for some layers.
            keep: Layers that `"mixed"` leaves in float.
        """
        import onnx

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
        elif precision == "int8" and self.source.quantized:
            blob = self._aware()
        else:
            blob = self._static(path, precision, notes, keep)
        batch = "static" if self.source.batch else "dynamic"
        facts: dict[str, Any] = {}
        weights = prove(onnx.load_from_string(blob))
        if weights:
            facts["integer_products"] = {
                "weights": weights,
                "computed": list(PROVEN),
                "ran": this_processor(),
            }
        return blob, batch, notes, facts

    def _float_file(self) -> Path:
        if self._float is None:
            model = _from_keras(self.source, self._opset, "float")
            path = self._scratch / "float32.onnx"
            path.write_bytes(model.SerializeToString())
            _load(path)
            self._float = path
        return self._float

    def _dynamic(self, path: Path) -> bytes:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        target, named = self._scratch / "dynamic.onnx", self._scratch / "named.onnx"
        model = _named(onnx.load(path))
        onnx.save(model, named)
        # Convolutions stay float: their dynamic form was measured 12 times slower than float32.
        quantize_dynamic(
            named,
            target,
            # Behind bytes ONNX Runtime would round the weights of a float convolution by itself.
            nodes_to_exclude=before_convolutions(model.graph, "Gather"),
            op_types_to_quantize=["MatMul", "Gemm", "Gather", "LSTM", "Attention"],
            # Signed weights would have to fit 16 bits, as in static files.
            weight_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(target)
        make_unsigned(model)
        return _slimmed(model, path)

    def _static(self, path: Path, precision: str, notes: list[str], keep: Collection[str]) -> bytes:
        from onnxruntime.quantization import QuantFormat

        signed = self._signed_do(path, keep, notes)
        if precision == "int8_qoperator":
            return self._quantize(path, QuantFormat.QOperator, keep, signed=signed)
        return self._tried[frozenset(keep)][0][signed]

    def _signed_do(self, path: Path, keep: Collection[str], notes: list[str]) -> bool:
        """Say whether signed weights are as good as unsigned ones, and note it.

        Both give the same sums on every processor. Signed ones are scaled so that they fit 16 bits,
        which costs up to one of their 8 bits; unsigned ones are computed in float by OpenVINO, and
        slower by ONNX Runtime on processors without VNNI.
        """
        from onnxruntime.quantization import QuantFormat

        key = frozenset(keep)
        if key not in self._tried:
            blobs = {
                signed: self._quantize(path, QuantFormat.QDQ, keep, signed=signed)
                for signed in (True, False)
            }
            levels = {signed: self._sqnr(blob, path) for signed, blob in blobs.items()}
            self._tried[key] = blobs, levels
        levels = self._tried[key][1]
        best = levels[True] >= min(_GOOD, levels[False] - _LOSS)
        chosen, other = ("signed", "unsigned") if best else ("unsigned", "signed")
        notes.append(
            f"{chosen} weights ({levels[best]:.1f} dB by its arithmetic on the calibration data, "
            f"{levels[not best]:.1f} dB with {other} ones)"
        )
        return best

    def _aware(self) -> bytes:
        # The learned ranges come along as quantize and dequantize nodes; tf2onnx folds the weights,
        # which lie on an integer grid, back to floats.
        model = _from_keras(self.source, self._opset, "quantized")
        keep = {name for node in model.graph.node for name in node.output}
        quantize_on_grid(model)
        keep_float(model)
        resizes.keep_rounding(model)
        slim(model, keep)
        return bytes(model.SerializeToString())

    def _quantize(self, path: Path, layout: Any, keep: Collection[str], *, signed: bool) -> bytes:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        target = self._scratch / "static.onnx"
        prepared = self._prepared(path)
        layers = self.source.layers | {info.name for info in self.source.signature.outputs}
        before = onnx.load(prepared)
        graph = before.graph
        weights = {entry.name for entry in graph.initializer}

        def owner(node: onnx.NodeProto) -> str | None:
            # An output may have lost its layer on the way; the weights still tell it.
            names = [node.output[0], *(name for name in node.input if name in weights)]
            found = (layer_of(name, layers) for name in names)
            return next((layer for layer in found if layer is not None), None)

        floats = [node.name for node in graph.node if owner(node) in keep]
        if layout == QuantFormat.QOperator:
            # There is no operator that interpolates bytes and rounds.
            floats += [node.name for node in graph.node if resizes.interpolates(node)]
        quantize_static(
            prepared,
            target,
            _Reader(self.source.signature, self._calibration or {}),
            quant_format=layout,
            per_channel=True,
            # On x86, ONNX Runtime makes signed activations unsigned before it multiplies.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            # Seven bits fit, whatever the weights are; where the channels are known, more may.
            reduce_range=signed,
            nodes_to_exclude=floats,
            extra_options={"TensorQuantOverrides": _fitting(graph)} if signed else None,
        )
        model = onnx.load(target)
        # Of integer operators, it makes some weights signed that were to be unsigned.
        make_unsigned(model)
        keep_float(model)
        resizes.keep_rounding(model, before)
        return _slimmed(model, path)

    def _sqnr(self, blob: bytes, path: Path) -> float:
        # Against the float file, on the calibration samples: the evaluation data must not choose.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # As the file says it, without the kernels that this processor happens to have.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        outputs = []
        arrays = self._calibration or {}
        feed = {name: array[:64] for name, array in arrays.items()}
        count = len(next(iter(feed.values())))
        step = self.source.batch or count
        for model in (str(path), blob):
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            parts = [
                session.run(None, {name: array[i : i + step] for name, array in feed.items()})
                for i in range(0, count, step)
            ]
            outputs.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        return lowest_sqnr(zip(*outputs, strict=True))

    def _prepared(self, path: Path) -> Path:
        # Folding and fusing first keeps BatchNorm and activations out of the quantized graph.
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        target = self._scratch / "prepared.onnx"
        if not target.exists():
            import_shape_inference()
            try:
                # Where it gives up, the inference leaves half a graph in the current folder.
                with contextlib.chdir(self._scratch):
                    quant_pre_process(str(path.absolute()), str(target.absolute()))
            except Exception:
                # Symbolic shape inference gives up on loops and some reshapes; it only helps.
                quant_pre_process(str(path), str(target), skip_symbolic_shape=True)
            onnx.save(_named(onnx.load(target)), target)
        return target


def _named(model: Any) -> Any:
    # Nodes are told apart by name when some of them stay float.
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def import_shape_inference() -> None:
    """Import ONNX Runtime's symbolic shape inference.

    Its package imports PyTorch wherever that is installed, for a tool that nobody calls here: two
    thirds of the time that a small int8 file takes.
    """
    # Missing sympy is met where it is needed.
    with without(("torch",)), contextlib.suppress(ImportError):
        import onnxruntime.tools.symbolic_shape_infer  # noqa: F401


def _fitting(graph: onnx.GraphProto) -> dict[str, list[dict[str, Any]]]:
    """Scales for the weights of a graph, by name, with which signed ones fit 16 bits."""
    from onnx import numpy_helper
    from onnxruntime.quantization import QuantType

    values = {entry.name: entry for entry in graph.initializer}
    axes: dict[str, set[int]] = {}
    for node in graph.node:
        axis = channel_axis(node)
        if axis is not None and len(node.input) > 1 and node.input[1] in values:
            axes.setdefault(node.input[1], set()).add(axis)
    found = {}
    for name, used in axes.items():
        weights = numpy_helper.to_array(values[name])
        # ONNX Runtime's tool has one scale for weights of another rank, or of two uses.
        if len(used) > 1 or weights.dtype != np.float32 or weights.ndim < 2:
            continue
        axis = next(iter(used)) % weights.ndim
        if axis == 0 or weights.ndim == 2 or axis == 1:
            found[name] = [
                {"axis": axis, "quant_type": QuantType.QInt8, "scale": s, "zero_point": np.int8(0)}
                for s in fitting_scales(weights, axis)
            ]
    return found


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
    options = {"opset": opset, "custom_op_handlers": _HANDLERS}
    if needs_plain(concrete.graph.as_graph_def()):
        inputs, outputs = (
            [tensor.name for tensor in tensors if str(tensor.dtype.name) != "resource"]
            for tensors in (concrete.inputs, concrete.outputs)
        )
        graph_def = tf2onnx.tf_loader.from_function(concrete, inputs, outputs)
        make_plain(graph_def)
        model, _ = tf2onnx.convert.from_graph_def(
            graph_def, input_names=inputs, output_names=outputs, **options
        )
    else:
        model, _ = tf2onnx.convert.from_function(function, input_signature=specs, **options)
    _check_operators(model, source)
    _fold_captures(model, concrete)
    # tf2onnx keeps the order of the function's arguments and results.
    name_borders(model, source.signature, source.batch)
    resizes.settle(model)
    reshapes.onnx(model)
    pads.keep_zeros(model)
    pads.end_transposed(model)
    pads.count_groups(model)
    name_inside(model, source.layers)
    return model


def _check_operators(model: onnx.ModelProto, source: Source) -> None:
    # tf2onnx keeps operators that it could not convert under their own names, and only logs so.
    import onnx

    versions = {entry.domain: entry.version for entry in model.opset_import}
    known = {"ai.onnx.ml", "com.microsoft"}
    foreign = [
        (node.op_type, layer_of(shorten(node.name, source.layers), source.layers))
        for graph in graphs(model.graph)
        for node in graph.node
        if node.domain not in known
        and not (
            node.domain in ("", "ai.onnx")
            and onnx.defs.has(node.op_type, max_inclusive_version=versions.get("", 1))
        )
    ]
    if foreign:
        raise ValueError(no_operator("ONNX", foreign))


def _erfc(context: Any, node: onnx.NodeProto, _name: str, _args: object) -> None:
    # TensorFlow's GELU is made of it: erfc(x) = 1 - erf(x).
    erf = _like(context, node, "Erf", node.input[0])
    _replace(context, node, _like(context, node, "Sub", _one(context, node), erf))


def _log1p(context: Any, node: onnx.NodeProto, _name: str, _args: object) -> None:
    more = _like(context, node, "Add", node.input[0], _one(context, node))
    _replace(context, node, _like(context, node, "Log", more))


def _expm1(context: Any, node: onnx.NodeProto, _name: str, _args: object) -> None:
    power = _like(context, node, "Exp", node.input[0])
    _replace(context, node, _like(context, node, "Sub", power, _one(context, node)))


_HANDLERS: dict[str, tuple[Any, list[Any]]] = {
    "Erfc": (_erfc, []),
    "Log1p": (_log1p, []),
    "Expm1": (_expm1, []),
}
"""Operators that tf2onnx does not know."""


def _like(context: Any, node: onnx.NodeProto, kind: str, *inputs: str) -> str:
    """Make an operator with the output of another one."""
    shape, dtype = context.get_shape(node.output[0]), context.get_dtype(node.output[0])
    made = context.make_node(kind, list(inputs), shapes=[shape], dtypes=[dtype])
    return str(made.output[0])


def _one(context: Any, node: onnx.NodeProto) -> str:
    return str(context.make_const(f"{node.name}_one", np.array(1.0, np.float32)).output[0])


def _replace(context: Any, node: onnx.NodeProto, result: str) -> None:
    """Put the result of new operators in the place of one, under its name."""
    target, shape = node.output[0], context.get_shape(node.output[0])
    dtype = context.get_dtype(target)
    context.remove_node(node.name)
    context.make_node("Identity", [result], outputs=[target], shapes=[shape], dtypes=[dtype])


def _fold_captures(model: onnx.ModelProto, concrete: Any) -> None:
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


def _slimmed(model: onnx.ModelProto, original: Path) -> bytes:
    # The names of the float file stay: they say which layer a tensor comes from.
    import onnx

    graph = onnx.load(original).graph
    slim(model, {name for node in graph.node for name in node.output})
    return model.SerializeToString()


def _float16(path: Path) -> bytes:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    # What several operators in float32 read, it casts for each of them, under one name.
    made: set[str] = set()
    for node in list(model.graph.node):
        if node.op_type == "Cast":
            if node.output[0] in made:
                model.graph.node.remove(node)
            made.add(node.output[0])
    return _slimmed(model, path)


def _weight_int4(path: Path) -> bytes:
    import onnx

    model = onnx.load(path)
    pack_int4(model)
    return _slimmed(model, path)


def _load(path: Path) -> None:
    import onnxruntime

    contents.check(path.read_bytes())
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

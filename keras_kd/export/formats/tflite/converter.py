"""Keras to TFLite, through TensorFlow's converter. Runs in the worker process."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.export.formats.base import run_all
from keras_kd.export.formats.tflite.runtime import TFLiteRuntime
from keras_kd.export.formats.tflite.uint8_io import unsigned
from keras_kd.export.signature import Arrays, Signature
from keras_kd.export.source import reshapes
from keras_kd.export.source.model_files import parameter_names
from keras_kd.export.source.source_model import Source
from keras_kd.export.tensor_names import layer_of, shorten, unique
from keras_kd.export.verification.metrics import lowest_sqnr

if TYPE_CHECKING:
    import tensorflow as tf


_SAMPLES = 64
"""Calibration samples that are enough to compare two files."""


class LiteRT:
    """Converts a model to TFLite.

    Args:
        source: The model.
        calibration: Samples by input name for static quantization.
        allow_flex: Whether TensorFlow operators may stay in the file. It then needs a runtime with
            the Flex delegate.
        normalization: `mean` and `std` of pixels 0..255 by image input.
        batch: 1 for files that take one sample at a time, `None` for any number where that works.
    """

    def __init__(
        self,
        source: Source,
        calibration: Arrays | None,
        allow_flex: bool,
        normalization: dict[str, dict[str, list[float]]],
        batch: int | None = None,
    ) -> None:
        self.source = source
        self._parameters = parameter_names(source.signature)
        self._normalization = normalization
        self._calibration = calibration
        self._allow_flex = allow_flex
        # Found with the first conversion, kept for the others: whether any batch size works.
        self._static = None if batch is None else True
        self._asked = batch is not None
        self._converters: dict[tuple[str, str], Any] = {}
        self._float: bytes | None = None
        # The int8 network and what is to be said about it, for both kinds of borders.
        self._quantized: tuple[bytes, list[str]] | None = None

    def convert(self, precision: str, keep: Collection[str] = ()) -> tuple[bytes, str, list[str]]:
        """Return the file's bytes, its kind of batch, and what is worth saying about it.

        Args:
            precision: One of those of `TFLite.precisions`, or `"mixed"`: int8 but for some layers.
            keep: Layers that `"mixed"` leaves in float.
        """
        notes: list[str] = []
        if self._static is None:
            self._static = self._needs_static_batch()
        if self._static and not self._asked:
            notes.append("the batch size is fixed at 1: it does not convert with a free one")
        if self._static and self._asked and self._free_sizes():
            notes.append(f"sizes that the model leaves free are fixed: {self._free_sizes()}")
        if precision == "float32":
            blob = self._float32()
        elif precision in ("int8", "uint8"):
            blob = self._int8(notes)
            if precision == "uint8":
                blob = unsigned(blob, self._normalization)
        else:
            raw = self._mixed(keep) if precision == "mixed" else self._run(precision, notes)
            blob = rename(raw, self.source.signature, self.source.layers)
        return blob, "dynamic" if _free_batch(blob) else "static", notes

    def _needs_static_batch(self) -> bool:
        try:
            blob = self._convert(self._converter("dynamic"), "float32", strict=False)
            if _runs_with_batch(blob, self.source):
                self._float = rename(blob, self.source.signature, self.source.layers)
                return False
            return True
        except Exception as error:
            dynamic = error
        # The static form is the last one there is: its own reason is the one to report, unless it
        # says less than the first one.
        try:
            blob = self._convert(self._converter("static"), "float32", strict=False)
            self._float = rename(blob, self.source.signature, self.source.layers)
        except Exception as error:
            raise error from dynamic
        return True

    def _free_sizes(self) -> str:
        pairs = zip(self.source.signature.inputs, self.source.shapes, strict=True)
        return ", ".join(
            f"`{info.name}` {shape}" for info, shape in pairs if None in info.shape[1:]
        )

    def _run(self, precision: str, notes: list[str]) -> bytes:
        endpoint = "static" if self._static else "dynamic"
        if precision in ("weight_int8", "weight_int4"):
            return self._weights(precision)
        if precision not in ("int8", "int16x8"):
            return self._convert(self._converter(endpoint), precision, strict=False)
        form = "quantized" if self.source.quantized and precision == "int8" else "float"
        # Calibrating a loop ends the process with a segmentation fault; unrolled, it has no loop.
        if self.source.recurrent and form == "float":
            endpoint, form = "static" if self._asked else "dynamic", "unrolled"
            notes[:] = ["recurrent layers are unrolled: the number of time steps is fixed"]
        if precision == "int8" and self.source.quantized:
            return self._convert(self._converter(endpoint, form), "int8", strict=False)
        try:
            blob = self._convert(self._converter(endpoint, form), precision, strict=True)
        except Exception as error:
            blob = self._loose(endpoint, form, precision)
            notes.append(
                f"some operators have no {precision} form and stay float ({_first_line(error)})"
            )
        return self._better(blob, notes) if precision == "int8" else blob

    def _loose(self, endpoint: str, form: str, precision: str) -> bytes:
        try:
            return self._convert(self._converter(endpoint, form), precision, strict=False)
        except Exception as error:
            whole = [i.name for i in self.source.signature.inputs if i.dtype != "float32"]
            if precision != "int16x8" or not whole:
                raise
            names = ", ".join(f"`{name}`" for name in whole)
            raise ValueError(
                "TensorFlow's converter fails to make int16x8 of inputs that are integers, such as "
                f"{names}. Take int8, which it makes"
            ) from error

    def _int8(self, notes: list[str]) -> bytes:
        if self._quantized is None:
            blob = rename(self._run("int8", notes), self.source.signature, self.source.layers)
            self._quantized = blob, list(notes)
        notes[:] = self._quantized[1]
        return self._quantized[0]

    def _mixed(self, keep: Collection[str]) -> bytes:
        import tensorflow as tf

        if self.source.quantized or self.source.recurrent:
            raise ValueError(
                "layers of quantization-aware and recurrent models cannot be kept float"
            )
        endpoint = "static" if self._static else "dynamic"
        converter = self._converter(endpoint)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = self._representative
        # The names that the converter knows its operators by are those of an int8 file.
        raw = self._convert(self._converter(endpoint), "int8", strict=False)
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter,
            debug_dataset=self._representative,
            debug_options=tf.lite.experimental.QuantizationDebugOptions(
                denylisted_nodes=raw_names(raw, keep, self.source.signature, self.source.layers)
            ),
        )
        return self._with_own_names(debugger.get_nondebug_quantized_model())

    def _better(self, blob: bytes, notes: list[str]) -> bytes:
        # A second converter quantizes the float file; which one does better depends on the model.
        blobs = {"TensorFlow's converter": blob}
        try:
            blobs["ai-edge-quantizer"] = self._edge_static()
        except Exception as error:
            notes.append(f"ai-edge-quantizer made no int8 file ({_first_line(error)})")
            return blob
        noise = {}
        for name, candidate in blobs.items():
            try:
                noise[name] = self._sqnr(candidate)
            except (RuntimeError, ValueError) as error:
                notes.append(f"the int8 file of {name} does not run ({_first_line(error)})")
        if not noise:
            return blob
        best = max(noise, key=lambda name: noise[name])
        figures = ", ".join(f"{name} {decibels:.1f} dB" for name, decibels in noise.items())
        notes.append(f"{best} chosen by SQNR on the calibration data ({figures})")
        return blobs[best]

    def _edge_static(self) -> bytes:
        from ai_edge_quantizer import recipe

        quantizer = self._edge(recipe.static_wi8_ai8())
        samples = [
            {name: array[i : i + 1] for name, array in (self._calibration or {}).items()}
            for i in range(min(_SAMPLES, len(next(iter((self._calibration or {}).values())))))
        ]
        ranges = quantizer.calibrate({"serving_default": samples})
        return bytes(quantizer.quantize(ranges, enable_progress_report=False).quantized_model)

    def _weights(self, precision: str) -> bytes:
        from ai_edge_quantizer import recipe

        make = recipe.weight_only_wi8_afp32 if precision.endswith("8") else _wi4
        quantizer = self._edge(make())
        return bytes(quantizer.quantize(enable_progress_report=False).quantized_model)

    def _edge(self, recipe: Any) -> Any:
        try:
            from ai_edge_quantizer import quantizer
        except ImportError as error:
            raise ImportError(
                "ai-edge-quantizer is not installed. Install it with "
                '`pip install "keras_kd[export]"`.'
            ) from error
        return quantizer.Quantizer(bytearray(_with_distinct_names(self._float32())), recipe)

    def _float32(self) -> bytes:
        if self._float is None:
            endpoint = "static" if self._static else "dynamic"
            blob = self._convert(self._converter(endpoint), "float32", strict=False)
            self._float = rename(blob, self.source.signature, self.source.layers)
        return self._float

    def _sqnr(self, blob: bytes) -> float:
        # Against the float file, on the calibration samples: the evaluation data must not choose.
        feed = {name: array[:_SAMPLES] for name, array in (self._calibration or {}).items()}
        outputs = []
        for content in (self._float32(), rename(blob, self.source.signature)):
            runtime = TFLiteRuntime(content)
            outputs.append(run_all(runtime, feed))
        return lowest_sqnr((want, outputs[1][name]) for name, want in outputs[0].items())

    def _converter(self, endpoint: str, form: str = "float") -> Any:
        import tensorflow as tf

        # Making one loads the whole model; a copy of one without settings is as good.
        if (form, endpoint) not in self._converters:
            self._converters[form, endpoint] = tf.lite.TFLiteConverter.from_saved_model(
                self.source.saved_model(form, endpoint), signature_keys=[endpoint]
            )
        return copy.deepcopy(self._converters[form, endpoint])

    def _convert(
        self, converter: tf.lite.TFLiteConverter, precision: str, *, strict: bool
    ) -> bytes:
        import tensorflow as tf

        ops = tf.lite.OpsSet
        converter.target_spec.supported_ops = [ops.TFLITE_BUILTINS]
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision in ("int8", "int16x8"):
            # Fake quantization in the model already carries every range. The converter accepts the
            # strict set of operators only together with calibration.
            if precision == "int16x8" or not self.source.quantized:
                converter.representative_dataset = self._representative
                integer = (
                    ops.TFLITE_BUILTINS_INT8
                    if precision == "int8"
                    else ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
                )
                converter.target_spec.supported_ops = (
                    [integer] if strict else [integer, ops.TFLITE_BUILTINS]
                )
            signature = self.source.signature
            border = tf.int8 if precision == "int8" else tf.int16
            if all(info.dtype == "float32" for info in signature.inputs):
                converter.inference_input_type = border
            if all(info.dtype == "float32" for info in signature.outputs):
                converter.inference_output_type = border
        if self._allow_flex:
            converter.target_spec.supported_ops = [
                *converter.target_spec.supported_ops,
                ops.SELECT_TF_OPS,
            ]
        return self._with_own_names(converter.convert())

    def _representative(self) -> Iterator[dict[str, np.ndarray]]:
        arrays = self._calibration
        if arrays is None:
            raise ValueError("int8 needs calibration data")
        for i in range(len(next(iter(arrays.values())))):
            # By name: a list would have to follow the converter's own order of inputs.
            yield {self._parameters[name]: array[i : i + 1] for name, array in arrays.items()}

    def _with_own_names(self, blob: bytes) -> bytes:
        own = {given: name for name, given in self._parameters.items() if given != name}
        if not own:
            return bytes(blob)
        from ai_edge_litert.tools import flatbuffer_utils

        model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
        for definition in model.signatureDefs:
            for entry in definition.inputs:
                given = entry.name.decode()
                entry.name = own.get(given, given).encode()
        return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _with_distinct_names(blob: bytes) -> bytes:
    """Rename tensors of inner graphs that share a name: ai-edge-quantizer tells them apart by it.

    The converter gives the loops of a bidirectional layer the same names twice.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    if len(model.subgraphs) == 1:
        return blob
    seen: set[bytes] = set()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.name in seen:
                tensor.name += f";{len(seen)}".encode()
            seen.add(tensor.name)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _runs_with_batch(blob: bytes, source: Source) -> bool:
    # Some files claim a free batch and hold a shape that was fixed in conversion.
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_content=blob, num_threads=1)
        runner = interpreter.get_signature_runner()
        feed = {
            info.name: np.zeros((3, *shape[1:]), info.dtype)
            for info, shape in zip(source.signature.inputs, source.shapes, strict=True)
        }
        result = runner(**feed)
    except (RuntimeError, ValueError):
        return False
    return all(len(array) == 3 for array in result.values())


def raw_names(
    blob: bytes, keep: Collection[str], signature: Signature, layers: Collection[str]
) -> list[str]:
    """Return the converter's names of the operators that belong to some layers.

    Args:
        blob: A TFLite file as the converter wrote it.
        keep: Paths of layers.
        signature: Of the Keras model.
        layers: Names of all layers.

    Returns:
        Names of the operators' first outputs.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    known = {info.name for info in signature.outputs}
    borders = {
        (definition.subgraphIndex, entry.tensorIndex): entry.name.decode()
        for definition in model.signatureDefs
        for entry in definition.outputs
    }
    names = []
    for number, graph in enumerate(model.subgraphs):
        for operator in graph.operators:
            index = operator.outputs[0]
            raw = graph.tensors[index].name.decode()
            short = borders.get((number, index)) or shorten(raw, layers)
            if layer_of(short, set(layers) | known) in keep:
                names.append(raw)
    return names


def _free_batch(blob: bytes) -> bool:
    from ai_edge_litert.interpreter import Interpreter

    details = Interpreter(model_content=blob).get_input_details()
    return all(len(row["shape_signature"]) and row["shape_signature"][0] == -1 for row in details)


def rename(blob: bytes, signature: Signature, layers: Collection[str] = ()) -> bytes:
    """Give the tensors at the borders of a TFLite file their Keras names, and settle its shapes.

    The converter names them `serving_default_x:0` and `StatefulPartitionedCall_1:0`. Clients that
    read tensors rather than signatures would otherwise have to guess which is which.

    Args:
        blob: The file.
        signature: Of the Keras model.
        layers: Names of its layers, after which the inner tensors are named.

    Returns:
        The file with renamed tensors, one signature, `serving_default`, and reshapes as
        `reshapes.tflite` writes them.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    reshapes.tflite(model)
    known = {info.name for info in (*signature.inputs, *signature.outputs)}
    fixed: set[tuple[int, int]] = set()
    for definition in model.signatureDefs:
        definition.signatureKey = b"serving_default"
        graph = model.subgraphs[definition.subgraphIndex]
        for entry in (*definition.inputs, *definition.outputs):
            name = entry.name.decode()
            if name not in known:
                raise ValueError(f"the converter renamed a tensor of the signature to `{name}`")
            graph.tensors[entry.tensorIndex].name = entry.name
            fixed.add((definition.subgraphIndex, entry.tensorIndex))
    for number, graph in enumerate(model.subgraphs):
        used = set(known)
        # What the function was called carries a counter of the converting process.
        graph.name = b"main" if number == 0 else f"subgraph_{number}".encode()
        for index, tensor in enumerate(graph.tensors):
            if (number, index) not in fixed:
                name = shorten(tensor.name.decode(), layers)
                tensor.name = unique(name, used).encode()
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _wi4() -> Any:
    from ai_edge_quantizer import recipe

    return recipe.weight_only_wi4_afp32()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line]
    return (telling or lines or [type(error).__name__])[0][:200]

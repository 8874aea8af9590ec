"""How much noise quantization leaves in each layer, measured in the exported files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import sqnr
from .naming import layer_of
from .signature import Arrays
from .writing import write_file

SAMPLES = 32
"""Samples that the noise is measured on."""

_PAIR = ("QuantizeLinear", "DequantizeLinear")


def layer_noise(
    reference: Path, quantized: Path, inputs: Arrays, layers: Collection[str]
) -> list[dict[str, Any]]:
    """Compare the output of each layer in a quantized file with the same layer in the float file.

    Both files run on the same samples, one after the other, with every inner tensor kept; no
    delegate or graph optimization takes layers away. The noise of a layer includes what it inherits
    from the layers before it.

    Args:
        reference: The float32 file.
        quantized: The quantized file of the same format.
        inputs: Samples by input name; the first 32 are used.
        layers: Names of the Keras model's layers.

    Returns:
        `{"layer", "tensor", "sqnr"}` for each layer that both files keep, in the order in which
        they run; the SQNR in dB is `None` where there is no noise.
    """
    feed = {name: array[:SAMPLES] for name, array in inputs.items()}
    read = _tflite if reference.suffix == ".tflite" else _onnx
    want, got = read(reference, feed), read(quantized, feed)
    rows: dict[str, dict[str, Any]] = {}
    for name, array in want.items():
        layer = layer_of(name, layers)
        if layer is None or name not in got or got[name].shape != array.shape:
            continue
        # A later tensor of the same layer takes the place of an earlier one.
        noise = sqnr(array, got[name])
        value = noise if np.isfinite(noise) else None
        rows.pop(layer, None)
        rows[layer] = {"layer": layer, "tensor": name, "sqnr": value}
    return list(rows.values())


def _tflite(path: Path, feed: Arrays) -> Arrays:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType
    from ai_edge_litert.tools import flatbuffer_utils

    interpreter = Interpreter(
        model_path=str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    inputs = {row["name"]: row for row in interpreter.get_input_details()}
    rows = {row["index"]: row for row in interpreter.get_tensor_details()}
    # Only what an operator made, in running order: weights go by the name of their layer, too.
    graph = flatbuffer_utils.read_model(path).subgraphs[0]
    made = [index for operator in graph.operators for index in operator.outputs]
    tensors = {index: rows[index] for index in made if index in rows}
    parts: dict[str, list[np.ndarray]] = {}
    for i in range(len(next(iter(feed.values())))):
        for name, row in inputs.items():
            interpreter.set_tensor(row["index"], _encode(feed[name][i : i + 1], row))
        interpreter.invoke()
        for index, row in tensors.items():
            try:
                array = interpreter.get_tensor(index)
            except ValueError:
                # A tensor that this run did not fill, such as one in a branch not taken.
                continue
            if array.dtype.kind in "fi" and array.ndim:
                parts.setdefault(row["name"], []).append(_decode(array, row))
    return {name: np.stack(arrays) for name, arrays in parts.items() if _same_shape(arrays)}


def _encode(x: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    scale, zero = row["quantization"]
    if scale and np.issubdtype(row["dtype"], np.integer):
        limits = np.iinfo(row["dtype"])
        x = np.clip(np.round(x / scale) + zero, limits.min, limits.max)
    return x.astype(row["dtype"], copy=False)


def _decode(array: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    scale, zero = row["quantization"]
    if scale and array.dtype.kind == "i":
        return (array.astype(np.float32) - zero) * np.float32(scale)
    return np.array(array)


def _same_shape(arrays: list[np.ndarray]) -> bool:
    return len({array.shape for array in arrays}) == 1


def _onnx(path: Path, feed: Arrays) -> Arrays:
    import onnx
    import onnxruntime

    model = onnx.load(path)
    have = {entry.name for entry in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in have:
                # Without a type, the runtime infers it.
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    # What the next layer reads: an activation such as ReLU may live in the quantization alone.
    readers = {node.input[0]: node for node in model.graph.node if node.op_type in _PAIR}
    order = [name for node in model.graph.node for name in node.output if name]
    values = dict(
        zip(
            [row.name for row in session.get_outputs()],
            session.run(None, feed),
            strict=True,
        )
    )
    result = {}
    for name in order:
        quantize = readers.get(name)
        read = readers.get(quantize.output[0]) if quantize is not None else None
        value = values[name if read is None else read.output[0]]
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            result[name] = value
    return result


class LayerReport:
    """The noise of each layer of the int8 files against the float32 ones.

    Args:
        rows: For each format the rows of `layer_noise`.
    """

    def __init__(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        self._rows = rows

    def rows(self) -> list[dict[str, Any]]:
        """Return `{"format", "layer", "tensor", "sqnr"}` for each layer, in running order."""
        return [{"format": fmt, **row} for fmt, rows in self._rows.items() for row in rows]

    def worst(self, fmt: str) -> list[str]:
        """Return the layers of a format, the noisiest one first."""
        noisy = [row for row in self._rows.get(fmt, []) if row["sqnr"] is not None]
        return [row["layer"] for row in sorted(noisy, key=lambda row: float(row["sqnr"]))]

    def table(self) -> str:
        """Return layers and their SQNR in dB as text of at most 80 columns."""
        formats = list(self._rows)
        if not formats:
            return "No float32 and int8 file of one format: nothing to compare layer by layer."
        names = dict.fromkeys(row["layer"] for rows in self._rows.values() for row in rows)
        figures = {
            fmt: {row["layer"]: row["sqnr"] for row in rows} for fmt, rows in self._rows.items()
        }
        width = min(60, max([len(name) for name in names] + [len("SQNR of int8 in dB")]))
        lines = [f"{'SQNR of int8 in dB':<{width}}" + "".join(f"{fmt:>9}" for fmt in formats)]
        for name in names:
            label = name if len(name) <= width else "..." + name[3 - width :]
            cells = [
                "-"
                if name not in figures[fmt]
                else "exact"
                if figures[fmt][name] is None
                else f"{figures[fmt][name]:.1f}"
                for fmt in formats
            ]
            lines.append(f"{label:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
        return "\n".join(lines)

    def save_svg(self, path: str | Path) -> Path:
        """Write the plot of the layers, as in the HTML report.

        Args:
            path: The file; its folder must exist.

        Returns:
            The path.
        """
        from .page import layer_plot

        return write_file(path, layer_plot(self))

    def __str__(self) -> str:
        return self.table()

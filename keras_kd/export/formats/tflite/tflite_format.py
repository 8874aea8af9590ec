"""TFLite as a format of exports: what each question about its files is answered by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keras_kd.export.formats import device_table, float16_range, metadata_reader
from keras_kd.export.formats.base import Borders, Format, Runtime, Settings
from keras_kd.export.formats.tflite import contents, scales
from keras_kd.export.formats.tflite.runtime import TFLiteRuntime
from keras_kd.export.formats.tflite.tflite_devices import TFLiteFile
from keras_kd.export.rows import Beyond, Contents, Converted, ConvertTask, Scales
from keras_kd.export.signature import Arrays
from keras_kd.export.writing import write_file

if TYPE_CHECKING:
    from keras_kd.export.formats.tflite.converter import LiteRT
    from keras_kd.export.source.source_model import Source


class TFLite(Format):
    """Files for LiteRT, TensorFlow Lite and the compilers of microcontrollers."""

    name = "tflite"
    suffixes = (".tflite",)
    precisions = (
        *("float32", "float16", "dynamic", "weight_int8", "weight_int4", "int8", "uint8"),
        "int16x8",
    )
    packages = ("ai_edge_litert",)
    runtime_packages = ("ai_edge_litert.interpreter",)
    converter_packages = (
        "ai_edge_quantizer.quantizer",
        "keras_kd.export.formats.tflite.converter",
    )
    color = "#1f6f8b"
    runtime = "TensorFlow Lite"
    template = "tflite.j2"
    compacts = True
    mixes = True

    def __init__(self) -> None:
        self._converter: LiteRT | None = None

    def convert(self, source: Source, settings: Settings, task: ConvertTask) -> Converted:
        """As in `Format`."""
        from keras_kd.export.formats import metadata
        from keras_kd.export.formats.tflite import sparsity
        from keras_kd.export.formats.tflite.converter import LiteRT

        made = self._converter
        # What one precision has found out serves the others.
        if made is None or made.source is not source:
            made = self._converter = LiteRT(
                source,
                settings.calibration,
                settings.allow_flex,
                settings.about["normalization"],
                settings.batch,
            )
        blob, batch, notes = made.convert(task.precision, task.keep)
        path, share = Path(task.path), None
        if task.compact:
            smaller, share = sparsity.compact(blob, notes)
            if smaller is not None:
                write_file(task.compact, metadata.tflite(smaller, settings.about, task.precision))
        write_file(path, metadata.tflite(blob, settings.about, task.precision))
        full = ""
        if task.precision == "float16":
            # Kept by the converter, and written here whether or not that precision is asked for.
            full = str(write_file(settings.scratch / "full.tflite", made.convert("float32")[0]))
        return Converted((path.name,), batch, tuple(notes), sparsity=share, full=full)

    def open(self, path: Path, threads: int = 1) -> Runtime:
        """As in `Format`."""
        return TFLiteRuntime(path, threads)

    def contents(self, path: Path) -> Contents:
        """As in `Format`."""
        return contents.inspect(path)

    def layer_outputs(self, path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
        """As in `Format`."""
        return contents.tensors(path, feed)

    def outside(self, path: Path) -> str:
        """As in `Format`."""
        return contents.outside(path)

    def scales(self, path: Path) -> Scales:
        """As in `Format`."""
        return scales.scales(path)

    def borders(self, path: Path) -> Borders:
        """As in `Format`."""
        # The converter orders a signature by name; the metadata know the Keras model's order.
        found = metadata_reader.metadata(path.read_bytes())
        order = {key: [row["name"] for row in rows] for key, rows in found.items()}
        return Borders(order.get("inputs", ()), order.get("outputs", ()))

    def says(self, path: Path) -> tuple[list[str] | None, dict[str, dict[str, list[float]]]]:
        """As in `Format`."""
        return metadata_reader.tflite(path)

    def output_steps(self, path: Path) -> dict[str, float]:
        """As in `Format`."""
        outputs = TFLiteRuntime(path).signature()["outputs"]
        return {row["name"]: row["scale"] for row in outputs if "scale" in row}

    def kernels(self, path: Path) -> list[Runtime]:
        """With XNNPACK and without: other runtimes round as one of the two does."""
        return [TFLiteRuntime(path, 1, delegates) for delegates in (True, False)]

    def beyond_float16(self, half: Path, full: Path, inputs: Arrays) -> tuple[Beyond, ...]:
        """As in `Format`."""
        return float16_range.beyond(contents, half, full, inputs)

    def runtimes(
        self, path: Path, targets: Sequence[str], steps: float | None, images: Sequence[str]
    ) -> dict[str, str]:
        """As in `Format`."""
        file = TFLiteFile(path, steps, frozenset(images))
        asked = device_table.asked(targets)
        return {each.name: each.tflite(file) for each in asked if each.tflite is not None}

    def since(self, path: Path) -> str:
        """As in `Format`."""
        return "{}.{}".format(*TFLiteFile(path, None, frozenset()).minimum)

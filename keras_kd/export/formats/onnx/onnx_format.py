"""ONNX as a format of exports: what each question about its files is answered by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keras_kd.export.formats import device_table, float16_range, metadata_reader
from keras_kd.export.formats.base import Borders, Format, Runtime, Settings
from keras_kd.export.formats.onnx import contents, external_data, onnx_devices, scales
from keras_kd.export.formats.onnx.graph import border_scales
from keras_kd.export.formats.onnx.onnx_devices import ONNXFile
from keras_kd.export.formats.onnx.runtime import ONNXRuntime
from keras_kd.export.rows import Beyond, Contents, Converted, ConvertTask, Scales
from keras_kd.export.signature import Arrays
from keras_kd.export.writing import write_file

if TYPE_CHECKING:
    from keras_kd.export.formats.onnx.converter import Converter
    from keras_kd.export.source.source_model import Source


class ONNX(Format):
    """Files for ONNX Runtime, OpenVINO and others."""

    name = "onnx"
    suffixes = (".onnx",)
    precisions = ("float32", "float16", "dynamic", "weight_int4", "int8", "int8_qoperator")
    packages = ("onnx", "onnxruntime", "tf2onnx")
    runtime_packages = ("onnx", "onnxruntime")
    converter_packages = (
        *("tf2onnx.convert", "onnxruntime.quantization", "onnxruntime.transformers.float16"),
        "keras_kd.export.formats.onnx.converter",
    )
    color = "#c1553b"
    runtime = "ONNX Runtime"
    template = "onnx.j2"
    mixes = True
    computes_float16 = True

    def __init__(self) -> None:
        self._converter: Converter | None = None

    def warm_up(self) -> None:
        """Import the inference of shapes, and what Sympy imports in its first comparison."""
        from keras_kd.export.formats.onnx.converter import import_shape_inference

        import_shape_inference()
        import sympy.tensor.tensor  # type: ignore[import-untyped]  # noqa: F401

    def convert(self, source: Source, settings: Settings, task: ConvertTask) -> Converted:
        """As in `Format`."""
        from keras_kd.export.formats import metadata
        from keras_kd.export.formats.onnx.converter import Converter

        made = self._converter
        if made is None or made.source is not source:
            made = self._converter = Converter(
                source, settings.calibration, settings.opset, settings.scratch
            )
        blob, batch, notes, facts = made.convert(task.precision, task.keep)
        path, full = Path(task.path), ""
        write_file(path, metadata.onnx(blob, settings.about, task.precision))
        if task.precision == "float16":
            full = str(write_file(settings.scratch / "full.onnx", made.convert("float32")[0]))
        return Converted((path.name,), batch, tuple(notes), facts, full=full)

    def open(self, path: Path, threads: int = 1) -> Runtime:
        """As in `Format`."""
        return ONNXRuntime(path, threads)

    def contents(self, path: Path) -> Contents:
        """As in `Format`."""
        return contents.inspect(path)

    def layer_outputs(self, path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
        """As in `Format`."""
        return contents.tensors(path, feed)

    def check(self, path: Path) -> None:
        """As in `Format`."""
        contents.check(path.read_bytes())

    def outside(self, path: Path) -> str:
        """As in `Format`."""
        return external_data.problem(path)

    def scales(self, path: Path) -> Scales:
        """As in `Format`."""
        return scales.scales(path)

    def borders(self, path: Path) -> Borders:
        """As in `Format`."""
        import onnx

        model = onnx.load(path)
        dynamic = any(node.op_type == _DYNAMIC for node in model.graph.node)
        return Borders(scales=border_scales(model), whole=1 if dynamic else 0)

    def says(self, path: Path) -> tuple[list[str] | None, dict[str, dict[str, list[float]]]]:
        """As in `Format`."""
        return metadata_reader.onnx(path)

    def most_samples(self, contents: Contents) -> int:
        """One where a whole batch would get one range, unlike on a device."""
        return 1 if _DYNAMIC in contents.operators else 64

    def output_steps(self, path: Path) -> dict[str, float]:
        """As in `Format`."""
        import onnx

        model = onnx.load(str(path))
        names = {entry.name for entry in model.graph.output}
        return {
            name: float(row["scale"]) for name, row in border_scales(model).items() if name in names
        }

    def kernels(self, path: Path) -> list[Runtime]:
        """With ONNX Runtime's fused kernels and node by node: others round as one of them."""
        return [ONNXRuntime(path, 1, fused) for fused in (True, False)]

    def beyond_float16(self, half: Path, full: Path, inputs: Arrays) -> tuple[Beyond, ...]:
        """As in `Format`."""
        return float16_range.beyond(contents, half, full, inputs)

    def runtimes(
        self, path: Path, targets: Sequence[str], steps: float | None, images: Sequence[str]
    ) -> dict[str, str]:
        """As in `Format`."""
        file = ONNXFile(path, steps)
        asked = device_table.asked(targets)
        return {each.name: each.onnx(file) for each in asked if each.onnx is not None}

    def since(self, path: Path) -> str:
        """As in `Format`."""
        return "{}.{}".format(*onnx_devices.minimum(ONNXFile(path, None)))


_DYNAMIC = "DynamicQuantizeLinear"

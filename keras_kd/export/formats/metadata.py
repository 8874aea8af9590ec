"""What a file says about itself: labels, normalization, scales and ranges, written into it.

TFLite files get the metadata that the Task libraries of MediaPipe read, ONNX files get
`metadata_props`. Both say the same.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

from keras_kd.export.formats.metadata_reader import LABELS
from keras_kd.export.formats.onnx.graph import border_scales
from keras_kd.export.formats.tflite import operator_versions
from keras_kd.export.signature import Signature

_NAME = b"TFLITE_METADATA"
# The identifier of the metadata schema, and the oldest reader that knows all tables used here.
_IDENTIFIER, _READER = b"M001", "1.0.0"
# Values of enumerations and unions in that schema.
_AXIS_LABELS, _VALUE_LABELS = 2, 3
_RGB, _GRAYSCALE = 1, 2
_IMAGE = 2
_NORMALIZATION = 1


def tflite(blob: bytes, about: Mapping[str, Any], precision: str) -> bytes:
    """Write metadata and labels into a TFLite file, and mend what it says about its operators.

    The metadata is a buffer of the model named `TFLITE_METADATA`; the labels stand behind the model
    as an uncompressed zip archive, which runtimes do not read.

    Args:
        blob: The file.
        about: `name` of the model, its `signature`, the `labels` of the first output or `None`,
            `normalization` (mean and standard deviation by image input), `ranges` (least and
            greatest value by input) and `versions`.
        precision: Of the file.

    Returns:
        The file with metadata, and mended by `tflite_versions.mend`; the same bytes for the same
        arguments.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    operator_versions.mend(model)
    buffer = schema.BufferT()
    buffer.data = list(_packed(about, precision))
    entry = schema.MetadataT()
    entry.name, entry.buffer = _NAME, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    whole = io.BytesIO(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))
    if about["labels"] is not None:
        with zipfile.ZipFile(whole, "a", zipfile.ZIP_STORED) as archive:
            # A fixed date: the same labels give the same bytes.
            file = zipfile.ZipInfo(LABELS, (1980, 1, 1, 0, 0, 0))
            archive.writestr(file, "".join(f"{label}\n" for label in about["labels"]))
    return whole.getvalue()


def onnx(blob: bytes, about: Mapping[str, Any], precision: str) -> bytes:
    """Write the same into the `metadata_props` of an ONNX file, as JSON texts.

    Args:
        blob: The file.
        about: As for `tflite`.
        precision: Of the file.

    Returns:
        The file with the entries `manifest`, `quantization`, and where they are known `labels` and
        `normalization`.
    """
    import onnx as package

    model = package.load_from_string(blob)
    values = {
        "manifest": {
            "model": about["name"],
            "precision": precision,
            **{key: about["signature"][key] for key in ("inputs", "outputs")},
            "ranges": about["ranges"],
            "versions": about["versions"],
        },
        "quantization": border_scales(model),
        "labels": about["labels"],
        "normalization": about["normalization"],
    }
    texts = {
        key: json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        for key, value in values.items()
        if value or key == "manifest"
    }
    package.helper.set_model_props(model, texts)
    return model.SerializeToString()


def _packed(about: Mapping[str, Any], precision: str) -> bytes:
    import flatbuffers  # type: ignore[import-untyped]

    build = _Builder(flatbuffers.Builder(1024))
    signature = Signature.from_dict(about["signature"])
    labels, first = about["labels"], signature.outputs[0]
    inputs = []
    for info in signature.inputs:
        fields: dict[int, Any] = {0: build.text(info.name)}
        normalization = about["normalization"].get(info.name)
        if normalization is not None:
            color = {1: _GRAYSCALE, 3: _RGB}.get(info.shape[-1] or 0, 0)
            image = build.table({0: ("Int8", color)})
            fields[3] = build.table({0: ("Uint8", _IMAGE), 1: image})
            options = build.table(
                {i: build.floats(normalization[key]) for i, key in enumerate(("mean", "std"))}
            )
            fields[4] = build.tables([build.table({0: ("Uint8", _NORMALIZATION), 1: options})])
        if info.name in about["ranges"]:
            low, high = about["ranges"][info.name]
            fields[5] = build.table({0: build.floats([high]), 1: build.floats([low])})
        inputs.append(build.table(fields))
    outputs = []
    for info in signature.outputs:
        fields = {0: build.text(info.name)}
        if info is first and labels is not None:
            # Two names for one number say what 0 and 1 mean; otherwise each unit has its name.
            units = len(labels) == info.shape[-1] and "float" in info.dtype
            kind = _AXIS_LABELS if units else _VALUE_LABELS
            file = build.table({0: build.text(LABELS), 2: ("Int8", kind)})
            fields[6] = build.tables([file])
        outputs.append(build.table(fields))
    graph = build.table({2: build.tables(inputs), 3: build.tables(outputs)})
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    root = {
        0: build.text(about["name"]),
        1: build.text(f"{precision}, exported by {versions}"),
        3: build.tables([graph]),
        7: build.text(_READER),
    }
    return build.finish(root)


class _Builder:
    # The schema's own generated code comes with no package that this one needs. Its few tables are
    # written by the numbers of their fields, as listed in `metadata_schema.fbs` of TensorFlow Lite.
    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def text(self, value: str) -> int:
        return int(self._builder.CreateString(value))

    def floats(self, values: list[float]) -> int:
        self._builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            self._builder.PrependFloat32(value)
        return int(self._builder.EndVector())

    def tables(self, offsets: list[int]) -> int:
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return int(self._builder.EndVector())

    def table(self, fields: dict[int, Any]) -> int:
        # A field is an offset, or a number as (type, value).
        self._builder.StartObject(max(fields) + 1)
        for slot, value in sorted(fields.items()):
            if isinstance(value, tuple):
                getattr(self._builder, f"Prepend{value[0]}Slot")(slot, value[1], 0)
            else:
                self._builder.PrependUOffsetTRelativeSlot(slot, value, 0)
        return int(self._builder.EndObject())

    def finish(self, root: dict[int, Any]) -> bytes:
        self._builder.Finish(self.table(root), file_identifier=_IDENTIFIER)
        return bytes(self._builder.Output())

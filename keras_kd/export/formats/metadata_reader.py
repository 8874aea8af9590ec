"""What a file says about itself, read back: the counterpart of `embed`."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LABELS = "labels.txt"
"""Name of the file with one class name a line that travels inside a TFLite file."""

Said = tuple[list[str] | None, dict[str, dict[str, list[float]]]]
"""The names of the classes of the first output, `None` if it has none; and `mean` and `std` by
image input, in float32 precision."""

_LONGEST = 1 << 24
"""Bytes of class names that are read."""


def tflite(path: Path) -> Said:
    """Return what a TFLite file carries.

    Raises:
        ValueError: If it cannot be read.
    """
    with _explaining():
        return _labels(path), {
            row["name"]: row["normalization"]
            for row in metadata(path.read_bytes()).get("inputs", [])
            if "normalization" in row
        }


def onnx(path: Path) -> Said:
    """Return what an ONNX file carries.

    Raises:
        ValueError: If it cannot be read.
    """
    import onnx as package

    with _explaining():
        texts = {entry.key: entry.value for entry in package.load(path).metadata_props}
        labels = json.loads(texts.get("labels", "null"))
        return labels, json.loads(texts.get("normalization", "{}"))


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, zipfile.BadZipFile, IndexError) as error:
        raise ValueError(str(error)) from error


def difference(said: Said, model: Mapping[str, Any]) -> str:
    """Say in what a file and a manifest differ of these; empty if they say the same.

    Args:
        said: What the file carries.
        model: `labels` and `normalization` as the manifest has them.
    """
    for what, has, wanted in (
        ("class names", said[0], model["labels"]),
        ("normalization of pixels", said[1], model.get("normalization", {})),
    ):
        same = has == wanted if what == "class names" else _same_pixels(has, wanted)
        if not same:
            return f"its {what} are {_short(has)}, and {_short(wanted)} are recorded"
    return ""


def metadata(blob: bytes) -> dict[str, list[dict[str, Any]]]:
    """Return what the metadata of a TFLite file say of inputs and outputs.

    The numbers of fields are those of `metadata_schema.fbs` of TensorFlow Lite.

    Args:
        blob: The file.

    Returns:
        `inputs` and `outputs`, rows of `name` and perhaps `normalization`, in the order of the
        Keras model, which the converter does not keep; empty without metadata.
    """
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import (  # type: ignore[import-untyped]
        encode,
        packer,
        table,
    )

    model = schema.Model.GetRootAs(bytearray(blob), 0)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry is None or entry.Name() != b"TFLITE_METADATA":
            continue
        buffer = model.Buffers(entry.Buffer())
        if buffer is None or not buffer.DataLength():
            continue
        data = bytearray(buffer.DataAsNumpy().tobytes())
        root = table.Table(data, encode.Get(packer.uoffset, data, 0))
        for graph in _tables(root, 3):
            return {
                key: [row for each in _tables(graph, slot) if (row := _tensor(each))]
                for key, slot in (("inputs", 2), ("outputs", 3))
            }
    return {}


def _tensor(each: Any) -> dict[str, Any]:
    offset = each.Offset(4)
    if not offset:
        return {}
    row: dict[str, Any] = {"name": each.String(each.Pos + offset).decode()}
    for unit in _tables(each, 4):
        options = _table(unit, 1)
        if options is not None:
            mean, std = (_floats(options, slot) for slot in (0, 1))
            row["normalization"] = {"mean": mean, "std": std}
    return row


def _tables(parent: Any, slot: int) -> Iterator[Any]:
    from flatbuffers import number_types, table

    offset = parent.Offset(4 + 2 * slot)
    for k in range(parent.VectorLen(offset) if offset else 0):
        place = parent.Vector(offset) + 4 * k
        yield table.Table(parent.Bytes, place + parent.Get(number_types.UOffsetTFlags, place))


def _table(parent: Any, slot: int) -> Any:
    from flatbuffers import table

    offset = parent.Offset(4 + 2 * slot)
    return table.Table(parent.Bytes, parent.Indirect(parent.Pos + offset)) if offset else None


def _floats(parent: Any, slot: int) -> list[float]:
    from flatbuffers import number_types

    offset = parent.Offset(4 + 2 * slot)
    if not offset:
        return []
    flags = number_types.Float32Flags
    start = parent.Vector(offset)
    return [float(parent.Get(flags, start + 4 * k)) for k in range(parent.VectorLen(offset))]


def _labels(path: Path) -> list[str] | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if LABELS not in archive.namelist():
            return None
        with archive.open(LABELS) as file:
            text = file.read(_LONGEST + 1)
    if len(text) > _LONGEST:
        raise ValueError(f"{LABELS} holds more than {_LONGEST} bytes")
    return text.decode().splitlines()


def _same_pixels(has: Any, said: dict[str, dict[str, list[float]]]) -> bool:
    if not isinstance(has, dict) or set(has) != set(said):
        return False
    for name, values in said.items():
        for key in ("mean", "std"):
            got = np.asarray(has[name].get(key, []), np.float32)
            want = np.asarray(values[key], np.float32)
            if got.shape != want.shape or not np.array_equal(got, want):
                return False
    return True


def _short(value: object) -> str:
    text = "none" if not value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}..."

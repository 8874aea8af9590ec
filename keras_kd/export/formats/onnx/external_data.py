"""ONNX files that hold all of themselves: what lies in other files is hashed nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_kd.export.formats.base import OUTSIDE
from keras_kd.utils import archives

if TYPE_CHECKING:
    from google.protobuf.message import Message  # type: ignore[import-untyped]


def problem(path: Path) -> str:
    """Say why a file cannot be proven by its own bytes, see `Format.outside`."""
    import onnx

    with archives.opened(path) as stream:
        blob = stream.read()
    try:
        model = onnx.load_model_from_string(blob)
    except Exception:
        # Protobuf has an error of its own for bytes that are none of its messages; the runtime
        # says that this is no file of its own.
        return ""
    outside = onnx.TensorProto.EXTERNAL
    for tensor in _tensors(model, onnx.TensorProto.DESCRIPTOR.full_name):
        if tensor.data_location == outside or tensor.external_data:
            return OUTSIDE
    return ""


def _tensors(message: Message, name: str) -> Iterator[Any]:
    # Tensors lie in graphs, in graphs within nodes, in functions, in sparse ones: everywhere.
    if message.DESCRIPTOR.full_name == name:
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        repeated = getattr(field, "is_repeated", None)
        if repeated is None:
            repeated = field.label == field.LABEL_REPEATED
        for each in value if repeated else (value,):
            yield from _tensors(each, name)

"""The model on its way to the process that converts it: a `.keras` file, or a SavedModel.

The user's process only writes these. It never runs a converter, whose crash would end it.
"""

from __future__ import annotations

import contextlib
import keyword
import logging
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_kd.export.signature import Signature, pack
from keras_kd.export.source.graph_def import plain_argmax_in
from keras_kd.export.writing import disk_fault
from keras_kd.utils.types import Tensor

if TYPE_CHECKING:
    import keras


def save_keras(model: keras.Model, path: Path) -> dict[str, list[str]]:
    """Write the model as a `.keras` file and say which modules loading it needs.

    Args:
        model: Any `keras.Model`.
        path: The file.

    Returns:
        `{"modules": names to import, "classes": "module:name" of classes that are not registered}`.

    Raises:
        ValueError: If the file cannot be loaded elsewhere, since a class lives in `__main__` or the
            model cannot be written.
    """
    import keras

    try:
        config = keras.saving.serialize_keras_object(model)
        keras.saving.save_model(model, path)
    except OSError:
        raise
    except Exception as error:
        # HDF5 says in its text alone that a disk is full.
        full = disk_fault(error)
        if full is not None:
            raise OSError(full, os.strerror(full)) from error
        raise ValueError(f"it cannot be saved as a .keras file ({_line(error)})") from error
    modules: set[str] = set()
    classes: set[str] = set()
    for module, class_name, registered in sorted(_classes(config)):
        known = keras.saving.get_registered_object(registered) if registered else None
        home = known.__module__ if known is not None else module
        if home == "__main__" or home not in sys.modules:
            raise ValueError(f"its class `{class_name}` is defined in `{home}`")
        modules.add(home)
        if known is None:
            classes.add(f"{home}:{class_name}")
    return {"modules": sorted(modules), "classes": sorted(classes)}


def save_tensorflow(
    model: keras.Model,
    signature: Signature,
    shapes: list[list[int]],
    path: Path,
    endpoints: Collection[str] = ("dynamic", "static"),
) -> None:
    """Trace the model, as it is in this process, into a SavedModel.

    Args:
        model: A model on the TensorFlow backend.
        signature: Of the model.
        shapes: Full shape of one sample of every input, batch included.
        path: Folder of the SavedModel.
        endpoints: `"dynamic"`, which takes any batch, and `"static"`, with the batch of one that
            recurrent layers need.
    """
    import keras
    import tensorflow as tf

    names = [info.name for info in signature.outputs]

    def call(*flat: Tensor) -> dict[str, Any]:
        with plain_rounding():
            result = model(pack(model, signature, flat), training=False)
        # An output that is an input passed through needs an operation of its own to be named.
        return {
            name: tf.identity(tensor)
            for name, tensor in zip(names, keras.tree.flatten(result), strict=True)
        }

    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, sizes in (("dynamic", None), ("static", shapes)):
        if name in endpoints:
            archive.add_endpoint(name, call, input_signature=specs(signature, sizes))
    # TensorFlow announces every SavedModel; this one is nobody's business.
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        archive.write_out(str(path), verbose=False)
    finally:
        logger.setLevel(level)
    plain_argmax_in(path)


def plain_rounding(*, onnx: bool = False) -> contextlib.AbstractContextManager[None]:
    """Trace what the operators compute, without how TFLite's kernels round it.

    TFLite's converter drops that by itself, that of ONNX would keep it.
    """
    from keras_kd.compress import tflite_rounding

    return tflite_rounding.plain_rounding(onnx=onnx)


def specs(signature: Signature, shapes: Sequence[Sequence[int | None]] | None) -> list[Any]:
    """Return a `tf.TensorSpec` for every input, of the given shapes or the signature's own."""
    import tensorflow as tf

    rows: Sequence[Sequence[int | None]] = shapes or [info.shape for info in signature.inputs]
    names = parameter_names(signature)
    return [
        tf.TensorSpec(shape, info.dtype, name=names[info.name])
        for shape, info in zip(rows, signature.inputs, strict=True)
    ]


def parameter_names(signature: Signature) -> dict[str, str]:
    """Return the names that inputs have in TensorFlow, by their own.

    It makes them parameters of a Python function: `in`, `my input` and `X` beside `x` cannot be.
    """
    own = [info.name for info in signature.inputs]
    lower = [name.lower() for name in own]
    names: dict[str, str] = {}
    for i, name in enumerate(own):
        plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
        taken = name if plain and lower.count(name.lower()) == 1 else f"input_{i}"
        while taken != name and taken in lower:
            taken += "_"
        names[name] = taken
    return names


def _classes(config: object) -> set[tuple[str, str, str | None]]:
    # Every serialized object says where its class comes from; Keras's own need no import.
    found: set[tuple[str, str, str | None]] = set()
    if isinstance(config, dict):
        module = config.get("module")
        own = not isinstance(module, str) or module.split(".")[0] in ("keras", "builtins")
        if not own and "class_name" in config:
            found.add((str(module), config["class_name"], config.get("registered_name")))
        for key, value in config.items():
            # The loss of a compiled model is not needed to run it.
            if key != "compile_config":
                found |= _classes(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            found |= _classes(value)
    return found


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"

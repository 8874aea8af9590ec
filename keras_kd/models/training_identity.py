"""What makes one training another: settings, teacher and data, in words that can be compared."""

import zlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.models import fingerprint
from keras_kd.utils.types import Data, Tensor

ROWS = 16
"""Rows of arrays, spread evenly, whose values tell one set of data from another."""

LIVE = ("alpha", "temperature", "student_loss_weight", "distillation_loss_weight")
WEIGHT = "weight of transfer "
RATE = "optimizer.learning_rate"

# What changes nothing in the training, or differs between two runs of one program.
_IDLE = {
    "build_config",
    "compile_config",
    "jit_compile",
    "metrics",
    "module",
    "name",
    "optimizer_built",
    "registered_name",
    "run_eagerly",
    "seed",
    "shapes",
    "shared_object_id",
    "weighted_metrics",
}


def of_training(model: keras.Model) -> dict[str, Any]:
    """The settings of a training before its first step, by name.

    Args:
        model: A compiled model; of a distiller the teacher is part of it.

    Returns:
        Plain values by the path of the setting, as `optimizer.learning_rate`.
    """
    found: dict[str, Any] = {}
    for name in LIVE:
        variable = getattr(model, name, None)
        if isinstance(variable, keras.Variable):
            found[name] = _number(ops.convert_to_numpy(variable))
    for transfer in getattr(model, "transfers", ()):
        if isinstance(transfer.weight, keras.Variable):
            found[WEIGHT + transfer.name] = _number(ops.convert_to_numpy(transfer.weight))
    # A distiller tells of its hooks here, those that no file can name among them.
    of_compile = getattr(model, "compile_settings", model.get_compile_config)
    for prefix, read in (("model", model.get_config), ("", of_compile)):
        try:
            config = read()
        except Exception:
            # Whatever a class of the user's own raises: there is nothing more to be had of it.
            continue
        _flatten(config or {}, prefix, found, {})
    for name in ("weighs_by_alpha", "teacher_precision"):
        value = getattr(model, name, None)
        if value is not None:
            found[name] = value
    found["steps_per_execution"] = int(model.steps_per_execution)
    return found


def _number(value: Tensor | float) -> float:
    """A number with the digits that float32 holds, as it was written in the program."""
    return float(f"{float(value):.7g}")


def is_live(name: str) -> bool:
    """Whether callbacks change this setting while the training runs."""
    of_penalty = name.startswith("penalties[") and name.endswith("].weight")
    return name in (*LIVE, RATE) or name.startswith(WEIGHT) or of_penalty


def _flatten(value: object, path: str, found: dict[str, Any], places: dict[str, int]) -> None:
    """Put the plain values of a configuration under their paths.

    Args:
        value: The configuration, or a part of it.
        path: Where it stands.
        found: What is added to.
        places: The positions of the layers of the graph around it: models that are made anew
            in one process have other names.
    """
    if isinstance(value, dict):
        if isinstance(value.get("layers"), list):
            places = fingerprint.places_in(value)
        if value.get("class_name") in ("function", "__lambda__", "Lambda"):
            # Of code only the name: marshaled it holds the lines of the file it came from.
            config = value.get("config")
            found[path] = config if isinstance(config, str) else value["class_name"]
            return
        for key, each in value.items():
            if key not in _IDLE:
                inner = path if key == "config" else f"{path}.{key}" if path else str(key)
                _flatten(each, inner, found, places)
    elif isinstance(value, list | tuple):
        for i, each in enumerate(fingerprint.by_place(value, places)):
            _flatten(each, f"{path}[{i}]", found, places)
    elif isinstance(value, bool | int | str | None):
        found[path] = value
    elif isinstance(value, float | np.number):
        found[path] = _number(value)
    elif isinstance(value, np.ndarray):
        found[path] = [list(value.shape), zlib.crc32(np.ascontiguousarray(value))]
    else:
        # No `repr`, which may hold an address.
        found[path] = type(value).__name__


def of_data(x: Any, y: Data, batch_size: int | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `fit` was given, before anything is joined to it.

    Args:
        x: Inputs or a dataset.
        y: Labels.
        batch_size: Samples a step, or `None`.
        arguments: The other arguments of `fit`.

    Returns:
        Plain values by name; no dataset is read for them.
    """
    found: dict[str, Any] = {"batch size": batch_size}
    for name in ("validation_split", "class_weight", "steps_per_epoch", "shuffle"):
        value = arguments.get(name)
        if isinstance(value, dict):
            value = {str(key): float(each) for key, each in value.items()}
        found[name] = value if isinstance(value, bool | int | float | str | dict | None) else ""
    spec = getattr(x, "element_spec", None)
    if spec is not None:
        found["elements of the dataset"] = [_spec(leaf) for leaf in keras.tree.flatten(spec)]
        found["batches"] = int(x.cardinality())
        return found
    if isinstance(x, keras.utils.PyDataset):
        found["batches"] = x.num_batches
        return found
    for name, part in (("x", x), ("y", y), ("sample_weight", arguments.get("sample_weight"))):
        leaves = keras.tree.flatten(part) if part is not None else []
        if leaves and all(hasattr(leaf, "__array__") for leaf in leaves):
            found[f"shape of {name}"] = [list(map(int, leaf.shape)) for leaf in leaves]
            found[f"dtype of {name}"] = [str(leaf.dtype) for leaf in leaves]
            found[f"values of {name}"] = [_checksum(leaf) for leaf in leaves]
    return found


def _spec(leaf: Tensor) -> str:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return f"{shape} {getattr(dtype, 'name', dtype)}"


def _checksum(leaf: Tensor) -> str:
    """The CRC-32 of some rows."""
    count = len(leaf)
    chosen = np.unique(np.linspace(0, max(count - 1, 0), ROWS).astype("int64"))[:count]
    crc = 0
    for i in chosen.tolist():
        row = leaf[i : i + 1]
        array = ops.convert_to_numpy(row) if ops.is_tensor(row) else np.asarray(row)
        if array.dtype.kind in "OSU":
            crc = zlib.crc32("\0".join(map(str, array.ravel().tolist())).encode(), crc)
        else:
            crc = zlib.crc32(np.ascontiguousarray(array).view("u1"), crc)
    return f"{crc:08x}"


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first settings that differ, as "`alpha` was 0.5 and is 0.9", or `None`."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    # The plainest first: a teacher's weights change its fingerprint, and nothing else tells.
    said = [f"`{name}` was {_shown(before, name)} and is {_shown(now, name)}" for name in names[:3]]
    more = f", and {len(names) - 3} more differ" if len(names) > 3 else ""
    return ", ".join(said) + more if said else None


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name])[:60] if name in values else "not there"

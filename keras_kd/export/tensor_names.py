"""Short names for the tensors inside a file.

`block/conv/BiasAdd` for what TensorFlow calls
`StatefulPartitionedCall/functional_1/block_1/conv_1/BiasAdd;...`. Long names are a good part of a
small file, carry counters that differ from run to run, and hide which layer a tensor comes from.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras


_COUNTER = re.compile(r"_\d+$")
# tf2onnx numbers what it adds over the life of the process.
_RUNNING = re.compile(r"__\d+")


def layer_names(model: keras.Model) -> list[str]:
    """List the names of a model's layers, nested ones included."""
    names = []
    for layer in getattr(model, "layers", []):
        names.append(layer.name)
        names.extend(layer_names(layer))
    return names


def shorten(raw: str, layers: Collection[str]) -> str:
    """Return the path of layers and the operation that a TensorFlow tensor name stands for.

    Args:
        raw: Name as the converter wrote it; of fused ones, joined by `;`, the first is the result.
        layers: Names of the model's layers.

    Returns:
        A name such as `block/conv/BiasAdd`.
    """
    parts = raw.split(";")[0].split(":")[0].split("/")
    path = [layer for part in parts[:-1] if (layer := _layer(part, layers)) is not None]
    return "/".join([*path, _RUNNING.sub("", parts[-1])]) or "tensor"


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """Return the path of the layer that a shortened name belongs to, or `None`."""
    if name in layers:
        # An output carries the name of its layer alone.
        return name
    path = [part for part in name.split("/")[:-1] if part in layers]
    return "/".join(path) or None


def unique(short: str, used: set[str]) -> str:
    """Return the name, or the name with a number behind if it is used; marks it as used."""
    candidate, count = short, 1
    while candidate in used:
        count += 1
        candidate = f"{short}_{count}"
    used.add(candidate)
    return candidate


def _layer(part: str, layers: Collection[str]) -> str | None:
    # TensorFlow appends a counter to the scope of every layer: `conv_1` is mostly `conv`.
    bare = _COUNTER.sub("", part)
    if bare in layers and bare != part:
        return bare
    return part if part in layers else None

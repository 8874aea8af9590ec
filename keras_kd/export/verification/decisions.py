"""Outputs of whole numbers: decisions of the model, or quantities such as pixels and counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keras_kd.export.signature import Arrays, is_symbolic

if TYPE_CHECKING:
    import keras


# Operations that make whole numbers of others by adding up, which are no choices.
_COUNTS = {"Bincount", "CountNonzero", "Cumsum", "Histogram", "Sum", "Trace"}

# What holds the numbers of classes where nobody says what it is: pixels and sound have fewer bits.
_INDICES = (np.dtype("bool"), np.dtype("int32"), np.dtype("int64"))


def whole_numbers(model: keras.Model, outputs: Arrays) -> dict[str, str]:
    """Say what the outputs that are no floats hold, by the operation that they come from.

    An operation that gives whole numbers of real ones chooses (`argmax`, a comparison, `top_k`),
    unless it casts them or counts. Of what comes from a layer of unknown content, yes and no and
    numbers of 32 and 64 bits are decisions, as those of `argmax` are.

    Args:
        model: A built model.
        outputs: Its outputs by name, in its order.

    Returns:
        `"decisions"` or `"values"` by output name; outputs of floats are not in it.
    """
    import keras

    tensors = keras.tree.flatten(model.outputs) if is_symbolic(model) else []
    if len(tensors) != len(outputs):
        tensors = [None] * len(outputs)
    found = {}
    for (name, array), tensor in zip(outputs.items(), tensors, strict=True):
        if array.dtype.kind not in "biu":
            continue
        chosen = None if tensor is None else _chosen(tensor)
        if chosen is None:
            chosen = array.dtype in _INDICES
        found[name] = "decisions" if chosen else "values"
    return found


def _chosen(tensor: keras.KerasTensor) -> bool | None:
    """Whether a tensor holds choices; `None` where nothing tells."""
    import keras

    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype == "bool":
        return True
    operation, node, place = tensor._keras_history
    if isinstance(operation, keras.Model):
        inner = operation.outputs if is_symbolic(operation) else []
        return _chosen(inner[place]) if place < len(inner) else None
    if isinstance(operation, keras.layers.Layer):
        # Only those that leave values alone are known; layers of one's own may hold anything.
        return None
    kind = type(operation).__name__
    if kind in _COUNTS:
        return False
    sources = operation._inbound_nodes[node].input_tensors
    if "float" in dtype:
        # Choices may have been floats for a while.
        return _chosen(sources[0]) if kind == "Cast" else False
    real = ["float" in keras.backend.standardize_dtype(source.dtype) for source in sources]
    if any(real) and kind != "Cast":
        return True
    answers = [_chosen(source) for source in sources]
    if True in answers:
        return True
    return None if None in answers or not answers else False

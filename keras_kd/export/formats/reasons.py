"""Why a model does not convert, in words for the person who built it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from keras_kd.export.tensor_names import layer_of, shorten

_OPERATOR = re.compile(r"'tf\.(\w+)' op is neither a custom op nor a flex op|^\s*tf\.(\w+)\(", re.M)
_AT = re.compile(r'"(\w+):", "([^"@]+)@')
_MLIR = re.compile(r"loc\(|callsite\(|fused\[|tensor<|<unknown>|%\w+|'tfl?\.")


def no_operator(name: str, operators: Iterable[tuple[str, str | None]], remedy: str = "") -> str:
    """Return a sentence on operators that a format does not have.

    Args:
        name: `"TFLite"` or `"ONNX"`.
        operators: TensorFlow's names of operators, each with the layer that holds it, if known.
        remedy: What else helps than another operation.
    """
    layers: dict[str, dict[str, None]] = {}
    for operator, layer in operators:
        layers.setdefault(operator, {})
        if layer is not None:
            layers[operator][layer] = None
    parts = []
    for operator, found in sorted(layers.items()):
        where = ", ".join(f"`{layer}`" for layer in list(found)[:3])
        parts.append(f"`{operator}`" + (f" (in layer {where})" if where else ""))
    return (
        f"{name} has no operator for TensorFlow's {', '.join(parts)}. Use another operation there, "
        f"or move it behind the exported model{remedy}"
    )


def explain(error: BaseException, layers: Collection[str] = ()) -> str | None:
    """Return what a converter's error means; `None` if it speaks for itself.

    Args:
        error: What the converter raised.
        layers: Names of the model's layers.
    """
    text = str(error)
    if not _MLIR.search(text):
        return None
    places = [(operator, _layer(path, layers)) for operator, path in _AT.findall(text)]
    operators = {one or other for one, other in _OPERATOR.findall(text)}
    if operators:
        known = [place for place in places if place[0] in operators]
        named = {operator for operator, _ in known}
        rest = [(operator, None) for operator in operators - named]
        flex = "; `allow_flex=True` makes a file that needs TensorFlow's Flex delegate"
        return no_operator("TFLite", [*known, *rest], flex)
    calls = ("StatefulPartitionedCall", "PartitionedCall")
    inner = [place for place in places if place[0] not in calls]
    operator, layer = next(iter(inner), ("", None))
    where = f" at `{operator}`" if operator else ""
    where += f" in layer `{layer}`" if layer else ""
    return (
        f"TensorFlow's converter fails{where}. Try the other format, another precision, or another "
        "form of that layer; fixed shapes help where sizes are free"
    )


def _layer(path: str, layers: Collection[str]) -> str | None:
    return layer_of(shorten(path, layers), layers)

"""The scales in an ONNX file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats.onnx.contents import readers
from keras_kd.export.formats.onnx.graph import MOVERS, border_scales
from keras_kd.export.formats.scales import SHOWN, bad_scale, broken
from keras_kd.export.rows import BadScale, Scales


def scales(path: Path) -> Scales:
    """Return the scales of a file."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    borders = border_scales(model)
    inputs = {
        entry.name: float(borders[entry.name]["scale"])
        for entry in model.graph.input
        if entry.name in borders
    }
    constants = {entry.name: entry for entry in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    free = {entry.name for entry in model.graph.input} - set(inputs)
    found: dict[str, BadScale] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 2:
            continue
        scale, name = constants.get(node.input[1]), node.input[0]
        if scale is None or node.input[1] in found:
            continue
        values = np.ravel(numpy_helper.to_array(scale)).astype(np.float64)
        start = _origin(name, producers, constants)
        if node.op_type == "QuantizeLinear" and start in free and start not in inputs:
            inputs[start] = float(values[0])
        bad = [
            value
            for value in values
            if (not math.isfinite(value) if name in constants else broken(float(value)))
        ]
        if bad:
            found[node.input[1]] = bad_scale(name, float(bad[0]))
    first = readers(path) if found else {}
    return Scales(
        inputs,
        tuple(replace(row, reader=first.get(row.tensor)) for row in list(found.values())[:SHOWN]),
    )


def _origin(name: str, producers: dict[str, Any], constants: dict[str, Any]) -> str:
    # What only moves or shifts values leaves their reach as it is: a mean is taken off in float.
    while name in producers:
        node = producers[name]
        rest = [part for part in node.input if part not in constants]
        shifts = node.op_type in ("Add", "Sub") and len(rest) == 1
        if not rest or not (node.op_type in MOVERS or shifts):
            return name
        name = rest[0]
    return name

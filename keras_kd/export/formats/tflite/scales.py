"""The scales in a TFLite file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from keras_kd.export.formats.scales import SHOWN, bad_scale, broken
from keras_kd.export.formats.tflite.contents import read, readers
from keras_kd.export.rows import BadScale, Scales


def scales(path: Path) -> Scales:
    """Return the scales of a file."""
    from ai_edge_litert import schema_py_generated as schema

    model = read(path)
    integers = (
        schema.TensorType.INT8,
        schema.TensorType.UINT8,
        schema.TensorType.INT16,
    )
    inputs: dict[str, float] = {}
    found: list[BadScale] = []
    for number, graph in enumerate(model.subgraphs):
        for index, tensor in enumerate(graph.tensors):
            quantization = tensor.quantization
            given = None if quantization is None else quantization.scale
            data = model.buffers[tensor.buffer].data
            constant = data is not None and len(data) > 0
            if given is None or not len(given) or tensor.type not in integers:
                continue
            name = tensor.name.decode()
            if number == 0 and index in graph.inputs:
                inputs[name] = float(given[0])
            # A channel of zeros may have any scale, but no infinite one.
            bad = [
                float(scale)
                for scale in given
                if (not math.isfinite(scale) if constant else broken(float(scale)))
            ]
            if bad:
                found.append(bad_scale(name, bad[0]))
    first = readers(path) if found else {}
    return Scales(
        inputs,
        tuple(replace(row, reader=first.get(row.tensor)) for row in found[:SHOWN]),
    )

"""How much noise quantization leaves in each layer, measured in the exported files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from keras_kd.export.formats.base import Format
from keras_kd.export.rows import LayerRow
from keras_kd.export.signature import Arrays
from keras_kd.export.tensor_names import layer_of
from keras_kd.export.verification.metrics import sqnr

SAMPLES = 32
"""Samples that the noise is measured on."""


def layer_noise(
    fmt: Format, reference: Path, quantized: Path, inputs: Arrays, layers: Collection[str]
) -> list[LayerRow]:
    """Compare the output of each layer in a quantized file with the same layer in the float file.

    Both files run on the same samples, one after the other, with every inner tensor kept; no
    delegate or graph optimization takes layers away. The noise of a layer includes what it inherits
    from the layers before it.

    Args:
        fmt: The format of both.
        reference: The float32 file.
        quantized: The quantized file.
        inputs: Samples by input name; the first 32 are used.
        layers: Names of the Keras model's layers.

    Returns:
        A row for each layer that both files keep, in the order in which they run. `reads` names the
        layers among them whose outputs the layer works on, `covers` those between that have no row
        of their own, since the quantized file computes them in one step with the layer: a
        convolution and its BatchNorm before a ReLU.
    """
    feed = {name: array[:SAMPLES] for name, array in inputs.items()}
    want, readings = fmt.layer_outputs(reference, feed)
    got, _ = fmt.layer_outputs(quantized, feed)
    found: dict[str, tuple[str, float | None]] = {}
    for name, array in want.items():
        layer = layer_of(name, layers)
        if layer is None or name not in got or got[name].shape != array.shape:
            continue
        # A later tensor of the same layer takes the place of an earlier one.
        noise = sqnr(array, got[name])
        found.pop(layer, None)
        found[layer] = name, noise if np.isfinite(noise) else None
    rows = []
    for layer, (tensor, noise_of) in found.items():
        reads, covers = _layers_before(layer, readings, layers, found)
        rows.append(LayerRow(layer, tensor, noise_of, tuple(reads), tuple(covers)))
    return rows


def _layers_before(
    layer: str,
    readings: dict[str, list[str]],
    layers: Collection[str],
    known: Collection[str],
) -> tuple[list[str], list[str]]:
    """The nearest known layers that a layer's tensors are computed from, and those between."""
    waiting = [name for name in readings if layer_of(name, layers) == layer]
    found: dict[str, None] = {}
    between: dict[str, None] = {}
    seen = set(waiting)
    while waiting:
        for name in readings[waiting.pop()]:
            owner = layer_of(name, layers)
            if owner is not None and owner != layer:
                if owner in known:
                    if name in readings:
                        found[owner] = None
                    continue
                # A weight tells the layer of an operator whose output has lost its name; the
                # model's input, which has no path, is no operator.
                if name in readings or "/" in name:
                    between[owner] = None
            if name in readings and name not in seen:
                seen.add(name)
                waiting.append(name)
    return sorted(found, key=list(known).index), list(reversed(between))

"""How far the answers of a quantized file depend on the kernels that compute it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_kd.export.formats.metadata import border_scales
from keras_kd.export.formats.runtime import ONNXRuntime, TFLiteRuntime, run_all
from keras_kd.export.signature import Arrays


def apart(path: Path, inputs: Arrays) -> float | None:
    """Return how far a file's integer answers lie apart from one kernel to another.

    A TFLite file is run with XNNPACK and without, an ONNX file with ONNX Runtime's fused kernels
    and node by node: other runtimes round as one of the two does.

    Args:
        path: A `.tflite` or `.onnx` file.
        inputs: Real numbers by input name, `(samples, ...)`.

    Returns:
        The greatest difference in steps of the output; `None` if no output is an integer.
    """
    if path.suffix == ".tflite":
        scales = {
            row["name"]: row["scale"]
            for row in TFLiteRuntime(path).signature()["outputs"]
            if "scale" in row
        }
        if not scales:
            return None
        files: list[TFLiteRuntime | ONNXRuntime] = [
            TFLiteRuntime(path, 1, delegates) for delegates in (True, False)
        ]
    else:
        import onnx

        borders = border_scales(onnx.load(str(path)))
        names = {row["name"] for row in ONNXRuntime(path).signature()["outputs"]}
        scales = {name: row["scale"] for name, row in borders.items() if name in names}
        if not scales:
            return None
        files = [ONNXRuntime(path, 1, fused) for fused in (True, False)]
    # One by one: a range for a whole batch, or a batch of one, must not count as a difference.
    one, two = (run_all(file, inputs, 1) for file in files)
    return max(
        float(np.max(np.abs(one[name].astype(np.float64) - two[name]), initial=0.0) / scale)
        for name, scale in scales.items()
    )

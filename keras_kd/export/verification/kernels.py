"""How far the answers of a quantized file depend on the kernels that compute it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_kd.export.formats.base import Format, run_all
from keras_kd.export.signature import Arrays


def apart(fmt: Format, path: Path, inputs: Arrays) -> float | None:
    """Return how far a file's integer answers lie apart from one kernel to another.

    Args:
        fmt: Its format, which knows its kernels.
        path: The file.
        inputs: Real numbers by input name, `(samples, ...)`.

    Returns:
        The greatest difference in steps of the output; `None` if no output is an integer.
    """
    scales = fmt.output_steps(path)
    if not scales:
        return None
    # One by one: a range for a whole batch, or a batch of one, must not count as a difference.
    found = [run_all(file, inputs, 1) for file in fmt.kernels(path)]
    one, two = found[0], found[-1]
    return max(
        float(np.max(np.abs(one[name].astype(np.float64) - two[name]), initial=0.0) / scale)
        for name, scale in scales.items()
    )

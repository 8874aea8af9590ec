"""What variables of Keras hold, as arrays: read, and put back."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np


def values(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """Copy what variables hold.

    Args:
        variables: Of any shapes.
    """
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def assign(variables: Sequence[keras.Variable], found: Sequence[np.ndarray]) -> None:
    """Put values into variables of the same shapes, all of them or none.

    Args:
        variables: As for `values`.
        found: What `values` returned.

    Raises:
        ValueError: If they do not fit.
    """
    wanted = [tuple(v.shape) for v in variables]
    have = [tuple(np.shape(v)) for v in found]
    if wanted != have:
        raise ValueError("it is of another model")
    for variable, value in zip(variables, found):
        variable.assign(value)

"""What kind of data something is."""

from typing import Any

import keras


def are_arrays(x: Any) -> bool:
    """Whether these are arrays and no dataset."""
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "__array__") for leaf in leaves)

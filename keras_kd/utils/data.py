"""What kind of data something is."""

import keras


def are_arrays(x: object) -> bool:
    """Whether these are arrays and no dataset."""
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "__array__") for leaf in leaves)

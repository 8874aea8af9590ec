"""What kind of data something is, and what is known of it before a batch is read."""

from typing import Any

import keras

from keras_kd.utils.types import Data, Tensors


def are_arrays(x: object) -> bool:
    """Whether these are arrays and no dataset."""
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "__array__") for leaf in leaves)


def labels_of(x: Data, y: Tensors | None) -> Any:
    """Labels in arrays, or what a dataset says of them; `None` where nothing does."""
    if are_arrays(x):
        return y if are_arrays(y) else None
    element = getattr(x, "element_spec", None)
    return keras.utils.unpack_x_y_sample_weight(element)[1] if element is not None else None


def known_shape(leaf: object) -> tuple[Any, ...] | None:
    """Shape of an array, tensor or specification; `None` where not even the rank is known."""
    shape: Any = getattr(leaf, "shape", None)
    return None if shape is None or getattr(shape, "rank", 0) is None else tuple(shape)

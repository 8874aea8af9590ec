"""What tells one sample from another, and one view of it from the next."""

import zlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.utils.types import Tensor, Tensors

written_here: dict[str, Callable[[Any, int], Any]] = {}
"""The augmentation of each cache that this process wrote, by the identity of the cache."""


def arrays(x: Tensors) -> list[np.ndarray]:
    """The flat inputs of a batch as NumPy arrays in the precision that counts.

    Floats are compared as float32: Keras casts them to its own precision
    anyhow. Integers, booleans and strings stay as they are.

    Raises:
        TypeError: If an input is no dense array.
    """
    return [_canonical(leaf) for leaf in keras.tree.flatten(x)]


def _canonical(leaf: Tensor) -> np.ndarray:
    if type(leaf).__name__ in ("RaggedTensor", "SparseTensor", "BCOO"):
        raise TypeError(
            f"A cache is bound to dense inputs of one shape. Received: a {type(leaf).__name__}. "
            "Pad it or make it dense before."
        )
    array = ops.convert_to_numpy(leaf) if ops.is_tensor(leaf) else np.asarray(leaf)
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return np.ascontiguousarray(array, "float32")
    return np.ascontiguousarray(array)


def describe(x: Tensors) -> list[dict[str, Any]]:
    """Shape and dtype of each flat input of one sample."""
    return [{"shape": list(a.shape[1:]), "dtype": _kind(a)} for a in arrays(x)]


def _kind(array: np.ndarray) -> str:
    return "string" if array.dtype.kind in "OSU" else array.dtype.name


def digests(x: Tensors) -> np.ndarray:
    """The CRC-32 of each sample over all of its inputs.

    Args:
        x: A batch: an array `(samples, ...)`, or a structure of such.

    Returns:
        `(samples,)` of uint32.
    """
    found = [_rows(array) for array in arrays(x)]
    result = np.empty(len(found[0]), "<u4")
    for i in range(len(result)):
        crc = 0
        for rows in found:
            crc = zlib.crc32(rows[i], crc)
        result[i] = crc
    return result


def _rows(array: np.ndarray) -> Any:
    """What of each sample is hashed."""
    if array.dtype.kind in "OSU":
        flat = array.reshape(len(array), -1).tolist()
        return [b"\0".join(_encoded(text) for text in row) for row in flat]
    if not array.size:
        return [b""] * len(array)
    return array.reshape(len(array), -1).view("u1")


def _encoded(text: object) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode()


def seeds(base: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """One 32-bit seed for each sample and epoch (the finalizer of SplitMix64).

    Args:
        base: What all seeds of a cache come from.
        epoch: The epoch, from 0.
        rows: `(samples,)` row numbers.

    Returns:
        `(samples,)` of uint32.

    Reference:
        - [Steele et al., 2014](https://doi.org/10.1145/2660193.2660195), figure 17
    """
    with np.errstate(over="ignore"):
        z = np.asarray(rows, "u8") * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.uint64(epoch) * np.uint64(0xD1342543DE82EF95) + np.uint64(base)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(32)).astype("<u4")


def views(augment: Callable[[Any, int], Any], x: Tensors, seed: np.ndarray) -> Any:
    """One view of each sample: `augment(sample, seed)`, stacked again.

    Args:
        augment: Gets one sample as NumPy arrays, structured like `x`, and its
            seed, an integer below 2**32.
        x: A batch.
        seed: `(samples,)` of uint32.

    Returns:
        A structure of arrays `(samples, ...)`, floats as float32.
    """
    x = keras.tree.map_structure(
        lambda leaf: ops.convert_to_numpy(leaf) if ops.is_tensor(leaf) else np.asarray(leaf), x
    )
    made = [
        augment(keras.tree.map_structure(lambda leaf, i=i: leaf[i], x), int(one))
        for i, one in enumerate(seed)
    ]
    return keras.tree.map_structure(lambda *leaves: _canonical(np.stack(leaves)), *made)


def part(x: Tensors, start: int, stop: int) -> Any:
    """The samples `start` to `stop` of a batch."""
    return keras.tree.map_structure(lambda leaf: leaf[start:stop], x)


def name_of(augment: Callable[..., Any]) -> str:
    """What an augmentation is called in the manifest.

    Without its module: the same function is `__main__.augment` in a script and
    `script.augment` where it is imported.
    """
    return str(getattr(augment, "__qualname__", type(augment).__qualname__))

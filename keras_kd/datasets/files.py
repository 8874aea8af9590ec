"""Arrays from `.npz` files, without ever unpickling anything."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from keras_kd.datasets.dataset import Dataset, Pair, assemble
from keras_kd.utils import archives
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Array

OTHERS_VALIDATION = ("val", "valid", "dev", "eval")
"""What others call the split that is `validation` here."""


def load(path: str | os.PathLike[str]) -> Dataset:
    """Load an image classification set from a `.npz` file.

    The file holds `x_train`, `y_train`, `x_test` and `y_test`, and may hold `x_validation` with
    `y_validation` and `class_names`. Images are `(samples, height, width)` or `(samples, height,
    width, channels)`; integers from 0 to 255 are scaled to `[0, 1]`, floats are taken as they
    are. Labels are integer class numbers from 0.

    Args:
        path: Path of the file.

    Returns:
        A `Dataset`, whose `notes` say what was changed on the way.

    Raises:
        ValueError: If the file is missing, truncated, no `.npz` file or holds pickled objects,
            or if its arrays are missing, of the wrong length or dtype, or not finite.

    Examples:
        >>> import numpy as np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "tiny.npz")
        >>> x, y = np.zeros((8, 4, 4), "uint8"), np.arange(8) % 2
        >>> np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        >>> load(path).input_shape
        (4, 4, 1)
    """
    arrays = read(path, ("x_train", "y_train", "x_test", "y_test"))
    validation: Pair | None = None
    if ("x_validation" in arrays) != ("y_validation" in arrays):
        raise ValueError(
            f"`{path}` holds only one of `x_validation` and `y_validation`. Store both, or none "
            "to have a validation split taken from the training samples."
        )
    if "x_validation" in arrays:
        validation = (arrays["x_validation"], arrays["y_validation"])
    class_names = None
    if "class_names" in arrays:
        class_names = names_of(arrays["class_names"])
    require_known_splits(path, arrays)
    return assemble(
        os.fspath(path),
        (arrays["x_train"], arrays["y_train"]),
        test=(arrays["x_test"], arrays["y_test"]),
        validation=validation,
        class_names=class_names,
    )


def names_of(array: Array) -> list[str]:
    """Return names of classes as they are stored, as text or as bytes of UTF-8."""
    found = np.atleast_1d(array)
    return [
        str(name) for name in (np.char.decode(found, "utf-8") if found.dtype.kind == "S" else found)
    ]


def require_known_splits(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Refuse a validation split of another name, which would be left out without a word.

    Args:
        path: Of the file.
        names: Of the arrays in it.

    Raises:
        ValueError: Naming the array.
    """
    known = list(names)
    for name in known:
        key, _, split = name.rpartition("_")
        wanted = f"{key}_validation"
        if key in ("x", "y") and split in OTHERS_VALIDATION and wanted not in known:
            raise ValueError(
                f"`{os.fspath(path)}` holds `{name}`, and the arrays of this split are called "
                "`x_validation` and `y_validation`. Rename them, or leave them out."
            )


def read(path: str | os.PathLike[str], required: Iterable[str] = ()) -> dict[str, Array]:
    """Read all arrays of a `.npz` file into memory.

    Args:
        path: Path of the file.
        required: Names that must be in it.

    Returns:
        The arrays by name, in the order of the file.

    Raises:
        ValueError: If the file is missing, truncated, no `.npz` file, holds pickled objects or
            declares more than may be unpacked, or if a required name is not in it.
    """
    path = os.fspath(path)
    return archives.arrays(path, lambda names: _check_names(path, names, required))


def _check_names(path: str, names: list[str], required: Iterable[str]) -> None:
    required = list(required)
    missing = [name for name in required if name not in names]
    if not missing:
        return
    spare = [name for name in names if name not in required]
    hint = did_you_mean(missing[0], spare)
    guess = f"{hint} Then rename it." if hint else ""
    raise ValueError(
        f"`{path}` lacks {_listed(missing)}: it holds {_listed(names) or 'no arrays'}.{guess}"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

"""What a learner keeps on disk between two tasks: one file, whole or not there."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.callbacks import resume
from keras_kd.models import training_identity
from keras_kd.utils import archives, files
from keras_kd.utils.types import Array

FILE = "state.npz"
_VERSION = 1


class State:
    """The file of a learner's state.

    Args:
        folder: Its folder, made when it is first written; or `None`, and nothing is.

    Raises:
        OSError: If no file can be made there.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else pathlib.Path(folder)
        if self.folder is not None:
            resume.require_writable(str(self.folder), "Learner")

    @property
    def path(self) -> pathlib.Path:
        """The file."""
        return (self.folder or pathlib.Path()) / FILE

    def write(self, about: dict[str, Any], arrays: dict[str, Array]) -> None:
        """Write a state in place of the one before it.

        Args:
            about: Plain values.
            arrays: Arrays by name.
        """
        text = json.dumps({"version": _VERSION, **about})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(self.path) as file:
            np.savez(file, **arrays, **resume.random_state("between"), about=np.array(text))

    def read(self) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """What `write` wrote, or `None`.

        Raises:
            ValueError: If the file is none of these.
        """
        if self.folder is None or not os.path.lexists(self.path):
            return None
        arrays = archives.arrays(self.path)
        try:
            about = json.loads(str(arrays.pop("about")))
            if about["version"] != _VERSION or not isinstance(about["tasks"], list):
                raise ValueError("it is of another version")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{self.path}` holds no state of a learner: {error}. Choose another folder, or "
                "delete it to begin anew."
            ) from error
        return about, arrays

    def set_random_state(self, arrays: dict[str, Array]) -> None:
        """Let Python, NumPy and PyTorch draw what they would have drawn next.

        Args:
            arrays: What `read` returned.
        """
        resume.set_random_state("between", arrays)

    def require_same(self, before: dict[str, Any], now: dict[str, Any], what: str) -> None:
        """Raise `ValueError` where the program is another one than that which wrote the state.

        Args:
            before: What it said of itself.
            now: What it says.
            what: What is told of.
        """
        other = training_identity.difference(
            plain_value(before), json.loads(json.dumps(plain_value(now)))
        )
        if other is not None:
            raise ValueError(
                f"`{self.folder}` holds another training, by {what}: {other}. Run the same program "
                "as before, or choose another folder."
            )


def plain_value(value: object) -> Any:
    """A value as JSON or NumPy hold it.

    Args:
        value: A `keras.Variable`, which becomes an array; or a structure of plain values.
    """
    if isinstance(value, keras.Variable):
        array = np.array(ops.convert_to_numpy(value))
        # NumPy writes no halves of this kind; float32 holds them exactly.
        return array.astype("float32") if array.dtype.name == "bfloat16" else array
    if isinstance(value, dict):
        return {str(key): plain_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bool | int | float | str | None):
        return value
    return type(value).__name__

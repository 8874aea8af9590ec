"""Checkpoints of the student alone."""

import errno
import os
from typing import Any

import keras

from keras_kd.callbacks.resume import require_writable, writes
from keras_kd.utils import files
from keras_kd.utils.types import Logs


class StudentCheckpoint(keras.callbacks.ModelCheckpoint):
    """Write the best student, alone, while the distiller trains.

    The file is a plain Keras model: no teacher, no projectors, no optimizer.
    It is written under a temporary name and renamed, so a crash or a full disk
    leaves the last good one.

    Args:
        filepath: Path that ends in `.keras`; may contain `{epoch:02d}` and
            names of logs, as in `keras.callbacks.ModelCheckpoint`.
        monitor: The log that decides what is best.
        save_best_only: Whether a worse student is not written.
        **kwargs: `verbose`, `mode`, `save_freq`, `initial_value_threshold`, as
            in `keras.callbacks.ModelCheckpoint`.

    Raises:
        ValueError: If `filepath` does not end in `.keras`.
        OSError: If it cannot be written, before the first step.

    Examples:
        >>> callback = StudentCheckpoint("student.keras", monitor="val_accuracy")
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        save_best_only: bool = True,
        **kwargs: object,
    ) -> None:
        if not os.fspath(filepath).endswith(".keras"):
            raise ValueError(
                f"`filepath` of `StudentCheckpoint` ends in `.keras`. Received: {filepath!r}."
            )
        super().__init__(
            os.fspath(filepath), monitor=monitor, save_best_only=save_best_only, **kwargs
        )

    def on_train_begin(self, logs: Logs = None) -> None:
        """Find out before the first step whether the file can be written."""
        super().on_train_begin(logs)
        if writes():
            # Up to what only an epoch or its logs will tell.
            known = os.path.abspath(self.filepath).partition("{")[0]
            if "{" not in self.filepath and os.path.isdir(known):
                raise IsADirectoryError(
                    errno.EISDIR,
                    f"`StudentCheckpoint` cannot write the file `{self.filepath}`: there is a "
                    "folder of that name. Choose another one",
                )
            require_writable(os.path.dirname(known), "StudentCheckpoint")

    def set_model(self, model: keras.Model) -> None:
        """Save the student of this distiller, or the model itself where it has none."""
        super().set_model(_Saver(getattr(model, "student", model), model))


class _Saver:
    """What `ModelCheckpoint` calls its model: it saves the student, whole or not at all."""

    def __init__(self, student: keras.Model, distiller: keras.Model) -> None:
        self.student = student
        self.distiller = distiller

    def __getattr__(self, name: str) -> Any:
        # Everything but saving is the distiller's: its metrics say what is
        # better, and on JAX it brings the weights back from the step.
        return getattr(self.distiller, name)

    def save(self, filepath: str, overwrite: bool = True, **kwargs: object) -> None:
        """Save under a temporary name and rename; one process of several does."""
        if not writes():
            return
        # Made where nothing was, so that Keras writes into no file that a link leads to.
        with files.replacing_by_name(os.path.abspath(filepath)) as temporary:
            self.student.save(os.fspath(temporary), overwrite=True)

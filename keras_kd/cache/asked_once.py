"""A teacher that is asked once about rows on which many students train."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.cache import join_arrays
from keras_kd.cache.from_teacher import write
from keras_kd.cache.teacher import CachedTeacher
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils.types import Tensors

if TYPE_CHECKING:
    pass


def asked_once(
    teacher: TeacherLike,
    x: Tensors,
    folder: str | os.PathLike[str],
    *,
    taps: Sequence[str] = (),
    teacher_inputs: Callable[[Any], Any] | None = None,
    from_logits: bool | None = None,
    teacher_precision: str = "float32",
    progress: Callable[[int, int | None], None] | None = None,
) -> CachedTeacher:
    """Ask a teacher about all rows and keep the answers in a folder, in float32.

    Args:
        teacher: A built `keras.Model`, a list of them, or a `keras_kd.teachers.Teacher`; one that
            reads its answers from disk is returned as it is.
        x: Arrays of the rows.
        folder: Where the answers go, see `keras_kd.cache.write`: a call that was killed goes on.
        taps: Layers of the teacher to keep too.
        teacher_inputs: As for `keras_kd.Distiller`.
        from_logits: As for `keras_kd.Distiller`.
        teacher_precision: As for `keras_kd.Distiller`.
        progress: As for `keras_kd.cache.write`.

    Returns:
        The teacher that knows the answers.
    """
    if isinstance(teacher, CachedTeacher):
        return teacher
    write(
        teacher,
        x,
        folder,
        dtype="float32",
        taps=taps,
        teacher_inputs=teacher_inputs,
        from_logits=from_logits,
        teacher_precision=teacher_precision,
        progress=progress,
    )
    return CachedTeacher(folder)


class SomeRows(CachedTeacher):
    """Some rows of a cache as a teacher of their own.

    Args:
        teacher: Knows all rows.
        numbers: `(n,)` numbers of the rows, in the order of the arrays that are trained on.
    """

    def __init__(self, teacher: CachedTeacher, numbers: np.ndarray) -> None:
        # The answers are shared, and the epoch is each one's own.
        self.__dict__.update(teacher.__dict__)
        self.numbers = np.asarray(numbers)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.numbers)

    def fetch(self, rows: np.ndarray, epoch: int = 0) -> dict[str, np.ndarray]:
        """Read what was said of some rows, by their place among these."""
        return super().fetch(self.numbers[rows], epoch)

    def view(self, x: Tensors, rows: np.ndarray, epoch: int = 0, compare: bool = True) -> Any:
        """The inputs of some rows as the teacher saw them in an epoch."""
        return super().view(x, self.numbers[rows], epoch, compare)

    def join_fit(
        self,
        x: Tensors,
        y: Tensors | None,
        batch_size: int | None,
        arguments: dict[str, Any],
        asked: bool = False,
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """Join arrays of exactly these rows."""
        self._begins = True
        data = join_arrays.row_data(x, y, arguments)
        return join_arrays.drawn_for_fit(self, data, batch_size, arguments, asked)

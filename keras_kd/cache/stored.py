"""What the joins of data and answers ask of a teacher whose answers are stored by row."""

import abc
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from keras_kd.cache.reader import Records
from keras_kd.teachers.base import Teacher
from keras_kd.utils.types import Tensors


class Source(Protocol):
    """What the join asks of whoever knows the answers by row.

    Attributes:
        root: The folder of the first cache, for messages.
        epoch: The epoch of the training.
        augment: The `fn(sample, seed)` whose views were answered, `None` where the samples were.
    """

    epoch: int
    augment: Callable[[Any, int], Any] | None

    @property
    def root(self) -> Any:
        """Where it is, for messages."""

    def fetch(self, rows: np.ndarray, epoch: int = 0) -> dict[str, np.ndarray]:
        """What was said of some rows in an epoch, by name."""

    def view(self, x: Tensors, rows: np.ndarray, epoch: int = 0, compare: bool = True) -> Any:
        """The inputs of some rows as they were answered."""

    def held(self) -> dict[str, np.ndarray] | None:
        """All that `fetch` would give, where it is in memory and the same in every epoch."""


class StoredTeacher(Teacher):
    """A teacher that answers rows by their number, from records.

    Attributes:
        caches: The records; the first ones say which data they belong to.
        augment: The `fn(sample, seed)` whose views were answered, `None` where the samples were.
        epoch: The epoch of the training.
        run: Counts the trainings, so that passes before one are not taken for its own.
    """

    needs_join = True
    caches: list[Records]
    augment: Callable[[Any, int], Any] | None
    epoch: int
    run: int

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.caches[0].count

    @property
    def root(self) -> Any:
        """The folder of the first cache, for messages."""
        return self.caches[0].root

    @abc.abstractmethod
    def fetch(self, rows: np.ndarray, epoch: int = 0) -> dict[str, np.ndarray]:
        """Read what was said of some rows.

        Args:
            rows: `(n,)` row numbers.
            epoch: The epoch of the training.

        Returns:
            Arrays `(n, ...)` by name, the row numbers as `indices` among them.
        """

    @abc.abstractmethod
    def view(self, x: Tensors, rows: np.ndarray, epoch: int = 0, compare: bool = True) -> Any:
        """The inputs of some rows as they were answered in an epoch.

        Args:
            x: Inputs of these rows as the data deliver them.
            rows: `(n,)` row numbers.
            epoch: The epoch of the training.
            compare: Whether they are compared with what was answered.

        Returns:
            `x`, or its augmented views.

        Raises:
            ValueError: If the augmentation gives other views than it did.
        """

    def held(self) -> dict[str, np.ndarray] | None:
        """All that `fetch` would give, where it is in memory and the same in every epoch."""
        return None

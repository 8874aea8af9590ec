"""What the distiller and the cache ask of any teacher.

A teacher answers batches: with logits, with what it returns, and with tensors of inner layers where
it has some. Three questions decide how it is asked. `needs_join`: does it answer rows by their
number, so that its answers must be joined to the data? `compiled`: is its answer made of operations
of the backend, or does a compiled step have to call the host for it? `settled`: is there anything
that only a batch can tell of its outputs?

A new kind of teacher derives from `Teacher` and defines `kinds`, `answer` and `fingerprint`; the
distiller, `keras_kd.teachers.Ensemble` and `keras_kd.cache.write` then take it.
"""

# ruff: noqa: B027 -- what most teachers leave as it is does nothing here.

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from keras_kd.models.model_reader import Answer
from keras_kd.teachers import row_numbers
from keras_kd.utils.types import Data, Tensor, Tensors

if TYPE_CHECKING:
    import keras

TeacherLike: TypeAlias = "keras.Model | Teacher | Sequence[TeacherLike] | None"
"""Who may teach: a model, an object of this package, or several of them that answer together."""


class AnswerError(ValueError):
    """What a teacher did not answer, or answered wrongly, of some rows.

    Args:
        said: The message, with `{rows}` where it names the rows.
        first: The first of the rows, counted in the batch.
        last: The last of them.
        count: Rows of the batch.

    Attributes:
        rows: The first row and the last, as the message counts them.
    """

    def __init__(self, said: str, first: int, last: int, count: int) -> None:
        self.rows = first, last
        self._given = said, first, last, count
        super().__init__(said.replace("{rows}", f"{_rows(first, last)} of a batch of {count}", 1))

    def placed(self, where: str, row: int = 0) -> "AnswerError":
        """The same error, told of what the batch was taken from.

        Args:
            where: What the rows are those of, as `"the data"`.
            row: At which row of that the batch begins.
        """
        said, first, last, count = self._given
        found = AnswerError(said, first, last, count)
        found.rows = first + row, last + row
        found.args = (said.replace("{rows}", f"{_rows(*found.rows)} of {where}", 1),)
        found.__cause__ = self.__cause__
        return found


def _rows(first: int, last: int) -> str:
    return f"row {first}" if first == last else f"rows {first} to {last}"


class Teacher(abc.ABC):
    """What answers a batch in place of labels.

    Attributes:
        name: For messages and the saved record.
        needs_join: Whether it answers rows by their number, so that its answers are joined to the
            data and inputs alone are not enough.
        compiled: Whether its answer is made of operations of the backend; one that is not is
            asked on the host, by a call from within the compiled step.
        from_logits: Whether it was told that its outputs are logits; `None` where it finds out.

    Examples:
        >>> class Rules(Teacher):
        ...     name, kinds = "rules", ["logits"]
        ...
        ...     def answer(self, x, record=None, units=()):
        ...         logits = keras.ops.stack([x[:, 0], -x[:, 0]], axis=-1)
        ...         return Answer(logits, [logits], {})
        ...
        ...     def fingerprint(self):
        ...         return "rules 1"
    """

    name: str
    needs_join: bool = False
    compiled: bool = True
    from_logits: bool | None = None

    @property
    @abc.abstractmethod
    def kinds(self) -> list[str]:
        """How each flat output is made: `"logits"`, `"softmax"`, `"sigmoid"` or `"unknown"`."""

    @abc.abstractmethod
    def answer(
        self, x: Tensors, record: Mapping[str, Tensor] | None = None, units: Sequence[str] = ()
    ) -> Answer:
        """Answer one batch, as in inference.

        Args:
            x: What the teacher reads.
            record: What `split` found beside the batch.
            units: What each flat output means, as in `keras_kd.models.meaning`.

        Returns:
            Output, logits and tapped tensors.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Identify the teacher by all that its answers depend on."""

    @property
    def original(self) -> Any:
        """What the user passed as teacher, as the distiller shows it."""
        return self

    @property
    def models(self) -> list[Any]:
        """The Keras models that it runs, whose variables must stay as they are."""
        return []

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of the outputs, `None` where nobody named them."""
        return None

    def output_template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return None

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs, or `None` where they are not known yet."""
        return None

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on.

        Raises:
            ValueError: If there is no such layer.
        """
        if paths:
            raise ValueError(
                f"The teacher `{self.name}` shows its answers alone, and `{paths[0]}` would be an "
                "inner layer of it. Compare outputs, or distil from a `keras.Model`."
            )

    def apart(self) -> "Teacher":
        """The same teacher, with a choice of its own of the layers that are read."""
        return self

    def at_precision(self, precision: str) -> "Teacher":
        """The teacher that answers in its place with copies of its models in this precision.

        Raises:
            ValueError: If it runs no models, or one cannot be copied.
        """
        raise ValueError(
            f"`teacher_precision={precision!r}` runs models faster, and the teacher `{self.name}` "
            "runs none. Leave it out."
        )

    @property
    def settled(self) -> bool:
        """Whether nothing is left that only a batch can tell of the outputs."""
        return True

    @property
    def baked(self) -> Any:
        """What a compiled step takes for constant; where it changes, the step is made anew."""
        return None

    def require_batch(self, x: Tensors) -> None:
        """Raise `ValueError` for single samples where batches are read, as far as that is known.

        Args:
            x: The inputs of one element of a dataset.
        """

    def inspect(self, x: Tensors) -> None:
        """Find out from a concrete batch what is not known of the outputs."""

    def refresh(self) -> bool:
        """Follow what the answers are made of where it may change; asked before each run.

        Returns:
            Whether something is to be found out from a batch anew.
        """
        return False

    def failure(self) -> BaseException | None:
        """Take the error of a call from within a compiled step, out of which none is raised.

        The answer to that batch was NaN. What is taken is not told again.
        """
        return None

    @property
    def precisions(self) -> list[str]:
        """How each model runs: `"as given"`, or the precision of its folded copy."""
        return ["as given"]

    def take_precisions(self, precisions: Sequence[str]) -> None:
        """Run the models as another process chose, where this one has the choice."""

    def split(self, x: Tensors) -> tuple[Any, Any]:
        """Separate what the models read from what was joined to it.

        Args:
            x: One batch as the data deliver it.

        Returns:
            The models' input, and a record of what was joined, as the row
            numbers, or `None`.
        """
        return row_numbers.split(x)

    def join_fit(
        self,
        x: Data,
        y: Tensors | None,
        batch_size: int | None,
        arguments: dict[str, Any],
        asked: bool = False,
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """Change what `fit` was given, where outputs must be joined to the data.

        Args:
            x: Inputs, or a dataset.
            y: Labels.
            batch_size: Samples a step.
            arguments: The other arguments of `fit`.
            asked: Whether rows that are split off for validation are joined too.

        Returns:
            The same four for `keras.Model.fit`.
        """
        return x, y, batch_size, arguments

    def join_evaluation(
        self, x: Data, y: Tensors | None, sample_weight: Tensors | None, batch_size: int | None
    ) -> tuple[Any, Any, Any, int | None]:
        """Change what `evaluate` was given, where the teacher is asked and outputs are joined.

        Args:
            x: Inputs, or a dataset.
            y: Labels.
            sample_weight: Weights.
            batch_size: Samples a step.

        Returns:
            The same four for `keras.Model.evaluate`.
        """
        return x, y, sample_weight, batch_size

    def begin_epoch(self, epoch: int) -> None:
        """Take note that this epoch of the training begins."""

    def require_logits(self, output: int) -> None:
        """Raise `ValueError` unless the logits of a flat output can be read.

        Args:
            output: Its place among the flat outputs.
        """

    def is_last(self, output: int) -> bool:
        """Whether the classes of a flat output lie on its last axis, as far as that is known."""
        return True

    def is_doubtful(self, output: int) -> bool:
        """Whether a flat output that is read as it is may be no logits."""
        return False

    def own_loss(self, output: int) -> Any:
        """The loss that the teacher was made with for a flat output, `None` if unknown."""
        return None

    def joined(self, data: Data, rows: np.ndarray) -> Any:
        """Put beside some rows of the data what the teacher says of them, where it is stored.

        Args:
            data: These rows, `(x, y, sample_weight)`.
            rows: `(n,)` their numbers in the data.

        Returns:
            One batch as the distiller reads it.
        """
        return data

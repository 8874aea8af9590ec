"""What the distiller asks of any teacher, and a model that answers it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_kd.models.fingerprint import fingerprint
from keras_kd.models.model_reader import Answer, Reader
from keras_kd.teachers import row_numbers
from keras_kd.utils import checks


class Teacher:
    """What the distiller asks of any teacher.

    Attributes:
        name: For messages and the saved record.
        variables: The variables that must stay as they are.
        kinds: `"logits"`, `"softmax"`, `"sigmoid"` or `"unknown"` for each
            flat output.
    """

    name: str

    @property
    def models(self) -> list[Any]:
        """The models that are run; none where outputs are read from disk."""
        return []

    @property
    def kinds(self) -> list[str]:
        """How each flat output is made."""
        raise NotImplementedError

    def output_template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return None

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs, or `None` where they are not known yet."""
        return None

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether nothing is left that only a batch can tell of the outputs."""
        return True

    @property
    def baked(self) -> Any:
        """What a compiled step takes for constant; where it changes, the step is made anew."""
        return None

    def inspect(self, x: Any) -> None:
        """Find out from a concrete batch what the layers alone do not tell."""

    def refresh(self) -> bool:
        """Follow the models' weights where a copy of them is run; asked before each run.

        Returns:
            Whether something is to be found out from a batch anew.
        """
        return False

    @property
    def precisions(self) -> list[str]:
        """How each model runs: `"as given"`, or the precision of its folded copy."""
        return ["as given" for _ in self.models]

    def take_precisions(self, precisions: Sequence[str]) -> None:
        """Run the models as another process chose, where this one has the choice."""

    def split(self, x: Any) -> tuple[Any, Any]:
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
        x: Any,
        y: Any,
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
        self, x: Any, y: Any, sample_weight: Any, batch_size: int | None
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
        """The loss that the teacher was compiled with for a flat output, `None` if unknown."""
        return None

    def joined(self, data: Any, rows: np.ndarray) -> Any:
        """Put beside some rows of the data what the teacher says of them, where it is stored.

        Args:
            data: These rows, `(x, y, sample_weight)`.
            rows: `(n,)` their numbers in the data.

        Returns:
            One batch as the distiller reads it.
        """
        return data

    def read(self, x: Any, record: Any, units: Sequence[str]) -> Answer:
        """Answer one batch, with `training=False`.

        Args:
            x: What the teacher reads.
            record: What `split` found.
            units: What each flat output means, as in `keras_kd.models.meaning`.

        Returns:
            Output, logits and tapped tensors.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Identify the teacher by its layers, how they are joined, and its weights."""
        raise NotImplementedError


class ModelTeacher(Teacher):
    """A Keras model as teacher.

    Args:
        model: A built `keras.Model`.
        from_logits: Whether its outputs are logits; `None` finds out.

    Raises:
        TypeError: If it is no Keras 3 model.
        ValueError: If it is not built.
    """

    def __init__(self, model: Any, from_logits: bool | None = None) -> None:
        checks.require_model(model, "teacher")
        if not model.built:
            raise ValueError(
                f"The teacher `{model.name}` has no weights yet: it was never built. Load its "
                "trained weights, or call it once on a batch, before distilling from it."
            )
        self.model = model
        self.name = model.name
        self.from_logits = from_logits
        self._reader = Reader(model, "teacher", from_logits)

    @property
    def models(self) -> list[Any]:
        """The model."""
        return [self.model]

    @property
    def kinds(self) -> list[str]:
        """How each flat output is made."""
        return self._reader.kinds()

    def output_template(self) -> Any:
        """The structure of the outputs with names at its leaves, or `None` if unknown."""
        return self._reader.template

    def output_shapes(self) -> list[Any] | None:
        """The shapes of the flat outputs, or `None` for a model without a graph."""
        return self._reader.shapes

    def reset(self, paths: Sequence[str]) -> None:
        """Read these layers from now on."""
        self._reader.reset(paths)

    @property
    def settled(self) -> bool:
        """Whether the layers tell all there is to know of the outputs."""
        return self._reader.settled

    def inspect(self, x: Any) -> None:
        """Find out from a concrete batch what the layers alone do not tell."""
        self._reader.inspect(x)

    def require_logits(self, output: int) -> None:
        """Raise `ValueError` unless the logits of a flat output can be read."""
        self._reader.require_logits(output)

    def is_last(self, output: int) -> bool:
        """Whether the classes of a flat output lie on its last axis, as far as that is known."""
        return self._reader.is_last(output)

    def is_doubtful(self, output: int) -> bool:
        """Whether a flat output that is read as it is may be no logits."""
        return self._reader.is_doubtful(output)

    def own_loss(self, output: int) -> Any:
        """The loss that the model was compiled with for a flat output, `None` if it was not."""
        loss = self.model.loss if getattr(self.model, "compiled", False) else None
        each = checks.per_output(loss, self.output_template())
        return each[output] if output < len(each) else None

    def read(self, x: Any, record: Any, units: Sequence[str]) -> Answer:
        """Answer one batch."""
        return self._reader.read(x, False, units)

    def fingerprint(self) -> str:
        """Identify the teacher by its layers, how they are joined, and its weights."""
        return fingerprint(self.model)

"""What is minimized: a list of terms, each with a name, a weight and a value.

`Objective.values` computes the terms of one batch for whoever asks: the training step, `evaluate`,
the diagnostics, and models that teach each other. `Objective.total` books them and adds them up.
A new kind of term has a `name`, a `weight`, and a `value(seen)`; it goes into the list of terms of
`Distiller` or of `MutualLearning`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import keras
from keras import ops

from keras_kd.distill import agreement, hard_loss, hooks
from keras_kd.distill.batch import Batch, added_up, or_nan, paired, read_on, times
from keras_kd.distill.pairing import Pairing
from keras_kd.distill.training_metrics import TrainingMetrics
from keras_kd.losses import counts
from keras_kd.losses.base import DistillationLoss
from keras_kd.losses.counts import Counted
from keras_kd.models.model_reader import Answer
from keras_kd.transfers.transfer import compared
from keras_kd.utils.types import Losses, Tensor, Tensors


class Seen:
    """What the terms read of one batch; the hard loss, which comes first, adds to it.

    Args:
        counted: `fn(seen)`: what counts of each flat output of the student.

    Attributes:
        batch: The batch with the teacher's answer.
        y: Labels.
        sample_weight: Weights, as Keras passes them.
        student: The student's answer.
        training: Whether the student is being trained.
        lent: The teacher's variables with their values, while penalties may run it.
        labeled: For each output of which the hard loss was computed, where it reads labels.
    """

    def __init__(
        self,
        batch: Batch,
        y: Tensors | None,
        sample_weight: Tensors | None,
        student: Answer,
        training: bool,
        lent: Sequence[tuple[Any, Any]] = (),
        counted: Callable[["Seen"], list[Counted]] | None = None,
    ) -> None:
        self.batch = batch
        self.y = y
        self.sample_weight = sample_weight
        self.student = student
        self.training = training
        self.lent = lent
        self.labeled: list[Any] = []
        self._count = counted
        self._counted: list[Counted] | None = None

    @property
    def counted(self) -> list[Counted]:
        """What counts of each flat output of the student, once the hard loss was computed."""
        if self._counted is None:
            self._counted = self._count(self) if self._count is not None else []
        return self._counted

    @property
    def size(self) -> Tensor:
        """How many samples there are."""
        return ops.shape(keras.tree.flatten(self.batch.x)[0])[0]

    def for_hooks(self) -> hooks.Batch:
        """The batch as penalties read it."""
        return hooks.answered(
            self.batch.x, self.y, self.sample_weight, self.student, self.batch.answer
        )


class Value(NamedTuple):
    """What one term is worth on one batch.

    Attributes:
        whole: A scalar, which its weight multiplies.
        parts: Of a sum of several the scalars by name.
        finite: Whether the teacher's answer that it reads is finite, `None` where it reads none.
    """

    whole: Tensor
    parts: Mapping[str, Tensor] = MappingProxyType({})
    finite: Tensor = None

    def logs(self, name: str) -> dict[str, Tensor]:
        """The scalars that are logged of the term of this name."""
        found = {**self.parts, name: self.whole}
        if self.finite is None:
            return found
        # NaN in the logs, but not in the gradient, says that the teacher failed.
        return {each: or_nan(value, self.finite) for each, value in found.items()}


class Term(Protocol):
    """One term of the objective."""

    @property
    def name(self) -> str:
        """Its name in the logs."""

    @property
    def weight(self) -> Any:
        """What multiplies it, a scalar that may change between steps."""

    def value(self, seen: Seen) -> Value:
        """What it is worth, without its weight."""


class HardTerm:
    """The student's loss on the labels.

    Args:
        name: Its name in the logs.
        loss: What is called: a loss, or Keras's container of those given to `compile`.
        weight: `fn()`: what multiplies it.
        pairing: The models, or `None` where no teacher's mask counts.
        given: What was given to `compile`.
        exit: Which of several outputs it is of, `None` for all of them.
    """

    def __init__(
        self,
        name: str,
        loss: Losses,
        weight: Callable[[], Tensor],
        pairing: Pairing | None = None,
        given: Tensors | None = None,
        exit: int | None = None,
    ) -> None:
        self.name = name
        self.loss = loss
        self._weight = weight
        self._pairing = pairing
        self._given = given
        self._exit = exit

    @property
    def weight(self) -> Tensor:
        """What multiplies it."""
        return self._weight()

    def value(self, seen: Seen) -> Value:
        """The loss, noting which labels it reads."""
        whole = seen.student.output
        theirs: list[Tensor] = []
        if self._pairing is not None:
            pairs = paired(self._pairing.match, seen.batch.answer, seen.student)
            theirs = [tensor for tensor, _ in pairs]
        value, after, labeled = hard_loss.computed(
            self.loss,
            hard_loss.read_by_compiled if self._exit is None else hard_loss.read_by_loss,
            seen.y,
            whole if self._exit is None else whole[self._exit],
            seen.sample_weight,
            self._given,
            theirs,
        )
        seen.labeled += labeled
        if self._exit is None:
            seen.student = read_on(seen.student, whole, after)
        return Value(value)


class TransferTerms:
    """All that is transferred from a teacher, summed by the weights of the transfers.

    Args:
        pairing: The models and the transfers between them.
        temperature: The distiller's live temperature.
        weight: `fn()`: what multiplies the sum.
    """

    name = "distillation_loss"

    def __init__(self, pairing: Pairing, temperature: Tensor, weight: Callable[[], Tensor]) -> None:
        self._pairing = pairing
        self._temperature = temperature
        self._weight = weight

    @property
    def weight(self) -> Tensor:
        """What multiplies the sum."""
        return self._weight()

    def value(self, seen: Seen) -> Value:
        """The sum `sum_i weight_i * value_i`, and the value of each transfer by its name."""
        parts: dict[str, Any] = {}
        total: Any = 0.0
        temperature = ops.convert_to_tensor(self._temperature)
        for transfer, value in self._pairing.compared(
            seen.batch, seen.y, seen.student, seen.counted, temperature, seen.training
        ):
            parts[transfer.name] = parts.get(transfer.name, 0.0) + value
            total = total + times(ops.convert_to_tensor(transfer.weight), value)
        return Value(total, parts, seen.batch.finite)


class PeerTerm:
    """What outputs of one pass learn from each other: for each learner the mean over its teachers.

    Args:
        loss: The loss between two of them.
        pairs: Who teaches whom, as indices of the outputs.
        weight: `fn()`: what multiplies it.
    """

    name = "distillation_loss"

    def __init__(
        self, loss: Losses, pairs: Sequence[tuple[int, int]], weight: Callable[[], Tensor]
    ) -> None:
        self._loss = loss
        self._pairs = list(pairs)
        self._weight = weight

    @property
    def weight(self) -> Tensor:
        """What multiplies it."""
        return self._weight()

    def value(self, seen: Seen) -> Value:
        """The sum over the learners; no gradient reaches a teacher."""
        ours = isinstance(self._loss, DistillationLoss) and self._loss.reads_logits
        # As in a `Distiller`: losses of other makers compare what the models return.
        read = seen.student.logits if ours else seen.student.output
        total: Any = 0.0
        for learner in {learner for _, learner in self._pairs}:
            teachers = [teacher for teacher, other in self._pairs if other == learner]
            for teacher in teachers:
                value = compared(
                    self._loss,
                    ops.stop_gradient(read[teacher]),
                    read[learner],
                    *counts.counted(
                        seen.student.logits[teacher],
                        seen.student.logits[learner],
                        seen.sample_weight,
                        seen.labeled[learner],
                    ),
                    labels=seen.y,
                    training=seen.training,
                )
                total = total + value / len(teachers)
        return Value(total)


class Given(NamedTuple):
    """What Keras hands to `compute_loss`.

    Attributes:
        x: The batch.
        y: Labels.
        y_pred: What the student returned.
        sample_weight: Weights.
        training: Whether the student is being trained.
    """

    x: Any
    y: Any
    y_pred: Any
    sample_weight: Any
    training: bool


class Objective:
    """The sum of all terms.

    Args:
        terms: The hard losses first, since they tell which labels are read.
        alone: Those of a student whose teacher is not asked.
    """

    def __init__(self, terms: Sequence[Term], alone: Sequence[Term] = ()) -> None:
        self.terms = list(terms)
        self.alone = list(alone)

    def minimized(
        self, pairing: Pairing, given: Given, extra: Sequence[Tensor], metrics: TrainingMetrics
    ) -> Tensor:
        """The total loss of one batch, with its parts and the agreement booked.

        Args:
            pairing: The models, with the step that they are taking.
            given: What Keras hands on.
            extra: Scalars that are added to the sum, as regularizers are.
            metrics: Where everything is booked.

        Returns:
            A scalar; where no teacher was asked that of `alone`.
        """
        seen = seen_in_step(pairing, given.y, given.sample_weight, given.training)
        if seen is None:
            batch = Batch(given.x, Answer(None, [], {}), None, None)
            answer = Answer(given.y_pred, [], {})
            seen = Seen(batch, given.y, given.sample_weight, answer, given.training)
            return Objective(self.alone).total(seen, extra, metrics)
        total = self.total(seen, extra, metrics)
        if pairing.distills:
            agreement.book(metrics, pairing.match, seen.batch.answer, seen.student, seen.counted)
        return total

    def values(self, seen: Seen) -> dict[str, Value]:
        """The terms by name, not yet multiplied by their weights."""
        return {term.name: term.value(seen) for term in self.terms}

    def measured(self, seen: Seen) -> dict[str, Tensor]:
        """The same as scalars; of a sum of several each of these and not the sum."""
        found: dict[str, Tensor] = {}
        for name, value in self.values(seen).items():
            found.update(value.parts or {name: value.whole})
        return found

    def total(self, seen: Seen, extra: Sequence[Tensor], metrics: TrainingMetrics) -> Tensor:
        """The weighted sum of all terms, each booked under its name.

        Args:
            seen: What the terms read.
            extra: Scalars that are added to the sum, as regularizers are.
            metrics: Where they are booked.

        Returns:
            A scalar; 0, which has no gradient, where the teacher's answer is not finite.
        """
        size, values = seen.size, self.values(seen)
        for name, value in values.items():
            for each, scalar in value.logs(name).items():
                metrics.add_loss(each, scalar, size)
        weighted = [
            times(ops.convert_to_tensor(term.weight), values[term.name].whole)
            for term in self.terms
        ]
        total = added_up([*weighted, *extra])
        if seen.batch.finite is None:
            return total
        # A batch that the teacher fails on gives no gradient at all.
        return ops.where(seen.batch.finite, total, ops.zeros_like(total))


def of_distiller(
    distiller: hooks.Trained, pairing: Pairing, hard: Losses, more: Sequence[Term]
) -> Objective:
    """The terms of a compiled distiller, with the live weights that multiply them.

    Args:
        distiller: With its live weights.
        pairing: Its models, and how it was compiled.
        hard: Keras's container of the losses given to `compile`, or `None`.
        more: Terms beside the hard loss and what is transferred.
    """

    def weight_of_hard() -> Tensor:
        weight = ops.convert_to_tensor(distiller.student_loss_weight)
        if pairing.compiled.explicit:
            return weight
        return ops.convert_to_tensor(distiller.alpha) * weight

    def weight_of_distillation() -> Tensor:
        weight = ops.convert_to_tensor(distiller.distillation_loss_weight)
        if pairing.compiled.explicit:
            return weight
        return (1.0 - ops.convert_to_tensor(distiller.alpha)) * weight

    terms: list[Term] = []
    alone: list[Term] = []
    if hard:
        loss = distiller.loss
        terms.append(HardTerm("student_loss", hard, weight_of_hard, pairing, loss))
        alone.append(HardTerm("student_loss", hard, lambda: ops.ones(()), given=loss))
    if pairing.distills:
        terms.append(TransferTerms(pairing, distiller.temperature, weight_of_distillation))
    return Objective([*terms, *more], alone)


def seen_in_step(
    pairing: Pairing, y: Tensors | None, sample_weight: Tensors | None, training: bool
) -> Seen | None:
    """What the terms read of the step under way, `None` where the teacher was not asked.

    Args:
        pairing: The models.
        y: Labels.
        sample_weight: Weights, as Keras passes them.
        training: Whether the student is being trained.
    """
    under_way = pairing.under_way.step
    if under_way is None or under_way.student is None:
        return None

    def counted(seen: Seen) -> list[Counted]:
        return pairing.counted(seen.batch, seen.student, seen.sample_weight, seen.labeled)

    batch, student, lent = under_way.batch, under_way.student, under_way.lent
    return Seen(batch, y, sample_weight, student, training, lent, counted)

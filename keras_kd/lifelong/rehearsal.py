"""Methods that replay rows of the memory in every step, with their labels or their old answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_kd.lifelong.method import Method
from keras_kd.utils import checks
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Tensor

if TYPE_CHECKING:
    from keras_kd.lifelong.lesson import Lesson


def masked_mse(stored: Tensor, logits: Tensor, known: Tensor) -> Tensor:
    """Squared distance of logits, averaged over the columns that were known when they were stored.

    Args:
        stored: `(batch, classes)`; whatever stands in the other columns.
        logits: Of the same shape.
        known: `(batch, classes)`, 1 or 0.

    Returns:
        Tensor `(batch,)`, 0 where no column was known.
    """
    known = ops.cast(known, logits.dtype)
    # Selected before the square: what the other columns hold may be anything.
    apart = ops.where(known > 0, ops.cast(stored, logits.dtype) - logits, ops.zeros_like(logits))
    return ops.sum(ops.square(apart), axis=-1) / ops.maximum(ops.sum(known, axis=-1), 1.0)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """The mean of those values that count, 0 where none does.

    Args:
        values: `(batch,)`.
        weight: `(batch,)`.
    """
    weight = ops.cast(weight, values.dtype)
    return ops.sum(values * weight) / ops.maximum(ops.sum(weight), 1.0)


class Replay(Method):
    """Experience replay: each step reads a batch of the task and one of the memory, in one pass.

    Minimizes the mean hard loss of both together. Rows go into a reservoir or balanced memory in
    every step of every epoch; a herding memory is filled when the task ends.

    Args:
        batch_size: Rows that are replayed a step. Defaults to as many as come from the task.

    Raises:
        TypeError: If `batch_size` is no integer.
        ValueError: If it is not positive.

    Examples:
        >>> learner = Learner(model, method=Replay(), memory=Memory(200))

    Reference:
        - [Rolnick et al., 2019](https://arxiv.org/abs/1811.11682)
        - [Chaudhry et al., 2019](https://arxiv.org/abs/1902.10486)
    """

    uses_memory = True
    draws = together = ("replayed",)

    def __init__(self, batch_size: int | None = None) -> None:
        self.draw_size = None if batch_size is None else checks.whole("batch_size", batch_size)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {"batch_size": self.draw_size}

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """The mean over the batch and the rows replayed beside it."""
        rows = lesson.per_row(y, outputs["logits"])
        replayed = lesson.per_row(parts["replayed_y"], outputs["replayed_logits"])
        weight = ops.concatenate([ops.ones_like(rows), parts["replayed_weight"]])
        return {"label_loss": weighted_mean(ops.concatenate([rows, replayed]), weight)}


class DarkReplay(Method):
    """Dark experience replay: rows of the memory are to be answered as they were when they came.

    Minimizes `CE(y, h(x)) + alpha * MSE(z', h(x')) + beta * CE(y'', h(x''))`: the batch; rows `x'`
    of the memory against the logits `z'` that the model had for them in the very step in which they
    were stored, in training mode; and other rows `x''` of it, drawn on their own, against their
    labels. With `beta=0` it is DER, otherwise DER++. The mean square is over the classes that were
    known when the logits were stored: for classes that came later they say nothing.

    Args:
        alpha: Weight of the stored logits.
        beta: Weight of the stored labels.
        batch_size: Rows of each draw. Defaults to as many as come from the task.
        forward: `"separate"` runs the model once for each of the three, as the authors do;
            `"joint"` once for all, which is faster, and gives BatchNormalization statistics of
            old and new rows together.

    Raises:
        TypeError: If a weight is no number.
        ValueError: If a weight is negative, or `forward` is neither.

    Examples:
        >>> method = DarkReplay(alpha=0.2, beta=0.5)
        >>> learner = Learner(model, method=method, memory=Memory(200))

    Reference:
        - [Buzzega et al., 2020](https://arxiv.org/abs/2004.07211), equations 6 and 7
    """

    terms: tuple[str, ...] = ("label_loss", "logit_loss", "replay_loss")
    uses_memory = True
    stores_logits = True

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.5,
        batch_size: int | None = None,
        forward: str = "separate",
    ) -> None:
        self.alpha, self.beta = checks.number("alpha", alpha, 0), checks.number("beta", beta, 0)
        self.draw_size = None if batch_size is None else checks.whole("batch_size", batch_size)
        if forward not in ("separate", "joint"):
            raise ValueError(
                f"`forward` is 'separate' or 'joint'. Received: forward={forward!r}."
                + did_you_mean(forward, ("separate", "joint"), quote="'")
            )
        self.forward = forward
        weighted = (("logits", self.alpha), ("labels", self.beta))
        self.draws: tuple[str, ...] = tuple(name for name, weight in weighted if weight)
        self.together = self.draws if forward == "joint" else ()
        named = zip(DarkReplay.terms[1:], (self.alpha, self.beta))
        self.terms = ("label_loss", *(name for name, weight in named if weight))

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {
            "alpha": self.alpha,
            "beta": self.beta,
            "batch_size": self.draw_size,
            "forward": self.forward,
        }

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """The batch, the stored logits and the stored labels."""
        terms = {"label_loss": ops.mean(lesson.per_row(y, outputs["logits"]))}
        if "logits" in self.draws:
            logits = self._replayed(lesson, parts, outputs, "logits")
            stored = ops.take(lesson.stored, parts["logits_slots"], axis=0)
            ranks = ops.convert_to_tensor(lesson.ranks)[None, :]
            known = ops.less(ranks, ops.cast(parts["logits_known"], "int32")[:, None])
            apart = masked_mse(stored, ops.cast(logits, stored.dtype), known)
            terms["logit_loss"] = self.alpha * weighted_mean(apart, parts["logits_weight"])
        if "labels" in self.draws:
            logits = self._replayed(lesson, parts, outputs, "labels")
            values = lesson.per_row(parts["labels_y"], logits)
            terms["replay_loss"] = self.beta * weighted_mean(values, parts["labels_weight"])
        # After they were read, so that the rows of this step are not compared with themselves.
        lesson.store(parts, outputs["logits"])
        return terms

    def _replayed(
        self, lesson: Lesson, parts: dict[str, Any], outputs: Mapping[str, Tensor], name: str
    ) -> Tensor:
        """The logits of the rows of a draw."""
        if self.forward == "joint":
            return outputs[f"{name}_logits"]
        return lesson.network(parts[f"{name}_x"], training=True)["logits"]

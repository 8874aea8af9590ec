"""Methods that ask the model as it was before the task, about the rows of the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_kd.lifelong.method import Method
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor

if TYPE_CHECKING:
    from keras_kd.lifelong.lesson import Lesson


def softened_crossentropy(old: Tensor, new: Tensor, temperature: float) -> Tensor:
    """`-sum_c softmax(old / T)_c * log softmax(new / T)_c`, one value a row, without `T**2`.

    Args:
        old: Logits `(batch, classes)` that are learned from.
        new: Logits of the same shape.
        temperature: `T`.

    Returns:
        Tensor `(batch,)`.
    """
    old, new = ops.cast(old, "float32") / temperature, ops.cast(new, "float32") / temperature
    return -ops.sum(ops.softmax(old, axis=-1) * ops.log_softmax(new, axis=-1), axis=-1)


class LearningWithoutForgetting(Method):
    """Keep the answers that the model gave for the rows of the task before it.

    Minimizes `CE(y, z) + weight * CE(softmax(z_old / T), softmax(z / T))`, the second over the
    columns that there were before the task alone, with `z_old` of the model at the beginning of the
    task, in inference mode. It keeps tasks apart within themselves; told no task, classes of
    earlier ones are hardly ever answered, since no row of them is seen.

    Args:
        weight: Weight of the old answers.
        temperature: `T`, positive.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If one is out of range.

    Examples:
        >>> learner = Learner(model, method=LearningWithoutForgetting())

    Reference:
        - [Li and Hoiem, 2016](https://arxiv.org/abs/1606.09282), equations 2 and 3
    """

    terms = ("label_loss", "distillation_loss")
    reads_old = True

    def __init__(self, weight: float = 1.0, temperature: float = 2.0) -> None:
        self.weight = checks.number("weight", weight, 0)
        self.temperature = checks.positive("temperature", temperature)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {"weight": self.weight, "temperature": self.temperature}

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """The hard loss and the old answers."""
        terms = super().loss(lesson, parts, y, outputs)
        if lesson.old is not None:
            old = lesson.read_old(parts["x"])["logits"]
            apart = softened_crossentropy(old, lesson.of_old(outputs["logits"]), self.temperature)
            terms["distillation_loss"] = self.weight * ops.mean(apart)
        return terms

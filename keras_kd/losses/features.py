"""Losses between feature maps: what the teacher sees inside."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_kd.losses.base import DistillationLoss
from keras_kd.typing import Tensor


def feature_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean squared difference of features.

    Args:
        teacher: `(batch, units)`, `(batch, tokens, units)` or
            `(batch, height, width, channels)`.
        student: Same shape.

    Returns:
        `(batch,)`, or `(batch, tokens)` where the features have one axis of tokens.
    """
    squared = ops.square(teacher - student)
    if len(squared.shape) == 3:
        return ops.mean(squared, axis=-1)
    return ops.mean(ops.reshape(squared, (ops.shape(squared)[0], -1)), axis=-1)


@keras.saving.register_keras_serializable(package="keras_kd")
class Hint(DistillationLoss):
    """Mean squared difference between a teacher's and a student's features.

    `mean((f_t - projector(f_s))**2)`; the projector is the transfer's. The
    paper's weight in a sum with the hard loss is 100.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, units)`, `(batch, tokens, units)` or
            `(batch, height, width, channels)`.
        y_pred: Student features after the projector, same shape.

    Returns:
        Squared units of the features, `(batch,)`, or `(batch, tokens)`, before
        reduction.

    Raises:
        ValueError: If the shapes differ and no projector joins them.

    Example:
        >>> loss = Hint()
        >>> float(loss([[1.0, 2.0]], [[1.0, 0.0]]))
        2.0

    Reference:
        - [Romero et al., 2015](https://arxiv.org/abs/1412.6550), section 2.2
    """

    per_position: ClassVar[bool] = True

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "hint",
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction=reduction, name=name, dtype=dtype)

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Check that both sides have the same shape."""
        if any(
            t is not None and s is not None and t != s
            for t, s in zip(teacher_shape[1:], student_shape[1:])
        ) or len(teacher_shape) != len(student_shape):
            raise ValueError(
                f"`{self.name}` compares features of the same shape. Received: teacher "
                f"{tuple(teacher_shape)}, student {tuple(student_shape)}. Give the transfer a "
                '`projector="linear"`, or tap layers of equal shape.'
            )
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)` or `(batch, tokens)`."""
        return feature_mse(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        config = super().get_config()
        # A plain difference of features has no temperature.
        del config["temperature"]
        return config

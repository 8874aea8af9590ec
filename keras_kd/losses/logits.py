"""Losses that match class logits themselves, and the base of all losses between logits."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_kd.losses.base import DistillationLoss, last_axis_equal, require_positive
from keras_kd.losses.geometry import huber
from keras_kd.losses.temperatures import AdaptiveTemperature
from keras_kd.utils.checks import may_be_one
from keras_kd.utils.types import DType, Tensor


def standardized(logits: Tensor) -> Tensor:
    """Logits with zero mean and unit sample standard deviation over the classes.

    `(z - mean(z)) / (1e-7 + std(z))`, `std` with one degree of freedom less
    than there are classes.

    Args:
        logits: `(batch, ..., classes)`, unnormalized.

    Returns:
        Tensor of the same shape.

    Reference:
        - [Sun et al., 2024](https://arxiv.org/abs/2403.01427), section 4
    """
    centered = logits - ops.mean(logits, axis=-1, keepdims=True)
    count = max(int(logits.shape[-1]) - 1, 1)
    variance = ops.sum(ops.square(centered), axis=-1, keepdims=True) / count
    # Constant logits are 0 whatever they are divided by. Dividing them by 1 keeps
    # their gradient of order 1: sqrt has an infinite slope at 0, 1e-7 one of 1e7.
    constant = ops.equal(variance, 0)
    deviation = ops.sqrt(ops.where(constant, ops.ones_like(variance), variance))
    return centered / (deviation + ops.cast(1e-7, logits.dtype))


def logit_mse(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """Mean over the classes of `((teacher - student) / T)**2`; shape `(batch, ...)`."""
    return ops.mean(ops.square((teacher - student) / ops.cast(temperature, student.dtype)), axis=-1)


def logit_huber(teacher: Tensor, student: Tensor, temperature: Tensor, delta: float) -> Tensor:
    """Mean over the classes of the Huber function of `(teacher - student) / T`.

    Quadratic, `d**2 / 2`, up to `delta`; linear, `delta * (|d| - delta / 2)`, beyond.
    """
    difference = (teacher - student) / ops.cast(temperature, student.dtype)
    return ops.mean(huber(difference, delta), axis=-1)


class LogitLoss(DistillationLoss):
    """Base of the losses that compare logits `(batch, ..., classes)`.

    Args:
        temperature: Positive float; `None` follows the distiller.
        standardize: Whether both sides are standardized over the classes first
            (logit standardization, Sun et al. 2024; there `T=2`, weight 9,
            hard loss 0.1).
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.
    """

    reads_logits: ClassVar[bool] = True
    single_layer = True
    per_position: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, name=name, dtype=dtype)
        self.standardize = standardize

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Check that both sides have the same classes."""
        last_axis_equal(teacher_shape, student_shape, self.name, "classes")
        if self.standardize and student_shape[-1] == 1:
            raise ValueError(
                f"`{self.name}` cannot standardize one class: it would always be 0. Received: "
                f"logits {tuple(student_shape)} with standardize=True. Leave `standardize` off."
            )
        super().build(teacher_shape, student_shape)

    def require_alike(self, teacher: Tensor, student: Tensor) -> None:
        """Raise `ValueError` unless each row has one row, each position one and each class one."""
        if not may_be_one(teacher.shape, student.shape):
            raise ValueError(
                f"`{self.name}` compares logits of one shape. Received: teacher "
                f"{tuple(teacher.shape)}, student {tuple(student.shape)}. Bring both to "
                "(batch, ..., classes), with the same positions."
            )

    def prepared(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both logits, standardized where the user asked for it, and the temperature.

        The temperature is a scalar, or `(batch, ..., 1)` where it adapts to the logits.
        """
        temperature = self.temperature
        if isinstance(temperature, AdaptiveTemperature):
            temperature = temperature(teacher, student, self.counting(student))
        temperature = ops.cast(temperature, self.computed_in)
        if self.standardize:
            teacher, student = standardized(teacher), standardized(student)
        return teacher, student, temperature

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "standardize": self.standardize}


@keras.saving.register_keras_serializable(package="keras_kd")
class LogitMSE(LogitLoss):
    """Mean over the classes of the squared difference of logits, divided by `T`.

    `mean_c ((teacher_c - student_c) / T)**2`. Unlike the softened losses it
    stays plain by default: `temperature` is 1, not the distiller's.

    Args:
        temperature: Positive float by which both logits are divided, or `None`
            to follow the distiller. Defaults to 1.
        standardize: Whether both logits are standardized over the classes first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits, `(batch, ..., classes)`.
        y_pred: Student logits, same shape.

    Returns:
        Squared logits, dimensionless, `(batch, ...)` before reduction.

    Raises:
        ValueError: If `temperature` is not positive and finite, or the numbers
            of classes differ.

    Examples:
        >>> loss = LogitMSE()
        >>> float(loss([[2.0, 0.0]], [[1.0, 0.0]]))
        0.5

    Reference:
        - [Ba & Caruana, 2014](https://arxiv.org/abs/1312.6184), section 2.2
        - [Kim et al., 2021](https://arxiv.org/abs/2105.08919), section 3
    """

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = 1.0,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "logit_mse",
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        return logit_mse(*self.prepared(y_true, y_pred))


@keras.saving.register_keras_serializable(package="keras_kd")
class LogitHuber(LogitLoss):
    """Mean over the classes of the Huber function of the difference of logits.

    With `d = |teacher_c - student_c| / T`: `d**2 / 2` up to `delta`,
    `delta * (d - delta / 2)` beyond it, so that single wild logits do not
    dominate.

    Args:
        delta: Positive float, in logits: where the square becomes a line.
        temperature: Positive float by which both logits are divided, or `None`
            to follow the distiller. Defaults to 1.
        standardize: Whether both logits are standardized over the classes first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits, `(batch, ..., classes)`.
        y_pred: Student logits, same shape.

    Returns:
        Dimensionless, `(batch, ...)` before reduction.

    Raises:
        ValueError: If `temperature` or `delta` is not positive and finite, or
            the numbers of classes differ.

    Examples:
        >>> loss = LogitHuber()
        >>> float(loss([[3.0, 0.0]], [[0.0, 0.0]]))
        1.25

    Reference:
        - [Kim et al., 2021](https://arxiv.org/abs/2105.08919), section 3, with
          the Huber function in place of the square
    """

    def __init__(
        self,
        delta: float = 1.0,
        temperature: float | AdaptiveTemperature | None = 1.0,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "logit_huber",
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)
        require_positive("delta", delta)
        self.delta = delta

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        return logit_huber(*self.prepared(y_true, y_pred), self.delta)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "delta": self.delta}

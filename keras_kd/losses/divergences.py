"""Divergences between softened class distributions: the teacher's answers as soft targets."""

from functools import partial
from typing import Any

import keras
from keras import ops

from keras_kd.losses.logits import LogitLoss
from keras_kd.losses.temperatures import AdaptiveTemperature
from keras_kd.losses.vocabulary import in_parts, is_half, is_large
from keras_kd.typing import Tensor


def softened_kl(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """KL divergence between temperature-softened class distributions.

    `T**2 * sum_c p_c * (log p_c - log q_c)` with `p = softmax(teacher / T)`,
    `q = softmax(student / T)`.

    Args:
        teacher: Logits `(batch, ..., classes)`, unnormalized.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., 1)`, dimensionless.

    Returns:
        Tensor `(batch, ...)`, in nats.
    """
    # Both sides stay in log space: probabilities clipped at 1e-7 lose the
    # gradient of every logit that trails by more than 16.
    temperature = ops.cast(temperature, student.dtype)
    log_p = ops.log_softmax(teacher / temperature, axis=-1)
    log_q = ops.log_softmax(student / temperature, axis=-1)
    kl = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
    # The gradient of the softened KL shrinks as 1 / temperature**2.
    return squared_temperature(temperature) * kl


def softened_kl_slope(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """Derivative of `softened_kl` with respect to the student's logits: `T * (q - p)`."""
    p = ops.softmax(teacher / temperature, axis=-1)
    q = ops.softmax(student / temperature, axis=-1)
    return temperature * (q - p)


def squared_temperature(temperature: Tensor) -> Tensor:
    """`T**2` with the shape of the values: without the axis of the classes."""
    squared = ops.square(temperature)
    return squared[..., 0] if len(squared.shape) else squared


def reverse_kl(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """KL divergence from the student's to the teacher's softened distribution.

    `sum_c q_c * (log q_c - log p_c)` with `p = softmax(teacher / T)`,
    `q = softmax(student / T)`; no `T**2`.

    Args:
        teacher: Logits `(batch, ..., classes)`, unnormalized.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., 1)`, dimensionless.

    Returns:
        Tensor `(batch, ...)`, in nats.
    """
    temperature = ops.cast(temperature, student.dtype)
    log_p = ops.log_softmax(teacher / temperature, axis=-1)
    log_q = ops.log_softmax(student / temperature, axis=-1)
    return ops.sum(ops.exp(log_q) * (log_q - log_p), axis=-1)


def reverse_kl_slope(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """Derivative of `reverse_kl` with respect to the student's logits.

    `q_c * (log q_c - log p_c - KL(q || p)) / T`.
    """
    log_p = ops.log_softmax(teacher / temperature, axis=-1)
    log_q = ops.log_softmax(student / temperature, axis=-1)
    return _centered(log_q, log_q - log_p) / temperature


def jensen_shannon_slope(
    teacher: Tensor, student: Tensor, temperature: Tensor, beta: float
) -> Tensor:
    """Derivative of `jensen_shannon` with respect to the student's logits.

    `(1 - beta) * q_c * (log q_c - log m_c - KL(q || m)) / T`, with the limits
    `(q - p) / T` at `beta=0` and that of `reverse_kl` at `beta=1`.
    """
    if beta == 1:
        return reverse_kl_slope(teacher, student, temperature)
    log_p = ops.log_softmax(teacher / temperature, axis=-1)
    log_q = ops.log_softmax(student / temperature, axis=-1)
    if beta == 0:
        return (ops.exp(log_q) - ops.exp(log_p)) / temperature
    log_m = _log_mixture(log_p, log_q, beta)
    return (1 - beta) * _centered(log_q, log_q - log_m) / temperature


def _centered(log_q: Tensor, values: Tensor) -> Tensor:
    """`q * (values - sum_c q_c values_c)`: how the mean of values under `q` moves with its logits.

    Holds for values whose own derivatives have mean 0 under `q`, as logarithms have.
    """
    q = ops.exp(log_q)
    return q * (values - ops.sum(q * values, axis=-1, keepdims=True))


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """`log(beta * p + (1 - beta) * q)`."""
    # logaddexp has half its gradient missing where both sides are equal.
    top = ops.stop_gradient(ops.maximum(log_p, log_q))
    return ops.log(beta * ops.exp(log_p - top) + (1 - beta) * ops.exp(log_q - top)) + top


def jensen_shannon(teacher: Tensor, student: Tensor, temperature: Tensor, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence of the softened distributions.

    `beta * KL(p || m) + (1 - beta) * KL(q || m)`, `m = beta * p + (1 - beta) * q`,
    with the limits `KL(p || q)` at `beta=0` and `KL(q || p)` at `beta=1`; no `T**2`.

    Args:
        teacher: Logits `(batch, ..., classes)`, unnormalized.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., 1)`, dimensionless.
        beta: Share of the teacher in the mixture, in [0, 1].

    Returns:
        Tensor `(batch, ...)`, in nats.
    """
    if beta == 1:
        return reverse_kl(teacher, student, temperature)
    if beta == 0:
        return reverse_kl(student, teacher, temperature)
    temperature = ops.cast(temperature, student.dtype)
    log_p = ops.log_softmax(teacher / temperature, axis=-1)
    log_q = ops.log_softmax(student / temperature, axis=-1)
    log_m = _log_mixture(log_p, log_q, beta)
    from_teacher = ops.sum(ops.exp(log_p) * (log_p - log_m), axis=-1)
    from_student = ops.sum(ops.exp(log_q) * (log_q - log_m), axis=-1)
    return beta * from_teacher + (1 - beta) * from_student


def total_variation(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """Total variation distance of the softened distributions, times `T**2`.

    Args:
        teacher: Logits `(batch, ..., classes)`, unnormalized.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., 1)`, dimensionless.

    Returns:
        Tensor `(batch, ...)`, between 0 and `T**2`.
    """
    temperature = ops.cast(temperature, student.dtype)
    p = ops.softmax(teacher / temperature, axis=-1)
    q = ops.softmax(student / temperature, axis=-1)
    return squared_temperature(temperature) * 0.5 * ops.sum(ops.abs(p - q), axis=-1)


def softened_bernoulli_kl(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """KL divergence of independent softened sigmoid outputs, summed over the outputs.

    `T**2 * sum_c [p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))]` with
    `p = sigmoid(teacher / T)`, `q = sigmoid(student / T)`.

    Args:
        teacher: Logits `(batch, ..., outputs)`.
        student: Logits of the same shape.
        temperature: Positive scalar, dimensionless.

    Returns:
        Tensor `(batch, ...)`, in nats.
    """
    temperature = ops.cast(temperature, student.dtype)
    t, s = teacher / temperature, student / temperature
    # log sigmoid(-z) is log(1 - sigmoid(z)) without the cancellation.
    kl = ops.sigmoid(t) * (ops.log_sigmoid(t) - ops.log_sigmoid(s)) + ops.sigmoid(-t) * (
        ops.log_sigmoid(-t) - ops.log_sigmoid(-s)
    )
    return squared_temperature(temperature) * ops.sum(kl, axis=-1)


class PartwiseLoss(LogitLoss):
    """Base of the losses that compare tokens over a large vocabulary in parts.

    Half-precision logits of a large vocabulary stay as they are, and are cast part by
    part, except where all of them are read at once first: to be standardized, or for a
    temperature that adapts to them.

    Args:
        temperature: As in `LogitLoss`.
        standardize: As in `LogitLoss`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.
    """

    def converted(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits, as they are where parts of them are cast, else in the loss's precision."""
        whole = self.standardize or isinstance(self.temperature, AdaptiveTemperature)
        if whole or self.dtype != "float32":
            return super().converted(teacher, student)
        if is_half(teacher) and is_half(student) and is_large(student):
            return teacher, student
        return super().converted(teacher, student)


@keras.saving.register_keras_serializable(package="keras_kd")
class SoftTargets(PartwiseLoss):
    """Match the teacher's softened class distribution (Hinton's distillation).

    Minimizes `T**2 * KL(softmax(teacher / T) || softmax(student / T))`. The
    factor `T**2` keeps its gradient comparable to the hard-label loss as `T`
    varies. Usual weights are 0.9 beside 0.1 of the hard loss at `T=4`, and 0.5
    each at `T=1` on ImageNet. Tokens over a vocabulary of 4096 or more are
    compared a few at a time, so that a batch takes the memory of its logits and
    their gradient, not of several copies.

    Args:
        temperature: Positive float, dimensionless, or `FLSW` / `CWSM`.
            Defaults to `None`: follow the distiller's live temperature.
        standardize: Whether both logits are standardized over the classes first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits (not probabilities), `(batch, ..., classes)`.
        y_pred: Student logits, same shape.

    Returns:
        Loss in nats, `(batch, ...)` before reduction.

    Raises:
        ValueError: If `temperature` is not positive and finite, or the numbers
            of classes differ.

    Examples:
        >>> loss = SoftTargets(temperature=4.0)
        >>> float(loss([[2.0, 0.0]], [[2.0, 0.0]]))
        0.0

    Reference:
        - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 2
    """

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "soft_targets",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        prepared = self.prepared(y_true, y_pred)
        if is_large(y_pred):
            return in_parts(softened_kl, softened_kl_slope, *prepared)
        return softened_kl(*prepared)


@keras.saving.register_keras_serializable(package="keras_kd")
class BinarySoftTargets(LogitLoss):
    """Match independent sigmoid outputs: multi-label and one-unit models.

    Minimizes `T**2 * sum_c KL(Bernoulli(sigmoid(teacher_c / T)) ||
    Bernoulli(sigmoid(student_c / T)))`, summed over the outputs.

    Args:
        temperature: Positive float, dimensionless, or `FLSW` / `CWSM`.
            Defaults to `None`: follow the distiller's live temperature.
        standardize: Whether both logits are standardized over the outputs first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits, `(batch, ..., outputs)`.
        y_pred: Student logits, same shape.

    Returns:
        Loss in nats, `(batch, ...)` before reduction.

    Raises:
        ValueError: If `temperature` is not positive and finite, or the numbers
            of outputs differ.

    Examples:
        >>> loss = BinarySoftTargets()
        >>> float(loss([[2.0, -1.0]], [[2.0, -1.0]]))
        0.0

    Reference:
        - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531), section 2, for
          each output by itself
    """

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "binary_soft_targets",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        return softened_bernoulli_kl(*self.prepared(y_true, y_pred))


@keras.saving.register_keras_serializable(package="keras_kd")
class ReverseKL(PartwiseLoss):
    """Let the student settle on some of the teacher's classes: KL from student to teacher.

    Minimizes `KL(softmax(student / T) || softmax(teacher / T))`. It punishes what
    the student believes and the teacher does not, so that a small language model
    keeps to the teacher's likely tokens. No factor `T**2`; the paper's `T` is
    0.9. A student that is certain of a wrong class gets next to no gradient from
    this loss: begin from a trained student, or mix with `SoftTargets`.

    Args:
        temperature: Positive float, dimensionless, or `FLSW` / `CWSM`.
            Defaults to `None`: follow the distiller's live temperature.
        standardize: Whether both logits are standardized over the classes first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits, `(batch, ..., classes)`.
        y_pred: Student logits, same shape.

    Returns:
        Loss in nats, `(batch, ...)` before reduction.

    Raises:
        ValueError: If `temperature` is not positive and finite, or the numbers
            of classes differ.

    Examples:
        >>> loss = ReverseKL()
        >>> round(float(loss([[0.0, 0.0]], [[20.0, 0.0]])), 4)
        0.6931

    Reference:
        - [Agarwal et al., 2024](https://arxiv.org/abs/2306.13649), section 2
    """

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "reverse_kl",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        prepared = self.prepared(y_true, y_pred)
        if is_large(y_pred):
            return in_parts(reverse_kl, reverse_kl_slope, *prepared)
        return reverse_kl(*prepared)


@keras.saving.register_keras_serializable(package="keras_kd")
class JensenShannon(PartwiseLoss):
    """Generalized Jensen-Shannon divergence between teacher and student (GKD).

    With `t = softmax(teacher / T)`, `s = softmax(student / T)` and
    `m = beta * t + (1 - beta) * s`: `beta * KL(t || m) + (1 - beta) * KL(s || m)`.
    `beta=0` is `KL(t || s)` and `beta=1` is `KL(s || t)`. No factor `T**2`; the
    paper's `T` is 0.9.

    Args:
        beta: Float in [0, 1], dimensionless: share of the teacher in the mixture.
        temperature: Positive float, dimensionless, or `FLSW` / `CWSM`.
            Defaults to `None`: follow the distiller's live temperature.
        standardize: Whether both logits are standardized over the classes first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits, `(batch, ..., classes)`.
        y_pred: Student logits, same shape.

    Returns:
        Loss in nats, `(batch, ...)` before reduction; at `beta=0.5` at most `log(2)`.

    Raises:
        ValueError: If `temperature` is not positive and finite, `beta` is
            outside [0, 1], or the numbers of classes differ.

    Examples:
        >>> loss = JensenShannon(beta=0.5)
        >>> round(float(loss([[50.0, 0.0]], [[0.0, 50.0]])), 4)
        0.6931

    Reference:
        - [Agarwal et al., 2024](https://arxiv.org/abs/2306.13649), section 2
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "jensen_shannon",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)
        if not 0 <= beta <= 1:
            raise ValueError(
                f"`beta` must lie in [0, 1]. Received: beta={beta!r}. 0 is the KL from teacher to "
                "student, 1 the reverse."
            )
        self.beta = beta

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        prepared = self.prepared(y_true, y_pred)
        if is_large(y_pred):
            value = partial(jensen_shannon, beta=self.beta)
            return in_parts(value, partial(jensen_shannon_slope, beta=self.beta), *prepared)
        return jensen_shannon(*prepared, self.beta)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "beta": self.beta}


@keras.saving.register_keras_serializable(package="keras_kd")
class TotalVariation(LogitLoss):
    """Half the absolute difference of the softened probabilities.

    `T**2 / 2 * sum_c |softmax(teacher / T)_c - softmax(student / T)_c|`: the
    probability mass that would have to move. Bounded by `T**2`.

    Args:
        temperature: Positive float, dimensionless, or `FLSW` / `CWSM`.
            Defaults to `None`: follow the distiller's live temperature.
        standardize: Whether both logits are standardized over the classes first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits, `(batch, ..., classes)`.
        y_pred: Student logits, same shape.

    Returns:
        Probability times `T**2`, `(batch, ...)` before reduction.

    Raises:
        ValueError: If `temperature` is not positive and finite, or the numbers
            of classes differ.

    Examples:
        >>> loss = TotalVariation()
        >>> float(loss([[50.0, -50.0]], [[0.0, 0.0]]))
        0.5

    Reference:
        - [Wen et al., 2023](https://arxiv.org/abs/2307.15190), section 3
    """

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "total_variation",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        return total_variation(*self.prepared(y_true, y_pred))

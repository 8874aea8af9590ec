"""Divergences between softened class distributions: the teacher's answers as soft targets."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import keras
from keras import ops

from keras_kd.losses.logits import LogitLoss
from keras_kd.losses.temperatures import AdaptiveTemperature
from keras_kd.losses.vocabulary import in_parts, is_half, is_large
from keras_kd.models import meaning
from keras_kd.utils.types import DType, Tensor


class Divergence(NamedTuple):
    """A divergence between softmax distributions, of the log-probabilities `log p` and `log q`.

    Attributes:
        value: `fn(log_p, log_q)`, of `(..., classes)`: the divergence `(..., 1)`, in nats.
        slope: `fn(log_p, log_q)`: its derivative with respect to the logits whose softmax is `q`,
            `(..., classes)`.
    """

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`sum_c p_c * (log p_c - log q_c)`, `(..., 1)`."""
    # Both sides stay in log space: probabilities clipped at 1e-7 lose the
    # gradient of every logit that trails by more than 16.
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1, keepdims=True)


def _centered(log_q: Tensor, values: Tensor) -> Tensor:
    """`q * (values - sum_c q_c values_c)`: how the mean of values under `q` moves with its logits.

    Holds for values whose own derivatives have mean 0 under `q`, as logarithms have.
    """
    q = ops.exp(log_q)
    return q * (values - ops.sum(q * values, axis=-1, keepdims=True))


KL = Divergence(_kl, lambda log_p, log_q: ops.exp(log_q) - ops.exp(log_p))
"""`KL(p || q)`, of the slope `q - p`."""

REVERSE_KL = Divergence(
    lambda log_p, log_q: _kl(log_q, log_p),
    lambda log_p, log_q: _centered(log_q, log_q - log_p),
)
"""`KL(q || p)`, of the slope `q * (log q - log p - KL(q || p))`."""


def mixture(beta: float) -> Divergence:
    """The generalized Jensen-Shannon divergence, with its limits at 0 and 1.

    `beta * KL(p || m) + (1 - beta) * KL(q || m)`, `m = beta * p + (1 - beta) * q`, of the slope
    `(1 - beta) * q * (log q - log m - KL(q || m))`.

    Args:
        beta: Share of `p` in the mixture, in [0, 1].

    Returns:
        The divergence.
    """
    if beta == 0:
        return KL
    if beta == 1:
        return REVERSE_KL

    def log_mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
        # logaddexp has half its gradient missing where both sides are equal.
        top = ops.stop_gradient(ops.maximum(log_p, log_q))
        return ops.log(beta * ops.exp(log_p - top) + (1 - beta) * ops.exp(log_q - top)) + top

    def value(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = log_mixture(log_p, log_q)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    def slope(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (1 - beta) * _centered(log_q, log_q - log_mixture(log_p, log_q))

    return Divergence(value, slope)


def at_once(
    divergence: Divergence, teacher: Tensor, student: Tensor, temperature: Tensor
) -> Tensor:
    """A divergence of softened distributions, `p` the teacher's and `q` the student's.

    Args:
        divergence: Which.
        teacher: Logits `(batch, ..., classes)`, unnormalized.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., 1)`, dimensionless.

    Returns:
        Tensor `(batch, ...)`, in nats.
    """
    temperature = ops.cast(temperature, student.dtype)
    log_p = ops.log_softmax(teacher / temperature, axis=-1)
    log_q = ops.log_softmax(student / temperature, axis=-1)
    return divergence.value(log_p, log_q)[..., 0]


def over_tokens(
    divergence: Divergence, teacher: Tensor, student: Tensor, temperature: Tensor
) -> Tensor:
    """The same as `at_once`, for a few tokens at a time; no gradient reaches the teacher.

    Args:
        divergence: Which.
        teacher: Logits `(batch, ..., tokens, classes)`, unnormalized.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., tokens, 1)`, dimensionless.

    Returns:
        Tensor `(batch, ..., tokens)`, in nats, float32 or float64.
    """

    def logarithms(teacher: Tensor, student: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        return ops.log_softmax(teacher / temperature), ops.log_softmax(student / temperature)

    def value(*rows: Tensor) -> Tensor:
        return divergence.value(*logarithms(*rows))

    def slope(*rows: Tensor) -> Tensor:
        return divergence.slope(*logarithms(*rows)) / rows[2]

    return in_parts(value, slope, teacher, student, temperature)[0]


def _softened(
    divergence: Divergence, teacher: Tensor, student: Tensor, temperature: Tensor
) -> Tensor:
    compare = over_tokens if is_large(student) else at_once
    return compare(divergence, teacher, student, temperature)


def softened_kl(teacher: Tensor, student: Tensor, temperature: Tensor) -> Tensor:
    """KL divergence between temperature-softened class distributions.

    `T**2 * sum_c p_c * (log p_c - log q_c)` with `p = softmax(teacher / T)`,
    `q = softmax(student / T)`.

    Args:
        teacher: Logits `(batch, ..., classes)`, unnormalized; where they are those of tokens
            over a large vocabulary, no gradient reaches them, here and below.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., 1)`, dimensionless.

    Returns:
        Tensor `(batch, ...)`, in nats.
    """
    kl = _softened(KL, teacher, student, temperature)
    # The gradient of the softened KL shrinks as 1 / temperature**2.
    return squared_temperature(ops.cast(temperature, kl.dtype)) * kl


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
    return _softened(REVERSE_KL, teacher, student, temperature)


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
    return _softened(mixture(beta), teacher, student, temperature)


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

    compares: ClassVar[str] = meaning.CLASSES

    def converted(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits, as they are where parts of them are cast, else in the loss's precision."""
        whole = self.standardize or isinstance(self.temperature, AdaptiveTemperature)
        if whole or self.dtype == "float64":
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
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        return softened_kl(*self.prepared(y_true, y_pred))


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

    compares: ClassVar[str] = meaning.INDEPENDENT

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "binary_soft_targets",
        dtype: DType = None,
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
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        return reverse_kl(*self.prepared(y_true, y_pred))


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
        dtype: DType = None,
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
        return jensen_shannon(*self.prepared(y_true, y_pred), self.beta)

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

    compares: ClassVar[str] = meaning.CLASSES

    def __init__(
        self,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "total_variation",
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        return total_variation(*self.prepared(y_true, y_pred))

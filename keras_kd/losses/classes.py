"""Losses between logits that take the classes apart: the true one, the others, their ranks."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_kd.losses.base import require_weights
from keras_kd.losses.divergences import squared_temperature
from keras_kd.losses.geometry import rounding
from keras_kd.losses.logits import LogitLoss
from keras_kd.losses.temperatures import AdaptiveTemperature
from keras_kd.models import meaning
from keras_kd.utils.types import DType, Tensor


def true_class(labels: Tensor, logits: Tensor, name: str) -> Tensor:
    """Boolean `(batch, ..., classes)`: where the hard label is.

    Args:
        labels: Integers `(batch, ...)` or `(batch, ..., 1)`, or one-hot
            `(batch, ..., classes)`; of mixed labels the largest counts.
        logits: `(batch, ..., classes)`.
        name: Name of the loss, for the error.

    Returns:
        Boolean tensor of the shape of the logits.

    Raises:
        ValueError: If the labels have another shape.
    """
    labels = ops.convert_to_tensor(labels)
    rank, classes = len(logits.shape), logits.shape[-1]
    if len(labels.shape) == rank and labels.shape[-1] == 1:
        labels = ops.squeeze(labels, -1)
    elif len(labels.shape) == rank and labels.shape[-1] in (None, classes):
        labels = ops.argmax(labels, axis=-1)
    if len(labels.shape) != rank - 1:
        raise ValueError(
            f"`{name}` reads one class number or one-hot row for each row of the logits "
            f"{tuple(logits.shape)}. Received: labels of shape {tuple(labels.shape)}."
        )
    labels = ops.expand_dims(ops.cast(labels, "int32"), -1)
    return ops.equal(labels, ops.arange(classes, dtype="int32"))


def decoupled_kl(
    teacher: Tensor, student: Tensor, temperature: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """The two parts of the softened KL: on the true class, and among the others.

    With `p = softmax(teacher / T)`, `q = softmax(student / T)` and the true
    class `y`: `TCKD = T**2 * KL([p_y, 1 - p_y] || [q_y, 1 - q_y])`, and
    `NCKD = T**2 * KL` between the softmax of `teacher / T` and `student / T`
    with the class `y` left out. `TCKD + (1 - p_y) * NCKD` is the softened KL.

    Args:
        teacher: Logits `(batch, ..., classes)`, unnormalized, two classes or more.
        student: Logits of the same shape.
        temperature: Positive scalar or `(batch, ..., 1)`, dimensionless.
        truth: Boolean, shape of the logits: `True` at the true class.

    Returns:
        `(TCKD, NCKD)`, each `(batch, ...)`, in nats.
    """
    temperature = ops.cast(temperature, student.dtype)
    log_p_true, log_p_rest, log_p = _split(teacher / temperature, truth)
    log_q_true, log_q_rest, log_q = _split(student / temperature, truth)
    target = ops.exp(log_p_true) * (log_p_true - log_q_true) + ops.exp(log_p_rest) * (
        log_p_rest - log_q_rest
    )
    others = ops.sum(
        ops.where(truth, ops.zeros_like(log_p), ops.exp(log_p) * (log_p - log_q)), axis=-1
    )
    scale = squared_temperature(temperature)
    return scale * target, scale * others


def _split(z: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log probability of the true class, of all others together, and among the others.

    The class is left out by selection: subtracting 1000 from its logit, as is
    often done, still counts it where the logits differ by more.
    """
    among = ops.log_softmax(z, axis=-1)
    log_true = ops.sum(ops.where(truth, among, ops.zeros_like(among)), axis=-1)
    lowest = ops.min(z, axis=-1, keepdims=True)
    top = ops.stop_gradient(ops.max(ops.where(truth, lowest, z), axis=-1, keepdims=True))
    # The true logit is replaced before `exp`: on the branch that `where` drops
    # an overflow would still reach the gradient, as 0 * inf.
    shifted = ops.where(truth, ops.zeros_like(z), z - top)
    rest = ops.sum(ops.where(truth, ops.zeros_like(z), ops.exp(shifted)), axis=-1, keepdims=True)
    log_rest = ops.log(rest) + top
    log_others = ops.where(truth, ops.zeros_like(z), z - log_rest)
    total = ops.logsumexp(z, axis=-1)
    return log_true, log_rest[..., 0] - total, log_others


@keras.saving.register_keras_serializable(package="keras_kd")
class DecoupledKD(LogitLoss):
    """Weigh the teacher's certainty of the true class and its ranking of the others apart.

    `alpha * TCKD + beta * NCKD`. TCKD is the KL between `[p_y, 1 - p_y]` and
    `[q_y, 1 - q_y]`, NCKD the KL between the softmax of the other logits; both
    carry `T**2`. With two classes NCKD is 0. The paper uses `alpha=1`,
    `beta=8`, `T=4` with weight 1 beside the hard loss, warmed up over 20 epochs
    (`kd.callbacks.TransferWeightAnnealing`).

    Args:
        alpha: Non-negative float, dimensionless: weight of TCKD.
        beta: Non-negative float, dimensionless: weight of NCKD.
        temperature: Positive float, dimensionless, or `FLSW` / `CWSM`.
            Defaults to `None`: follow the distiller's live temperature.
        standardize: Whether both logits are standardized over the classes first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher logits, `(batch, ..., classes)`.
        y_pred: Student logits, same shape.
        labels: Hard labels: integers `(batch, ...)` or `(batch, ..., 1)`, or
            one-hot `(batch, ..., classes)`. The distiller supplies them.

    Returns:
        Loss in nats, `(batch, ...)` before reduction.

    Raises:
        ValueError: If a weight or the temperature is out of its range, there
            are no labels or fewer than two classes, or shapes differ.

    Examples:
        >>> loss = DecoupledKD()
        >>> float(loss([[2.0, 0.0, 1.0]], [[2.0, 0.0, 1.0]], labels=[0]))
        0.0

    Reference:
        - [Zhao et al., 2022](https://arxiv.org/abs/2203.08679), section 3
    """

    reads_labels: ClassVar[bool] = True
    compares: ClassVar[str] = meaning.CLASSES

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "decoupled_kd",
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)
        require_weights(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Check that both sides have the same two or more classes."""
        super().build(teacher_shape, student_shape)
        require_classes(self.name, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        truth = true_class(self.labels, y_pred, self.name)
        target, others = decoupled_kl(*self.prepared(y_true, y_pred), truth)
        return self.alpha * target + self.beta * others

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "alpha": self.alpha, "beta": self.beta}


def require_classes(name: str, shape: tuple[int | None, ...]) -> None:
    """Raise `ValueError` where there are fewer than two classes."""
    if shape[-1] is None or shape[-1] < 2:
        raise ValueError(
            f"`{name}` compares at least two classes. Received: logits {tuple(shape)}. "
            "Use `BinarySoftTargets` for a one-unit output."
        )


def pearson(a: Tensor, b: Tensor, axis: int, weight: Tensor = None) -> Tensor:
    """Pearson correlation along one axis.

    `sum(a' b') / (|a'| |b'| + 1e-8)` with `a' = a - mean(a)`, `b' = b - mean(b)`.
    A constant `a` or `b` correlates with nothing: 0.

    Args:
        a: Tensor.
        b: Tensor of the same shape.
        axis: The axis summed over.
        weight: Broadcasts to both: 0 where an entry is left out, else 1.

    Returns:
        Tensor without `axis`, between -1 and 1.
    """
    a, length_a = _centered(a, axis, weight)
    b, length_b = _centered(b, axis, weight)
    return ops.sum(a * b, axis=axis) / (length_a * length_b + ops.cast(1e-8, a.dtype))


def _centered(x: Tensor, axis: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`x` less its mean, and its length; a constant has length 1."""
    if weight is None:
        mean = ops.mean(x, axis=axis, keepdims=True)
        centered = x - mean
    else:
        count = ops.maximum(ops.sum(weight, axis=axis, keepdims=True), 1.0)
        mean = ops.sum(x * weight, axis=axis, keepdims=True) / count
        centered = (x - mean) * weight
    squares = ops.sum(ops.square(centered), axis=axis)
    # What rounding leaves of a constant has a direction of noise: divided by its
    # own length it would get a gradient of 1e8.
    noise = ops.sum(ops.square(mean * ops.ones_like(x) * 4 * rounding(x.dtype)), axis=axis)
    length = ops.sqrt(ops.where(squares <= noise, ops.ones_like(squares), squares))
    return centered, length


@keras.saving.register_keras_serializable(package="keras_kd")
class DIST(LogitLoss):
    """Match how the teacher orders classes and samples, not its exact probabilities.

    `T**2 * (beta * (1 - pearson of rows) + gamma * (1 - mean pearson of columns))`
    of `softmax(z / T)`. A row holds the classes of one sample, a column one class
    over the batch. The paper's weight is 2 beside the hard loss at `T=1`, on
    CIFAR-100 `T=4`.

    A correlation does not change when logits are scaled, so its gradient does
    not shrink with the temperature as that of a KL does: `T**2` makes the term
    heavier, 16 times at `T=4`, and most so while the student's logits are small.
    Beside the hard loss a weight of `2 / T**2`, or
    `kd.callbacks.LossBalancing("gradient_norm")`, keeps the two alike.

    Sample weights act on the values, each of which holds the column term of the
    whole batch; positions that do not count, padded or of weight 0, are left out of
    the columns, and all others weigh alike in them. In a batch of one no column
    varies: its term is the constant `gamma * T**2`.

    Args:
        beta: Non-negative float, dimensionless: weight of the relation between classes.
        gamma: Non-negative float, dimensionless: weight of the relation between samples.
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
        Dimensionless, `(batch, ...)` before reduction, at most `2 * (beta + gamma) * T**2`.

    Raises:
        ValueError: If a weight or the temperature is out of its range, there
            are fewer than two classes, or shapes differ.

    Examples:
        >>> loss = DIST()
        >>> logits = [[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]
        >>> abs(round(float(loss(logits, logits)), 4))
        0.0

    Reference:
        - [Huang et al., 2022](https://arxiv.org/abs/2205.10536), section 4
    """

    compares: ClassVar[str] = meaning.CLASSES

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float | AdaptiveTemperature | None = None,
        standardize: bool = False,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "dist",
        dtype: DType = None,
    ) -> None:
        super().__init__(temperature, standardize, reduction, name, dtype)
        require_weights(beta=beta, gamma=gamma)
        self.beta = beta
        self.gamma = gamma

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Check that both sides have the same two or more classes."""
        super().build(teacher_shape, student_shape)
        require_classes(self.name, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, ...)`."""
        teacher, student, temperature = self.prepared(y_true, y_pred)
        p = ops.softmax(teacher / temperature, axis=-1)
        q = ops.softmax(student / temperature, axis=-1)
        classes = p.shape[-1]
        weight = self.counting(p)
        if weight is not None:
            weight = ops.reshape(ops.cast(weight, p.dtype), (-1, 1))
        columns = pearson(ops.reshape(p, (-1, classes)), ops.reshape(q, (-1, classes)), 0, weight)
        values = self.beta * (1.0 - pearson(p, q, -1)) + self.gamma * (1.0 - ops.mean(columns))
        return squared_temperature(temperature) * values

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "beta": self.beta, "gamma": self.gamma}

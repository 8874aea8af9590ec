"""Losses between samples of a batch: who is like whom, not what each one is."""

import math
from typing import Any

import keras
from keras import ops

from keras_kd.losses.base import FeatureLoss, require_positive, require_weights
from keras_kd.losses.counts import zeroed
from keras_kd.losses.geometry import flattened, huber, unit
from keras_kd.utils.types import DType, Tensor


def among(values: Tensor, rows: Tensor, axis: int | tuple[int, ...] = -1) -> Tensor:
    """The mean along axes of the batch, over the samples that count.

    Args:
        values: `(N, N)` or `(N, N, N)`, 0 where a sample does not count.
        rows: Boolean `(N,)`: samples that count; `None` for all.
        axis: The axes.

    Returns:
        Tensor without these axes.
    """
    if rows is None:
        return ops.mean(values, axis=axis)
    count = ops.maximum(ops.sum(ops.cast(rows, values.dtype)), 1.0)
    power = len(axis) if isinstance(axis, tuple) else 1
    return ops.sum(values, axis=axis) / count**power


def _pairs(rows: Tensor, dtype: str) -> Tensor:
    """`(N, N)`: 1 where both samples count, else 0."""
    valid = ops.cast(rows, dtype)
    return valid[:, None] * valid[None, :]


def similarity_preserving(teacher: Tensor, student: Tensor, rows: Tensor = None) -> Tensor:
    """Squared difference of batch similarities: `sum_j (G_t - G_s)_ij**2 / N`.

    `G` is `F F'` with rows of length 1.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.
        rows: Boolean `(N,)`: samples that count, here and below; the features of the others are
            zeros, and `N` is the number of these. Defaults to all.

    Returns:
        Tensor `(N,)`.
    """

    def similarities(features: Tensor) -> Tensor:
        return unit(ops.matmul(features, ops.transpose(features)), axis=-1)

    return among(ops.square(similarities(teacher) - similarities(student)), rows)


def relational(
    teacher: Tensor,
    student: Tensor,
    distance_weight: float,
    angle_weight: float,
    rows: Tensor = None,
) -> Tensor:
    """Huber differences of distances between pairs and of angles between triplets.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.
        distance_weight: Weight of the distances over their mean.
        angle_weight: Weight of the cosines at every sample between any two others.
        rows: Boolean `(N,)`.

    Returns:
        Tensor `(N,)`: for sample `i` the mean over `j` of the distances, and over
        `j` and `k` of the angles at `i`.
    """
    value: Tensor = 0.0
    gram_t, distance_t = _distances(teacher, rows)
    gram_s, distance_s = _distances(student, rows)
    if distance_weight:
        difference = _over_mean(distance_s) - _over_mean(distance_t)
        value = value + distance_weight * among(huber(difference), rows)
    if angle_weight:
        difference = _angles(gram_s, distance_s) - _angles(gram_t, distance_t)
        value = value + angle_weight * among(huber(difference), rows, (1, 2))
    return value


def _distances(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of the centered features, and distances, both `(N, N)`.

    A sample that does not count is at distance 0 from all others, and has no direction.
    """
    # Distances and angles do not change with the origin; rounding does.
    centered = features - ops.mean(features, axis=0, keepdims=True)
    gram = ops.matmul(centered, ops.transpose(centered))
    count = ops.shape(gram)[0]
    itself = ops.eye(count, dtype=gram.dtype)
    squares = ops.sum(gram * itself, axis=-1)
    squared = squares[:, None] + squares[None, :] - 2.0 * gram
    # Clipped as in the reference, and 1 on the diagonal, where sqrt has no slope.
    squared = ops.where(itself > 0, ops.ones_like(squared), ops.maximum(squared, 1e-12))
    apart = 1.0 - itself if rows is None else (1.0 - itself) * _pairs(rows, gram.dtype)
    return gram, ops.sqrt(squared) * apart


def _over_mean(distances: Tensor) -> Tensor:
    """Distances over the mean of the positive ones; 0 in a batch of one."""
    positive = ops.cast(distances > 0, distances.dtype)
    mean = ops.sum(distances) / ops.maximum(ops.sum(positive), 1.0)
    return distances / ops.where(ops.equal(mean, 0), ops.ones_like(mean), mean)


def _angles(gram: Tensor, distances: Tensor) -> Tensor:
    """Cosines `(i, j, k)` of the angle at `i` between `j` and `k`, 0 where two coincide."""
    squares = ops.diagonal(gram)
    # <f_j - f_i, f_k - f_i> from inner products: no (N, N, features) is held.
    inner = gram[None, :, :] - gram[:, :, None] - gram[:, None, :] + squares[:, None, None]
    # Samples at the same place, and the sample itself, have no direction.
    apart = distances > 2e-6
    length = ops.where(apart, distances, ops.ones_like(distances))
    both = ops.logical_and(apart[:, :, None], apart[:, None, :])
    cosine = inner / (length[:, :, None] * length[:, None, :])
    return ops.where(both, cosine, ops.zeros_like(cosine))


def correlation_congruence(
    teacher: Tensor, student: Tensor, gamma: float, order: int, rows: Tensor = None
) -> Tensor:
    """Mean squared difference of kernel matrices over the batch, row by row.

    The kernel is a Taylor expansion of the Gaussian on features of length 1:
    `exp(-2 gamma) * sum_p (2 gamma)**p / p! * (f_i . f_j)**p`, `p` up to `order`.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.
        gamma: Positive float, dimensionless.
        order: Highest power.
        rows: Boolean `(N,)`.

    Returns:
        Tensor `(N,)`.
    """

    def kernel(features: Tensor) -> Tensor:
        direction = unit(features)
        cosine = ops.matmul(direction, ops.transpose(direction))
        total, power = ops.ones_like(cosine), ops.ones_like(cosine)
        for p in range(1, order + 1):
            power = power * cosine
            total = total + (2 * gamma) ** p / math.factorial(p) * power
        return math.exp(-2 * gamma) * total

    # Features of zeros have one kernel on both sides, whatever they are compared with.
    return among(ops.square(kernel(teacher) - kernel(student)), rows)


def probabilistic(
    teacher: Tensor, student: Tensor, epsilon: float = 1e-7, rows: Tensor = None
) -> Tensor:
    """Divergence of the probabilities with which samples are each other's neighbors.

    `mean_j P_t ln((P_t + e) / (P_s + e))`, `P` the cosine similarities brought to
    [0, 1], rows summing to 1.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.
        epsilon: `e`.
        rows: Boolean `(N,)`.

    Returns:
        Tensor `(N,)`, in nats over `N`.
    """

    def neighbors(features: Tensor) -> Tensor:
        direction = unit(features)
        likeness = (ops.matmul(direction, ops.transpose(direction)) + 1.0) / 2.0
        # Rounding may carry a cosine below -1, and its logarithm to NaN.
        likeness = ops.maximum(likeness, 0.0)
        if rows is None:
            return likeness / ops.sum(likeness, axis=-1, keepdims=True)
        likeness = likeness * _pairs(rows, likeness.dtype)
        total = ops.sum(likeness, axis=-1, keepdims=True)
        return likeness / ops.where(ops.equal(total, 0), ops.ones_like(total), total)

    p, q = neighbors(teacher), neighbors(student)
    return among(p * (ops.log(p + epsilon) - ops.log(q + epsilon)), rows)


class RelationLoss(FeatureLoss):
    """Base of the losses between the samples of a batch: features are flattened first.

    While `compare` runs, `self.rows` tells which samples count, `None` where all do; the
    features of the others are zeros.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.
    """

    single_layer = True

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Check that both sides are `(batch, ...)` with features."""
        for shape in (teacher_shape, student_shape):
            if not isinstance(shape, tuple) or len(shape) < 2:
                raise ValueError(
                    f"`{self.name}` compares the samples of a batch by one layer on each side, "
                    f"`(batch, ...)`. Received: {shape!r}. Use one transfer for each pair of "
                    "layers."
                )
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        teacher, student = flattened(y_true), flattened(y_pred)
        if self.rows is not None:
            teacher, student = (zeroed(side, self.rows) for side in (teacher, student))
        return self.compare(teacher, student)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `compare`.")


@keras.saving.register_keras_serializable(package="keras_kd")
class SimilarityPreserving(RelationLoss):
    """Samples alike for the teacher are alike for the student.

    `||G_t - G_s||_F**2 / N**2`, `G = F F'` over the batch of `N` with rows of
    length 1. Widths may differ; features are flattened. The reference weight
    beside the hard loss is 3000.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, ...)`.
        y_pred: Student features, `(batch, ...)`.

    Returns:
        Dimensionless, `(batch,)` before reduction; 0 in a batch of one.

    Raises:
        ValueError: If a side is no single tensor with features.

    Examples:
        >>> loss = SimilarityPreserving()
        >>> float(loss([[1.0, 0.0], [0.0, 1.0]], [[3.0], [0.0]]))
        0.25

    Reference:
        - [Tung & Mori, 2019](https://arxiv.org/abs/1907.09682), section 3.1
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "similarity_preserving",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        return similarity_preserving(teacher, student, self.rows)


@keras.saving.register_keras_serializable(package="keras_kd")
class RKD(RelationLoss):
    """Match distances between pairs and angles between triplets of samples.

    `distance_weight * huber(d_s / mean d_s - d_t / mean d_t) + angle_weight *
    huber(cos_s - cos_t)`, each the mean over all pairs and triplets of the
    batch, Huber's function with `delta=1`, the mean distance over the positive
    ones. The reference weights are the defaults.

    Widths may differ; features are flattened. The angles of a batch of `N` take
    `N**3` numbers a side: 8 MiB at 128 in float32, 4 GiB at 1024; set
    `angle_weight=0` for such batches.

    Args:
        distance_weight: Non-negative float, dimensionless.
        angle_weight: Non-negative float, dimensionless.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, ...)`.
        y_pred: Student features, `(batch, ...)`.

    Returns:
        Dimensionless, `(batch,)` before reduction: for each sample its pairs and
        the angles at it. 0 in a batch of one.

    Raises:
        ValueError: If a weight is negative or both are 0, or a side is no single tensor.

    Examples:
        >>> loss = RKD()
        >>> triangle = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
        >>> larger = [[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]
        >>> round(float(loss(triangle, larger)), 4)
        0.0

    Reference:
        - [Park et al., 2019](https://arxiv.org/abs/1904.05068), section 3.2
    """

    def __init__(
        self,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "rkd",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        require_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        if distance_weight == 0 and angle_weight == 0:
            raise ValueError(
                "`rkd` compares nothing. Received: distance_weight=0, angle_weight=0. "
                "The reference weights are 25 and 50."
            )
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        return relational(teacher, student, self.distance_weight, self.angle_weight, self.rows)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {
            **super().get_config(),
            "distance_weight": self.distance_weight,
            "angle_weight": self.angle_weight,
        }


@keras.saving.register_keras_serializable(package="keras_kd")
class CorrelationCongruence(RelationLoss):
    """Match how samples correlate under a Gaussian kernel.

    Mean squared difference of `K_ij = exp(-2 gamma) * sum_p (2 gamma)**p / p! *
    (f_i . f_j)**p` over the batch, `p` from 0 to `order`, features of length 1.
    Widths may differ; features are flattened. A usual weight beside the hard
    loss is 100.

    Args:
        gamma: Positive float, dimensionless: inverse width of the kernel.
        order: Positive int: highest power of the expansion.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, ...)`.
        y_pred: Student features, `(batch, ...)`.

    Returns:
        Dimensionless, `(batch,)` before reduction; 0 in a batch of one.

    Raises:
        ValueError: If `gamma` or `order` is not positive, or a side is no single tensor.

    Examples:
        >>> loss = CorrelationCongruence()
        >>> float(loss([[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 5.0]]))
        0.0

    Reference:
        - [Peng et al., 2019](https://arxiv.org/abs/1904.01802), section 3.3
    """

    def __init__(
        self,
        gamma: float = 0.4,
        order: int = 2,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "correlation_congruence",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        require_positive("gamma", gamma)
        require_positive("order", order)
        self.gamma = gamma
        self.order = int(order)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        return correlation_congruence(teacher, student, self.gamma, self.order, self.rows)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "gamma": self.gamma, "order": self.order}


@keras.saving.register_keras_serializable(package="keras_kd")
class PKT(RelationLoss):
    """Match the probability with which samples are neighbors.

    `mean of P_t ln((P_t + 1e-7) / (P_s + 1e-7))` over all pairs, `P` the cosine
    similarities brought to [0, 1] and divided by their sum over the row. Widths
    may differ; features are flattened. The reference weight beside the hard
    loss is 30000.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, ...)`.
        y_pred: Student features, `(batch, ...)`.

    Returns:
        In nats over the batch size, `(batch,)` before reduction; 0 in a batch of one.

    Raises:
        ValueError: If a side is no single tensor with features.

    Examples:
        >>> loss = PKT()
        >>> round(float(loss([[1.0, 0.0], [-1.0, 0.0]], [[1.0], [1.0]])), 4)
        0.3466

    Reference:
        - [Passalis & Tefas, 2018](https://arxiv.org/abs/1803.10837), section 3
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "pkt",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        return probabilistic(teacher, student, rows=self.rows)

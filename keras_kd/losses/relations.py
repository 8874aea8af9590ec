"""Losses between samples of a batch: who is like whom, not what each one is."""

import math
from typing import Any, ClassVar

import keras
from keras import ops

from keras_kd.losses.base import FeatureLoss, require_positive
from keras_kd.losses.classes import require_weights
from keras_kd.losses.geometry import flattened, huber, unit
from keras_kd.losses.learned import layer_precision
from keras_kd.typing import Shape, Tensor


def similarity_preserving(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared difference of batch similarities: `sum_j (G_t - G_s)_ij**2 / N`.

    `G` is `F F'` with rows of length 1.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.

    Returns:
        Tensor `(N,)`.
    """

    def similarities(features: Tensor) -> Tensor:
        return unit(ops.matmul(features, ops.transpose(features)), axis=-1)

    return ops.mean(ops.square(similarities(teacher) - similarities(student)), axis=-1)


def relational(
    teacher: Tensor, student: Tensor, distance_weight: float, angle_weight: float
) -> Tensor:
    """Huber differences of distances between pairs and of angles between triplets.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.
        distance_weight: Weight of the distances over their mean.
        angle_weight: Weight of the cosines at every sample between any two others.

    Returns:
        Tensor `(N,)`: for sample `i` the mean over `j` of the distances, and over
        `j` and `k` of the angles at `i`.
    """
    value: Tensor = 0.0
    gram_t, distance_t = _distances(teacher)
    gram_s, distance_s = _distances(student)
    if distance_weight:
        difference = _over_mean(distance_s) - _over_mean(distance_t)
        value = value + distance_weight * ops.mean(huber(difference), axis=-1)
    if angle_weight:
        difference = _angles(gram_s, distance_s) - _angles(gram_t, distance_t)
        value = value + angle_weight * ops.mean(huber(difference), axis=(1, 2))
    return value


def _distances(features: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of the centered features, and distances, both `(N, N)`."""
    # Distances and angles do not change with the origin; rounding does.
    centered = features - ops.mean(features, axis=0, keepdims=True)
    gram = ops.matmul(centered, ops.transpose(centered))
    count = ops.shape(gram)[0]
    itself = ops.eye(count, dtype=gram.dtype)
    squares = ops.sum(gram * itself, axis=-1)
    squared = squares[:, None] + squares[None, :] - 2.0 * gram
    # Clipped as in the reference, and 1 on the diagonal, where sqrt has no slope.
    squared = ops.where(itself > 0, ops.ones_like(squared), ops.maximum(squared, 1e-12))
    return gram, ops.sqrt(squared) * (1.0 - itself)


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


def correlation_congruence(teacher: Tensor, student: Tensor, gamma: float, order: int) -> Tensor:
    """Mean squared difference of kernel matrices over the batch, row by row.

    The kernel is a Taylor expansion of the Gaussian on features of length 1:
    `exp(-2 gamma) * sum_p (2 gamma)**p / p! * (f_i . f_j)**p`, `p` up to `order`.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.
        gamma: Positive float, dimensionless.
        order: Highest power.

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

    return ops.mean(ops.square(kernel(teacher) - kernel(student)), axis=-1)


def probabilistic(teacher: Tensor, student: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Divergence of the probabilities with which samples are each other's neighbors.

    `mean_j P_t ln((P_t + e) / (P_s + e))`, `P` the cosine similarities brought to
    [0, 1], rows summing to 1.

    Args:
        teacher: `(N, features)`.
        student: `(N, features)`; the widths may differ.
        epsilon: `e`.

    Returns:
        Tensor `(N,)`, in nats over `N`.
    """

    def neighbors(features: Tensor) -> Tensor:
        direction = unit(features)
        likeness = (ops.matmul(direction, ops.transpose(direction)) + 1.0) / 2.0
        # Rounding may carry a cosine below -1, and its logarithm to NaN.
        likeness = ops.maximum(likeness, 0.0)
        return likeness / ops.sum(likeness, axis=-1, keepdims=True)

    p, q = neighbors(teacher), neighbors(student)
    return ops.mean(p * (ops.log(p + epsilon) - ops.log(q + epsilon)), axis=-1)


class RelationLoss(FeatureLoss):
    """Base of the losses between the samples of a batch: features are flattened first.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.
    """

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
        return self.compare(flattened(y_true), flattened(y_pred))

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

    Example:
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
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        return similarity_preserving(teacher, student)


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

    Example:
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
        dtype: Any = None,
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
        return relational(teacher, student, self.distance_weight, self.angle_weight)

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

    Example:
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
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        require_positive("gamma", gamma)
        require_positive("order", order)
        self.gamma = gamma
        self.order = int(order)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        return correlation_congruence(teacher, student, self.gamma, self.order)

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

    Example:
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
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        return probabilistic(teacher, student)


class _Bank(keras.layers.Layer):
    """One embedding of every sample of the data, and the constant of its scores."""

    def __init__(self, samples: int, width: int, momentum: float, **kwargs: Any) -> None:
        super().__init__(trainable=False, **kwargs)
        limit = 1.0 / math.sqrt(width / 3)
        self.momentum = momentum
        self.samples = samples
        self.bank = self.add_weight(
            shape=(samples, width),
            initializer=keras.initializers.RandomUniform(-limit, limit),
            trainable=False,
            name="bank",
        )
        # -1 until the first batch has set it.
        self.log_constant = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="log_constant"
        )
        self.constant_is_set = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="constant_is_set"
        )

    def scores(self, anchors: Tensor, drawn: Tensor, temperature: float) -> Tensor:
        """`anchor . bank / temperature` of the drawn rows, `(batch, drawn)`."""
        # All scores and then a selection: (batch, samples) numbers, where the drawn
        # embeddings themselves would take (batch, drawn, width).
        bank = ops.cast(self.bank, anchors.dtype)
        scores = ops.matmul(anchors, ops.transpose(bank)) / temperature
        return ops.take_along_axis(scores, drawn, axis=1)

    def normalized(self, scores: Tensor, training: bool) -> Tensor:
        """Log-probabilities: scores less the log of `Z`, which the first batch sets."""
        precise = keras.backend.result_type(scores.dtype, "float32")
        wide = ops.stop_gradient(ops.cast(scores, precise))
        count = ops.cast(ops.size(wide), precise)
        here = ops.logsumexp(wide) - ops.log(count) + math.log(self.samples)
        known = ops.cast(self.constant_is_set, precise) > 0
        log_constant = ops.where(known, ops.cast(self.log_constant, precise), here)
        if training:
            self.log_constant.assign(ops.cast(log_constant, self.log_constant.dtype))
            self.constant_is_set.assign(ops.ones_like(self.constant_is_set))
        return scores - ops.cast(log_constant, scores.dtype)

    def update(self, embeddings: Tensor, indices: Tensor) -> None:
        """Move the rows of this batch towards their new embeddings."""
        dtype = self.bank.dtype
        old = ops.take(self.bank, indices, axis=0)
        new = ops.cast(ops.stop_gradient(embeddings), dtype)
        moved = unit(self.momentum * old + (1.0 - self.momentum) * new)
        self.bank.assign(ops.scatter_update(self.bank, indices[:, None], moved))


@keras.saving.register_keras_serializable(package="keras_kd")
class CRD(RelationLoss):
    """Tell the teacher's view of the same sample from its views of others.

    Both sides are embedded by a linear layer into vectors of length 1, owned by
    this loss. With `samples`, each side keeps a bank of one embedding for every
    row of the data, and the value is the noise-contrastive loss both ways: with
    `P = exp(anchor . bank / temperature) / Z`, `Z` set by the first batch,
    `c = negatives / samples`: `-log(P / (P + c))` for the row of the sample and
    `-log(c / (P + c))` summed over `negatives` rows drawn at random. The rows of
    the batch then move: `unit(momentum * old + (1 - momentum) * new)`, while
    training alone. The banks take `2 * samples * width` numbers.

    Without `samples` the other samples of the batch are the negatives: the mean
    of the two cross-entropies of `anchor . others / temperature` times 2. That
    needs no row numbers, and batches of hundreds.

    The reference weight beside the hard loss is 0.8.

    Args:
        samples: Rows of the training data, for the memory banks; `None` contrasts
            within the batch.
        negatives: Positive int: rows drawn for each sample; with `samples` only.
        momentum: Float in [0, 1): how much of an old embedding stays.
        width: Positive int: width of the embeddings.
        contrast: Positive float, dimensionless: the temperature of the contrast.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, ...)`.
        y_pred: Student features, `(batch, ...)`.
        indices: `(batch,)` row numbers below `samples`; with `samples` only. The
            distiller supplies them for arrays.

    Returns:
        In nats, `(batch,)` before reduction; without `samples` 0 in a batch of one.

    Raises:
        ValueError: If an argument is out of its range, a width is unknown, or
            there are no `indices` with `samples`.

    Example:
        >>> import numpy as np
        >>> loss = CRD(samples=100, negatives=16)
        >>> teacher, student = np.ones((4, 8)), np.ones((4, 3))
        >>> float(loss(teacher, student, indices=[0, 1, 2, 3])) > 0.0
        True

    Reference:
        - [Tian et al., 2020](https://arxiv.org/abs/1910.10699), section 3.2
    """

    reads_indices: ClassVar[bool] = True

    def __init__(
        self,
        samples: int | None = None,
        negatives: int = 16384,
        momentum: float = 0.5,
        width: int = 128,
        contrast: float = 0.07,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "crd",
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        if samples is not None:
            require_positive("samples", samples)
        require_positive("negatives", negatives)
        require_positive("width", width)
        require_positive("contrast", contrast)
        if not 0 <= momentum < 1:
            raise ValueError(
                f"`momentum` must lie in [0, 1). Received: momentum={momentum!r}. "
                "The paper's is 0.5."
            )
        self.samples = samples
        self.negatives = negatives
        self.momentum = momentum
        self.width = width
        self.contrast = contrast
        self.embeddings: list[Any] = []
        self.banks: list[Any] = []
        self.draws: Any = None

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Make the embeddings and the banks."""
        super().build(teacher_shape, student_shape)
        precision = layer_precision(self.dtype)
        self.embeddings, self.banks = [], []
        for side, shape in (("teacher", teacher_shape), ("student", student_shape)):
            embedding = keras.layers.Dense(
                self.width, dtype=precision, name=f"{self.name}_{side}_embedding"
            )
            embedding.build((None, _features(self.name, shape)))
            self.embeddings.append(embedding)
            if self.samples is not None:
                bank = _Bank(
                    self.samples,
                    self.width,
                    self.momentum,
                    dtype=precision,
                    name=f"{self.name}_{side}_bank",
                )
                bank.build(shape)
                self.banks.append(bank)
        if self.samples is not None:
            self.draws = _Draws(self.samples, self.negatives, name=f"{self.name}_draws")
            self.draws.build(None)

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The embeddings, and the banks where there are some."""
        return [*self.embeddings, *self.banks, *([] if self.draws is None else [self.draws])]

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The values `(batch,)` from features `(batch, features)`."""
        theirs = unit(self.embeddings[0](teacher))
        ours = unit(self.embeddings[1](student))
        if self.samples is None:
            return in_batch_contrast(theirs, ours, self.contrast)
        if self.indices is None:
            raise ValueError(
                f"`{self.name}` keeps an embedding of every row of the data and got no row "
                "numbers. Pass `indices=`, fit on arrays, or leave `samples` out to contrast "
                "within the batch."
            )
        indices = ops.cast(ops.reshape(ops.convert_to_tensor(self.indices), (-1,)), "int32")
        drawn = self.draws(indices)
        value: Tensor = 0.0
        for anchors, bank in ((ours, self.banks[0]), (theirs, self.banks[1])):
            scores = bank.scores(anchors, drawn, self.contrast)
            log_p = bank.normalized(scores, self.training)
            value = value + noise_contrast(log_p, self.negatives / self.samples)
        if self.training:
            self.banks[0].update(theirs, indices)
            self.banks[1].update(ours, indices)
        return value

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {
            **super().get_config(),
            "samples": self.samples,
            "negatives": self.negatives,
            "momentum": self.momentum,
            "width": self.width,
            "contrast": self.contrast,
        }


class _Draws(keras.layers.Layer):
    """Row numbers: that of the sample first, then the negatives at random."""

    def __init__(self, samples: int, negatives: int, **kwargs: Any) -> None:
        super().__init__(trainable=False, **kwargs)
        self.samples = samples
        self.negatives = negatives
        self.seeds = keras.random.SeedGenerator()

    def call(self, indices: Tensor) -> Tensor:
        shape = (ops.shape(indices)[0], self.negatives)
        drawn = keras.random.randint(shape, 0, self.samples, dtype="int32", seed=self.seeds)
        return ops.concatenate([indices[:, None], drawn], axis=1)


def noise_contrast(log_p: Tensor, noise: float) -> Tensor:
    """Noise-contrastive loss of one positive and several negatives.

    `-log(P_0 / (P_0 + c)) - sum_k log(c / (P_k + c))`, `c = noise`.

    Args:
        log_p: `(batch, 1 + negatives)` log-probabilities, the positive first.
        noise: Expected count of negatives in one cell: `negatives / samples`.

    Returns:
        Tensor `(batch,)`, in nats.
    """
    # 1e-7 as in the reference, which keeps the sum from 0 there; here for equality.
    log_sum = math.log(noise + 1e-7)
    positive = ops.softplus(log_sum - log_p[:, 0])
    negative = ops.softplus(log_p[:, 1:] - log_sum) + (log_sum - math.log(noise))
    return positive + ops.sum(negative, axis=-1)


def in_batch_contrast(teacher: Tensor, student: Tensor, contrast: float) -> Tensor:
    """Cross-entropy of finding the own pair among those of the batch, both ways summed.

    Args:
        teacher: Embeddings of length 1, `(N, width)`.
        student: The same for the student.
        contrast: Positive float: temperature of the contrast.

    Returns:
        Tensor `(N,)`, in nats.
    """
    scores = ops.matmul(student, ops.transpose(teacher)) / contrast
    own = ops.diagonal(scores)
    return ops.logsumexp(scores, axis=1) + ops.logsumexp(scores, axis=0) - 2.0 * own


def _features(name: str, shape: Shape) -> int:
    """Number of features of one sample."""
    count = 1
    for length in shape[1:]:
        if length is None:
            raise ValueError(
                f"`{name}` embeds features of a known size. Received: {tuple(shape)}. Tap a layer "
                "after the pooling, or give the models inputs of a fixed size."
            )
        count *= length
    return count

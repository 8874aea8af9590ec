"""Contrastive losses: the teacher's view of the same sample among its views of others."""

import math
from typing import Any

import keras
from keras import ops

from keras_kd.losses.base import require_positive
from keras_kd.losses.geometry import precise, unit
from keras_kd.losses.learned import layer_precision
from keras_kd.losses.relations import RelationLoss
from keras_kd.utils.types import DType, Shape, Tensor


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


def in_batch_contrast(
    teacher: Tensor, student: Tensor, contrast: float, rows: Tensor = None
) -> Tensor:
    """Cross-entropy of finding the own pair among those of the batch, both ways summed.

    Args:
        teacher: Embeddings of length 1, `(N, width)`.
        student: The same for the student.
        contrast: Positive float: temperature of the contrast.
        rows: Boolean `(N,)`: samples that are among the pairs. Defaults to all.

    Returns:
        Tensor `(N,)`, in nats.
    """
    scores = ops.matmul(student, ops.transpose(teacher)) / contrast
    own = ops.diagonal(scores)
    if rows is not None:
        # Far below any score and still a number, for a batch of which nothing counts.
        both = ops.logical_and(rows[:, None], rows[None, :])
        scores = ops.where(both, scores, ops.full_like(scores, -1e9))
        own = ops.where(rows, own, ops.zeros_like(own))
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


class _Bank(keras.layers.Layer):
    """One embedding of every sample of the data, and the constant of its scores."""

    def __init__(self, samples: int, width: int, momentum: float, **kwargs: object) -> None:
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
        # A copy, since `update` writes into the bank before gradients are taken.
        bank = ops.copy(ops.cast(ops.convert_to_tensor(self.bank), anchors.dtype))
        scores = ops.matmul(anchors, ops.transpose(bank)) / temperature
        return ops.take_along_axis(scores, drawn, axis=1)

    def normalized(self, scores: Tensor, training: bool, rows: Tensor = None) -> Tensor:
        """Log-probabilities: scores less the log of `Z`, which the first batch sets.

        Args:
            scores: `(batch, drawn)`.
            training: Whether `Z` may be set.
            rows: Boolean `(batch,)`: samples that count. Defaults to all.
        """
        dtype = keras.backend.standardize_dtype(scores.dtype)
        precise = "float64" if dtype == "float64" else "float32"
        wide = ops.stop_gradient(ops.cast(scores, precise))
        count = ops.cast(ops.size(wide), precise)
        sets: Tensor = ops.ones((), precise)
        if rows is not None:
            wide = ops.where(rows[:, None], wide, ops.full_like(wide, -1e9))
            share = ops.mean(ops.cast(rows, precise))
            # A batch of which nothing counts sets nothing.
            sets = ops.cast(share > 0, precise)
            count = ops.maximum(count * share, 1.0)
        here = ops.logsumexp(wide) - ops.log(count) + math.log(self.samples)
        known = ops.cast(self.constant_is_set, precise)
        log_constant = ops.where(known > 0, ops.cast(self.log_constant, precise), here)
        if training:
            kept = ops.where(sets > 0, log_constant, ops.cast(self.log_constant, precise))
            self.log_constant.assign(ops.cast(kept, self.log_constant.dtype))
            is_set = ops.maximum(known, sets)
            self.constant_is_set.assign(ops.cast(is_set, self.constant_is_set.dtype))
        return scores - ops.cast(log_constant, scores.dtype)

    def update(self, embeddings: Tensor, indices: Tensor, rows: Tensor = None) -> None:
        """Move the rows of this batch that count towards their new embeddings."""
        dtype = self.bank.dtype
        old = ops.take(self.bank, indices, axis=0)
        new = ops.cast(ops.stop_gradient(embeddings), dtype)
        moved = unit(self.momentum * old + (1.0 - self.momentum) * new)
        if rows is not None:
            # What does not count is written as the first that does, which is written anyway: a
            # row may be there twice, as where the last batch is filled up.
            first = ops.argmax(ops.cast(rows, "int32"))
            moved = ops.where(ops.any(rows), moved, old)
            moved = ops.where(rows[:, None], moved, ops.take(moved, first, axis=0)[None])
            indices = ops.where(rows, indices, ops.take(indices, first))
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
            distiller passes them on: those of arrays, of a `CachedTeacher`, or of
            `keras_kd.teachers.Numbered`.

    Returns:
        In nats, `(batch,)` before reduction; without `samples` 0 in a batch of one.

    Raises:
        ValueError: If an argument is out of its range, a width is unknown, or
            there are no `indices` with `samples`.

    Examples:
        >>> import numpy as np
        >>> loss = CRD(samples=100, negatives=16)
        >>> teacher, student = np.ones((4, 8)), np.ones((4, 3))
        >>> float(loss(teacher, student, indices=[0, 1, 2, 3])) > 0.0
        True

    Reference:
        - [Tian et al., 2020](https://arxiv.org/abs/1910.10699), section 3.2
    """

    def __init__(
        self,
        samples: int | None = None,
        negatives: int = 16384,
        momentum: float = 0.5,
        width: int = 128,
        contrast: float = 0.07,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "crd",
        dtype: DType = None,
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
        self.reads_indices = samples is not None
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
        theirs = unit(precise(self.embeddings[0](teacher)))
        ours = unit(precise(self.embeddings[1](student)))
        if self.samples is None:
            return in_batch_contrast(theirs, ours, self.contrast, self.rows)
        if self.indices is None:
            raise ValueError(
                f"`{self.name}` keeps an embedding of every row of the data and got no row "
                "numbers. Pass `indices=`, distil from arrays, a `CachedTeacher` or `Numbered` "
                "data, or leave `samples` out to contrast within the batch."
            )
        indices = ops.cast(ops.reshape(ops.convert_to_tensor(self.indices), (-1,)), "int32")
        drawn = self.draws(indices)
        value: Tensor = 0.0
        for anchors, bank in ((ours, self.banks[0]), (theirs, self.banks[1])):
            scores = bank.scores(anchors, drawn, self.contrast)
            log_p = bank.normalized(scores, self.training, self.rows)
            value = value + noise_contrast(log_p, self.negatives / self.samples)
        if self.training:
            self.banks[0].update(theirs, indices, self.rows)
            self.banks[1].update(ours, indices, self.rows)
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

    def __init__(self, samples: int, negatives: int, **kwargs: object) -> None:
        super().__init__(trainable=False, **kwargs)
        self.samples = samples
        self.negatives = negatives
        self.seeds = keras.random.SeedGenerator()

    def call(self, indices: Tensor) -> Tensor:
        shape = (ops.shape(indices)[0], self.negatives)
        drawn = keras.random.randint(shape, 0, self.samples, dtype="int32", seed=self.seeds)
        return ops.concatenate([indices[:, None], drawn], axis=1)

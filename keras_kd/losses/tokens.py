"""Losses between the insides of transformers: hidden states, attention, relations of tokens."""

import math
from typing import Any, ClassVar

import keras
from keras import ops

from keras_kd.losses import counts
from keras_kd.losses.base import FeatureLoss, require_positive
from keras_kd.losses.features import paired_layers, same_shape
from keras_kd.losses.geometry import unit
from keras_kd.utils.types import DType, Shape, Shapes, Tensor


def hidden_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the units of the squared difference, `(batch, ..., units)` to `(batch, ...)`."""
    return ops.mean(ops.square(teacher - student), axis=-1)


def hidden_cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """`1 - cos` between hidden states, `(batch, ..., units)` to `(batch, ...)`."""
    return 1.0 - ops.sum(unit(teacher) * unit(student), axis=-1)


def score_mse(teacher: Tensor, student: Tensor, mask: Tensor = None) -> Tensor:
    """Squared difference of attention scores, the mean over heads and keys.

    Scores at or below -100, which stand for "not allowed", count as 0.

    Args:
        teacher: `(batch, heads, queries, keys)`.
        student: Same shape.
        mask: Boolean `(batch, keys)`: keys that count; or
            `(batch, 1, queries, keys)`: pairs that count. Defaults to all.

    Returns:
        Tensor `(batch, queries)`.
    """

    def allowed(scores: Tensor) -> Tensor:
        return ops.where(scores <= -100.0, ops.zeros_like(scores), scores)

    teacher, student = allowed(teacher), allowed(student)
    squared = ops.mean(ops.square(teacher - student), axis=1)
    if mask is None:
        return ops.mean(squared, axis=-1)
    valid = ops.cast(mask, squared.dtype)
    valid = valid[:, None, :] if len(valid.shape) == 2 else valid[:, 0]
    # `where` first: what stands in padded keys may be no number.
    squared = ops.where(valid > 0, squared, ops.zeros_like(squared))
    return ops.sum(squared, axis=-1) / ops.maximum(ops.sum(valid, axis=-1), 1.0)


def token_relations(states: Tensor, heads: int, mask: Tensor = None) -> Tensor:
    """Log-softmax over the tokens of the scaled products of their states.

    `log softmax(X X' / sqrt(d))` for each relation head `X` of width
    `d = units / heads`.

    Args:
        states: `(batch, tokens, units)`, or `(batch, tokens, attention heads, d)`.
        heads: Relation heads the units are split into.
        mask: Boolean `(batch, tokens)`: tokens that count. Defaults to all.

    Returns:
        Tensor `(batch, heads, tokens, tokens)`.
    """
    batch, length = ops.shape(states)[0], ops.shape(states)[1]
    width = _units(states.shape) // heads
    split = ops.transpose(ops.reshape(states, (batch, length, heads, width)), (0, 2, 1, 3))
    products = ops.matmul(split, ops.transpose(split, (0, 1, 3, 2))) / math.sqrt(width)
    if mask is not None:
        # Far below any product and still a number: a row of padding alone stays finite.
        keys = ops.cast(mask, "bool")[:, None, None, :]
        products = ops.where(keys, products, ops.full_like(products, -1e9))
    return ops.log_softmax(products, axis=-1)


def _units(shape: Shape) -> int:
    """Units of one token, over all attention heads."""
    return math.prod(length or 0 for length in shape[2:])


def relation_kl(teacher: Tensor, student: Tensor, heads: int, mask: Tensor = None) -> Tensor:
    """KL divergence between relations of tokens, the mean over relation heads.

    Args:
        teacher: `(batch, tokens, units)` or `(batch, tokens, attention heads, d)`.
        student: The same tokens; the units may differ.
        heads: Relation heads.
        mask: Boolean `(batch, tokens)`.

    Returns:
        Tensor `(batch, tokens)`, in nats.
    """
    log_p = token_relations(teacher, heads, mask)
    log_q = token_relations(student, heads, mask)
    return ops.mean(ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1), axis=1)


@keras.saving.register_keras_serializable(package="keras_kd")
class HiddenState(FeatureLoss):
    """Match the hidden states of tokens.

    `mean over units of (h_t - W h_s)**2` (TinyBERT), or `1 - cos(h_t, h_s)`
    (DistilBERT); the map `W` is the transfer's `projector="linear"`. Lists of
    layers give the mean over the pairs. Both papers use weight 1.

    Args:
        distance: `"mse"` or `"cosine"`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher states `(batch, tokens, units)`, or a list of them.
        y_pred: Student states of the same shape, or as long a list.

    Returns:
        Squared units of the states, or dimensionless; `(batch, tokens)` before
        reduction.

    Raises:
        ValueError: If `distance` is unknown, or shapes or numbers of layers differ.

    Examples:
        >>> loss = HiddenState(distance="cosine")
        >>> float(loss([[[1.0, 0.0]]], [[[0.0, 2.0]]]))
        1.0

    Reference:
        - [Jiao et al., 2020](https://arxiv.org/abs/1909.10351), section 3.1
        - [Sanh et al., 2019](https://arxiv.org/abs/1910.01108), section 3
    """

    per_position: ClassVar[bool] = True

    def __init__(
        self,
        distance: str = "mse",
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "hidden_state",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        if distance not in ("mse", "cosine"):
            raise ValueError(f'`distance` is "mse" or "cosine". Received: distance={distance!r}.')
        self.distance = distance

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have the same shapes."""
        for theirs, ours in paired_layers(self.name, teacher_shape, student_shape):
            same_shape(self.name, theirs, ours)
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, tokens)`."""
        compare = hidden_mse if self.distance == "mse" else hidden_cosine
        values = [compare(*pair) for pair in paired_layers(self.name, y_true, y_pred)]
        return sum(values) / len(values)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "distance": self.distance}


@keras.saving.register_keras_serializable(package="keras_kd")
class AttentionScores(FeatureLoss):
    """Match the attention scores of a transformer layer.

    `mean over heads and keys of (A_t - A_s)**2`, `A` the scores before the
    softmax (`"layer:scores"` in a transfer), or after it; scores at or below
    -100, where attention is not allowed, count as 0. Padded keys and queries
    are left out where a mask is known. Lists of layers give the mean over the
    pairs. The paper uses weight 1.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher scores `(batch, heads, queries, keys)`, or a list of them.
        y_pred: Student scores of the same shape, or as long a list.
        mask: Boolean `(batch, tokens)`, for self-attention, or
            `(batch, 1, queries, keys)`, as `":scores"` carry it.

    Returns:
        Squared scores, `(batch, queries)` before reduction.

    Raises:
        ValueError: If shapes or numbers of layers differ.

    Examples:
        >>> loss = AttentionScores()
        >>> float(loss([[[[1.0, -1000.0]]]], [[[[2.0, -9000.0]]]]))
        0.5

    Reference:
        - [Jiao et al., 2020](https://arxiv.org/abs/1909.10351), section 3.1
    """

    per_position: ClassVar[bool] = True

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "attention_scores",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have as many heads."""
        for theirs, ours in paired_layers(self.name, teacher_shape, student_shape):
            agree = all(t is None or s is None or t == s for t, s in zip(theirs[1:], ours[1:]))
            if len(theirs) != 4 or len(ours) != 4 or not agree:
                raise ValueError(
                    f"`{self.name}` compares scores `(batch, heads, queries, keys)` of as many "
                    f"heads. Received: teacher {tuple(theirs)}, student {tuple(ours)}. Use "
                    "`MiniLM` where the numbers of heads differ."
                )
        super().build(teacher_shape, student_shape)

    def positions(self, tensor: Tensor) -> Shape:
        """The queries, which in self-attention are the keys as well."""
        return tensor.shape[0], tensor.shape[2]

    def joined(self, mask: Tensor, heavy: Tensor, student: Tensor) -> Tensor:
        """The pairs, or the tokens, of which neither is masked or of weight 0."""
        if heavy is None:
            return mask
        queries, keys = student.shape[2:]
        pairs = heavy[:, None, :, None]
        if queries == keys:
            pairs = ops.logical_and(pairs, heavy[:, None, None, :])
        if mask is not None and len(mask.shape) == 2:
            mask = ops.logical_and(mask[:, None, :, None], mask[:, None, None, :])
        pairs = ops.logical_and(pairs, ops.ones_like(student[:, :1], dtype="bool"))
        return counts.both(mask, pairs)

    def mask_of_values(self, mask: Tensor, student: Tensor) -> Tensor:
        """Queries that count: those with a key that counts."""
        return ops.any(mask[:, 0], axis=-1) if len(mask.shape) == 4 else mask

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, queries)`."""
        values = [
            score_mse(theirs, ours, self.mask)
            for theirs, ours in paired_layers(self.name, y_true, y_pred)
        ]
        return sum(values) / len(values)


@keras.saving.register_keras_serializable(package="keras_kd")
class MiniLM(FeatureLoss):
    """Match how tokens relate to each other, by queries, keys and values (MiniLMv2).

    For each of the given tensors the KL divergence between `softmax(X_t X_t' /
    sqrt(d_t))` and `softmax(X_s X_s' / sqrt(d_s))`, summed over keys, the mean
    over relation heads and valid queries; the value is the sum over the tensors.
    The units of all attention heads are split anew into `relation_heads` of
    width `d`, so that widths and heads of the two sides may differ. The paper
    reads queries, keys and values of one layer, the last of the student and an
    upper one of the teacher, with 48 relation heads (64 for large models) and
    no other loss.

    Args:
        relation_heads: Positive int that divides the units on both sides.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher tensors, `[queries, keys, values]` or fewer, each
            `(batch, tokens, units)` or `(batch, tokens, heads, width)`.
        y_pred: As many student tensors.
        mask: Boolean `(batch, tokens)`.

    Returns:
        In nats, `(batch, tokens)` before reduction.

    Raises:
        ValueError: If `relation_heads` does not divide the units, or the lists
            differ in length.

    Examples:
        >>> import numpy as np
        >>> states = np.eye(4, dtype="float32")[None]
        >>> loss = MiniLM(relation_heads=2)
        >>> float(loss([states], [states]))
        0.0

    Reference:
        - [Wang et al., 2021](https://arxiv.org/abs/2012.15828), section 3
    """

    per_position: ClassVar[bool] = True

    def __init__(
        self,
        relation_heads: int = 48,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "minilm",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        require_positive("relation_heads", relation_heads)
        self.relation_heads = int(relation_heads)

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that the relation heads divide the units."""
        for pair in paired_layers(self.name, teacher_shape, student_shape):
            for side, shape in zip(("teacher", "student"), pair):
                if len(shape) not in (3, 4) or None in shape[2:]:
                    raise ValueError(
                        f"`{self.name}` reads `(batch, tokens, units)` or `(batch, tokens, heads, "
                        f"width)`. Received: {side} {tuple(shape)}."
                    )
                if _units(shape) % self.relation_heads:
                    raise ValueError(
                        f"`relation_heads` must divide the units of a token. Received: "
                        f"relation_heads={self.relation_heads} for the {side}'s {_units(shape)} "
                        f"units. {math.gcd(*map(_units, pair))} would do, or a divisor of it."
                    )
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch, tokens)`."""
        values = [
            relation_kl(theirs, ours, self.relation_heads, self.mask)
            for theirs, ours in paired_layers(self.name, y_true, y_pred)
        ]
        return sum(values)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "relation_heads": self.relation_heads}


@keras.saving.register_keras_serializable(package="keras_kd")
class PKD(FeatureLoss):
    """Match the direction of one token's hidden state, that of the whole sequence (patient KD).

    `sum over units of (h_t / ||h_t|| - h_s / ||h_s||)**2` for the token at
    `position`, the mean over the matched layers. The weights of the paper lie
    between 10 and 1000.

    Args:
        position: Int: which token, the first by default.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher states `(batch, tokens, units)` or `(batch, units)`, or a
            list of them.
        y_pred: Student states of the same units, or as long a list.

    Returns:
        Dimensionless, `(batch,)` before reduction, between 0 and 4.

    Raises:
        ValueError: If units or numbers of layers differ.

    Examples:
        >>> loss = PKD()
        >>> float(loss([[3.0, 0.0]], [[0.0, 5.0]]))
        2.0

    Reference:
        - [Sun et al., 2019](https://arxiv.org/abs/1908.09355), section 3.2
    """

    def __init__(
        self,
        position: int = 0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "pkd",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        self.position = int(position)

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have the same units."""
        for theirs, ours in paired_layers(self.name, teacher_shape, student_shape):
            if theirs[-1] != ours[-1] or not {len(theirs), len(ours)} <= {2, 3}:
                raise ValueError(
                    f"`{self.name}` compares states `(batch, tokens, units)` or `(batch, units)` "
                    f"of the same units. Received: teacher {tuple(theirs)}, student "
                    f'{tuple(ours)}. Give the transfer a `projector="linear"`.'
                )
        super().build(teacher_shape, student_shape)

    def mask_of_values(self, mask: Tensor, student: Tensor) -> Tensor:
        """Whether the one token counts."""
        return mask[:, self.position] if len(student.shape) == 3 else None

    def weight_of_values(self, weight: Tensor, mask: Tensor, rank: int) -> Tensor:
        """The weight of the one token."""
        return weight[:, self.position] if len(weight.shape) == 2 else weight

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""

        def direction(states: Tensor) -> Tensor:
            return unit(states[:, self.position] if len(states.shape) == 3 else states)

        values = [
            ops.sum(ops.square(direction(theirs) - direction(ours)), axis=-1)
            for theirs, ours in paired_layers(self.name, y_true, y_pred)
        ]
        return sum(values) / len(values)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "position": self.position}

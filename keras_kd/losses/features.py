"""Losses between feature maps: what the teacher sees inside."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_kd.losses import counts
from keras_kd.losses.base import FeatureLoss, require_positive
from keras_kd.losses.geometry import common_grid, flattened, require_maps, scaled, unit
from keras_kd.utils.types import DType, Shape, Shapes, Tensor, Tensors


def same_shape(name: str, teacher: Shape, student: Shape) -> None:
    """Raise `ValueError` unless both shapes agree beyond the batch."""
    if len(teacher) != len(student) or any(
        t is not None and s is not None and t != s for t, s in zip(teacher[1:], student[1:])
    ):
        raise ValueError(
            f"`{name}` compares features of the same shape. Received: teacher "
            f"{tuple(teacher)}, student {tuple(student)}. Give the transfer a "
            '`projector="linear"`, or tap layers of equal shape.'
        )


def same_channels(name: str, teacher: Shape, student: Shape) -> None:
    """Raise `ValueError` unless both shapes have equally many axes and channels."""
    if len(teacher) != len(student) or teacher[-1] != student[-1]:
        raise ValueError(
            f"`{name}` compares the same number of channels on both sides. Received: teacher "
            f"{tuple(teacher)}, student {tuple(student)}. Give the transfer a "
            '`projector="linear"`, or tap layers of equal width.'
        )


def layers_of(name: str, tensors: Tensors, least: int = 1) -> list[Any]:
    """A list of shapes or tensors, one a layer, from a list or a single one.

    Args:
        name: Name of the loss, for the error.
        tensors: Shapes (tuples) or tensors, or a list of them.
        least: The fewest layers that make sense.

    Returns:
        The list.

    Raises:
        ValueError: If there are fewer than `least`.
    """
    single = not isinstance(tensors, list) and (
        not isinstance(tensors, tuple)
        or not tensors
        or tensors[0] is None
        or isinstance(tensors[0], int)
    )
    found = [tensors] if single else list(tensors)
    if len(found) < least:
        raise ValueError(
            f"`{name}` reads at least {least} layers on each side. Received: {len(found)}. Give "
            'the transfer lists, `teacher=["block1", "block2"]`.'
        )
    return found


def paired_layers(
    name: str, teacher: Tensors, student: Tensors, least: int = 1
) -> list[tuple[Any, Any]]:
    """The layers of both sides, pair by pair; `ValueError` if their numbers differ."""
    theirs, ours = layers_of(name, teacher, least), layers_of(name, student, least)
    if len(theirs) != len(ours):
        raise ValueError(
            f"`{name}` compares layer with layer. Received: {len(theirs)} teacher layers and "
            f"{len(ours)} student layers. List as many on one side as on the other."
        )
    return list(zip(theirs, ours))


def averaged(values: Tensor, mask: Tensor = None) -> Tensor:
    """Mean over the units, and over positions where they get no values of their own.

    Args:
        values: `(batch, ..., units)`.
        mask: Boolean `(batch, ..., positions)`; its axes stay. Defaults to none.

    Returns:
        `(batch,)`; `(batch, tokens)` where there is one axis of tokens; the
        shape of the mask where that has more.
    """
    kept = 2 if len(values.shape) == 3 else 1
    if mask is not None and len(mask.shape) < len(values.shape):
        kept = max(kept, len(mask.shape))
    return ops.mean(values, axis=tuple(range(kept, len(values.shape))))


def feature_mse(teacher: Tensor, student: Tensor, mask: Tensor = None) -> Tensor:
    """Mean squared difference of features.

    Args:
        teacher: `(batch, units)`, `(batch, tokens, units)` or
            `(batch, height, width, channels)`.
        student: Same shape.
        mask: Boolean `(batch, ..., positions)`, whose positions get values each.

    Returns:
        `(batch,)`, or `(batch, tokens)` where the features have one axis of tokens.
    """
    return averaged(ops.square(teacher - student), mask)


def attention_map(features: Tensor, power: float) -> Tensor:
    """Where a layer is active: `mean_c |f|**power`, flattened, of length 1.

    Args:
        features: `(batch, ..., channels)`.
        power: Positive float, dimensionless.

    Returns:
        Tensor `(batch, positions)`.
    """
    features = scaled(features, axis=tuple(range(1, len(features.shape))))
    size = ops.square(features) if power == 2 else ops.power(ops.abs(features), power)
    return unit(flattened(ops.mean(size, axis=-1)))


def mean_of_positions(values: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """The mean of the values of one sample, over the positions that count.

    Args:
        values: `(batch, n)`, 0 where masked.
        mask: Boolean `(batch, ..., positions)`, or `None` for all; all count where it is of
            other positions than the values.
        like: `(batch, ...)`, which flattened has the shape of the values.

    Returns:
        Tensor `(batch,)`.
    """
    if mask is None or not counts.fits(mask, tuple(like.shape)):
        return ops.mean(values, axis=-1)
    valid = counts.expanded(ops.cast(mask, values.dtype), len(like.shape)) * ops.ones_like(like)
    return ops.sum(values, axis=-1) / ops.maximum(ops.sum(flattened(valid), axis=-1), 1.0)


def flow(first: Tensor, second: Tensor, mask: Tensor = None) -> Tensor:
    """Flow matrix of two layers: the mean over positions of the products of their channels.

    Args:
        first: `(batch, ..., m)`.
        second: `(batch, ..., n)`, on the same grid.
        mask: Boolean `(batch, ..., positions)`; features are 0 where it is false.

    Returns:
        Tensor `(batch, m, n)`.
    """
    share = None
    if mask is not None and counts.fits(mask, tuple(first.shape)[:-1]):
        valid = ops.cast(counts.expanded(mask, len(first.shape)), first.dtype)
        axes = tuple(range(1, len(first.shape)))
        share = ops.mean(valid * ops.ones_like(first[..., :1]), axis=axes)
    first, second = _positions(first), _positions(second)
    count = ops.cast(ops.shape(first)[1], first.dtype)
    if share is not None:
        # One position at least: where none counts all products are 0.
        count = ops.maximum(count * share, 1.0)[:, None, None]
    return ops.matmul(ops.transpose(first, (0, 2, 1)), second / count)


def selectivity_mmd(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the activation patterns of channels.

    Every channel's map is brought to length 1; with the kernel `(a . b)**2`:
    the mean over pairs of channels of `K_tt + K_ss - 2 * K_st`.

    Args:
        teacher: `(batch, ..., m)`.
        student: `(batch, ..., n)`, on the same grid.

    Returns:
        Tensor `(batch,)`, dimensionless.
    """
    teacher, student = unit(_positions(teacher), axis=1), unit(_positions(student), axis=1)
    count, m, n = teacher.shape[1], teacher.shape[-1], student.shape[-1]
    if count is not None and count <= min(m, n):
        # sum_ij (a_i . b_j)**2 is the inner product of A A' and B B', which are
        # positions x positions here and so the smaller matrices.
        theirs = ops.matmul(teacher, ops.transpose(teacher, (0, 2, 1))) / m
        ours = ops.matmul(student, ops.transpose(student, (0, 2, 1))) / n
        return ops.sum(ops.square(theirs - ours), axis=(1, 2))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return ops.mean(ops.square(ops.matmul(ops.transpose(a, (0, 2, 1)), b)), axis=(1, 2))

    return kernel(teacher, teacher) + kernel(student, student) - 2.0 * kernel(teacher, student)


def channel_correlation(features: Tensor) -> Tensor:
    """Similarity of every channel's map with every other's, rows of length 1.

    Args:
        features: `(batch, ..., channels)`.

    Returns:
        Tensor `(batch, channels, channels)`.
    """
    maps = scaled(_positions(features), axis=(1, 2))
    return unit(ops.matmul(ops.transpose(maps, (0, 2, 1)), maps), axis=-1)


def _positions(features: Tensor) -> Tensor:
    """`(batch, ..., channels)` as `(batch, positions, channels)`."""
    if len(features.shape) == 3:
        return features
    return ops.reshape(
        features, (ops.shape(features)[0], _count(features.shape[1:-1]), features.shape[-1])
    )


def _count(grid: Shape) -> int:
    """Number of positions, -1 where it is not known."""
    count = 1
    for length in grid:
        if length is None:
            return -1
        count *= length
    return count


@keras.saving.register_keras_serializable(package="keras_kd")
class Hint(FeatureLoss):
    """Mean squared difference between a teacher's and a student's features.

    `mean((f_t - projector(f_s))**2)`; the projector is the transfer's. Lists of
    layers give the mean over the pairs. The paper's weight in a sum with the
    hard loss is 100.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, units)`, `(batch, tokens, units)` or
            `(batch, height, width, channels)`, or a list of them.
        y_pred: Student features after the projector, same shape, or as long a list.

    Returns:
        Squared units of the features, `(batch,)`, or `(batch, tokens)`, before
        reduction.

    Raises:
        ValueError: If the shapes differ and no projector joins them, the lists
            differ in length, or only some of the layers have tokens.

    Examples:
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
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have the same shape, layer by layer."""
        pairs = paired_layers(self.name, teacher_shape, student_shape)
        for pair in pairs:
            same_shape(self.name, *pair)
        positions = {tuple(ours[1:2]) if len(ours) == 3 else () for _, ours in pairs}
        if len(positions) > 1:
            raise ValueError(
                f"`{self.name}` takes the mean over layers whose values fit together: all with "
                f"the same tokens, or none with tokens. Received: {[ours for _, ours in pairs]}. "
                "Use one transfer for each pair of layers."
            )
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)` or `(batch, tokens)`."""
        pairs = paired_layers(self.name, y_true, y_pred)
        values = [feature_mse(*pair, self.mask) for pair in pairs]
        return sum(values) / len(values)


@keras.saving.register_keras_serializable(package="keras_kd")
class AttentionTransfer(FeatureLoss):
    """Let the student look where the teacher looks.

    `mean((a_t - a_s)**2)` over positions, `a` the flattened `mean_c |f|**power`
    brought to length 1. The numbers of channels may differ; the larger map is
    averaged to the grid of the smaller. Lists of layers give the mean over the
    pairs. The reference weight beside the hard loss is 1000.

    Args:
        power: Positive float, dimensionless: higher ones look at the peaks.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, height, width, channels)` or
            `(batch, positions, channels)`, or a list of them.
        y_pred: Student features with as many axes, or as long a list.

    Returns:
        Dimensionless, `(batch,)` before reduction.

    Raises:
        ValueError: If `power` is not positive, the features have no positions
            or the lists differ in length.

    Examples:
        >>> import numpy as np
        >>> teacher = np.eye(2, dtype="float32").reshape(1, 2, 2, 1)
        >>> round(float(AttentionTransfer()(teacher, teacher[:, ::-1])), 4)
        0.5

    Reference:
        - [Zagoruyko & Komodakis, 2017](https://arxiv.org/abs/1612.03928), section 3.1
    """

    def __init__(
        self,
        power: float = 2.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "attention_transfer",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        require_positive("power", power)
        self.power = power

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have maps."""
        for pair in paired_layers(self.name, teacher_shape, student_shape):
            require_maps(self.name, *pair)
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        values = []
        for teacher, student in paired_layers(self.name, y_true, y_pred):
            teacher, student = common_grid(teacher, student, self.name)
            difference = attention_map(teacher, self.power) - attention_map(student, self.power)
            squares = ops.square(difference)
            values.append(mean_of_positions(squares, self.mask, student[..., 0]))
        return sum(values) / len(values)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "power": self.power}


@keras.saving.register_keras_serializable(package="keras_kd")
class FSP(FeatureLoss):
    """Match the flow between layers: how the features of one become those of the next.

    `mean((G_t - G_s)**2)` with the flow matrix `G = F1' F2 / positions` of two
    layers; with more than two layers a side, the mean over consecutive pairs.
    Of one pair the larger map is averaged to the grid of the smaller.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: List of two or more teacher features `(batch, height, width, channels)`.
        y_pred: As long a list of student features with the same channels.

    Returns:
        Features to the fourth power, `(batch,)` before reduction.

    Raises:
        ValueError: If there are fewer than two layers, or channels differ.

    Examples:
        >>> import numpy as np
        >>> ones = np.ones((1, 2, 2, 3), "float32")
        >>> float(FSP()([ones, ones], [ones, 2 * ones]))
        1.0

    Reference:
        - [Yim et al., 2017](https://openaccess.thecvf.com/content_cvpr_2017/html/\
Yim_A_Gift_From_CVPR_2017_paper.html), section 3
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "fsp",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have the same channels layer by layer."""
        for pair in paired_layers(self.name, teacher_shape, student_shape, least=2):
            require_maps(self.name, *pair)
            same_channels(self.name, *pair)
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        values = []
        for layer in range(len(y_true) - 1):
            theirs = flow(*common_grid(y_true[layer], y_true[layer + 1], self.name), self.mask)
            ours = flow(*common_grid(y_pred[layer], y_pred[layer + 1], self.name), self.mask)
            values.append(ops.mean(ops.square(theirs - ours), axis=(1, 2)))
        return sum(values) / len(values)


@keras.saving.register_keras_serializable(package="keras_kd")
class NST(FeatureLoss):
    """Match which patterns the channels respond to, whichever channel it is.

    Every channel's map is brought to length 1; with the kernel `(a . b)**2`:
    the mean over pairs of channels of `K_tt + K_ss - 2 * K_st`, a maximum mean
    discrepancy. The numbers of channels may differ; the larger map is averaged
    to the grid of the smaller. Lists of layers give the mean over the pairs.
    The reference weight beside the hard loss is 50.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, height, width, channels)` or
            `(batch, positions, channels)`, or a list of them.
        y_pred: Student features with as many axes, or as long a list.

    Returns:
        Dimensionless, `(batch,)` before reduction.

    Raises:
        ValueError: If the features have no positions or the lists differ in length.

    Examples:
        >>> import numpy as np
        >>> teacher = np.eye(4, dtype="float32").reshape(1, 2, 2, 4)
        >>> round(float(NST()(teacher, teacher[..., :1])), 4)
        0.75

    Reference:
        - [Huang & Wang, 2017](https://arxiv.org/abs/1707.01219), section 3
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "nst",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have maps."""
        for pair in paired_layers(self.name, teacher_shape, student_shape):
            require_maps(self.name, *pair)
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        values = [
            selectivity_mmd(*common_grid(teacher, student, self.name))
            for teacher, student in paired_layers(self.name, y_true, y_pred)
        ]
        return sum(values) / len(values)


@keras.saving.register_keras_serializable(package="keras_kd")
class ICKD(FeatureLoss):
    """Match which channels respond together (inter-channel correlation).

    `sum((G_t - G_s)**2) / channels`, `G = F' F` over the positions with rows of
    length 1. Lists of layers give the mean over the pairs. The reference weight
    beside the hard loss is 2.5.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, height, width, channels)` or
            `(batch, positions, channels)`, or a list of them.
        y_pred: Student features with the same channels, or as long a list; the
            grid may differ.

    Returns:
        Dimensionless, `(batch,)` before reduction.

    Raises:
        ValueError: If the features have no positions, channels differ, or the
            lists differ in length.

    Examples:
        >>> import numpy as np
        >>> teacher = np.eye(4, dtype="float32").reshape(1, 2, 2, 4)
        >>> round(float(ICKD()(teacher, np.ones((1, 2, 2, 4), "float32"))), 4)
        1.0

    Reference:
        - [Liu et al., 2021](https://arxiv.org/abs/2202.03680), section 3
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "ickd",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Check that both sides have maps of the same channels."""
        for pair in paired_layers(self.name, teacher_shape, student_shape):
            require_maps(self.name, *pair)
            same_channels(self.name, *pair)
        super().build(teacher_shape, student_shape)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        values = []
        for teacher, student in paired_layers(self.name, y_true, y_pred):
            difference = channel_correlation(teacher) - channel_correlation(student)
            values.append(ops.sum(ops.square(difference), axis=(1, 2)) / student.shape[-1])
        return sum(values) / len(values)

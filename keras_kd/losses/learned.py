"""Losses between feature maps that bring layers of their own, trained with the student."""

import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_kd.losses.base import FeatureLoss, require_positive, require_weights
from keras_kd.losses.features import averaged, mean_of_positions, paired_layers, same_shape
from keras_kd.losses.geometry import (
    averaged_to,
    common_grid,
    flattened,
    precise,
    require_maps,
    unit,
)
from keras_kd.utils.types import DType, Shape, Shapes, Tensor


def layer_precision(dtype: str) -> Any:
    """Precision of a loss's layers: its own, with weights in float32 where that is a half.

    Float32 in place of float16, past which the sums over channels are in the gradient of a layer.
    """
    if dtype == "bfloat16":
        return keras.DTypePolicy("mixed_bfloat16")
    return "float32" if dtype == "float16" else dtype


def _normalization(precision: DType) -> Any:
    """Batch normalization with the constants of the papers' reference code."""
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=precision)


def factor_difference(teacher: Tensor, student: Tensor, mask: Tensor = None) -> Tensor:
    """Mean absolute difference of flattened factors of length 1; `(batch,)`.

    Args:
        teacher: `(batch, ...)`.
        student: The same shape.
        mask: Boolean `(batch, ..., positions)`; factors are 0 where it is false.
    """
    difference = ops.abs(unit(flattened(teacher)) - unit(flattened(student)))
    return mean_of_positions(difference, mask, student)


def gaussian_nll(teacher: Tensor, mean: Tensor, variance: Tensor, mask: Tensor = None) -> Tensor:
    """Negative log-likelihood of the teacher's features, `log(2 pi) / 2` left out.

    `mean of ((mean - f_t)**2 / variance + log(variance)) / 2`.

    Args:
        teacher: `(batch, ..., channels)`.
        mean: Predicted features, same shape.
        variance: `(channels,)`, positive.
        mask: Boolean `(batch, ..., positions)`, whose positions get values each.

    Returns:
        `(batch,)`, or `(batch, tokens)` where the features have one axis of tokens.
    """
    teacher, mean, variance = precise(teacher), precise(mean), precise(variance)
    return averaged(0.5 * (ops.square(mean - teacher) / variance + ops.log(variance)), mask)


def pyramid_mse(teacher: Tensor, student: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Squared difference of two maps and of their averages on ever coarser grids.

    `(MSE + sum_i 2**-i * MSE(averaged to levels[i])) / (1 + sum_i 2**-i)`, `i`
    counting from 1 the levels that are smaller than the map.

    Args:
        teacher: `(batch, height, width, channels)`.
        student: Same shape.
        levels: Grid sizes, largest first.

    Returns:
        Tensor `(batch,)`.
    """
    difference = precise(teacher) - precise(student)
    height, width = difference.shape[1:3]
    value, total, share = _mean_square(difference), 1.0, 1.0
    for level in levels:
        if level >= height:
            continue
        share /= 2
        # Averages are linear: the difference of averages is the average of differences.
        coarse = averaged_to(averaged_to(difference, level, 1), min(level, width), 2)
        value = value + share * _mean_square(coarse)
        total += share
    return value / total


def _mean_square(x: Tensor) -> Tensor:
    return ops.mean(ops.square(flattened(x)), axis=-1)


@keras.saving.register_keras_serializable(package="keras_kd")
class FactorTransfer(FeatureLoss):
    """Match the direction of factors: features paraphrased for the student.

    `mean |F_t / ||F_t|| - F_s / ||F_s|||` over the flattened factors. Without a
    `rate` the factors are the features themselves, after the transfer's
    projector. With a `rate` they come from the networks of the paper, which
    this loss owns: a paraphraser (three 3x3 convolutions to `rate * channels`,
    leaky ReLU 0.1, and a decoder of three more) on the teacher, and a
    translator (three 3x3 convolutions) on the student. The paper trains the
    paraphraser beforehand; here it learns to reconstruct the teacher's features
    in the same run, and the student's loss does not reach it. The reference
    weight beside the hard loss is 500.

    Args:
        rate: `None`, or a positive float: width of the factors, as a share of
            the teacher's channels; the paper's is 0.5.
        reconstruction: Non-negative float: weight of the paraphraser's mean
            squared reconstruction error in the value; only with a `rate`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, height, width, channels)`; without a
            `rate` of any shape.
        y_pred: Student features of the same shape; with a `rate` the channels
            and the grid may differ.

    Returns:
        Dimensionless, `(batch,)` before reduction.

    Raises:
        ValueError: If an argument is out of its range, or shapes do not fit.

    Examples:
        >>> loss = FactorTransfer()
        >>> float(loss([[3.0, 0.0]], [[0.0, 2.0]]))
        1.0

    Reference:
        - [Kim et al., 2018](https://arxiv.org/abs/1802.04977), section 3
    """

    single_layer = True

    def __init__(
        self,
        rate: float | None = None,
        reconstruction: float = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "factor_transfer",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        if rate is not None:
            require_positive("rate", rate)
        require_weights(reconstruction=reconstruction)
        self.rate = rate
        self.reconstruction = reconstruction
        self.encoder: Any = None
        self.decoder: Any = None
        self.translator: Any = None

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Make the paraphraser and the translator, where there is a `rate`."""
        if self.rate is None:
            same_shape(self.name, teacher_shape, student_shape)
            super().build(teacher_shape, student_shape)
            return
        require_maps(self.name, teacher_shape, student_shape, rank=4)
        theirs, ours = teacher_shape[-1], student_shape[-1]
        width = max(round(self.rate * theirs), 1)
        self.encoder = self._convolutions("encoder", theirs, (theirs, width, width))
        self.decoder = self._convolutions("decoder", width, (width, theirs, theirs))
        self.translator = self._convolutions("translator", ours, (ours, width, width))
        super().build(teacher_shape, student_shape)

    def _convolutions(self, name: str, channels: int, widths: tuple[int, ...]) -> Any:
        stack: list[Any] = []
        for width in widths:
            stack.append(
                keras.layers.Conv2D(width, 3, padding="same", dtype=layer_precision(self.dtype))
            )
            stack.append(
                keras.layers.LeakyReLU(negative_slope=0.1, dtype=layer_precision(self.dtype))
            )
        network = keras.Sequential(stack, name=f"{self.name}_{name}")
        network.build((None, None, None, channels))
        return network

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """Encoder, decoder and translator, where there is a `rate`."""
        return [] if self.rate is None else [self.encoder, self.decoder, self.translator]

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        if self.rate is None:
            return factor_difference(y_true, y_pred, self.mask)
        factor = self.encoder(y_true)
        rebuilt = self.decoder(factor)
        error = _mean_square(precise(rebuilt) - y_true)
        theirs, ours = common_grid(ops.stop_gradient(factor), self.translator(y_pred), self.name)
        return precise(factor_difference(theirs, ours)) + self.reconstruction * error

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {
            **super().get_config(),
            "rate": self.rate,
            "reconstruction": self.reconstruction,
        }


class _LogScale(keras.layers.Layer):
    """`softplus(rho) + floor`: a positive number per channel, learned."""

    def __init__(self, channels: int, initial: float, floor: float, **kwargs: object) -> None:
        super().__init__(**kwargs)
        # expm1 of softplus's value gives back its argument.
        start = math.log(math.expm1(initial - floor))
        self.floor = floor
        self.rho = self.add_weight(
            shape=(channels,), initializer=keras.initializers.Constant(start), name="rho"
        )

    def call(self, inputs: Tensor) -> Tensor:
        return ops.softplus(ops.cast(self.rho, inputs.dtype)) + self.floor


@keras.saving.register_keras_serializable(package="keras_kd")
class VID(FeatureLoss):
    """Raise a bound on what the student's features tell about the teacher's.

    `mean of ((mu(f_s) - f_t)**2 / v + log v) / 2`: the negative log-likelihood
    of a Gaussian without its constant, so that values may be negative. `mu` is
    three 1x1 convolutions with ReLU between them, `v = softplus(rho) + 1e-5` one
    variance per channel; both are learned and owned by this loss. The larger
    map is averaged to the grid of the smaller. The reference weight is 1.

    Args:
        width: Positive int: channels inside `mu`; `None` for the teacher's.
        initial_variance: Positive float above 1e-5, squared units of the features.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features `(batch, ..., channels)`.
        y_pred: Student features with as many axes.

    Returns:
        In nats, `(batch,)`, or `(batch, tokens)`, before reduction.

    Raises:
        ValueError: If an argument is out of its range, or the numbers of axes differ.

    Examples:
        >>> import numpy as np
        >>> loss = VID()
        >>> float(loss(np.ones((1, 4)), np.ones((1, 2)))) > 0.8
        True

    Reference:
        - [Ahn et al., 2019](https://arxiv.org/abs/1904.05835), section 3.1
    """

    per_position: ClassVar[bool] = True
    single_layer = True

    def __init__(
        self,
        width: int | None = None,
        initial_variance: float = 5.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "vid",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        if width is not None:
            require_positive("width", width)
        if not 1e-5 < initial_variance < math.inf:
            raise ValueError(
                "`initial_variance` must be finite and above 1e-5. "
                f"Received: initial_variance={initial_variance!r}. The paper's is 5."
            )
        self.width = width
        self.initial_variance = initial_variance
        self.mean: Any = None
        self.variance: Any = None

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Make the regressor and the variances."""
        channels = teacher_shape[-1]
        width = self.width or channels
        precision = layer_precision(self.dtype)
        # A dense layer over the last axis is a 1x1 convolution of any rank.
        self.mean = keras.Sequential(
            [
                keras.layers.Dense(width, "relu", use_bias=False, dtype=precision),
                keras.layers.Dense(width, "relu", use_bias=False, dtype=precision),
                keras.layers.Dense(channels, use_bias=False, dtype=precision),
            ],
            name=f"{self.name}_mean",
        )
        self.mean.build((None,) * (len(student_shape) - 1) + (student_shape[-1],))
        self.variance = _LogScale(
            channels, self.initial_variance, 1e-5, dtype=precision, name=f"{self.name}_variance"
        )
        self.variance.build(student_shape)
        super().build(teacher_shape, student_shape)

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The regressor and the variances."""
        return [] if self.mean is None else [self.mean, self.variance]

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)` or `(batch, tokens)`."""
        teacher, student = common_grid(y_true, y_pred, self.name)
        mean, variance = self.mean(student), self.variance(teacher)
        return gaussian_nll(teacher, mean, variance, self.mask)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {
            **super().get_config(),
            "width": self.width,
            "initial_variance": self.initial_variance,
        }


@keras.saving.register_keras_serializable(package="keras_kd")
class SimKD(FeatureLoss):
    """Bring the student's last feature map to the teacher's, whose classifier is then reused.

    `mean((projector(f_s) - f_t)**2)` with the maps before the global pooling.
    The projector, owned by this loss, is 1x1, 3x3 and 1x1 convolutions with
    batch normalization and ReLU after each, `channels / factor` wide inside.
    The larger map is averaged to the grid of the smaller. Train with this loss
    alone: neither hard labels nor logits. Then predict with the teacher's head
    on `loss.projector` of the student's map.

    Args:
        factor: Positive int: how many times narrower the projector is inside.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: Teacher features, `(batch, height, width, channels)`.
        y_pred: Student features, `(batch, height, width, channels)`; the
            channels and the grid may differ.

    Returns:
        Squared units of the features, `(batch,)` before reduction.

    Raises:
        ValueError: If the features are no maps, or `factor` is not positive.

    Examples:
        >>> import numpy as np
        >>> loss = SimKD()
        >>> float(loss(np.zeros((1, 2, 2, 8)), np.ones((1, 4, 4, 3)))) >= 0.0
        True
        >>> loss.projector.output_shape
        (None, None, None, 8)

    Reference:
        - [Chen et al., 2022](https://arxiv.org/abs/2203.14001), section 3
    """

    single_layer = True

    def __init__(
        self,
        factor: int = 2,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "simkd",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        require_positive("factor", factor)
        self.factor = factor
        self.projector: Any = None

    def build(self, teacher_shape: Any, student_shape: Any) -> None:
        """Make the projector."""
        require_maps(self.name, teacher_shape, student_shape, rank=4)
        channels = teacher_shape[-1]
        width = max(channels // self.factor, 1)
        precision = layer_precision(self.dtype)
        stack: list[Any] = []
        for filters, size in ((width, 1), (width, 3), (channels, 1)):
            stack.append(
                keras.layers.Conv2D(filters, size, padding="same", use_bias=False, dtype=precision)
            )
            stack.append(_normalization(precision))
            stack.append(keras.layers.ReLU(dtype=precision))
        self.projector = keras.Sequential(stack, name=f"{self.name}_projector")
        self.projector.build((None, None, None, student_shape[-1]))
        super().build(teacher_shape, student_shape)

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The projector."""
        return [] if self.projector is None else [self.projector]

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        teacher, student = common_grid(y_true, y_pred, self.name)
        return _mean_square(precise(self.projector(student, training=self.training)) - teacher)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "factor": self.factor}


class _Fusion(keras.layers.Layer):
    """One level of ReviewKD: mixes a student map with what comes from the deeper level."""

    def __init__(self, width: int, channels: int, deepest: bool, **kwargs: object) -> None:
        super().__init__(**kwargs)
        precision = self.dtype_policy
        start = "lecun_uniform"
        self.reduce = keras.layers.Conv2D(
            width, 1, use_bias=False, kernel_initializer=start, dtype=precision
        )
        self.reduce_norm = _normalization(precision)
        self.attend = (
            None if deepest else keras.layers.Conv2D(2, 1, activation="sigmoid", dtype=precision)
        )
        self.expand = keras.layers.Conv2D(
            channels,
            3,
            padding="same",
            use_bias=False,
            kernel_initializer=start,
            dtype=precision,
        )
        self.expand_norm = _normalization(precision)
        self.width = width
        self.channels = channels

    def build(self, input_shape: Shape) -> None:
        self.reduce.build((None, None, None, input_shape[-1]))
        self.reduce_norm.build((None, None, None, self.width))
        if self.attend is not None:
            self.attend.build((None, None, None, 2 * self.width))
        self.expand.build((None, None, None, self.width))
        self.expand_norm.build((None, None, None, self.channels))
        self.built = True

    def call(
        self, features: Tensor, deeper: Tensor, grid: Shape, training: bool = False
    ) -> tuple[Tensor, Tensor]:
        x = self.reduce_norm(self.reduce(features), training=training)
        if self.attend is not None:
            deeper = nearest(deeper, x.shape[1:3])
            share = self.attend(ops.concatenate([x, deeper], axis=-1))
            x = x * share[..., :1] + deeper * share[..., 1:]
        x = nearest(x, grid)
        return self.expand_norm(self.expand(x), training=training), x


def nearest(x: Tensor, grid: Shape) -> Tensor:
    """Resize a map by repeating entries: entry `i` is the old `floor(i * old / new)`.

    Args:
        x: `(batch, height, width, channels)` of known size.
        grid: The new height and width.

    Returns:
        Tensor `(batch, *grid, channels)`.
    """
    for axis, size in zip((1, 2), grid):
        if x.shape[axis] != size:
            index = np.arange(size) * x.shape[axis] // size
            x = ops.take(x, ops.convert_to_tensor(index, dtype="int32"), axis=axis)
    return x


@keras.saving.register_keras_serializable(package="keras_kd")
class ReviewKD(FeatureLoss):
    """Teach every teacher level with the student's features of that and all deeper levels.

    From deep to shallow each student map is fused with the fused map below it
    by a learned attention, brought to the teacher's width by a convolution, and
    compared with the teacher's map: `MSE` of the maps and, weighted `2**-i`, of
    their averages on 4x4, 2x2 and 1x1 grids, over the sum of the weights. The
    value is the sum over the levels. The fusing layers are owned by this loss.
    Weights of the reference code lie between 0.6 and 8, warmed up over 20
    epochs (`kd.callbacks.TransferWeightAnnealing`).

    Args:
        width: Positive int: most channels of the fused maps.
        levels: Sizes of the coarser grids, largest first.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss in the logs.
        dtype: Precision of the computation.

    Call arguments:
        y_true: List of teacher features, shallow to deep, each
            `(batch, height, width, channels)` or `(batch, units)`.
        y_pred: As long a list of student features; channels and grids may differ.

    Returns:
        Squared units of the features, `(batch,)` before reduction.

    Raises:
        ValueError: If the lists differ in length, or a map has no known size.

    Examples:
        >>> import numpy as np
        >>> teacher = [np.ones((1, 4, 4, 6)), np.ones((1, 8))]
        >>> student = [np.ones((1, 8, 8, 3)), np.ones((1, 5))]
        >>> float(ReviewKD()(teacher, student)) >= 0.0
        True

    Reference:
        - [Chen et al., 2021](https://arxiv.org/abs/2104.09044), section 3
    """

    def __init__(
        self,
        width: int = 512,
        levels: tuple[int, ...] = (4, 2, 1),
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "reviewkd",
        dtype: DType = None,
    ) -> None:
        super().__init__(reduction, name, dtype)
        require_positive("width", width)
        for level in levels:
            require_positive("levels", level)
        self.width = width
        self.levels = tuple(levels)
        self.fusions: list[Any] = []

    def build(self, teacher_shape: Shapes, student_shape: Shapes) -> None:
        """Make the fusing layers, deepest first."""
        pairs = paired_layers(self.name, teacher_shape, student_shape)
        for shape in (shape for pair in pairs for shape in pair):
            if len(shape) not in (2, 4) or None in shape[1:]:
                raise ValueError(
                    f"`{self.name}` reads `(batch, height, width, channels)` of known size, or "
                    f"`(batch, units)`. Received: {tuple(shape)}. Give the models inputs of a "
                    "fixed size."
                )
        width = min(self.width, pairs[-1][1][-1])
        self.fusions = []
        for level, (theirs, ours) in reversed(list(enumerate(pairs))):
            fusion = _Fusion(
                width,
                theirs[-1],
                level == len(pairs) - 1,
                dtype=layer_precision(self.dtype),
                name=f"{self.name}_fusion_{level}",
            )
            fusion.build(ours)
            self.fusions.append(fusion)
        super().build(teacher_shape, student_shape)

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The fusing layers, deepest first."""
        return list(self.fusions)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the values, `(batch,)`."""
        pairs = paired_layers(self.name, y_true, y_pred)
        value, deeper = 0.0, None
        for fusion, (teacher, student) in zip(self.fusions, reversed(pairs)):
            teacher, student = _as_map(teacher), _as_map(student)
            grid = tuple(teacher.shape[1:3])
            fused, deeper = fusion(student, deeper=deeper, grid=grid, training=self.training)
            value = value + pyramid_mse(teacher, fused, self.levels)
        return value

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this loss."""
        return {**super().get_config(), "width": self.width, "levels": list(self.levels)}


def _as_map(features: Tensor) -> Tensor:
    """`(batch, units)` as a map of one position."""
    return features if len(features.shape) == 4 else features[:, None, None, :]

"""Magnitude pruning: the smallest weights become zero and stay zero while the rest train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.compress.channels import remove_channels
from keras_kd.compress.selection import chosen_layers, paths
from keras_kd.models.folding import require_built
from keras_kd.models.graph import Graph, copy_built, rebuild
from keras_kd.models.weight_wrapper import WeightWrapper, effective_weights, kernels
from keras_kd.utils.types import Shape, Tensor
from keras_kd.utils.values import is_whole

PATTERNS = (None, "2:4", "channels")


def magnitude_mask(weights: Tensor, sparsity: Tensor) -> Tensor:
    """Ones where a weight is among the largest, zeros where it is pruned.

    Kept are the `round(size * (1 - sparsity))` largest magnitudes (one at least), and those that
    equal the smallest of them.

    Args:
        weights: Float tensor of any shape.
        sparsity: Scalar from 0 to 1, the fraction to prune; may be a tensor.

    Returns:
        Float32 tensor of the shape of `weights`.

    Examples:
        >>> [float(m) for m in magnitude_mask([3.0, -1.0, 2.0, 0.5], 0.5)]
        [1.0, 0.0, 1.0, 0.0]

    Reference:
        - [Zhu and Gupta, 2017](https://arxiv.org/abs/1710.01878), section 3
    """
    magnitudes = ops.abs(ops.cast(ops.stop_gradient(ops.convert_to_tensor(weights)), "float32"))
    size = int(np.prod(magnitudes.shape))
    ascending = ops.sort(ops.reshape(magnitudes, (-1,)))
    share = 1.0 - ops.cast(sparsity, "float32")
    kept = ops.cast(ops.maximum(ops.round(size * share), 1.0), "int32")
    threshold = ops.take(ascending, size - kept)
    return ops.cast(magnitudes >= threshold, "float32")


def n_of_m_mask(weights: Tensor, pruned: int = 2, group: int = 4) -> Tensor:
    """Zeros for the `pruned` smallest of every `group` neighbors along the input channels.

    The groups run along the last axis but one of a kernel (input channel), which is the innermost
    axis of TFLite's layout; an incomplete last group counts its missing members as the smallest.

    Args:
        weights: Kernel of rank 2 or more, `(..., inputs, outputs)`.
        pruned: Zeros in each group.
        group: Neighbors in each group.

    Returns:
        Float32 tensor of the shape of `weights`.

    Examples:
        >>> mask = n_of_m_mask([[4.0], [1.0], [2.0], [3.0]])
        >>> [float(m) for m in mask[:, 0]]
        [1.0, 0.0, 0.0, 1.0]

    Reference:
        - [Mishra et al., 2021](https://arxiv.org/abs/2104.08378)
    """
    magnitudes = ops.abs(ops.cast(ops.stop_gradient(ops.convert_to_tensor(weights)), "float32"))
    inner = ops.swapaxes(magnitudes, -1, -2)
    shape = inner.shape
    missing = -shape[-1] % group
    padding = [(0, 0)] * (len(shape) - 1) + [(0, missing)]
    # Below zero, so that a missing member never takes the place of one that is there.
    padded = ops.pad(inner, padding, constant_values=-1.0)
    blocks = ops.reshape(padded, (-1, group))
    # Rank in the group by counting the larger ones; of equals the earlier counts as larger.
    ahead = ops.expand_dims(blocks, 1) > ops.expand_dims(blocks, 2)
    equal = ops.expand_dims(blocks, 1) == ops.expand_dims(blocks, 2)
    earlier = ops.convert_to_tensor(np.tril(np.ones((group, group), bool), -1))
    rank = ops.sum(ops.cast(ops.logical_or(ahead, equal & earlier), "int32"), axis=-1)
    mask = ops.reshape(ops.cast(rank < group - pruned, "float32"), padded.shape)
    return ops.swapaxes(mask[..., : shape[-1]], -1, -2)


@keras.saving.register_keras_serializable(package="keras_kd")
class PrunedLayer(WeightWrapper):
    """A layer whose kernels are multiplied by a mask of zeros and ones.

    The layer counts the training steps it takes and makes the mask anew at the steps of its
    schedule, so no callback is needed and it works in any training loop, compiled or not. Pruned
    weights take no gradient and stay zero.

    Args:
        layer: Layer with kernels.
        steps: Training steps, ascending, at which the mask is made anew; empty for a fixed mask.
        sparsities: The fraction to prune at each of them.
        repeat: Further on, after how many steps to make it anew each time; 0 for never.
        pattern: None, or `"2:4"`.
        weights: Names of the variables to prune; None for the usual kernels.
        **kwargs: Arguments of `keras.layers.Layer`.

    Reference:
        - [Zhu and Gupta, 2017](https://arxiv.org/abs/1710.01878)
    """

    def __init__(
        self,
        layer: keras.Layer,
        steps: tuple[int, ...] = (),
        sparsities: tuple[float, ...] = (),
        repeat: int = 0,
        pattern: str | None = None,
        weights: tuple[str, ...] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(layer, **kwargs)
        self.steps = tuple(int(step) for step in steps)
        self.sparsities = tuple(float(value) for value in sparsities)
        self.repeat = int(repeat)
        self.pattern = pattern
        self.weight_names = None if weights is None else tuple(weights)

    def build(self, input_shape: Shape) -> None:
        """Build the layer, and a mask of ones for each kernel."""
        super().build(input_shape)
        self.masks = [
            self.add_weight(
                shape=kernel.shape,
                initializer="ones",
                trainable=False,
                autocast=False,
                dtype="float32",
                name=f"mask_{index}",
            )
            for index, kernel in enumerate(kernels(self.layer, self.weight_names))
        ]
        self.step = self.add_weight(
            shape=(), initializer="zeros", trainable=False, dtype="int32", name="pruning_step"
        )

    def apply_mask(self, sparsity: float | None) -> None:
        """Make the masks from the present weights.

        Args:
            sparsity: Fraction to prune; None to keep the zeros that are there.
        """
        for mask, kernel in zip(self.masks, kernels(self.layer, self.weight_names), strict=True):
            value = ops.convert_to_tensor(kernel)
            if sparsity is None:
                mask.assign(ops.cast(value != 0.0, "float32"))
            else:
                mask.assign(self._mask(value, sparsity))

    def _mask(self, kernel: Tensor, sparsity: Tensor) -> Tensor:
        # A vector has no input axis to group along, and a depthwise kernel has one input a channel.
        if self.pattern == "2:4":
            return n_of_m_mask(kernel)
        return magnitude_mask(kernel, sparsity)

    def effective(self, training: bool | None) -> list[tuple[Any, Tensor]]:
        """Each kernel times its mask, made anew first where the schedule says so."""
        pairs = []
        due, sparsity = (None, None)
        if training and self.steps:
            due, sparsity = self._schedule()
            self.step.assign(ops.convert_to_tensor(self.step) + 1)
        for variable, kernel in zip(
            self.masks, kernels(self.layer, self.weight_names), strict=True
        ):
            mask = ops.convert_to_tensor(variable)
            value = ops.convert_to_tensor(kernel)
            if due is not None:
                # Sorting a kernel costs more than a step of a small layer: only when due.
                mask = ops.cond(
                    due,
                    lambda value=value: self._mask(value, sparsity),
                    lambda mask=mask: mask * 1.0,
                )
                variable.assign(mask)
            pairs.append((kernel, value * ops.cast(mask, value.dtype)))
        return pairs

    def _schedule(self) -> tuple[Tensor, Tensor]:
        """Whether the present step makes the mask anew, and the sparsity then."""
        now = ops.convert_to_tensor(self.step)
        here = ops.cast(ops.equal(np.array(self.steps, "int32"), now), "float32")
        due = ops.sum(here) > 0.0
        sparsity = ops.sum(here * np.array(self.sparsities, "float32"))
        if self.repeat:
            past = now - self.steps[-1]
            again = ops.logical_and(past > 0, ops.equal(past % self.repeat, 0))
            due = ops.logical_or(due, again)
            sparsity = ops.where(again, self.sparsities[-1], sparsity)
        return due, sparsity

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "steps": list(self.steps),
            "sparsities": list(self.sparsities),
            "repeat": self.repeat,
            "pattern": self.pattern,
            "weights": self.weight_names,
        }


def prune(
    model: keras.Model,
    sparsity: float = 0.5,
    schedule: Any = None,
    pattern: str | None = None,
    scope: str = "layer",
    layers: list[str] | None = None,
    begin_step: int = 0,
    end_step: int = 1000,
    frequency: int = 100,
) -> keras.Model:
    """Make a copy of a model whose smallest weights are, or become, zero.

    Args:
        model: Built Functional or Sequential model. It is not changed.
        sparsity: Fraction of each layer's kernel to prune, 0 to 1 (both excluded). With a schedule
            it is the schedule that counts; with `"2:4"` it is 0.5 by construction; with
            `"channels"` it is the fraction of each layer's channels.
        schedule: None to prune at once and keep the mask while the rest trains. Else when to prune
            and how much: `"polynomial"` (from 0 to `sparsity` with the third power, Zhu and Gupta's
            schedule); a `keras.optimizers.schedules.LearningRateSchedule` whose value is the
            sparsity as a function of the steps since `begin_step`; or a schedule of TFMOT, such as
            `kd.compress.tfmot.pruning_schedule().PolynomialDecay(...)`, which brings steps of its
            own.
        pattern: None for single weights; `"2:4"` for two zeros in each four neighbors along the
            input channels; `"channels"` to remove whole channels, which gives a plain, dense and
            really smaller model at once.
        scope: `"layer"`, the same fraction everywhere; `"global"`, one threshold for all kernels as
            they are now, which divides the sparsity between the layers; each layer then keeps its
            share.
        layers: Names (paths) of the layers to prune; None for all with kernels. The depthwise
            kernels, small and all-important, are left out then, also those of separable
            convolutions, which a warning and `summary` say.
        begin_step: Training step of the first mask, for schedules without steps of their own.
        end_step: Training step of the last mask.
        frequency: Steps from one mask to the next.

    Returns:
        New Functional model, not compiled, that trains as any other; `finalize` writes the zeros
        into plain layers.

    Raises:
        TypeError: If `model` is no Keras model or `schedule` is none of the above.
        ValueError: If the model's graph is not known, or an argument is out of range.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
        >>> pruned = finalize(prune(model, sparsity=0.75))
        >>> float(np.mean(np.asarray(pruned.layers[-1].kernel) == 0))
        0.75

    Reference:
        - [Zhu and Gupta, 2017](https://arxiv.org/abs/1710.01878)
        - [Mishra et al., 2021](https://arxiv.org/abs/2104.08378), 2:4
        - [Li et al., 2017](https://arxiv.org/abs/1608.08710), channels
    """
    require_built(model)
    if pattern not in PATTERNS:
        raise ValueError(
            f'`pattern` must be None, "2:4" or "channels". Received: pattern={pattern!r}.'
        )
    if scope not in ("layer", "global"):
        raise ValueError(f'`scope` must be "layer" or "global". Received: scope={scope!r}.')
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"`sparsity` must be a number. Received: sparsity={sparsity!r}.")
    if not 0.0 < sparsity < 1.0:
        raise ValueError(
            "`sparsity` is the fraction of weights to set to zero and must lie between 0 and 1, "
            f"both excluded. Received: sparsity={sparsity}."
        )
    if pattern == "channels":
        if schedule is not None or scope != "layer":
            raise ValueError(
                'pattern="channels" removes the channels at once: leave out `schedule` and '
                "`scope`. To go in steps, prune and train again and again."
            )
        return remove_channels(model, sparsity, layers)
    if pattern == "2:4" and scope == "global":
        raise ValueError('pattern="2:4" fixes each layer\'s sparsity: leave out `scope="global"`.')
    chosen = chosen_layers(model, layers, "prune")
    table = _table(schedule, sparsity, begin_step, end_step, frequency)
    named = layers is not None
    if not named:
        _tell_what_stays_dense(chosen, paths(model))
    shares = _shares(model, chosen, sparsity, scope, named)

    def make(layer: keras.Layer, graph: Graph) -> Any:
        new = copy_built(layer)
        if id(layer) not in chosen or id(layer) not in shares:
            return new
        steps, sparsities, repeat = table
        share = shares[id(layer)]
        wrapper = PrunedLayer(
            new,
            steps=steps,
            # The schedule's course, ending at this layer's share.
            sparsities=tuple(min(value * share / sparsity, 1.0) for value in sparsities),
            repeat=repeat,
            pattern=pattern,
            weights=_names(layer, named),
        )
        wrapper.build_from_config({"layer": None})
        if not steps:
            wrapper.apply_mask(share)
        return wrapper

    return rebuild(model, make)


def _names(layer: keras.Layer, named: bool) -> tuple[str, ...] | None:
    found = {v.name for v in kernels(layer)}
    rest = found - {"depthwise_kernel"}
    if named:
        return None
    return () if _depthwise(layer) else tuple(sorted(rest))


def _depthwise(layer: keras.Layer) -> bool:
    if isinstance(layer, keras.layers.Wrapper):
        return _depthwise(layer.layer)
    return isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))


def _tell_what_stays_dense(chosen: dict[int, str], layers: dict[str, Any]) -> None:
    left: list[str] = []
    for path in chosen.values():
        pruned = _names(layers[path], False)
        names = [v.name for v in kernels(layers[path]) if v.name not in (pruned or ())]
        left.extend(f"`{path}` ({name})" for name in names)
    if left:
        warnings.warn(
            f"Depthwise kernels, small and all-important, stay dense: {', '.join(left)}. To prune "
            "them, name their layers in `layers`.",
            stacklevel=3,
        )


def _shares(
    model: keras.Model, chosen: dict[int, str], sparsity: float, scope: str, named: bool
) -> dict[int, float]:
    """The final sparsity of each layer by `id`."""
    from keras_kd.models.weight_wrapper import every_layer

    values: dict[int, np.ndarray] = {}
    for _, layer in every_layer(model):
        if id(layer) not in chosen or id(layer) in values:
            continue
        wanted = kernels(layer, _names(layer, named))
        if wanted:
            replaced = {id(v): t for v, t in effective_weights(layer, False)}
            values[id(layer)] = np.concatenate(
                [np.abs(ops.convert_to_numpy(replaced.get(id(v), v))).ravel() for v in wanted]
            )
    if scope == "layer":
        return dict.fromkeys(values, sparsity)
    together = np.sort(np.concatenate(list(values.values())))
    threshold = together[min(round(len(together) * sparsity), len(together) - 1)]
    return {key: float(np.mean(value < threshold)) for key, value in values.items()}


def _table(
    schedule: Any, sparsity: float, begin_step: int, end_step: int, frequency: int
) -> tuple[tuple[int, ...], tuple[float, ...], int]:
    """Steps and sparsities of a schedule, and the distance of the steps that go on forever."""
    if schedule is None:
        return (), (), 0
    least = 0
    for name, value in (
        ("begin_step", begin_step),
        ("end_step", end_step),
        ("frequency", frequency),
    ):
        if not is_whole(value) or int(value) < least:
            raise ValueError(
                f"`{name}` must be an integer of at least {least}. Received: {value!r}."
            )
        least = int(value) + 1 if name == "begin_step" else 1
    begin_step, end_step, frequency = int(begin_step), int(end_step), int(frequency)
    _require_few((end_step - begin_step) // frequency, "masks", "Raise `frequency`")
    if isinstance(schedule, str) and schedule == "polynomial":
        schedule = keras.optimizers.schedules.PolynomialDecay(
            0.0, end_step - begin_step, end_learning_rate=sparsity, power=3.0
        )
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        steps = list(range(begin_step, end_step + 1, frequency))
        if steps[-1] != end_step:
            steps.append(end_step)
        values = [float(ops.convert_to_numpy(schedule(step - begin_step))) for step in steps]
        repeat = 0
    elif _is_tfmot(schedule):
        steps, values, repeat = _tfmot_table(schedule)
    else:
        raise TypeError(
            '`schedule` must be None, "polynomial", a Keras LearningRateSchedule or a TFMOT '
            f"pruning schedule. Received: {schedule!r}."
        )
    if not steps:
        raise ValueError(
            f"`schedule` prunes at no step from {schedule.begin_step} to {schedule.end_step}. Give "
            "it a `frequency` that meets one."
        )
    # Written so that NaN fails too.
    if not all(0.0 <= value < 1.0 for value in values):
        raise ValueError(
            "The values of `schedule` are sparsities and must lie in [0, 1). "
            f"It gives {np.min(values):.3g} to {np.max(values):.3g} between steps {steps[0]} and "
            f"{steps[-1]}."
        )
    if not any(values):
        raise ValueError(
            f"`schedule` prunes nothing: it gives 0 at each of {len(values)} steps from {steps[0]} "
            f"to {steps[-1]}. Pass one that rises, or leave it out to prune at once."
        )
    return tuple(steps), tuple(values), repeat


MAX_STEPS = 1_000_000
"""Steps at which a schedule is asked: more take minutes, and no training has as many masks."""


def _require_few(count: int, what: str, advice: str) -> None:
    if count > MAX_STEPS:
        raise ValueError(
            f"The schedule of pruning has {count:,} {what}, and at most {MAX_STEPS:,} are made. "
            f"{advice}, or end it earlier."
        )


def _is_tfmot(schedule: object) -> bool:
    return any(kind.__name__ == "PruningSchedule" for kind in type(schedule).__mro__)


def _tfmot_table(schedule: Any) -> tuple[list[int], list[float], int]:
    import tensorflow as tf

    call: Callable[[Any], Any] = tf.function(schedule)
    forever = schedule.end_step < 0
    last = schedule.begin_step + schedule.frequency if forever else schedule.end_step
    _require_few(last - schedule.begin_step, "steps", "Begin it later")
    steps, values = [], []
    for step in range(schedule.begin_step, last + 1):
        due, value = call(tf.constant(step, tf.int64))
        if bool(due):
            steps.append(step)
            values.append(float(value))
    return steps, values, schedule.frequency if forever else 0

"""Methods that train on rows of the memory as on those of the task, and distil features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_kd.lifelong.distilling import softened_crossentropy
from keras_kd.lifelong.method import Ending, Method
from keras_kd.lifelong.rehearsal import weighted_mean
from keras_kd.losses.geometry import unit
from keras_kd.utils import checks
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Array, Tensor

if TYPE_CHECKING:
    from keras_kd.lifelong.heads import GrowingHead
    from keras_kd.lifelong.lesson import Lesson


class ICaRL(Method):
    """Learn features with old answers as targets, and answer the class whose mean is nearest.

    With `loss="bce"`, as in the paper, each column is a binary classifier: the target of a column
    that there was before the task is the sigmoid that the model had there, that of a new one
    whether the row is of its class. With `loss="ce"` it is the hard loss and
    `CE(softmax(z_old / T), softmax(z / T))` over the old columns. Rows of the memory are trained on
    as those of the task. When a task ends, the mean of the L2-normalized features of each class's
    rows in the memory, normalized, becomes its column in the model that answers; a memory of the
    policy `"herding"` holds the rows for which that is meant.

    Args:
        loss: `"bce"` or `"ce"`.
        temperature: `T` of `"ce"`.

    Raises:
        TypeError: If `temperature` is no number.
        ValueError: If an argument is out of range.

    Examples:
        >>> learner = Learner(model, method=ICaRL(), memory=Memory(200, policy="herding"))

    Reference:
        - [Rebuffi et al., 2017](https://arxiv.org/abs/1611.07725), algorithms 1 to 5
    """

    terms = ("label_loss", "distillation_loss")
    uses_memory = True
    joins = True
    reads_old = True
    needs_rows = True

    def __init__(self, loss: str = "bce", temperature: float = 2.0) -> None:
        if loss not in ("bce", "ce"):
            raise ValueError(
                f"`loss` is 'bce' or 'ce'. Received: loss={loss!r}."
                + did_you_mean(loss, ("bce", "ce"), quote="'")
            )
        self.kind, self.temperature = loss, checks.positive("temperature", temperature)
        # Labels are targets of new columns alone.
        self.needs_new = loss == "bce"
        self.means: dict[int, Array] = {}

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {"loss": self.kind, "temperature": self.temperature}

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """New labels and old answers."""
        logits = outputs["logits"]
        old = None if lesson.old is None else lesson.read_old(parts["x"])["logits"]
        if self.kind == "ce":
            terms = super().loss(lesson, parts, y, outputs)
            if old is not None:
                apart = softened_crossentropy(old, lesson.of_old(logits), self.temperature)
                terms["distillation_loss"] = ops.mean(apart)
            return terms
        logits = ops.cast(logits, "float32")
        targets = ops.one_hot(ops.cast(y, "int32"), lesson.counts[2], dtype="float32")
        values = keras.ops.binary_crossentropy(targets, logits, from_logits=True)
        new = sorted(set(range(lesson.counts[2])) - set(lesson.old_columns))
        if old is None or not lesson.old_columns:
            return {"label_loss": ops.mean(ops.sum(values, axis=-1))}
        found = {}
        if new:
            of_new = ops.take(values, ops.convert_to_tensor(new, "int32"), axis=-1)
            found["label_loss"] = ops.mean(ops.sum(of_new, axis=-1))
        before = ops.sigmoid(ops.cast(old, "float32"))
        of_old = ops.binary_crossentropy(before, lesson.of_old(logits), from_logits=True)
        found["distillation_loss"] = ops.mean(ops.sum(of_old, axis=-1))
        return found

    def finish(self, ending: Ending) -> None:
        """Take the mean of each class from its rows in the memory."""
        memory = ending.memory
        held = np.zeros(0, "int64") if memory is None else memory.y
        features = _unit(ending.outputs(memory.x)["features"]) if memory and len(held) else None
        rest = None
        for label in ending.head.classes.tolist():
            mine = np.flatnonzero(held == label)
            if features is not None and len(mine):
                self.means[label] = features[mine].mean(0)
            elif (ending.y == label).any():
                # The memory has no row of the class: those of the task tell its mean.
                rest = _unit(ending.outputs(ending.x)["features"]) if rest is None else rest
                self.means[label] = rest[ending.y == label].mean(0)

    def answering(self, head: GrowingHead) -> Any:
        """The model with normalized means as columns: `argmax` is the nearest of them."""
        if not self.means:
            return head.plain()
        columns = np.stack([self.means[label] for label in head.classes.tolist()], axis=1)
        return head.with_columns(columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-12))

    def state(self) -> dict[str, Array]:
        """The means and their classes."""
        if not self.means:
            return {}
        return {
            "labels": np.array(list(self.means), "int64"),
            "means": np.stack(list(self.means.values())),
        }

    def load_state(self, arrays: dict[str, Array]) -> None:
        """Take the means of a `state`."""
        labels = arrays.get("labels", np.zeros(0))
        self.means = {int(label): arrays["means"][i] for i, label in enumerate(labels)}


class LessForgetting(Method):
    """Cosine columns of equal length, features that keep their direction, and rivals kept apart.

    Minimizes the hard loss of `scale * cos` + `weight * sqrt(C_old / C_task) * mean(1 -
    cos(f_old, f))` + `margin_weight * mean_k max(0, margin - cos(y) + cos(k))`, the last over rows
    of earlier classes and, of each, the `rivals` columns of the task's classes that are nearest.
    Columns of classes that are not in the task are left alone; those of new ones begin as the mean
    normalized feature of their rows. Give it a model whose features do not end in a ReLU: their
    directions need both signs.

    Args:
        weight: Weight of the features' direction, 5 in the paper.
        margin: In cosine, 0.5 in the paper.
        rivals: How many columns each row is kept from, 2 in the paper.
        margin_weight: Weight of the margin, 1 in the paper.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If one is out of range.

    Examples:
        >>> method = LessForgetting()
        >>> learner = Learner(model, method=method, memory=Memory(200, policy="herding"))

    Reference:
        - [Hou et al., 2019](https://openaccess.thecvf.com/content_CVPR_2019/html/Hou_Learning_a_Unified_Classifier_Incrementally_via_Rebalancing_CVPR_2019_paper.html),
          equations 4 to 8
    """

    terms = ("label_loss", "feature_loss", "margin_loss")
    uses_memory = True
    joins = True
    reads_old = True
    cosine = True
    freezes = True

    def __init__(
        self,
        weight: float = 5.0,
        margin: float = 0.5,
        rivals: int = 2,
        margin_weight: float = 1.0,
    ) -> None:
        self.weight = checks.number("weight", weight, 0)
        self.margin = checks.number("margin", margin, 0)
        self.margin_weight = checks.number("margin_weight", margin_weight, 0)
        self.rivals = checks.whole("rivals", rivals)

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {
            "weight": self.weight,
            "margin": self.margin,
            "rivals": self.rivals,
            "margin_weight": self.margin_weight,
        }

    def imprint(self, x: Array, y: Array, outputs: Callable[[Array], Array]) -> Any:
        """The mean direction of the features of a class."""
        features = _unit(outputs(x)["features"])

        def column(label: int) -> Array:
            mean = features[y == label].mean(0)
            return mean / max(float(np.linalg.norm(mean)), 1e-12)

        return column

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """The hard loss, the direction of the features, and the margin."""
        terms = super().loss(lesson, parts, y, outputs)
        if lesson.old is None:
            return terms
        old = lesson.read_old(parts["x"])["features"]
        apart = one_minus_cosine(old, outputs["features"])
        ratio = math.sqrt(len(lesson.old_columns) / max(lesson.counts[1], 1))
        terms["feature_loss"] = self.weight * ratio * ops.mean(apart)
        cosines = outputs["logits"] / ops.cast(lesson.scale(), outputs["logits"].dtype)
        values = margin_ranking(cosines, y, lesson.task_columns, self.margin, self.rivals)
        terms["margin_loss"] = self.margin_weight * weighted_mean(values, lesson.is_old(y))
        return terms


class PodNet(Method):
    """Keep what is pooled of maps along each axis, and the direction of the features.

    Minimizes the hard loss of `scale * cos` + `sqrt(C_all / C_task)` times `spatial * mean over
    layers of ||pooled_old - pooled||` + `flat * (1 - cos(f_old, f))`. `pooled` of maps `(height,
    width, channels)` is their squares summed over the width and over the height, side by side,
    L2-normalized. The paper's several proxies a class and its NCA loss are not part of this: each
    class has one cosine column, trained by the hard loss.

    Args:
        spatial: Weight of the maps, 3 in the authors' configuration for CIFAR-100.
        flat: Weight of the features, 1 there.
        layers: Names of the layers whose maps are kept. Defaults to the last one of each size of
            maps, where the model has any.

    Raises:
        TypeError: If a weight is no number.
        ValueError: If a weight is negative, or a layer is not there or has no maps.

    Examples:
        >>> method = PodNet(layers=["block1", "block2", "block3"])
        >>> learner = Learner(model, method=method, memory=Memory(200, policy="herding"))

    Reference:
        - [Douillard et al., 2020](https://arxiv.org/abs/2004.13513), equations 3 to 6
    """

    terms = ("label_loss", "spatial_loss", "flat_loss")
    uses_memory = True
    joins = True
    reads_old = True
    cosine = True

    def __init__(self, spatial: float = 3.0, flat: float = 1.0, layers: Any = None) -> None:
        self.spatial, self.flat = (
            checks.number("spatial", spatial, 0),
            checks.number("flat", flat, 0),
        )
        if isinstance(layers, str):
            layers = [layers]
        self.layers = None if layers is None else [str(name) for name in layers]

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {"spatial": self.spatial, "flat": self.flat, "layers": self.layers}

    def taps(self, head: GrowingHead) -> list[str]:
        """The layers whose maps are kept."""
        maps = {
            layer.name: tuple(layer.output.shape[1:3])
            for layer in head.model.layers
            if not isinstance(layer, keras.layers.InputLayer) and _has_maps(layer)
        }
        if self.layers is None:
            # The last of each size.
            return list({size: name for name, size in maps.items()}.values())
        for name in self.layers:
            if name not in maps:
                raise ValueError(
                    f"`{name}` is no layer with maps of the model `{head.name}`; there are "
                    f"{', '.join(f'`{each}`' for each in maps) or 'none'}."
                    + did_you_mean(name, maps)
                )
        return self.layers

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """The hard loss, the maps and the features."""
        terms = super().loss(lesson, parts, y, outputs)
        if lesson.old is None:
            return terms
        before = lesson.read_old(parts["x"])
        ratio = math.sqrt(lesson.counts[2] / max(lesson.counts[1], 1))
        stages = [
            ops.mean(pooled_apart(before[name], value))
            for name, value in outputs.items()
            if name not in ("logits", "features")
        ]
        if stages:
            terms["spatial_loss"] = self.spatial * ratio * (sum(stages) / len(stages))
        apart = one_minus_cosine(before["features"], outputs["features"])
        terms["flat_loss"] = self.flat * ratio * ops.mean(apart)
        return terms


def one_minus_cosine(old: Tensor, new: Tensor) -> Tensor:
    """`1 - cos(old, new)`, one value a row.

    Args:
        old: `(batch, features)`.
        new: Of the same shape.
    """
    old, new = (unit(ops.cast(each, "float32")) for each in (old, new))
    return 1.0 - ops.sum(old * new, axis=-1)


def margin_ranking(
    cosines: Tensor, y: Tensor, columns: Tensor, margin: float, rivals: int
) -> Tensor:
    """`mean_k max(0, margin - cos(y) + cos(k))` over the nearest of some columns, a value a row.

    Args:
        cosines: `(batch, classes)`.
        y: The right columns, `(batch,)`.
        columns: Those of the rivals.
        margin: In cosine.
        rivals: How many of them, the nearest, count.
    """
    chosen = ops.one_hot(ops.cast(y, "int32"), cosines.shape[-1], dtype=cosines.dtype)
    right = ops.sum(cosines * chosen, axis=-1, keepdims=True)
    others = ops.take(cosines, ops.convert_to_tensor(list(columns), "int32"), axis=-1)
    nearest = ops.top_k(others, min(rivals, len(columns)))[0]
    return ops.mean(ops.relu(margin - right + nearest), axis=-1)


def pooled_apart(old: Tensor, new: Tensor) -> Tensor:
    """Distance of pooled squares of maps, one value a row.

    Args:
        old: `(batch, height, width, channels)`, or with the channels first.
        new: Of the same shape.
    """

    def pooled(maps: Tensor) -> Tensor:
        squares = ops.square(ops.cast(maps, "float32"))
        axes = (1, 2) if keras.config.image_data_format() == "channels_last" else (2, 3)
        flat = [ops.reshape(ops.sum(squares, axis=axis), (-1, _size(maps, axis))) for axis in axes]
        return unit(ops.concatenate(flat, axis=-1))

    apart = ops.sum(ops.square(pooled(old) - pooled(new)), axis=-1)
    # Of equal maps the root would have no gradient.
    safe = ops.where(apart > 0, apart, ops.ones_like(apart))
    return ops.where(apart > 0, ops.sqrt(safe), ops.zeros_like(apart))


def _size(maps: Tensor, axis: int) -> int:
    return int(np.prod([size for i, size in enumerate(maps.shape) if i not in (0, axis)]))


def _has_maps(layer: keras.Layer) -> bool:
    shape = getattr(layer.output, "shape", ())
    return len(shape) == 4 and None not in shape[1:]


def _unit(features: Array) -> Array:
    features = np.asarray(features, "float64").reshape(len(features), -1)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

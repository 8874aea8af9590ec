"""The last layer of a model, with a column for each class that is known.

`GrowingHead` takes a model apart into what makes features and the Dense layer behind it, and puts
it together again with more columns. Columns stand in ascending order of their classes, so that
`argmax` is the class as soon as all classes from 0 on are known. Whatever a head has by column,
weights and the state of the optimizer, goes along with the class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.losses.geometry import unit
from keras_kd.models import graph
from keras_kd.utils.types import Array, Shape, Tensor


class CosineHead(keras.layers.Layer):
    """`scale * cos(features, column)` for each column, with a scale that is learned.

    Args:
        units: Number of columns.
        trained: Numbers of the columns that are trained; the others stay as they are. Defaults to
            all.
        **kwargs: As for any layer.

    Reference:
        - [Hou et al., 2019](https://openaccess.thecvf.com/content_CVPR_2019/html/Hou_Learning_a_Unified_Classifier_Incrementally_via_Rebalancing_CVPR_2019_paper.html),
          section 3.2
    """

    def __init__(self, units: int, trained: Sequence[int] | None = None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.trained = list(range(units)) if trained is None else [int(i) for i in trained]
        self.still = sorted(set(range(units)) - set(self.trained))
        # Where each column lies among the trained ones and those behind them.
        self._order = np.argsort(np.array([*self.trained, *self.still], "int64")).tolist()
        self.kernel: Any = None
        self.scale: Any = None
        self.frozen: Any = None

    def build(self, input_shape: Shape) -> None:
        """Make the columns and the scale."""
        width = input_shape[-1]
        self.kernel = self.add_weight((width, len(self.trained)), "glorot_uniform", name="kernel")
        self.scale = self.add_weight((), keras.initializers.Constant(10.0), name="scale")
        if self.still:
            self.frozen = self.add_weight(
                (width, len(self.still)), "glorot_uniform", trainable=False, name="frozen"
            )
        super().build(input_shape)

    def columns(self) -> Tensor:
        """All columns in order, `(features, units)`."""
        kernel = ops.convert_to_tensor(self.kernel)
        if self.frozen is None:
            return kernel
        both = ops.concatenate([kernel, ops.convert_to_tensor(self.frozen)], axis=1)
        return ops.take(both, ops.convert_to_tensor(self._order, "int32"), axis=1)

    def call(self, features: Tensor) -> Tensor:
        """The scaled cosines, `(batch, units)`."""
        # Keras's own `normalize` has no gradient at zeros, as where all of a row's units are off.
        features, columns = unit(features), unit(self.columns(), axis=0)
        return ops.matmul(features, ops.cast(columns, features.dtype)) * ops.cast(
            self.scale, features.dtype
        )

    def compute_output_shape(self, input_shape: Shape) -> Any:
        """`(batch, units)`."""
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the layer."""
        return {**super().get_config(), "units": self.units, "trained": self.trained}


class GrowingHead:
    """A model whose last Dense layer grows with the classes.

    Args:
        model: A Functional or Sequential model whose output is that of a Dense layer without an
            activation. Its other layers are trained where they are; the Dense layer itself gives
            the first values of the columns that it has.
        cosine: Whether the head is a `CosineHead`.
        known: Classes that the columns of the given layer stand for already, in their order.
        seed: Of the first values of columns that the given layer does not have.

    Attributes:
        classes: The classes that have a column, ascending, int64.
        ranks: Which number in order of appearance each of them has, int32.
        layer: The present head.
        model: The present model, from inputs to logits.

    Raises:
        ValueError: If the model ends otherwise.
    """

    def __init__(
        self, model: keras.Model, cosine: bool = False, known: Sequence[int] = (), seed: int = 0
    ) -> None:
        self.given = _dense_at_the_end(model)
        self.inputs = model.inputs
        self._structure = model.inputs[0] if len(model.inputs) == 1 else model.input
        try:
            self.features = self.given.input
        except AttributeError as error:
            raise ValueError(
                f"The layers of `{model.name}` were called more than once, so that it is not known "
                "which call is meant. Pass `keras.models.clone_model(model)`."
            ) from error
        self.name = model.name
        self.cosine = cosine
        self.seed = seed
        self._first = _by_column(self.given)
        # Of the classes from 0 on, unless it is said which ones its columns stand for.
        self._given_columns = 0 if len(known) else self.given.units
        self._given_model = model
        self.layer: Any = self.given
        self.model: Any = model
        # Positions of the columns that the optimizer knows.
        self.trained_classes: Array = np.zeros(0, "int64")
        self.classes: Array = np.zeros(0, "int64")
        self.ranks: Array = np.zeros(0, "int32")
        if len(known):
            self._adopt([int(label) for label in known])

    def _adopt(self, known: list[int]) -> None:
        units = self.given.units
        if len(known) != units or len(set(known)) != units:
            raise ValueError(
                f"The head `{self.given.name}` has {units} columns, and `classes` names "
                f"{len(set(known))} classes for them: {known}. Name one class a column."
            )
        order = np.argsort(known)
        self.classes, self.ranks = np.array(known, "int64")[order], order.astype("int32")
        values = {name: v[..., order] for name, v in self._first.items()}
        self._make(values if not self.cosine else {"kernel": values["kernel"]})

    @property
    def body(self) -> list[Any]:
        """The variables of the model but for those of its head, in their order."""
        mine = {id(v) for v in self.layer.variables}
        return [v for v in self.model.variables if id(v) not in mine]

    def columns_of(self, labels: Array) -> Array:
        """The column of each label, int32.

        Args:
            labels: Classes that are known.
        """
        return np.searchsorted(self.classes, labels).astype("int32")

    def grow(self, labels: Array, freeze: bool = False, imprint: Any = None) -> list[int]:
        """Give each of these classes a column, where it has none.

        Args:
            labels: The classes of the next task.
            freeze: Whether columns of other classes are no longer trained; of a cosine head.
            imprint: `fn(label)`: a first column, `(features,)`, of unit length, or `None`.

        Returns:
            The new position of each column that there was.
        """
        new = np.setdiff1d(labels, self.classes)
        before, values = self.classes, self.arrays() if len(self.classes) else {}
        self.classes = np.sort(np.concatenate([before, new]))
        positions = np.searchsorted(self.classes, before)
        ranks = np.zeros(len(self.classes), "int32")
        ranks[positions] = self.ranks
        ranks[np.searchsorted(self.classes, new)] = len(before) + np.arange(len(new))
        self.ranks = ranks
        trained = self.columns_of(np.unique(labels)) if freeze else None
        made = self._fresh()
        for name, value in values.items():
            if value.ndim:
                made[name][..., positions] = value
            else:
                made[name] = value
        if imprint is not None and len(before):
            length = np.linalg.norm(values["kernel"], axis=0).mean()
            for label in new:
                column = imprint(int(label))
                if column is not None:
                    made["kernel"][:, self.columns_of(label)] = length * column
        self._make(made, trained)
        return positions.tolist()

    def _fresh(self) -> dict[str, Array]:
        """First values of all columns: those of the given layer, and drawn ones for the others."""
        count = len(self.classes)
        found = {}
        initializers = {"kernel": self.given.kernel_initializer}
        if self.given.use_bias and not self.cosine:
            initializers["bias"] = self.given.bias_initializer
        for name, initializer in initializers.items():
            shape = (*self._first[name].shape[:-1], count)
            config = initializer.get_config()
            if "seed" in config:
                # Not Keras's own draws, which would be others in a run that goes on.
                config["seed"] = self.seed + 7919 * count
            drawn = type(initializer).from_config(config)(shape, dtype="float32")
            value = np.array(ops.convert_to_numpy(drawn), "float32")
            has = np.flatnonzero(self.classes < self._given_columns)
            value[..., has] = self._first[name][..., self.classes[has]]
            found[name] = value
        if self.cosine:
            found["scale"] = np.array(10.0, "float32")
        return found

    def _make(self, values: dict[str, Array], trained: Array | None = None) -> None:
        """Put a head of these values behind the features."""
        count = len(self.classes)
        if self.cosine:
            self.layer = CosineHead(
                count, trained, name=self.given.name, dtype=self.given.dtype_policy
            )
        else:
            config = {**self.given.get_config(), "units": count}
            self.layer = keras.layers.Dense.from_config(config)
        outputs = self.layer(self.features)
        self.set_arrays(values)
        self.model = keras.Model(self._structure, outputs, name=self.name)
        columns = range(count) if trained is None else trained
        self.trained_classes = self.classes[list(columns)]

    def arrays(self) -> dict[str, Array]:
        """The values of the head by name, with a column for each class at the last axis."""
        if self.cosine:
            return {
                "kernel": np.array(ops.convert_to_numpy(self.layer.columns())),
                "scale": np.array(ops.convert_to_numpy(self.layer.scale)),
            }
        return _by_column(self.layer)

    def set_arrays(self, values: dict[str, Array]) -> None:
        """Give the head these values.

        Args:
            values: As `arrays` returns them.
        """
        if not self.cosine:
            self.layer.kernel.assign(values["kernel"])
            if self.layer.use_bias:
                self.layer.bias.assign(values["bias"])
            return
        self.layer.kernel.assign(values["kernel"][:, self.layer.trained])
        if self.layer.still:
            self.layer.frozen.assign(values["kernel"][:, self.layer.still])
        if "scale" in values:
            self.layer.scale.assign(values["scale"])

    def load(self, classes: Array, ranks: Array, values: dict[str, Array], trained: Array) -> None:
        """Make the head that another run had.

        Args:
            classes: Its classes.
            ranks: Their order of appearance.
            values: Its `arrays`.
            trained: Its `trained_classes`.
        """
        self.classes, self.ranks = classes.astype("int64"), ranks.astype("int32")
        columns = self.columns_of(trained)
        self._make(values, None if len(columns) == len(classes) else columns)

    def reset(self) -> None:
        """Know no class again."""
        self.layer, self.model = self.given, self._given_model
        self.classes, self.trained_classes = np.zeros(0, "int64"), np.zeros(0, "int64")
        self.ranks = np.zeros(0, "int32")

    def reader(self, taps: Sequence[str] = ()) -> Any:
        """The model with more outputs: a dict of `logits`, `features` and each tap by its name.

        Args:
            taps: Names of layers.
        """
        read = {name: self.model.get_layer(name).output for name in taps}
        outputs = {"logits": self.model.outputs[0], "features": self.features, **read}
        return keras.Model(self._structure, outputs, name=self.name)

    def plain(self) -> Any:
        """The model in layers of Keras alone; of a cosine head one that computes the same."""
        if not self.cosine:
            return self.model
        values = self.arrays()
        kernel = values["kernel"] / np.maximum(np.linalg.norm(values["kernel"], axis=0), 1e-12)
        return self.with_columns(values["scale"] * kernel)

    def with_columns(self, columns: Array) -> Any:
        """A model that answers `features / ||features|| @ columns`.

        Args:
            columns: `(features, classes)`.
        """
        directions = keras.layers.UnitNormalization(name=f"{self.given.name}_unit")
        dense = keras.layers.Dense(columns.shape[1], use_bias=False, name=self.given.name)
        outputs = dense(directions(self.features))
        dense.set_weights([columns.astype("float32")])
        return keras.Model(self._structure, outputs, name=self.name)


def frozen_copy(model: keras.Model) -> Any:
    """A copy that is never trained, with layers and weights of its own.

    Args:
        model: A Functional model.
    """
    copy = graph.rebuild(model, lambda layer, _graph: graph.copy_built(layer))
    copy.trainable = False
    return copy


def carried(
    old: keras.Model, new: keras.Model, body_only: Any, before: Array, now: Array
) -> list[tuple[Any, Array]]:
    """What an optimizer knows, for the variables of a head that has grown.

    Args:
        old: The optimizer's values so far, by position, or an optimizer.
        new: One of the same kind, built for the new variables.
        body_only: One built for those variables that are not the head's, by which slots of the
            head are told from others.
        before: Classes of the columns that were trained.
        now: Classes of those that are trained now.

    Returns:
        Variables of `new` with what they are to hold.

    Raises:
        ValueError: If the two have not as many variables.
    """
    held = [np.array(ops.convert_to_numpy(v)) for v in getattr(old, "variables", old)]
    if len(held) != len(new.variables):
        raise ValueError(
            f"The optimizer has {len(new.variables)} variables and had {len(held)} before the task."
            " The same layers have to be trained in every task."
        )
    # The head is built last. Not all optimizers give each slot a name of its own.
    others = Counter(v.path for v in body_only.variables)
    _, from_old, from_new = np.intersect1d(before, now, return_indices=True)
    pairs = []
    for value, variable in zip(held, new.variables):
        of_body = others[variable.path] > 0
        others[variable.path] -= 1
        if of_body or not value.ndim:
            pairs.append((variable, value))
            continue
        shape = tuple(variable.shape)
        # Of a weight that an optimizer keeps by rows and columns apart, one has no classes.
        axes = [
            i
            for i, (a, b) in enumerate(zip(value.shape, shape))
            if (a, b) == (len(before), len(now))
        ]
        if not axes:
            pairs.append((variable, value))
            continue
        target = np.moveaxis(np.array(ops.convert_to_numpy(variable)), axes[-1], 0)
        target[from_new] = np.moveaxis(value, axes[-1], 0)[from_old]
        pairs.append((variable, np.moveaxis(target, 0, axes[-1])))
    return pairs


def _by_column(layer: keras.Layer) -> dict[str, Array]:
    found = {"kernel": np.array(ops.convert_to_numpy(layer.kernel), "float32")}
    if layer.use_bias:
        found["bias"] = np.array(ops.convert_to_numpy(layer.bias), "float32")
    return found


def _dense_at_the_end(model: keras.Model) -> Any:
    """The Dense layer that answers, which has to be one that can grow."""
    advice = (
        "The learner gives the last Dense layer a column for each class: pass a Functional or "
        "Sequential model that ends in `keras.layers.Dense(classes)` without an activation, and a "
        "loss with `from_logits=True`."
    )
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` is a `keras.Model`. Received: {type(model).__name__}. {advice}")
    if not graph.is_graph(model):
        raise ValueError(
            f"The model `{model.name}` is not built, or a subclassed one whose layers and "
            f"connections are not known. {advice}"
        )
    if len(model.outputs) != 1:
        raise ValueError(f"The model `{model.name}` has {len(model.outputs)} outputs. {advice}")
    last = graph.Graph(model)
    layer = last.layers[last.output_names[0]]
    if type(layer) is not keras.layers.Dense:
        raise ValueError(
            f"The model `{model.name}` ends in `{layer.name}`, a {type(layer).__name__}, which "
            f"cannot grow and is too small for new classes. {advice}"
        )
    if layer.activation is not keras.activations.linear:
        name = getattr(layer.activation, "__name__", layer.activation)
        raise ValueError(
            f"The last layer `{layer.name}` has the activation {name}, behind which logits are not "
            f"seen. {advice}"
        )
    if len(layer.output.shape) != 2 or not last.called_once(layer.name):
        raise ValueError(
            f"The last layer `{layer.name}` answers with shape {tuple(layer.output.shape)} or is "
            f"called more than once. {advice}"
        )
    if layer.quantization_mode or layer.lora_enabled:
        raise ValueError(
            f"The last layer `{layer.name}` is quantized or has a LoRA update. Merge it first. "
            f"{advice}"
        )
    return layer

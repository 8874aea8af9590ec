"""Methods that hold weights near where they were, by how much each mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_kd.lifelong.method import Ending, Method
from keras_kd.utils import checks
from keras_kd.utils.types import Array, Tensor

if TYPE_CHECKING:
    from keras_kd.lifelong.lesson import Lesson


class ElasticWeights(Method):
    """Elastic weight consolidation: `weight / 2 * sum_i F_i * (w_i - w*_i)**2`.

    `w*` are the weights at the end of the last task, and `F` the diagonal of the Fisher
    information, `mean over rows of (d log p(y | x) / d w_i)**2` with `y` drawn from the model's own
    answers, in inference mode. The `F` of all tasks are one sum, each earlier one multiplied by
    `decay` when a task ends, so that what is kept does not grow with the tasks. Columns of classes
    that come later are free.

    Args:
        weight: Weight of the penalty.
        samples: Rows of each task that `F` is estimated from, one by one.
        decay: In [0, 1]. 1 forgets no task.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If one is out of range.

    Examples:
        >>> learner = Learner(model, method=ElasticWeights(weight=100.0))

    Reference:
        - [Kirkpatrick et al., 2017](https://arxiv.org/abs/1612.00796), equation 3
        - [Schwarz et al., 2018](https://arxiv.org/abs/1805.06370), section 4.1
    """

    terms = ("label_loss", "elastic_loss")

    def __init__(self, weight: float = 100.0, samples: int = 200, decay: float = 1.0) -> None:
        self.weight = checks.number("weight", weight, 0)
        self.samples = checks.whole("samples", samples)
        self.decay = checks.number("decay", decay, 0)
        if decay > 1:
            raise ValueError(f"`decay` lies in [0, 1]. Received: decay={decay!r}.")
        # By position among the trainable weights, the last ones with a column for each class.
        self.fisher: list[Array] = []
        self.anchor: list[Array] = []
        self._of_head = 0

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {"weight": self.weight, "samples": self.samples, "decay": self.decay}

    def variables(self, lesson: Lesson) -> dict[str, list[Any]]:
        """The information and the weights that it holds to."""

        def kept(arrays: list[Array], name: str) -> list[Any]:
            options = {"trainable": False, "dtype": "float32", "autocast": False}
            return [keras.Variable(a, name=f"{name}{i}", **options) for i, a in enumerate(arrays)]

        return {"fisher": kept(self.fisher, "fisher"), "anchor": kept(self.anchor, "anchor")}

    def loss(
        self, lesson: Lesson, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """The hard loss and the distance from the weights of before."""
        terms = super().loss(lesson, parts, y, outputs)
        fisher, anchor = lesson.kept["fisher"], lesson.kept["anchor"]
        if fisher:
            terms["elastic_loss"] = self.weight * elastic(
                lesson.network.trainable_variables, fisher, anchor
            )
        return terms

    def grown(self, positions: list[int], columns: int) -> None:
        """Give new columns no information, so that they are free."""
        for arrays in (self.fisher, self.anchor):
            for i in range(len(arrays) - self._of_head, len(arrays)):
                wider = np.zeros((*arrays[i].shape[:-1], columns), "float32")
                wider[..., positions] = arrays[i]
                arrays[i] = wider

    def finish(self, ending: Ending) -> None:
        """Add the information of the task, and hold to the weights as they are."""
        network = ending.head.model
        rng = np.random.default_rng([ending.seed, ending.index, 3])
        rows = rng.permutation(len(ending.x))[: self.samples]
        logits = ending.outputs(ending.x[rows])["logits"].astype("float64")
        # The largest of logits with Gumbel noise is a draw from their softmax.
        y = (logits + rng.gumbel(size=logits.shape)).argmax(1).astype("int32")
        found = fisher_information(network, ending.x[rows], y)
        before = self.fisher or [np.zeros_like(f) for f in found]
        self.fisher = [self.decay * b + f for b, f in zip(before, found)]
        self.anchor = [
            np.array(ops.convert_to_numpy(v), "float32") for v in network.trainable_variables
        ]
        self._of_head = len(ending.head.layer.trainable_variables)

    def state(self) -> dict[str, Array]:
        """Information and weights."""
        found = {"of_head": np.array(self._of_head)} if self.fisher else {}
        for name, arrays in (("fisher", self.fisher), ("anchor", self.anchor)):
            found |= {f"{name}{i}": array for i, array in enumerate(arrays)}
        return found

    def load_state(self, arrays: dict[str, Array]) -> None:
        """Take those of a `state`."""
        count = sum(name.startswith("fisher") for name in arrays)
        self.fisher = [arrays[f"fisher{i}"] for i in range(count)]
        self.anchor = [arrays[f"anchor{i}"] for i in range(count)]
        self._of_head = int(arrays.get("of_head", 0))


def elastic(
    weights: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor]
) -> Tensor:
    """`sum_i F_i * (w_i - w*_i)**2 / 2`, a scalar.

    Args:
        weights: Weights.
        fisher: `F`, of the same shapes.
        anchor: `w*`.
    """
    parts = []
    for w, f, a in zip(weights, fisher, anchor):
        w, f, a = (ops.cast(ops.convert_to_tensor(each), "float32") for each in (w, f, a))
        parts.append(ops.sum(f * ops.square(w - a)) / 2.0)
    return sum(parts)


def fisher_information(model: keras.Model, x: Array, y: Array) -> list[Array]:
    """`mean over rows of (d log p(y | x) / d w)**2` of each trainable weight.

    Keras takes the gradients: rows are trained on one by one with an optimizer that adds up squares
    and changes no weight. The model runs in inference mode.

    Args:
        model: A model from inputs to logits.
        x: Rows.
        y: Columns, `(samples,)`.
    """
    optimizer = _Squares(learning_rate=0.0, name="squares")
    inner = _Inferred(model)
    inner.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
    )
    inner.fit(x, y, batch_size=1, epochs=1, verbose=0, shuffle=False)
    return [np.array(ops.convert_to_numpy(v), "float32") / len(x) for v in optimizer.sums]


class _Inferred(keras.Model):
    """A model that is trained as it answers: BatchNormalization and dropout in inference mode."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name="inferred", dtype="float32", autocast=False)
        self.model = model
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        """The logits."""
        return ops.cast(self.model(x, training=False), "float32")


class _Squares(keras.optimizers.Optimizer):
    """Adds up the squares of gradients, and leaves the weights alone."""

    def build(self, variables: list[keras.Variable]) -> None:
        """Make the sums."""
        if self.built:
            return
        super().build(variables)
        self.sums = [
            self.add_variable_from_reference(reference_variable=v, name="squares")
            for v in variables
        ]

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        """Add the squares of one row."""
        place = self.sums[self._get_variable_index(variable)]
        self.assign_add(place, ops.square(ops.cast(gradient, place.dtype)))

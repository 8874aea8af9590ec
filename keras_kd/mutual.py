"""Training without a finished teacher: students teach each other, exits learn from the last."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_kd import checks, teachers
from keras_kd.losses.base import DistillationLoss, owns_layers
from keras_kd.losses.divergences import SoftTargets
from keras_kd.taps import Answer, Reader
from keras_kd.transfer import Transfer, averaged
from keras_kd.typing import Tensor


class _Together(keras.Model):
    """One forward pass with several logits that learn from the labels and from each other."""

    def __init__(self, names: Sequence[str], name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self._names = list(names)
        self._hard: Any = None
        self._between: Any = None
        self.weight = keras.Variable(
            1.0, trainable=False, dtype="float32", autocast=False, name="mutual_weight"
        )
        self.built = True

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        *,
        metrics: Any = None,
        distillation_loss: Any = None,
        weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Configure the training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: The hard loss of each output against the labels.
            metrics: Metrics of each output, logged as `<name>_<metric>`.
            distillation_loss: One loss between logits: of `keras_kd.losses`,
                without layers of its own, any `keras.losses.Loss`, or a
                function of teacher and student that returns one value per
                sample. Defaults to `SoftTargets(temperature=1.0)`.
            weight: Non-negative weight of the distillation, live as `weight`.
            **kwargs: As in `keras.Model.compile`.

        Raises:
            ValueError: If there is no `loss`, `weight` is negative, or
                `distillation_loss` reads layers or owns some.
            TypeError: If `distillation_loss` is no loss.
        """
        if loss is None:
            raise ValueError(
                f"`{type(self).__name__}` has no finished teacher, so it needs labels. "
                "Pass `loss=`."
            )
        checks.weights(None, None, weight, True)
        # Named losses are functions in Keras, of one value per sample.
        hard = averaged(keras.losses.get(loss))
        between = self._between_logits(distillation_loss)
        super().compile(optimizer=optimizer, **kwargs)
        self.weight.assign(weight)
        # Plain holders: Keras would read a list of losses as one for each output.
        self._hard, self._between = _Held(hard), _Held(between)
        self._means = _Held(
            {
                name: keras.metrics.Mean(name=name)
                for name in (
                    *(f"{name}_loss" for name in self._names),
                    "distillation_loss",
                )
            }
        )
        self._scores = _Held([self._fresh_metrics(metrics) for _ in self._names])

    def _between_logits(self, loss: Any) -> Any:
        """The loss between two learners, refused where it would read more than logits."""
        kind = type(self).__name__
        if loss is None:
            return SoftTargets(temperature=1.0)
        if isinstance(loss, Transfer):
            raise ValueError(
                f"`distillation_loss` of `{kind}` compares the logits, and a `Transfer` says which "
                f"layers are read. Received: the transfer `{loss.name}`. Pass its loss alone; for "
                "layers distil from a finished model in a `keras_kd.Distiller`."
            )
        if owns_layers(loss) or getattr(loss, "reads_indices", False):
            raise ValueError(
                f"`distillation_loss` of `{kind}` has no layers or memory of its own: they would "
                f"not be trained. Received: `{loss.name}`. Pass a loss between logits, as "
                "`keras_kd.losses.SoftTargets()`."
            )
        if not callable(loss):
            raise TypeError(
                f"`distillation_loss` of `{kind}` is one loss between logits, as "
                f"`keras_kd.losses.SoftTargets()`. Received: distillation_loss={loss!r}."
            )
        return averaged(loss)

    def _fresh_metrics(self, metrics: Any) -> list[Any]:
        fresh = []
        for metric in metrics or []:
            if isinstance(metric, str) and metric in ("accuracy", "acc"):
                sparse = "sparse" in getattr(self._hard.it, "name", str(self._hard.it))
                kind = "SparseCategoricalAccuracy" if sparse else "CategoricalAccuracy"
                fresh.append(getattr(keras.metrics, kind)(name="accuracy"))
            else:
                made = keras.metrics.get(metric)
                fresh.append(type(made).from_config(made.get_config()))
        return fresh

    @property
    def metrics(self) -> list[Any]:
        """The total loss and its parts."""
        found = super().metrics
        if not self.compiled:
            return found
        scores = [metric for own in self._scores.it for metric in own]
        return [*found, *self._means.it.values(), *scores]

    def _pairs(self) -> list[tuple[int, int]]:
        """Who teaches whom, as indices of the logits."""
        raise NotImplementedError

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """Sum the hard losses and, for each learner, the mean over its teachers."""
        size = ops.shape(keras.tree.flatten(x)[0])[0]
        total: Any = 0.0
        for name, output in zip(self._names, y_pred.output):
            hard = self._hard.it(y, output, sample_weight)
            self._means.it[f"{name}_loss"].update_state(hard, sample_weight=size)
            total = total + hard
        between: Any = 0.0
        pairs = self._pairs()
        reads_more = isinstance(self._between.it, DistillationLoss)
        more = {"labels": y, "training": training} if reads_more else {}
        for learner in {learner for _, learner in pairs}:
            mine = [teacher for teacher, other in pairs if other == learner]
            for teacher in mine:
                value = self._between.it(
                    ops.stop_gradient(y_pred.logits[teacher]),
                    y_pred.logits[learner],
                    sample_weight,
                    **more,
                )
                between = between + value / len(mine)
        self._means.it["distillation_loss"].update_state(between, sample_weight=size)
        for extra in self.losses:
            total = total + ops.sum(ops.cast(extra, "float32"))
        return total + ops.convert_to_tensor(self.weight) * between

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Update the metrics of every output and return all results by name."""
        logs = {}
        for name, output, metrics in zip(self._names, y_pred.output, self._scores.it):
            for metric in metrics:
                metric.update_state(y, output)
                logs[f"{name}_{metric.name}"] = metric.result()
        for metric in [self.metrics[0], *self._means.it.values()]:
            logs[metric.name] = metric.result()
        return logs

    def predict_step(self, *args: Any) -> Any:
        """Return the outputs, one array for each name."""
        result = super().predict_step(*args)
        if isinstance(result, tuple) and not isinstance(result, Answer):
            answer, state = result
            return list(answer.output), state
        return list(result.output)


class _Held:
    """Holds something out of Keras's tracking."""

    def __init__(self, it: Any) -> None:
        self.it = it


@keras.saving.register_keras_serializable(package="keras_kd")
class MutualLearning(_Together):
    """Several students that teach each other while they learn (deep mutual learning).

    Each student `i` minimizes `CE_i + weight * mean_j KL(p_j || p_i)` over the
    other students `j`, at temperature 1; no gradient passes from one student
    to another. All take their step together.

    Args:
        students: At least two `keras.Model`s with the same inputs and classes.
        from_logits: Whether their outputs are logits; `None` finds out.
        name: Name of the whole.

    Raises:
        ValueError: If there are fewer than two students, or two share a name.
        TypeError: If one is no Keras 3 model.

    Examples:
        >>> peers = MutualLearning([student_a, student_b])
        >>> peers.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> history = peers.fit(x, y, epochs=20)
        >>> student = peers.students[0]

    Reference:
        - [Zhang et al., 2018](https://arxiv.org/abs/1706.00384), section 3
    """

    def __init__(
        self,
        students: Sequence[Any],
        from_logits: bool | None = None,
        name: str = "mutual_learning",
    ) -> None:
        for student in students:
            teachers.require_model(student, "student")
        if len(students) < 2:
            raise ValueError(
                f"Mutual learning needs at least two students. Received: {len(students)}."
            )
        names = [student.name for student in students]
        checks.unique(names, "student")
        super().__init__(names, name, students[0].dtype_policy)
        self.students = list(students)
        self.from_logits = from_logits
        self._readers = _Held([Reader(student, "student", from_logits) for student in students])

    def _pairs(self) -> list[tuple[int, int]]:
        count = len(self._names)
        return [(j, i) for i in range(count) for j in range(count) if i != j]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Run every student on the same inputs."""
        answers = [reader.read(inputs, bool(training)) for reader in self._readers.it]
        return Answer([a.output for a in answers], [a.logits[0] for a in answers], {})

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the students."""
        return {
            "students": [keras.saving.serialize_keras_object(s) for s in self.students],
            "from_logits": self.from_logits,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MutualLearning":
        """Rebuild the students; compile again before training goes on."""
        students = [keras.saving.deserialize_keras_object(s) for s in config["students"]]
        return cls(students, config["from_logits"], config["name"])

    def get_compile_config(self) -> None:
        """Return nothing: peers are compiled anew after loading."""
        return


@keras.saving.register_keras_serializable(package="keras_kd")
class SelfDistillation(_Together):
    """A model with several exits whose last exit teaches the others.

    Every exit `i` minimizes its hard loss, and every exit but the last also
    `weight * KL(p_last || p_i)` at temperature 1. Afterwards an early exit is a
    smaller, faster model of its own.

    Args:
        model: A `keras.Model` whose outputs are the exits, shallowest first,
            as a list, a tuple or a dict in that order.
        from_logits: Whether the outputs are logits; `None` finds out.
        name: Name of the whole.

    Raises:
        ValueError: If the model has fewer than two outputs.
        TypeError: If it is no Keras 3 model.

    Examples:
        >>> trainer = SelfDistillation(keras.Model(inputs, [exit_1, exit_2, exit_3]))
        >>> trainer.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> history = trainer.fit(x, y, epochs=20)

    Reference:
        - [Zhang et al., 2019](https://arxiv.org/abs/1905.08094), section 3
    """

    def __init__(
        self, model: Any, from_logits: bool | None = None, name: str = "self_distillation"
    ) -> None:
        teachers.require_model(model, "model")
        template = teachers.output_template(model)
        exits = list(template) if isinstance(template, dict) else keras.tree.flatten(template)
        if len(exits) < 2:
            raise ValueError(
                f"Self-distillation needs a model with at least two exits. `{model.name}` has "
                f"{len(exits)} outputs."
            )
        super().__init__([str(e) for e in exits], name, model.dtype_policy)
        self.model = model
        self.from_logits = from_logits
        # Keras flattens a dict in the order of its sorted keys.
        flat = keras.tree.flatten(template)
        self._order = _Held([flat.index(name) for name in exits])
        self._reader = _Held(Reader(model, "model", from_logits))

    def _pairs(self) -> list[tuple[int, int]]:
        last = len(self._names) - 1
        return [(last, i) for i in range(last)]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Run the model once."""
        answer = self._reader.it.read(inputs, bool(training))
        flat = keras.tree.flatten(answer.output)
        order = self._order.it
        return Answer([flat[i] for i in order], [answer.logits[i] for i in order], {})

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the model."""
        return {
            "model": keras.saving.serialize_keras_object(self.model),
            "from_logits": self.from_logits,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SelfDistillation":
        """Rebuild the model; compile again before training goes on."""
        model = keras.saving.deserialize_keras_object(config["model"])
        return cls(model, config["from_logits"], config["name"])

    def get_compile_config(self) -> None:
        """Return nothing: the model is compiled anew after loading."""
        return

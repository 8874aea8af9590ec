"""Training without a finished teacher: students teach each other, exits learn from the last."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import keras
from keras import ops

from keras_kd.distill import batch, label_checks, objective
from keras_kd.distill.training_metrics import TrainingMetrics
from keras_kd.losses.base import owns_layers
from keras_kd.losses.divergences import BinarySoftTargets
from keras_kd.models import meaning, output_kinds
from keras_kd.models.model_reader import Answer, Reader
from keras_kd.transfers import compatibility, output_pairing
from keras_kd.transfers.transfer import Transfer, averaged
from keras_kd.utils import checks
from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Data, DType, Losses, Shape, StepOptions, Tensor, Tensors


class _Exit(NamedTuple):
    """One of the outputs that learn: the model that returns it, and which of its flat outputs."""

    reader: Reader
    output: int


class _Together(keras.Model):
    """One forward pass with several logits that learn from the labels and from each other."""

    def __init__(
        self, names: Sequence[str], readers: Sequence[Reader], name: str, dtype: DType
    ) -> None:
        super().__init__(name=name, dtype=dtype, autocast=False)
        self._names = list(names)
        self._readers = _Held(list(readers))
        self._hard: Any = None
        self._between: Any = None
        self._given: Any = None
        self.weight = keras.Variable(
            1.0, trainable=False, dtype="float32", autocast=False, name="mutual_weight"
        )
        self.built = True

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adam",
        loss: Losses = None,
        *,
        metrics: Sequence[object] | Mapping[str, object] | None = None,
        distillation_loss: object = None,
        weight: float = 1.0,
        **kwargs: Unpack[StepOptions],
    ) -> None:
        """Configure the training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: The hard loss of each output against the labels.
            metrics: Metrics of each output, logged as `<name>_<metric>`.
            distillation_loss: One loss between logits: of `keras_kd.losses`,
                without layers of its own, any `keras.losses.Loss`, or a
                function of teacher and student that returns one value per
                sample. Defaults to `SoftTargets(temperature=1.0)`, or to
                `BinarySoftTargets(temperature=1.0)` for sigmoid and one-unit
                classifiers.
            weight: Non-negative weight of the distillation, live as `weight`.
            **kwargs: `run_eagerly`, `steps_per_execution`, `jit_compile`,
                `auto_scale_loss`, as in `keras.Model.compile`.

        Raises:
            ValueError: If there is no `loss`, `weight` is negative, or
                `distillation_loss` reads layers or owns some, or does not fit
                the outputs.
            TypeError: If `distillation_loss` is no loss.
        """
        given: dict[str, Any] = {**kwargs}
        for unread in ("loss_weights", "weighted_metrics"):
            if given.get(unread) is not None:
                raise ValueError(
                    f"`{type(self).__name__}` reads no `{unread}`. Received: "
                    f"{unread}={given[unread]!r}. All outputs have one `loss`, and `metrics` are "
                    "those of each."
                )
        if loss is None:
            raise ValueError(
                f"`{type(self).__name__}` has no finished teacher, so it needs labels. "
                "Pass `loss=`."
            )
        checks.weights(None, None, weight, True)
        # Named losses are functions in Keras, of one value per sample.
        hard = averaged(keras.losses.get(loss))
        between = self._between_logits(distillation_loss)
        before = self._given
        self._given = _Held((loss, between))
        try:
            between = self._fitting()
        except ValueError:
            self._given = before
            raise
        super().compile(optimizer=optimizer, **kwargs)
        self.weight.assign(weight)
        # Plain holders: Keras would read a list of losses as one for each output.
        self._hard, self._between = _Held(hard), _Held(between)
        means = TrainingMetrics()
        means.keep([*(f"{name}_loss" for name in self._names), "distillation_loss"])
        self._means = _Held(means)
        self._asked = _Held(metrics)
        self._scores = _Held([self._fresh_metrics() for _ in self._names])

    def _between_logits(self, loss: Any) -> Any:
        """The loss between two learners, refused where it would read more than logits."""
        kind = type(self).__name__
        if loss is None:
            return None
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

    def _exits(self) -> list[_Exit]:
        """Where the outputs come from, in the order of their names."""
        raise NotImplementedError

    def _ends(self) -> list[tuple[str, Any]]:
        """Kind and shape of each output, `"unknown"` and `None` as long as only a batch tells."""
        found = []
        for reader, i in self._exits():
            kinds, shapes = reader.kinds(), reader.shapes
            kind = kinds[i] if i < len(kinds) else "unknown"
            found.append((kind, None if shapes is None else shapes[i]))
        return found

    def _fitting(self) -> Any:
        """The loss between the outputs as far as they are known, refused if it does not fit."""
        hard, loss = self._given.it
        ends = self._ends()
        if loss is None:
            told = [meaning.of_output(hard, (kind,)) for kind, _ in ends]
            for name, one, (kind, shape) in zip(self._names, told, ends):
                # What has no shape yet is asked about with the first batch.
                if one == meaning.VALUES or (one is None and shape is not None):
                    regression = one == meaning.VALUES
                    compatibility.name_the_loss(name, None, _units(shape), kind, hard, regression)
            kind = meaning.INDEPENDENT if meaning.INDEPENDENT in told else meaning.CLASSES
            loss = output_pairing.soft_targets(kind, hard, temperature=1.0)
        # It only carries the loss to the checks.
        transfer = Transfer(loss)
        for name, (kind, shape), (reader, i) in zip(self._names, ends, self._exits()):
            if transfer.reads_logits and shape is not None:
                reader.require_logits(i)
                compatibility.logit_loss_fits(transfer, kind, shape, f"output `{name}`")
                compatibility.classes_are_last(transfer, hard, shape)
            if kind == "logits" and reader.from_logits is not False:
                compatibility.loss_of_probabilities(transfer, "output", name)
        counts = {units for units in (_units(shape) for _, shape in ends) if units is not None}
        if len(counts) > 1:
            raise ValueError(
                "What learns together answers for the same classes. Received: outputs of "
                f"{' and '.join(str(count) for count in sorted(counts))} units."
            )
        return loss

    def _inspect(self, x: Data, batch_size: int | None = None) -> Any:
        """Find out from the first rows what layers alone do not tell; returns the data."""
        readers = self._readers.it
        if not self.compiled or all(reader.settled for reader in readers):
            return x
        seen = all(shape is not None for _, shape in self._ends())
        rows, _, x = checks.first_rows(x, True, batch_size)
        if rows is not None:
            for reader in readers:
                reader.inspect(rows)
            self._between = _Held(self._fitting())
        if rows is not None and not seen:
            self._scores = _Held([self._fresh_metrics() for _ in self._names])
        return x

    def _looked_at(
        self, x: Data, y: Tensors | None, size: int | None = None, name: str = "`y`"
    ) -> Any:
        """Data of which the labels are known to be what the losses read, or will be told."""
        x = self._inspect(x, size)
        if not self.compiled:
            return x
        hard, between = self._given.it
        shape = next((shape for _, shape in self._ends() if shape is not None), None)
        reader = between.name if getattr(between, "reads_labels", False) else None
        expected = [label_checks.Expected(hard, shape, reader, self._names[0])]
        if y is not None:
            label_checks.require(expected, y, None, name)
        return x if are_arrays(x) else label_checks.watched(expected, x, None)

    def fit(
        self, x: Data | None = None, y: Tensors | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, as `keras.Model.fit` does."""
        size = args[0] if args else kwargs.get("batch_size")
        x = self._looked_at(x, y, size)
        given = kwargs.get("validation_data")
        if isinstance(given, list | tuple):
            held, held_y, _ = keras.utils.unpack_x_y_sample_weight(tuple(given))
            self._looked_at(held, held_y, size, "`y` of `validation_data`")
        elif given is not None:
            kwargs["validation_data"] = self._looked_at(given, None)
        with label_checks.explaining():
            return super().fit(x, y, *args, **kwargs)

    def evaluate(
        self, x: Data | None = None, y: Tensors | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluate every output, as `keras.Model.evaluate` does."""
        if not kwargs.get("_use_cached_eval_dataset"):
            # Keras asks so in every epoch of `fit`, which has looked at these data.
            x = self._looked_at(x, y)
        with label_checks.explaining():
            return super().evaluate(x, y, *args, **kwargs)

    def train_on_batch(self, x: Data, y: Tensors | None = None, *args: Any, **kwargs: Any) -> Any:
        """Take one optimizer step, as `keras.Model.train_on_batch` does."""
        return super().train_on_batch(self._looked_at(x, y), y, *args, **kwargs)

    def test_on_batch(self, x: Data, y: Tensors | None = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, as `keras.Model.test_on_batch` does."""
        return super().test_on_batch(self._looked_at(x, y), y, *args, **kwargs)

    def _unit(self) -> str:
        """What the outputs are compared as."""
        independent = self._between is not None and isinstance(self._between.it, BinarySoftTargets)
        return meaning.INDEPENDENT if independent else meaning.CLASSES

    def _fresh_metrics(self) -> list[Any]:
        fresh = []
        one_unit = any(_units(shape) == 1 for _, shape in self._ends())
        for metric in self._asked.it or []:
            if isinstance(metric, str) and metric in ("accuracy", "acc"):
                sparse = "sparse" in getattr(self._hard.it, "name", str(self._hard.it))
                kind = "SparseCategoricalAccuracy" if sparse else "CategoricalAccuracy"
                # Of one unit the greatest is always the first.
                kind = "BinaryAccuracy" if one_unit else kind
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
        return [*found, *self._means.it.listed(), *scores]

    def _pairs(self) -> list[tuple[int, int]]:
        """Who teaches whom, as indices of the logits."""
        raise NotImplementedError

    def compute_loss(
        self,
        x: Data | None = None,
        y: Tensors | None = None,
        y_pred: Any = None,
        sample_weight: Tensors | None = None,
        training: bool = True,
    ) -> Tensor:
        """Sum the hard losses and, for each learner, the mean over its teachers."""
        extra = [self._aggregate_additional_loss(loss) for loss in self.losses]
        alone = batch.Batch(x, Answer(None, [], {}), None, None)
        seen = objective.Seen(alone, y, sample_weight, y_pred, training)
        return self._objective().total(seen, extra, self._means.it)

    def _objective(self) -> objective.Objective:
        """The hard loss of each output, and what they learn from each other."""
        one = functools.partial(ops.ones, ())
        hard: list[objective.Term] = [
            objective.HardTerm(f"{name}_loss", self._hard.it, one, exit=i)
            for i, name in enumerate(self._names)
        ]
        weight = functools.partial(ops.convert_to_tensor, self.weight)
        between = objective.PeerTerm(self._between.it, self._pairs(), weight)
        return objective.Objective([*hard, between])

    def compute_metrics(
        self, x: Data, y: Tensors | None, y_pred: Answer, sample_weight: Tensors | None = None
    ) -> Any:
        """Update the metrics of every output and return all results by name."""
        logs = {}
        for name, output, metrics in zip(self._names, y_pred.output, self._scores.it):
            for metric in metrics:
                metric.update_state(y, output)
                logs[f"{name}_{metric.name}"] = metric.result()
        for metric in [self.metrics[0], *self._means.it.listed()]:
            logs[metric.name] = metric.result()
        return logs

    def predict_step(self, *args: object) -> Any:
        """Return the outputs, one array for each name."""
        result = super().predict_step(*args)
        if isinstance(result, tuple) and not isinstance(result, Answer):
            answer, state = result
            return list(answer.output), state
        return list(result.output)


def _units(shape: Shape) -> int | None:
    """How many units an output has, where that is known."""
    return None if shape is None else shape[-1]


class _Held:
    """Holds something out of Keras's tracking."""

    def __init__(self, it: Any) -> None:
        self.it = it


def _require_one_output(student: Reader) -> None:
    """Raise `ValueError` for a student of which one output alone would be read."""
    names = keras.tree.flatten(student.template) if student.template is not None else [None]
    if len(names) != 1:
        raise ValueError(
            f"Mutual learning compares one output of each student, and `{student.model.name}` has "
            f"{len(names)}: {names}. Give it one, as "
            "`keras.Model(student.inputs, student.get_layer(name).output)`."
        )


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
        ValueError: If there are fewer than two students, two share a name, or
            one has several outputs.
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
            checks.require_model(student, "student")
        if len(students) < 2:
            raise ValueError(
                f"Mutual learning needs at least two students. Received: {len(students)}."
            )
        names = [student.name for student in students]
        checks.unique(names, "student")
        readers = [Reader(student, "student", from_logits) for student in students]
        for reader in readers:
            _require_one_output(reader)
        super().__init__(names, readers, name, students[0].dtype_policy)
        self.students = list(students)
        self.from_logits = from_logits

    def _exits(self) -> list[_Exit]:
        return [_Exit(reader, 0) for reader in self._readers.it]

    def _inspect(self, x: Data, batch_size: int | None = None) -> Any:
        x = super()._inspect(x, batch_size)
        for reader in self._readers.it:
            _require_one_output(reader)
        return x

    def _pairs(self) -> list[tuple[int, int]]:
        count = len(self._names)
        return [(j, i) for i in range(count) for j in range(count) if i != j]

    def call(self, inputs: Tensors, training: bool | None = None) -> Any:
        """Run every student on the same inputs."""
        units = [self._unit()]
        answers = [reader.read(inputs, bool(training), units) for reader in self._readers.it]
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
        self, model: keras.Model, from_logits: bool | None = None, name: str = "self_distillation"
    ) -> None:
        checks.require_model(model, "model")
        template = output_kinds.output_template(model)
        exits = list(template) if isinstance(template, dict) else keras.tree.flatten(template)
        if len(exits) < 2:
            raise ValueError(
                f"Self-distillation needs a model with at least two exits. `{model.name}` has "
                f"{len(exits)} outputs."
            )
        reader = Reader(model, "model", from_logits)
        super().__init__([str(e) for e in exits], [reader], name, model.dtype_policy)
        self.model = model
        self.from_logits = from_logits
        # Keras flattens a dict in the order of its sorted keys.
        flat = keras.tree.flatten(template)
        self._order = _Held([flat.index(name) for name in exits])

    def _exits(self) -> list[_Exit]:
        return [_Exit(self._readers.it[0], i) for i in self._order.it]

    def _pairs(self) -> list[tuple[int, int]]:
        last = len(self._names) - 1
        return [(last, i) for i in range(last)]

    def call(self, inputs: Tensors, training: bool | None = None) -> Any:
        """Run the model once."""
        units = [self._unit()] * len(self._names)
        answer = self._readers.it[0].read(inputs, bool(training), units)
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

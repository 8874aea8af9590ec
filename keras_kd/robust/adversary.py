"""What `Distiller.compile(adversary=...)` takes: a hook, and its look at the data.

An adversary is a batch transform (`PGDTraining`) or a penalty (`Term`) that attacks the batch and
adds what the student says of the result. So it is trained, logged, saved and restored as hooks are.
What a method says of the inputs as they are is left to the hard loss and the distillation loss,
whose weights it sets. A new method is a `Term` with `start`, `objective` and `value`.

The attack runs in inference mode and beside the gradient: it moves no BatchNorm statistics, and no
gradient goes through its steps. May import: the hooks, `attacks`, `classifier`, `formulas`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_kd import backends
from keras_kd.distill import hooks
from keras_kd.distill.penalties import Penalty
from keras_kd.robust import classifier, formulas
from keras_kd.robust.attacks import ascend
from keras_kd.robust.classifier import Logits
from keras_kd.robust.threats import TINY_START, Threat, require_threat
from keras_kd.teachers.base import Teacher
from keras_kd.utils.types import Data, Tensor, Tensors

if TYPE_CHECKING:
    pass

Objective = Callable[[Tensor], Tensor]
"""From attacked inputs `(batch, ...)` to what an attack makes great, `(batch,)`."""
PRECHECK_ROWS = 128
"""Rows on which a teacher is attacked before training."""
ROBUST = 1 / 3
"""Share of its decisions that a robust teacher keeps: those of RobustBench keep half and more."""


class Adversary(hooks.Adversary, hooks.LooksFirst):
    """The base of what `compile(adversary=...)` takes.

    Args:
        threat: `Linf` or `L2`: how far and by which steps inputs are attacked in training.
    """

    needs_teacher = False
    asks_teacher = False
    """Whether the teacher is asked about attacked inputs."""

    def __init__(self, threat: Threat) -> None:
        self.threat = require_threat(threat)
        # The distiller finds it here, so that the draws go on from step to step and on disk.
        self.generator = keras.random.SeedGenerator()

    def require(self, distiller: hooks.Trained) -> None:
        """Raise `ValueError` if this distiller cannot be trained so.

        Args:
            distiller: With its student and teacher.
        """
        name, teacher = type(self).__name__, distiller.pairing.teacher
        if distiller.student_inputs is not None:
            raise ValueError(
                f"`{name}` attacks what the data deliver, within the bounds of its threat, and "
                "`student_inputs` changes that on the way. Make the change a part of the student: "
                "layers at its beginning."
            )
        if teacher is None and distiller.pairing.restored is None and self.needs_teacher:
            raise ValueError(
                f"`{name}` distils from a teacher, and the distiller has none. Pass one, "
                "`Distiller(student, teacher)`, or train with `PGDTraining` or `TRADES`."
            )
        if teacher is not None and self.asks_teacher:
            if not teacher.compiled:
                raise ValueError(
                    f"`{name}` follows the gradient through the teacher, and `{teacher.name}` is "
                    "a function that none goes through. Use `RSLAD` or `ARD`, which need its "
                    "answers alone."
                )
            if teacher.needs_join or not teacher.models:
                raise ValueError(
                    f"`{name}` asks the teacher about attacked inputs, and `{teacher.name}` holds "
                    "answers to the inputs as they were. Pass the model itself, or use `RSLAD` or "
                    "`ARD`, which need the answers that there are."
                )
            if distiller.teacher_inputs is not None:
                raise ValueError(
                    f"`{name}` shows teacher and student the same attacked inputs, and "
                    "`teacher_inputs` changes them. Make the change a part of the teacher."
                )

    def look(self, distiller: hooks.Trained, x: Data, rows: Tensors) -> None:
        """Refuse data that leave the threat's bounds; warn of a teacher that is not robust.

        Args:
            distiller: With its student and teacher.
            x: What `fit` was given.
            rows: Its first rows.
        """
        self.require(distiller)
        inner = distiller.pairing.split(rows)[0] if rows is not None else None
        arrays = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
        if len(arrays) == 1 and hasattr(arrays[0], "__array__"):
            self.threat.require(arrays[0], "x")
        elif inner is not None:
            self.threat.require(classifier.only_tensor(inner, type(self).__name__), "x")
        teacher = distiller.pairing.teacher
        chosen = classifier.spread_rows(x, inner, PRECHECK_ROWS)
        mapped = distiller.teacher_inputs is not None
        if not self.needs_teacher or not teacher.models or chosen is None or mapped:
            return
        kept = _kept(classifier.of_teacher(distiller), teacher.models, chosen, self.threat, 0)
        if kept < ROBUST:
            warnings.warn(
                f"The teacher `{teacher.name}` is not robust: under {self.threat} it keeps "
                f"{100 * kept:.0f} % of its decisions on {len(chosen)} rows. A student of it is "
                "as a rule less robust than one that is trained by `PGDTraining` alone. Train the "
                "teacher with `PGDTraining` or `TRADES` first.",
                UserWarning,
                stacklevel=2,
            )

    def draw(self, x: Tensor) -> Tensor:
        """A start spread evenly over the ball, within the bounds."""
        shape, dtype = ops.shape(x), keras.backend.standardize_dtype(x.dtype)
        normal = keras.random.normal(shape, dtype=dtype, seed=self.generator)
        uniform = keras.random.uniform(shape, dtype=dtype, seed=self.generator)
        return self.threat.within(x + self.threat.from_noise(normal, uniform), x)

    def draw_near(self, x: Tensor) -> Tensor:
        """A start near to the input, at which a divergence from itself has no gradient."""
        dtype = keras.backend.standardize_dtype(x.dtype)
        normal = keras.random.normal(ops.shape(x), dtype=dtype, seed=self.generator)
        return self.threat.within(x + TINY_START * normal, x)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the adversary."""
        return {"threat": keras.saving.serialize_keras_object(self.threat)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Rebuild an adversary."""
        threat = keras.saving.deserialize_keras_object(config["threat"])
        return cls(**{**config, "threat": threat})


class Term(Adversary, Penalty):
    """An adversary that is a penalty.

    Args:
        threat: `Linf` or `L2`.
        weight: Of the penalty.
        name: In the logs.
    """

    def __init__(self, threat: Threat, weight: float, name: str | None) -> None:
        Adversary.__init__(self, threat)
        Penalty.__init__(self, weight, name)

    def weights(self) -> dict[str, Any]:
        """Arguments of `compile` for the inputs as they are; nothing leaves them to the user."""
        return {}

    def arguments(self, distiller: hooks.Trained, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `compile`, with this among the penalties."""
        self.require(distiller)
        penalties = given["penalties"]
        if penalties is not None and not isinstance(penalties, list | tuple):
            return given
        found = {**given, "penalties": [*(penalties or ()), self]}
        own = self.weights()
        if own and given["alpha"] is not None:
            raise ValueError(
                f"`alpha` weighs the hard loss against the distillation loss, and "
                f"`{type(self).__name__}` sets both weights. Received: alpha={given['alpha']!r}. "
                "Leave it out, or pass `student_loss_weight` and `distillation_loss_weight`."
            )
        return {**found, **{name: value for name, value in own.items() if given[name] is None}}

    def start(self, x: Tensor) -> Tensor:
        """Where the attack begins."""
        raise NotImplementedError

    def objective(
        self, distiller: hooks.Trained, batch: hooks.Answered, x: Tensor, logits: Logits
    ) -> Objective:
        """What the attack makes as great as possible.

        Args:
            distiller: With its student and teacher.
            batch: What the student read, and what the models said of it.
            x: Its one tensor.
            logits: `fn(x)`: the student's logits in inference mode.

        Returns:
            `fn(attacked)`: `(batch,)`.
        """
        raise NotImplementedError

    def value(
        self, distiller: hooks.Trained, batch: hooks.Answered, attacked: Tensor, logits: Tensor
    ) -> Tensor:
        """The penalty of each row.

        Args:
            distiller: With its student and teacher.
            batch: What the student read, and what the models said of it.
            attacked: The attacked inputs.
            logits: The student's logits of them, with `training=True`.

        Returns:
            `(batch,)`.
        """
        raise NotImplementedError

    def __call__(self, distiller: hooks.Trained, batch: Any) -> Tensor:
        """Attack one batch, and compute what the student's answer to it costs."""
        x = classifier.only_tensor(batch.x, type(self).__name__)
        teacher: Teacher | None = distiller.pairing.teacher

        def variables() -> list[Any]:
            models = teacher.models if teacher is not None else []
            return [v for model in (distiller.student, *models) for v in model.variables]

        start = self.start(x)
        with backends.beside_the_gradient(variables):
            goal = self.objective(distiller, batch, x, classifier.of_student(distiller))
            attacked = ascend(goal, x, start, self.threat)
        return self.value(distiller, batch, attacked, classifier.in_training(distiller, attacked))

    def ours(self, batch: hooks.Answered) -> Tensor:
        """What the student said of the inputs as they are, in training."""
        return classifier.one_output(batch.student.logits, type(self).__name__)

    def theirs(self, batch: hooks.Answered) -> Tensor:
        """What the teacher said of the inputs as they are."""
        if batch.teacher is None:
            raise ValueError(f"`{type(self).__name__}` distils, and the distiller has no teacher.")
        return classifier.one_output(batch.teacher.logits, type(self).__name__)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the adversary."""
        return {**Adversary.get_config(self), "name": self.name}


class OnLabels(Term):
    """A term whose attack is PGD on the labels."""

    def start(self, x: Tensor) -> Tensor:
        """Anywhere in the ball."""
        return self.draw(x)

    def objective(
        self, distiller: hooks.Trained, batch: hooks.Answered, x: Tensor, logits: Logits
    ) -> Objective:
        """The crossentropy of the labels."""
        labels = labels_in(batch.y, self.ours(batch), type(self).__name__)
        return lambda at: formulas.crossentropy(logits(at), labels)


def kept_decisions(model: keras.Model, x: Tensor, threat: Threat, seed: int = 0) -> float:
    """Measure how robust a model's decisions are, without labels.

    This is what `fit` looks at before it distils from a teacher by `ARD`, `RSLAD`, `IAD` or
    `AdaAD`: students of teachers that are not robust are as a rule less robust than without them.

    Args:
        model: A `keras.Model`, as `attack` takes it.
        x: Inputs `(rows, ...)`.
        threat: `Linf` or `L2`.
        seed: Of the random start.

    Returns:
        The share of decisions in `[0, 1]` that PGD does not change.

    Raises:
        TypeError: If the threat is none, or inputs are not in floating point.
        ValueError: If inputs leave the bounds, or the model is no classifier.

    Examples:
        >>> kept_decisions(teacher, x[:128], Linf(8 / 255))
    """
    require_threat(threat).require(x)
    rows = np.asarray(x, "float32")
    found = classifier.Classifier(model, rows[:32])
    return _kept(found.logits, [model], rows, threat, seed)


def _kept(
    logits: Logits, models: Sequence[keras.Model], x: np.ndarray, threat: Threat, seed: int
) -> float:
    def run(x: Tensor, start: Tensor) -> Tensor:
        own = ops.argmax(logits(x), axis=-1)
        attacked = ascend(
            lambda at: formulas.crossentropy(logits(at), own),
            x,
            threat.within(x + start, x),
            threat,
        )
        return ops.argmax(logits(attacked), axis=-1) == own

    program = backends.program(run, models)
    x = x.astype("float32")
    return float(classifier.in_batches(program, 256, x, threat.noise(x.shape, (seed,))).mean())


def labels_in(y: np.ndarray | None, logits: Tensor, whose: str) -> Tensor:
    """The labels of a batch as class numbers `(batch,)`, or `ValueError` where there are none.

    Args:
        y: Labels of the batch.
        logits: `(batch, classes)`, which tell how many classes there are.
        whose: Who reads them.
    """
    flat = [leaf for leaf in keras.tree.flatten(y) if leaf is not None]
    if len(flat) != 1:
        raise ValueError(
            f"`{whose}` attacks the labels, one a row. Received: {len(flat)} tensors of labels. "
            "Pass `y` to `fit`."
        )
    return formulas.class_numbers(flat[0], logits.shape[-1])

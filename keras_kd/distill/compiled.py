"""What `compile` was given: the weights of the objective, and what is saved with them."""

from typing import Any, NamedTuple

import keras

from keras_kd.utils import checks

DEFAULT_ALPHA = 0.5
# Higher ones cost very small students accuracy: see `benchmarks/defaults.py`.
DEFAULT_TEMPERATURE = 1.0


def live(value: float, name: str) -> Any:
    """A scalar that callbacks may assign at any time, without retracing."""
    return keras.Variable(value, trainable=False, dtype="float32", autocast=False, name=name)


def fresh_optimizer(optimizer: keras.optimizers.Optimizer) -> Any:
    """An optimizer without state: one that has stepped belongs to other variables."""
    made = keras.optimizers.get(optimizer)
    return type(made).from_config(made.get_config())


class Weights(NamedTuple):
    """The weights of the objective as `compile` was given them, `None` for the defaults.

    Attributes:
        alpha: Weight of the hard loss; that of the distillation loss is `1 - alpha`.
        temperature: Of every loss that has none of its own.
        hard: `student_loss_weight`, with `distillation` in place of `alpha`.
        distillation: `distillation_loss_weight`.
    """

    alpha: float | None = None
    temperature: float | None = None
    hard: float | None = None
    distillation: float | None = None

    @property
    def explicit(self) -> bool:
        """Whether explicit weights take the place of `alpha`."""
        return self.hard is not None or self.distillation is not None

    def check(self, labeled: bool) -> None:
        """Raise `ValueError` for weights out of range, or that contradict each other."""
        checks.weights(self.alpha, self.hard, self.distillation, labeled)
        if self.temperature is not None:
            checks.temperature(self.temperature)

    def assign(self, distiller: keras.Model, labeled: bool) -> None:
        """Set the live values of a distiller."""
        alpha, hard = self.alpha, self.hard
        if not distiller.distills:
            alpha, hard = 1.0, None
        elif not labeled:
            alpha = 0.0
        temperature = self.temperature
        distiller.temperature.assign(DEFAULT_TEMPERATURE if temperature is None else temperature)
        distiller.alpha.assign(DEFAULT_ALPHA if alpha is None else alpha)
        distiller.student_loss_weight.assign(1.0 if hard is None else hard)
        more = self.distillation
        distiller.distillation_loss_weight.assign(1.0 if more is None else more)


class Compiled(NamedTuple):
    """How a distiller was compiled.

    Attributes:
        arguments: What `compile` was given and the distiller is saved with, by name.
        explicit: Whether explicit weights take the place of `alpha`.
    """

    arguments: dict[str, Any]
    explicit: bool = False

    @property
    def loss(self) -> Any:
        """The hard loss, or `None`."""
        return self.arguments.get("loss")

    @property
    def labeled(self) -> bool:
        """Whether labels are read."""
        return self.loss is not None

    @property
    def distillation_loss(self) -> Any:
        """What was given as such, `None` for the default."""
        return self.arguments.get("distillation_loss")

    @property
    def asks_in_evaluation(self) -> bool:
        """Whether `evaluate` runs the teacher."""
        return bool(self.arguments.get("evaluate_distillation"))

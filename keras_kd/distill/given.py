"""The arguments of `compile` on their way in: hooks are checked, an adversary becomes one."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from keras_kd.distill import batch_transform, hooks
from keras_kd.distill import penalties as penalty_terms
from keras_kd.distill.compiled import Compiled, Weights
from keras_kd.losses.logits import LogitMSE
from keras_kd.models import meaning
from keras_kd.utils.types import Losses

AUTO = "auto"
"""What `distillation_loss` is given as where the method is to be chosen."""


def stand_in(loss: Losses) -> Any:
    """What is compiled until the choice: `compile`'s default, which a regression has not."""
    return LogitMSE() if meaning.of_loss(loss) == meaning.VALUES else None


class Given(NamedTuple):
    """The arguments of `compile` that are not Keras's alone, as they were given."""

    loss: Any
    metrics: Any
    distillation_loss: Any
    weights: Weights
    evaluate_distillation: bool
    penalties: Sequence[Any] | None
    batch_transform: Any

    def against(self, adversary: Any, distiller: hooks.Trained) -> Self:
        """The same with an adversary among the hooks, and with the weights of its method.

        Args:
            adversary: What was given as such; `None` changes nothing.
            distiller: The distiller that is compiled.

        Raises:
            TypeError: If it is no adversary.
            ValueError: If something that was given contradicts it.
        """
        if adversary is None:
            return self
        found = hooks.require_adversary(adversary).arguments(
            distiller,
            {
                "distillation_loss": self.distillation_loss,
                "alpha": self.weights.alpha,
                "student_loss_weight": self.weights.hard,
                "distillation_loss_weight": self.weights.distillation,
                "penalties": self.penalties,
                "batch_transform": self.batch_transform,
            },
        )
        weights = self.weights._replace(
            alpha=found.pop("alpha"),
            hard=found.pop("student_loss_weight"),
            distillation=found.pop("distillation_loss_weight"),
        )
        return self._replace(weights=weights, **found)

    def for_now(self) -> tuple[bool, Self]:
        """Whether `fit` is to choose the method, and what is compiled until then.

        Raises:
            ValueError: If something that the choice leaves no room for is given too.
        """
        if not isinstance(self.distillation_loss, str) or self.distillation_loss != AUTO:
            return False, self
        others = {
            "alpha": self.weights.alpha,
            "temperature": self.weights.temperature,
            "student_loss_weight": self.weights.hard,
            "distillation_loss_weight": self.weights.distillation,
            "penalties": self.penalties,
            "batch_transform": self.batch_transform,
        }
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f'`distillation_loss="{AUTO}"` chooses the weights and temperatures too, and '
                    f"tries the methods alone. Received: {name}={value!r}. Leave `{name}` out, or "
                    "name the distillation loss."
                )
        return True, self._replace(distillation_loss=stand_in(self.loss))

    def compiled(self, more: dict[str, Any]) -> Compiled:
        """What the distiller is compiled with and saved with.

        Args:
            more: The arguments that are Keras's alone.

        Raises:
            ValueError: If hooks do not fit.
            TypeError: If a hook cannot be called as one.
        """
        arguments = {
            "loss": self.loss,
            "metrics": self.metrics,
            "distillation_loss": self.distillation_loss,
            "evaluate_distillation": self.evaluate_distillation,
            "penalties": penalty_terms.require(self.penalties, self.metrics),
            "batch_transform": batch_transform.require(self.batch_transform),
        }
        return Compiled(arguments | more, self.weights.explicit)

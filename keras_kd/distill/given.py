"""The arguments of `compile` on their way in: hooks are checked, an adversary becomes one."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from keras_kd.distill import batch_transform as transform
from keras_kd.distill import hooks
from keras_kd.distill import penalties as penalty_terms
from keras_kd.distill.compiled import Compiled, Weights


class Given(NamedTuple):
    """The arguments of `compile` that are not Keras's alone, as they were given."""

    loss: Any
    metrics: Any
    distillation_loss: Any
    weights: Weights
    evaluate_distillation: bool
    penalties: Sequence[Any] | None
    batch_transform: Any

    def against(self, adversary: Any, distiller: Any) -> Self:
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
            "batch_transform": transform.require(self.batch_transform),
        }
        return Compiled(arguments | more, self.weights.explicit)

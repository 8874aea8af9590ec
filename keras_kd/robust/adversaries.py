"""Adversarial training and robust distillation, the methods.

Divergences are summed over the classes, so that a weight means the same for any number of them. May
import: `adversary`, `formulas`, the losses.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_kd import backends
from keras_kd.distill import hooks
from keras_kd.losses import SoftTargets
from keras_kd.robust import classifier, formulas
from keras_kd.robust.adversary import Adversary, Objective, OnLabels, Term, labels_in
from keras_kd.robust.attacks import ascend
from keras_kd.robust.classifier import Logits
from keras_kd.robust.threats import Threat
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor


@keras.saving.register_keras_serializable(package="keras_kd")
class PGDTraining(Adversary):
    """Train on attacked inputs in place of the inputs: `min_S max_x' CE(S(x'), y)`.

    The attack is PGD on the labels, from a random point of the ball. Needs no teacher; with one,
    the teacher too reads the attacked inputs, so that a `CachedTeacher` is refused.

    Args:
        threat: `Linf` or `L2`.

    Raises:
        TypeError: If `threat` is none.

    Examples:
        >>> distiller = keras_kd.Distiller(student, None)
        >>> distiller.compile("sgd", loss, adversary=PGDTraining(Linf(8 / 255)))

    Reference:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083), equation 2.1
    """

    asks_teacher = True

    def arguments(self, distiller: hooks.Trained, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `compile`, with this as batch transform."""
        self.require(distiller)
        if given["batch_transform"] is not None:
            raise ValueError(
                "`PGDTraining` is a batch transform, and another was given beside it. Call it in "
                "yours: `adversary(batch, distiller)` returns the attacked batch."
            )
        return {**given, "batch_transform": self}

    def __call__(self, batch: hooks.Batch, distiller: hooks.Trained) -> hooks.Batch:
        """Attack one batch."""
        x = classifier.only_tensor(batch.x, "PGDTraining")
        logits = classifier.of_student(distiller)
        labels = labels_in(batch.y, logits(x), "PGDTraining")
        attacked = ascend(
            lambda at: formulas.crossentropy(logits(at), labels), x, self.draw(x), self.threat
        )
        return batch._replace(x=keras.tree.pack_sequence_as(batch.x, [attacked]))


@keras.saving.register_keras_serializable(package="keras_kd")
class TRADES(Term):
    """Be right on the inputs and say the same of attacked ones: `CE + beta * KL(S(x) || S(x'))`.

    The attack makes the same divergence as great as possible, from a start very near to the input.
    Needs no teacher; with one, its distillation loss of the inputs as they are is there as well.

    Args:
        threat: `Linf` or `L2`.
        beta: Non-negative float, dimensionless: the weight of the divergence, which is summed over
            the classes. Live as `adversary.weight`.
        name: Name in the logs.

    Raises:
        TypeError: If `threat` is none, or `beta` is no number.
        ValueError: If `beta` is negative or not finite.

    Examples:
        >>> distiller = keras_kd.Distiller(student, None)
        >>> distiller.compile("sgd", loss, adversary=TRADES(Linf(8 / 255), beta=6.0))

    Reference:
        - [Zhang et al., 2019](https://arxiv.org/abs/1901.08573), equation 5
    """

    def __init__(self, threat: Threat, beta: float = 6.0, name: str | None = "trades") -> None:
        super().__init__(threat, beta, name)

    def start(self, x: Tensor) -> Tensor:
        """Near to the input, at which the divergence has no gradient."""
        return self.draw_near(x)

    def objective(
        self, distiller: hooks.Trained, batch: hooks.Answered, x: Tensor, logits: Logits
    ) -> Objective:
        """`KL(S(x) || S(x'))`."""
        still = ops.stop_gradient(logits(x))
        return lambda at: formulas.divergence(still, logits(at))

    def value(
        self, distiller: hooks.Trained, batch: hooks.Answered, attacked: Tensor, logits: Tensor
    ) -> Tensor:
        """`KL(S(x) || S(x'))`, with a gradient through both."""
        return formulas.divergence(self.ours(batch), logits)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the adversary."""
        return {**super().get_config(), "beta": _float(self.weight)}


class DistilledOnLabels(OnLabels):
    """The base of those that attack by the labels and distil attacked inputs alone.

    Args:
        threat: `Linf` or `L2`.
        alpha: Weight of what is distilled in `[0, 1]`; the hard loss has the rest.
        temperature: Positive float, of the divergence from the teacher.
        name: Name in the logs.
    """

    needs_teacher = True

    def __init__(self, threat: Threat, alpha: float, temperature: float, name: str | None) -> None:
        self.alpha = _share("alpha", alpha)
        self.temperature = _temperature(temperature)
        super().__init__(threat, self.alpha, name)

    def weights(self) -> dict[str, Any]:
        """The hard loss of the inputs as they are, and no distillation of them."""
        return {
            "student_loss_weight": 1.0 - self.alpha,
            "distillation_loss_weight": 0.0,
            "distillation_loss": SoftTargets(self.temperature),
        }


@keras.saving.register_keras_serializable(package="keras_kd")
class ARD(DistilledOnLabels):
    """Say of attacked inputs what the teacher says of the inputs.

    `alpha * T**2 * KL(T(x) || S(x')) + (1 - alpha) * CE(S(x), y)`, the divergence summed over the
    classes. The attack is PGD on the labels. Works with a `CachedTeacher`.

    Args:
        threat: `Linf` or `L2`.
        alpha: Weight of the divergence in `[0, 1]`.
        temperature: Positive float, of the divergence.
        name: Name in the logs.

    Raises:
        TypeError: If `threat` is none, or a value is no number.
        ValueError: If a value is out of range.

    Examples:
        >>> distiller = keras_kd.Distiller(student, robust_teacher)
        >>> distiller.compile("sgd", loss, adversary=ARD(Linf(8 / 255)))

    Reference:
        - [Goldblum et al., 2020](https://arxiv.org/abs/1905.09747), equation 3
    """

    def __init__(
        self,
        threat: Threat,
        alpha: float = 1.0,
        temperature: float = 30.0,
        name: str | None = "ard",
    ) -> None:
        super().__init__(threat, alpha, temperature, name)

    def value(
        self, distiller: hooks.Trained, batch: hooks.Answered, attacked: Tensor, logits: Tensor
    ) -> Tensor:
        """`T**2 * KL(T(x) || S(x'))`."""
        return formulas.divergence(self.theirs(batch), logits, self.temperature)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the adversary."""
        return {**super().get_config(), "alpha": self.alpha, "temperature": self.temperature}


@keras.saving.register_keras_serializable(package="keras_kd")
class RSLAD(Term):
    """Robust soft labels, in the attack too: no label is read.

    `w * KL(T(x) || S(x')) + (1 - w) * KL(T(x) || S(x))`, both summed over the classes, with `x'`
    where `KL(T(x) || S(x'))` is greatest. Works with a `CachedTeacher`, and with `loss=None`.

    Args:
        threat: `Linf` or `L2`.
        adversarial: The weight `w` in `[0, 1]`.
        temperature: Positive float, of both divergences.
        name: Name in the logs.

    Raises:
        TypeError: If `threat` is none, or a value is no number.
        ValueError: If a value is out of range.

    Examples:
        >>> distiller = keras_kd.Distiller(student, robust_teacher)
        >>> distiller.compile("sgd", loss, adversary=RSLAD(Linf(8 / 255)))

    Reference:
        - [Zi et al., 2021](https://arxiv.org/abs/2108.07969), equations 6 and 7
    """

    needs_teacher = True

    def __init__(
        self,
        threat: Threat,
        adversarial: float = 5 / 6,
        temperature: float = 1.0,
        name: str | None = "rslad",
    ) -> None:
        self.adversarial = _share("adversarial", adversarial)
        self.temperature = _temperature(temperature)
        super().__init__(threat, self.adversarial, name)

    def weights(self) -> dict[str, Any]:
        """The distillation of the inputs as they are, and no labels."""
        return {
            "student_loss_weight": 0.0,
            "distillation_loss_weight": 1.0 - self.adversarial,
            "distillation_loss": SoftTargets(self.temperature),
        }

    def start(self, x: Tensor) -> Tensor:
        """Near to the input."""
        return self.draw_near(x)

    def objective(
        self, distiller: hooks.Trained, batch: hooks.Answered, x: Tensor, logits: Logits
    ) -> Objective:
        """`KL(T(x) || S(x'))`."""
        theirs = self.theirs(batch)
        return lambda at: formulas.divergence(theirs, logits(at), self.temperature)

    def value(
        self, distiller: hooks.Trained, batch: hooks.Answered, attacked: Tensor, logits: Tensor
    ) -> Tensor:
        """`T**2 * KL(T(x) || S(x'))`."""
        return formulas.divergence(self.theirs(batch), logits, self.temperature)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the adversary."""
        own = {"adversarial": self.adversarial, "temperature": self.temperature}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="keras_kd")
class IAD(DistilledOnLabels):
    """Trust the teacher as far as it stands up to the student's attack, and oneself for the rest.

    `alpha * (T**2 * KL(T(x) || S(x')) + (1 - p_T(y|x') ** beta) * KL(S(x) || S(x')))
    + (1 - alpha) * CE(S(x), y)`, IAD-I of the paper, divergences summed over the classes. The
    attack is PGD on the labels. The teacher is asked about attacked inputs, so that a
    `CachedTeacher` is refused.

    Args:
        threat: `Linf` or `L2`.
        alpha: Weight of both divergences in `[0, 1]`.
        beta: Non-negative exponent of the teacher's probability of the label.
        temperature: Positive float, of the divergence from the teacher.
        introspection: Weight of the second divergence. Live: the paper leaves it at 0 for the first
            60 of 200 epochs, in a callback `adversary.introspection.assign(float(epoch >= 60))`.
        name: Name in the logs.

    Raises:
        TypeError: If `threat` is none, or a value is no number.
        ValueError: If a value is out of range.

    Examples:
        >>> distiller = keras_kd.Distiller(student, robust_teacher)
        >>> distiller.compile("sgd", loss, adversary=IAD(Linf(8 / 255), beta=0.1))

    Reference:
        - [Zhu et al., 2022](https://arxiv.org/abs/2106.04928), equation 4
    """

    asks_teacher = True

    def __init__(
        self,
        threat: Threat,
        alpha: float = 1.0,
        beta: float = 0.1,
        temperature: float = 1.0,
        introspection: float = 1.0,
        name: str | None = "iad",
    ) -> None:
        super().__init__(threat, alpha, temperature, name)
        self.beta = checks.number("beta", beta)
        share = checks.number("introspection", introspection)
        if self.beta < 0 or share < 0:
            raise ValueError(
                f"`beta` and `introspection` are not negative. Received: beta={beta!r}, "
                f"introspection={introspection!r}."
            )
        self.introspection = keras.Variable(
            share, trainable=False, dtype="float32", autocast=False, name="introspection"
        )

    def value(
        self, distiller: hooks.Trained, batch: hooks.Answered, attacked: Tensor, logits: Tensor
    ) -> Tensor:
        """The divergence from the teacher, and from oneself where it is not to be trusted."""
        with backends.inference_only():
            said = ops.stop_gradient(classifier.of_teacher(distiller)(attacked))
        labels = labels_in(batch.y, logits, "IAD")
        trust = formulas.probability_of(said, labels) ** self.beta
        distrust = ops.convert_to_tensor(self.introspection) * (1.0 - trust)
        from_teacher = formulas.divergence(self.theirs(batch), logits, self.temperature)
        return from_teacher + distrust * formulas.divergence(self.ours(batch), logits)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the adversary."""
        own = {name: getattr(self, name) for name in ("alpha", "beta", "temperature")}
        return {**super().get_config(), **own, "introspection": _float(self.introspection)}


@keras.saving.register_keras_serializable(package="keras_kd")
class AdaAD(Term):
    """Search where student and teacher differ most, and agree there.

    `alpha * KL(T(x') || S(x')) + (1 - alpha) * KL(T(x) || S(x))`, summed over the classes, with
    `x'` where `KL(T(x') || S(x'))` is greatest: the attack goes through the teacher too, so that
    each of its steps costs a pass of the teacher and its gradient, and a `CachedTeacher` is
    refused. No label is read.

    Args:
        threat: `Linf` or `L2`.
        alpha: Weight of the first divergence in `[0, 1]`.
        name: Name in the logs.

    Raises:
        TypeError: If `threat` is none, or `alpha` is no number.
        ValueError: If `alpha` is out of range.

    Examples:
        >>> distiller = keras_kd.Distiller(student, robust_teacher)
        >>> distiller.compile("sgd", loss, adversary=AdaAD(Linf(8 / 255)))

    Reference:
        - [Huang et al., 2023](https://openaccess.thecvf.com/content/CVPR2023/html/Huang_Boosting_Accuracy_and_Robustness_of_Student_Models_via_Adaptive_Adversarial_CVPR_2023_paper.html),
          equations 6 and 8
    """

    needs_teacher = True
    asks_teacher = True

    def __init__(self, threat: Threat, alpha: float = 1.0, name: str | None = "adaad") -> None:
        self.alpha = _share("alpha", alpha)
        super().__init__(threat, self.alpha, name)

    def weights(self) -> dict[str, Any]:
        """The distillation of the inputs as they are, and no labels."""
        return {
            "student_loss_weight": 0.0,
            "distillation_loss_weight": 1.0 - self.alpha,
            "distillation_loss": SoftTargets(1.0),
        }

    def start(self, x: Tensor) -> Tensor:
        """Near to the input."""
        return self.draw_near(x)

    def objective(
        self, distiller: hooks.Trained, batch: hooks.Answered, x: Tensor, logits: Logits
    ) -> Objective:
        """`KL(T(x') || S(x'))`."""
        teacher = classifier.of_teacher(distiller)
        return lambda at: formulas.divergence(teacher(at), logits(at))

    def value(
        self, distiller: hooks.Trained, batch: hooks.Answered, attacked: Tensor, logits: Tensor
    ) -> Tensor:
        """`KL(T(x') || S(x'))`."""
        with backends.inference_only():
            said = ops.stop_gradient(classifier.of_teacher(distiller)(attacked))
        return formulas.divergence(said, logits)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the adversary."""
        return {**super().get_config(), "alpha": self.alpha}


def _float(variable: keras.Variable) -> float:
    return float(ops.convert_to_numpy(variable))


def _share(name: str, value: object) -> float:
    found = checks.number(name, value)
    if not 0 <= found <= 1:
        raise ValueError(f"`{name}` is a weight in [0, 1]. Received: {name}={value!r}.")
    return found


def _temperature(value: object) -> float:
    found = checks.number("temperature", value)
    if found <= 0:
        raise ValueError(f"`temperature` is greater than 0. Received: temperature={value!r}.")
    return found

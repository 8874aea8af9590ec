"""Temperatures that differ from sample to sample: soft where the student already agrees."""

import copy
import math
from typing import Any, Self

import keras
from keras import ops

from keras_kd.utils.types import Tensor


class AdaptiveTemperature:
    """A temperature of its own for every sample, from the logits of this batch.

    `T_i = max(base + beta * (mean(w) - w_i), minimum)` with a weight `w_i` that
    is large where the sample is hard: hard samples get sharp targets, easy ones
    soft ones. No gradient flows through it.

    A subclass implements `weights`.

    Args:
        base: Positive float, the mean temperature; `None` follows the distiller.
        beta: Non-negative float, dimensionless: how far the weights move the temperature.
        minimum: Positive float: lower temperatures are raised to it. The
            published rule has no bound and can turn negative.

    Raises:
        ValueError: If `base` or `minimum` is not positive, or `beta` negative.
    """

    def __init__(self, base: float | None = None, beta: float = 1.0, minimum: float = 0.5) -> None:
        if base is not None and not 0 < base < math.inf:
            raise ValueError(
                f"`base` must be positive and finite, or None to follow the distiller. "
                f"Received: base={base!r}."
            )
        if not 0 <= beta < math.inf:
            raise ValueError(
                f"`beta` must be finite and not negative. Received: beta={beta!r}. "
                "The paper uses 1."
            )
        if not 0 < minimum < math.inf:
            raise ValueError(
                f"`minimum` must be positive and finite. Received: minimum={minimum!r}."
            )
        self.base = base
        self.beta = beta
        self.minimum = minimum

    def weights(self, teacher: Tensor, student: Tensor) -> Tensor:
        """How hard each sample is: `(batch, ..., 1)` from logits `(batch, ..., classes)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `weights`.")

    def around(self, temperature: Tensor) -> Self:
        """Return a copy around the given temperature, unless it has a base of its own."""
        following = copy.copy(self)
        if following.base is None:
            following.base = temperature
        return following

    def __call__(self, teacher: Tensor, student: Tensor, mask: Tensor = None) -> Tensor:
        """Compute the temperatures.

        Args:
            teacher: Logits `(batch, ..., classes)`.
            student: Logits of the same shape.
            mask: Boolean `(batch, ...)`: positions left out of the mean of the weights.

        Returns:
            Tensor `(batch, ..., 1)`.
        """
        weights = ops.stop_gradient(self.weights(teacher, student))
        if mask is None:
            mean = ops.mean(weights)
        else:
            valid = ops.cast(ops.expand_dims(mask, -1), weights.dtype)
            mean = ops.sum(weights * valid) / ops.maximum(ops.sum(valid), 1.0)
        base = ops.cast(1.0 if self.base is None else self.base, weights.dtype)
        return ops.maximum(base + self.beta * (mean - weights), self.minimum)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this temperature."""
        return {"base": self.base, "beta": self.beta, "minimum": self.minimum}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Rebuild a temperature."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_kd")
class FLSW(AdaptiveTemperature):
    """Focal-loss-style weights: sharp targets where teacher and student logits disagree.

    `w = (1 - cos(teacher, student))**gamma` over the classes, then
    `T = max(base + beta * (mean(w) - w), minimum)`.

    Args:
        base: Positive float, the mean temperature; `None` follows the distiller.
        beta: Non-negative float, dimensionless: how far the weights move the temperature.
        gamma: Positive float, dimensionless: how strongly disagreement counts.
        minimum: Positive float: lower temperatures are raised to it.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> loss = SoftTargets(temperature=FLSW(base=4.0, beta=1.0, gamma=2.0))
        >>> float(loss([[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]))
        0.0

    Reference:
        - [Wen et al., 2019](https://arxiv.org/abs/1911.07471), section 3.3
    """

    def __init__(
        self,
        base: float | None = None,
        beta: float = 1.0,
        gamma: float = 2.0,
        minimum: float = 0.5,
    ) -> None:
        super().__init__(base=base, beta=beta, minimum=minimum)
        if not 0 < gamma < math.inf:
            raise ValueError(
                f"`gamma` must be positive and finite. Received: gamma={gamma!r}. The paper uses 2."
            )
        self.gamma = gamma

    def weights(self, teacher: Tensor, student: Tensor) -> Tensor:
        """`(1 - cos)**gamma`, between 0 and `2**gamma`."""
        cosine = ops.sum(ops.normalize(teacher) * ops.normalize(student), axis=-1, keepdims=True)
        # Rounding may carry the cosine past 1, and a negative base has no power.
        return ops.power(ops.maximum(1.0 - cosine, 0.0), self.gamma)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this temperature."""
        return {**super().get_config(), "gamma": self.gamma}


@keras.saving.register_keras_serializable(package="keras_kd")
class CWSM(AdaptiveTemperature):
    """Confidence weighted by the student's maximum: sharp targets where it is unsure.

    `w = 1 / (max_c softmax(student)_c + 1e-3)`, then
    `T = max(base + beta * (mean(w) - w), minimum)`.

    Args:
        base: Positive float, the mean temperature; `None` follows the distiller.
        beta: Non-negative float, dimensionless: how far the weights move the temperature.
        minimum: Positive float: lower temperatures are raised to it.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> loss = SoftTargets(temperature=CWSM(base=4.0))
        >>> float(loss([[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]]))
        0.0

    Reference:
        - [Wen et al., 2019](https://arxiv.org/abs/1911.07471), section 3.3
    """

    def weights(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The inverse of the student's largest probability, between 1 and the classes."""
        confidence = ops.max(ops.softmax(student, axis=-1), axis=-1, keepdims=True)
        return 1.0 / (confidence + 1e-3)

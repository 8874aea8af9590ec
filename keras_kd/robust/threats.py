"""What an attacker may do to an input: how far, by which steps, within which bounds.

A `Threat` owns the geometry of an attack and nothing else: the start, the step, the way back into
the ball. `keras_kd.robust.attacks` walks with it, training and evaluation alike. Another ball is a
subclass with `unit`, `into_ball`, `from_noise` and `lengths`. May import: Keras, NumPy.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.utils import checks
from keras_kd.utils.types import Tensor

TINY_START = 0.001
"""Standard deviation of the start that TRADES, RSLAD and AdaAD take, in units of the input."""

_SLACK = 1e-5


class Threat:
    """The base of `Linf` and `L2`.

    Args:
        epsilon: Radius of the ball, in units of the input.
        step: Length of one step, in the same units. Defaults to `2.5 * epsilon / steps`, with which
            the steps reach any point of the ball.
        steps: Gradient steps of an attack.
        restarts: How many times the attack begins anew; each row keeps its worst.
        bounds: Least and greatest value of an input, or `None` where there are none.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If one is out of range.
    """

    norm = ""

    def __init__(
        self,
        epsilon: float,
        step: float | None = None,
        steps: int = 10,
        restarts: int = 1,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        self.epsilon = checks.positive("epsilon", epsilon, "0 attacks nothing")
        self.steps = checks.whole("steps", steps)
        self.restarts = checks.whole("restarts", restarts)
        if step is None:
            step = 2.5 * self.epsilon / self.steps
        self.step = checks.positive("step", step, "leave it out for `2.5 * epsilon / steps`")
        self.bounds = interval(bounds)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild the threat."""
        return {
            "epsilon": self.epsilon,
            "step": self.step,
            "steps": self.steps,
            "restarts": self.restarts,
            "bounds": None if self.bounds is None else list(self.bounds),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Threat":
        """Rebuild a threat."""
        return cls(**config)

    def with_changes(self, **changes: object) -> "Threat":
        """Return the same threat with other values, as `threat.with_changes(steps=50)`.

        Args:
            **changes: Arguments of the class. Where `epsilon` or `steps` change and `step` is not
                among them, the step is the default one.
        """
        config = self.get_config()
        if {"epsilon", "steps"} & set(changes):
            config["step"] = None
        return type(self)(**{**config, **changes})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((type(self), str(self.get_config())))

    def __str__(self) -> str:
        bounds = "no bounds" if self.bounds is None else f"in [{self.bounds[0]:g}, "
        bounds += "" if self.bounds is None else f"{self.bounds[1]:g}]"
        again = f", {self.restarts} restarts" if self.restarts > 1 else ""
        return f"{self.norm} {self.epsilon:g}, {self.steps} steps of {self.step:g}{again}, {bounds}"

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({values})"

    # -------------------------------------------------------------------- tensors

    def unit(self, gradient: Tensor) -> Tensor:
        """The direction of the steepest ascent, of length 1 in the norm; zero for no gradient."""
        raise NotImplementedError

    def into_ball(self, change: Tensor) -> Tensor:
        """The nearest change that is no longer than `epsilon`."""
        raise NotImplementedError

    def from_noise(self, normal: Tensor, uniform: Tensor) -> Tensor:
        """A change that is spread evenly over the ball.

        Args:
            normal: Standard normal numbers in the shape of the input.
            uniform: Numbers in `[0, 1)` in the same shape.
        """
        raise NotImplementedError

    def within(self, attacked: Tensor, x: Tensor) -> Tensor:
        """The nearest input that is in the ball around `x` and within the bounds.

        Args:
            attacked: Tensor in the shape of `x`.
            x: Inputs, `(batch, ...)`, within the bounds.
        """
        attacked = x + self.into_ball(attacked - x)
        if self.bounds is None:
            return attacked
        # `x` itself is within them, so that this goes no further away from it.
        return ops.clip(attacked, self.bounds[0], self.bounds[1])

    # --------------------------------------------------------------------- arrays

    def lengths(self, change: np.ndarray) -> np.ndarray:
        """The length of each row of changes, `(rows,)`.

        Args:
            change: `(rows, ...)`.
        """
        raise NotImplementedError

    def noise(self, shape: tuple[int, ...], seed: tuple[int, ...]) -> np.ndarray:
        """Changes spread evenly over the ball, float32.

        Args:
            shape: Of the changes, `(rows, ...)`.
            seed: Numbers that name the draw.
        """
        rng = np.random.default_rng(seed)
        normal = rng.standard_normal(shape).astype("float32")
        uniform = rng.random(shape).astype("float32")
        return np.asarray(ops.convert_to_numpy(self.from_noise(normal, uniform)))

    def require(self, x: Tensor, name: str = "x") -> None:
        """Raise unless an array can be attacked: real numbers within the bounds.

        Args:
            x: `(rows, ...)`.
            name: What the message calls it.

        Raises:
            TypeError: If it holds no floating-point numbers.
            ValueError: If it leaves the bounds, or is not finite.
        """
        array = np.asarray(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)
        if array.dtype.kind != "f":
            raise TypeError(
                f"An attack moves inputs by small steps, and `{name}` holds {array.dtype}. Scale "
                "it to floating-point numbers, and let the model scale them further."
            )
        if not array.size:
            raise ValueError(f"`{name}` has no rows to attack.")
        low, high = float(array.min()), float(array.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError(f"`{name}` holds NaN or infinite values. Remove or repair them.")
        if self.bounds is None:
            return
        slack = _SLACK * (self.bounds[1] - self.bounds[0])
        if low < self.bounds[0] - slack or high > self.bounds[1] + slack:
            raise ValueError(
                f"`{name}` runs from {low:.6g} to {high:.6g}, outside of the threat's bounds "
                f"{self.bounds}, into which an attack would clip it. Pass `bounds=({low:.4g}, "
                f"{high:.4g})` in the units of `{name}`, with `epsilon` in the same units, or "
                "`bounds=None`."
            )

    def require_kept(self, attacked: np.ndarray, x: np.ndarray) -> None:
        """Raise unless attacked rows are finite, in the ball and within the bounds.

        Args:
            attacked: `(rows, ...)`.
            x: The rows as they were.

        Raises:
            FloatingPointError: If they are not, which a gradient that is no number causes.
        """
        longest = float(self.lengths(attacked.astype("float64") - x).max())
        outside = 0.0
        if self.bounds is not None:
            outside = max(self.bounds[0] - attacked.min(), attacked.max() - self.bounds[1], 0.0)
        # Sums in float32 are off by their last digits.
        scale = max(1.0, float(np.abs(x).max()))
        allowed = self.epsilon * (1 + _SLACK) + 1e-6 * scale
        if not np.isfinite(attacked).all() or longest > allowed or outside > 1e-6 * scale:
            raise FloatingPointError(
                f"An attack left its ball or its bounds: it moved a row by {longest:.6g}, and "
                f"{self} allows {self.epsilon:.6g}. The model's gradients may not be finite."
            )


@keras.saving.register_keras_serializable(package="keras_kd")
class Linf(Threat):
    """Each number of the input may change by `epsilon`: `max_i |x'_i - x_i| <= epsilon`.

    Args:
        epsilon: The greatest change, in units of the input. `8 / 255` is usual for color images in
            `[0, 1]`, 0.1 for Fashion-MNIST, 0.3 for MNIST.
        step: The change of one step. Defaults to `2.5 * epsilon / steps`.
        steps: Gradient steps of an attack: 10 in training, 20 or more in evaluation.
        restarts: How many times an evaluation begins anew; each row keeps its worst.
        bounds: Least and greatest value of an input, or `None` where there are none.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If one is out of range.

    Examples:
        >>> threat = Linf(8 / 255, step=2 / 255, steps=10)
        >>> print(threat)
        Linf 0.0313725, 10 steps of 0.00784314, in [0, 1]

    Reference:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
    """

    norm = "Linf"

    def unit(self, gradient: Tensor) -> Tensor:
        """The sign of each number."""
        return ops.sign(gradient)

    def into_ball(self, change: Tensor) -> Tensor:
        """Each number clipped to `[-epsilon, epsilon]`."""
        return ops.clip(change, -self.epsilon, self.epsilon)

    def from_noise(self, normal: Tensor, uniform: Tensor) -> Tensor:
        """Each number evenly from `[-epsilon, epsilon]`."""
        return self.epsilon * (2.0 * uniform - 1.0)

    def lengths(self, change: np.ndarray) -> np.ndarray:
        """The greatest absolute number of each row."""
        return np.abs(np.asarray(change)).reshape(len(change), -1).max(axis=1)


@keras.saving.register_keras_serializable(package="keras_kd")
class L2(Threat):
    """The input may move by `epsilon` in Euclidean distance: `||x' - x||_2 <= epsilon`.

    Args:
        epsilon: The distance, in units of the input. 0.5 is usual for color images of 32 by 32
            pixels in `[0, 1]`.
        step: The length of one step. Defaults to `2.5 * epsilon / steps`.
        steps: Gradient steps of an attack.
        restarts: How many times an evaluation begins anew; each row keeps its worst.
        bounds: Least and greatest value of an input, or `None` where there are none.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If one is out of range.

    Examples:
        >>> threat = L2(0.5, steps=20)
        >>> threat.step
        0.0625

    Reference:
        - [Madry et al., 2018](https://arxiv.org/abs/1706.06083)
    """

    norm = "L2"

    def unit(self, gradient: Tensor) -> Tensor:
        """The gradient of each row divided by its length."""
        # Divided by the greatest number first, since squares of small gradients are zero.
        top = _over_rows(ops.max, ops.abs(gradient))
        shrunk = gradient / ops.where(top > 0, top, ops.ones_like(top))
        length = ops.sqrt(_over_rows(ops.sum, ops.square(shrunk)))
        return shrunk / ops.maximum(length, 1e-12)

    def into_ball(self, change: Tensor) -> Tensor:
        """Rows longer than `epsilon` shortened to it."""
        length = ops.sqrt(_over_rows(ops.sum, ops.square(change)))
        return change * ops.minimum(1.0, self.epsilon / ops.maximum(length, 1e-12))

    def from_noise(self, normal: Tensor, uniform: Tensor) -> Tensor:
        """A random direction, with the radius `epsilon * u ** (1 / d)` of an even spread."""
        count = math.prod(int(size) for size in normal.shape[1:])
        one = ops.reshape(uniform, (-1, count))[:, :1]
        one = ops.reshape(one, (-1, *[1] * (len(normal.shape) - 1)))
        return self.epsilon * self.unit(ops.convert_to_tensor(normal)) * one ** (1.0 / count)

    def lengths(self, change: np.ndarray) -> np.ndarray:
        """The Euclidean length of each row."""
        rows = np.asarray(change).reshape(len(change), -1)
        return np.sqrt(np.square(rows, dtype="float64").sum(axis=1))


def _over_rows(reduce: Callable[..., Tensor], values: Tensor) -> Tensor:
    return reduce(values, axis=tuple(range(1, len(values.shape))), keepdims=True)


def require_threat(threat: object) -> Threat:
    """Return the threat, or raise `TypeError` if it is none."""
    if not isinstance(threat, Threat):
        raise TypeError(
            "A threat is `keras_kd.robust.Linf(...)` or `keras_kd.robust.L2(...)`. Received: "
            f"{threat!r}."
        )
    return threat


def interval(bounds: object) -> tuple[float, float] | None:
    """Least and greatest value of an input, or `None`.

    Args:
        bounds: What was given.

    Raises:
        TypeError: If they are no two numbers.
        ValueError: If the first is not the lesser.
    """
    if bounds is None:
        return None
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise TypeError(
            "`bounds` are the least and the greatest value of an input, as `(0, 1)`, or `None`. "
            f"Received: bounds={bounds!r}."
        )
    if any(np.ndim(value) for value in bounds):
        raise TypeError(
            "`bounds` are two numbers, the same for all channels. Where channels have bounds of "
            "their own, let the model scale them inside, and attack what comes before. Received: "
            f"bounds={bounds!r}."
        )
    low, high = (checks.number("bounds", value) for value in bounds)
    if low >= high:
        raise ValueError(f"The first of the `bounds` is the lesser. Received: bounds={bounds!r}.")
    return low, high

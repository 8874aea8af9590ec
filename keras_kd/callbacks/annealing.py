"""Live values that move along a schedule."""

from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import (
    CosineDecay,
    ExponentialDecay,
    LearningRateSchedule,
    PolynomialDecay,
)

from keras_kd.utils.types import Logs

KINDS = ("linear", "cosine", "exponential")


class _Annealing(keras.callbacks.Callback):
    """Moves one live value of the distiller along a schedule.

    The value depends on the epoch's index, or on the optimizer's count of
    steps, and on nothing the callback remembers: so it is right after a
    restart with `initial_epoch` or a restored optimizer.
    """

    value: float | None = None

    def __init__(
        self,
        start: float | None,
        end: float | None,
        epochs: int | None,
        steps: int | None,
        kind: str | LearningRateSchedule,
        low: float,
        high: float,
    ) -> None:
        super().__init__()
        self.what = type(self).__name__
        self.per_step = steps is not None
        if isinstance(kind, LearningRateSchedule):
            if start is not None or end is not None or epochs is not None:
                raise ValueError(
                    f"`{self.what}` takes its values from the given schedule. Leave out `start`, "
                    "`end` and `epochs`; pass `steps` to read the schedule at every step."
                )
            self.schedule: Any = kind
        else:
            self.schedule = self._make(start, end, epochs, steps, kind)
        self.low, self.high = low, high
        for name, value in (("start", start), ("end", end)):
            if value is not None:
                self._check(value, name)

    def _make(
        self,
        start: float | None,
        end: float | None,
        epochs: int | None,
        steps: int | None,
        kind: str,
    ) -> Any:
        if kind not in KINDS:
            raise ValueError(
                f"`kind` of `{self.what}` is one of {', '.join(map(repr, KINDS))} or a "
                f"`keras.optimizers.schedules.LearningRateSchedule`. Received: kind={kind!r}."
            )
        if start is None or end is None:
            raise ValueError(
                f"`{self.what}` needs `start` and `end`. Received: start={start!r}, end={end!r}."
            )
        count = steps if steps is not None else epochs
        if (epochs is None) == (steps is None) or count is None or count < 1:
            raise ValueError(
                f"`{self.what}` runs over `epochs` or over `steps`, one of them, at least 1. "
                f"Received: epochs={epochs!r}, steps={steps!r}."
            )
        # `start` holds in the first epoch, `end` from the last one on.
        duration = max(count - 1, 1)
        if kind == "linear":
            return PolynomialDecay(start, duration, end, power=1.0)
        if kind == "cosine":
            unit = CosineDecay(1.0, duration)
            return lambda i: end + (start - end) * unit(i)
        if start <= 0 or end <= 0:
            raise ValueError(
                f"`{self.what}` with kind='exponential' needs positive `start` and `end`. "
                f"Received: start={start!r}, end={end!r}."
            )
        decay = ExponentialDecay(start, duration, end / start)
        # Keras's exponential goes on falling after its duration.
        return lambda i: decay(min(i, duration))

    def _check(self, value: float, name: str) -> None:
        # Written so that NaN fails too.
        if not self.low <= value <= self.high:
            raise ValueError(
                f"`{name}` of `{self.what}` must lie between {self.low:g} and {self.high:g}. "
                f"Received: {value!r}."
            )

    def _variable(self) -> Any:
        raise NotImplementedError

    def on_train_begin(self, logs: Logs = None) -> None:
        """Fail before the first step if the model has no such value."""
        self._variable()
        self.value = None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Set the value of this epoch."""
        if not self.per_step:
            self._set(epoch)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Set the value of this step."""
        if self.per_step:
            self._set(int(ops.convert_to_numpy(self.model.optimizer.iterations)))

    def _set(self, position: int) -> None:
        value = float(ops.convert_to_numpy(self.schedule(position)))
        self._check(value, f"the value at {position}")
        if value != self.value:
            self._variable().assign(value)
            self.value = value
            # From there the distiller puts it into the logs, ahead of every
            # callback, whatever their order.
            self.model.live_values[self._log_name()] = value

    def _log_name(self) -> str:
        raise NotImplementedError


class TemperatureAnnealing(_Annealing):
    """Change the temperature of the softened distributions during training.

    The value is `start` in the first epoch (or step) and `end` in the last
    one, and stays there. It is in the logs as `temperature`. Losses with a
    temperature of their own do not follow it.

    Args:
        start: Positive float, dimensionless.
        end: Positive float, dimensionless.
        epochs: Number of epochs from `start` to `end`, both included.
        steps: Number of optimizer steps, in place of `epochs`.
        kind: `"linear"`, `"cosine"` (half a period), `"exponential"` (a
            constant factor a step), or a
            `keras.optimizers.schedules.LearningRateSchedule`, which is read at
            the epoch's index, or at the optimizer's step if `steps` is given,
            and takes the place of `start`, `end` and `epochs`.

    Raises:
        ValueError: If a value is not positive, or the arguments do not fit.

    Examples:
        >>> callback = TemperatureAnnealing(start=8.0, end=1.0, epochs=20, kind="cosine")

    Reference:
        - [Jafari et al., 2021](https://arxiv.org/abs/2104.07163), section 3
    """

    def __init__(
        self,
        start: float | None = None,
        end: float | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        kind: str | LearningRateSchedule = "linear",
    ) -> None:
        super().__init__(start, end, epochs, steps, kind, 1e-6, 1e6)

    def _variable(self) -> Any:
        return _live(self.model, "temperature", self.what)

    def _log_name(self) -> str:
        return "temperature"


class AlphaAnnealing(_Annealing):
    """Change the weight of the hard loss during training.

    The value is `start` in the first epoch (or step) and `end` in the last
    one, and stays there. It is in the logs as `alpha`.

    Args:
        start: Float in `[0, 1]`.
        end: Float in `[0, 1]`.
        epochs: Number of epochs from `start` to `end`, both included.
        steps: Number of optimizer steps, in place of `epochs`.
        kind: As in `TemperatureAnnealing`.

    Raises:
        ValueError: If a value lies outside `[0, 1]`, the arguments do not fit,
            or the distiller was compiled with explicit weights.

    Examples:
        >>> callback = AlphaAnnealing(start=0.1, end=0.9, steps=1000)
    """

    def __init__(
        self,
        start: float | None = None,
        end: float | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        kind: str | LearningRateSchedule = "linear",
    ) -> None:
        super().__init__(start, end, epochs, steps, kind, 0.0, 1.0)

    def _variable(self) -> Any:
        return _live(self.model, "alpha", self.what)

    def _log_name(self) -> str:
        return "alpha"

    def on_train_begin(self, logs: Logs = None) -> None:
        """Fail before the first step if `alpha` weighs nothing."""
        super().on_train_begin(logs)
        if not self.model.weighs_by_alpha:
            raise ValueError(
                "`AlphaAnnealing` changes nothing here: the distiller was compiled with explicit "
                "weights, or without a loss on the labels. Compile it with `loss=` and `alpha=`."
            )


class TransferWeightAnnealing(_Annealing):
    """Change the weight of one transfer during training, as for a warm-up.

    The value is `start` in the first epoch (or step) and `end` in the last
    one, and stays there. It is in the logs as `<transfer>_weight`.

    Args:
        transfer: Name of the transfer.
        start: Non-negative float.
        end: Non-negative float.
        epochs: Number of epochs from `start` to `end`, both included.
        steps: Number of optimizer steps, in place of `epochs`.
        kind: As in `TemperatureAnnealing`.

    Raises:
        ValueError: If a value is negative, the arguments do not fit, or the
            distiller has no such transfer.

    Examples:
        >>> callback = TransferWeightAnnealing("decoupled_kd", start=0.0, end=1.0, epochs=20)

    Reference:
        - [Zhao et al., 2022](https://arxiv.org/abs/2203.08679), section 4.1 (warm-up)
    """

    def __init__(
        self,
        transfer: str,
        start: float | None = None,
        end: float | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        kind: str | LearningRateSchedule = "linear",
    ) -> None:
        super().__init__(start, end, epochs, steps, kind, 0.0, 1e12)
        self.transfer = transfer

    def _variable(self) -> Any:
        transfers = {t.name: t for t in getattr(self.model, "transfers", ())}
        if self.transfer not in transfers:
            raise ValueError(
                f"The distiller has no transfer `{self.transfer}`. It has: "
                f"{', '.join(f'`{name}`' for name in transfers) or 'none'}."
            )
        return transfers[self.transfer].weight

    def _log_name(self) -> str:
        return f"{self.transfer}_weight"


def _live(model: keras.Model, name: str, callback: str) -> Any:
    variable = getattr(model, name, None)
    if variable is None or not hasattr(variable, "assign"):
        raise ValueError(
            f"`{callback}` changes `{name}` of a `keras_kd.Distiller`, and the model being "
            f"trained, a {type(model).__name__}, has none."
        )
    return variable

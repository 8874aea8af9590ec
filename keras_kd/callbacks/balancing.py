"""Weights of the terms of the objective, from what the terms are worth as training goes on."""

import math
from typing import Any

import keras
from keras import ops

from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Data, Logs

METHODS = ("uncertainty", "gradient_norm")


class LossBalancing(keras.callbacks.Callback):
    """Weigh the hard loss and every transfer against each other while training.

    Every `every` steps the terms are measured on one and the same batch, and
    term `i` of value `L_i` gets the weight `w_i`:

    - `"uncertainty"`: each term has a variance of its own,
      `sum_i L_i / (2 s_i**2) + log s_i`. The variances are not learned by
      gradient steps but set to their optimum, `s_i**2 = L_i`, so that
      `w_i = 1 / (2 L_i)`. (For a classification the paper writes
      `L_i / s_i**2 + log s_i`, whose optimum gives the same weight.) Terms
      must be positive.
    - `"gradient_norm"`: with the norm `G_i = ||d L_i / d theta||` over the
      student's trainable parameters, `w_i = K (1 / G_i) / sum_j (1 / G_j)`: all
      terms pull equally hard, and the K weights sum to K. That is where
      GradNorm's own gradient steps lead with `alpha = 0`, its asymmetry.

    The weights go into `distiller.student_loss_weight` and the `weight` of each
    transfer, in place of what these were compiled with; `alpha`, or
    `distillation_loss_weight`, multiplies them as before. A term whose weight is
    0 when training begins takes no part. The weights are in the logs as
    `student_loss_weight` and `<transfer>_weight`.

    Measuring leaves no trace in weights, statistics, metrics or random states,
    and takes one forward pass, with one backward pass for each term in
    `"gradient_norm"`. It is done at the steps whose number is a multiple of
    `every`, and depends on nothing that the callback remembers: training that
    is resumed from `ResumableBackup` or `distiller.save` has the same weights.

    Args:
        method: `"uncertainty"` or `"gradient_norm"`.
        data: The batch that is measured, `(x, y)`, `(x, y, sample_weight)` or
            `(x,)`, some hundred rows of training data. `None` takes 256 rows,
            evenly spread, of the arrays given to `fit`, beside a
            `CachedTeacher` with its answers to them. Datasets and
            `class_weight` need it; of a dataset joined to a `CachedTeacher` it
            is a joined batch, `next(iter(cached.join(dataset)))`.
        every: Number of steps from one measurement to the next.

    Raises:
        ValueError: If an argument does not fit; when training begins, if there
            are fewer than two terms, no batch to measure, or a term that cannot
            be weighed.

    Examples:
        >>> callback = LossBalancing("gradient_norm", every=200)
        >>> history = distiller.fit(x, y, epochs=20, callbacks=[callback])

    Reference:
        - [Kendall et al., 2018](https://arxiv.org/abs/1705.07115), section 3.2
        - [Chen et al., 2018](https://arxiv.org/abs/1711.02257), section 3.1
    """

    def __init__(
        self, method: str = "uncertainty", data: Data | None = None, every: int = 100
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(
                f"`method` of `LossBalancing` is one of {', '.join(map(repr, METHODS))}. "
                f"Received: method={method!r}." + did_you_mean(method, METHODS, quote="'")
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                "`every` of `LossBalancing` is a number of steps, at least 1. "
                f"Received: every={every!r}."
            )
        self.method = method
        self.data = data
        self.every = every
        self._batch: Any = None
        self._live: dict[str, Any] = {}
        self._known = 0
        self._begun = 0
        self._at_once = 1
        self._measured_at: int | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        """Find the terms and the batch, or fail before the first step."""
        distiller = self.model
        if not hasattr(distiller, "term_losses"):
            raise ValueError(
                "`LossBalancing` weighs the terms of a `keras_kd.Distiller`. The model being "
                f"trained is a {type(distiller).__name__}."
            )
        self._batch = self.data if self.data is not None else distiller.sample_rows()
        if self._batch is None:
            raise ValueError(
                "`LossBalancing` measures the terms on one batch. It takes it from arrays given to "
                "`fit`, but from no dataset and not beside `class_weight`. "
                "Pass `data=(x, y)` or `(x, y, sample_weight)`, or a joined batch, "
                "`data=next(iter(cached.join(dataset)))`."
            )
        live = {transfer.name: transfer.weight for transfer in distiller.transfers}
        if distiller.loss is not None:
            live = {"student_loss": distiller.student_loss_weight, **live}
        # A weight that the balance gives is never 0, so that resuming finds the same terms.
        self._live = {name: weight for name, weight in live.items() if _number(weight) > 0}
        if len(self._live) < 2:
            raise ValueError(
                "`LossBalancing` weighs at least two terms against each other. This distiller has "
                f"{', '.join(f'`{name}`' for name in self._live) or 'none'} with a weight above 0."
            )
        self._at_once = distiller.steps_per_execution
        self._measured_at = None
        values = distiller.term_losses(self._batch)
        wrong = [name for name in self._live if not math.isfinite(values[name])]
        if self.method == "uncertainty":
            wrong += [name for name in self._live if values[name] < 0]
        if wrong:
            raise ValueError(
                f"The term `{wrong[0]}` is {values[wrong[0]]:.3g} on the measured batch, and "
                f"{self.method!r} weighs finite"
                + (
                    " and positive terms. Use method='gradient_norm', or give it the weight 0."
                    if self.method == "uncertainty"
                    else " terms. Check the batch and the models."
                )
            )

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Read the number of steps, which is out of reach inside an epoch on JAX."""
        self._count()
        self._show()

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Measure, if this step is one to do so."""
        # An upper bound: steps that a resumed training passes over are not taken.
        if not self._is_due(self._known + self._begun):
            self._begun += self._at_once
            return
        self._count()
        if self._is_due(self._known) and self._measured_at != self._known:
            self._measured_at = self._known
            self._balance()
        self._begun = self._at_once

    def _count(self) -> None:
        self._known = int(ops.convert_to_numpy(self.model.optimizer.iterations))
        self._begun = 0

    def _is_due(self, steps: int) -> bool:
        # Keras shows one of the steps that it executes at once.
        return steps % self.every < self._at_once

    def _balance(self) -> None:
        distiller = self.model
        if self.method == "uncertainty":
            found = distiller.term_losses(self._batch)
            scales = {name: 2.0 * value for name, value in found.items()}
        else:
            scales = distiller.gradient_norms(self._batch)
        # One that is 0 for the moment, or has no gradient yet, keeps its weight.
        usable = {
            name: 1.0 / scales[name]
            for name in self._live
            if math.isfinite(scales[name]) and scales[name] > 1e-12
        }
        if self.method == "gradient_norm":
            total = sum(usable.values())
            usable = {name: len(usable) * value / total for name, value in usable.items()}
        for name, value in usable.items():
            self._live[name].assign(value)
        self._show()

    def _show(self) -> None:
        for name, weight in self._live.items():
            self.model.live_values[f"{name}_weight"] = _number(weight)


def _number(variable: keras.Variable) -> float:
    return float(ops.convert_to_numpy(variable))

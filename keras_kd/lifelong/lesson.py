"""One task in the compiled step: the model, what it was before the task, and what is minimized.

A `Lesson` is a plain `keras.Model` around the model that is trained. Batches are dicts: `x`, and
what the plan adds of the memory. It owns all Variables of a step, so that a step on JAX knows them
and a backup holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.distill import training_metrics
from keras_kd.lifelong.method import Method
from keras_kd.utils.types import Array, Loss, Losses, Tensor, Tensors


class Lesson(keras.Model):
    """Trains a model on one task by one method.

    Args:
        network: From inputs to a dict of `logits`, `features` and taps.
        method: The method.
        head: The layer of `network` that answers.
        old: `network` as it was before the task, or `None`.
        ranks: Which number in order of appearance the class of each column has, `(classes,)`.
        old_columns: Positions of the columns that there were before, in their order then.
        task_columns: Positions of the columns of the task's classes.
        stored: Logits in the memory and a row behind them, `(slots + 1, classes)`, or `None`.
        identity: What makes this training another one, in plain values.
    """

    def __init__(
        self,
        network: keras.Model,
        method: Method,
        *,
        head: Any = None,
        old: Any = None,
        ranks: Array,
        old_columns: Sequence[int],
        task_columns: Sequence[int],
        stored: Array | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name="lesson", dtype=network.dtype_policy, autocast=False)
        self.network = network
        self.old = old
        self.method = method
        # A part of `network`: tracked once.
        object.__setattr__(self, "_head", head)
        self.counts = len(old_columns), len(task_columns), len(ranks)
        self.ranks = np.asarray(ranks, "int32")
        self.old_columns = [int(i) for i in old_columns]
        self.task_columns = [int(i) for i in task_columns]
        self._identity = identity or {}
        self._hard: Any = None
        self.stored = None
        if stored is not None:
            self.stored = keras.Variable(
                stored, trainable=False, dtype="float32", autocast=False, name="stored_logits"
            )
        self.kept = method.variables(self)
        self.trackers = {name: keras.metrics.Mean(name) for name in method.terms}
        self.built = True

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer,
        loss: Losses,
        metrics: Sequence[object] | Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """Configure the training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: The hard loss: a Keras loss, or `fn(columns, logits)` with one value a row.
            metrics: Metrics of the columns and the logits.
            **kwargs: As in `keras.Model.compile`.
        """
        self._hard = loss
        super().compile(optimizer=optimizer, metrics=metrics, **kwargs)
        columns = keras.KerasTensor((None,), "int32")
        training_metrics.make(None, self._compile_metrics, columns, self.network.output["logits"])

    def per_row(self, y: Tensor, logits: Tensor) -> Tensor:
        """The hard loss, `(batch,)`.

        Args:
            y: Columns, `(batch,)`.
            logits: `(batch, classes)`.
        """
        return per_row(self._hard, y, logits)

    def call(self, parts: dict[str, Any], training: bool | None = None) -> Any:
        """What the model says of the batch, and of the draws that go along with it.

        Args:
            parts: What the plan reads.
            training: As in Keras.
        """
        together = self.method.together if training and "x" in parts else ()
        if not together:
            return self.network(parts["x"], training=training)
        read = [parts["x"], *(parts[f"{name}_x"] for name in together)]
        whole = self.network(ops.concatenate(read), training=training)
        first = ops.shape(parts["x"])[0]
        outputs = {name: value[:first] for name, value in whole.items()}
        for name, rows in zip(together, read[1:]):
            last = first + ops.shape(rows)[0]
            outputs[f"{name}_logits"] = whole["logits"][first:last]
            first = last
        return outputs

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Tensors | None = None,
        training: bool = True,
    ) -> Tensor:
        """Add up what is minimized: the terms of the method, and what layers add.

        Args:
            x: What the plan reads.
            y: Columns.
            y_pred: What `call` returned.
            sample_weight: Not read.
            training: Whether this is a training step.
        """
        # Read before the model of before is run, whose layers add to nothing.
        extra = [self._aggregate_additional_loss(loss) for loss in self.losses]
        if training:
            terms = self.method.loss(self, x, y, y_pred)
        else:
            terms = {"label_loss": ops.mean(self.per_row(y, y_pred["logits"]))}
        size = ops.shape(y)[0]
        for name, value in terms.items():
            if name in self.trackers:
                self.trackers[name].update_state(value, sample_weight=size)
        total = [*terms.values(), *extra]
        dtype = keras.backend.result_type(*(value.dtype for value in total), "float32")
        return sum(ops.cast(value, dtype) for value in total)

    def compute_metrics(
        self,
        x: Tensors | None,
        y: Any,
        y_pred: Any,
        sample_weight: Tensors | None = None,
    ) -> Any:
        """Update the metrics on the rows of the task."""
        return super().compute_metrics(x, y, y_pred["logits"], sample_weight)

    def read_old(self, x: Tensor) -> Any:
        """What the model said before the task, without a gradient.

        Args:
            x: Rows.
        """
        outputs = self.old(x, training=False)
        return {name: ops.stop_gradient(value) for name, value in outputs.items()}

    def of_old(self, logits: Tensor) -> Tensor:
        """The columns that there were before the task, in their order then.

        Args:
            logits: `(batch, classes)`.
        """
        return ops.take(logits, ops.convert_to_tensor(self.old_columns, "int32"), axis=-1)

    def is_old(self, y: Tensor) -> Tensor:
        """Whether rows are of classes that the task does not have, `(batch,)`.

        Args:
            y: Columns, `(batch,)`.
        """
        mask = np.ones(self.counts[2], "float32")
        mask[self.task_columns] = 0.0
        return ops.take(ops.convert_to_tensor(mask), ops.cast(y, "int32"), axis=0)

    def scale(self) -> Tensor:
        """The factor of the cosines of a cosine head."""
        return ops.convert_to_tensor(self._head.scale)

    def store(self, parts: dict[str, Any], logits: Tensor) -> None:
        """Write the logits of this step into the slots of the memory that its rows take.

        Args:
            parts: What the plan reads; without `slots` nothing is written.
            logits: Of the rows of the batch.
        """
        if self.stored is None or "slots" not in parts:
            return
        rows = ops.cast(ops.stop_gradient(logits), "float32")
        slots = ops.cast(parts["slots"], "int32")[:, None]
        self.stored.assign(ops.scatter_update(ops.convert_to_tensor(self.stored), slots, rows))

    def trains_on(self) -> dict[str, Any]:
        """What makes this training another one, for the backup."""
        return self._identity

    def get_config(self) -> dict[str, Any]:
        """Nothing: a lesson is made by its learner."""
        return {}


def per_row(loss: Loss, y: Tensor, logits: Tensor) -> Tensor:
    """A hard loss in float32, one value a row.

    Args:
        loss: A Keras loss, or `fn(columns, logits)`.
        y: Columns, `(batch,)`.
        logits: `(batch, classes)`.

    Raises:
        ValueError: If a function returns another shape.
    """
    values = unreduced(loss, y, logits)
    if len(values.shape) != 1:
        raise ValueError(
            "The loss of a learner gives one value a row, `(batch,)`. Received: shape "
            f"{tuple(values.shape)}."
        )
    return values


def unreduced(loss: Loss, y: Tensor, logits: Tensor) -> Tensor:
    """What a hard loss returns before it is averaged, in float32.

    Args:
        loss: A Keras loss, or `fn(columns, logits)`.
        y: Columns, `(batch,)`.
        logits: `(batch, classes)`.
    """
    logits = ops.cast(logits, "float32")
    values = loss.call(y, logits) if isinstance(loss, keras.losses.Loss) else loss(y, logits)
    return ops.convert_to_tensor(values)

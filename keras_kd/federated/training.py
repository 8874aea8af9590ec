"""A model as logits, whatever it ends in: what answers, learns from answers and is measured.

`LogitsModel` reads a model's logits through `models.model_reader`; `Learner` trains it on targets.
Rows are shuffled by generators of our own, so that the random state of the process stays what it
was. May import: `models`, `utils`.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from keras_kd.models.model_reader import Reader
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor

Array = Any
"""A NumPy array."""


class LogitsModel(keras.Model):
    """The logits of a model, over the same weights.

    Args:
        model: A built `keras.Model` with one input and one output of exclusive classes.
        rows: A few inputs, which tell what the layers do not.
        whose: What messages call it.

    Raises:
        TypeError: If it is no Keras model.
        ValueError: If it has several inputs or outputs, other outputs than classes, or sigmoids.
    """

    def __init__(self, model: Any, rows: Array, whose: str) -> None:
        checks.require_model(model, whose)
        super().__init__(name=f"{model.name}_logits")
        self.model = model
        inputs = keras.tree.flatten(getattr(model, "inputs", None) or [None])
        reader = Reader(model, whose)
        reader.inspect(rows)
        shapes = reader.shapes or []
        if len(inputs) != 1 or len(shapes) != 1 or len(shapes[0]) != 2:
            raise ValueError(
                f"The {whose} `{model.name}` has {len(inputs)} inputs and outputs of shape "
                f"{shapes}; one input and one decision a row, `(batch, classes)`, are needed."
            )
        if shapes[0][-1] < 2 or reader.kinds()[0] == "sigmoid":
            raise ValueError(
                f"The {whose} `{model.name}` answers independent questions, by sigmoids or one "
                "unit. Let it end in a logit or a softmax probability for each class."
            )
        reader.require_logits(0)
        self.classes = int(shapes[0][-1])
        declared = rows.shape[1:] if inputs[0] is None else inputs[0].shape[1:]
        self.shape_of_rows = [int(size or 0) for size in declared]
        if len(declared) != rows.ndim - 1 or any(
            size not in (0, b) for size, b in zip(self.shape_of_rows, rows.shape[1:])
        ):
            raise ValueError(
                f"The {whose} `{model.name}` reads rows of shape {tuple(declared)}, and its rows "
                f"have shape {tuple(rows.shape[1:])}. Reshape them, or give it another input."
            )
        # Past Keras's tracking: its model is tracked above.
        object.__setattr__(self, "reader", reader)
        self.built = True

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """The logits `(batch, classes)`."""
        return self.reader.read(inputs, bool(training)).logits[0]


class Learner:
    """Asks a model for logits, and trains it on targets.

    Args:
        model: As in `LogitsModel`.
        rows: As in `LogitsModel`.
        whose: As in `LogitsModel`.

    Attributes:
        classes: How many classes there are.
        shape_of_rows: Sizes of the model's input, 0 for any.
    """

    def __init__(self, model: Any, rows: Array, whose: str) -> None:
        self.logits_model = LogitsModel(model, rows, whose)
        self.model, self.classes = model, self.logits_model.classes
        # Of a list that a Keras model is given, it makes one of its own that cannot be sent.
        self.shape_of_rows = [int(size) for size in self.logits_model.shape_of_rows]
        self._whose = whose
        self._compiled = False

    def compile(self, optimizer: Any, loss: Any) -> None:
        """Configure how it learns, once.

        Args:
            optimizer: An optimizer of Keras.
            loss: Between targets and logits.
        """
        self.logits_model.compile(optimizer, loss, jit_compile=jit())
        optimizer.build(self.logits_model.trainable_variables)
        self._compiled = True

    @property
    def variables(self) -> list[Any]:
        """What training changes in the model: its variables without those of its metrics."""
        booked = [*self.logits_model.metrics_variables, *self.model.metrics_variables]
        counted = {id(v) for v in booked}
        return [v for v in self.model.variables if id(v) not in counted]

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compiled

    def logits(self, x: Array, batch_size: int = 256) -> Array:
        """Float32 `(rows, classes)`, in inference mode."""
        ask = self.logits_model.predict_on_batch
        parts = [ask(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
        return np.concatenate(parts).astype("float32")

    def accuracy(self, rows: tuple[Array, Array] | None) -> float | None:
        """The share of rows whose class is found, or `None` without rows."""
        if rows is None:
            return None
        x, y = rows
        return float((self.logits(x).argmax(-1) == y).mean())

    def study(
        self,
        x: Array,
        targets: Array,
        epochs: int,
        batch_size: int,
        rng: np.random.Generator,
        patience: int | None = None,
    ) -> None:
        """Learn targets.

        Args:
            x: Rows.
            targets: As the loss reads them, one a row.
            epochs: Passes over them.
            batch_size: Rows a step.
            rng: Orders the rows.
            patience: Passes without gain on a held-out tenth after which it stops, with the best
                weights, while the learning rate falls by a cosine; `None` trains on all rows to the
                end.
        """
        held = len(x) // 10 if patience is not None else 0
        if not held:
            passes(self.logits_model, x, targets, epochs, batch_size, rng)
            return
        order = rng.permutation(len(x))
        tested, trained = order[:held], order[held:]
        rate = float(self.logits_model.optimizer.learning_rate)

        def annealed(epoch: int) -> float:
            return rate * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))

        callbacks = [
            keras.callbacks.EarlyStopping(patience=patience, restore_best_weights=True),
            keras.callbacks.LearningRateScheduler(annealed),
        ]
        # All passes have one order here, since Keras drives them and stops between them.
        self.logits_model.fit(
            x[trained],
            targets[trained],
            validation_data=(x[tested], targets[tested]),
            epochs=epochs,
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )


def passes(
    model: Any, x: Array, y: Array, epochs: int, batch_size: int, rng: np.random.Generator
) -> None:
    """Train a compiled model, each pass in an order of its own.

    Args:
        model: A compiled model.
        x: Rows.
        y: What its loss reads.
        epochs: Passes.
        batch_size: Rows a step.
        rng: Orders the rows.
    """
    # A call of `fit` for each pass would cost more than the steps of so few rows.
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for begin in range(0, len(x), batch_size):
            rows = order[begin : begin + batch_size]
            model.train_on_batch(x[rows], y[rows])


def jit() -> Any:
    """What `jit_compile` is for steps so short that compiling them costs more than they do."""
    return False if keras.config.backend() == "tensorflow" else "auto"

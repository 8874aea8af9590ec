"""Steps that take less time than it takes to begin them, taken many at once.

`compile(steps_per_execution="auto")` leaves it to `ShortSteps` how many. On TensorFlow the rows of
arrays lie in memory as tensors then, and one program gathers them and takes all these steps, where
a pipeline of small batches costs as much as the steps themselves.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_kd import backends
from keras_kd.cache import join_arrays
from keras_kd.cache.join_arrays import Pages
from keras_kd.cache.join_datasets import Joined
from keras_kd.cache.memory import Held
from keras_kd.distill.pairing import Pairing
from keras_kd.utils.data import are_arrays
from keras_kd.utils.types import Data, Tensors

SECONDS = 0.25
"""How long the steps that are taken at once should last."""

# What a step takes at least, and floating-point operations a second of a small network.
_LEAST, _SPEED = 1e-3, 5e9
# Of one pass forward and one backward, for each weight and place.
_OPERATIONS = 6


class ShortSteps:
    """How many steps are taken at once.

    Args:
        pairing: The models.
    """

    def __init__(self, pairing: Pairing) -> None:
        self._pairing = pairing
        self._auto = False
        self._pages: Pages | None = None
        self._told: set[tuple[str, ...]] = set()

    def given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `compile` for Keras, which knows no `"auto"`."""
        self._auto = arguments.get("steps_per_execution") == "auto"
        self._pages = None
        return {**arguments, "steps_per_execution": 1} if self._auto else arguments

    def for_fit(
        self,
        distiller: keras.Model,
        data: tuple[Any, Any, int | None, dict[str, Any]],
        callbacks: Sequence[keras.callbacks.Callback] | None,
    ) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """What `keras.Model.fit` is given, with as many steps at once as are right.

        Args:
            distiller: What is trained.
            data: `x`, `y`, `batch_size` and the other arguments of `fit`; `x` may be `Joined`
                arrays.
            callbacks: Those of the user.

        Returns:
            The same four.
        """
        x, y, batch_size, arguments = data
        self._pages = None
        joined = isinstance(x, Joined)
        steps = _steps(x, batch_size, arguments)
        count = self._count(steps, batch_size) if self._auto else 1
        given = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        paged = count > 1 and joined | are_arrays(x) and self._may_page(distiller, x, y, given)
        if self._auto:
            self._take(distiller, count, given)
        if not joined and not (paged and not arguments.get("steps_per_epoch")):
            return data
        rows = (x.x if joined else x, y, arguments.get("sample_weight"))
        if not joined:
            rows = join_arrays.row_data(x, y, arguments)
        held = Held(x.record if joined else {})
        asks = self._pairing.compiled.asks_in_evaluation
        paged = paged and not arguments.get("steps_per_epoch")
        x, *rest = join_arrays.drawn_for_fit(
            held, rows, batch_size, arguments, asks, count if paged else 1
        )
        if isinstance(x, Pages):
            self._pages, x = x, x.dataset
        return (x, *rest)

    def _count(self, steps: int | None, batch_size: int | None) -> int:
        """How many steps last about as long as they should, at most an epoch."""
        if keras.config.backend() == "torch":
            # Keras takes one at a time there.
            return 1
        operations = _OPERATIONS * (batch_size or 32) * _weights_and_places(self._pairing)
        seconds = _LEAST + operations / _SPEED
        return max(1, min(int(SECONDS / seconds), steps or 16))

    def _may_page(
        self, distiller: keras.Model, x: Data, y: Tensors | None, callbacks: list[Any]
    ) -> bool:
        """Whether the step may gather the rows itself."""
        return (
            keras.config.backend() == "tensorflow"
            and not distiller.run_eagerly
            and backends.replicas() == 1
            and distiller.distribute_strategy.num_replicas_in_sync == 1
            # Those that pass batches over count them one by one.
            and not any(getattr(each, "skips_batches", False) for each in callbacks)
        )

    def _take(self, distiller: keras.Model, count: int, callbacks: list[Any]) -> None:
        """Take so many steps at once, and say so to callbacks that count on each."""
        if distiller.steps_per_execution != count:
            distiller.steps_per_execution = count
            # The compiled functions hold the number of before.
            distiller.train_function = distiller.test_function = None
            distiller.predict_function = None
        names = tuple(sorted({type(each).__name__ for each in callbacks if _per_batch(each)}))
        if count > 1 and names and names not in self._told:
            self._told.add(names)
            warnings.warn(
                f'`steps_per_execution="auto"` takes {count} steps at once, so that '
                f"{', '.join(f'`{name}`' for name in names)} is called every {count} batches. Pass "
                "`steps_per_execution=1` to have it called for each.",
                stacklevel=5,
            )

    def function(self, distiller: keras.Model, plain: Callable[..., Any]) -> Any:
        """The train function: on pages where there are any, else the one that Keras made."""
        if keras.config.backend() != "tensorflow" or not self._auto:
            return plain
        from keras_kd.backends import tensorflow as backend_tensorflow

        return backend_tensorflow.paged(
            distiller, plain, lambda: self._pages, join_arrays.batch_of_held
        )


def _steps(x: Data, batch_size: int | None, arguments: dict[str, Any]) -> int | None:
    """How many steps an epoch has, where that is known."""
    if arguments.get("steps_per_epoch"):
        return int(arguments["steps_per_epoch"])
    if are_arrays(x):
        rows = len(keras.tree.flatten(x)[0])
        split = arguments.get("validation_split")
        if split and arguments.get("validation_data") is None:
            rows = math.floor(rows * (1.0 - split))
        return -(-rows // (batch_size or 32))
    found = getattr(x, "num_batches", None)
    if found is None and hasattr(x, "cardinality"):
        found = int(x.cardinality())
    return found if found and found > 0 else None


def _weights_and_places(pairing: Pairing) -> int:
    """Over the student's layers the products of their weights with the places they act on."""
    total = 0
    for layer in pairing.student.model._flatten_layers(include_self=False):
        weights = sum(math.prod(v.shape) for v in layer.variables if len(v.shape) > 1)
        if weights and not layer._flatten_layers(include_self=False, recursive=False):
            shape = getattr(getattr(layer, "output", None), "shape", None) or ()
            total += weights * math.prod(n or 1 for n in shape[1:-1])
    return total


def _per_batch(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback of the user does anything for each batch."""
    if callback is None or type(callback).__module__.startswith(("keras.", "keras_kd.")):
        return False
    base = keras.callbacks.Callback
    names = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")
    return any(getattr(type(callback), name, None) is not getattr(base, name) for name in names)

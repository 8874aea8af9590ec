"""The distiller's own logs: means over samples, kept where Keras does not track them twice."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_kd import backends
from keras_kd.utils.data import known_shape
from keras_kd.utils.types import Tensor, Tensors


class TrainingMetrics:
    """Means of the terms of the objective and of what goes with them.

    Attributes:
        means: A `keras.metrics.Mean` by name.
        live_values: What callbacks are changing at the moment, by the name it has in the logs.
    """

    def __init__(self) -> None:
        self.means: dict[str, Any] = {}
        self.live_values: dict[str, float] = {}

    def clear(self) -> None:
        """Forget all means; a step that was traced writes into those of its time."""
        self.means = {}

    def keep(self, names: Iterable[str]) -> None:
        """Have means of these names from now on, and of no others."""
        # A count in float16 ends at 65504.
        dtype = keras.backend.result_type("float32", keras.config.floatx())
        self.means = {
            name: self.means.get(name) or keras.metrics.Mean(name=name, dtype=dtype)
            for name in names
        }

    def add(self, name: str, values: Tensor, weight: Tensor) -> None:
        """Book values with their weights; no gradient goes through the books."""
        mean, values = self.means[name], ops.stop_gradient(ops.convert_to_tensor(values))
        # The size of a batch may be a plain number.
        weight = None if weight is None else ops.convert_to_tensor(weight)
        if weight is None or len(values.shape) or len(weight.shape):
            mean.update_state(values, sample_weight=weight)
            return
        # Of two scalars there is nothing to bring to one shape, which takes as long as a layer of a
        # small student.
        weight = ops.cast(weight, mean.dtype)
        mean.total.assign_add(ops.cast(values, mean.dtype) * weight)
        mean.count.assign_add(weight)

    def add_loss(self, name: str, value: Tensor, size: Tensor) -> None:
        """Book a loss of a batch of so many samples.

        Keras divides losses by the number of replicas; a log shows the mean.
        """
        if name in self.means:
            self.add(name, value * backends.replicas(), size)

    def listed(self) -> Sequence[Any]:
        """All metrics in the order of their names."""
        return list(self.means.values())

    def of_student(self, result: Any, has_loss: bool) -> Any:
        """What a test step returns, without the logs of the teacher, which was not run.

        Args:
            result: All logs; on JAX a tuple of them and the state.
            has_loss: Whether there is a loss on the labels.
        """
        logs, *state = result if isinstance(result, tuple) else (result,)
        unused = set(self.means) - {"student_loss"}
        kept = {name: value for name, value in logs.items() if name not in unused}
        # A compiled step of TensorFlow cannot return nothing.
        kept = kept if has_loss else without_loss(kept) or kept
        return (kept, *state) if state else kept


def make(loss: Any, metrics: Any, labels: Any, outputs: Tensors | None) -> None:
    """Make the metrics of `compile`, and of its losses, which Keras does in the first step.

    TensorFlow traces a step in which variables are made a second time, which takes as long as the
    first.

    Args:
        loss: What Keras made of the losses given to `compile`; `None` where there are none.
        metrics: What it made of the metrics.
        labels: Labels, or their specifications.
        outputs: The student's outputs, symbolic; `None` where they are not known.
    """
    if outputs is None or None in map(known_shape, keras.tree.flatten(labels)):
        return
    if metrics is not None and not metrics.built:
        metrics.build(labels, outputs)
    # Keras has more ways to match labels to outputs than this one, and a mean a loss where there
    # are several.
    several = keras.tree.is_nested(outputs) and keras.tree.is_nested(labels)
    if loss is not None and not loss.built and several and _alike(labels, outputs):
        loss.build(labels, outputs)


def _alike(a: Any, b: Any) -> bool:
    """Whether two structures are the same."""
    try:
        keras.tree.assert_same_structure(a, b)
    except (TypeError, ValueError):
        return False
    return True


def without_loss(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs of an evaluation without a loss that nothing was added to.

    What is left of it, 0 or the regularizers, says nothing of the student, and callbacks would act
    on it.
    """
    return {name: value for name, value in logs.items() if name != "loss"}


def results(logs: dict[str, Any], as_dict: bool) -> Any:
    """Logs in the form in which `keras.Model.evaluate` returns them."""
    values = list(logs.values())
    return logs if as_dict else values[0] if len(values) == 1 else values

"""One side of a distillation: a model, the layers that are read of it, and its logits."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_kd.models import meaning, output_kinds
from keras_kd.models.taps import Tap, find, read, run
from keras_kd.utils.masks import keras_mask, with_keras_mask
from keras_kd.utils.types import Tensor, Tensors


class Answer(NamedTuple):
    """What one model says of one batch; a pytree that travels through any step.

    Attributes:
        output: What the model returned.
        logits: Its logits, one tensor for each flat output.
        tensors: Tapped tensors by path.
    """

    output: Any
    logits: list[Any]
    tensors: dict[str, Any]


class Reader:
    """A model, the taps that are read of it, and its logits.

    Args:
        model: A Keras model.
        side: `"teacher"` or `"student"`, for messages.
        from_logits: Whether the model's outputs are logits; `None` finds out
            from its last layers.
    """

    def __init__(self, model: keras.Model, side: str, from_logits: bool | None = None) -> None:
        self.model = model
        self.side = side
        self.from_logits = from_logits
        self.outputs = output_kinds.outputs_of(model)
        self.taps: dict[str, Tap] = {}
        self._built = False
        # What a batch showed of the outputs that the layers do not tell, by their places.
        self._seen: dict[int, str] = {}
        graph = getattr(model, "outputs", None)
        self.template: Any = output_kinds.output_template(model)
        self.shapes: list[Any] | None = (
            [tuple(t.shape) for t in keras.tree.flatten(graph)] if graph else None
        )

    def reset(self, paths: Iterable[str]) -> None:
        """Read these layers from now on.

        Raises:
            ValueError: If a path names no layer.
        """
        self.taps = {path: find(self.model, path, self.side) for path in paths}

    @property
    def settled(self) -> bool:
        """Whether the layers alone tell what the outputs are and how they are made.

        Told that outputs are probabilities, a batch still shows whether they can be.
        """
        told = self.from_logits is True or "unknown" not in self.kinds()
        return told and self.template is not None

    def inspect(self, x: Tensors) -> None:
        """Find out from a batch what the layers alone do not tell.

        Args:
            x: A concrete batch that the model reads.
        """
        if self.settled:
            return
        self._build(x)
        output, outputs = output_kinds.watch_outputs(self.model, self._own(x))
        if output_kinds.graph_outputs(self.model) is None:
            self.outputs = outputs
        flat = keras.tree.flatten(output)
        self.template = output_kinds.named(output, getattr(self.model, "output_names", None))
        self.shapes = [(None, *tensor.shape[1:]) for tensor in flat]
        for i, (tensor, made) in enumerate(zip(flat, self.outputs)):
            if made.kind == "unknown":
                values = ops.convert_to_numpy(ops.cast(tensor, "float32"))
                self._seen[i] = self._oddity(values)

    def _oddity(self, values: np.ndarray) -> str:
        """What contradicts that these are logits, or the probabilities that they are said to be."""
        if not values.size or not np.isfinite(values).all():
            return ""
        low, high = float(values.min()), float(values.max())
        if self.from_logits is None:
            return like_probabilities(values)
        if low < -1e-3 or high > 1 + 1e-3:
            return f"run from {low:.3g} to {high:.3g}"
        axes = _axes_of_sums(values)
        if axes and values.ndim - 1 not in axes:
            return f"sum to 1 over axis {axes[0]}, not over the last one"
        return ""

    def require_logits(self, output: int) -> None:
        """Raise `ValueError` unless the logits of a flat output, or its classes, can be read.

        Args:
            output: Its place among the flat outputs.
        """
        if output >= len(self.outputs):
            return
        made = self.outputs[output]
        whose = f"The outputs of the {self.side} `{self.model.name}`"
        if len(self.outputs) > 1:
            whose = f"Output {self._name(output)} of the {self.side} `{self.model.name}`"
        if not self.is_last(output):
            raise ValueError(
                f"{whose}: the classes are on axis {made.axis}, by the last layer, and they are "
                "compared along the last axis. Move them there before the softmax, with "
                "`keras.layers.Permute`, in teacher and student alike."
            )
        seen = self._seen.get(output, "")
        if self.from_logits is True and (made.kind in ("softmax", "sigmoid") or made.probabilities):
            raise ValueError(
                f"{whose}: by the last layers these are probabilities, and `from_logits=True` "
                "would take them for logits. Leave `from_logits` out, or pass `from_logits=False`."
            )
        if self.from_logits is False and (made.kind == "logits" or seen):
            why = f"the values {seen}" if seen else "the last layer makes any number"
            raise ValueError(
                f"{whose}: `from_logits=False` says that these are probabilities over the last "
                f"axis, and {why}. Leave `from_logits` out, or return such probabilities."
            )
        if self.from_logits is None and (made.probabilities or seen):
            why = "are computed from probabilities and" if made.probabilities else f"{seen} and"
            raise ValueError(
                f"{whose} {why} come from no layer whose logits can be read: they look like "
                "probabilities. Return logits, or pass `from_logits=False` to the distiller and "
                "their logarithm is distilled (`from_logits=True` if they are logits)."
            )

    def is_last(self, output: int) -> bool:
        """Whether the classes of a flat output lie on its last axis, as far as its layers tell."""
        shapes = self.shapes
        rank = len(shapes[output]) if shapes is not None and output < len(shapes) else None
        return output >= len(self.outputs) or output_kinds.is_last(self.outputs[output].axis, rank)

    def is_doubtful(self, output: int) -> bool:
        """Whether a flat output that is read as it is may be no logits."""
        made = self.outputs[output] if output < len(self.outputs) else output_kinds.UNKNOWN
        return made.probabilities or bool(self._seen.get(output))

    def _name(self, output: int) -> str:
        names = keras.tree.flatten(self.template) if self.template is not None else []
        return f"`{names[output]}`" if output < len(names) else str(output)

    def _build(self, x: Tensors) -> None:
        """Let the model build itself, in passes of its own that no tap should see."""
        if not self._built and not all(layer.built for layer in self.model._flatten_layers()):
            run(self.model, self._own(x), False)
        self._built = True

    def _own(self, x: Tensors) -> Any:
        """Of a dict of inputs those that the model declares by name; all, if it declares none."""
        declared = _declared(self.model)
        # A model reads a dict in the order of its keys, so that others would shift it.
        if isinstance(x, dict) and declared is not None and set(declared) < set(x):
            return {name: x[name] for name in declared}
        return x

    def run(self, x: Tensors, training: bool) -> Any:
        """Return what the model returns."""
        return run(self.model, self._own(x), training)

    def kinds(self) -> list[str]:
        """`"logits"`, `"softmax"`, `"sigmoid"` or `"unknown"` for each flat output."""
        return [output.kind for output in self.outputs]

    def read(self, x: Tensors, training: bool, units: Sequence[str] = ()) -> Answer:
        """Run the model once.

        Args:
            x: What the model reads.
            training: Passed on to the model.
            units: What each flat output means, as in `keras_kd.models.meaning`; values are
                read as the model returns them.

        Returns:
            Output, logits and tapped tensors.
        """
        self._build(x)
        wanted = dict(self.taps)
        values = [i for i, unit in enumerate(units) if unit == meaning.VALUES]
        if self.from_logits is None:
            for i, output in enumerate(self.outputs):
                if output.tap is not None and i not in values:
                    # No layer's path is made of a colon alone.
                    wanted[f":{i}"] = output.tap
        reading = read(self.model, self._own(x), wanted, training)
        logits = []
        for i, tensor in enumerate(keras.tree.flatten(reading.output)):
            if f":{i}" in wanted:
                tensor = _with_mask_of(reading.tensors.pop(f":{i}"), tensor)
            elif self.from_logits is False and i not in values:
                independent = i < len(units) and units[i] == meaning.INDEPENDENT
                tensor = _logits_from(tensor, independent)
            logits.append(tensor)
        return Answer(reading.output, logits, reading.tensors)


def _declared(model: keras.Model) -> list[str] | None:
    """Names of the inputs of a model that reads a dict of them; `None` for any other."""
    inputs = (
        getattr(model, "input", None) if output_kinds.graph_outputs(model) is not None else None
    )
    return list(inputs) if isinstance(inputs, dict) else None


def _logits_from(probabilities: Tensor, binary: bool) -> Any:
    """Logits of probabilities; exact but for probabilities below 1e-30."""
    p = ops.cast(probabilities, "float32")
    log_p = ops.log(ops.maximum(p, 1e-30))
    return log_p - ops.log(ops.maximum(1.0 - p, 1e-30)) if binary else log_p


def like_probabilities(values: np.ndarray) -> str:
    """What makes numbers `(batch, ..., units)` look like probabilities; empty for logits."""
    low, high = values.min(), values.max()
    if low >= 0 and high <= 1:
        return "lie between 0 and 1"
    # In percent, or unnormalized. A few logits may all be positive by chance.
    if low >= 0 and values.shape[-1] > 1 and values.size >= 8 * values.shape[-1]:
        return "are never negative"
    # Scaled, or interpolated by a kernel that overshoots. Centered logits have the sum 0.
    return "have the same sum in every row" if _axes_of_sums(values, None) else ""


def _axes_of_sums(values: np.ndarray, total: float | None = 1.0) -> list[int]:
    """The axes over which all sums of these numbers are alike.

    Args:
        values: `(batch, ..., units)`.
        total: What the sums are; `None` for any number above 0.
    """
    found = []
    for axis in range(1, values.ndim):
        sums = values.sum(axis=axis, dtype="float64")
        wanted = float(sums.mean()) if total is None else total
        several = values.shape[axis] > 1 and sums.size > 1
        if several and wanted > 0 and np.abs(sums - wanted).max() <= 1e-3 * wanted:
            found.append(axis)
    return found


def _with_mask_of(tensor: Tensor, output: Tensor) -> Any:
    """The tapped logits, carrying the mask that Keras put on the output."""
    if keras_mask(tensor) is not None:
        return tensor
    return with_keras_mask(tensor, keras_mask(output))

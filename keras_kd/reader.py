"""One side of a distillation: a model, the layers that are read of it, and its logits."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd import endings
from keras_kd.masks import keras_mask, with_keras_mask
from keras_kd.taps import Tap, find, read, run


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

    def __init__(self, model: Any, side: str, from_logits: bool | None = None) -> None:
        self.model = model
        self.side = side
        self.from_logits = from_logits
        self.outputs = endings.outputs_of(model)
        self.taps: dict[str, Tap] = {}
        self._built = False
        graph = getattr(model, "outputs", None)
        self.template: Any = endings.output_template(model)
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
        """Whether the layers alone tell what the outputs are and how they are made."""
        told = self.from_logits is not None or "unknown" not in self.kinds()
        return told and self.template is not None

    def inspect(self, x: Any) -> None:
        """Find out from a batch what the layers alone do not tell.

        Args:
            x: A concrete batch that the model reads.

        Raises:
            ValueError: If outputs look like probabilities and nothing says how
                to get their logits.
        """
        if self.settled:
            return
        self._build(x)
        output, outputs = endings.watch_outputs(self.model, self._own(x))
        if endings.graph_outputs(self.model) is None:
            self.outputs = outputs
        flat = keras.tree.flatten(output)
        self.template = endings.named(output, getattr(self.model, "output_names", None))
        self.shapes = [(None, *tensor.shape[1:]) for tensor in flat]
        if self.from_logits is not None:
            return
        for tensor, made in zip(flat, self.outputs):
            values = ops.convert_to_numpy(ops.cast(tensor, "float32"))
            if made.kind != "unknown" or not values.size:
                continue
            if values.min() >= 0 and values.max() <= 1:
                raise ValueError(
                    f"The outputs of the {self.side} `{self.model.name}` lie between 0 and 1 and "
                    "come from no layer whose logits can be read: they look like probabilities. "
                    "Return logits, or pass `from_logits=False` to the distiller and their "
                    "logarithm is distilled (`from_logits=True` if they are logits)."
                )

    def _build(self, x: Any) -> None:
        """Let the model build itself, in passes of its own that no tap should see."""
        if not self._built and not all(layer.built for layer in self.model._flatten_layers()):
            run(self.model, self._own(x), False)
        self._built = True

    def _own(self, x: Any) -> Any:
        """Of a dict of inputs those that the model declares by name; all, if it declares none."""
        declared = _declared(self.model)
        # A model reads a dict in the order of its keys, so that others would shift it.
        if isinstance(x, dict) and declared is not None and set(declared) < set(x):
            return {name: x[name] for name in declared}
        return x

    def run(self, x: Any, training: bool) -> Any:
        """Return what the model returns."""
        return run(self.model, self._own(x), training)

    def kinds(self) -> list[str]:
        """`"logits"`, `"softmax"`, `"sigmoid"` or `"unknown"` for each flat output."""
        return [output.kind for output in self.outputs]

    def read(self, x: Any, training: bool, binary: Sequence[bool] = ()) -> Answer:
        """Run the model once.

        Args:
            x: What the model reads.
            training: Passed on to the model.
            binary: For each flat output whether its units are independent.

        Returns:
            Output, logits and tapped tensors.
        """
        self._build(x)
        wanted = dict(self.taps)
        if self.from_logits is None:
            for i, output in enumerate(self.outputs):
                if output.tap is not None:
                    # No layer's path is made of a colon alone.
                    wanted[f":{i}"] = output.tap
        reading = read(self.model, self._own(x), wanted, training)
        logits = []
        for i, tensor in enumerate(keras.tree.flatten(reading.output)):
            if f":{i}" in wanted:
                tensor = _with_mask_of(reading.tensors.pop(f":{i}"), tensor)
            elif self.from_logits is False:
                tensor = _logits_from(tensor, i < len(binary) and binary[i])
            logits.append(tensor)
        return Answer(reading.output, logits, reading.tensors)


def _declared(model: Any) -> list[str] | None:
    """Names of the inputs of a model that reads a dict of them; `None` for any other."""
    inputs = getattr(model, "input", None) if endings.graph_outputs(model) is not None else None
    return list(inputs) if isinstance(inputs, dict) else None


def _logits_from(probabilities: Any, binary: bool) -> Any:
    """Logits of probabilities; exact but for probabilities below 1e-30."""
    p = ops.cast(probabilities, "float32")
    log_p = ops.log(ops.maximum(p, 1e-30))
    return log_p - ops.log(ops.maximum(1.0 - p, 1e-30)) if binary else log_p


def _with_mask_of(tensor: Any, output: Any) -> Any:
    """The tapped logits, carrying the mask that Keras put on the output."""
    if keras_mask(tensor) is not None:
        return tensor
    return with_keras_mask(tensor, keras_mask(output))

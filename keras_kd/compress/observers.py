"""The ranges of a quantization-aware model: found, read, and held."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_kd.compress.answers import check_answers
from keras_kd.compress.fake_quantize import FakeQuantize
from keras_kd.compress.quantized_layers import QuantizedLayer
from keras_kd.compress.quantized_sequences import _Stepwise
from keras_kd.models.weight_wrapper import every_layer
from keras_kd.utils.types import Data, Logs, Tensor, Tensors

_COMPARED = 32
"""Samples on which the answers with and without rounding are compared."""


def observers(model: keras.Model) -> dict[str, FakeQuantize]:
    """The layers that round activations, by path; those inside a layer after its path and a colon.

    Args:
        model: Quantization-aware model.

    Returns:
        Mapping from path to observer, in the order of the graph.
    """
    found: dict[str, FakeQuantize] = {}
    for path, layer in every_layer(model):
        if isinstance(layer, FakeQuantize):
            found.setdefault(path, layer)
        elif isinstance(layer, QuantizedLayer) and layer.linear_quantizer is not None:
            found[f"{path}:linear"] = layer.linear_quantizer
        elif isinstance(layer, _Stepwise):
            for observer in layer.observers:
                found[f"{path}:{observer.name}"] = observer
    return found


def has_activation_quantization(model: keras.Model) -> bool:
    """Whether a model rounds activations, and not weights alone.

    Args:
        model: Any Keras model.

    Returns:
        True if there is an observer.
    """
    return bool(observers(model))


def is_calibrated(model: keras.Model) -> bool:
    """Whether every observer has seen data, so that the ranges mean something.

    Args:
        model: Quantization-aware model.

    Returns:
        False if an observer is still at its initial range of -6 to 6.
    """
    return all(o.fixed is not None or float(o.seen) > 0 for o in observers(model).values())


def activation_ranges(model: keras.Model) -> dict[str, tuple[float, float]]:
    """The range of each rounded activation.

    Args:
        model: Quantization-aware model.

    Returns:
        Mapping from path to `(minimum, maximum)`; an activation's path is that of the layer that
        gives it with `_quantize` appended.
    """
    return {path: observer.limits() for path, observer in observers(model).items()}


def calibrate(model: keras.Model, data: Data, batch_size: int = 32, batches: int = 32) -> None:
    """Set the ranges of a quantization-aware model to those of data, without training.

    What earlier data gave is forgotten, also where `FreezeObservers` holds it; frozen ranges are
    set anew and then held as before.

    Args:
        model: Quantization-aware model. Its observers are changed, nothing else.
        data: Inputs as for `predict`: an array (or a list or dict of arrays for several inputs),
            or an iterable of input batches such as a `tf.data.Dataset`; of pairs `(x, y)` the
            first is taken.
        batch_size: Samples at a time, for arrays.
        batches: Most batches to read.

    Raises:
        ValueError: If the model has no observers, or the data is empty, not finite, or does not fit
            the model's inputs; if an output of the model is not finite with the ranges found, or
            its signal is lost in the rounding, with the layer where that happens. The ranges are
            unchanged then.
    """
    found = observers(model)
    if not found:
        raise ValueError(
            f"Model `{model.name}` has no activation to calibrate. Expected the result of "
            "`quantize_aware` with `activation_bits=8`."
        )
    moving = [o for o in found.values() if o.fixed is None]
    states = [v for o in moving for v in (o.minimum, o.maximum, o.seen)]
    before = [keras.ops.convert_to_numpy(v) for v in states]
    count = 0
    kept: list[Any] = []
    free = all(tensor.shape[0] is None for tensor in keras.tree.flatten(model.input))
    try:
        for batch in _batches(data, batch_size, batches):
            _check(model, batch)
            for observer in found.values():
                observer.calibrating = True
            if count == 0:
                model(batch, training=False)
                # What an earlier calibration or training saw is forgotten. Twice, because a
                # recurrent layer rounds with the ranges of the batch before.
                for observer in moving:
                    observer.seen.assign(0.0)
            model(batch, training=False)
            count += 1
            rows = sum(len(keras.tree.flatten(each)[0]) for each in kept)
            if rows == 0 or (rows < _COMPARED and free):
                kept.append(batch)
        for observer in found.values():
            observer.calibrating = False
        if kept:
            check_answers(model, keras.tree.map_structure(_joined, *kept))
    except BaseException:
        # A later batch may be the bad one, and an iterable is read only once.
        for variable, value in zip(states, before, strict=True):
            variable.assign(value)
        raise
    finally:
        for observer in found.values():
            observer.calibrating = False
    if count == 0:
        raise ValueError(
            "The calibration data is empty. Give some hundred inputs of the kind the model will "
            "see, scaled as in training."
        )


def _joined(*parts: Tensor) -> np.ndarray:
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])


def _batches(data: Data, batch_size: int, batches: int) -> Iterable[Any]:
    arrays = keras.tree.flatten(data) if isinstance(data, (dict, list, tuple, np.ndarray)) else []
    if arrays and all(hasattr(array, "shape") and len(array.shape) for array in arrays):
        length = min(len(array) for array in arrays)
        for start in range(0, min(length, batch_size * batches), batch_size):
            yield keras.tree.map_structure(lambda a, s=start: a[s : s + batch_size], data)
        return
    for index, batch in enumerate(data):
        if index == batches:
            return
        yield batch[0] if isinstance(batch, tuple) else batch


def _check(model: keras.Model, batch: Tensors) -> None:
    leaves = keras.tree.flatten(batch)
    inputs = keras.tree.flatten(model.input)
    if len(leaves) != len(inputs):
        raise ValueError(
            f"Model `{model.name}` has {len(inputs)} inputs, the calibration data {len(leaves)}."
        )
    if isinstance(batch, dict):
        leaves = [batch[key] for key in sorted(batch)]
        if isinstance(model.input, dict):
            inputs = [model.input[key] for key in sorted(model.input)]
    for leaf, tensor in zip(leaves, inputs, strict=True):
        value = keras.ops.convert_to_numpy(leaf)
        wanted = tuple(tensor.shape)
        fits = len(value.shape) == len(wanted) and all(
            b is None or a == b for a, b in zip(value.shape[1:], wanted[1:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"The calibration data has shape {value.shape}; model `{model.name}` takes "
                f"{wanted}. Give batches of inputs, without labels."
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(
                "The calibration data holds NaN or infinite values. Clean it, or leave those "
                "samples out."
            )


class FreezeObservers(keras.callbacks.Callback):
    """Hold the ranges and the folded statistics still for the last epochs.

    From `epoch` on, activation ranges and the moving statistics of folded BatchNormalization no
    longer follow the batches, so the weights settle on the integers they will have on the device.
    Ranges that no data has been through cannot be held: `calibrate` them before a fit that freezes
    them from its first epoch on.

    Args:
        epoch: First epoch, counted from 0, with frozen observers; negative counts from the end, so
            `-1` is the last epoch.

    Raises:
        ValueError: If `epoch` is no integer; when training begins, if the model has no observers,
            or they would be frozen before they have seen data.

    Examples:
        >>> callback = FreezeObservers(epoch=-2)

    Reference:
        - [Krishnamoorthi, 2018](https://arxiv.org/abs/1806.08342), section 3.2.2
    """

    def __init__(self, epoch: int = -1) -> None:
        super().__init__()
        if isinstance(epoch, bool) or not isinstance(epoch, int):
            raise ValueError(f"`epoch` must be an integer. Received: epoch={epoch!r}.")
        self.epoch = epoch

    def on_train_begin(self, logs: Logs = None) -> None:
        """Look for observers."""
        self._begun = False
        if not self._named("observer_frozen"):
            raise ValueError(
                "FreezeObservers found no observers. Expected a model made by `quantize_aware`, or "
                "a distiller whose student is one."
            )

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Freeze from the given epoch on, and thaw before it."""
        first = self.epoch
        if first < 0:
            first += int((self.params or {}).get("epochs") or 0)
        freeze = epoch >= first
        if freeze and not self._begun:
            unseen = sum(float(v) == 0.0 for v in self._named("observer_seen"))
            if unseen:
                raise ValueError(
                    f"FreezeObservers(epoch={self.epoch}) would hold {unseen} activation ranges "
                    "from the first epoch on, before any data has been seen. Pass `calibration` "
                    "to `quantize_aware`, call `calibrate`, or freeze at a later epoch."
                )
        self._begun = True
        for flag in self._named("observer_frozen"):
            flag.assign(1.0 if freeze else 0.0)

    def _named(self, name: str) -> list[Any]:
        # By name, so that it works for a model around the quantized one, such as a distiller.
        return [v for v in self.model.variables if v.name == name]

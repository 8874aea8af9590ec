"""Whether a model still answers once its activations are rounded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_kd.compress.fake_quantize import FakeQuantize
from keras_kd.compress.tflite_rounding import without_rounding
from keras_kd.models.graph import is_graph
from keras_kd.models.taps import calls, run
from keras_kd.utils.types import Tensor, Tensors

LEAST_DECIBELS = 5.0
"""Signal to rounding noise below which an output has lost its signal."""

_LEAST_SPREAD = 0.05
"""Spread of an output over the samples, relative to its size, that counts as a signal."""

_CAUSE = (
    " Often features of very different size share one range there: scale them outside the model, "
    "or give each its own input. Or leave what makes these values float with "
    "`annotations={...: Annotation(float=True)}`."
)


def check_answers(model: keras.Model, batch: Tensors) -> None:
    """Compare the answers of a calibrated model with those that it gives without rounding.

    The signal is how an output varies over the samples (and positions) of each of its channels; the
    noise is what rounding activations changes. Rounded weights are in both.

    Args:
        model: Quantization-aware model, calibrated.
        batch: Inputs as the model takes them, a batch.

    Raises:
        ValueError: If an output is not finite, or its signal is less than 5 dB above the noise.
            The message names the layer where it is lost.
    """
    with without_rounding():
        exact = [_array(tensor) for tensor in keras.tree.flatten(run(model, batch, False))]
    rounded = [_array(tensor) for tensor in keras.tree.flatten(run(model, batch, False))]
    names = list(getattr(model, "output_names", [])) or [f"output {i}" for i in range(len(exact))]
    for index, (was, is_now) in enumerate(zip(exact, rounded, strict=True)):
        if was.dtype.kind != "f":
            continue
        name = names[index] if index < len(names) else f"output {index}"
        if not np.isfinite(was).all():
            where = _first(model, batch, lambda a, b: not np.isfinite(a).all())
            raise ValueError(
                f"Output `{name}` of `{model.name}` is not finite for the calibration data, before "
                f"any rounding{_at(where)}. Mend the model or the data first."
            )
        if not np.isfinite(is_now).all():
            where = _first(model, batch, lambda a, b: np.isfinite(a).all() > np.isfinite(b).all())
            raise ValueError(
                f"Output `{name}` of `{model.name}` is no longer finite once activations are "
                f"rounded to 8 bits{_at(where)}: a small value became zero before it." + _CAUSE
            )
        if spread(was) < _LEAST_SPREAD or decibels(was, is_now) >= LEAST_DECIBELS:
            continue
        where = _first(model, batch, _loses)
        message = (
            f"Output `{name}` of `{model.name}` loses its signal once activations are rounded to 8 "
            f"bits ({decibels(was, is_now):.1f} dB of signal to noise on the calibration data, "
            f"expected {LEAST_DECIBELS:.0f} or more){_at(where)}."
        )
        if _prescribed(model, name):
            # An untrained softmax over many classes is below TFLite's step of 1/256.
            warnings.warn(message + " TFLite prescribes the range of this output.", stacklevel=3)
        else:
            raise ValueError(message + _CAUSE)


def decibels(exact: np.ndarray, rounded: np.ndarray) -> float:
    """Ratio of what varies in an output to what rounding changes.

    `10 log10(sum (e - mean e)^2 / sum (r - e)^2)`, the mean taken for each channel (last axis).

    Args:
        exact: Values without rounding.
        rounded: Values with it, of the same shape.

    Returns:
        Decibels; infinite without noise.
    """
    signal, noise = _powers(exact, rounded)
    if noise.sum() == 0.0:
        return float("inf")
    return float(10.0 * np.log10(max(signal.sum(), 1e-300) / noise.sum()))


def spread(values: np.ndarray) -> float:
    """Standard deviation over samples, relative to the root mean square.

    Args:
        values: Array, samples first and channels last.

    Returns:
        A number from 0 to 1; 0 for a single sample.
    """
    signal, _ = _powers(values, values)
    total = float(np.sum(values.astype("float64") ** 2))
    return float(np.sqrt(signal.sum() / total)) if total > 0.0 else 0.0


def _powers(exact: np.ndarray, rounded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signal and noise of each channel."""
    channels = exact.shape[-1] if exact.ndim > 1 else 1
    was = exact.reshape(-1, channels).astype("float64")
    is_now = rounded.reshape(-1, channels).astype("float64")
    signal = np.sum((was - was.mean(0, keepdims=True)) ** 2, axis=0)
    return signal, np.sum((is_now - was) ** 2, axis=0)


def _loses(exact: np.ndarray, rounded: np.ndarray) -> bool:
    """Whether most channels of a layer's output are lost, whatever their size."""
    if not (np.isfinite(exact).all() and np.isfinite(rounded).all()):
        return True
    signal, noise = _powers(exact, rounded)
    varies = signal > 0.0
    if not varies.any():
        return False
    shares = np.minimum(noise[varies] / signal[varies], 1.0)
    return bool(np.mean(shares) > 10.0 ** (-LEAST_DECIBELS / 10.0))


def _first(
    model: keras.Model, batch: Tensors, bad: Callable[[np.ndarray, np.ndarray], bool]
) -> str | None:
    """Path of the first layer whose output is bad, in the order in which the layers run."""
    paths = {id(layer): path for path, layer in _operations(model, "")}
    layers = [layer for _, layer in _operations(model, "")]
    with without_rounding():
        exact = calls(model, batch, layers)[1]
    rounded = calls(model, batch, layers)[1]
    if len(exact) != len(rounded):
        return None
    for (layer, was), (_, is_now) in zip(exact, rounded, strict=True):
        pairs = zip(keras.tree.flatten(was), keras.tree.flatten(is_now), strict=True)
        for a, b in ((_array(one), _array(other)) for one, other in pairs):
            if a.dtype.kind == "f" and a.ndim > 0 and bad(a, b):
                path = paths[id(layer)]
                return path.removesuffix("_quantize") if isinstance(layer, FakeQuantize) else path
    return None


def _operations(model: keras.Model, prefix: str) -> Iterator[tuple[str, Any]]:
    for layer in model.operations:
        if is_graph(layer):
            yield from _operations(layer, f"{prefix}{layer.name}/")
        elif not isinstance(layer, keras.layers.InputLayer):
            yield prefix + layer.name, layer


def _prescribed(model: keras.Model, name: str) -> bool:
    """Whether the last rounding of an output has a range that TFLite prescribes."""
    return any(
        isinstance(layer, FakeQuantize) and layer.name == f"{name}_quantize" and layer.fixed
        for layer in model.layers
    )


def _at(where: str | None) -> str:
    return "" if where is None else f", first in layer `{where}`"


def _array(tensor: Tensor) -> np.ndarray:
    array = keras.ops.convert_to_numpy(tensor)
    # bfloat16 is no type of NumPy's own.
    return array.astype("float32") if array.dtype.kind not in "biuf" else array

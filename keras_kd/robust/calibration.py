"""Whether a model is as sure as it is right, and a temperature that makes it so.

The temperature goes into the kernel and bias of the last layer, so that the model stays as it was
in layers and decisions and is exported like any other. May import: NumPy, SciPy, the models' graph.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.models.graph import Graph, is_graph
from keras_kd.robust.classifier import Classifier, labels_of
from keras_kd.utils import checks
from keras_kd.utils.types import Tensor

_TEMPERATURES = (0.05, 20.0)


class Reliability(NamedTuple):
    """What a reliability diagram shows, an entry for each bin.

    Attributes:
        edges: `(bins + 1,)` of the confidence; a bin is `(lower, upper]`.
        count: Rows in the bin.
        confidence: Mean confidence of its rows; NaN where there is none.
        accuracy: Share of them that is right; NaN where there is none.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    def error(self) -> float:
        """The mean distance of confidence from accuracy, by rows."""
        gap = np.abs(self.confidence - self.accuracy)
        return float(np.nansum(gap * self.count) / self.count.sum())


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, equal_mass: bool = False
) -> float:
    """Measure by how much confidence and accuracy differ: `sum_b n_b / n * |acc_b - conf_b|`.

    The confidence is the greatest probability of a row, and bins are `(lower, upper]`. On few rows
    the figure is too high, since each bin's accuracy is off by chance: compare models on the same
    rows.

    Args:
        probabilities: `(rows, classes)`; of one unit `(rows, 1)` or `(rows,)`.
        labels: Class numbers `(rows,)`, or one-hot.
        bins: How many.
        equal_mass: Whether bins hold equally many rows, in place of equally wide ones.

    Returns:
        A share in `[0, 1]`.

    Raises:
        TypeError: If `bins` is no whole number.
        ValueError: If rows are no probabilities, or labels do not fit.

    Examples:
        >>> expected_calibration_error([[0.9, 0.1], [0.9, 0.1]], [0, 1])
        0.4

    Reference:
        - [Naeini et al., 2015](https://ojs.aaai.org/index.php/AAAI/article/view/9602)
        - [Guo et al., 2017](https://arxiv.org/abs/1706.04599), equation 3
    """
    return reliability(probabilities, labels, bins, equal_mass).error()


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, equal_mass: bool = False
) -> Reliability:
    """The bins behind `expected_calibration_error`, with the same arguments."""
    p = _probabilities(probabilities)
    y = labels_of(labels, len(p), p.shape[1], "labels")
    checks.whole("bins", bins)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    if equal_mass:
        edges = np.quantile(confidence, np.linspace(0, 1, bins + 1))
        # Equal confidences share a bin, by their order where there are too many for one.
        order = np.argsort(confidence, kind="stable")
        place = np.empty(len(p), "int64")
        place[order] = np.arange(len(p)) * bins // len(p)
    else:
        edges = np.linspace(0, 1, bins + 1)
        place = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [np.bincount(place, w, bins) / count for w in (confidence, right)]
    return Reliability(edges, count, *means)


def _probabilities(values: np.ndarray) -> np.ndarray:
    p = checks.as_array(values).astype("float64")
    if p.ndim == 1 or (p.ndim == 2 and p.shape[1] == 1):
        p = p.reshape(-1, 1)
        p = np.concatenate([1 - p, p], axis=1)
    if p.ndim != 2 or not len(p):
        raise ValueError(
            f"`probabilities` are (rows, classes). Received: shape {np.shape(values)}."
        )
    off = np.abs(p.sum(axis=1) - 1).max()
    if not np.isfinite(p).all() or p.min() < -1e-3 or p.max() > 1 + 1e-3 or off > 1e-2:
        raise ValueError(
            f"`probabilities` lie in [0, 1] and sum to 1 in each row. Received: values from "
            f"{p.min():.4g} to {p.max():.4g}, sums off by up to {off:.2g}. Pass the softmax of "
            "logits."
        )
    return p


class Sureness(NamedTuple):
    """How sure and how right a model is.

    Attributes:
        ece: Expected calibration error, 15 equally wide bins.
        ece_low: Of its 95 % bootstrap interval the lower end.
        ece_high: The upper end.
        ece_equal_mass: Expected calibration error, 15 bins of equally many rows.
        nll: Mean negative logarithm of the label's probability, in nats.
        brier: Mean squared distance of the probabilities from the one-hot label.
    """

    ece: float
    ece_low: float
    ece_high: float
    ece_equal_mass: float
    nll: float
    brier: float


def sureness(logits: np.ndarray, labels: np.ndarray, seed: int = 0, draws: int = 200) -> Sureness:
    """Measure how sure and how right logits are.

    Args:
        logits: `(rows, classes)`.
        labels: `(rows,)` class numbers.
        seed: Of the bootstrap.
        draws: Of the bootstrap.
    """
    log_p = log_softmax(logits)
    p, number = np.exp(log_p), np.arange(len(labels))
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(draws):
        rows = rng.integers(0, len(labels), len(labels))
        again.append(expected_calibration_error(p[rows], labels[rows]))
    truth = np.zeros_like(p)
    truth[number, labels] = 1
    low, high = np.quantile(again, [0.025, 0.975])
    return Sureness(
        ece=expected_calibration_error(p, labels),
        ece_low=float(low),
        ece_high=float(high),
        ece_equal_mass=expected_calibration_error(p, labels, equal_mass=True),
        nll=float(-log_p[number, labels].mean()),
        brier=float(np.square(p - truth).sum(axis=1).mean()),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities, in double precision."""
    from scipy.special import log_softmax as of_scipy

    return np.asarray(of_scipy(np.asarray(logits, "float64"), axis=-1))


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature with the least negative log-likelihood of held-out rows.

    Args:
        logits: `(rows, classes)`.
        labels: `(rows,)` class numbers.

    Returns:
        `argmin_T -mean log softmax(z / T)[y]` in `[0.05, 20]`.
    """
    from scipy.optimize import minimize_scalar

    number = np.arange(len(labels))

    def nll(log_t: float) -> float:
        return float(-log_softmax(logits / math.exp(log_t))[number, labels].mean())

    bounds = tuple(math.log(t) for t in _TEMPERATURES)
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    temperature = math.exp(float(found.x))
    if not _TEMPERATURES[0] * 1.01 < temperature < _TEMPERATURES[1] / 1.01:
        warnings.warn(
            f"The best temperature is at the end of its range, {temperature:.3g}: the rows are too "
            "few or too easy to tell it, as where every decision is right. Calibrate on more "
            "held-out rows.",
            UserWarning,
            stacklevel=3,
        )
    return temperature


def calibrate(model: keras.Model, x: Tensor, y: np.ndarray | None, batch_size: int = 256) -> Any:
    """Make a model as sure as it is right, and decide as before.

    The logits are divided by one temperature, that of the least negative log-likelihood of the
    given rows, by dividing kernel and bias of the last layer. Do it before an export, whose int8
    files are then calibrated too, and measure the file: `evaluate(file, ...)`.

    Args:
        model: A Functional or Sequential model with one input and one output: logits, or
            probabilities that end in a softmax or sigmoid. It stays as it is.
        x: Held-out inputs, not those of the training.
        y: Their labels.
        batch_size: Rows at once.

    Returns:
        A new model of the same layers.

    Raises:
        TypeError: If it is no Keras 3 model.
        ValueError: If its last layer is none that can hold a temperature, or labels do not fit.

    Examples:
        >>> calibrated = calibrate(student, x_validation, y_validation)

    Reference:
        - [Guo et al., 2017](https://arxiv.org/abs/1706.04599), section 4.2
    """
    rows = checks.as_array(x)
    if not len(rows):
        raise ValueError("`x` has no rows to calibrate on.")
    checks.require_finite(rows, "x")
    checks.whole("batch_size", batch_size)
    classifier = Classifier(model, rows[:32])
    if not is_graph(model):
        raise ValueError(
            f"The temperature goes into the last layer, and the layers of `{model.name}`, a "
            f"{type(model).__name__}, are not known. Pass a Functional or Sequential model."
        )
    last_layer(model)
    labels = labels_of(y, len(rows), classifier.classes)
    logits = classifier.predict(rows, batch_size)
    temperature = best_temperature(logits, labels)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    layer = last_layer(copy)
    layer.kernel.assign(layer.kernel / temperature)
    if layer.bias is not None:
        layer.bias.assign(layer.bias / temperature)
    _require_folded(copy, rows[:batch_size], logits[:batch_size] / temperature)
    return copy


def _require_folded(model: keras.Model, rows: np.ndarray, logits: np.ndarray) -> None:
    """Raise `ValueError` unless a model answers as its logits by the temperature would."""
    found = Classifier(model, rows[:32]).predict(rows, len(rows))
    apart = np.abs(np.exp(log_softmax(found)) - np.exp(log_softmax(logits))).max()
    exact = model.compute_dtype == "float32"
    if apart > (1e-3 if exact else 3e-2):
        raise ValueError(
            f"The temperature went into the last kernel of `{model.name}`, and its probabilities "
            f"are off by up to {apart:.3g} of what the logits would give: behind that kernel is "
            "more than one softmax or sigmoid at the very end, or it is used more than once."
        )


# Behind the last kernel these hand a factor on, and so does a softmax's input.
_PASSING = (
    keras.layers.Activation,
    keras.layers.Softmax,
    keras.layers.Dropout,
    keras.layers.Identity,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras.layers.Permute,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
)
_HOLDING = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)
_ENDS = (keras.activations.linear, keras.activations.softmax, keras.activations.sigmoid)


def last_layer(model: keras.Model) -> Any:
    """The layer whose kernel makes the logits.

    Args:
        model: A Functional or Sequential model.

    Raises:
        ValueError: If it is none that can hold a temperature.
    """
    for layer in _from_the_end(model):
        activation = getattr(layer, "activation", keras.activations.linear)
        if isinstance(layer, _PASSING) and activation in _ENDS:
            continue
        plain = not getattr(layer, "lora_enabled", False) and not getattr(
            layer, "quantization_mode", None
        )
        if type(layer) in _HOLDING and activation in _ENDS and plain:
            return layer
        raise ValueError(
            f"The temperature goes into the last kernel of `{model.name}`, and its logits come "
            f"from `{layer.name}`, a {type(layer).__name__}, which cannot hold it. End the model "
            "in a Dense or convolutional layer without LoRA or quantization; calibrate before it "
            "is quantized."
        )
    raise ValueError(f"`{model.name}` has no layer with a kernel.")


def _from_the_end(model: keras.Model) -> Iterator[Any]:
    """The layers from the output on backwards, as long as each reads one tensor."""
    graph = Graph(model)
    name = graph.output_names[0]
    while True:
        layer = graph.layers[name]
        if is_graph(layer):
            yield from _from_the_end(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer
        if len(graph.producers[name]) != 1:
            return
        name = graph.producers[name][0]

"""Weight clustering: each kernel holds a few shared values, which go on training."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_kd.compress.selection import chosen_layers
from keras_kd.models.folding import require_built
from keras_kd.models.graph import Graph, copy_built, rebuild
from keras_kd.models.weight_wrapper import WeightWrapper, effective_weights, kernels
from keras_kd.utils.types import Shape, Tensor


def kmeans(values: np.ndarray, clusters: int, iterations: int = 50) -> np.ndarray:
    """Centers of one-dimensional k-means, by Lloyd's iteration from evenly spaced quantiles.

    Args:
        values: Float array of any shape.
        clusters: Number of centers.
        iterations: Most iterations to run; it stops when no center moves.

    Returns:
        Sorted float64 array of at most `clusters` distinct centers.

    Examples:
        >>> kmeans(np.array([0.0, 0.1, 1.0, 1.1]), 2)
        array([0.05, 1.05])

    Reference:
        - [Lloyd, 1982](https://doi.org/10.1109/TIT.1982.1056489)
    """
    points = np.sort(np.asarray(values, "float64").ravel())
    distinct = np.unique(points)
    if len(distinct) <= clusters:
        return distinct
    # Half of the centers by quantiles, where the weights are many; half evenly over the range,
    # where the few large ones are.
    half = clusters // 2
    quantiles = np.quantile(points, (np.arange(clusters - half) + 0.5) / (clusters - half))
    spread = np.linspace(points[0], points[-1], half) if half else np.empty(0)
    centers = np.unique(np.concatenate([quantiles, spread]))
    totals = np.concatenate([[0.0], np.cumsum(points)])
    for _ in range(iterations):
        # On a line a cluster is what lies between the midpoints of neighboring centers.
        edges = np.searchsorted(points, (centers[1:] + centers[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(points)]])
        counts = np.diff(edges)
        sums = np.diff(totals[edges])
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return np.unique(centers)


@keras.saving.register_keras_serializable(package="keras_kd")
class ClusteredLayer(WeightWrapper):
    """A layer each of whose kernels takes its values from a few trained centers.

    `kernel' = centers[assignment]`: the gradient of a center is the sum of the gradients of its
    members. The assignment is fixed. With `keep_zeros` the first center is zero and does not move.

    Args:
        layer: Layer with kernels, or a wrapper of one.
        clusters: Number of centers for each kernel.
        keep_zeros: Whether a center is reserved for zero.
        weights: Names of the variables to cluster; None for the usual kernels.
        **kwargs: Arguments of `keras.layers.Layer`.

    Reference:
        - [Han et al., 2016](https://arxiv.org/abs/1510.00149), section 3
    """

    def __init__(
        self,
        layer: keras.Layer,
        clusters: int = 16,
        keep_zeros: bool = False,
        weights: tuple[str, ...] | None = None,
        **kwargs: object,
    ) -> None:
        # Centers of a frozen layer are frozen.
        kwargs.setdefault("trainable", layer.trainable)
        super().__init__(layer, **kwargs)
        self.clusters = clusters
        self.keep_zeros = keep_zeros
        self.weight_names = None if weights is None else tuple(weights)

    def build(self, input_shape: Shape) -> None:
        """Build the layer, and the centers and assignment of each kernel."""
        super().build(input_shape)
        self.centers, self.assignments = [], []
        for index, kernel in enumerate(kernels(self.layer, self.weight_names)):
            # What is trained are the centers; the kernel itself no longer takes part.
            kernel.trainable = False
            centers = self.add_weight(
                shape=(self.clusters,), initializer="zeros", name=f"centers_{index}"
            )
            assignment = self.add_weight(
                shape=kernel.shape,
                initializer="zeros",
                dtype="int32",
                trainable=False,
                name=f"assignment_{index}",
            )
            if kernel.regularizer is not None:
                # Keras asks trained variables only, so the centers answer for the kernel.
                centers.regularizer = _OfKernel(kernel.regularizer, assignment)
            self.centers.append(centers)
            self.assignments.append(assignment)

    @property
    def trainable(self) -> bool:
        """Whether the centers are trained; setting it never thaws the kernels."""
        return bool(keras.layers.Layer.trainable.__get__(self))

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.__set__(self, value)
        for kernel in kernels(self.layer, self.weight_names) if self.built else ():
            kernel.trainable = False

    def start(self) -> None:
        """Cluster the wrapped layer's present weights."""
        values = {id(v): t for v, t in effective_weights(self.layer, False)}
        for index, kernel in enumerate(kernels(self.layer, self.weight_names)):
            value = ops.convert_to_numpy(values.get(id(kernel), kernel))
            centers = self._centers(value)
            middle = (centers[1:] + centers[:-1]) / 2
            order = np.searchsorted(middle, value)
            if self.keep_zeros:
                order = np.where(value == 0.0, np.argmin(np.abs(centers)), order)
                zero_first = np.argsort(centers != 0.0, kind="stable")
                order = np.argsort(zero_first)[order]
                centers = centers[zero_first]
            # Fewer distinct values than clusters: the rest repeat the last and have no member.
            padded = np.pad(centers, (0, self.clusters - len(centers)), mode="edge")
            self.centers[index].assign(padded.astype("float32"))
            self.assignments[index].assign(order.astype("int32"))

    def _centers(self, value: np.ndarray) -> np.ndarray:
        if not self.keep_zeros:
            return kmeans(value, self.clusters)
        others = value[value != 0.0]
        found = kmeans(others, self.clusters - 1) if others.size else np.empty(0)
        return np.unique(np.concatenate([found[found != 0.0], [0.0]]))

    def effective(self, training: bool | None) -> list[tuple[Any, Tensor]]:
        """Each kernel as looked up in its centers."""
        clustered = kernels(self.layer, self.weight_names)
        # Pairs of a mask inside are not needed, its zeros being a center, but asking for them lets
        # its schedule count the step.
        inner = effective_weights(self.layer, training)
        pairs = [(v, t) for v, t in inner if all(v is not k for k in clustered)]
        for index, kernel in enumerate(clustered):
            centers = ops.convert_to_tensor(self.centers[index])
            if self.keep_zeros:
                # The reserved center takes no gradient.
                centers = centers * ops.cast(ops.arange(self.clusters) > 0, centers.dtype)
            value = ops.take(centers, ops.convert_to_tensor(self.assignments[index]), axis=0)
            pairs.append((kernel, value))
        return pairs

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "clusters": self.clusters,
            "keep_zeros": self.keep_zeros,
            "weights": self.weight_names,
        }


class _OfKernel:
    """A kernel's regularizer as a function of its centers."""

    def __init__(self, regularizer: keras.Regularizer, assignment: Tensor) -> None:
        self.regularizer = regularizer
        self.assignment = assignment

    def __call__(self, centers: Tensor) -> Tensor:
        values = ops.convert_to_tensor(centers)
        kernel = ops.take(values, ops.convert_to_tensor(self.assignment), axis=0)
        return self.regularizer(kernel)


def cluster(
    model: keras.Model,
    clusters: int = 16,
    layers: list[str] | None = None,
    keep_zeros: bool | None = None,
) -> keras.Model:
    """Make a copy of a model in which every kernel has only a few distinct values.

    The values are found by k-means on the present weights and go on training; which weight has
    which value is fixed. `finalize` writes them into plain layers, whose file shrinks when
    compressed: with 16 values a weight carries at most 4 bits.

    Args:
        model: Built Functional or Sequential model, plain or pruned. It is not changed.
        clusters: Distinct values for each kernel, 2 or more.
        layers: Names (paths) of the layers to cluster; None for all with kernels.
        keep_zeros: Whether zeros stay zero, with one of the values kept for them. Defaults to
            those layers of which a tenth or more is zero, such as pruned ones.

    Returns:
        New Functional model of the same outputs up to the rounding to the centers, not compiled.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If the model's graph is not known, `clusters` is below 2, or a name in
            `layers` is unknown.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
        >>> small = finalize(cluster(model, clusters=4))
        >>> len(np.unique(small.layers[-1].kernel)) <= 4
        True

    Reference:
        - [Han et al., 2016](https://arxiv.org/abs/1510.00149), section 3
    """
    require_built(model)
    if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 2:
        raise ValueError(f"`clusters` must be an integer of at least 2. Received: {clusters!r}.")
    chosen = chosen_layers(model, layers, "cluster")

    def make(layer: keras.Layer, graph: Graph) -> Any:
        new = copy_built(layer)
        if id(layer) not in chosen:
            return new
        zeros = keep_zeros
        if zeros is None:
            zeros = any(zero_share(layer, kernel) >= 0.1 for kernel in kernels(layer))
        wrapper = ClusteredLayer(new, clusters, keep_zeros=zeros)
        wrapper.build_from_config({"layer": None})
        wrapper.start()
        return wrapper

    return rebuild(model, make)


def is_clustered(layer: keras.Layer) -> bool:
    """Whether a layer is, or wraps, a `ClusteredLayer`.

    Args:
        layer: Layer or wrapper.

    Returns:
        True if its kernels consist of shared values.
    """
    while isinstance(layer, WeightWrapper):
        if isinstance(layer, ClusteredLayer):
            return True
        layer = layer.layer
    return False


def zero_share(layer: keras.Layer, kernel: keras.Variable) -> float:
    """The fraction of a kernel that is zero as the layer uses it.

    Args:
        layer: Built layer or wrapper.
        kernel: One of its `kernels`.

    Returns:
        Fraction from 0 to 1.
    """
    values = {id(v): t for v, t in effective_weights(layer, False)}
    value = ops.convert_to_numpy(values.get(id(kernel), kernel))
    return float(np.mean(value == 0.0))

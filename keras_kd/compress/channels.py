"""Whole channels removed: a smaller dense model whose shapes fit together again."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import keras
import numpy as np

from keras_kd.compress.selection import chosen_layers
from keras_kd.models.folding import CHANNEL_AXIS
from keras_kd.models.graph import OUTPUT, Graph, copy_layer, give_weights, is_graph

SLICED = {
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    keras.layers.Dense,
}
"""Layers that lose output channels."""

DEPTHWISE = {keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D}

ELEMENTWISE = {"Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"}
"""Layers and operations whose inputs must keep the same channels."""

PER_CHANNEL = {
    "Activation",
    "ActivityRegularization",
    "AlphaDropout",
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "BatchNormalization",
    "Cropping1D",
    "Cropping2D",
    "Cropping3D",
    "Dropout",
    "ELU",
    "GaussianDropout",
    "GaussianNoise",
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalAveragePooling3D",
    "GlobalMaxPooling1D",
    "GlobalMaxPooling2D",
    "GlobalMaxPooling3D",
    "Identity",
    "LeakyReLU",
    "MaxPooling1D",
    "MaxPooling2D",
    "MaxPooling3D",
    "ReLU",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "UpSampling1D",
    "UpSampling2D",
    "UpSampling3D",
    "ZeroPadding1D",
    "ZeroPadding2D",
    "ZeroPadding3D",
}
"""Layers that leave each channel where it is."""


class _Channels:
    """Which channels of which tensors are the same channel, and which must stay.

    Every output channel of a layer that makes new channels is an atom; a tensor is an array of
    atoms along its last axis. An elementwise sum makes its inputs' atoms one (union-find).
    """

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.stays: list[bool] = []
        self.scores: list[float] = []

    def new(self, count: int, stays: bool = False) -> np.ndarray:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        self.stays.extend([stays] * count)
        self.scores.extend([0.0] * count)
        return np.arange(first, first + count)

    def root(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        if one != other:
            self.parent[other] = one
            self.stays[one] |= self.stays[other]
            self.scores[one] += self.scores[other]

    def hold(self, atoms: np.ndarray) -> None:
        for atom in atoms:
            self.stays[self.root(int(atom))] = True


def remove_channels(
    model: keras.Model, fraction: float, layers: list[str] | None = None
) -> keras.Model:
    """Make a plain, smaller model by removing the weakest channels of its layers.

    A channel's weight is the sum of squares of the kernels that produce it, each kernel's largest
    being 1; where channels are added they are removed together or not at all. Channels reach
    through BatchNormalization, activations, pooling, depthwise convolutions, sums, concatenations
    and flattening, up to the layers that read them. What the outputs of the model, grouped
    convolutions, recurrent and attention layers, nested models and custom layers need stays.

    Args:
        model: Built Functional or Sequential model, channels last. It is not changed.
        fraction: Fraction of each layer's channels to remove, 0 to 1 (excluded); one at least
            remains.
        layers: Names of the layers to take channels from; None for all that can give some.

    Returns:
        New Functional model without masks or wrappers, not compiled.

    Raises:
        ValueError: If the model's graph is not known, a name is unknown, or no layer can lose a
            channel.

    Reference:
        - [Li et al., 2017](https://arxiv.org/abs/1608.08710)
    """
    chosen = chosen_layers(model, layers, "prune")
    graph = Graph(model)
    inside = sorted(path for path in chosen.values() if "/" in path)
    if inside and (layers is not None or len(inside) == len(chosen)):
        raise ValueError(
            f"`{inside[0]}` lies in a model nested in `{model.name}`, whose shape stays as it is. "
            "Name layers of the outer model, remove the channels of the nested model by itself, or "
            "build the model without nesting."
        )
    channels = _Channels()
    seen: dict[str, np.ndarray | None] = {}
    inputs: dict[str, np.ndarray | None] = {}
    groups: dict[str, np.ndarray] = {}
    for name in _in_order(graph):
        layer = graph.layers[name]
        sources = [seen[p] for p in graph.producers[name]]
        inputs[name] = sources[0] if len(sources) == 1 else None
        seen[name] = _propagate(channels, graph, name, layer, sources)
        if type(layer) in SLICED and graph.called_once(name) and seen[name] is not None:
            if id(layer) not in chosen:
                channels.hold(seen[name])
            else:
                groups[name] = seen[name]
        if OUTPUT in graph.consumers[name] and seen[name] is not None:
            channels.hold(seen[name])
    removed = _weakest(channels, groups, fraction)
    if not removed:
        raise ValueError(
            f"No layer of `{model.name}` can lose a channel: those left are outputs of the model, "
            "or are read by layers whose shape is fixed (grouped convolutions, attention, "
            "recurrent or nested models)."
            + (f" Those in nested models, as `{inside[0]}`, are not touched." if inside else "")
        )

    def kept(atoms: np.ndarray) -> np.ndarray:
        return np.array([channels.root(int(a)) not in removed for a in atoms], bool)

    finish: list[tuple[Any, list[np.ndarray]]] = []

    def clone(layer: keras.Layer) -> Any:
        name = layer.name
        before = inputs[name]
        after = seen[name]
        new, weights = _sliced(
            layer,
            None if before is None else kept(before),
            None if after is None else kept(after),
        )
        if weights is not None:
            finish.append((new, weights))
        return new

    smaller = keras.models.clone_model(
        graph.model, input_tensors=graph.fresh_inputs(), clone_function=clone
    )
    for layer, weights in finish:
        give_weights(layer, weights)
    return smaller


def _in_order(graph: Graph) -> list[str]:
    """Layer names, each after those it reads."""
    order: list[str] = []
    done: set[str] = set()
    pending = list(graph.layers)
    while pending:
        waiting = []
        for name in pending:
            if all(p in done for p in graph.producers[name]):
                order.append(name)
                done.add(name)
            else:
                waiting.append(name)
        pending = waiting
    return order


def _propagate(
    channels: _Channels,
    graph: Graph,
    name: str,
    layer: keras.Layer,
    sources: list[np.ndarray | None],
) -> np.ndarray | None:
    """The atoms of a layer's output; None where they are not followed."""
    kind = type(layer).__name__

    def fixed() -> np.ndarray | None:
        for atoms in sources:
            if atoms is not None:
                channels.hold(atoms)
        shape = getattr(getattr(layer, "output", None), "shape", None)
        if shape is None or len(shape) < 2 or not isinstance(shape[-1], int):
            return None
        return channels.new(shape[-1], stays=True)

    if not sources or not graph.called_once(name) or any(atoms is None for atoms in sources):
        return fixed()
    first = sources[0]
    if layer.get_config().get("data_format", "channels_last") != "channels_last":
        return fixed()
    if type(layer) in SLICED and len(sources) == 1 and layer.get_config().get("groups", 1) == 1:
        weights = layer.get_weights()
        kernel = weights[1 if "Separable" in kind else 0]
        axis = (CHANNEL_AXIS[type(layer)] or -1) % kernel.ndim
        atoms = channels.new(kernel.shape[axis])
        energy = np.sum(kernel**2, axis=tuple(i for i in range(kernel.ndim) if i != axis))
        for atom, value in zip(atoms, energy / max(float(energy.max()), 1e-30), strict=True):
            channels.scores[atom] += float(value)
        return atoms
    if type(layer) in DEPTHWISE:
        return np.repeat(first, layer.depth_multiplier)
    rank = len(graph.input_shape(name) or ())
    if kind == "BatchNormalization" and layer.axis % rank != rank - 1:
        return fixed()
    if kind in PER_CHANNEL and len(sources) == 1:
        return first
    if kind in ELEMENTWISE and len(sources) > 1 and _no_constants(graph, name):
        if len({len(atoms) for atoms in sources if atoms is not None}) > 1:
            return fixed()
        for atoms in sources[1:]:
            for one, other in zip(first, atoms, strict=True):  # type: ignore[arg-type]
                channels.join(int(one), int(other))
        return first
    if kind == "Concatenate" and layer.axis % rank == rank - 1:
        return np.concatenate([atoms for atoms in sources if atoms is not None])
    if kind == "Flatten":
        shape = graph.input_shape(name) or ()
        if None not in shape[1:]:
            return np.tile(first, int(np.prod(shape[1:-1])))
    return fixed()


def _no_constants(graph: Graph, name: str) -> bool:
    """Whether a layer's or operation's arguments are tensors of the graph only."""
    call = graph.calls[name][0]
    arguments = call["args"]
    if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
        arguments = arguments[0]
    return all(isinstance(item, dict) for item in arguments)


def _weakest(channels: _Channels, groups: dict[str, np.ndarray], fraction: float) -> set[int]:
    """Roots of the atoms to remove: for each set of tied layers, its weakest."""
    tied: dict[frozenset[str], set[int]] = defaultdict(set)
    owners: dict[int, set[str]] = defaultdict(set)
    for name, atoms in groups.items():
        for atom in atoms:
            owners[channels.root(int(atom))].add(name)
    for root, names in owners.items():
        tied[frozenset(names)].add(root)
    removed: set[int] = set()
    for roots in tied.values():
        free = sorted((channels.scores[r], r) for r in roots if not channels.stays[r])
        count = min(int(np.floor(len(roots) * fraction + 1e-9)), len(roots) - 1, len(free))
        removed.update(root for _, root in free[:count])
    return removed


def _sliced(
    layer: keras.Layer, before: np.ndarray | None, after: np.ndarray | None
) -> tuple[Any, list[np.ndarray] | None]:
    """A layer for fewer channels, and its weights (None for operations)."""
    kind = type(layer)
    if not isinstance(layer, keras.layers.Layer):
        return copy_layer(layer), None
    if is_graph(layer):
        copy = keras.models.clone_model(layer)
        return copy, layer.get_weights()
    weights = layer.get_weights()
    if before is None or after is None:
        return copy_layer(layer), weights
    if kind is keras.layers.BatchNormalization:
        return copy_layer(layer), [value[after] for value in weights]
    if kind in DEPTHWISE:
        weights[0] = weights[0][..., before, :]
        if layer.use_bias:
            weights[-1] = weights[-1][after]
        return copy_layer(layer), weights
    if kind not in SLICED or layer.get_config().get("groups", 1) != 1:
        return copy_layer(layer), weights
    size = "units" if kind is keras.layers.Dense else "filters"
    new = kind.from_config({**layer.get_config(), size: int(after.sum())})
    if layer.use_bias:
        weights[-1] = weights[-1][after]
    if "Separable" in kind.__name__:
        multiplier = layer.depth_multiplier
        weights[0] = weights[0][..., before, :]
        weights[1] = weights[1][..., np.repeat(before, multiplier), :][..., after]
    elif "Transpose" in kind.__name__:
        weights[0] = weights[0][..., after, :][..., before]
    else:
        weights[0] = weights[0][..., before, :][..., after]
    return new, weights

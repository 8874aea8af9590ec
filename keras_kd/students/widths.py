"""Which axes of which weights have the same width: what must shrink together.

Every layer that makes channels (units, filters, heads) makes a `Width`. A tensor's last axis is a
`Dim`: the widths that lie along it, in order. Sums tie the widths of their inputs; what the model
reads and returns is held at its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras

from keras_kd.models import lora
from keras_kd.models.graph import Graph, is_graph
from keras_kd.utils.types import Shape

Resolve = Callable[["Width"], int]
Dim = tuple[tuple["Width", int], ...]
"""Widths along an axis, each with how often it is repeated: a flattened 7x7 map of 8 channels is
one width of 8, repeated 49 times."""


class Width:
    """A number of channels that several layers share (a node of a union-find forest).

    Args:
        size: How many channels there are.
        unit: `"channels"`, or `"heads"`, which are rounded to whole ones.
        held: Whether the number must stay.
    """

    def __init__(self, size: int | None, unit: str = "channels", held: bool = False) -> None:
        self.size = size
        self.unit = unit
        self.held = held
        self.parent: Width | None = None
        self.parts: Dim | None = None

    def root(self) -> Width:
        """The width that stands for all that are tied to this one."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node


def one(width: Width) -> Dim:
    """An axis of one width."""
    return ((width, 1),)


def expand(dim: Dim) -> Dim:
    """The roots along an axis; a width that is made of others is replaced by them."""
    found: list[tuple[Width, int]] = []
    for width, repeat in dim:
        root = width.root()
        if root.parts is None:
            found.append((root, repeat))
        else:
            # Only widths that stand alone on their axis are ever made of parts.
            found.extend(expand(root.parts) * repeat)
    return tuple(found)


def size_of(dim: Dim, resolve: Resolve) -> int:
    """The length of an axis, given the size of each width."""
    return sum(resolve(width) * repeat for width, repeat in expand(dim))


def hold(dim: Dim) -> None:
    """Keep every width of an axis as it is."""
    for width, _ in expand(dim):
        width.held = True


def tie(a: Dim, b: Dim) -> None:
    """Make two axes the same axis, as a sum of two tensors does."""
    a, b = expand(a), expand(b)
    if a == b:
        return
    if [(w.size, w.unit, r) for w, r in a] == [(w.size, w.unit, r) for w, r in b]:
        for (left, _), (right, _) in zip(a, b):
            left, right = left.root(), right.root()
            if left is not right:
                right.parent = left
                left.held = left.held or right.held
        return
    for single, other in ((a, b), (b, a)):
        width = single[0][0]
        if len(single) == 1 and single[0][1] == 1 and all(w is not width for w, _ in other):
            if width.held:
                hold(other)
            width.parts = other
            return
    hold(a)
    hold(b)


class Site(NamedTuple):
    """What of one layer depends on widths.

    Attributes:
        path: The layer's path in the model.
        layer: The layer.
        config: New values of its configuration, given the widths.
        weights: The axes of each of its weights, by the weight's path inside the layer; `None`
            for an axis that no width describes.
        makes: The weights' paths and axes whose norms say how important each channel is.
        inputs: The last axes of what it reads.
        outputs: The last axes of what it returns.
    """

    path: str
    layer: Any
    config: dict[str, Callable[[Resolve], Any]]
    weights: dict[str, tuple[Dim | None, ...]]
    makes: tuple[tuple[str, int], ...]
    inputs: list[Dim]
    outputs: list[Dim]


class _Read(NamedTuple):
    """A tensor that a layer reads."""

    dim: Dim
    shape: tuple[int | None, ...]


class _UnknownError(Exception):
    """Why a layer's widths cannot be followed."""


def trace(model: keras.Model, widths_change: bool) -> dict[int, Site]:
    """Follow the widths through a model.

    Args:
        model: A model whose graph is known, channels last.
        widths_change: Whether widths are to change: a layer that is not
            understood is then refused, else it holds what it reads and returns.

    Returns:
        The sites by `id` of the layer, nested ones included.

    Raises:
        ValueError: If a layer cannot change its widths, with its name.
    """
    tracer = _Tracer(widths_change)
    for dim in tracer.visit(model, None, ""):
        hold(dim)
    return tracer.sites


def weight_at(layer: keras.Layer, path: str) -> Any:
    """The variable of a layer at a path such as `kernel` or `query_dense/kernel`."""
    for segment in path.split("/"):
        layer = getattr(layer, segment)
    return layer


def variable_at(layer: keras.Layer, path: str) -> Any:
    """The same to assign to: beside an update of low rank, `kernel` is a sum."""
    *inner, name = path.split("/")
    owner = weight_at(layer, "/".join(inner)) if inner else layer
    if name in ("kernel", "embeddings") and getattr(owner, "lora_enabled", False):
        return lora.parts(owner)[0]
    return getattr(owner, name)


class _Tracer:
    def __init__(self, widths_change: bool) -> None:
        self.widths_change = widths_change
        self.sites: dict[int, Site] = {}
        self.nested: dict[int, tuple[list[Dim], list[Dim]]] = {}

    def visit(self, model: keras.Model, given: list[Dim] | None, prefix: str) -> list[Dim]:
        """The last axes of a graph's outputs; `given` are those of its inputs."""
        graph = Graph(model)
        made: dict[tuple[str, int, int], Dim] = {}
        names = [tensor._keras_history.operation.name for tensor in graph.model.inputs]
        for i, (name, tensor) in enumerate(zip(names, graph.model.inputs)):
            outer = given[i] if given is not None else _held(tensor.shape)
            made[(name, 0, 0)] = outer
        pending = [
            (name, index, call)
            for name, calls in graph.calls.items()
            for index, call in enumerate(calls)
        ]
        while pending:
            waiting = []
            for name, index, call in pending:
                if any(history not in made for history, _ in _read(call)):
                    waiting.append((name, index, call))
                    continue
                outputs = self._call(graph.layers[name], call, made, prefix)
                for i, dim in enumerate(outputs):
                    made[(name, index, i)] = dim
            pending = waiting
        config = graph.model.get_config()["output_layers"]
        return [made[history] for history in _histories(config)]

    def _call(
        self,
        layer: keras.Layer,
        call: dict[str, Any],
        made: dict[tuple[str, int, int], Dim],
        prefix: str,
    ) -> list[Dim]:
        arguments = {
            key: [_Read(made[history], shape) for history, shape in _read(part)]
            for key, part in [*enumerate(call["args"]), *call["kwargs"].items()]
        }
        reads = [read for key, found in arguments.items() for read in found if key != "mask"]
        dims = [read.dim for read in reads]
        if is_graph(layer):
            return self._nested(layer, dims, prefix)
        known = self.sites.get(id(layer))
        if known is not None and isinstance(layer, keras.layers.Layer) and layer.weights:
            # A layer that is called again reads and makes the same widths.
            for before, now in zip(known.inputs, dims):
                tie(before, now)
            return known.outputs
        try:
            site = _site(layer, arguments, reads, call)
        except _UnknownError as reason:
            if self.widths_change:
                raise ValueError(
                    f"Layer `{prefix}{layer.name}` of class `{type(layer).__name__}` cannot be "
                    f"made narrower: {reason} Keep the widths (`width=1.0`), or build the student "
                    "by hand."
                ) from None
            for dim in dims:
                hold(dim)
            shapes = [tensor.shape for tensor in keras.tree.flatten(layer.output)]
            site = Site("", layer, {}, {}, (), dims, [_held(shape) for shape in shapes])
        self.sites[id(layer)] = site._replace(path=prefix + layer.name, inputs=dims)
        return site.outputs

    def _nested(self, model: keras.Model, dims: list[Dim], prefix: str) -> list[Dim]:
        if id(model) in self.nested:
            before, outputs = self.nested[id(model)]
            for known, now in zip(before, dims):
                tie(known, now)
            return outputs
        outputs = self.visit(model, dims, f"{prefix}{model.name}/")
        self.nested[id(model)] = dims, outputs
        return outputs


def _read(node: object) -> Iterator[tuple[tuple[str, int, int], tuple[int | None, ...]]]:
    """History and shape of every tensor in a serialized call."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            config = node["config"]
            name, index, tensor = config["keras_history"]
            yield (name, index, tensor), tuple(config["shape"])
            return
        node = list(node.values())
    if isinstance(node, list | tuple):
        for item in node:
            yield from _read(item)


def _histories(outputs: Any) -> Iterator[tuple[str, int, int]]:
    """The triples of a serialized output structure, in the order of the flat outputs."""
    if isinstance(outputs, dict):
        for key in sorted(outputs):
            yield from _histories(outputs[key])
    elif len(outputs) == 3 and isinstance(outputs[0], str) and isinstance(outputs[1], int):
        yield outputs[0], outputs[1], outputs[2]
    else:
        for item in outputs:
            yield from _histories(item)


def _held(shape: Shape) -> Dim:
    """An axis that stays as it is."""
    return one(Width(shape[-1] if len(shape) else None, held=True))


# --------------------------------------------------------------------------- rules

_SAME = {
    "Activation",
    "ActivityRegularization",
    "AlphaDropout",
    "AveragePooling",
    "CenterCrop",
    "Cropping",
    "Dropout",
    "ELU",
    "GaussianDropout",
    "GaussianNoise",
    "GlobalAveragePooling",
    "GlobalMaxPooling",
    "Identity",
    "LeakyReLU",
    "Masking",
    "MaxPooling",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomFlip",
    "RandomRotation",
    "RandomTranslation",
    "RandomZoom",
    "ReLU",
    "RepeatVector",
    "Rescaling",
    "Resizing",
    "Softmax",
    "SpatialDropout",
    "UnitNormalization",
    "UpSampling",
    "ZeroPadding",
}
"""Layers without weights that leave the last axis as it is, without `1D`, `2D`, `3D`."""

_SAME_OPERATIONS = {
    "Absolute",
    "Cast",
    "Clip",
    "Elu",
    "Exp",
    "Gelu",
    "HardSigmoid",
    "HardSilu",
    "Identity",
    "LeakyRelu",
    "LogSoftmax",
    "Negative",
    "Relu",
    "Relu6",
    "Selu",
    "Sigmoid",
    "Silu",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Square",
    "StopGradient",
    "Tanh",
}

_TOGETHER = {
    "Add",
    "Average",
    "Divide",
    "Maximum",
    "Minimum",
    "Multiply",
    "Subtract",
    "TrueDivide",
}
"""Layers and operations that compute position by position and channel by channel."""

_REDUCTIONS = {"Max", "Mean", "Min", "Sum"}
_CONVOLUTIONS = {f"Conv{rank}D{kind}" for rank in (1, 2, 3) for kind in ("", "Transpose")}


def _site(
    layer: keras.Layer, arguments: dict[Any, list[_Read]], reads: list[_Read], call: dict[str, Any]
) -> Site:
    """What of a layer depends on widths.

    Raises:
        _UnknownError: If the layer is not understood.
    """
    kind = type(layer).__name__
    # A subclass may compute something else under a known name.
    if not type(layer).__module__.startswith("keras."):
        raise _UnknownError("what a custom layer does with its channels is not known.")
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise _UnknownError("it has its channels first; only channels last are followed.")
    if kind == "MultiHeadAttention":
        return _attention(layer, arguments)
    if not reads:
        raise _UnknownError("it reads nothing of the graph.")
    dim, shape = reads[0]
    is_layer = isinstance(layer, keras.layers.Layer)
    same = kind[:-2] in _SAME if kind.endswith(("1D", "2D", "3D")) else kind in _SAME
    if same if is_layer else kind in _SAME_OPERATIONS:
        return _plain(layer, [dim])
    if kind in _TOGETHER:
        return _plain(layer, [_together(reads, call)])
    if kind == "Concatenate":
        return _plain(layer, [_concatenated(layer, reads)])
    if kind in ("Flatten", "Reshape"):
        return _reshaped(layer, kind, dim, shape)
    if kind == "Permute":
        if layer.dims[-1] != len(layer.dims):
            raise _UnknownError("it moves the channels from the last axis.")
        return _plain(layer, [dim])
    if kind == "GetItem":
        return _plain(layer, [_taken(dim, shape, layer.output.shape, call["args"][1])])
    if kind in _REDUCTIONS and not is_layer:
        axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        if any(axis is None or axis % len(shape) == len(shape) - 1 for axis in axes):
            raise _UnknownError("it sums over the channels.")
        return _plain(layer, [dim])
    if not is_layer:
        raise _UnknownError("what this operation does with the channels is not known.")
    if kind in ("BatchNormalization", "LayerNormalization", "RMSNormalization"):
        return _normalization(layer, dim, shape)
    if kind == "GroupNormalization":
        return _group_normalization(layer, dim, shape)
    if kind == "Normalization":
        hold(dim)
        return _plain(layer, [dim])
    return _making(layer, kind, dim)


def _plain(layer: keras.Layer, outputs: list[Dim]) -> Site:
    return Site("", layer, {}, {}, (), [], outputs)


def _making(layer: keras.Layer, kind: str, dim: Dim) -> Site:
    """Layers that make new channels, and depthwise ones, which keep them."""
    weights: dict[str, tuple[Dim | None, ...]]
    if kind == "Dense":
        out = one(Width(layer.units))
        weights, size = {"kernel": (dim, out)}, "units"
    elif kind == "Embedding":
        out = one(Width(layer.output_dim))
        return Site(
            "",
            layer,
            {"output_dim": lambda resolve: size_of(out, resolve)},
            {"embeddings": (None, out)},
            (("embeddings", 1),),
            [],
            [out],
        )
    elif kind in _CONVOLUTIONS:
        if getattr(layer, "groups", 1) != 1:
            raise _UnknownError("its channels are grouped.")
        out = one(Width(layer.filters))
        pair = (out, dim) if kind.endswith("Transpose") else (dim, out)
        weights, size = {"kernel": (*(None,) * layer.rank, *pair)}, "filters"
    elif kind.startswith("SeparableConv"):
        out = one(Width(layer.filters))
        inner = _multiplied(dim, layer.depth_multiplier)
        window: tuple[None, ...] = (None,) * layer.rank
        weights = {
            "depthwise_kernel": (*window, dim, None),
            "pointwise_kernel": (*window, inner, out),
        }
        size = "filters"
    elif kind.startswith("DepthwiseConv"):
        out = _multiplied(dim, layer.depth_multiplier)
        weights = {"kernel": (*(None,) * layer.rank, dim, None)}
        if layer.use_bias:
            weights["bias"] = (out,)
        return Site("", layer, {}, weights, (), [], [out])
    else:
        raise _UnknownError("what this class does with its channels is not known.")
    maker = list(weights)[-1]
    if layer.use_bias:
        weights["bias"] = (out,)
    axis = next(i for i, d in enumerate(weights[maker]) if d is out)
    config = {size: lambda resolve: size_of(out, resolve)}
    return Site("", layer, config, weights, ((maker, axis),), [], [out])


def _multiplied(dim: Dim, multiplier: int) -> Dim:
    """The axis of a depthwise convolution; above 1 the copies of a channel lie side by side."""
    if multiplier != 1:
        raise _UnknownError("its `depth_multiplier` is not 1.")
    return dim


def _normalization(layer: keras.Layer, dim: Dim, shape: tuple[int | None, ...]) -> Site:
    axis = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    if [a % len(shape) for a in axis] != [len(shape) - 1]:
        raise _UnknownError("it normalizes another axis than the last.")
    names = ("gamma", "beta", "moving_mean", "moving_variance", "scale")
    found = {
        name: (dim,) for name in names if isinstance(getattr(layer, name, None), keras.Variable)
    }
    return Site("", layer, {}, dict(found), (), [], [dim])


def _group_normalization(layer: keras.Layer, dim: Dim, shape: tuple[int | None, ...]) -> Site:
    if layer.axis % len(shape) != len(shape) - 1:
        raise _UnknownError("it normalizes another axis than the last.")
    found = {
        name: (dim,)
        for name in ("gamma", "beta")
        if isinstance(getattr(layer, name, None), keras.Variable)
    }
    groups = layer.groups
    # As many groups as there were, or the most that divide the channels left.
    config = {"groups": lambda resolve: math.gcd(groups, size_of(dim, resolve))}
    return Site("", layer, {} if groups == -1 else config, dict(found), (), [], [dim])


def _attention(layer: keras.Layer, arguments: dict[Any, list[_Read]]) -> Site:
    def read(name: str, position: int, default: Any) -> Dim:
        found = arguments.get(name) or arguments.get(position) or []
        return found[0].dim if found else default

    query = read("query", 0, None)
    value = read("value", 1, None)
    key = read("key", 2, value)
    if query is None or value is None:
        raise _UnknownError("its query or value is no tensor of the graph.")
    heads = Width(layer.num_heads, "heads")
    # Heads are dropped whole, as they are; a single head can only grow narrower.
    single = layer.num_heads == 1
    key_dim, value_dim = (
        Width(layer.key_dim, held=not single),
        Width(layer.value_dim, held=not single),
    )
    config: dict[str, Callable[[Resolve], Any]] = {}
    given = layer.get_config().get("output_shape")
    if given is None:
        out = query
    elif isinstance(given, int) or len(given) == 1:
        out = one(Width(given if isinstance(given, int) else given[0]))
        config["output_shape"] = lambda resolve: (size_of(out, resolve),)
    else:
        raise _UnknownError("its `output_shape` has several axes.")
    heads_, keys_, values_ = one(heads), one(key_dim), one(value_dim)
    weights: dict[str, tuple[Dim | None, ...]] = {
        "query_dense/kernel": (query, heads_, keys_),
        "key_dense/kernel": (key, heads_, keys_),
        "value_dense/kernel": (value, heads_, values_),
        "output_dense/kernel": (heads_, values_, out),
    }
    if layer.get_config()["use_bias"]:
        weights["query_dense/bias"] = weights["key_dense/bias"] = (heads_, keys_)
        weights["value_dense/bias"] = (heads_, values_)
        weights["output_dense/bias"] = (out,)
    config["num_heads"] = lambda resolve: size_of(heads_, resolve)
    config["key_dim"] = lambda resolve: size_of(keys_, resolve)
    config["value_dim"] = lambda resolve: size_of(values_, resolve)
    makes = (
        ("query_dense/kernel", 1),
        ("key_dense/kernel", 1),
        ("value_dense/kernel", 1),
        ("query_dense/kernel", 2),
        ("key_dense/kernel", 2),
        ("value_dense/kernel", 2),
        ("output_dense/kernel", 2),
    )
    # Scores, where they are returned, have the keys' positions on their last axis.
    return Site("", layer, config, weights, makes, [], [out, one(Width(None, held=True))])


def _together(reads: list[_Read], call: dict[str, Any]) -> Dim:
    arguments = call["args"]
    if len(arguments) == 1 and isinstance(arguments[0], list):
        arguments = arguments[0]
    if any(isinstance(a, dict) and a.get("class_name") != "__keras_tensor__" for a in arguments):
        raise _UnknownError("one of its arguments is a constant array, whose width is fixed.")
    wide = [read for read in reads if read.shape[-1] != 1] or reads
    for read in wide[1:]:
        tie(wide[0].dim, read.dim)
    return wide[0].dim


def _concatenated(layer: keras.Layer, reads: list[_Read]) -> Dim:
    rank = len(reads[0].shape)
    if layer.axis % rank == rank - 1:
        return tuple(part for read in reads for part in read.dim)
    for read in reads[1:]:
        tie(reads[0].dim, read.dim)
    return reads[0].dim


def _taken(dim: Dim, shape: Shape, output_shape: Shape, key: Any) -> Dim:
    """The last axis of `x[key]`."""
    key = key if isinstance(key, list) else [key]
    if any(
        item is None or (isinstance(item, dict) and "slice" not in item["class_name"])
        for item in key
    ):
        raise _UnknownError("its index is not understood; use whole numbers and slices.")
    if len(key) == len(shape):
        last = key[-1]
        whole = isinstance(last, dict) and all(v is None for v in last["config"].values())
        if not whole:
            raise _UnknownError("it takes some of the channels.")
    return dim


def _reshaped(layer: keras.Layer, kind: str, dim: Dim, shape: Any) -> Site:
    output = tuple(layer.output.shape)
    positions = shape[1:-1]
    if kind == "Reshape":
        operation = not isinstance(layer, keras.layers.Layer)
        key = "newshape" if operation else "target_shape"
        target = tuple(layer.newshape if operation else layer.target_shape)
        if operation and (target[0] not in (-1, None) or -1 in target[1:]):
            raise _UnknownError("its target shape leaves more than the batch open.")
    if kind == "Flatten" or len(output) == 2:
        if None in positions:
            raise _UnknownError("the number of positions it flattens is not known.")
        count, whole = math.prod(positions), expand(dim)
        # One width is repeated; several follow one another at every position.
        dim = ((whole[0][0], whole[0][1] * count),) if len(whole) == 1 else whole * count
        if kind == "Flatten":
            return _plain(layer, [dim])
    elif output[-1] != shape[-1]:
        count = math.prod(output[1:-1]) if None not in output[1:] else 0
        whole = expand(dim)
        if len(shape) != 2 or not count or len(whole) != 1 or whole[0][1] != 1:
            raise _UnknownError("it splits the channels.")
        inner = Width(output[-1], held=whole[0][0].held)
        whole[0][0].parts = ((inner, count),)
        dim = one(inner)
    last = dim
    config = {key: lambda resolve: (*target[:-1], size_of(last, resolve))}
    return Site("", layer, config, {}, (), [], [dim])

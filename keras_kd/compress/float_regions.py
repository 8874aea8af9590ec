"""What must stay float because a logarithm or a division reads it, in all graphs of a model.

An int8 tensor has 255 steps, so of a power spectrum or of `square(x) + 1e-4` the small values
become zero, whose logarithm is infinite. Between where such values arise and where a logarithm
flattens them nothing is rounded, and layers that could be int8 stay float there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from keras_kd.compress.quantized import Treatment
from keras_kd.compress.treatment import several_outputs, treatment
from keras_kd.models.graph import OUTPUT, Graph, is_graph, tensors_of
from keras_kd.models.weight_wrapper import base_layer

STEEP = {
    "Cbrt",
    "Divide",
    "DivideNoNan",
    "FloorDivide",
    "Log",
    "Log10",
    "Log1p",
    "Log2",
    "Power",
    "Reciprocal",
    "Rsqrt",
    "Sqrt",
    "TrueDivide",
}
"""Operations that make much of little, or infinity of zero."""

_QUOTIENTS = {"Divide", "DivideNoNan", "FloorDivide", "TrueDivide"}

_PASSES = STEEP | {
    "Absolute",
    "Add",
    "Clip",
    "Cumsum",
    "Dot",
    "Einsum",
    "Fabs",
    "Inner",
    "LeakyRelu",
    "Matmul",
    "Mean",
    "Multiply",
    "Negative",
    "Normalization",
    "PReLU",
    "Prod",
    "ReLU",
    "Rescaling",
    "Subtract",
    "Sum",
    "Tensordot",
}
"""Float operations whose small outputs come from small inputs.

A square does not belong to them: what is a step of its input is 1/255 of a step of its output, so
its input may be rounded as that of the model is.
"""

_MOVING = ("moves", "repeats", "keeps")
_WEIGHTED = ("weights", "separable", "layer norm", "attention", "recurrent")
_CURVED = ("layer norm", "attention", "recurrent")


@dataclasses.dataclass
class _Level:
    """One graph, and where it is called as a layer of others."""

    graph: Graph
    parents: list[tuple[_Level, str]] = dataclasses.field(default_factory=list)


class FloatRegions:
    """The layers of a model, nested ones included, that must not be rounded, by `id`.

    Args:
        model: Model for which `is_graph` holds, quantization-aware or not.
        masked: Result of `masked_layers`.
        chosen: The `id` of layers that an annotation leaves float.
        activation_bits: None if no values are rounded anywhere, so that nothing must stay exact.
    """

    def __init__(
        self,
        model: keras.Model,
        masked: frozenset[int],
        chosen: frozenset[int] = frozenset(),
        activation_bits: int | None = 8,
    ) -> None:
        self.reasons: dict[int, str] = {}
        self.exact: set[int] = set()
        self._masked = masked
        self._chosen = chosen
        self._levels: dict[int, _Level] = {}
        self._of: dict[int, int] = {}
        self._kinds: dict[int, Treatment] = {}
        self._seen: set[tuple[int, bool]] = set()
        self._level(model, True)
        for level in self._levels.values() if activation_bits else ():
            for name, layer in level.graph.layers.items():
                for source in _steep_sources(layer, level.graph, name):
                    self._follow(level, source, layer, False)
        self.unneeded = {
            id(layer)
            for level in self._levels.values()
            for name, layer in level.graph.layers.items()
            if self.treatment(layer, level.graph).kind == "float"
            and not self._needed(level, name, set())
        }

    def treatment(self, layer: keras.Layer, graph: Graph) -> Treatment:
        """As `support.treatment`, float where the region says so."""
        if id(layer) in self.reasons:
            return Treatment("float", self.reasons[id(layer)])
        return self.before(layer, graph)

    def reads_integers(self, layer: keras.Layer) -> bool:
        """Whether all floats that a layer of a quantization-aware model reads are rounded."""
        level = self._levels[self._of[id(layer)]]
        return all(
            self._rounded(level, tensor["keras_history"][0], set())
            for tensor in tensors_of(level.graph.calls[layer.name])
            if "float" in tensor["dtype"]
        )

    def gives_integers(self, layer: keras.Layer) -> bool:
        """Whether what a layer of a quantization-aware model gives is rounded already."""
        return self._rounded(self._levels[self._of[id(layer)]], layer.name, set())

    def _rounded(self, level: _Level, name: str, seen: set[tuple[int, str]]) -> bool:
        if (id(level), name) in seen:
            return True
        seen.add((id(level), name))
        layer = level.graph.layers[name]
        if getattr(layer, "only_rounds", False):
            return True
        if is_graph(layer):
            inner = self._levels[id(layer)]
            return all(self._rounded(inner, n, seen) for n in inner.graph.output_names)
        if isinstance(layer, keras.layers.InputLayer):
            sources = [(up, p) for up, at in level.parents for p in up.graph.producers[at]]
            return bool(sources) and all(self._rounded(up, p, seen) for up, p in sources)
        kind = self.before(layer, level.graph).kind
        if kind in ("embedding", "recurrent"):
            # Their values lie on a grid of their own.
            return base_layer(layer) is not layer
        if kind not in (*_MOVING, "average"):
            return False
        return all(
            self._rounded(level, tensor["keras_history"][0], seen)
            for tensor in tensors_of(level.graph.calls[name])
            if "float" in tensor["dtype"]
        )

    def _level(self, model: keras.Model, outermost: bool) -> _Level:
        level = _Level(Graph(model, outermost=outermost))
        self._levels[id(model)] = level
        self._of.update((id(layer), id(model)) for layer in level.graph.layers.values())
        for name, layer in level.graph.layers.items():
            if is_graph(layer):
                inner = self._levels.get(id(layer)) or self._level(layer, False)
                inner.parents.append((level, name))
        return level

    def _follow(self, level: _Level, name: str, steep: Any, through: bool) -> None:
        """Leave the output of a layer, and what it is made of, exact.

        Args:
            level: Where the layer is.
            name: Its name.
            steep: The operation that makes it necessary.
            through: Whether a product with weights lies between; the one before it, behind a
                nonlinear function, may be rounded as usual.
        """
        graph = level.graph
        layer = graph.layers[name]
        if (id(layer), through) in self._seen or (id(layer), False) in self._seen:
            return
        self._seen.add((id(layer), through))
        if is_graph(layer):
            self.exact.add(id(layer))
            inner = self._levels[id(layer)]
            for producer in inner.graph.output_names:
                self._follow(inner, producer, steep, through)
            return
        if isinstance(layer, keras.layers.InputLayer):
            for parent, outer in level.parents:
                self.exact.add(id(layer))
                for producer in parent.graph.producers[outer]:
                    self._follow(parent, producer, steep, through)
            return
        base = base_layer(layer)
        if getattr(layer, "only_rounds", False) or id(layer) in self._chosen:
            return
        if several_outputs(layer):
            return
        kind = self.before(layer, graph)
        if kind.kind in ("embedding", "model") or (through and _bends(kind, base)):
            return
        self.exact.add(id(layer))
        if kind.kind not in (*_MOVING, "float"):
            self.reasons[id(layer)] = (
                f"`{steep.name}` ({type(base_layer(steep)).__name__}) reads it, and int8 makes "
                "zeros of small values"
            )
        on = kind.kind != "float" or type(base).__name__ in _PASSES
        if not on or _squares(graph, name, base):
            return
        if kind.kind in _CURVED:
            return
        for producer in graph.producers[name]:
            self._follow(level, producer, steep, through or kind.kind in _WEIGHTED)

    def before(self, layer: keras.Layer, graph: Graph) -> Treatment:
        """The treatment, whatever the regions say."""
        key = id(layer)
        if key not in self._kinds:
            self._kinds[key] = treatment(layer, graph, self._masked)
        return self._kinds[key]

    def _needed(self, level: _Level, name: str, seen: set[tuple[int, str]]) -> bool:
        """Whether anything reads the output of a layer as integers."""
        if (id(level), name) in seen:
            return False
        seen.add((id(level), name))
        for reader in level.graph.consumers[name]:
            if reader == OUTPUT:
                if level.graph.outermost or any(
                    self._needed(parent, outer, seen) for parent, outer in level.parents
                ):
                    return True
                continue
            layer = level.graph.layers[reader]
            if is_graph(layer):
                inner = self._levels[id(layer)]
                if any(self._needed(inner, n, seen) for n in inner.graph.input_names):
                    return True
                continue
            kind = self.treatment(layer, level.graph).kind
            if kind in _MOVING:
                if self._needed(level, reader, seen):
                    return True
            elif getattr(layer, "only_rounds", False) or (
                kind != "float" and id(layer) not in self._chosen
            ):
                return True
        return False


def _steep_sources(layer: keras.Layer, graph: Graph, name: str) -> Iterator[str]:
    """The layers whose small values an operation makes much of."""
    base = base_layer(layer)
    kind = type(base).__name__
    if kind not in STEEP or not type(base).__module__.startswith("keras"):
        return
    for call in graph.calls[name]:
        arguments = [*call["args"], *call["kwargs"].values()]
        if kind in _QUOTIENTS:
            arguments = arguments[1:]
        if kind == "Power":
            exponent = arguments[1] if len(arguments) > 1 else None
            if isinstance(exponent, (int, float)) and exponent >= 1:
                continue
            arguments = arguments[:1]
        for tensor in tensors_of(arguments):
            yield tensor["keras_history"][0]


def _bends(kind: Treatment, base: keras.Layer) -> bool:
    """Whether a layer applies a nonlinear function."""
    if kind.kind in ("activation", "swish", *_CURVED):
        return True
    if kind.kind not in ("weights", "separable"):
        return False
    return bool(base.get_config().get("activation") not in (None, "linear"))


def _squares(graph: Graph, name: str, base: keras.Layer) -> bool:
    """Whether a product multiplies a tensor with itself."""
    if type(base).__name__ != "Multiply":
        return False
    return all(
        len({str(tensor["keras_history"]) for tensor in tensors_of(call)}) == 1
        for call in graph.calls[name]
    )

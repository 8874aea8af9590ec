"""Where the values of a quantization-aware graph are rounded, and which share a range."""

from __future__ import annotations

from typing import Any

import keras

from keras_kd.compress.float_regions import FloatRegions
from keras_kd.compress.operators import ELEMENTWISE, mixes_last
from keras_kd.compress.treatment import several_outputs
from keras_kd.models.folding import CHANNEL_AXIS, foldable_into
from keras_kd.models.graph import OUTPUT, Graph
from keras_kd.models.weight_wrapper import base_layer

_SILENT = ("moves", "repeats")
_MOVING = (*_SILENT, "keeps")
_SUMMED = {"Exp", "Multiply", "Power", "Square"}
_SHARING = (*_MOVING, "average", "joins")


class Plan:
    """Where the values of one graph are rounded, and which share a range.

    TFLite's concatenation, maximum and minimum need one scale for inputs and output, so these form
    a group with one observer, which follows the joined output. Layers that only move values
    (pooling by maximum, reshaping) have the scale of what they read.

    Args:
        graph: The graph.
        annotations: What users asked for, by `id` of the layer.
        uses: Result of `occurrences`.
        regions: What stays float in the whole model.
    """

    def __init__(
        self, graph: Graph, annotations: dict[int, Any], uses: dict[int, int], regions: FloatRegions
    ) -> None:
        self.graph = graph
        self.regions = regions
        self.labels: dict[str, str] = {}
        self.parted: set[str] = set()
        self.rounded: dict[str, tuple[str, bool]] = {}
        self.fixed: dict[str, tuple[float, float]] = {}
        layers = graph.layers
        self.kinds = {n: regions.treatment(layer, graph) for n, layer in layers.items()}
        self.exact = {n for n, layer in layers.items() if id(layer) in regions.exact}
        kinds = self.kinds
        leader = {name: name for name in layers}

        def find(name: str) -> str:
            while leader[name] != name:
                name = leader[name]
            return name

        folded = {
            norm.name
            for layer in layers.values()
            if type(base_layer(layer)) in CHANNEL_AXIS
            and (norm := self.folded_into(layer, uses)) is not None
        }
        self.find = find
        for name, kind in kinds.items():
            if name not in self.exact and (kind.kind in _SHARING or name in folded):
                for producer in graph.producers[name]:
                    leader[find(producer)] = find(name)
        joins = [n for n, kind in kinds.items() if kind.kind == "joins" and n not in self.exact]
        for name, kind in kinds.items():
            layer = layers[name]
            annotation = annotations.get(id(layer))
            left = annotation is not None and (annotation.float or not annotation.output)
            readers = (reader for reader in graph.consumers[name] if reader != OUTPUT)
            if left and any(kinds[reader].kind in _SHARING for reader in readers):
                self.parted.add(name)
            if left or isinstance(layer, keras.Model):
                continue
            if name in self.exact or id(layer) in regions.unneeded:
                continue
            if kind.kind in (*_SILENT, "embedding", "recurrent") or self._deferred(name, folded):
                continue
            if isinstance(layer, keras.layers.InputLayer) and not (
                graph.outermost and _read_as_float(layer, graph)
            ):
                continue
            group = find(name)
            members = [join for join in joins if find(join) == group]
            observes = kind.kind not in ("average", "keeps") and (not members or name in members)
            if observes and name in members:
                # Of joins that feed one another the last holds all values.
                observes = not any(self._feeds(name, other) for other in members)
            self.rounded[name] = (group, observes)
            if observes:
                self.labels[group] = name
            if kind.range is not None and not members:
                self.fixed[group] = kind.range

        self._round_what_is_averaged()
        for name, (group, _) in self.rounded.items():
            if group not in self.labels:
                # What an average reads is rounded elsewhere, in a nested model for instance.
                self.labels[group] = name
                self.rounded[name] = (group, True)

    def _round_what_is_averaged(self) -> None:
        """Round the input of an average that is rounded elsewhere to the range of its output.

        An average has one scale on both sides, and of the nested model, or the model around, that
        gives its input the range is not known here, nor is there one behind a layer that users
        leave float. Where both are rounded the converter would take one range for all, so they are
        parted.
        """
        for name, kind in self.kinds.items():
            group = self.find(name)
            if kind.kind != "average" or name not in self.rounded or group in self.labels:
                continue
            for source in self.kinds:
                if self.find(source) != group or self.kinds[source].kind in _SHARING:
                    continue
                if source not in self.exact and not _several(self.graph.layers[source]):
                    self.rounded[source] = (group, True)
                    self.parted.add(source)
                    self.labels[group] = source

    def folded_into(self, layer: keras.Layer, uses: dict[int, int]) -> Any | None:
        """As `foldable_into`, but for layers that stay float, which keep their normalization."""
        norm = foldable_into(layer, self.graph, uses)
        if norm is None or {id(layer), id(norm)} & self.regions.reasons.keys():
            return None
        return norm

    def enters(self, name: str) -> bool:
        """Whether a layer reads integers, so that an exact value is rounded on its way in."""
        return name not in self.exact and self.kinds[name].kind not in ("float", "model", *_MOVING)

    def stays(self, name: str) -> bool:
        """Whether the converter would make integers of what a float layer begins with.

        So it does with operators that share a scale with their input, MEAN among them, and with
        those whose scale is prescribed, whatever the layer as a whole computes.
        """
        layer, kind = self.graph.layers[name], self.kinds[name]
        plain = self.regions.before(layer, self.graph).kind
        if name in self.exact and plain in _MOVING:
            return False
        if name in self.exact and plain in ("joins", "average", "activation", "mean", "observed"):
            return True
        if kind.kind != "float" or plain in ("weights", "separable"):
            return False
        return type(base_layer(layer)).__name__ not in ELEMENTWISE

    def hands_back(self, name: str) -> bool:
        """Whether the converter hands the scale of a layer's output back to what it is made of."""
        return self.kinds[name].kind in (*_MOVING, "average", "model") or self._mixes(name)

    def leaves(self, name: str) -> bool:
        """Whether what rounds a layer's output, or shares a scale with it, must not reach it."""
        return name in self.parted or (name in self.rounded and self._mixes(name))

    def _mixes(self, name: str) -> bool:
        layer = self.graph.layers[name]
        return self.kinds[name].kind == "float" and mixes_last(base_layer(layer))

    def fused(self, producer: str, name: str) -> bool:
        """Whether the converter would make one operator of a float layer and what reads it.

        It knows a softmax and a division by the root of a sum of squares, and makes SOFTMAX and
        L2_NORMALIZATION of them, whose scales are prescribed and not those that were learned.
        """
        kinds = {n: type(base_layer(self.graph.layers[n])).__name__ for n in (producer, name)}
        return kinds[name] == "Sum" and kinds[producer] in _SUMMED

    def unrounded(self, name: str) -> bool:
        """Whether a layer gives exact values though others are rounded there."""
        if name in self.exact:
            return True
        moves = name in self.kinds and self.kinds[name].kind in _MOVING
        return moves and any(self.unrounded(producer) for producer in self.graph.producers[name])

    def _deferred(self, name: str, folded: set[str]) -> bool:
        """Whether the value is rounded later, behind what it is fused with."""
        graph, kinds = self.graph, self.kinds
        if not graph.called_once(name):
            return False
        readers = graph.consumers[name]
        if name in folded:
            producer = graph.producers[name][0]
            if not kinds[producer].fuses:
                return False
        if len(readers) != 1 or readers[0] == OUTPUT or not graph.called_once(readers[0]):
            return False
        if readers[0] in folded:
            return True
        return (kinds[name].fuses or name in folded) and kinds[readers[0]].fusable

    def _feeds(self, name: str, other: str) -> bool:
        """Whether `other` reads `name` through layers that only move values."""
        for reader in self.graph.consumers[name]:
            if reader == other:
                return True
            if (
                reader != OUTPUT
                and reader not in self.exact
                and self.kinds[reader].kind in _SHARING
                and self._feeds(reader, other)
            ):
                return True
        return False


def _several(layer: keras.Layer) -> bool:
    return not isinstance(layer, keras.layers.InputLayer) and several_outputs(layer)


def _read_as_float(layer: keras.Layer, graph: Graph) -> bool:
    if "float" not in keras.backend.standardize_dtype(layer.output.dtype):
        return False
    readers = [graph.layers[name] for name in graph.consumers[layer.name] if name != OUTPUT]
    return not readers or any(
        type(base_layer(reader)) is not keras.layers.Embedding for reader in readers
    )

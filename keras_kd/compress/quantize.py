"""Quantization-aware training: the model computes in float what the device will compute in int8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from keras_kd.compress.fake_quantize import FakeQuantize
from keras_kd.compress.float_regions import FloatRegions
from keras_kd.compress.masking import masked_layers
from keras_kd.compress.operators import leak, rewritten, rounds_halves
from keras_kd.compress.plan import Plan
from keras_kd.compress.prune import PrunedLayer
from keras_kd.compress.quantized import BY_KIND, Quantized
from keras_kd.compress.quantized_layers import (
    FUSED_ACTIVATIONS,
    TRANSPOSED,
    QuantizedLayer,
)
from keras_kd.compress.quantized_model import FloatBorder, QuantizedModel
from keras_kd.compress.selection import look_up, require_graph
from keras_kd.compress.tflite_rounding import source_of
from keras_kd.models.folding import require_built
from keras_kd.models.graph import Graph, copy_built, occurrences, rebuild
from keras_kd.models.weight_wrapper import WeightWrapper, base_layer, every_layer, kernels
from keras_kd.utils.types import Data, Tensor, Tensors


@dataclasses.dataclass(frozen=True)
class Annotation:
    """How one layer is to be quantized, where the class alone does not say.

    Args:
        weights: For each variable name to round, the axes that have a step for each index:
            `{"matrix": (-1,)}`, or `()` for one step in all. None for the usual kernels of a known
            layer, and no weights of a custom one.
        output: Whether the output is quantized.
        float: True to leave the layer as it is, weights and output.
    """

    weights: dict[str, tuple[int, ...]] | None = None
    output: bool = True
    float: bool = False


def quantize_aware(
    model: keras.Model,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    annotations: dict[str, Annotation] | None = None,
    calibration: Data | None = None,
    momentum: float = 0.99,
    keep_zeros: bool = False,
) -> keras.Model:
    """Make a copy of a model that trains with the rounding errors of its int8 file.

    Weights are rounded to symmetric integers for each channel, BatchNormalization folded in first;
    activations to asymmetric integers within a range that follows the training data. Gradients
    pass the rounding unchanged. Masks and clusters of `prune` and `cluster` are kept. What stays
    float, and why, is in `summary`.

    The TFLite converter turns the trained model, with `optimizations=[DEFAULT]`, int8 input and
    output and no representative data, into an int8 file.

    Args:
        model: Built Functional or Sequential model, trained as a rule. It is not changed.
        weight_bits: Integer width of the weights, 2 to 8.
        activation_bits: 8, or None to leave activations float (weight-only quantization, as for
            4-bit weights).
        annotations: By layer path (`"backbone/mixer"`), what differs from the rule.
        calibration: Inputs, as for `calibrate`, to find the first ranges with. Without them the
            ranges come from the first training batches.
        momentum: Weight of the past in the moving ranges.
        keep_zeros: Whether weights that are zero now stay zero (for a model pruned and finalized
            before).

    Returns:
        New Functional model with the layer names of `model`, not compiled.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If the model's graph is not known, it is quantized already, a width is out of
            range, or an annotation names no layer.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> quantized = quantize_aware(model)
        >>> is_quantize_aware(quantized)
        True

    Reference:
        - [Jacob et al., 2018](https://arxiv.org/abs/1712.05877)
        - [Krishnamoorthi, 2018](https://arxiv.org/abs/1806.08342)
    """
    require_built(model)
    require_graph(model, "quantize")
    if is_quantize_aware(model):
        raise ValueError(
            f"Model `{model.name}` is quantization-aware already. Pass the float model, or "
            "`finalize` it first."
        )
    if isinstance(weight_bits, bool) or weight_bits not in range(2, 9):
        raise ValueError(
            f"`weight_bits` must be an integer from 2 to 8, such as 8 or 4. Received: "
            f"weight_bits={weight_bits!r}."
        )
    if activation_bits not in (None, 8):
        raise ValueError(
            "`activation_bits` must be 8, or None to leave activations float. Received: "
            f"activation_bits={activation_bits!r}."
        )
    by_layer = _annotations(model, annotations or {})
    maker = _Maker(model, weight_bits, activation_bits, by_layer, momentum, keep_zeros)
    quantized = maker.finish(rebuild(model, maker.make, maker.call))
    if calibration is not None and activation_bits is not None:
        from keras_kd.compress.observers import calibrate

        calibrate(quantized, calibration)
    return quantized


def is_quantize_aware(model: keras.Model) -> bool:
    """Whether a model holds layers made by `quantize_aware`.

    Args:
        model: Any Keras model.

    Returns:
        True if a layer, nested or not, rounds weights or activations.
    """
    return any(isinstance(layer, (FakeQuantize, Quantized)) for _, layer in every_layer(model))


def _annotations(model: keras.Model, annotations: dict[str, Annotation]) -> dict[int, Annotation]:
    found = {}
    for path, annotation in annotations.items():
        if not isinstance(annotation, Annotation):
            raise TypeError(
                f"`annotations[{path!r}]` must be a `kd.compress.Annotation`. Received: "
                f"{annotation!r} (of type {type(annotation).__name__})."
            )
        layer = look_up(model, path, "annotations")
        ranks = {v.name: len(v.shape) for v in getattr(base_layer(layer), "variables", [])}
        for name, axes in (annotation.weights or {}).items():
            if name not in ranks:
                raise ValueError(
                    f"Layer `{path}` has no weight `{name}`. It has: {', '.join(sorted(ranks))}."
                )
            if any(not -ranks[name] <= axis < ranks[name] for axis in axes):
                raise ValueError(
                    f"`annotations[{path!r}]` names the axes {tuple(axes)} of `{name}`, which has "
                    f"{ranks[name]} axes. Expected numbers from {-ranks[name]} to "
                    f"{ranks[name] - 1}."
                )
        found[id(layer)] = annotation
    return found


class _Separable:
    """A separable convolution as its two halves, which have a quantized value between them."""

    def __init__(self, depthwise: keras.Layer, pointwise: keras.Layer) -> None:
        self.halves = (depthwise, pointwise)


class _Maker:
    """What `rebuild` asks for: a new layer for each old one, and where its output is rounded."""

    def __init__(
        self,
        model: keras.Model,
        weight_bits: int,
        activation_bits: int | None,
        annotations: dict[int, Annotation],
        momentum: float,
        keep_zeros: bool,
    ) -> None:
        self.uses = occurrences(model)
        chosen = frozenset(k for k, a in annotations.items() if a.float or not a.output)
        self.regions = FloatRegions(model, masked_layers(model), chosen, activation_bits)
        self.bits = weight_bits
        self.activation_bits = activation_bits
        self.annotations = annotations
        self.momentum = momentum
        self.keep_zeros = keep_zeros
        self.folded: dict[int, Any] = {}
        self.plans: dict[int, Plan] = {}
        self.quantizers: dict[tuple[int, str], FakeQuantize] = {}
        # The new graph's tensors that are no inputs, kept so that no id is used again.
        self.produced: dict[int, Tensor] = {}
        self.entered: dict[Any, tuple[Tensor, Tensor]] = {}
        self.borders: set[tuple[int, str]] = set()
        self.behind: dict[tuple[int, str], FloatBorder] = {}
        self.outermost: Plan | None = None

    # -- layers -------------------------------------------------------------------------------

    def make(self, layer: keras.Layer, graph: Graph) -> Any:
        """The layer that stands for `layer`."""
        if id(layer) in self.folded:
            return keras.layers.Identity(name=layer.name, dtype=layer.dtype_policy.name)
        annotation = self.annotations.get(id(layer), Annotation())
        chosen = self.regions.treatment(layer, graph)
        if annotation.float:
            return self._with_zeros(copy_built(layer))
        if id(layer) in self.regions.reasons and annotation.weights is None:
            return self._with_zeros(copy_built(layer))
        if annotation.weights is not None and chosen.kind != "weights":
            return QuantizedLayer(
                self._with_zeros(copy_built(layer), tuple(annotation.weights)),
                weight_bits=self.bits,
                axes=annotation.weights,
                activation_bits=None,
            )
        if chosen.kind in ("weights", "embedding"):
            return self._weighted(layer, graph, annotation)
        if chosen.kind == "separable":
            return self._separable(layer, graph)
        wrapper = BY_KIND.get(chosen.kind)
        if wrapper is None or self.activation_bits is None:
            return self._with_zeros(copy_built(layer))
        # These compute the layer themselves, so they regularize in its place too.
        regularizer = base_layer(layer).activity_regularizer
        inner = copy_built(layer) if regularizer is None else _copy_changed(layer, _UNREGULARIZED)
        more = (self.bits, self.activation_bits) if wrapper.takes_widths else ()
        return wrapper(self._with_zeros(inner), *more, activity_regularizer=regularizer)

    def _weighted(self, layer: keras.Layer, graph: Graph, annotation: Annotation) -> Any:
        base = base_layer(layer)
        activation = base.get_config().get("activation")
        separate = activation is not None and not _fuses(activation)
        if type(base) in TRANSPOSED:
            # The wrapper adds a bias before the activation.
            separate = activation not in (None, "linear")
        norm = self._plan(graph).folded_into(layer, self.uses)
        if norm is not None:
            self.folded[id(norm)] = layer
        changes: dict[str, Any] = {"activation": None} if separate else {}
        if base.activity_regularizer is not None:
            changes.update(_UNREGULARIZED)
        inner = _copy_changed(layer, changes) if changes else copy_built(layer)
        return QuantizedLayer(
            self._with_zeros(inner),
            norm=None if norm is None else copy_built(norm),
            weight_bits=self.bits,
            axes=annotation.weights,
            activation=activation if separate else None,
            activation_bits=self.activation_bits,
            regularizer=base.activity_regularizer,
        )

    def _with_zeros(self, inner: keras.Layer, names: tuple[str, ...] | None = None) -> Any:
        """The layer with a mask on the zeros of its kernels, where they are to stay."""
        plain = isinstance(inner, keras.layers.Layer) and not isinstance(inner, WeightWrapper)
        if not self.keep_zeros or not plain or not kernels(inner, names):
            return inner
        pruned = PrunedLayer(inner, weights=names)
        pruned.build_from_config({"layer": None})
        pruned.apply_mask(None)
        return pruned

    def _separable(self, layer: keras.Layer, graph: Graph) -> _Separable:
        config = layer.get_config()
        one = type(layer) is keras.layers.SeparableConv1D
        shared = {k: config[k] for k in ("data_format", "dtype", "trainable")}
        depthwise = (keras.layers.DepthwiseConv1D if one else keras.layers.DepthwiseConv2D)(
            config["kernel_size"],
            strides=config["strides"],
            padding=config["padding"],
            dilation_rate=config["dilation_rate"],
            depth_multiplier=config["depth_multiplier"],
            use_bias=False,
            depthwise_regularizer=config["depthwise_regularizer"],
            depthwise_constraint=config["depthwise_constraint"],
            name=layer.name + "_depthwise",
            **shared,
        )
        separate = not _fuses(config["activation"])
        pointwise = (keras.layers.Conv1D if one else keras.layers.Conv2D)(
            config["filters"],
            1,
            use_bias=config["use_bias"],
            activation=None if separate else config["activation"],
            kernel_regularizer=config["pointwise_regularizer"],
            kernel_constraint=config["pointwise_constraint"],
            bias_regularizer=config["bias_regularizer"],
            bias_constraint=config["bias_constraint"],
            name=layer.name,
            **shared,
        )
        shape = layer.input.shape
        depthwise.build(shape)
        pointwise.build(depthwise.compute_output_shape(shape))
        weights = layer.get_weights()
        depthwise.set_weights(weights[:1])
        pointwise.set_weights(weights[1:])
        norm = self._plan(graph).folded_into(layer, self.uses)
        if norm is not None:
            self.folded[id(norm)] = layer
        return _Separable(
            QuantizedLayer(
                self._with_zeros(depthwise),
                weight_bits=self.bits,
                activation_bits=self.activation_bits,
            ),
            QuantizedLayer(
                self._with_zeros(pointwise),
                norm=None if norm is None else copy_built(norm),
                weight_bits=self.bits,
                activation=config["activation"] if separate else None,
                activation_bits=self.activation_bits,
                regularizer=layer.activity_regularizer,
            ),
        )

    # -- connections --------------------------------------------------------------------------

    def call(
        self,
        layer: keras.Layer,
        new: keras.Layer,
        graph: Graph,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Call the new layer on quantized inputs and round what it gives."""
        plan = self._plan(graph)
        reads_floats = type(base_layer(layer)) is not keras.layers.Embedding
        if reads_floats and self.activation_bits is not None:
            args, kwargs = keras.tree.map_structure(
                lambda value: self._enter(value, graph, plan), (args, kwargs)
            )
        if self.activation_bits is not None:
            args, kwargs = keras.tree.map_structure(
                lambda value: self._pass(value, graph, plan, layer.name), (args, kwargs)
            )
        if id(layer) in self.folded:
            # The arguments `mask` and `training` of a normalization mean nothing to its stand-in.
            outputs = new(args[0])
        elif isinstance(new, _Separable):
            between = new.halves[0](*args)
            if self.activation_bits is not None:
                between = FakeQuantize(
                    self.activation_bits,
                    self.momentum,
                    name=layer.name + "_depthwise_quantize",
                )(between)
            outputs = new.halves[1](between)
        else:
            if isinstance(new, WeightWrapper):
                kwargs = {key: value for key, value in kwargs.items() if value is not None}
            copies = None
            if self.activation_bits is not None and plan.kinds[layer.name].kind == "keeps":
                copies = rewritten(layer, args[0])
            if copies is not None:
                new, args, kwargs = keras.layers.Identity(name=layer.name), (copies,), {}
            outputs = new(*args, **kwargs)
        name = layer.name
        if self.activation_bits is not None and plan.leaves(name):
            outputs = self._leave(outputs, graph, name)
        if self.activation_bits is not None and name in plan.rounded:
            outputs = self._round(outputs, graph, plan, name)
        return keras.tree.map_structure(self._keep, outputs)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.produced[id(tensor)] = tensor
        return tensor

    def _enter(self, value: Tensors, graph: Graph, plan: Plan) -> Any:
        """An input of the model, rounded once for all its readers."""
        if not isinstance(value, keras.KerasTensor):
            return value
        if id(value) in self.entered:
            return self.entered[id(value)][1]
        if id(value) in self.produced or value.name not in plan.rounded:
            return value
        parted = self._leave(value, graph, value.name) if plan.leaves(value.name) else value
        rounded = self._keep(self._round(parted, graph, plan, value.name))
        self.entered[id(value)] = (value, rounded)
        return rounded

    def _pass(self, value: Tensors, graph: Graph, plan: Plan, reader: str) -> Any:
        """An argument on its way from a region of floats into integers, or the other way."""
        if not isinstance(value, keras.KerasTensor):
            return value
        if "float" not in keras.backend.standardize_dtype(value.dtype):
            return value
        name = value._keras_history.operation.name
        key = (id(value), reader)
        if plan.enters(reader) and plan.unrounded(name):
            if key not in self.entered:
                joined = plan.kinds[reader].kind in ("joins", "average")
                loose = self._loose(value, plan, f"{name}_to_{reader}")
                if joined:
                    shared = self._quantizer(graph, plan, plan.find(reader), reader)
                    rounded = shared(loose, observe=False)
                else:
                    rounded = self._rounder(name, graph)(loose)
                self.entered[key] = (value, self._keep(rounded))
            return self.entered[key][1]
        parted = plan.stays(reader) and self._on_grid(value, graph)
        if parted or (name in plan.kinds and plan.fused(name, reader)):
            if key not in self.entered:
                number = sum(other == reader for _, other in self.borders)
                border = FloatBorder(name=f"{reader}_float" + (f"_{number}" if number else ""))
                self.borders.add((id(value), reader))
                self.entered[key] = (value, self._keep(border(value)))
            return self.entered[key][1]
        return value

    def _loose(self, value: Tensor, plan: Plan, label: str) -> Tensor:
        """An exact value that may be rounded without its source being rounded too.

        The converter hands a scale back through operators that share it, such as a reshaping.
        """
        name = value._keras_history.operation.name
        if name not in plan.kinds or not plan.hands_back(name):
            return value
        return self._keep(FloatBorder(name=f"{label}_float")(value))

    def _leave(self, outputs: Tensor, graph: Graph, name: str) -> Tensor:
        """The output of a float layer, behind which it may be rounded."""
        if not isinstance(outputs, keras.KerasTensor):
            return outputs
        if "float" not in keras.backend.standardize_dtype(outputs.dtype):
            return outputs
        key = (id(graph), name)
        if key not in self.behind:
            self.behind[key] = FloatBorder(name=f"{name}_rounded_float")
        return self._keep(self.behind[key](outputs))

    def _on_grid(self, value: Tensor, graph: Graph) -> bool:
        """Whether a value is rounded, or may be, outside this graph or in one nested in it."""
        source = source_of(value)
        if getattr(source, "only_rounds", False) or isinstance(source, keras.Model):
            return True
        return isinstance(source, keras.layers.InputLayer) and not graph.outermost

    def finish(self, model: keras.Model) -> keras.Model:
        """The model with its outputs rounded where they come from a region of floats."""
        names = {id(t): t._keras_history.operation.name for t in keras.tree.flatten(model.output)}
        plan = self.outermost

        def rounded(tensor: Tensor) -> Tensor:
            name = names[id(tensor)]
            whole = "float" not in keras.backend.standardize_dtype(tensor.dtype)
            if plan is None or whole or name not in plan.kinds or not plan.unrounded(name):
                return tensor
            return self._rounder(name, plan.graph)(self._loose(tensor, plan, f"{name}_output"))

        outputs = model.output
        if self.activation_bits is not None:
            outputs = keras.tree.map_structure(rounded, outputs)
        named = QuantizedModel(model.input, outputs, name=model.name)
        if not model.trainable:
            named.trainable = False
        return named

    def _rounder(self, name: str, graph: Graph) -> FakeQuantize:
        """The quantizer of an exact value, for those of its readers that take integers."""
        key = (id(graph), f"exact {name}")
        if key not in self.quantizers:
            self.quantizers[key] = FakeQuantize(
                self.activation_bits or 8,
                self.momentum,
                name=name + "_quantize",
                dtype=_float_policy(graph.layers[name]),
            )
        return self.quantizers[key]

    def _quantizer(self, graph: Graph, plan: Plan, group: str, name: str) -> FakeQuantize:
        key = (id(graph), group)
        if key not in self.quantizers:
            self.quantizers[key] = FakeQuantize(
                self.activation_bits or 8,
                self.momentum,
                fixed=plan.fixed.get(group),
                name=plan.labels[group] + "_quantize",
                dtype=_float_policy(graph.layers[name]),
            )
        return self.quantizers[key]

    def _round(self, outputs: Tensor, graph: Graph, plan: Plan, name: str) -> Tensor:
        if not isinstance(outputs, keras.KerasTensor):
            if plan.kinds[name].kind != "keeps":
                # Of several tensors each would need a range and readers of its own.
                return outputs
            return keras.tree.map_structure(
                lambda part: self._round(part, graph, plan, name), outputs
            )
        if "float" not in keras.backend.standardize_dtype(outputs.dtype):
            return outputs
        group, observes = plan.rounded[name]
        quantizer = self._quantizer(graph, plan, group, name)
        halves = rounds_halves(base_layer(graph.layers[name]))
        slope = leak(base_layer(graph.layers[name]))
        if halves:
            return quantizer(outputs, observe=observes, halves=halves)
        if slope:
            return quantizer(outputs, observe=observes, slope=slope)
        return quantizer(outputs) if observes else quantizer(outputs, observe=False)

    def _plan(self, graph: Graph) -> Plan:
        if id(graph) not in self.plans:
            self.plans[id(graph)] = Plan(graph, self.annotations, self.uses, self.regions)
            if graph.outermost:
                self.outermost = self.plans[id(graph)]
        return self.plans[id(graph)]


def _float_policy(layer: keras.Layer) -> Any:
    policy = layer.dtype_policy if isinstance(layer, keras.layers.Layer) else None
    return policy if type(policy) is keras.dtype_policies.DTypePolicy else None


def _fuses(activation: Callable[..., Tensor] | None) -> bool:
    return isinstance(activation, str) and activation in FUSED_ACTIVATIONS


_UNREGULARIZED = {"activity_regularizer": None}


def _copy_changed(layer: keras.Layer, changes: dict[str, Any]) -> Any:
    """A copy of a layer with other arguments for it, or for the layer within its wrappers."""
    if not isinstance(layer, WeightWrapper):
        copy = type(layer).from_config({**layer.get_config(), **changes})
    else:
        config = layer.get_config()
        config["layer"] = keras.saving.serialize_keras_object(_copy_changed(layer.layer, changes))
        copy = type(layer).from_config(config)
    copy.build_from_config(layer.get_build_config())
    copy.set_weights(layer.get_weights())
    return copy

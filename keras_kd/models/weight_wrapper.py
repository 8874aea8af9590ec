"""A layer run with other weights than its own, as pruning, clustering, quantization do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_kd.utils.types import Shape, Tensor

KERNELS = {
    "kernel",
    "recurrent_kernel",
    "depthwise_kernel",
    "pointwise_kernel",
    "embeddings",
}
"""Names of the variables that Keras layers multiply their inputs with."""


class WeightWrapper(keras.layers.Layer):
    """Run a layer with weights computed from its own.

    Subclasses say in `effective` which tensors take the place of which variables. Wrappers nest: a
    pruned layer may stand inside a quantized one. The wrapped layer keeps its variables, which are
    what the optimizer trains.

    Args:
        layer: Layer to run; its name becomes the wrapper's.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, layer: keras.Layer, **kwargs: object) -> None:
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(**kwargs)
        self.layer = layer
        self.supports_masking = bool(layer.supports_masking)

    def build(self, input_shape: Shape) -> None:
        """Build the wrapped layer."""
        if not self.layer.built:
            self.layer.build(input_shape)

    def get_build_config(self) -> dict[str, Any]:
        """The wrapped layer's, which may have more inputs than one."""
        return {"layer": self.layer.get_build_config()}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Build the wrapped layer as it was, then the wrapper."""
        inner = config["layer"]
        if not self.layer.built and inner:
            self.layer.build_from_config(inner)
        if not self.built:
            shape: Any = inner.get("input_shape") if inner else None
            self.build(shape)

    def effective(self, training: bool | None) -> list[tuple[Any, Tensor]]:
        """Pairs of a variable of the wrapped layer and the tensor that takes its place."""
        return effective_weights(self.layer, training)

    def call(
        self, inputs: Tensor, *args: object, training: bool | None = None, **kwargs: object
    ) -> Any:
        """Run the innermost layer with the effective weights."""
        pairs = self.effective(training)
        if _takes_training(self.base):
            kwargs["training"] = training
        return run_with(self.base, pairs, inputs, *args, **kwargs)

    @property
    def base(self) -> Any:
        """The innermost layer, which is no wrapper."""
        return base_layer(self.layer)

    def activated_layer(self) -> Any:
        """The layer whose activation comes last, where taps read its input."""
        return self.base

    def compute_mask(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """As the wrapped layer does."""
        return self.layer.compute_mask(inputs, mask)

    def get_config(self) -> dict[str, Any]:
        """Configuration, the wrapped layer's included."""
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make the wrapper from `get_config`."""
        config = dict(config)
        config["layer"] = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**config)


def base_layer(layer: keras.Layer) -> Any:
    """The layer inside any number of wrappers."""
    while isinstance(layer, WeightWrapper):
        layer = layer.layer
    return layer


def effective_weights(layer: keras.Layer, training: bool | None) -> list[tuple[Any, Tensor]]:
    """What a layer's variables are replaced by: nothing, unless it is a wrapper.

    Args:
        layer: Layer or wrapper.
        training: As in a layer's `call`.

    Returns:
        Pairs of variable and tensor.
    """
    return layer.effective(training) if isinstance(layer, WeightWrapper) else []


def kernels(layer: keras.Layer, names: tuple[str, ...] | None = None) -> list[Any]:
    """The variables of a layer that its inputs are multiplied with.

    Args:
        layer: Built layer, or a wrapper of one.
        names: Variable names to take instead of the usual ones.

    Returns:
        Variables of the innermost layer and its sub-layers, in their order.
    """
    wanted = KERNELS if names is None else set(names)
    return [v for v in base_layer(layer).variables if v.name in wanted]


def run_with(
    layer: keras.Layer, pairs: list[tuple[Any, Tensor]], *args: object, **kwargs: object
) -> Any:
    """Call a layer while some of its variables stand for other tensors.

    Args:
        layer: Built layer.
        pairs: Variables of the layer, and the tensor that each is to be read as.
        *args: Passed to the layer.
        **kwargs: Passed to the layer.

    Returns:
        The layer's output. Variables the layer assigns to (seeds, statistics) keep their new
        values, and what it gives to `add_loss` (activity regularization) stays its loss.
    """
    if not pairs:
        return layer(*args, **kwargs)
    replaced = {id(variable) for variable, _ in pairs}
    others = [v for v in layer.variables if id(v) not in replaced]
    # The others are named as well: in an outer scope (the JAX trainer's) they stand for tensors
    # that a new scope would not see.
    before = [(v, ops.convert_to_tensor(v)) for v in others]
    with keras.StatelessScope(state_mapping=[*pairs, *before], collect_losses=True) as scope:
        old = [scope.get_current_value(variable) for variable in others]
        outputs = layer(*args, **kwargs)
        new = [scope.get_current_value(variable) for variable in others]
    for variable, was, is_now in zip(others, old, new, strict=True):
        if is_now is not was:
            variable.assign(is_now)
    for loss in scope.losses:
        layer.add_loss(loss)
    return outputs


def every_layer(model: keras.Model) -> Iterator[tuple[str, Any]]:
    """All layers of a model with their paths, those in nested models and wrappers included.

    Args:
        model: Model or layer.

    Yields:
        Pairs of path (`"backbone/block3"`) and layer; wrapped layers come after their wrapper
        under the same path.
    """
    yield from _walk(model, "")


def _walk(owner: keras.Layer, prefix: str) -> Iterator[tuple[str, Any]]:
    for layer in owner.layers:
        path = prefix + layer.name
        yield path, layer
        inner = layer
        while isinstance(inner, (WeightWrapper, keras.layers.Wrapper)):
            inner = inner.layer
            yield path, inner
        if isinstance(inner, keras.Model):
            yield from _walk(inner, path + "/")


def _takes_training(layer: keras.Layer) -> bool:
    import inspect

    return "training" in inspect.signature(layer.call).parameters

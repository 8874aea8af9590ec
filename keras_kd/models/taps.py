"""A model seen at named layers, in one forward pass.

A tap is a layer's path, `"block3"` or `"backbone/block3"`, with an optional
suffix that says what is read there: `":input"`, `":preactivation"`, and on
attention layers `":query"`, `":key"`, `":value"` and `":scores"`.

While the model runs, each tapped layer's `call` is shadowed by an attribute of
the instance that passes everything on and keeps the tensor. So any layer that
the model calls can be tapped, in Functional, Sequential, nested and subclassed
models alike, the model is run once, and nothing of it is rebuilt or copied.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd.models import attention
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.masks import keras_mask, with_keras_mask
from keras_kd.utils.types import Tensor, Tensors

KINDS = ("output", "input", "preactivation", *attention.PARTS, "scores")


class Tap(NamedTuple):
    """A layer and what is read there.

    Attributes:
        layer: The layer.
        kind: One of `KINDS`; or `"unactivated"`, what the layer would return
            if a layer in it returned what it has before its activation.
        inner: For `"unactivated"` the tap of that activation.
    """

    layer: Any
    kind: str
    inner: "Tap | None" = None


def sublayers(layer: keras.Layer) -> list[Any]:
    """The layers directly inside `layer`, in the order they were made.

    `Model.layers` is public, but composite layers that are not models list
    theirs only privately.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


def find(model: keras.Model, path: str, side: str) -> Tap:
    """Resolve a tap's path in a model.

    Args:
        model: The model that is searched.
        path: `"layer"`, `"nested/layer"`, with an optional `":kind"`. A
            segment is a layer's name, or the attribute that holds it.
        side: `"teacher"` or `"student"`, for the message.

    Returns:
        The tap.

    Raises:
        ValueError: If there is no such layer or kind, with close matches.
    """
    layers, _, kind = path.partition(":")
    kind = kind or "output"
    if kind not in KINDS:
        raise ValueError(
            f"`{path}` asks for `{kind}` of a layer. Expected one of {', '.join(KINDS)}."
            + did_you_mean(kind, KINDS, most=3)
        )
    found = model
    for segment in layers.split("/"):
        inner = sublayers(found)
        by_name = {layer.name: layer for layer in inner}
        match = by_name.get(segment)
        if match is None:
            attribute = getattr(found, segment, None)
            match = attribute if any(attribute is layer for layer in inner) else None
        if match is None:
            match = _operation(found, segment)
        if match is None:
            raise ValueError(
                f"`{segment}`{f' of `{path}`' if segment != path else ''} is not a layer of the "
                f"{side} `{found.name}`."
                + did_you_mean(segment, by_name, most=3)
                + _elsewhere(model, segment)
                + " Nested layers are named by path, `backbone/block3`."
            )
        found = match
    if kind == "preactivation":
        found = activated(found)
    if kind == "preactivation" and not callable(getattr(found, "activation", None)):
        raise ValueError(
            f"`{path}`: layer `{found.name}` of the {side} has no activation of its own. "
            "Tap its output, or the input of the activation layer behind it."
        )
    if kind in (*attention.PARTS, "scores") and not attention.is_attention(found):
        raise ValueError(
            f"`{path}`: layer `{found.name}` of the {side} is a {type(found).__name__}, not an "
            "attention layer. Tap a `MultiHeadAttention` or `GroupQueryAttention` by its path."
        )
    return Tap(found, kind)


def activated(layer: keras.Layer) -> Any:
    """The layer whose `activation` a wrapper calls last; other layers are their own."""
    return layer.activated_layer() if hasattr(layer, "activated_layer") else layer


def _operation(model: keras.Model, name: str) -> Any:
    """An operation such as `ops.relu` in a Functional graph; these are no layers."""
    for operation in getattr(model, "operations", ()):
        if operation.name == name:
            return operation
    return None


def _elsewhere(model: keras.Model, name: str) -> str:
    """Where in the nested layers a layer of this name is."""

    def walk(layer: keras.Layer, prefix: str) -> Iterator[str]:
        for inner in sublayers(layer):
            if inner.name == name and prefix:
                yield prefix + inner.name
            yield from walk(inner, f"{prefix}{inner.name}/")

    places = list(walk(model, ""))[:3]
    return f" There is `{'`, `'.join(places)}`." if places else ""


def takes_training(model: keras.Model) -> bool:
    """Whether `model.call` has a `training` argument."""
    return "training" in inspect.signature(model.call).parameters


class Reading(NamedTuple):
    """One forward pass: the model's output and what its taps saw.

    Attributes:
        output: What the model returned.
        tensors: The tapped tensors, by the names the taps were given, carrying
            their Keras masks.
    """

    output: Any
    tensors: dict[str, Any]


def read(model: keras.Model, x: Tensors, taps: Mapping[str, Tap], training: bool) -> Reading:
    """Run a model once and keep what its taps see.

    Args:
        model: The model.
        x: What the model reads.
        taps: The taps by name; none is as good as calling the model.
        training: Passed on to the model.

    Returns:
        The output and the tapped tensors.

    Raises:
        ValueError: If a tapped layer was not called, or more than once.
    """
    seen: dict[str, list[Any]] = {name: [] for name in taps}
    masks: dict[str, list[Any]] = {name: [] for name in taps}
    with contextlib.ExitStack() as stack:
        for name, tap in taps.items():
            stack.enter_context(tapped(tap, seen[name].append))
            stack.enter_context(_mask_noted(tap, masks[name].append))
        output = run(model, x, training)
    for name, values in seen.items():
        if len(values) != 1:
            times = "was not called" if not values else f"was called {len(values)} times"
            raise ValueError(
                f"Layer `{taps[name].layer.name}` {times} in one pass of `{model.name}`, so what "
                "it computes there is not one tensor. Tap a layer that the model calls once."
            )
    return Reading(
        output, {name: _carrying(values[0], masks[name]) for name, values in seen.items()}
    )


def _carrying(tensor: Tensor, masks: Sequence[Any]) -> Any:
    """A tapped tensor with the first mask that was noted of it."""
    mask = next((mask for mask in masks if mask is not None), None)
    if mask is None or not ops.is_tensor(tensor) or keras_mask(tensor) is not None:
        return tensor
    # On a copy, since the model's own tensor goes on to layers that would heed the mask.
    return with_keras_mask(ops.copy(tensor), mask)


def calls(
    model: keras.Model, x: Tensors, layers: Iterable[Any]
) -> tuple[Any, list[tuple[Any, Any]]]:
    """Run a model once, in inference, and list what these layers return.

    Args:
        model: A Keras model.
        x: A batch that the model reads.
        layers: Layers or operations of the model.

    Returns:
        What the model returned, and `(layer, output)` of every call, in the order in which the
        calls end.
    """
    seen: list[tuple[Any, Any]] = []
    with contextlib.ExitStack() as stack:
        for layer in layers:

            def keep(result: Tensors, layer: keras.Layer = layer) -> None:
                seen.append((layer, result))

            stack.enter_context(tapped(Tap(layer, "output"), keep))
        output = run(model, x, False)
    return output, seen


def run(model: keras.Model, x: Tensors, training: bool) -> Any:
    """What a model returns, told of `training` if it asks for it."""
    return model(x, training=training) if takes_training(model) else model(x)


@contextlib.contextmanager
def tapped(tap: Tap, keep: Callable[[Any], None]) -> Iterator[None]:
    """Hand what a tap sees to `keep` while the model runs."""
    layer, kind, inner = tap
    if inner is not None:
        with _unactivated(layer, inner, keep):
            yield
        return
    if kind == "preactivation":
        activation = layer.activation
        if isinstance(activation, keras.layers.Layer):
            with tapped(Tap(activation, "input"), keep):
                yield
            return

        def activate(x: Tensor, *args: object, **kwargs: object) -> Any:
            keep(x)
            return activation(x, *args, **kwargs)

        with _shadowed(layer, "activation", activate):
            yield
        return
    if kind in attention.PARTS:
        with tapped(Tap(attention.projection(layer, kind), "output"), keep):
            yield
        return
    if kind == "scores":
        with _scores(layer, keep):
            yield
        return
    name = _name_of_call(layer)
    original = getattr(layer, name)

    def call(*args: object, **kwargs: object) -> Any:
        result = original(*args, **kwargs)
        keep(_first(args, kwargs) if kind == "input" else result)
        return result

    with _shadowed(layer, name, call):
        yield


@contextlib.contextmanager
def _unactivated(layer: keras.Layer, inner: Tap, keep: Callable[[Any], None]) -> Iterator[None]:
    """Hand on what `layer` computes without the activation at `inner`, which then acts on it all.

    For layers that call another one step by step, where no single call of it shows
    the whole, and an activation that acts on each step by itself.
    """
    original = layer.call
    activate = _activation_at(inner)

    def call(*args: object, **kwargs: object) -> Any:
        with _left_out(inner):
            result = original(*args, **kwargs)
        keep(result)
        return activate(result)

    with _shadowed(layer, "call", call):
        yield


def _activation_at(tap: Tap) -> Callable[[Any], Any]:
    """What acts on the values that a tap reads."""
    if tap.inner is not None:
        return _activation_at(tap.inner)
    return tap.layer.activation if tap.kind == "preactivation" else tap.layer.call


def _left_out(tap: Tap) -> contextlib.AbstractContextManager[None]:
    """Pass over the activation behind a tap."""
    if tap.inner is not None:
        return _left_out(tap.inner)

    def pass_on(*args: object, **kwargs: object) -> Any:
        return _first(args, kwargs)

    name = "activation" if tap.kind == "preactivation" else "call"
    return _shadowed(tap.layer, name, pass_on)


def _name_of_call(layer: keras.Layer) -> str:
    """A quantized layer runs `quantized_call` in place of `call`."""
    return "quantized_call" if getattr(layer, "quantization_mode", None) else "call"


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


@contextlib.contextmanager
def _mask_noted(tap: Tap, note: Callable[[Any], None]) -> Iterator[None]:
    """Note the Keras mask of what a tap reads while the model runs.

    Afterwards it may be gone: Keras attaches it when the layer has returned, and
    attention layers take it off the tensors that they read.
    """
    layer, kind, _ = tap
    name = _name_of_call(layer)
    original = getattr(layer, name)
    attends = attention.is_attention(layer)

    def call(*args: object, **kwargs: object) -> Any:
        if attends:
            note(attention.padding(layer, args, kwargs).of(kind))
        elif kind == "input":
            note(keras_mask(_first(args, kwargs)))
        result = original(*args, **kwargs)
        if kind == "output":
            note(keras_mask(result))
        return result

    with contextlib.ExitStack() as stack:
        stack.enter_context(_shadowed(layer, name, call))
        if not attends and kind != "input" and isinstance(layer, keras.layers.Layer):
            computed = layer.compute_mask

            def compute_mask(*args: object, **kwargs: object) -> Any:
                mask = computed(*args, **kwargs)
                note(mask if ops.is_tensor(mask) else None)
                return mask

            stack.enter_context(_shadowed(layer, "compute_mask", compute_mask))
        yield


@contextlib.contextmanager
def _scores(layer: keras.Layer, keep: Callable[[Any], None]) -> Iterator[None]:
    """Scaled scores before softmax and mask, `(batch, heads, queries, keys)`.

    Computed from the projections, since fused attention never shows them.
    """
    projected: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for part in ("query", "key"):
            stack.enter_context(
                tapped(
                    Tap(attention.projection(layer, part), "output"),
                    lambda x, part=part: projected.__setitem__(part, x),  # type: ignore[misc]
                )
            )
        original = layer.call

        def call(*args: object, **kwargs: object) -> Any:
            result = original(*args, **kwargs)
            keep(attention.scaled_scores(projected["query"], projected["key"]))
            return result

        stack.enter_context(_shadowed(layer, "call", call))
        yield


@contextlib.contextmanager
def inference(layers: Sequence[Any]) -> Iterator[None]:
    """Run these layers with `training=False`, whatever the model around them does.

    Args:
        layers: Layers that another model owns as well.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer.non_trainable_variables and takes_training(layer):
                stack.enter_context(_shadowed(layer, "call", _in_inference(layer.call)))
        yield


def _in_inference(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> Any:
        return original(*args, **{**kwargs, "training": False})

    return call


@contextlib.contextmanager
def _shadowed(layer: keras.Layer, name: str, value: object) -> Iterator[None]:
    """Set an attribute on the instance past Keras's tracking, and take it back."""
    had = name in vars(layer)
    before = vars(layer).get(name)
    object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        if had:
            object.__setattr__(layer, name, before)
        else:
            object.__delattr__(layer, name)

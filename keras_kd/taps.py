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
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_kd import attention
from keras_kd.masks import keras_mask, with_keras_mask

KINDS = ("output", "input", "preactivation", *attention.PARTS, "scores")


class Output(NamedTuple):
    """How one output of a model is made.

    Attributes:
        kind: `"logits"`, `"softmax"`, `"sigmoid"`, or `"unknown"` where it
            cannot be told from the layers.
        tap: The tap that reads the logits, `None` where the output itself is
            all there is.
    """

    kind: str
    tap: "Tap | None"


class Tap(NamedTuple):
    """A layer and what is read there."""

    layer: Any
    kind: str


def sublayers(layer: Any) -> list[Any]:
    """The layers directly inside `layer`, in the order they were made.

    `Model.layers` is public, but composite layers that are not models list
    theirs only privately.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


def find(model: Any, path: str, side: str) -> Tap:
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
            + _close(kind, KINDS)
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
                + _close(segment, by_name)
                + _elsewhere(model, segment)
                + " Nested layers are named by path, `backbone/block3`."
            )
        found = match
    if kind == "preactivation":
        found = _activated(found)
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


def _activated(layer: Any) -> Any:
    """The layer whose `activation` a wrapper calls last; other layers are their own."""
    return layer.activated_layer() if hasattr(layer, "activated_layer") else layer


def _operation(model: Any, name: str) -> Any:
    """An operation such as `ops.relu` in a Functional graph; these are no layers."""
    for operation in getattr(model, "operations", ()):
        if operation.name == name:
            return operation
    return None


def _close(name: str, names: Any) -> str:
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(f'`{m}`' for m in matches)}?" if matches else ""


def _elsewhere(model: Any, name: str) -> str:
    """Where in the nested layers a layer of this name is."""

    def walk(layer: Any, prefix: str) -> Iterator[str]:
        for inner in sublayers(layer):
            if inner.name == name and prefix:
                yield prefix + inner.name
            yield from walk(inner, f"{prefix}{inner.name}/")

    places = list(walk(model, ""))[:3]
    return f" There is `{'`, `'.join(places)}`." if places else ""


def takes_training(model: Any) -> bool:
    """Whether `model.call` has a `training` argument."""
    return "training" in inspect.signature(model.call).parameters


def outputs_of(model: Any) -> list[Output]:
    """How each output of a model is made, in the order of its flat outputs.

    Args:
        model: A Keras model. Its graph is read where it has one.

    Returns:
        One `Output` each; a single unknown one for a subclassed model.
    """
    tensors = _graph_outputs(model)
    if tensors is None:
        return [Output("unknown", None)]
    return [_made_by(tensor) for tensor in keras.tree.flatten(tensors)]


def _graph_outputs(model: Any) -> Any:
    """The symbolic outputs of a Functional or built Sequential model, else `None`."""
    # A subclass may be Functional by construction and yet compute something
    # else in a `call` of its own.
    plain = type(model).call in (keras.Model.call, keras.Sequential.call, _functional_call())
    if not plain or not getattr(model, "built", False):
        return None
    return getattr(model, "outputs", None) or None


def _functional_call() -> Any:
    """The `call` of Functional models, whose class Keras does not export."""
    global _FUNCTIONAL_CALL
    if _FUNCTIONAL_CALL is None:
        inputs = keras.Input((1,))
        _FUNCTIONAL_CALL = type(keras.Model(inputs, inputs)).call
    return _FUNCTIONAL_CALL


_FUNCTIONAL_CALL: Any = None

# Layers that end a model and neither make probabilities nor hide any.
_TRANSPARENT = (
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.Reshape,
    keras.layers.Flatten,
)


def _made_by(tensor: Any) -> Output:
    # The operation behind a symbolic tensor is in no public attribute.
    history = tensor._keras_history
    if getattr(history.operation, "only_rounds", False):
        # One such layer may round several tensors.
        node = history.operation._inbound_nodes[history.node_index]
        return _made_by(node.input_tensors[0])
    if isinstance(history.operation, _TRANSPARENT):
        inner = _made_by(history.operation.input)
        if isinstance(history.operation, keras.layers.Identity):
            return inner
        # The logits before a reshape have another shape than the output.
        return inner if inner.kind == "logits" else Output("unknown", None)
    return _from_operation(history.operation, history.tensor_index)


def _from_operation(operation: Any, index: int) -> Output:
    """How a layer or operation makes its output number `index`."""
    if isinstance(operation, keras.Model):
        inner_outputs = _graph_outputs(operation)
        if inner_outputs is None:
            return Output("unknown", None)
        return _made_by(keras.tree.flatten(inner_outputs)[index])
    wrapped = hasattr(operation, "activated_layer")
    operation = _activated(operation)
    name = type(operation).__name__
    if isinstance(operation, keras.layers.Softmax) or name in ("Softmax", "Sigmoid", "LogSoftmax"):
        if name == "LogSoftmax":
            # log_softmax leaves softened distributions as they are.
            return Output("logits", None)
        return Output(name.lower(), Tap(operation, "input"))
    activation = getattr(operation, "activation", None)
    if activation is None:
        known = isinstance(operation, keras.layers.Layer) and not isinstance(
            operation, keras.layers.Lambda | keras.layers.Wrapper
        )
        builtin = known and type(operation).__module__.startswith("keras.")
        return Output("logits" if builtin else "unknown", None)
    kind = getattr(activation, "__name__", type(activation).__name__).lower()
    if kind in ("softmax", "sigmoid"):
        if not wrapped and not type(operation).__module__.startswith("keras."):
            return Output("unknown", None)
        return Output(kind, Tap(operation, "preactivation"))
    return Output("logits", None)


class Reading(NamedTuple):
    """One forward pass: the model's output and what its taps saw.

    Attributes:
        output: What the model returned.
        tensors: The tapped tensors, by the names the taps were given, carrying
            their Keras masks.
    """

    output: Any
    tensors: dict[str, Any]


def read(model: Any, x: Any, taps: Mapping[str, Tap], training: bool) -> Reading:
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
            stack.enter_context(_tapped(tap, seen[name].append))
            stack.enter_context(_mask_noted(tap, masks[name].append))
        output = _run(model, x, training)
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


def _carrying(tensor: Any, masks: Sequence[Any]) -> Any:
    """A tapped tensor with the first mask that was noted of it."""
    mask = next((mask for mask in masks if mask is not None), None)
    if mask is None or not ops.is_tensor(tensor) or keras_mask(tensor) is not None:
        return tensor
    # On a copy, since the model's own tensor goes on to layers that would heed the mask.
    return with_keras_mask(ops.copy(tensor), mask)


def calls(model: Any, x: Any, layers: Iterable[Any]) -> tuple[Any, list[tuple[Any, Any]]]:
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

            def keep(result: Any, layer: Any = layer) -> None:
                seen.append((layer, result))

            stack.enter_context(_tapped(Tap(layer, "output"), keep))
        output = _run(model, x, False)
    return output, seen


def watch_outputs(model: Any, x: Any) -> tuple[Any, list[Output]]:
    """What a model without a graph returns and how that is made, seen in one eager pass.

    An output that is the very tensor that an inner layer returned was made by
    that layer.

    Args:
        model: A subclassed model.
        x: A batch that the model reads.

    Returns:
        What the model returned, and one `Output` for each flat output.
    """
    made: dict[int, Any] = {}
    kept = []
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers(include_self=False):
            # Kept alive, since a freed tensor's id may be given to another.
            def keep(result: Any, layer: Any = layer) -> None:
                kept.append(result)
                if ops.is_tensor(result):
                    made.setdefault(id(result), layer)

            stack.enter_context(_tapped(Tap(layer, "output"), keep))
        output = _run(model, x, False)
    return output, [
        _from_operation(made[id(tensor)], 0) if id(tensor) in made else Output("unknown", None)
        for tensor in keras.tree.flatten(output)
    ]


def _declared(model: Any) -> list[str] | None:
    """Names of the inputs of a model that reads a dict of them; `None` for any other."""
    inputs = getattr(model, "input", None) if _graph_outputs(model) is not None else None
    return list(inputs) if isinstance(inputs, dict) else None


def output_template(model: Any) -> Any:
    """The structure of a model's outputs with their names at the leaves.

    Args:
        model: A Keras model.

    Returns:
        A name, or a list, tuple or dict of names; `None` where the model has
        no graph.
    """
    structure = getattr(model, "output", None)
    if structure is None:
        outputs = getattr(model, "outputs", None)
        if not outputs:
            return None
        structure = outputs[0] if len(outputs) == 1 else list(outputs)
    return _named(structure, getattr(model, "output_names", None))


def _named(structure: Any, names: Any) -> Any:
    """A structure of outputs with their names at the leaves: a flat dict's keys are its names."""
    if isinstance(structure, dict) and not any(map(keras.tree.is_nested, structure.values())):
        return {key: key for key in structure}
    flat = keras.tree.flatten(structure)
    if not names or len(names) != len(flat):
        names = [f"output_{i}" for i in range(len(flat))]
    return keras.tree.pack_sequence_as(structure, list(names))


def _run(model: Any, x: Any, training: bool) -> Any:
    return model(x, training=training) if takes_training(model) else model(x)


@contextlib.contextmanager
def _tapped(tap: Tap, keep: Callable[[Any], None]) -> Iterator[None]:
    layer, kind = tap
    if kind == "preactivation":
        activation = layer.activation
        if isinstance(activation, keras.layers.Layer):
            with _tapped(Tap(activation, "input"), keep):
                yield
            return

        def activate(x: Any, *args: Any, **kwargs: Any) -> Any:
            keep(x)
            return activation(x, *args, **kwargs)

        with _shadowed(layer, "activation", activate):
            yield
        return
    if kind in attention.PARTS:
        with _tapped(Tap(attention.projection(layer, kind), "output"), keep):
            yield
        return
    if kind == "scores":
        with _scores(layer, keep):
            yield
        return
    name = _name_of_call(layer)
    original = getattr(layer, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        keep(_first(args, kwargs) if kind == "input" else result)
        return result

    with _shadowed(layer, name, call):
        yield


def _name_of_call(layer: Any) -> str:
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
    layer, kind = tap
    name = _name_of_call(layer)
    original = getattr(layer, name)
    attends = attention.is_attention(layer)

    def call(*args: Any, **kwargs: Any) -> Any:
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

            def compute_mask(*args: Any, **kwargs: Any) -> Any:
                mask = computed(*args, **kwargs)
                note(mask if ops.is_tensor(mask) else None)
                return mask

            stack.enter_context(_shadowed(layer, "compute_mask", compute_mask))
        yield


@contextlib.contextmanager
def _scores(layer: Any, keep: Callable[[Any], None]) -> Iterator[None]:
    """Scaled scores before softmax and mask, `(batch, heads, queries, keys)`.

    Computed from the projections, since fused attention never shows them.
    """
    projected: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for part in ("query", "key"):
            stack.enter_context(
                _tapped(
                    Tap(attention.projection(layer, part), "output"),
                    lambda x, part=part: projected.__setitem__(part, x),  # type: ignore[misc]
                )
            )
        original = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
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
    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "training": False})

    return call


@contextlib.contextmanager
def _shadowed(layer: Any, name: str, value: Any) -> Iterator[None]:
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


class Answer(NamedTuple):
    """What one model says of one batch; a pytree that travels through any step.

    Attributes:
        output: What the model returned.
        logits: Its logits, one tensor for each flat output.
        tensors: Tapped tensors by path.
    """

    output: Any
    logits: list[Any]
    tensors: dict[str, Any]


class Reader:
    """A model, the taps that are read of it, and its logits.

    Args:
        model: A Keras model.
        side: `"teacher"` or `"student"`, for messages.
        from_logits: Whether the model's outputs are logits; `None` finds out
            from its last layers.
    """

    def __init__(self, model: Any, side: str, from_logits: bool | None = None) -> None:
        self.model = model
        self.side = side
        self.from_logits = from_logits
        self.outputs = outputs_of(model)
        self.taps: dict[str, Tap] = {}
        self._built = False
        graph = getattr(model, "outputs", None)
        self.template: Any = output_template(model)
        self.shapes: list[Any] | None = (
            [tuple(t.shape) for t in keras.tree.flatten(graph)] if graph else None
        )

    def reset(self, paths: Iterable[str]) -> None:
        """Read these layers from now on.

        Raises:
            ValueError: If a path names no layer.
        """
        self.taps = {path: find(self.model, path, self.side) for path in paths}

    @property
    def settled(self) -> bool:
        """Whether the layers alone tell what the outputs are and how they are made."""
        told = self.from_logits is not None or "unknown" not in self.kinds()
        return told and self.template is not None

    def inspect(self, x: Any) -> None:
        """Find out from a batch what the layers alone do not tell.

        Args:
            x: A concrete batch that the model reads.

        Raises:
            ValueError: If outputs look like probabilities and nothing says how
                to get their logits.
        """
        if self.settled:
            return
        self._build(x)
        output, outputs = watch_outputs(self.model, self._own(x))
        if _graph_outputs(self.model) is None:
            self.outputs = outputs
        flat = keras.tree.flatten(output)
        self.template = _named(output, getattr(self.model, "output_names", None))
        self.shapes = [(None, *tensor.shape[1:]) for tensor in flat]
        if self.from_logits is not None:
            return
        for tensor, made in zip(flat, self.outputs):
            values = ops.convert_to_numpy(ops.cast(tensor, "float32"))
            if made.kind != "unknown" or not values.size:
                continue
            if values.min() >= 0 and values.max() <= 1:
                raise ValueError(
                    f"The outputs of the {self.side} `{self.model.name}` lie between 0 and 1 and "
                    "come from no layer whose logits can be read: they look like probabilities. "
                    "Return logits, or pass `from_logits=False` to the distiller and their "
                    "logarithm is distilled (`from_logits=True` if they are logits)."
                )

    def _build(self, x: Any) -> None:
        """Let the model build itself, in passes of its own that no tap should see."""
        if not self._built and not all(layer.built for layer in self.model._flatten_layers()):
            _run(self.model, self._own(x), False)
        self._built = True

    def _own(self, x: Any) -> Any:
        """Of a dict of inputs those that the model declares by name; all, if it declares none."""
        declared = _declared(self.model)
        # A model reads a dict in the order of its keys, so that others would shift it.
        if isinstance(x, dict) and declared is not None and set(declared) < set(x):
            return {name: x[name] for name in declared}
        return x

    def run(self, x: Any, training: bool) -> Any:
        """Return what the model returns."""
        return _run(self.model, self._own(x), training)

    def kinds(self) -> list[str]:
        """`"logits"`, `"softmax"`, `"sigmoid"` or `"unknown"` for each flat output."""
        return [output.kind for output in self.outputs]

    def read(self, x: Any, training: bool, binary: Sequence[bool] = ()) -> Answer:
        """Run the model once.

        Args:
            x: What the model reads.
            training: Passed on to the model.
            binary: For each flat output whether its units are independent.

        Returns:
            Output, logits and tapped tensors.
        """
        self._build(x)
        wanted = dict(self.taps)
        if self.from_logits is None:
            for i, output in enumerate(self.outputs):
                if output.tap is not None:
                    # No layer's path is made of a colon alone.
                    wanted[f":{i}"] = output.tap
        reading = read(self.model, self._own(x), wanted, training)
        logits = []
        for i, tensor in enumerate(keras.tree.flatten(reading.output)):
            if f":{i}" in wanted:
                tensor = _with_mask_of(reading.tensors.pop(f":{i}"), tensor)
            elif self.from_logits is False:
                tensor = _logits_from(tensor, i < len(binary) and binary[i])
            logits.append(tensor)
        return Answer(reading.output, logits, reading.tensors)


def _logits_from(probabilities: Any, binary: bool) -> Any:
    """Logits of probabilities; exact but for probabilities below 1e-30."""
    p = ops.cast(probabilities, "float32")
    log_p = ops.log(ops.maximum(p, 1e-30))
    return log_p - ops.log(ops.maximum(1.0 - p, 1e-30)) if binary else log_p


def _with_mask_of(tensor: Any, output: Any) -> Any:
    """The tapped logits, carrying the mask that Keras put on the output."""
    if keras_mask(tensor) is not None:
        return tensor
    return with_keras_mask(tensor, keras_mask(output))

"""A smaller model of the teacher's kind: narrower layers, fewer repeated blocks."""

from __future__ import annotations

import math
from typing import Any

import keras

from keras_kd.models.graph import Graph, copy_layer, is_graph
from keras_kd.students import chains
from keras_kd.students.blocks import Block, dropped, repeated
from keras_kd.students.widths import Site, Width, trace
from keras_kd.utils.types import Tensor, Tensors


def shrink(
    teacher: keras.Model,
    width: float = 0.5,
    depth: float = 1.0,
    *,
    divisor: int = 8,
    name: str | None = None,
) -> keras.Model:
    """Derive a smaller Functional model of the same kind as the teacher.

    Width: units, filters, embedding sizes and heads are multiplied by `width`. Channels are
    rounded to the nearest multiple of `divisor`, or of the largest power of two that is no more
    than half of the wanted number where that is less; at least one is left. Attention keeps the
    size of its heads and has fewer of them, `floor(heads * width + 1/2)` and at least one; a single
    head grows narrower instead. What the model reads and returns keeps its shape, and so do all
    channels that are added to it.

    Depth: of every run of `n` residual blocks that repeat one another,
    `max(1, floor(n * depth + 1/2))` are kept, spread evenly, the last among them. A block here is
    an identity shortcut: layers whose result, of the same shape as what they read, is added to it
    and that nothing else reads. Attention and feed-forward of a transformer layer go together.
    Blocks with a projection in the shortcut, which change resolution or width, stay.

    A model, or a nested one, without such runs is a plain chain where each layer reads the one
    before it alone: of `n` units in a row that return the same shape and are made alike, as Dense
    layers, or convolution, normalization and activation, `max(2, floor(n * depth + 1/2))` are kept,
    spread evenly, the first and the last among them.

    Understood are Dense, Embedding, Conv, transposed, depthwise and separable convolutions, batch,
    layer, RMS and group normalization, `MultiHeadAttention`, activations, pooling, padding,
    resizing, dropout, Flatten, Reshape that keeps or folds the channels, sums, products and
    concatenations, `keras.ops` of the same kinds, and nested models of these.

    Args:
        teacher: Built Functional or Sequential model, channels last. It is not changed.
        width: Fraction of the channels, in (0, 1].
        depth: Fraction of the repeated blocks, in (0, 1].
        divisor: Positive whole number of channels.
        name: Name of the student. Defaults to the teacher's with `_student`.

    Returns:
        A plain Functional model, freshly initialized, not compiled and trainable throughout, whose
        layers have the names of the teacher's. `Normalization` layers keep what they were adapted
        to. `initialize_from` gives it the teacher's weights.

    Raises:
        TypeError: If `teacher` is no Keras model.
        ValueError: If a value is out of range, the model's graph is not known, a layer cannot
            change its width (named), or `depth < 1` and nothing is repeated so often that some of
            it could go.

    Examples:
        >>> import keras
        >>> x = inputs = keras.Input((32, 32, 3))
        >>> x = keras.layers.Conv2D(64, 3, name="conv")(x)
        >>> x = keras.layers.GlobalAveragePooling2D()(x)
        >>> teacher = keras.Model(inputs, keras.layers.Dense(10, name="head")(x))
        >>> student = shrink(teacher, width=0.25)
        >>> student.get_layer("conv").filters, student.output_shape
        (16, (None, 10))

    Reference:
        - [Howard et al., 2017](https://arxiv.org/abs/1704.04861), section 3.3 (width multiplier)
        - [Sanh et al., 2019](https://arxiv.org/abs/1910.01108), section 3 (every other layer)
    """
    require_graph(teacher, "teacher")
    for argument, value in (("width", width), ("depth", depth)):
        if not 0 < value <= 1:
            raise ValueError(
                f"`{argument}` is the fraction that is kept, above 0 and at most 1. "
                f"Received: {argument}={value!r}."
            )
    if divisor < 1 or divisor != int(divisor):
        raise ValueError(
            f"`divisor` is a positive whole number of channels. Received: divisor={divisor!r}."
        )
    builder = _Builder(trace(teacher, width < 1), width, depth, divisor)
    student = builder.build(teacher, None, name or f"{teacher.name}_student")
    if depth < 1 and not builder.dropped_any:
        raise ValueError(
            f"`depth={depth}` drops residual blocks (identity shortcuts of one shape) or units of "
            f"a plain chain that repeat one another, and `{teacher.name}` has none, or so few that "
            "none is dropped. Shrink its width alone, or build the student by hand."
        )
    return student


def require_graph(model: keras.Model, side: str) -> None:
    """Raise unless the layers and connections of a model are known."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"The {side} is a Functional or Sequential `keras.Model`. "
            f"Received: {type(model).__name__}."
        )
    if not is_graph(model):
        hint = (
            "Call it on a batch, or begin it with a `keras.Input`, first."
            if isinstance(model, keras.Sequential)
            else "Only Functional and Sequential models show theirs: rebuild it as one of these."
        )
        raise ValueError(
            f"The {side} `{model.name}` of class {type(model).__name__} has no graph that can be "
            f"read. {hint}"
        )


def rounded(size: int, width: float, divisor: int) -> int:
    """The number of channels that `width` leaves of `size`.

    Args:
        size: Channels of the teacher.
        width: Fraction that is kept.
        divisor: Multiple to round to, where at least twice as many channels are wanted.

    Returns:
        At least 1, at most `size`.
    """
    if width == 1:
        return size
    wanted = size * width
    step = divisor
    if wanted < 2 * divisor:
        step = 2 ** max(0, math.floor(math.log2(wanted / 2))) if wanted >= 2 else 1
        step = min(step, divisor)
    return min(size, max(1, step * math.floor(wanted / step + 0.5)))


class _Builder:
    def __init__(self, sites: dict[int, Site], width: float, depth: float, divisor: int) -> None:
        self.sites = sites
        self.width = width
        self.depth = depth
        self.divisor = divisor
        self.made: dict[int, Any] = {}
        self.dropped_any = False

    def resolve(self, width: Width) -> int:
        """The student's size of a width."""
        size = width.size
        if size is None:
            raise ValueError("The size of an axis that is to be written down is not known.")
        if width.held:
            return size
        return rounded(size, self.width, 1 if width.unit == "heads" else self.divisor)

    def build(self, model: keras.Model, shapes: list[Any] | None, name: str) -> keras.Model:
        """One level of the student; `shapes` are those of the inputs of a nested model."""
        graph = Graph(model)
        skipped, ends = self._dropped(graph)
        inputs = graph.fresh_inputs()
        if shapes is not None:
            inputs = _inputs_of(inputs, shapes)
        values: dict[str, Any] = {
            tensor._keras_history.operation.name: tensor for tensor in keras.tree.flatten(inputs)
        }
        sources: dict[int, Any] = {}

        def clone(layer: keras.Layer) -> Any:
            # What is dropped, and nested models, whose inputs are not known yet, stand for
            # themselves.
            new = layer
            if layer.name not in skipped and not is_graph(layer):
                if id(layer) not in self.made:
                    self.made[id(layer)] = self._copy(layer)
                new = self.made[id(layer)]
            sources[id(new)] = layer
            return new

        def call(new: keras.Layer, *args: object, **kwargs: object) -> Tensor:
            source = sources[id(new)]
            if source.name in ends:
                output = values[ends[source.name]]
            elif source.name in skipped:
                output = keras.tree.flatten((args, kwargs))[0]
            elif is_graph(source):
                output = self._nested(source, args, kwargs)(*args, **kwargs)
            else:
                output = new(*args, **kwargs)
            values[source.name] = output
            return output

        clone_of = keras.models.clone_model(
            graph.model, input_tensors=inputs, clone_function=clone, call_function=call
        )
        return keras.Model(clone_of.input, clone_of.output, name=name)

    def _nested(self, model: keras.Model, args: object, kwargs: object) -> Any:
        if id(model) not in self.made:
            tensors = [t for t in keras.tree.flatten((args, kwargs)) if t is not None]
            shapes = [t.shape for t in tensors if isinstance(t, keras.KerasTensor)]
            self.made[id(model)] = self.build(model, shapes, model.name)
        return self.made[id(model)]

    def _dropped(self, graph: Graph) -> tuple[set[str], dict[str, str]]:
        """Names of the layers that go; for the last of each dropped block, what stands for it."""
        skipped: set[str] = set()
        ends: dict[str, str] = {}
        blocks: list[Block] = []
        if self.depth < 1:
            runs = repeated(graph)
            for run in runs:
                blocks.extend(dropped(run, self.depth))
            # Beside residual blocks, what repeats in a row is the inside of one.
            for unit in chains.units(graph) if not runs else []:
                blocks.extend(chains.dropped(unit, self.depth))
        for block in blocks:
            skipped |= block.inside
            ends[block.end] = block.start
        self.dropped_any = self.dropped_any or bool(blocks)
        return skipped, ends

    def _copy(self, layer: keras.Layer) -> Any:
        site = self.sites[id(layer)]
        changes = {key: change(self.resolve) for key, change in site.config.items()}
        if not isinstance(layer, keras.layers.Layer):
            return type(layer).from_config({**layer.get_config(), **changes})
        if not changes or self.width == 1:
            copy = copy_layer(layer)
        else:
            copy = type(layer).from_config({**layer.get_config(), **changes})
        copy.trainable = True
        if getattr(layer, "lora_rank", None):
            # An update would freeze a kernel that has learned nothing yet.
            copy.lora_rank = copy.lora_alpha = None
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            copy.build(tuple(layer.input.shape))
            # Unlike `set_weights`, this also makes the constants that the layer computes with.
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            copy.load_own_variables(store)
        return copy


def _inputs_of(inputs: Tensors, shapes: list[Any]) -> Any:
    """The same inputs with the channels of the tensors that a nested model is called on."""
    flat = [
        keras.Input(
            batch_shape=(*tensor.shape[:-1], shape[-1]),
            dtype=tensor.dtype,
            name=tensor._keras_history.operation.name,
        )
        for tensor, shape in zip(keras.tree.flatten(inputs), shapes)
    ]
    return keras.tree.pack_sequence_as(inputs, flat)

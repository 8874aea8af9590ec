"""Which layer of the student answers to which layer of the teacher, by depth and resolution."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.models.graph import is_graph
from keras_kd.models.taps import calls, sublayers
from keras_kd.transfers import projectors
from keras_kd.transfers.transfer import Transfer
from keras_kd.utils import checks, tables
from keras_kd.utils.types import Shape, Tensors


class LayerPair(NamedTuple):
    """A layer of the student and the layer of the teacher that it may learn from.

    Attributes:
        student: Path of the student's layer.
        student_shape: Shape of its output; `None` for what only a batch tells.
        teacher: Path of the teacher's layer.
        teacher_shape: Shape of its output.
    """

    student: str
    student_shape: Shape
    teacher: str
    teacher_shape: Shape


class LayerPairs(list[LayerPair]):
    """Pairs of layers, the shallowest first; `print` shows them as a table.

    Being a list, it may be cut, filtered and put together before `transfers` is called.
    """

    def __str__(self) -> str:
        rows = [
            (
                pair.student,
                _times(pair.student_shape),
                pair.teacher,
                _times(pair.teacher_shape),
                projectors.describe("auto", pair.teacher_shape, pair.student_shape),
            )
            for pair in self
        ]
        columns = ("Student layer", "Shape", "Teacher layer", "Shape", "Projector")
        return tables.render(columns, rows)

    def transfers(
        self, loss: keras.losses.Loss, projector: str | None = "auto", weight: float = 1.0
    ) -> list[Transfer]:
        """Make a transfer of every pair, ready for `compile(distillation_loss=...)`.

        Args:
            loss: As for `Transfer`. A `keras.losses.Loss` is copied for every pair, so that what
                one learns or remembers is its own.
            projector: `None` or the name of a kind, as for `Transfer`.
            weight: Weight of each transfer; non-negative float, dimensionless.

        Returns:
            One transfer a pair, named by the loss and the student's layer.

        Raises:
            ValueError: If there are no pairs, or a value is out of range.
            TypeError: If `projector` is a layer: one layer cannot serve several shapes.
        """
        if not self:
            raise ValueError("There are no pairs to transfer between. Keep at least one.")
        if projector is not None and not isinstance(projector, str):
            raise TypeError(
                "`projector` of several pairs is None or the name of a kind, such as 'auto'. "
                f"Received: projector={projector!r}. Make a `Transfer` for that layer yourself."
            )
        made = []
        for pair in self:
            own = loss
            if isinstance(loss, keras.losses.Loss):
                own = type(loss).from_config(loss.get_config())
            name = getattr(loss, "name", None) or getattr(loss, "__name__", "transfer")
            made.append(
                Transfer(
                    own,
                    teacher=pair.teacher,
                    student=pair.student,
                    projector=projector,
                    weight=weight,
                    name=f"{name}_{pair.student.replace('/', '_')}",
                )
            )
        return made


def match_layers(
    student: keras.Model,
    teacher: keras.Model,
    x: Tensors | None = None,
    teacher_x: Tensors | None = None,
) -> LayerPairs:
    """Propose which layers of student and teacher to match.

    Each model is cut into levels by what it is made of:

    - with attention layers, into blocks: the last sum before the next attention, behind its
      normalization where the model normalizes after the sum; or the layer that holds the block;
    - with maps or 1D convolutions, into stages of one resolution, each shown by its last layer;
    - with recurrent layers, into these;
    - else into hidden Dense layers, each with the activation and normalization behind it.

    What the model returns is left to the losses on its outputs. Stages are paired by resolution.
    Where that cannot be, levels are paired by relative depth, the last with the last: of `n` and
    `m >= n` levels, number `i` of the shorter with number `floor(i * m / n + 1/2)`, counted from 1.

    Args:
        student: Built model.
        teacher: Built model.
        x: A few rows that the models read. Needed for subclassed models and for sizes that inputs
            leave open.
        teacher_x: The same for the teacher, where it reads something else.

    Returns:
        A list of pairs that prints as a table; its `transfers(loss)` gives the transfers.

    Raises:
        TypeError: If a side is no Keras model.
        ValueError: If `x` is needed and not given, or a model has no level.

    Examples:
        >>> pairs = kd.match_layers(student, teacher)
        >>> print(pairs)
        >>> distiller.compile(loss=hard, distillation_loss=pairs.transfers(kd.losses.Hint()))

    Reference:
        - [Jiao et al., 2020](https://arxiv.org/abs/1909.10351), section 3 (uniform depth)
        - [Zagoruyko and Komodakis, 2017](https://arxiv.org/abs/1612.03928), section 3 (stages)
    """
    found = []
    for side, model, batch in (
        ("student", student, x),
        ("teacher", teacher, x if teacher_x is None else teacher_x),
    ):
        checks.require_model(model, side)
        found.append(_levels(model, side, batch))
    (our_kind, ours), (their_kind, theirs) = found
    numbers: list[tuple[int, int]] = []
    if our_kind == their_kind == "stages":
        numbers = _by_resolution(ours, theirs)
    return LayerPairs(
        LayerPair(ours[i].path, ours[i].shape, theirs[j].path, theirs[j].shape)
        for i, j in numbers or _by_depth(len(ours), len(theirs))
    )


class _Layer(NamedTuple):
    """A layer or operation that ran once, in the order of the computation.

    `reads` and `readers` hold positions in the same list, where the graph is known.
    """

    path: str
    layer: Any
    shape: Shape
    reads: list[int]
    readers: list[int]
    is_output: bool


def _by_resolution(ours: list[_Layer], theirs: list[_Layer]) -> list[tuple[int, int]]:
    sizes = [[level.shape[1:-1] for level in side] for side in (ours, theirs)]
    matcher = difflib.SequenceMatcher(None, sizes[0], sizes[1], autojunk=False)
    return [
        (block.a + k, block.b + k)
        for block in matcher.get_matching_blocks()
        for k in range(block.size)
    ]


def _by_depth(ours: int, theirs: int) -> list[tuple[int, int]]:
    shorter, longer = sorted((ours, theirs))
    picked = [(i, math.floor((i + 1) * longer / shorter + 0.5) - 1) for i in range(shorter)]
    return picked if ours <= theirs else [(j, i) for i, j in picked]


def _levels(model: keras.Model, side: str, x: Tensors) -> tuple[str, list[_Layer]]:
    """What the model is made of, and the layers that show it."""
    shown = is_graph(model)
    if shown:
        layers = _numbered(list(_graph_calls(model, "", {})))
        if _hides_blocks(model, layers):
            # Inside a layer that shows no graph, as the encoder of a vision transformer.
            shown, x = False, _zeros(model) if x is None else x
    if shown:
        if x is not None:
            # The sizes that this batch shows.
            _, seen = calls(model, x, [layer.layer for layer in layers])
            shapes = {id(op): (None, *keras.tree.flatten(y)[0].shape[1:]) for op, y in seen}
            layers = [
                layer._replace(shape=shapes.get(id(layer.layer), layer.shape)) for layer in layers
            ]
    elif x is not None:
        layers = _watched(model, x)
    else:
        raise ValueError(
            f"The {side} `{model.name}` of class {type(model).__name__} shows no graph of its "
            "blocks, so its layers are seen only while it runs. Pass a few rows that it reads as "
            f"`{'teacher_x' if side == 'teacher' else 'x'}=` (`x=` serves both sides)."
        )
    kind, levels = _cut(model, layers)
    if kind == "stages" and x is None and any(None in level.shape[1:-1] for level in levels):
        raise ValueError(
            f"The {side} `{model.name}` has maps whose sizes are not known before it reads a "
            "batch. Pass a few rows of the usual size as `x=`."
        )
    if not levels and any(_is_attention(layer) for layer in model._flatten_layers()):
        raise ValueError(
            f"The {side} `{model.name}` calls its attention layers more than once in a pass, so "
            "that no layer shows one level. Use losses on its outputs."
        )
    if not levels:
        raise ValueError(
            f"The {side} `{model.name}` has no hidden layers to match: no attention, convolution, "
            "recurrent or hidden Dense layer was found. Name the layers in `Transfer`s yourself."
        )
    return kind, levels


def _cut(model: keras.Model, layers: list[_Layer]) -> tuple[str, list[_Layer]]:
    hidden = [layer for layer in layers if not layer.is_output]
    blocks = {id(block) for block in _attention_blocks(model)} - {id(model)}
    held = [layer for layer in hidden if id(layer.layer) in blocks]
    if held:
        return "blocks", held
    if any(_is_attention(layer.layer) for layer in layers):
        return "blocks", _ends_of_blocks(layers)
    convolved = any(type(layer.layer).__name__.startswith(_ONE_DIMENSIONAL) for layer in layers)
    maps = [layer for layer in hidden if len(layer.shape) >= (3 if convolved else 4)]
    stages = _ends_of_stages(maps)
    if stages:
        return "stages", stages
    recurrent = [layer for layer in hidden if isinstance(layer.layer, _RECURRENT)]
    if recurrent:
        return "recurrent", recurrent
    return "dense", _ends_of_dense(hidden)


_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)
_ONE_DIMENSIONAL = ("Conv1D", "SeparableConv1D", "DepthwiseConv1D")
_NORMALIZATIONS = (keras.layers.LayerNormalization, keras.layers.RMSNormalization)
_NO_FEATURES = (
    "InputLayer",
    "Normalization",
    "Rescaling",
    "Resizing",
    "CenterCrop",
    "ZeroPadding",
    "Cropping",
    "Random",
)
"""Beginnings of the names of layers that prepare images rather than see anything in them."""


def _is_attention(layer: keras.Layer) -> bool:
    known = keras.layers.MultiHeadAttention | keras.layers.GroupQueryAttention
    # Many models bring one of their own, with projections inside.
    named = "attention" in type(layer).__name__.lower() and bool(sublayers(layer))
    return isinstance(layer, known) or (named and not _attention_inside(layer))


def _attention_inside(layer: keras.Layer) -> bool:
    return any(
        inner is not layer and "attention" in type(inner).__name__.lower()
        for inner in layer._flatten_layers()
    )


def _hides_blocks(model: keras.Model, layers: list[_Layer]) -> bool:
    """Whether blocks with attention are inside layers of the graph, which stand for several."""
    blocks = {id(block) for block in _attention_blocks(model)}
    return any(
        id(inner) in blocks
        for layer in layers
        if isinstance(layer.layer, keras.layers.Layer)
        for inner in layer.layer._flatten_layers(include_self=False)
    )


def _zeros(model: keras.Model) -> Any:
    """One row of zeros that the model reads, or `None` where a size is not known."""
    if any(None in tensor.shape[1:] for tensor in model.inputs):
        return None
    return keras.tree.map_structure(
        lambda tensor: np.zeros((1, *tensor.shape[1:]), tensor.dtype), model.input
    )


def _attention_blocks(layer: keras.Layer) -> list[Any]:
    """The layers that hold one block each: of those that hold attention the outermost repeating."""
    inner = [
        sub
        for sub in sublayers(layer)
        if not _is_attention(sub) and any(_is_attention(s) for s in sub._flatten_layers())
    ]
    found = [block for sub in inner for block in _attention_blocks(sub)]
    opened = len(found) > 1 or (isinstance(layer, keras.Model) and len(found) == 1)
    return found if opened else [layer]


def _ends_of_blocks(layers: list[_Layer]) -> list[_Layer]:
    """For each attention the last sum before the next one, or what is nearest to it."""
    positions = [i for i, layer in enumerate(layers) if _is_attention(layer.layer)]
    after = _normalizes_after(layers, positions[0])
    ends = []
    for begin, end in zip(positions, [*positions[1:], len(layers)]):
        shape = layers[begin].shape
        inside = [i for i in range(begin, end) if layers[i].shape == shape]
        sums = [i for i in inside if type(layers[i].layer).__name__ == "Add"]
        last = sums[-1] if sums else inside[-1]
        if after:
            norms = [
                i for i in layers[last].readers if isinstance(layers[i].layer, _NORMALIZATIONS)
            ]
            last = norms[0] if norms else last
        if not layers[last].is_output:
            ends.append(layers[last])
    return ends


def _normalizes_after(layers: list[_Layer], attention: int) -> bool:
    """Whether blocks end in a normalization: none then stands between a block and its attention."""
    reads = layers[attention].reads
    if not reads:
        return False
    source = layers[reads[0]]
    alone = set(source.readers) == {attention}
    return not (isinstance(source.layer, _NORMALIZATIONS) and alone)


def _ends_of_stages(maps: list[_Layer]) -> list[_Layer]:
    seen = [
        layer
        for layer in maps
        if not type(layer.layer).__name__.startswith(_NO_FEATURES)
        # A map of one pixel is a gate or a pooled vector.
        and any(size != 1 for size in layer.shape[1:-1])
    ]
    first = next((i for i, layer in enumerate(seen) if getattr(layer.layer, "weights", ())), 0)
    stages: list[_Layer] = []
    for layer in seen[first:]:
        if stages and stages[-1].shape[1:-1] == layer.shape[1:-1]:
            stages[-1] = layer
        else:
            stages.append(layer)
    return stages


def _ends_of_dense(hidden: list[_Layer]) -> list[_Layer]:
    levels: list[_Layer] = []
    for layer in hidden:
        dense = isinstance(layer.layer, keras.layers.Dense | keras.layers.EinsumDense)
        if dense:
            levels.append(layer)
        elif (
            levels
            and layer.shape == levels[-1].shape
            and not isinstance(layer.layer, keras.layers.Dropout)
        ):
            levels[-1] = layer
    return levels


# --------------------------------------------------------------------------- the layers


class _Call(NamedTuple):
    """A call in a graph, with the identities of the tensors that it reads and makes."""

    path: str
    layer: Any
    shape: Shape
    reads: list[int]
    makes: list[int]
    is_output: bool


def _graph_calls(model: keras.Model, prefix: str, same: dict[int, int]) -> Iterator[_Call]:
    """Calls of what is called once, in order, nested graphs opened.

    A tensor that enters or leaves a nested graph has one identity, kept in `same`.
    """
    if isinstance(model, keras.Sequential):
        graph = keras.Model(model.inputs[0], model.outputs[0])
    else:
        graph = keras.Model(model.input, model.output)
    returned = {id(tensor) for tensor in graph.outputs} if not prefix else set()
    # Keras lists the calls of a graph in no public attribute.
    nodes = [node for level in graph._nodes_by_depth.values() for node in level]
    for operation in graph.operations:
        own = [node for node in nodes if node.operation is operation]
        if len(own) != 1:
            continue
        path = f"{prefix}{operation.name}"
        reads = [same.get(id(t), id(t)) for t in own[0].input_tensors]
        outputs = own[0].output_tensors
        if is_graph(operation):
            for inner, outer in zip(operation.inputs, reads):
                same[id(inner)] = outer
            ends = {}
            for inner, tensor in zip(operation.outputs, outputs):
                same[id(tensor)] = same.get(id(inner), id(inner))
                ends[id(inner)] = id(tensor) in returned
            for call in _graph_calls(operation, f"{path}/", same):
                yield call._replace(is_output=any(ends.get(made, False) for made in call.makes))
            continue
        makes = [id(tensor) for tensor in outputs]
        shape = tuple(outputs[0].shape)
        yield _Call(path, operation, shape, reads, makes, bool(returned & set(makes)))


def _numbered(found: list[_Call]) -> list[_Layer]:
    """Calls whose connections are positions in the list."""
    maker = {tensor: i for i, call in enumerate(found) for tensor in call.makes}
    reads = [[maker[t] for t in call.reads if t in maker] for call in found]
    readers: list[list[int]] = [[] for _ in found]
    is_output = [call.is_output for call in found]
    for i, sources in enumerate(reads):
        for source in sources:
            readers[source].append(i)
    for i in reversed(range(len(found))):
        # Logits before a softmax are an output as well.
        if is_output[i] and type(found[i].layer).__name__ in _ENDINGS:
            for source in reads[i]:
                is_output[source] = True
    return [
        _Layer(call.path, call.layer, call.shape, reads[i], readers[i], is_output[i])
        for i, call in enumerate(found)
    ]


_ENDINGS = {"Activation", "Identity", "LogSoftmax", "Reshape", "Sigmoid", "Softmax"}


def _watched(model: keras.Model, x: Tensors) -> list[_Layer]:
    """The layers that run once while the model reads a batch, in the order in which they end."""
    # Layers that are not built yet build themselves in a pass of their own.
    calls(model, x, [])
    paths = {id(layer): (layer, path) for layer, path in _paths(model, "")}
    output, seen = calls(model, x, [layer for layer, _ in paths.values()])
    times = Counter(id(layer) for layer, _ in seen)
    returned = {id(tensor) for tensor in keras.tree.flatten(output)}
    found = []
    for layer, result in seen:
        if times[id(layer)] == 1:
            tensor = keras.tree.flatten(result)[0]
            shape = (None, *tensor.shape[1:])
            is_output = id(tensor) in returned
            found.append(_Layer(paths[id(layer)][1], layer, shape, [], [], is_output))
    return found


def _paths(layer: keras.Layer, prefix: str) -> Iterator[tuple[Any, str]]:
    """The layers of a model with their paths; graphs are opened, other models listed and opened."""
    for inner in sublayers(layer):
        path = f"{prefix}{inner.name}"
        if isinstance(inner, keras.Model) or _attention_blocks(inner) != [inner]:
            yield from _paths(inner, f"{path}/")
        if not is_graph(inner):
            yield inner, path


def _times(shape: Shape) -> str:
    return "x".join("?" if size is None else str(size) for size in shape[1:])

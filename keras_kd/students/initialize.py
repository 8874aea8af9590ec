"""Where a student starts: from the teacher's layers, whole or in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.models import lora
from keras_kd.models.taps import find, sublayers
from keras_kd.students.align import aligned
from keras_kd.students.shrink import require_graph
from keras_kd.students.widths import Dim, Site, Width, expand, trace, variable_at, weight_at
from keras_kd.utils import tables
from keras_kd.utils.errors import did_you_mean

CHOICES = ("every_other", "names", "importance")


class CopiedLayer(NamedTuple):
    """What one layer of the student was given.

    Attributes:
        student: Path of the student's layer.
        teacher: Path of the teacher's layer, `""` if there is none that fits.
        how: `"whole"`, `"part"`, or `"not"` where the layer keeps its own start.
        parameters: How many numbers were copied.
        of: How many numbers the student's layer has.
    """

    student: str
    teacher: str
    how: str
    parameters: int
    of: int


class Copied(list[CopiedLayer]):
    """What `initialize_from` copied, one entry a layer of the student that has weights.

    `print` shows it as a table.
    """

    @property
    def parameters(self) -> int:
        """How many numbers were copied."""
        return sum(row.parameters for row in self)

    def __str__(self) -> str:
        total = sum(row.of for row in self)
        return tables.render(
            ("Student", "Teacher", "Copied", "Parameters", "Of"),
            self,
            f"{self.parameters:,} of {total:,} parameters of the student come from the teacher",
        )


def initialize_from(
    student: keras.Model,
    teacher: keras.Model,
    layers: str | Mapping[str, str] = "every_other",
    *,
    norm: str = "l1",
) -> Copied:
    """Start a student from the weights of its teacher.

    Updates of low rank in the teacher are copied as part of the kernels; those of the student,
    where its kernels are copied, begin anew.

    Args:
        student: Built model, changed in place.
        teacher: Built model, not changed.
        layers: Which layer starts from which.

            - `"every_other"`: the layers of both models, in order, are the
              same but for blocks that the teacher repeats more often; of `n`
              repetitions the student's `m` start from numbers
              `floor(i * n / m)`, every other one for half as many.
            - `"names"`: from the layer of the same path, where all shapes
              agree.
            - `"importance"`: the same, with the most important channels of
              layers that are wider in the teacher, for students made by
              `shrink`. A channel's importance is the norm of the weights that
              make it, summed over all layers that make it together; the order
              of the channels is kept, and every layer that reads them is cut
              to fit. Statistics of BatchNormalization are cut alike, and are
              to be renewed by training. Functional and Sequential models alone.
            - A mapping of paths of the student to paths of the teacher:
              layers, blocks or nested models with the same weights.
        norm: `"l1"` or `"l2"`, for `"importance"`.

    Returns:
        What was copied: a list that prints as a table.

    Raises:
        TypeError: If a model is no `keras.Model`, or `layers` is of another type.
        ValueError: If a model is not built, a name is unknown, shapes differ, or nothing fits.
            Nothing has been copied then.

    Examples:
        >>> student = kd.students.shrink(teacher, width=0.5)
        >>> copied = kd.students.initialize_from(student, teacher, layers="importance")
        >>> print(copied)

    Reference:
        - [Sanh et al., 2019](https://arxiv.org/abs/1910.01108), section 3
        - [Li et al., 2017](https://arxiv.org/abs/1608.08710), section 3.1
    """
    for side, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, keras.Model):
            raise TypeError(f"The {side} is a `keras.Model`. Received: {type(model).__name__}.")
        if not model.built or not model.weights:
            raise ValueError(
                f"The {side} `{model.name}` has no weights yet. Call it on a batch first."
            )
    if norm not in ("l1", "l2"):
        raise ValueError(f"`norm` is 'l1' or 'l2'. Received: norm={norm!r}.")
    if isinstance(layers, Mapping):
        plan = _by_mapping(student, teacher, layers)
    elif not isinstance(layers, str):
        raise TypeError(
            f"`layers` is one of {', '.join(map(repr, CHOICES))}, or a mapping of the student's "
            f"paths to the teacher's. Received: layers={layers!r}."
        )
    elif layers == "every_other":
        plan = _in_order(student, teacher)
    elif layers == "names":
        plan = _by_name(student, teacher)
    elif layers == "importance":
        plan = _by_importance(student, teacher, norm)
    else:
        raise ValueError(
            f"`layers={layers!r}` is unknown. Expected a mapping, or one of "
            f"{', '.join(map(repr, CHOICES))}." + did_you_mean(layers, CHOICES, quote="'")
        )
    if not any(step.values for step in plan):
        raise ValueError(
            f"No layer of `{student.name}` has the name and the shapes of a layer of "
            f"`{teacher.name}`. Pass a mapping of the student's paths to the teacher's."
        )
    copied = Copied()
    for step in plan:
        for variable, value in step.values:
            variable.assign(value)
        number = sum(int(np.prod(value.shape)) for _, value in step.values)
        how = ("whole" if step.whole else "part") if step.values else "not"
        of = sum(int(np.prod(v.shape)) for v in step.variables)
        copied.append(CopiedLayer(step.student, step.teacher, how, number, of))
    given = {id(variable) for step in plan for variable, _ in step.values}
    for layer in lora.updated_layers(student):
        kernel, _, b = lora.parts(layer)
        if id(kernel) in given:
            # The kernel that was copied is the whole one.
            b.assign(keras.ops.zeros(b.shape, b.dtype))
    for layer in student._flatten_layers():
        if isinstance(layer, keras.layers.Normalization) and layer.weights:
            # It computes with constants made of its weights.
            layer.finalize_state()
    return copied


class _Step(NamedTuple):
    """What one layer of the student is to be given."""

    student: str
    teacher: str
    variables: Sequence[Any]
    values: list[tuple[Any, Any]]
    whole: bool


def leaves(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The layers with weights of a model by path, nested models opened, blocks whole."""
    for layer in sublayers(model):
        path = f"{prefix}{layer.name}"
        if isinstance(layer, keras.Model):
            yield from leaves(layer, f"{path}/")
        elif _state(layer):
            yield path, layer


def _state(layer: keras.Layer) -> list[Any]:
    """A layer's weights but for the seeds of its random numbers and updates of low rank."""
    updates = {id(v) for inner in lora.updated_layers(layer) for v in lora.parts(inner)[1:]}
    return [
        v for v in layer.variables if ("int" not in v.dtype or v.trainable) and id(v) not in updates
    ]


def _values(layer: keras.Layer) -> list[Any]:
    """What `_state` holds, the kernels with their updates."""
    sums = {id(lora.parts(inner)[0]): inner for inner in lora.updated_layers(layer)}
    return [
        lora.merged(sums[id(v)]) if id(v) in sums else keras.ops.convert_to_numpy(v)
        for v in _state(layer)
    ]


def _whole(student: str, ours: keras.Layer, teacher: str, theirs: keras.Layer) -> _Step:
    """All weights of a layer, block or nested model.

    Raises:
        ValueError: If the shapes differ.
    """
    mine, other = _state(ours), _state(theirs)
    shapes = [[tuple(v.shape) for v in side] for side in (mine, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`{student}` of the student has weights of shapes {shapes[0]}, `{teacher}` of the "
            f"teacher {shapes[1]}. Pair layers of the same shapes, or shrink the teacher and use "
            "`layers='importance'`."
        )
    values = list(zip(mine, _values(theirs)))
    return _Step(student, teacher, mine, values, True)


def _by_mapping(
    student: keras.Model, teacher: keras.Model, layers: Mapping[str, str]
) -> list[_Step]:
    if not layers:
        raise ValueError("`layers` is an empty mapping. Name at least one pair of layers.")
    plan, given = [], set()
    for ours, theirs in layers.items():
        layer = find(student, ours, "student").layer
        plan.append(_whole(ours, layer, theirs, find(teacher, theirs, "teacher").layer))
        if not plan[-1].values:
            raise ValueError(f"`{ours}` of the student has no weights. Name a layer that has some.")
        given |= {id(v) for v in plan[-1].variables}
    return plan + _rest(student, given)


def _rest(student: keras.Model, given: set[int]) -> list[_Step]:
    """The layers that keep their own start."""
    return [
        _Step(path, "", _state(layer), [], False)
        for path, layer in leaves(student)
        if not given & {id(v) for v in _state(layer)}
    ]


def _by_name(student: keras.Model, teacher: keras.Model) -> list[_Step]:
    theirs = dict(leaves(teacher))
    plan = []
    for path, layer in leaves(student):
        other = theirs.get(path)
        if type(other) is type(layer) and _shapes(layer) == _shapes(other):
            plan.append(_whole(path, layer, path, other))
        else:
            plan.append(_Step(path, "", _state(layer), [], False))
    return plan


def _shapes(layer: keras.Layer) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in _state(layer)]


def _in_order(student: keras.Model, teacher: keras.Model) -> list[_Step]:
    ours, theirs = list(leaves(student)), list(leaves(teacher))
    kinds = [
        [(type(layer).__name__, *_shapes(layer)) for _, layer in side] for side in (ours, theirs)
    ]
    pairs = aligned(kinds[0], kinds[1])
    if isinstance(pairs, int):
        path, layer = ours[min(pairs, len(ours) - 1)]
        raise ValueError(
            f"`{path}` of the student, a {type(layer).__name__} with weights of shapes "
            f"{_shapes(layer)}, is where the layers of `{student.name}` stop being those of "
            f"`{teacher.name}` with repeated blocks left out. Pass a mapping, or "
            "`layers='importance'` for a student made by `shrink`."
        )
    return [_whole(*ours[i], *theirs[j]) for i, j in pairs]


# --------------------------------------------------------------------- importance


def _by_importance(student: keras.Model, teacher: keras.Model, norm: str) -> list[_Step]:
    require_graph(student, "student")
    require_graph(teacher, "teacher")
    sites = trace(teacher, widths_change=False)
    ours = dict(leaves(student))
    paired = {
        path: (sites.get(id(layer)), layer, ours[path])
        for path, layer in leaves(teacher)
        if path in ours and type(ours[path]) is type(layer)
    }
    kept = _kept([(site, mine) for site, _, mine in paired.values() if site], sites, norm)
    plan = []
    for path, layer in ours.items():
        if path not in paired:
            plan.append(_Step(path, "", _state(layer), [], False))
            continue
        site, other, _ = paired[path]
        if _shapes(layer) == _shapes(other):
            plan.append(_whole(path, layer, path, other))
            continue
        values = _parts(site, layer, kept) if site is not None else []
        plan.append(_Step(path, path if values else "", _state(layer), values, False))
    return plan


def _kept(
    pairs: list[tuple[Site, Any]], sites: dict[int, Site], norm: str
) -> dict[Width, np.ndarray]:
    """Which of the teacher's channels of every width the student keeps, in order."""
    sizes: dict[Width, int] = {}
    for site, mine in pairs:
        for path, dims in site.weights.items():
            variable = weight_at(mine, path)
            for axis, dim in enumerate(dims):
                if dim is None:
                    continue
                parts = expand(dim)
                if len({width for width, _ in parts}) == 1:
                    count = sum(repeat for _, repeat in parts)
                    sizes.setdefault(parts[0][0], variable.shape[axis] // count)
    scores: dict[Width, np.ndarray] = {}
    for site in sites.values():
        for path, axis in site.makes:
            _add_scores(scores, site, path, axis, norm)
    kept = {}
    for width, count in sizes.items():
        size = width.size or 0
        if width.held or count >= size:
            kept[width] = np.arange(size)
            continue
        order = np.argsort(-scores.get(width, np.zeros(size)), kind="stable")
        kept[width] = np.sort(order[:count])
    return kept


def _add_scores(
    scores: dict[Width, np.ndarray], site: Site, path: str, axis: int, norm: str
) -> None:
    """Add the norms of the weights that make each channel to the scores of its width."""
    dim = site.weights[path][axis]
    if dim is None:
        return
    kernel = keras.ops.convert_to_numpy(weight_at(site.layer, path)).astype("float64")
    rows = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    norms = np.abs(rows).sum(1) if norm == "l1" else np.sqrt((rows**2).sum(1))
    begin = 0
    for width, repeat in expand(dim):
        size = width.size or 0
        part = norms[begin : begin + size * repeat].reshape(repeat, size).sum(0)
        scores[width] = scores.get(width, 0.0) + part
        begin += size * repeat


def _indices(dim: Dim, kept: dict[Width, np.ndarray]) -> np.ndarray:
    """Positions along an axis of the teacher that the student keeps."""
    begin = 0
    found: list[np.ndarray] = []
    for width, repeat in expand(dim):
        size = width.size or 0
        index = kept.get(width, np.arange(size))
        found.extend(begin + i * size + index for i in range(repeat))
        begin += size * repeat
    return np.concatenate(found) if found else np.arange(0)


def _parts(site: Site, layer: keras.Layer, kept: dict[Width, np.ndarray]) -> list[tuple[Any, Any]]:
    """The kept parts of a layer's weights; none if a shape does not come out as the student's."""
    values = []
    for path, dims in site.weights.items():
        value = keras.ops.convert_to_numpy(weight_at(site.layer, path))
        for axis, dim in enumerate(dims):
            if dim is not None:
                value = np.take(value, _indices(dim, kept), axis=axis)
        variable = variable_at(layer, path)
        if tuple(variable.shape) != value.shape:
            return []
        values.append((variable, value))
    return values

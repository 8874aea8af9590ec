"""Repeated units of a plain chain of layers: what may be dropped where nothing is added up."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras

from keras_kd.models.graph import Graph
from keras_kd.students.blocks import Block


def units(graph: Graph) -> list[list[Block]]:
    """Runs of units that repeat one another in a plain chain, one behind the other.

    A unit is a kernel and what follows it up to the next unit: convolution, normalization and
    activation, or depthwise and pointwise convolution with theirs. All of a run return the same
    shape; the first may read another.

    Args:
        graph: One level of a model.

    Returns:
        Runs of at least three units, since the first and the last of a run always stay.
    """
    runs: list[list[Block]] = []
    for chain in _chains(graph):
        parts = [_part(graph, name) for name in chain]
        taken: set[str] = set()
        # The smallest units first: two that differ are one unit where the pair repeats.
        for period in range(1, len(chain) // 3 + 1):
            for begin in range(len(chain) - 3 * period + 1):
                run = _run(parts[begin:], period, taken)
                if len(run) > 2:
                    runs.append(run)
                    taken.update(name for unit in run for name in unit.inside)
    return runs


def dropped(run: list[Block], depth: float) -> list[Block]:
    """The units of a run that go when a fraction of them stays.

    Of `n` units `max(2, floor(n * depth + 1 / 2))` stay, spread evenly, the first and the last
    among them.

    Args:
        run: Units that repeat one another.
        depth: Fraction that stays, in (0, 1].

    Returns:
        The others, in order.
    """
    last = len(run) - 1
    keep = max(2, math.floor(len(run) * depth + 0.5))
    kept = {math.floor(i * last / (keep - 1) + 0.5) for i in range(keep)}
    return [unit for i, unit in enumerate(run) if i not in kept]


def _chains(graph: Graph) -> list[list[str]]:
    """Layers of which each reads the one before it alone, and is alone in that.

    What the first reads may be read by others as well.
    """
    links = [name for name in graph.layers if _is_link(graph, name)]
    follower: dict[str, str] = {}
    for name in links:
        before = graph.producers[name][0]
        if before in links and set(graph.consumers[before]) == {name}:
            follower[before] = name
    chains = []
    for name in set(links) - set(follower.values()):
        chain = [name]
        while chain[-1] in follower:
            chain.append(follower[chain[-1]])
        chains.append(chain)
    return chains


def _is_link(graph: Graph, name: str) -> bool:
    """Whether a layer makes one tensor of one other, at one place."""
    if not graph.called_once(name) or len(set(graph.producers[name])) != 1:
        return False
    return isinstance(graph.layers[name].output, keras.KerasTensor)


class _Part(NamedTuple):
    """A layer of a chain.

    Attributes:
        name: Its name.
        before: Name of the layer that it reads.
        kind: Its class and activation.
        weights: Shapes of its weights.
        reads: The shape that it reads.
        returns: The shape that it returns.
    """

    name: str
    before: str
    kind: tuple[str, str]
    weights: tuple[tuple[int, ...], ...]
    reads: Any
    returns: Any


def _part(graph: Graph, name: str) -> _Part:
    layer = graph.layers[name]
    activation = getattr(layer, "activation", None)
    return _Part(
        name,
        graph.producers[name][0],
        (type(layer).__name__, getattr(activation, "__name__", type(activation).__name__)),
        tuple(tuple(weight.shape) for weight in getattr(layer, "weights", [])),
        graph.input_shape(name),
        tuple(layer.output.shape),
    )


def _run(parts: list[_Part], period: int, taken: set[str]) -> list[Block]:
    """The units of this many layers, from the first layer on, that repeat one another."""
    if all(len(shape) < 2 for shape in parts[0].weights):
        # Else what follows a kernel would be taken apart from it.
        return []
    run: list[Block] = []
    for start in range(0, len(parts) - period + 1, period):
        unit = parts[start : start + period]
        if any(part.name in taken for part in unit) or (run and not _repeats(unit, run)):
            break
        kind = tuple((part.kind, part.weights) for part in unit)
        run.append(Block(unit[0].before, unit[-1].name, frozenset(p.name for p in unit), kind))
    return run


def _repeats(unit: list[_Part], run: list[Block]) -> bool:
    """Whether a unit keeps the shape it reads and is made like those of the run before it."""
    if unit[0].reads != unit[-1].returns:
        return False
    if len(run) > 1:
        return tuple((part.kind, part.weights) for part in unit) == run[-1].kind
    # The first unit makes the shape, perhaps of another.
    return [part.kind for part in unit] == [kind for kind, _ in run[0].kind]

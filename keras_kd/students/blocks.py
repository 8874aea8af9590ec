"""Repeated residual blocks of a graph: what may be dropped whole."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras

from keras_kd.models.graph import OUTPUT, Graph

_TAILS = {
    "Activation",
    "Dropout",
    "ELU",
    "Gelu",
    "LayerNormalization",
    "LeakyReLU",
    "Relu",
    "ReLU",
    "RMSNormalization",
    "Silu",
}
"""What may stand between the sum of one block and the beginning of the next."""


class Block(NamedTuple):
    """A residual block: what it adds to the tensor it reads has that tensor's shape.

    Attributes:
        start: Name of the layer whose output the block reads.
        end: Name of the layer whose output it returns.
        inside: Names of the layers in between, the end included.
        kind: What the block is made of; equal for blocks that repeat one another.
    """

    start: str
    end: str
    inside: frozenset[str]
    kind: tuple[Any, ...]


def repeated(graph: Graph) -> list[list[Block]]:
    """Runs of blocks that repeat one another, one behind the other.

    A block is an identity shortcut: a sum of a tensor and of what layers that nothing else reads
    make of it. A unit that repeats may consist of several such sums, as attention and feed-forward
    of a transformer do; it is one block then.

    Args:
        graph: One level of a model.

    Returns:
        Runs of at least two blocks, each with the same kind.
    """
    order = {name: i for i, name in enumerate(_in_order(graph))}
    found = [block for name in order if (block := _residual(graph, name, order)) is not None]
    by_start = {block.start: block for block in found}
    runs: list[list[Block]] = []
    taken: set[str] = set()
    for first in found:
        if first.end in taken:
            continue
        run = [first]
        while True:
            block, follower = _follower(graph, run[-1], by_start)
            if follower is None:
                break
            run[-1] = block
            run.append(follower)
        # The last block ends as those before it end, if it can.
        if len(run) > 1:
            run[-1] = _with_tail(graph, run[-1], _tail_kinds(graph, run[-2]))
        taken.update(block.end for block in run)
        taken.update(name for block in run for name in block.inside)
        runs.extend(_units(run))
    return runs


def dropped(run: list[Block], depth: float) -> list[Block]:
    """The blocks of a run that go when a fraction of them stays.

    Of `n` blocks `k = max(1, floor(n * depth + 1 / 2))` stay, spread evenly, the last among them.

    Args:
        run: Blocks that repeat one another.
        depth: Fraction that stays, in (0, 1].

    Returns:
        The others, in order.
    """
    count = len(run)
    keep = max(1, math.floor(count * depth + 0.5))
    kept = {math.ceil((i + 1) * count / keep) - 1 for i in range(keep)}
    return [block for i, block in enumerate(run) if i not in kept]


def _in_order(graph: Graph) -> list[str]:
    """Layer names, each after those it reads."""
    order: dict[str, None] = {}
    pending = list(graph.layers)
    while pending:
        ready = [n for n in pending if all(p in order for p in graph.producers[n])]
        order.update(dict.fromkeys(ready))
        pending = [n for n in pending if n not in order]
    return list(order)


def _residual(graph: Graph, name: str, order: dict[str, int]) -> Block | None:
    """The block that ends in this sum, if it is one."""
    if type(graph.layers[name]).__name__ != "Add" or not graph.called_once(name):
        return None
    branches = graph.producers[name]
    if len(branches) != 2 or branches[0] == branches[1]:
        return None
    start, last = sorted(branches, key=order.__getitem__)
    inside = _between(graph, start, last)
    if not inside or len(graph.calls[start]) > 1 or not _same_shape(graph, start, name):
        return None
    for inner in inside:
        if not graph.called_once(inner):
            return None
        if not set(graph.consumers[inner]) <= inside | {name}:
            return None
    ordered = sorted(inside, key=order.__getitem__)
    return Block(start, name, frozenset(inside | {name}), tuple(_kind(graph, n) for n in ordered))


def _between(graph: Graph, start: str, last: str) -> set[str]:
    """The layers on the ways from `start` to `last`, `last` included; none if there is no way."""

    def reach(name: str, step: dict[str, list[str]]) -> set[str]:
        seen, todo = {name}, [name]
        while todo:
            for other in step[todo.pop()]:
                if other != OUTPUT and other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    return (reach(start, graph.consumers) & reach(last, graph.producers)) - {start}


def _same_shape(graph: Graph, one: str, other: str) -> bool:
    shapes = []
    for name in (one, other):
        output = graph.layers[name].output
        if not isinstance(output, keras.KerasTensor):
            return False
        shapes.append(tuple(output.shape))
    return shapes[0] == shapes[1]


def _kind(graph: Graph, name: str) -> tuple[Any, ...]:
    layer = graph.layers[name]
    weights = getattr(layer, "weights", [])
    return (type(layer).__name__, *(tuple(weight.shape) for weight in weights))


def _tail(graph: Graph, block: Block) -> list[str]:
    """The activations and normalizations that alone read the end of a block, one after another."""
    names: list[str] = []
    while True:
        reader = graph.only_consumer(names[-1] if names else block.end)
        if reader is None or type(reader).__name__ not in _TAILS:
            return names
        names.append(reader.name)


def _follower(graph: Graph, block: Block, by_start: dict[str, Block]) -> tuple[Block, Block | None]:
    """The next block of the chain, and this one with what lies between the two."""
    passed: list[str] = []
    for name in (block.end, *_tail(graph, block)):
        if name != block.end:
            passed.append(name)
        if name in by_start:
            kinds = tuple(_kind(graph, tail) for tail in passed)
            longer = Block(block.start, name, block.inside | set(passed), (*block.kind, *kinds))
            return longer, by_start[name]
    return block, None


def _tail_kinds(graph: Graph, block: Block) -> list[tuple[Any, ...]]:
    """The kinds of what follows the sum of a block up to its end."""
    names = [n for n in block.inside if type(graph.layers[n]).__name__ in _TAILS]
    kinds: list[tuple[Any, ...]] = []
    end = block.end
    while end in names and graph.producers[end] and graph.producers[end][0] in block.inside:
        kinds.insert(0, _kind(graph, end))
        end = graph.producers[end][0]
    return kinds


def _with_tail(graph: Graph, block: Block, kinds: list[tuple[Any, ...]]) -> Block:
    names = _tail(graph, block)[: len(kinds)]
    if not kinds or [_kind(graph, name) for name in names] != kinds:
        return block
    return Block(block.start, names[-1], block.inside | set(names), (*block.kind, *kinds))


def _units(run: list[Block]) -> list[list[Block]]:
    """A chain of blocks cut into runs whose members repeat one another."""
    kinds = [block.kind for block in run]
    for period in range(1, len(run) // 2 + 1):
        if len(run) % period == 0 and kinds == kinds[:period] * (len(run) // period):
            return [[_joined(run[i : i + period]) for i in range(0, len(run), period)]]
    alike: list[list[Block]] = []
    for block in run:
        if alike and alike[-1][-1].kind == block.kind:
            alike[-1].append(block)
        else:
            alike.append([block])
    return [blocks for blocks in alike if len(blocks) > 1]


def _joined(blocks: list[Block]) -> Block:
    return Block(
        blocks[0].start,
        blocks[-1].end,
        frozenset().union(*(block.inside for block in blocks)),
        tuple(block.kind for block in blocks),
    )

"""Two sequences of layers, one of which repeats its blocks more often."""

from collections.abc import Sequence
from typing import Any


def aligned(student: Sequence[Any], teacher: Sequence[Any]) -> list[tuple[int, int]] | int:
    """Pair every layer of the student with one of the teacher, in order.

    The teacher is read as single layers and runs of blocks that repeat; of a run of `n` the student
    has `m <= n`, at least one, and its block `i` is paired with block `floor(i * n / m)`.

    Args:
        student: What each layer is: type and shapes.
        teacher: The same for the teacher.

    Returns:
        Pairs of positions; or, if there is no such pairing, the position in the student where the
        search got furthest.
    """
    furthest = 0
    runs = [_runs(teacher, j) for j in range(len(teacher))]
    stuck: set[tuple[int, int]] = set()

    def search(i: int, j: int) -> list[tuple[int, int]] | None:
        nonlocal furthest
        begin = i
        # A stretch without repetitions is walked here: one call a layer would be too deep.
        while i < len(student) and j < len(teacher) and student[i] == teacher[j] and not runs[j]:
            i, j = i + 1, j + 1
        single = [(k, j - i + k) for k in range(begin, i)]
        furthest = max(furthest, i)
        if i == len(student) or j == len(teacher):
            return single if i == len(student) and j == len(teacher) else None
        if (i, j) in stuck:
            return None
        for period, count in runs[j]:
            unit = teacher[j : j + period]
            most = 0
            while most < count and student[i + most * period : i + (most + 1) * period] == unit:
                most += 1
            for m in range(most, 0, -1):
                rest = search(i + m * period, j + count * period)
                if rest is not None:
                    blocks = [(i + b * period, j + (b * count // m) * period) for b in range(m)]
                    pairs = [(a + k, c + k) for a, c in blocks for k in range(period)]
                    return [*single, *pairs, *rest]
        if student[i] == teacher[j]:
            rest = search(i + 1, j + 1)
            if rest is not None:
                return [*single, (i, j), *rest]
        stuck.add((i, j))
        return None

    found = search(0, 0)
    return furthest if found is None else found


def _runs(layers: Sequence[Any], begin: int) -> list[tuple[int, int]]:
    """Periods and counts of the repetitions that begin here, those that cover most first."""
    found = []
    for period in range(1, (len(layers) - begin) // 2 + 1):
        unit = layers[begin : begin + period]
        count = 1
        while layers[begin + count * period : begin + (count + 1) * period] == unit:
            count += 1
        if count > 1:
            found.append((period, count))
    # Of two that cover as much, the shorter period is the smaller unit.
    return sorted(found, key=lambda run: (-run[0] * run[1], run[0]))

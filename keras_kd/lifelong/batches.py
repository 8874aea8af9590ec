"""What each step of a task reads, decided before the first of them.

Which rows come, which of the memory are replayed, and which go into it follows from labels and
random numbers alone. So a `Plan` is made of row numbers before any model runs, the same in every
run of the program; a run that goes on after a kill makes it anew and reads on where it was. Logits
that a step stores never leave the compiled step: the plan tells it which slots they take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.lifelong.memory import Memory, Slots
from keras_kd.utils.types import Array, Logs


class Pool:
    """Rows of the memory as it was when the task began, and behind them those of the task.

    Args:
        memory: The memory, or `None`.
        x: Inputs of the task, `(samples, ...)`.
        y: Their classes.
    """

    def __init__(self, memory: Memory | None, x: Array, y: Array) -> None:
        self.held = 0 if memory is None else len(memory)
        self._memory_x: Array = None if memory is None else memory.x
        memory_y = np.zeros(0, "int64") if memory is None else memory.y
        self._x = x
        self.y = np.concatenate([memory_y, y])

    def x(self, rows: Array) -> Array:
        """Inputs of these rows.

        Args:
            rows: Numbers, those of the memory first, `(count,)`.
        """
        if not self.held:
            return self._x[rows]
        old = rows < self.held
        found = np.empty((len(rows), *self._x.shape[1:]), self._x.dtype)
        found[old], found[~old] = self._memory_x[rows[old]], self._x[rows[~old] - self.held]
        return found


class Plan:
    """Row numbers of every step of a task.

    Args:
        pool: What they count.
        rows: Those that an epoch goes through.
        epochs: Number of epochs.
        batch_size: Rows a step.
        rng: Of the order of the rows and of what is replayed.
        slots: What places the rows of each step into the memory, or `None` where the memory stays
            as it is until the task ends. It is used up.
        held: Numbers of the pool's rows in the slots when the task begins.
        draws: Names of the draws from the memory in each step, independent of one another.
        draw_size: Rows a draw.

    Attributes:
        steps: Steps an epoch.
        held: Numbers of the rows in the slots when the task ends.
    """

    def __init__(
        self,
        pool: Pool,
        rows: Array,
        epochs: int,
        batch_size: int,
        rng: np.random.Generator,
        *,
        slots: Slots | None = None,
        held: Sequence[int] = (),
        draws: Sequence[str] = (),
        draw_size: int = 0,
    ) -> None:
        self.pool = pool
        self.steps = -(-len(rows) // batch_size)
        self.held = list(held)
        self.rows: list[Array] = []
        self.slots: list[Array] = []
        # Whether the memory held any row when a step began.
        self.filled: list[bool] = []
        self.drawn: dict[str, list[Array]] = {name: [] for name in draws}
        self.replayed: dict[str, list[Array]] = {name: [] for name in draws}
        dump = slots.capacity if slots is not None else 0
        for _ in range(epochs):
            order = rng.permutation(rows)
            for i in range(self.steps):
                batch = order[i * batch_size : (i + 1) * batch_size]
                self.rows.append(batch)
                self.filled.append(bool(self.held))
                # Drawn before the batch goes in, so that nothing is replayed beside itself.
                for name in draws:
                    chosen = self._draw(rng, draw_size)
                    self.drawn[name].append(chosen)
                    # Before the memory holds any row those of the batch stand there, and count 0:
                    # all of them in turn, so that batch statistics are those of the batch.
                    turns = batch[np.arange(draw_size) % len(batch)]
                    ids = np.array(self.held, "int64")[chosen] if self.held else turns
                    self.replayed[name].append(ids)
                if slots is not None:
                    self.slots.append(self._placed(slots, batch, dump))

    def _draw(self, rng: np.random.Generator, size: int) -> Array:
        count = len(self.held)
        if not count:
            return np.zeros(size, "int64")
        return rng.choice(count, size, replace=count < size)

    def _placed(self, slots: Slots, batch: Array, dump: int) -> Array:
        """The slot of each row; the dump behind the last slot for those that are not kept."""
        taken = np.full(len(batch), dump, "int64")
        last: dict[int, int] = {}
        for i, row in enumerate(batch):
            slot = slots.place(int(self.pool.y[row]))
            if slot < 0:
                continue
            if slot in last:
                taken[last[slot]] = dump
            taken[i], last[slot] = slot, i
            if slot == len(self.held):
                self.held.append(int(row))
            else:
                self.held[slot] = int(row)
        return taken


def held_out(pool: Pool, share: float, rng: np.random.Generator) -> Array:
    """Numbers of rows of old and new classes, as many of each, that are not trained on.

    Args:
        pool: The rows.
        share: Of the rows of each class in the memory.
        rng: Of the choice.
    """
    if not share or not pool.held:
        return np.zeros(0, "int64")
    old, counts = np.unique(pool.y[: pool.held], return_counts=True)
    count = max(1, round(share * counts.mean()))
    found = []
    for label in np.unique(pool.y):
        mine = np.flatnonzero(pool.y == label)
        # Of a class that comes back, those of the memory.
        mine = mine[mine < pool.held] if label in old else mine
        found.append(rng.permutation(mine)[: min(count, len(mine) - 1)])
    return np.concatenate(found)


def reading(pool: Pool, of_row: Array, known: Array, logits: bool) -> Any:
    """`fn(plan, step)`: what one step reads.

    Args:
        pool: The rows.
        of_row: The column of each of them, `(rows,)`.
        known: How many columns are known when its logits are stored, `(rows,)`.
        logits: Whether the memory keeps logits.
    """

    def read(plan: Plan, step: int) -> tuple[Any, Any]:
        rows = plan.rows[step]
        parts: dict[str, Any] = {"x": pool.x(rows)}
        if plan.slots and logits:
            parts["slots"] = plan.slots[step].astype("int32")
        for name, chosen in plan.replayed.items():
            some = plan.filled[step]
            parts[f"{name}_x"] = pool.x(chosen[step])
            parts[f"{name}_y"] = of_row[chosen[step]]
            parts[f"{name}_weight"] = np.full(len(chosen[step]), float(some), "float32")
            if logits:
                parts[f"{name}_slots"] = plan.drawn[name][step].astype("int32")
                parts[f"{name}_known"] = known[chosen[step]]
        return parts, of_row[rows]

    return read


class Batches(keras.utils.PyDataset):
    """The steps of a plan, as Keras reads them.

    Args:
        plan: The plan.
        read: `fn(plan, step)`: the inputs by name, and the columns, of one step of the task.
    """

    def __init__(self, plan: Plan, read: Callable[[Plan, int], tuple[Any, Any]]) -> None:
        super().__init__()
        self.plan = plan
        self._read = read
        self.epoch = 0

    @property
    def num_batches(self) -> int:
        """Steps an epoch."""
        return self.plan.steps

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One step of the present epoch."""
        return self._read(self.plan, self.epoch * self.plan.steps + index)


class Epochs(keras.callbacks.Callback):
    """Tells the batches which epoch begins.

    Args:
        batches: What is trained on.
    """

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Read the steps of this epoch."""
        self._batches.epoch = epoch


class AtTheEnd(keras.callbacks.Callback):
    """Calls a function when the training ends, before the backup goes.

    Args:
        function: What is called.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self._function = function

    def on_train_end(self, logs: Logs = None) -> None:
        """Call it."""
        self._function()

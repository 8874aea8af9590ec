"""What a method of lifelong learning is, and the two between which all others lie.

A `Method` tells the learner which rows a step reads (`draws`, `joins`, `keeps_all`), what it
minimizes (`loss`), and what happens when a task ends (`correct`, `finish`). `loss` runs in the
compiled step of any backend, on a `Lesson`; the rest is NumPy. A new method is a class of this kind
in the module of its family; `Replay` is the shortest example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_kd.utils.types import Array, Tensor

if TYPE_CHECKING:
    from keras_kd.lifelong.heads import GrowingHead
    from keras_kd.lifelong.memory import Memory


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a method finds when a task ends.

    Args:
        head: The model with its head, trained.
        memory: The memory, or `None`.
        x: Rows of the task.
        y: Their classes.
        held_x: Rows held out of the training, of old and new classes alike, or `None`.
        held_y: Their classes.
        old: Positions of the columns that there were before the task.
        new: Positions of those that it brought.
        index: Number of the task.
        seed: Of what is drawn.
        outputs: `fn(x)`: a dict of `logits` and `features` of rows, in inference mode.
        per_row: The hard loss, `fn(columns, logits)`, one value a row.
    """

    head: GrowingHead
    memory: Memory | None
    x: Array
    y: Array
    held_x: Array
    held_y: Array
    old: list[int]
    new: list[int]
    index: int
    seed: int
    outputs: Callable[[Array], dict[str, Array]]
    per_row: Callable[[Any, Any], Any]


class Method:
    """How a learner keeps what it knows.

    Attributes:
        terms: Names of what `loss` returns, for the logs.
        uses_memory: Whether it replays rows of a memory.
        draws: Names of the draws from the memory in each step.
        together: Those of them that go through the model in one pass with the batch.
        draw_size: Rows of each draw; `None` is as many as the batch has.
        stores_logits: Whether the memory keeps logits beside rows and labels.
        joins: Whether it trains on the rows of the memory as on those of the task.
        keeps_all: Whether it trains on all rows of all tasks so far.
        holds_out: Share of the memory's rows that are held out of the training, with as many new
            ones.
        reads_old: Whether a step runs the model as it was before the task.
        cosine: Whether the head is one of cosines.
        freezes: Whether columns of classes that are not in the task are left alone.
        needs_new: Whether each task has to bring classes of its own.
        needs_rows: Whether it has to have seen rows of each class that is known.
    """

    terms: tuple[str, ...] = ("label_loss",)
    uses_memory = False
    draws: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    draw_size: int | None = None
    stores_logits = False
    joins = False
    keeps_all = False
    holds_out = 0.0
    reads_old = False
    cosine = False
    freezes = False
    needs_new = False
    needs_rows = False

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self).__name__

    def get_config(self) -> dict[str, Any]:
        """The arguments that rebuild it."""
        return {}

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.get_config().items())})"

    def taps(self, head: GrowingHead) -> list[str]:
        """Names of the layers that `loss` reads beside features and logits.

        Args:
            head: The model with its head.
        """
        return []

    def loss(
        self, lesson: Any, parts: dict[str, Any], y: Tensor, outputs: Mapping[str, Tensor]
    ) -> Any:
        """Compute what one step minimizes.

        Args:
            lesson: What is trained, with its model, the one before the task, and the columns.
            parts: What the step reads, by name.
            y: The columns of the rows of the batch.
            outputs: What the model says of these, a dict.

        Returns:
            A dict of scalars, weighted, whose sum is minimized.
        """
        return {"label_loss": ops.mean(lesson.per_row(y, outputs["logits"]))}

    def variables(self, lesson: Any) -> dict[str, list[Any]]:
        """Make the Variables that `loss` reads as `lesson.kept`.

        Args:
            lesson: What they belong to.
        """
        return {}

    def imprint(self, x: Array, y: Array, outputs: Callable[[Array], Array]) -> Any:
        """`fn(label)` for the first columns of new classes, or `None`.

        Args:
            x: Rows of the task that begins.
            y: Their classes.
            outputs: `fn(x)` of the model before it.
        """
        return None

    def correct(self, ending: Ending) -> None:
        """Change the head when a task ends.

        Args:
            ending: What there is.
        """

    def finish(self, ending: Ending) -> None:
        """Remember what the next tasks need, with the memory filled.

        Args:
            ending: What there is.
        """

    def answering(self, head: GrowingHead) -> Any:
        """The plain model that answers when a task has ended.

        Args:
            head: The model with its head.
        """
        return head.plain()

    def grown(self, positions: list[int], columns: int) -> None:
        """Move what is kept by column to the columns of a head that has grown.

        Args:
            positions: The new column of each one that there was.
            columns: How many there are now.
        """

    def state(self) -> dict[str, Array]:
        """What it remembers from task to task, as arrays by name."""
        return {}

    def load_state(self, arrays: dict[str, Array]) -> None:
        """Remember what a `state` holds.

        Args:
            arrays: What `state` returned.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of what it remembers beside model and memory."""
        return sum(int(np.asarray(array).nbytes) for array in self.state().values())


class FineTune(Method):
    """Train on each task alone: what forgetting looks like when nothing is done about it.

    Minimizes the hard loss over all classes known so far.

    Examples:
        >>> learner = Learner(model, method=FineTune())
    """


class Joint(Method):
    """Train on all rows of all tasks so far: what can be reached when nothing has to be given up.

    The learner holds the rows of earlier tasks, all of which count as memory, and goes on from the
    weights that it has.

    Examples:
        >>> learner = Learner(model, method=Joint())
    """

    keeps_all = True

"""What has been learned and what forgotten: a matrix of accuracies, and the figures made of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.report import plots
from keras_kd.export.report.pages import filled
from keras_kd.export.writing import write_file
from keras_kd.utils import escaping, tables
from keras_kd.utils.types import Array

FORGETTING = "max over earlier rows - last row, mean over all tasks but the last (below 0: a gain)"
"""How forgetting is defined here: others take the last row in, or the first row alone."""

BACKWARD_TRANSFER = "last row - diagonal, mean over all tasks but the last"
"""How backward transfer is defined here."""


def average_accuracy(matrix: Array | Sequence[Sequence[float]]) -> float:
    """The mean of the last row, over the tasks learned so far.

    Args:
        matrix: `R[i, j]`: accuracy on task `j` after task `i`, `(tasks learned, tasks)`.

    Returns:
        The mean, in the unit of the matrix: a share, or percent.

    Raises:
        ValueError: If the matrix has no row, or more rows than columns.

    Examples:
        >>> average_accuracy([[0.9, 0.0], [0.5, 0.7]])
        0.6
    """
    matrix = _checked(matrix)
    return float(np.mean(matrix[-1, : len(matrix)]))


def backward_transfer(matrix: Array | Sequence[Sequence[float]]) -> float:
    """`mean_j (R[T, j] - R[j, j])` over all tasks but the last; NaN of a single task.

    Args:
        matrix: As for `average_accuracy`.

    Returns:
        The mean, in points of the unit of the matrix; below 0 where old tasks were forgotten.

    Raises:
        ValueError: As for `average_accuracy`.

    Examples:
        >>> backward_transfer([[0.9, 0.0], [0.5, 0.7]])
        -0.4

    Reference:
        - [Lopez-Paz and Ranzato, 2017](https://arxiv.org/abs/1706.08840), section 2
    """
    matrix = _checked(matrix)
    before = len(matrix) - 1
    return float(np.mean(matrix[-1, :before] - np.diag(matrix)[:before])) if before else math.nan


def forgetting(matrix: Array | Sequence[Sequence[float]]) -> float:
    """`mean_j (max_{i < T} R[i, j] - R[T, j])` over all tasks but the last; NaN of a single task.

    The maximum is over the rows before the last one, which is not among them: a task that ends
    better than it ever was has a negative one. The matrix is not changed.

    Args:
        matrix: As for `average_accuracy`; NaN where nothing was measured.

    Returns:
        The mean, in points of the unit of the matrix.

    Raises:
        ValueError: As for `average_accuracy`.

    Examples:
        >>> forgetting([[0.9, 0.0], [0.5, 0.7]])
        0.4

    Reference:
        - [Chaudhry et al., 2018](https://arxiv.org/abs/1801.10112), definition 1
    """
    matrix = _checked(matrix)
    before = len(matrix) - 1
    if not before:
        return math.nan
    earlier = matrix[:-1, :before]
    best = np.where(np.isnan(earlier), -np.inf, earlier).max(0)
    return float(np.mean(best - matrix[-1, :before]))


def _checked(matrix: Array | Sequence[Sequence[float]]) -> Array:
    found = np.asarray(matrix, "float64")
    if found.ndim != 2 or not 0 < len(found) <= found.shape[1]:
        raise ValueError(
            "A matrix of accuracies has a row for each task that was learned and a column for each "
            f"task, (tasks learned, tasks). Received: shape {found.shape}."
        )
    return found


class Report:
    """What `Learner.report` returns.

    Args:
        rows: What was measured after each task, plain values.
        names: Names of all tasks.
        method: The method, in words.
        known_task: Whether `matrix` holds the accuracies of a task that is told.

    Attributes:
        matrix: `R[i, j]`: the accuracy on the test part of task `j` after task `i`,
            `(tasks learned, tasks)`. Above the diagonal it is that of a task still to come: zero
            where none of its classes is known, NaN where that cannot be measured.
        measured: The same with NaN where none of its classes is known, as tables and plots show it.
        known_task: Whether the task of a row is told, so that only its classes can be answered.
        average_accuracy: The mean of the last row, over the tasks learned so far.
        backward_transfer: `last row - diagonal`, the mean over all tasks but the last.
        forgetting: `max over earlier rows - last row`, the mean over all tasks but the last.
        memory_bytes: Bytes of rows, labels, logits and whatever the method keeps beside the model.
        seconds: Of training and measuring, by the clock.

    Raises:
        ValueError: If no task has a test part.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        names: Sequence[str],
        method: str,
        known_task: bool = False,
    ) -> None:
        self.rows, self.names, self.method = list(rows), list(names), method
        self.known_task = known_task
        self._free, self._told = (_matrix(rows, kind, len(names)) for kind in ("free", "told"))
        self.matrix = self._told if known_task else self._free
        if not np.isfinite(self._free[:, : len(rows)]).any():
            raise ValueError(
                "No task has a test part, so that there is no accuracy to report. Make the stream "
                "with `test=(x_test, y_test)`, or `test=0.2`."
            )

    @property
    def average_accuracy(self) -> float:
        """The mean of the last row."""
        return average_accuracy(self.matrix)

    @property
    def class_incremental_accuracy(self) -> float:
        """The same where no task is told: among all classes that are known."""
        return average_accuracy(self._free)

    @property
    def known_task_accuracy(self) -> float:
        """The same where the task is told: among its classes."""
        return average_accuracy(self._told)

    @property
    def backward_transfer(self) -> float:
        """`last row - diagonal`, the mean over all tasks but the last."""
        return backward_transfer(self.matrix)

    @property
    def forgetting(self) -> float:
        """`max over earlier rows - last row`, the mean over all tasks but the last."""
        return forgetting(self.matrix)

    @property
    def memory_bytes(self) -> int:
        """Bytes that are kept beside the model."""
        return int(self.rows[-1]["bytes"])

    @property
    def seconds(self) -> float:
        """Of all tasks together, each in the run that ended it."""
        return float(sum(row["seconds"] for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values, `None` where there is none."""
        return {
            "method": self.method,
            "tasks": self.names,
            "known_task": self.known_task,
            "matrix": [[_plain(v) for v in row] for row in self.matrix],
            "average_accuracy": _plain(self.average_accuracy),
            "class_incremental_accuracy": _plain(self.class_incremental_accuracy),
            "known_task_accuracy": _plain(self.known_task_accuracy),
            "backward_transfer": _plain(self.backward_transfer),
            "forgetting": _plain(self.forgetting),
            "forgetting_is": FORGETTING,
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds, 3),
        }

    def figures(self) -> list[tuple[str, str]]:
        """The figures with their names, as they are shown."""
        return [
            ("average accuracy %", _percent(self.average_accuracy)),
            ("  class-incremental %", _percent(self.class_incremental_accuracy)),
            ("  task known %", _percent(self.known_task_accuracy)),
            ("backward transfer, points", _percent(self.backward_transfer)),
            ("forgetting, points", _percent(self.forgetting)),
            ("memory, bytes", f"{self.memory_bytes:,}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]

    def cells(self) -> list[list[str]]:
        """The matrix in percent: a row for each task learned, its name first.

        Of a task still to come, none of whose classes is known, there is a dash.
        """
        return [
            [f"after {escaping.plain(self.names[i])}", *(_percent(v) for v in row)]
            for i, row in enumerate(self.measured)
        ]

    @property
    def measured(self) -> Array:
        """`matrix` with NaN where no class of a task is known, so that nothing was asked."""
        return np.where(np.isnan(self._told), np.nan, self.matrix)

    def table(self, width: int = 80) -> str:
        """Lay out the matrix and the figures as text.

        Args:
            width: Characters a line.
        """
        told = "the task is told" if self.known_task else "among all classes known"
        headings = ["accuracy %", *(str(i) for i in range(len(self.names)))]
        lines = [f"{self.method}: accuracy on the test part of each task, {told}."]
        lines += ["", *tables.fitted(headings, self.cells(), width=width)]
        lines += [
            "",
            *tables.fitted(["", ""], [list(pair) for pair in self.figures()], width=width),
        ]
        lines += ["", f"Forgetting: {FORGETTING}.", f"Backward transfer: {BACKWARD_TRANSFER}."]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The table."""
        return self.table()

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the matrix, and the average accuracy after each task.

        Args:
            path: A `.svg` or `.png` file.

        Returns:
            The path.

        Raises:
            ImportError: If Matplotlib is missing.
            ValueError: If the file is to be another one.
        """

        def draw() -> Any:
            figure = _figure(self)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            return figure

        return plots.save(draw, path)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page that opens offline.

        Args:
            path: The file.

        Returns:
            The path.

        Raises:
            ImportError: If Jinja or Matplotlib is missing.
        """
        text = filled(
            __package__,
            "report.html.j2",
            report=self,
            names=self.names,
            plot=plots.svg(_figure(self)),
            forgetting=FORGETTING,
            backward_transfer=BACKWARD_TRANSFER,
        )
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return write_file(target, text)


def _matrix(rows: Sequence[dict[str, Any]], kind: str, count: int) -> Array:
    matrix = np.full((len(rows), count), np.nan)
    for i, row in enumerate(rows):
        matrix[i, : len(row[kind])] = row[kind]
    return matrix


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if np.isfinite(value) else "-"


@plots.literally
def _figure(report: Report) -> Any:
    figure = plots.empty_figure(10.0, 4.2)
    left, right = figure.subplots(1, 2)
    image = left.imshow(100 * report.measured, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(report.measured):
        if np.isfinite(value):
            color = "white" if value < 0.6 else "black"
            text = f"{100 * value:.0f}"
            left.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
    left.set_xlabel("test part of task")
    left.set_ylabel("after task")
    left.set_xticks(range(len(report.names)))
    left.set_yticks(range(len(report.matrix)))
    figure.colorbar(image, ax=left, label="accuracy in %")
    learned = np.arange(1, len(report.matrix) + 1)
    for name, matrix in (("among all classes", report._free), ("task told", report._told)):
        means = [100 * average_accuracy(matrix[:k]) for k in learned]
        right.plot(learned, means, "o-", label=name)
    right.set_xlabel("tasks learned")
    right.set_ylabel("average accuracy in %")
    right.set_ylim(0, 102)
    right.set_xticks(learned)
    right.grid(True, alpha=0.3)
    right.legend(fontsize=8)
    return figure

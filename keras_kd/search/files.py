"""A student as a file: exported, run, weighed, timed.

What is searched for is a file, so files are what is compared. An untrained one tells the size and
the latency of all students of its shape; a trained one its error too.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import keras_kd.export
from keras_kd.distill.row_errors import RowErrors
from keras_kd.distill.training_rows import Rows
from keras_kd.distill.trial_setting import errors_of
from keras_kd.export import loaded
from keras_kd.export.formats.tflite.runtime import TFLiteRuntime
from keras_kd.export.scratch import working_folder
from keras_kd.export.verification.timing import time_calls
from keras_kd.export.writing import write_file
from keras_kd.utils import archives

if TYPE_CHECKING:
    import keras


CALIBRATION = 512
EVALUATION = 256
"""Rows on which a candidate's file is compared with its Keras model; its error is of all rows."""

_ROUNDS, _SECONDS = 7, 0.02

_RUNS = ("yes", "only")
"""How answers of runtimes begin that use what the device is for."""


@dataclass(frozen=True)
class Weighed:
    """What is known of a file without its answers.

    Args:
        bytes: Its size.
        latency_ms: Median of one inference, one pinned thread, a batch of one.
        low_ms: First quartile of the rounds.
        high_ms: Third quartile.
        parameters: Numbers in the model.
        refused: By runtime that was asked for why it does not take the file; empty if all do.
        reason: Why there is no file, or it is of no use; empty otherwise.
    """

    bytes: int | None
    latency_ms: float | None
    low_ms: float | None
    high_ms: float | None
    parameters: int
    refused: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Exporter:
    """Makes files of students, all under the same conditions.

    Args:
        folder: Where what untrained students weigh is remembered.
        train: Rows that calibrate.
        validation: Rows that files answer.
        targets: Runtimes that files have to run in.
        hard: The hard loss, which says what the outputs mean.
        options: More keywords of `keras_kd.export`, such as `labels`, which files carry along.
    """

    folder: Path
    train: Rows
    validation: Rows
    targets: tuple[str, ...]
    hard: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def weigh(self, key: Any, precision: str, build: Callable[[], Any]) -> Weighed:
        """Say what files of such students weigh and take, from an untrained one.

        Args:
            key: Plain JSON values that tell this shape from others.
            precision: Of the file.
            build: Makes the untrained student, only if it was not weighed before.
        """
        told = json.dumps([key, precision, list(self.targets)], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.json"
        if path.exists():
            return Weighed(**json.loads(archives.read_bytes(path)))
        with working_folder() as scratch:
            student = build()
            _stir(student)
            found = self.export(student, scratch / "file", precision, trained=False)[1]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(asdict(found)) + "\n")
        return found

    def export(
        self, student: keras.Model, folder: Path, precision: str, *, trained: bool = True
    ) -> tuple[Path | None, Weighed]:
        """Export a student to one TFLite file.

        Args:
            student: A built model.
            folder: New folder for it.
            precision: Of the file.
            trained: Whether its answers mean anything, so that a file that loses them fails.

        Returns:
            The file, `None` if it could not be made or is of no use, and what is known of it.
        """
        # Without labels: what a file has to keep are the answers of its own model.
        few = self.validation.taken(slice(0, EVALUATION)).x
        report = self.report(student, folder, precision, few)
        artifact = report.artifacts[0]
        parameters = int(student.count_params())
        if artifact.path is None or (trained and not artifact.passed):
            reason = artifact.reason or "no file was made"
            return None, Weighed(artifact.bytes, None, None, None, parameters, {}, reason)
        (times,) = latencies([artifact.path], self.validation)
        answers = report.runtimes().get(artifact.path.name, {})
        told = {name: str(answers.get(name, "no: it reads no TFLite")) for name in self.targets}
        refused = {name: said for name, said in told.items() if not said.startswith(_RUNS)}
        weighed = Weighed(
            artifact.bytes, times.median_ms, times.low_ms, times.high_ms, parameters, refused
        )
        return artifact.path, weighed

    def report(
        self,
        student: keras.Model,
        folder: Path,
        precision: str,
        evaluation: object,
        **options: object,
    ) -> Any:
        """Export a student to one TFLite file, and return the report.

        Args:
            student: A built model.
            folder: For it.
            precision: Of the file.
            evaluation: As for `keras_kd.export`.
            **options: More of its keywords.
        """
        given = {
            "max_drop": None,
            "mixed": False,
            "batch": 1 if self.targets else None,
            "targets": self.targets,
            "name": "student",
        }
        return keras_kd.export.export_model(
            student,
            folder,
            formats=("tflite",),
            precisions=(precision,),
            calibration=self.train.taken(spread(self.train.count, CALIBRATION)).x,
            evaluation=evaluation,
            **{**given, **self.options, **options},
        )

    def errors(self, path: Path, student: keras.Model) -> RowErrors:
        """Run a file on all validation rows.

        Args:
            path: The file.
            student: The model that it was made from.
        """
        answers = loaded.load(path)(self.validation.x)
        flat = list(answers.values()) if isinstance(answers, dict) else [answers]
        return errors_of(student, flat, self.validation, self.hard)


def _stir(student: keras.Model) -> None:
    """Move all weights a little, upward: a file leaves out biases of 0 that a training fills."""
    rng = np.random.default_rng(0)
    student.set_weights(
        [
            weight + 0.01 * np.abs(rng.normal(size=np.shape(weight))).astype(weight.dtype)
            if np.issubdtype(weight.dtype, np.floating)
            else weight
            for weight in student.get_weights()
        ]
    )


@dataclass(frozen=True)
class Times:
    """Milliseconds of one inference: the median of all, and the quartiles of the rounds' medians.

    Two files whose quartiles overlap are equally fast as far as this machine can tell.
    """

    median_ms: float
    low_ms: float
    high_ms: float


def latencies(
    paths: Sequence[Path], rows: Rows, *, rounds: int = _ROUNDS, seconds: float = _SECONDS
) -> list[Times]:
    """Time files against one another: one thread, pinned to a processor where the system can.

    Every file is warmed up, then they take turns, so that a machine that slows down slows all of
    them.

    Args:
        paths: TFLite files.
        rows: The first one is what they answer.
        rounds: Turns of each file.
        seconds: How long a turn measures.

    Returns:
        The times in the order of the files.
    """
    found: list[list[np.ndarray]] = [[] for _ in paths]
    failed: list[BaseException] = []

    def measure() -> None:
        try:
            _pin()
            calls = [_call(path, rows) for path in paths]
            for turn in range(rounds + 1):
                for times, call in zip(found, calls, strict=True):
                    spent = time_calls(call, seconds=seconds, at_least=5)
                    if turn:
                        times.append(spent)
        except BaseException as error:
            failed.append(error)

    # A thread of its own: pinned is only what measures.
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    result = []
    for times in found:
        medians = [float(np.median(each)) * 1e3 for each in times]
        low, high = np.quantile(medians, (0.25, 0.75))
        median = float(np.median(np.concatenate(times))) * 1e3
        result.append(Times(median, float(min(low, median)), float(max(high, median))))
    return result


def _call(path: Path, rows: Rows) -> Callable[[], Any]:
    # The names in the order of the Keras model's inputs.
    names = [row["name"] for row in loaded.load(path).inputs]
    one = rows.taken(slice(0, 1)).x
    if isinstance(one, dict):
        feed = {name: np.asarray(one[name]) for name in names}
    else:
        flat = list(one) if isinstance(one, list | tuple) else [one]
        feed = {name: np.asarray(x) for name, x in zip(names, flat, strict=True)}
    return TFLiteRuntime(path, 1).prepare(feed)


def _pin() -> None:
    """Keep this thread on one of the processors that the process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def spread(count: int, most: int) -> np.ndarray:
    """Numbers of at most so many rows, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)

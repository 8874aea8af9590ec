"""What the exporting process asks of its workers: conversion, measurement."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from keras_kd.export import limits
from keras_kd.export.formats import registry
from keras_kd.export.rows import (
    TASKS,
    ArtifactRow,
    Converted,
    ConvertTask,
    Failure,
    Measured,
    MeasureTask,
    Noise,
    NoiseTask,
    Task,
    Times,
    TimeTask,
    from_json,
    to_json,
)
from keras_kd.export.signature import Signature
from keras_kd.export.worker_pool import Results, Run, run_tasks
from keras_kd.export.writing import disk_fault

if TYPE_CHECKING:
    import keras


Progress = Callable[[str, int, int], None]
"""Called with a stage, how many steps of it are done, and how many there are."""


def convert(
    model: keras.Model,
    signature: Signature,
    tasks: Sequence[ConvertTask],
    scratch: Path,
    job: dict[str, Any],
    tell: Progress,
    early: Measuring | None = None,
) -> dict[str, Converted | Failure]:
    """Convert the model to every artifact asked for.

    Args:
        model: The Keras model.
        signature: Of the model.
        tasks: The artifacts.
        scratch: Folder for intermediate files.
        job: See `convert.Converter`.
        tell: Progress callback.
        early: What measures each file as soon as it is made.

    Returns:
        What came of each, by id.

    Raises:
        OSError: If the disk is full.
    """
    import keras

    from keras_kd.export.source.model_files import save_keras, save_tensorflow

    finished: set[str] = set()
    wanted = [to_json(task) for task in tasks]

    def done(task: dict[str, Any]) -> None:
        finished.add(task["id"])
        tell("convert", len(finished), len(tasks))

    def meanwhile(results: Results) -> None:
        if early is None:
            return
        for task in tasks:
            found = _outcome(Converted, results.get(task.id, _NOTHING))
            if isinstance(found, Converted):
                early.add(task, found)
        # On one processor it would only slow down the conversion.
        if limits.processors() > 1:
            early.advance()

    tell("convert", 0, len(tasks))
    reason = ""
    try:
        needs = save_keras(model, scratch / "model.keras")
    except ValueError as error:
        reason = str(error)
    else:
        first = {
            **job,
            "kind": "convert",
            "formats": registry.foreign(),
            "handover": "keras",
            "model": str(scratch / "model.keras"),
            "needs": needs,
            "scratch": str(scratch / "convert"),
        }
        results = run_tasks(first, wanted, scratch / "jobs", done=done, meanwhile=meanwhile)
        if any(result.get("started", True) for result in results.values()):
            meanwhile(results)
            return _outcomes(results)
        # The model never arrived in the other process; its own process may still trace it.
        reason = next(iter(results.values()))["error"]
        finished.clear()
    if keras.backend.backend() != "tensorflow":
        message = (
            f"the model cannot be handed to the converter: {reason}. Define its classes in a "
            "module that can be imported and register them with "
            "`keras.saving.register_keras_serializable`"
        )
        return {task.id: Failure(message) for task in tasks}
    try:
        save_tensorflow(model, signature, job["shapes"], scratch / "traced")
    except OSError:
        raise
    except Exception as error:
        full = disk_fault(error)
        if full is not None:
            raise OSError(full, os.strerror(full)) from error
        message = f"the model cannot be traced: {type(error).__name__}: {str(error)[:300]}"
        return {task.id: Failure(message) for task in tasks}
    second = {
        **job,
        "kind": "convert",
        "formats": registry.foreign(),
        "handover": "savedmodel",
        "model": str(scratch / "traced"),
        "needs": {"modules": [], "classes": []},
        "scratch": str(scratch / "convert-traced"),
    }
    folder = scratch / "jobs-traced"
    results = run_tasks(second, wanted, folder, done=done, meanwhile=meanwhile)
    meanwhile(results)
    return _outcomes(results)


class Measuring:
    """Files that are measured while others are converted; only their latency waits for the end.

    Args:
        job: See `measurer.Measurer`.
        scratch: Folder for the jobs.
        prepare: Makes the task of measuring a file of that of its conversion and what came of it.
    """

    def __init__(
        self,
        job: dict[str, Any],
        scratch: Path,
        prepare: Callable[[ConvertTask, Converted], MeasureTask],
    ) -> None:
        self.results: dict[str, Measured | Failure] = {}
        self._job = {**job, "kind": "measure", "formats": registry.foreign(), "time": 0}
        self._scratch = scratch
        self._prepare = prepare
        self._known: set[str] = set()
        self._waiting: list[MeasureTask] = []
        self._run: Run | None = None
        self._batches = 0

    def add(self, task: ConvertTask, converted: Converted) -> None:
        """Measure a file, unless it is known, as soon as the ones before it are measured."""
        if task.id not in self._known:
            self._known.add(task.id)
            self._waiting.append(self._prepare(task, converted))

    def advance(self) -> None:
        """Look at what is being measured, and begin with what waits once that is worth a job."""
        if self._run is None and len(self._waiting) >= _BATCH:
            self._batches += 1
            folder = self._scratch / f"early-{self._batches}"
            self._run = Run(self._job, [_sent(task) for task in self._waiting], folder)
            self._waiting = []
        if self._run is not None and self._run.advance():
            found = self._run.results
            self.results.update({key: _outcome(Measured, row) for key, row in found.items()})
            self._run = None

    def finish(self) -> dict[str, Measured | Failure]:
        """Wait for what is being measured; returns the results, which may lack some files."""
        self._waiting = []
        while self._run is not None:
            self.advance()
            time.sleep(_LOOK)
        return self.results

    def close(self) -> None:
        """End what is at work."""
        if self._run is not None:
            self._run.close()

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Measurements:
    """What came of tasks of measuring, by id.

    Args:
        files: Of `MeasureTask`.
        noise: Of `NoiseTask`; those that failed are left out.
    """

    files: dict[str, Measured | Failure]
    noise: dict[str, Noise]


def measure(
    tasks: Sequence[MeasureTask | NoiseTask],
    job: dict[str, Any],
    scratch: Path,
    tell: Progress,
    early: Measuring | None = None,
) -> Measurements:
    """Run files in their runtimes, in a process of their own.

    Args:
        tasks: What is to be measured.
        job: See `measurer.Measurer`.
        scratch: Folder for the job.
        tell: Progress callback.
        early: What has been measuring some of the files.

    Returns:
        What was measured.

    Raises:
        OSError: If the disk is full.
    """
    files = [task for task in tasks if isinstance(task, MeasureTask)]
    told: set[str] = set()
    tell("verify", 0, len(files))

    def finished(name: str) -> None:
        if name not in told and any(task.id == name for task in files):
            told.add(name)
            tell("verify", len(told), len(files))

    before = {} if early is None else early.finish()
    # What failed is not timed, and is not tried again.
    timed = [
        TimeTask(task.id, task.format, task.path)
        for task in files
        if isinstance(before.get(task.id), Measured)
    ]
    for name, result in before.items():
        if isinstance(result, Failure):
            finished(name)
    rest = [task for task in tasks if task.id not in before]
    results = run_tasks(
        {**job, "kind": "measure", "formats": registry.foreign()},
        [_sent(task) for task in (*timed, *rest)],
        scratch / "measure",
        done=lambda task: finished(task["id"]),
    )
    _raise_disk(results)
    measured = dict(before)
    for task in timed:
        times, known = _outcome(Times, results[task.id]), before[task.id]
        if isinstance(times, Failure) or isinstance(known, Failure):
            measured[task.id] = times if isinstance(times, Failure) else known
        else:
            measured[task.id] = replace(
                known, latency_ms=times.latency_ms, latency_low_ms=times.latency_low_ms
            )
    noise = {}
    for each in rest:
        if isinstance(each, MeasureTask):
            measured[each.id] = _outcome(Measured, results[each.id])
        else:
            found = _outcome(Noise, results[each.id])
            if isinstance(found, Noise):
                noise[each.id] = found
    return Measurements(measured, noise)


_BATCH = 4
"""Files that are worth a job of their own while others are converted."""

_LOOK = 0.02
"""Seconds between looks at files that are being measured."""

_NOTHING = {"error": "it was not tried"}

_Outcome = TypeVar("_Outcome")


def _sent(task: Task) -> dict[str, Any]:
    """A task on its way to the worker."""
    kind = next(name for name, cls in TASKS.items() if isinstance(task, cls))
    return {**to_json(task), "kind": kind}


def _outcome(kind: type[_Outcome], result: dict[str, Any]) -> _Outcome | Failure:
    return from_json(Failure, result) if "error" in result else from_json(kind, result)


def _outcomes(results: Results) -> dict[str, Converted | Failure]:
    _raise_disk(results)
    return {name: _outcome(Converted, result) for name, result in results.items()}


def _raise_disk(results: Results) -> None:
    for result in results.values():
        if result.get("errno") in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(result["errno"], os.strerror(result["errno"]))


def artifact(
    task: ConvertTask, converted: Converted | Failure, measured: Measured | Failure | None
) -> ArtifactRow:
    """Return the row of one artifact, not judged yet, from what the workers said about it."""
    row = ArtifactRow(task.format, task.precision)
    if isinstance(converted, Converted):
        row = replace(
            row, notes=converted.notes, batch=converted.batch, facts=dict(converted.facts)
        )
    if isinstance(converted, Failure):
        return replace(row, status="failed", stage="convert", reason=converted.error)
    if not isinstance(measured, Measured):
        reason = "it was not measured" if measured is None else measured.error
        return replace(row, status="failed", stage="verify", reason=reason)
    return replace(row, measured=measured)

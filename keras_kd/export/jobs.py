"""What the exporting process asks of its workers: conversion, measurement."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_kd.export import limits
from keras_kd.export.signature import Signature
from keras_kd.export.source.model_files import save_keras, save_tensorflow
from keras_kd.export.worker_pool import Results, Run, run_tasks
from keras_kd.export.writing import disk_fault

Progress = Callable[[str, int, int], None]
"""Called with a stage, how many steps of it are done, and how many there are."""


def convert(
    model: Any,
    signature: Signature,
    tasks: list[dict[str, Any]],
    scratch: Path,
    job: dict[str, Any],
    tell: Progress,
    early: Measuring | None = None,
) -> dict[str, dict[str, Any]]:
    """Convert the model to every artifact asked for.

    Args:
        model: The Keras model.
        signature: Of the model.
        tasks: `id`, `format`, `precision` and `path` of each artifact, see `Converter.convert`.
        scratch: Folder for intermediate files.
        job: See `convert.Converter`.
        tell: Progress callback.
        early: What measures each file as soon as it is made.

    Returns:
        For each id `batch` and `notes`, perhaps `sparse`, or `{"error": ...}`.

    Raises:
        OSError: If the disk is full.
    """
    import keras

    finished: set[str] = set()

    def done(task: dict[str, Any]) -> None:
        finished.add(task["id"])
        tell("convert", len(finished), len(tasks))

    def meanwhile(results: Results) -> None:
        if early is None:
            return
        for task in tasks:
            if "error" not in results.get(task["id"], {"error": ""}):
                early.add(task, results[task["id"]])
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
            "handover": "keras",
            "model": str(scratch / "model.keras"),
            "needs": needs,
            "scratch": str(scratch / "convert"),
        }
        results = run_tasks(first, tasks, scratch / "jobs", done=done, meanwhile=meanwhile)
        if any(result.get("started", True) for result in results.values()):
            meanwhile(results)
            return _raise_disk(results)
        # The model never arrived in the other process; its own process may still trace it.
        reason = next(iter(results.values()))["error"]
        finished.clear()
    if keras.backend.backend() != "tensorflow":
        message = (
            f"the model cannot be handed to the converter: {reason}. Define its classes in a "
            "module that can be imported and register them with "
            "`keras.saving.register_keras_serializable`"
        )
        return {task["id"]: {"error": message, "crashed": False} for task in tasks}
    try:
        save_tensorflow(model, signature, job["shapes"], scratch / "traced")
    except OSError:
        raise
    except Exception as error:
        full = disk_fault(error)
        if full is not None:
            raise OSError(full, os.strerror(full)) from error
        message = f"the model cannot be traced: {type(error).__name__}: {str(error)[:300]}"
        return {task["id"]: {"error": message, "crashed": False} for task in tasks}
    second = {
        **job,
        "kind": "convert",
        "handover": "savedmodel",
        "model": str(scratch / "traced"),
        "needs": {"modules": [], "classes": []},
        "scratch": str(scratch / "convert-traced"),
    }
    folder = scratch / "jobs-traced"
    results = run_tasks(second, tasks, folder, done=done, meanwhile=meanwhile)
    meanwhile(results)
    return _raise_disk(results)


class Measuring:
    """Files that are measured while others are converted; only their latency waits for the end.

    Args:
        job: See `measure.Measurer`.
        scratch: Folder for the jobs.
        prepare: Called with a file's task and what its conversion returned, before it is measured.
    """

    def __init__(
        self,
        job: dict[str, Any],
        scratch: Path,
        prepare: Callable[[dict[str, Any], dict[str, Any]], None],
    ) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self._job = {**job, "kind": "measure", "time": 0}
        self._scratch = scratch
        self._prepare = prepare
        self._known: set[str] = set()
        self._waiting: list[dict[str, Any]] = []
        self._run: Run | None = None
        self._batches = 0

    def add(self, task: dict[str, Any], converted: dict[str, Any]) -> None:
        """Measure a file, unless it is known, as soon as the ones before it are measured."""
        if task["id"] not in self._known:
            self._known.add(task["id"])
            self._prepare(task, converted)
            self._waiting.append(task)

    def advance(self) -> None:
        """Look at what is being measured, and begin with what waits once that is worth a job."""
        if self._run is None and len(self._waiting) >= _BATCH:
            self._batches += 1
            folder = self._scratch / f"early-{self._batches}"
            self._run = Run(self._job, self._waiting, folder)
            self._waiting = []
        if self._run is not None and self._run.advance():
            self.results.update(self._run.results)
            self._run = None

    def finish(self) -> dict[str, dict[str, Any]]:
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


def measure(
    tasks: list[dict[str, Any]],
    job: dict[str, Any],
    scratch: Path,
    tell: Progress,
    early: Measuring | None = None,
) -> dict[str, dict[str, Any]]:
    """Run files in their runtimes, in a process of their own.

    Args:
        tasks: `id` and `path` of each file.
        job: See `measure.Measurer`.
        scratch: Folder for the job.
        tell: Progress callback.
        early: What has been measuring some of the files.

    Returns:
        For each id what was measured, or `{"error": ...}`.
    """
    files = {task["id"] for task in tasks if "float32" not in task}
    told: set[str] = set()
    tell("verify", 0, len(files))

    def finished(name: str) -> None:
        if name in files - told:
            told.add(name)
            tell("verify", len(told), len(files))

    before = {} if early is None else early.finish()
    # What failed is not timed, and is not tried again.
    timed = [
        {"id": name, "path": task["path"], "timing": True}
        for task in tasks
        if "error" not in before.get(name := task["id"], {"error": ""})
    ]
    for name, result in before.items():
        if "error" in result:
            finished(name)
    rest = [task for task in tasks if task["id"] not in before]
    results = run_tasks(
        {**job, "kind": "measure"},
        [*timed, *rest],
        scratch / "measure",
        done=lambda task: finished(task["id"]),
    )
    for name, result in before.items():
        if "error" not in results.get(name, {}):
            results[name] = {**result, **results.get(name, {})}
    return _raise_disk(results)


_BATCH = 4
"""Files that are worth a job of their own while others are converted."""

_LOOK = 0.02
"""Seconds between looks at files that are being measured."""


def _raise_disk(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for result in results.values():
        if result.get("errno") in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(result["errno"], os.strerror(result["errno"]))
    return results


def row(
    task: dict[str, Any], converted: dict[str, Any], measured: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the manifest's entry of one artifact from what the workers said about it."""
    row: dict[str, Any] = {
        "format": task["format"],
        "precision": task["precision"],
        "status": "passed",
        "stage": None,
        "reason": "",
        "flags": [],
        "notes": list(converted.get("notes", [])),
        "file": None,
        "bytes": None,
        "batch": converted.get("batch"),
    }
    if "integer_products" in converted:
        row["integer_products"] = converted["integer_products"]
    failed = None
    if "error" in converted:
        failed = ("convert", converted["error"])
    elif measured is None or "error" in measured:
        failed = ("verify", (measured or {}).get("error", "it was not measured"))
    if failed is not None:
        row.update(status="failed", stage=failed[0], reason=failed[1])
    elif measured is not None:
        row.update(
            {key: value for key, value in measured.items() if key not in ("seconds", "against")}
        )
    return row

"""What the exporting process asks of its workers: conversion, measurement."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .handover import save_keras, save_tensorflow
from .process import run_tasks
from .signature import Signature
from .writing import disk_fault

Progress = Callable[[str, int, int], None]
"""Called with a stage, how many steps of it are done, and how many there are."""


def convert(
    model: Any,
    signature: Signature,
    tasks: list[dict[str, Any]],
    scratch: Path,
    job: dict[str, Any],
    tell: Progress,
) -> dict[str, dict[str, Any]]:
    """Convert the model to every artifact asked for.

    Args:
        model: The Keras model.
        signature: Of the model.
        tasks: `id`, `format`, `precision` and `path` of each artifact, see `Converter.convert`.
        scratch: Folder for intermediate files.
        job: See `convert.Converter`.
        tell: Progress callback.

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
        results = run_tasks(first, tasks, scratch / "jobs", done=done)
        if any(result.get("started", True) for result in results.values()):
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
    return _raise_disk(run_tasks(second, tasks, scratch / "jobs-traced", done=done))


def measure(
    tasks: list[dict[str, Any]], job: dict[str, Any], scratch: Path, tell: Progress
) -> dict[str, dict[str, Any]]:
    """Run files in their runtimes, in a process of their own.

    Args:
        tasks: `id` and `path` of each file.
        job: See `measure.Measurer`.
        scratch: Folder for the job.
        tell: Progress callback.

    Returns:
        For each id what was measured, or `{"error": ...}`.
    """
    files = [task for task in tasks if "float32" not in task]
    finished = 0

    def done(task: dict[str, Any]) -> None:
        nonlocal finished
        if "float32" not in task:
            finished += 1
            tell("verify", finished, len(files))

    tell("verify", 0, len(files))
    return _raise_disk(run_tasks({**job, "kind": "measure"}, tasks, scratch / "measure", done=done))


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

"""An earlier export, proven again from its files alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export import manifest, warm
from keras_kd.export.jobs import Progress, measure
from keras_kd.export.report.export_report import Report
from keras_kd.export.rows import (
    ArtifactRow,
    Failure,
    Measured,
    MeasureTask,
    to_json,
)
from keras_kd.export.scratch import working_folder
from keras_kd.export.signature import Signature
from keras_kd.export.verification import acceptance, entities, output_meaning
from keras_kd.export.verification.chosen_metrics import again
from keras_kd.export.verification.reference import Reference, judged, with_chosen
from keras_kd.export.verification.useless_files import Causes
from keras_kd.utils import archives


def verify(folder: str | os.PathLike[str], *, progress: Progress | None = None) -> Report:
    """Check the files of an export: hashes, loading, and the answers on the stored samples.

    Neither the Keras model nor its data is needed: `evaluation.npz` in the folder holds up to 256
    samples with the Keras model's outputs. Every figure of the result is measured anew on those;
    what cannot be measured so, such as the latency of the Keras model, is left out.

    Hashes and seal show accidents and careless edits. They are no signature: whoever can write the
    folder can also write samples, hashes and seal to suit other files. Only a copy of the manifest
    from a source that you trust says who made the files.

    Args:
        folder: What `keras_kd.export` wrote.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        A report of what was measured now. Files that are not what is recorded of them, or do not
        give the recorded answers again, are marked as failed in it and named in `report.problems`;
        `report.ok` says whether there are none. Files that had failed when they were exported stay
        failed.

    Raises:
        ManifestError: If the manifest is missing, damaged, edited or names files outside the
            folder, if a file is missing, is not the one that was exported, or keeps weights in
            other files, or if the stored samples are not those of the manifest.

    Examples:
        >>> report = keras_kd.export.verify("exported/digits")  # doctest: +SKIP
        >>> report.ok  # doctest: +SKIP
        True
    """
    tell = progress or (lambda stage, done, total: None)
    folder = Path(folder)
    content = manifest.read(folder)
    # It imports the runtimes while the files are hashed, but in a command, which has them.
    warm.prepare("measure")
    rows = [row for row in content["artifacts"] if row["file"] is not None]
    manifest.check_files(folder, content, whole=False)
    stored = Stored.read(folder, content)
    reference = stored.reference
    warm.fork_prepared("measure")
    with working_folder() as scratch:
        tasks = [
            MeasureTask(
                row["file"],
                row["format"],
                str((folder / row["file"]).resolve()),
                others=tuple(each.file for each in manifest.files_of(row)[1:]),
                outputs=str(scratch / f"answers-{i}.npz") if reference.chosen else "",
            )
            for i, row in enumerate(rows)
        ]
        job = {
            "signature": reference.signature.to_dict(),
            "evaluation": str((folder / content["evaluation"]["file"]).resolve()),
            "kinds": reference.kinds,
            "stored": reference.count,
            "threads": 1,
            "time": _TIMED,
            "whole": True,
            "targets": content["settings"].get("targets", []),
            "images": sorted(content["model"].get("normalization", {})),
            "about": {key: content["model"].get(key) for key in ("labels", "normalization")},
        }
        measured = measure(tasks, job, scratch, tell).files
        for task in tasks:
            found = measured[task.id]
            if isinstance(found, Measured) and task.outputs:
                measured[task.id] = with_chosen(found, Path(task.outputs), reference)[0]
    manifest.refuse(
        folder,
        [
            f"`{name}` {found.outside}"
            for name, found in measured.items()
            if isinstance(found, Failure) and found.outside
        ],
    )
    problems = {
        row["file"]: fault
        for row in rows
        if (fault := _difference(row, measured[row["file"]], content, reference.count))
    }
    return Report(folder, *_measured(content, measured, problems, stored))


_TIMED = 0.0005
"""Seconds for which a file's latency is measured here: it is shown, and decides nothing."""


@dataclass(frozen=True)
class Stored:
    """The samples that travel with an export.

    Args:
        reference: The Keras model's stored answers, and what was measured on them. What an output
            means is said by its labels, or, where it has none, by the manifest.
        missing: Metrics by output that were chosen and cannot be measured here, since they need
            code of the program that exported, or more samples than are stored.
    """

    reference: Reference
    missing: dict[str, list[str]]

    @classmethod
    def read(cls, folder: Path, content: dict[str, Any]) -> Stored:
        """Read them, and hold them against what the manifest says of inputs and outputs.

        Args:
            folder: Holds the file.
            content: The manifest.

        Raises:
            ManifestError: If they cannot be read or are others.
        """
        arrays = stored_arrays(folder, content)
        signature = Signature.from_dict({key: content["model"][key] for key in _SIGNATURE})
        inputs = {info.name: arrays[f"x{i}"] for i, info in enumerate(signature.inputs)}
        answers, labels, weights, groups = (
            {
                info.name: arrays[f"{key}{i}"]
                for i, info in enumerate(signature.outputs)
                if f"{key}{i}" in arrays
            }
            for key in ("y", "t", "w", "g")
        )
        said = content["evaluation"]["kinds"]
        asked = {
            name: rows
            for name, rows in content["evaluation"].get("metrics", {}).items()
            if name in answers
        }
        try:
            kinds = {
                name: {
                    **said[name],
                    "kind": output_meaning.kind_of(y, labels.get(name), said[name]["kind"]),
                    "probabilities": output_meaning.is_probability(y),
                }
                for name, y in answers.items()
            }
            first = signature.outputs[0].name
            kinds[first].pop("tags", None)
            kinds[first] |= entities.known_tags(content["model"]["labels"], answers[first])
            chosen, missing = again(asked, answers, labels, weights, kinds, groups)
            figures = judged(answers, labels, kinds, weights, chosen)
        except (ValueError, IndexError, TypeError) as error:
            raise ManifestError(
                f"The stored samples of the export in `{folder}` do not go together: {error}"
            ) from None
        return cls(
            Reference(signature, inputs, answers, labels, kinds, figures, weights, chosen), missing
        )


def stored_arrays(folder: Path, content: dict[str, Any]) -> dict[str, np.ndarray]:
    """Read the samples that travel with an export, and hold them against its manifest.

    Args:
        folder: Holds the file.
        content: The manifest.

    Returns:
        Inputs `x<i>`, outputs of the Keras model `y<i>`, labels `t<i>`, weights `w<i>`, numbers of
        lists `g<i>`, `(samples, ...)` each.

    Raises:
        ManifestError: If they cannot be read, or are not as many, or not of the shapes, that the
            manifest says.
    """
    path = folder / content["evaluation"]["file"]
    try:
        arrays = archives.arrays(path)
    except ValueError as error:
        raise ManifestError(f"The stored samples cannot be read: {error}") from None
    wanted = {
        f"{letter}{i}": info
        for letter, kind in (("x", "inputs"), ("y", "outputs"))
        for i, info in enumerate(content["model"][kind])
    }
    reason = _array_fault(arrays, wanted, content["evaluation"]["stored"])
    if reason:
        raise ManifestError(
            f"The stored samples in `{path}` are not those of the manifest: {reason}. Restore the "
            "files or export again."
        )
    return arrays


def _array_fault(
    arrays: dict[str, np.ndarray], wanted: dict[str, dict[str, Any]], count: int
) -> str:
    missing = sorted(set(wanted) - set(arrays))
    if missing:
        return f"they lack {', '.join(missing)}"
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            return f"{name} holds no numbers, one row a sample"
        if len(array) != count:
            return f"{name} has {len(array)} samples, and {count} are recorded"
    for name, info in wanted.items():
        sizes = zip(arrays[name].shape[1:], info["shape"][1:], strict=False)
        same = len(arrays[name].shape) == len(info["shape"])
        if not same or any(size not in (None, got) for got, size in sizes):
            return f"{name} has samples of shape {arrays[name].shape[1:]}, not {info['shape'][1:]}"
    return ""


def _measured(
    content: dict[str, Any],
    measured: Mapping[str, Measured | Failure],
    problems: dict[str, str],
    stored: Stored,
) -> tuple[dict[str, Any], list[str]]:
    """The manifest with nothing in it but what was measured now, and the problems as sentences.

    Of what cannot be measured without the Keras model, such as its latency, nothing is said.
    """
    reference, problems = stored.reference, dict(problems)
    model, settings = content["model"], content["settings"]
    # Where the metric that judged cannot be measured, accuracy must not judge in its place.
    limit = None if stored.missing else settings["max_drop"]
    rows = [_row(said, measured) for said in content["artifacts"]]
    # A file that was over its limit on all of the evaluation data may not be on those that are
    # stored, and the other way round: only what chance does not explain counts then.
    whole = content["evaluation"]["samples"] == reference.count
    fresh = acceptance.judge(
        [replace(row, status="passed") for row in rows],
        limit if whole else None,
        model["quantization_aware"],
        reference.figures.outputs,
        Causes(reference.inputs, reference.outputs, (), {}),
    )
    found = []
    for row, now in zip(rows, fresh, strict=True):
        measured_now = row.measured
        if measured_now is not None:
            row = replace(row, drop=now.drop, worst_output=now.worst_output, flags=now.flags)
            failed = "" if whole or limit is None else _over(measured_now, limit, reference.count)
            failed = failed or (now.reason if now.status == "failed" else "")
            if failed and row.status == "passed":
                problems.setdefault(str(row.file), f"it is recorded as passed, and {failed}")
            elif failed:
                row = replace(row, reason=failed)
        if row.file in problems:
            row = replace(row, status="failed", stage="verify", reason=problems[row.file])
        found.append(row)
    evaluation = {
        **{key: content["evaluation"][key] for key in ("file", "stored", "sha256")},
        "samples": reference.count,
        "labeled": bool(reference.labels),
        "kinds": reference.kinds,
        "metrics": {
            name: [each.to_list() for each in chosen] for name, chosen in reference.chosen.items()
        },
        "weighted": sorted(reference.weights),
        "not_measured": stored.missing,
    }
    result = {
        "schema": manifest.VERSION,
        "model": model,
        "settings": {**settings, "max_drop": limit},
        "keras": to_json(reference.figures),
        "teacher": None,
        "evaluation": evaluation,
        "calibration": None,
        "artifacts": [row.to_json() for row in found],
        "layers": {},
        **acceptance.choice(found, settings["objective"], settings.get("targets") or []),
        "history": None,
        "versions": manifest.versions(),
    }
    faults = [f"{name}: {fault}" for name, fault in problems.items()]
    return manifest.plain(result), faults


def _row(said: dict[str, Any], measured: Mapping[str, Measured | Failure]) -> ArtifactRow:
    """A row of the manifest with what was measured now in place of what is recorded."""
    row = ArtifactRow(
        said["format"],
        said["precision"],
        said["status"],
        said["stage"],
        said["reason"],
        files=tuple(manifest.files_of(said)),
    )
    found = measured.get(said["file"])
    if not isinstance(found, Measured):
        return row
    fixed = all(isinstance(tensor["shape"][0], int) for tensor in found.signature["inputs"])
    return replace(row, measured=found, batch="static" if fixed else "dynamic")


def _over(measured: Measured, limit: float, samples: int) -> str:
    for name, output in measured.metrics.outputs.items():
        # Chance has another size in other metrics than accuracy.
        if output.drop is None or output.agreement is None or output.chosen:
            continue
        # Three standard errors of the difference of two shares on these samples.
        chance = 3 * math.sqrt(max(0.0, 1 - output.agreement) / samples)
        if output.drop > limit + chance:
            return (
                f"at output `{name}` it loses {100 * output.drop:.2f} points of accuracy on the "
                f"stored samples, where max_drop allows {100 * limit:g}"
            )
    return ""


_SIGNATURE = ("structure", "inputs", "outputs")

ManifestError = manifest.ManifestError


def _difference(
    row: dict[str, Any], found: Measured | Failure, content: dict[str, Any], samples: int
) -> str:
    """What a file is or answers otherwise than recorded; empty if nothing."""
    if isinstance(found, Failure):
        return found.error
    # As JSON has it: what is not finite is nothing.
    fresh = manifest.plain(to_json(found))
    if fresh["bytes"] != row["bytes"]:
        return f"it has {fresh['bytes']} bytes, and {row['bytes']} are recorded"
    if fresh["signature"] != row["signature"]:
        return "its inputs and outputs are not the recorded ones"
    if found.unlike:
        return found.unlike
    recorded = [row["check"]]
    if content["evaluation"]["samples"] == samples:
        # All samples travel with the files: then both say the same.
        recorded.append(row["metrics"])
    for before in recorded:
        fault = _other_answers(before, fresh["check"], samples)
        if fault:
            return fault
    return ""


def _other_answers(before: dict[str, Any], now: dict[str, Any], samples: int) -> str:
    if set(before["outputs"]) != set(now["outputs"]):
        return (
            f"its outputs are {sorted(now['outputs'])}, and figures are recorded for "
            f"{sorted(before['outputs'])}"
        )
    several = len(before["outputs"]) > 1
    pairs = [(before, now, "")]
    pairs += [
        (was, now["outputs"][name], f" at output `{name}`" if several else "")
        for name, was in before["outputs"].items()
    ]
    for was, got, where in pairs:
        for name in ("accuracy", "agreement"):
            # Another processor may round one sample the other way; more is a different behavior.
            missing = was[name] is None or got[name] is None
            if missing and was[name] is not got[name]:
                return f"its {name}{where} is recorded as {was[name]}, and is {got[name]}"
            if not missing and abs(got[name] - was[name]) > 1.5 / samples:
                return (
                    f"its {name}{where} on the stored samples is {100 * got[name]:.2f} %, and was "
                    f"{100 * was[name]:.2f} % when it was exported"
                )
    if before["finite"] != now["finite"]:
        return (
            f"its answers are {'finite' if now['finite'] else 'NaN or infinite'}, as not recorded"
        )
    was, got = before["relative"], now["relative"]
    # Not finite numbers are none in JSON.
    if was is not None and (got is None or got > max(2 * was, was + 1e-3)):
        return (
            f"its outputs differ from the Keras model's by {now['worst']}, and by "
            f"{before['worst']:.3g} when it was exported"
        )
    return ""

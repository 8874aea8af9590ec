"""An earlier export, proven again from its files alone."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

from . import manifest
from .jobs import Progress, measure
from .report import Report


def verify(folder: str | os.PathLike[str], *, progress: Progress | None = None) -> Report:
    """Check the files of an export: hashes, loading, and the answers on the stored samples.

    Neither the Keras model nor its data is needed: `evaluation.npz` in the folder holds up to 256
    samples with the Keras model's outputs.

    Args:
        folder: What `keras_kd.export` wrote.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The report of the export. Files that do not give the recorded answers again are marked as
        failed in it and named in `report.problems`; `report.ok` says whether there are none.

    Raises:
        ManifestError: If the manifest is missing, damaged, edited or names files outside the
            folder, or if a file is missing or is not the one that was exported.

    Examples:
        >>> report = keras_kd.export.verify("exported/digits")  # doctest: +SKIP
        >>> report.ok  # doctest: +SKIP
        True
    """
    tell = progress or (lambda stage, done, total: None)
    folder = Path(folder)
    content = manifest.read(folder)
    rows = [row for row in content["artifacts"] if row["file"] is not None]
    manifest.check_files(folder, content)
    with tempfile.TemporaryDirectory(prefix="keras-kd-") as scratch:
        measured = measure(
            [{"id": row["file"], "path": str((folder / row["file"]).resolve())} for row in rows],
            {
                "signature": {key: content["model"][key] for key in _SIGNATURE},
                "evaluation": str((folder / content["evaluation"]["file"]).resolve()),
                "kinds": content["evaluation"]["kinds"],
                "stored": content["evaluation"]["stored"],
                "threads": 1,
                "time": False,
                "targets": content["settings"].get("targets", []),
                "images": sorted(content["model"].get("normalization", {})),
            },
            Path(scratch),
            tell,
        )
    content = copy.deepcopy(content)
    problems = []
    for row in content["artifacts"]:
        if row["file"] is None:
            continue
        fault = _fault(row, measured[row["file"]], content["evaluation"]["stored"])
        if fault:
            problems.append(f"{row['file']}: {fault}")
            row.update(status="failed", stage="verify", reason=fault)
            if content["best"] == row["file"]:
                content["best"] = None
    return Report(folder, content, problems)


_SIGNATURE = ("structure", "inputs", "outputs")

ManifestError = manifest.ManifestError


def _fault(row: dict[str, Any], fresh: dict[str, Any], samples: int) -> str:
    if "error" in fresh:
        return str(fresh["error"])
    before, now = row["check"], manifest.plain(fresh["check"])
    for output, was in before["outputs"].items():
        where = f" at output `{output}`" if len(before["outputs"]) > 1 else ""
        for name in ("accuracy", "agreement"):
            # Another processor may round one sample the other way; more is a different behavior.
            new = now["outputs"][output][name]
            if was[name] is not None and abs(new - was[name]) > 1.5 / samples:
                return (
                    f"its {name}{where} on the stored samples is {100 * new:.2f} %, and was "
                    f"{100 * was[name]:.2f} % when it was exported"
                )
    if before["finite"] and (
        not now["finite"]
        or now["relative"] > max(2 * before["relative"], before["relative"] + 1e-3)
    ):
        return (
            f"its outputs differ from the Keras model's by {now['worst']}, and by "
            f"{before['worst']:.3g} when it was exported"
        )
    return ""

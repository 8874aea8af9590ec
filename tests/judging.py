"""Rows and figures as tests write and read them: as JSON has them."""

from keras_kd.export.rows import (
    ArtifactRow,
    FileFigures,
    FileRow,
    KerasOutput,
    Measured,
    from_json,
    to_json,
)
from keras_kd.export.verification import acceptance, metrics


def compare(*arguments, **options):
    return to_json(metrics.compare(*arguments, **options))


def artifact(entry):
    """The row of an entry of a manifest, of which only what is judged need be there."""
    figures = from_json(FileFigures, entry["metrics"])
    known = {"gzip_bytes": 0, "signature": {}, **entry}
    measured = from_json(Measured, {**known, "metrics": None, "check": None})
    row = from_json(ArtifactRow, {**entry, "files": ()})
    files = (FileRow(entry["file"], "", entry["bytes"]),) if entry.get("file") else ()
    changes = {"metrics": figures, "check": figures}
    measured = type(measured)(**{**vars(measured), **changes})
    return type(row)(**{**vars(row), "measured": measured, "files": files})


def judge(entries, max_drop, aware, before=None, **given):
    """Judge entries, and write into them what came of it."""
    before = {name: from_json(KerasOutput, row) for name, row in (before or {}).items()}
    rows = acceptance.judge(list(map(artifact, entries)), max_drop, aware, before, **given)
    for entry, row in zip(entries, rows, strict=True):
        found = row.to_json()
        keys = ("status", "stage", "reason", "flags", "drop", "worst_output")
        entry.update({key: found[key] for key in keys if key in found})

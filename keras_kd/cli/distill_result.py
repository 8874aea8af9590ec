"""What `keras-kd distill` measured on the test rows: the document, the tables and the remarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_kd.cli.console import native_silence
from keras_kd.cli.recipes import RECIPES
from keras_kd.cli.teachers import NamedTeacher
from keras_kd.datasets import TaskData
from keras_kd.datasets.task_data import UNLABELED, Rows
from keras_kd.utils.tables import fitted
from keras_kd.utils.types import Array, Tensors

if TYPE_CHECKING:
    import keras


_FEW = 20
"""Classes up to which the table shows each; `distill.json` has all of them."""


def figures(data: TaskData, outputs: Array, rows: Rows) -> dict[str, Any]:
    """Measure answers by the task's figures, see `keras_kd.export.verification.scores`.

    Args:
        data: What the task is, and what its classes are called.
        outputs: `(rows, ..., units)`.
        rows: The split that was answered.

    Returns:
        Figures by name, and `per_class`, lists of `support`, `precision`, `recall`, `f1`; of tags
        of entities `per_entity` as well.
    """
    from keras_kd.export.verification import entities, lists
    from keras_kd.export.verification.output_meaning import is_probability
    from keras_kd.export.verification.scores import scores

    task = data.task
    if rows.groups is not None:
        return {"ndcg@10": lists.ndcg(outputs, rows.y, rows.groups)}
    kind = {"multilabel": "multilabel", "regression": "values", "ranking": "values"}.get(task)
    if kind is None:
        kind = "binary" if outputs.shape[-1] == 1 else "classes"
    outputs = np.asarray(outputs, np.float32)
    found = scores(
        outputs,
        rows.y,
        kind,
        is_probability(outputs),
        ranks=task == "ranking",
        tags=entities.tag_names(data.class_names, outputs),
    )
    wanted = {"ndcg@10"} if task == "ranking" else None
    return {name: value for name, value in found.items() if wanted is None or name in wanted}


def collect(
    data: TaskData, student: keras.Model, found: Sequence[NamedTeacher], report: Any, proof: Any
) -> dict[str, Any]:
    """Measure teacher, student and files on the test rows.

    Args:
        data: The data.
        student: The trained student.
        found: The teachers.
        report: Of the export.
        proof: Of the verification.

    Returns:
        Plain JSON values.
    """
    from keras_kd.export.formats.runtime import open_file, run_all
    from keras_kd.export.signature import describe

    rows = {row["name"]: row for row in report.rows() if row["name"] in ("teacher", "keras")}
    sizes = ("parameters", "bytes", "latency_ms")
    models: dict[str, Any] = {}
    for one in found:
        answers = one.test_answers(data)
        models[f"teacher {one.name}" if len(found) > 1 else "teacher"] = {
            "name": one.name,
            **({} if answers is None else figures(data, answers, data.test)),
            **{key: rows.get("teacher", {}).get(key) for key in sizes},
        }
    outputs = np.asarray(student.predict(data.test.x, batch_size=256, verbose=0))
    models["student"] = {
        "name": student.name,
        **figures(data, outputs, data.test),
        **{key: rows["keras"].get(key) for key in sizes},
    }
    feed = _by_name(student, data.test.x, outputs, describe)
    proven = {artifact.file: artifact.passed for artifact in proof.artifacts}
    files = []
    for artifact in report.artifacts:
        row: dict[str, Any] = {
            "name": f"{artifact.format} {artifact.precision}",
            "file": artifact.file,
            "bytes": artifact.bytes,
            "gzip_bytes": artifact.gzip_bytes,
            "latency_ms": artifact.latency_ms,
            "verified": artifact.passed and proven[artifact.file],
            "reason": artifact.reason,
            "flags": list(artifact.flags),
        }
        if artifact.passed:
            with native_silence():
                answers = next(iter(run_all(open_file(artifact.path), feed).values()))
            row |= figures(data, answers, data.test)
        files.append(row)
    judged = report.manifest["evaluation"].get("metrics") or {}
    metric = next((rows[0][0] for rows in judged.values() if rows), RECIPES[data.task].judges[0])
    return {
        "data": {
            "name": data.name,
            "task": data.task,
            "samples": data.sizes,
            "classes": list(data.class_names),
            **_lists(data),
            "notes": list(data.notes),
        },
        "metric": metric,
        "models": models,
        "files": files,
        "best": None if proof.best is None else proof.best.file,
        "max_drop": report.manifest["settings"]["max_drop"],
        "trivial": trivial(data),
    }


def _lists(data: TaskData) -> dict[str, Any]:
    """How many lists each split has, where items are rows."""
    splits = {name: getattr(data, name).groups for name in data.sizes}
    found = {name: len(np.unique(groups)) for name, groups in splits.items() if groups is not None}
    return {"groups": found} if found else {}


def _by_name(student: keras.Model, x: Tensors, outputs: Array, describe: Any) -> dict[str, Array]:
    from keras_kd.export.source import data as export_data

    return export_data.by_name(x, describe(student, x, outputs), "test")


def trivial(data: TaskData) -> dict[str, float] | None:
    """Return what the same answer to every row is worth on the test rows, where that is told.

    Of the most frequent class of the training rows the `accuracy` for `classification` and the
    `macro_f1` for `tokens`, of the mean target the `mae` for `regression`.
    """
    if data.task == "regression":
        mean = data.train.y.mean(axis=0, dtype=np.float64)
        return {"mae": float(np.abs(data.test.y - mean).mean())}
    name = {"classification": "accuracy", "tokens": "macro_f1"}.get(data.task)
    if name is None:
        return None
    known = data.train.y[data.train.y != UNLABELED]
    often = int(np.bincount(known.reshape(-1)).argmax())
    same = np.zeros((*data.test.y.shape, len(data.class_names)), np.float32)
    same[..., often] = 1
    return {name: float(figures(data, same, data.test)[name])}


def tables(result: dict[str, Any], width: int = 80) -> list[str]:
    """Lay the figures out as tables.

    Args:
        result: What `distill.json` holds.
        width: Most columns of text. Where they are few, the least important figures are left out.

    Returns:
        The texts: models and files, and the classes of the best file where they are few.
    """
    from keras_kd.export.report.figures import latency, size
    from keras_kd.export.report.scorecard import heading
    from keras_kd.export.verification import entities

    recipe = RECIPES[result["data"]["task"]]
    shown = list(dict.fromkeys([result["metric"], *recipe.shown]))
    measured = [*result["models"].values(), *result["files"]]
    shown = [name for name in shown if any(row.get(name) is not None for row in measured)]
    rows = []
    for name, row in result["models"].items():
        rows.append(
            [
                name,
                *(digits(row.get(key)) for key in shown),
                "" if row["parameters"] is None else f"{row['parameters']:,}",
                size(row["bytes"]),
                "",
                latency(row["latency_ms"]),
                "",
            ]
        )
    for row in result["files"]:
        mark = "* " if row["file"] is not None and row["file"] == result["best"] else "  "
        rows.append(
            [
                mark + row["name"],
                *(digits(row.get(key)) for key in shown),
                "",
                size(row["bytes"]),
                size(row["gzip_bytes"]),
                latency(row["latency_ms"]),
                "yes" if row["verified"] else "no",
            ]
        )
    headings = ["on the test rows", *map(heading, shown)]
    headings += ["params", "size", "gzip", "ms", "verified"]
    spare = ["params", "verified", "gzip", *[heading(key) for key in shown[:0:-1]]]
    texts = ["\n".join(fitted(headings, rows, width=width, dispensable=spare))]
    names = result["data"]["classes"]
    for what, called in (("class", names), ("entity", entities.types(names))):
        texts += _by_class(result, what, called, width)
    return texts


def _by_class(result: dict[str, Any], what: str, names: Sequence[str], width: int) -> list[str]:
    """The table with a line for each class, or each type of entity, of the best file."""
    best = _best(result)
    table = (best or {}).get(f"per_{what}")
    if best is None or not table or len(table["support"]) > _FEW:
        return []
    student = result["models"]["student"][f"per_{what}"]
    cells = [
        [
            f"  {names[k] if k < len(names) else k}",
            f"{table['support'][k]:,}",
            *(digits(table[key][k]) for key in ("precision", "recall", "f1")),
            digits(student["f1"][k]),
        ]
        for k in range(len(table["support"]))
    ]
    title = f"{'classes' if what == 'class' else 'entities'} of {best['name']}"
    headings = [title, "support", "precision", "recall", "F1", "Keras F1"]
    spare = (headings[5], *headings[2:4])
    return ["", "\n".join(fitted(headings, cells, width=width, dispensable=spare))]


def _best(result: dict[str, Any]) -> dict[str, Any] | None:
    for row in result["files"]:
        if row["file"] is not None and row["file"] == result["best"]:
            return dict(row)
    return None


def remarks(result: dict[str, Any], folder: Path) -> list[str]:
    """Say which file to take, and what was seen on the way.

    Args:
        result: What `distill.json` holds.
        folder: Where the files are.

    Returns:
        One paragraph each.
    """
    from keras_kd.export.report.scorecard import heading, points

    samples = result["data"]["samples"]
    best, teacher = _best(result), result["models"].get("teacher")
    lines = []
    if result.get("choice"):
        lines.append(f"Method {result['choice']['best']}: {result['choice']['verdict']}.")
    if best is None:
        lines.append("No file passed its check: the reasons are below and in report.html.")
    else:
        limit = result["max_drop"]
        lines.append(
            f"* Take {best['file']}: the smallest that lost at most {points(limit)} of "
            f"{heading(result['metric'])} on the {samples['validation']:,} validation rows."
        )
    for what, row in result["models"].items():
        for name, value in (result["trivial"] or {}).items():
            mine = row.get(name)
            better = math.inf if mine is None else mine - value if name != "mae" else value - mine
            if better <= 0:
                same = "the mean target" if name == "mae" else "the most frequent class"
                advice = (
                    "Train it longer (`--epochs`), or with another `--learning-rate`."
                    if what == "student"
                    else "Was it made for inputs of another scale?"
                )
                lines.append(
                    f"! {what}: its {heading(name)} of {digits(mine)} is no better than answering "
                    f"{same} every time ({digits(value)}). {advice}"
                )
    if teacher is not None and teacher.get(result["metric"]) is None:
        lines.append("The teacher was not asked about the test rows, so it has no figures.")
    for row in result["files"]:
        lines.extend(f"! {row['name']}: {flag}." for flag in row["flags"])
        if row["reason"]:
            lines.append(f"x {row['name']}: {row['reason']}.")
    lines.append(
        f"Figures: on the {samples['test']:,} test rows, which chose nothing. Size: the file, for "
        "Keras models the float32 weights. Time: one row, one thread, median."
    )
    lines.append(
        f"Written to {folder} in {result['seconds']:.0f} s. Open {folder / 'report.html'}, check "
        f"the files anywhere with: keras-kd verify {folder}, and do it all again with: "
        f"keras-kd distill --config {folder / 'distill.toml'} --overwrite"
    )
    return lines


def digits(value: float | None) -> str:
    """Return a figure as text."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.4g}"

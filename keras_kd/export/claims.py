"""What a manifest says, held against itself: the part of its form that a schema cannot express."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from keras_kd.export.formats import registry

_GREATEST = 2**63 - 1
"""Numbers beyond are no sizes, counts or shapes, and fit into no array."""


def contradiction(content: dict[str, Any]) -> str:
    """Return the first thing in which a manifest of the right form is none; empty if there is none.

    Args:
        content: A manifest that follows its schema.
    """
    return next((reason for reason in _faults(content) if reason), "")


def _faults(content: dict[str, Any]) -> Iterator[str]:
    yield from _values(content, "")
    rows = content["artifacts"]
    named = [[row, *row.get("more_files", ())] for row in rows if row["file"] is not None]
    everywhere = [each["file"] for found in named for each in found]
    everywhere.append(content["evaluation"]["file"])
    if content["schema"] == 1:
        yield from _version_faults(rows)
    if len(set(everywhere)) < len(everywhere):
        yield "two of its entries name the same file"
    for fmt in content["layers"]:
        if fmt not in {row["format"] for row in rows}:
            yield f"`layers.{fmt}` is not known"
    if len({(row["format"], row["precision"]) for row in rows}) < len(rows):
        yield "two of its entries have the same format and precision"
    model, evaluation = content["model"], content["evaluation"]
    names = {kind: [tensor["name"] for tensor in model[kind]] for kind in ("inputs", "outputs")}
    for kind, known in names.items():
        if len(set(known)) < len(known):
            yield f"`model.{kind}` holds a name twice"
    if set(evaluation["kinds"]) != set(names["outputs"]):
        yield "`evaluation.kinds` does not name the outputs of the model"
    if evaluation["stored"] > evaluation["samples"]:
        yield "`evaluation.stored` is more than there are samples"
    for i, row in enumerate(rows):
        yield from _row_faults(row, f"artifacts[{i}]", names)


def _row_faults(row: dict[str, Any], where: str, names: dict[str, list[str]]) -> Iterator[str]:
    if row["file"] is None:
        if row["status"] != "failed":
            yield f"`{where}` passed without a file"
        return
    if row["bytes"] is None:
        yield f"`{where}` has a file and no size"
    suffixes: tuple[str, ...] = (f".{row['format']}",)
    if row["format"] in registry.names():
        suffixes = registry.get(row["format"]).suffixes
    if PurePath(row["file"]).suffix != suffixes[0]:
        yield f"`{where}.file` is no {suffixes[0]} file"
    if "more_files" in row:
        yield from _file_faults(row, where)
    for kind, known in names.items():
        if {tensor["name"] for tensor in row["signature"][kind]} != set(known):
            yield f"`{where}.signature.{kind}` does not name the {kind} of the model"
        for tensor in row["signature"][kind]:
            if "scale" in tensor and "int" not in tensor["dtype"]:
                yield f"`{where}.signature.{kind}` has a scale for {tensor['dtype']}"
    worst = row.get("worst_output")
    if worst is not None and worst not in row["metrics"]["outputs"]:
        yield f"`{where}.worst_output` is none of its outputs"
    elif worst is not None and "drop" not in row["metrics"]["outputs"][worst]:
        yield f"`{where}.metrics.outputs` does not say what its worst output lost"


def _file_faults(row: dict[str, Any], where: str) -> Iterator[str]:
    more = row["more_files"]
    if row["bytes"] is not None and sum(each["bytes"] for each in more) > row["bytes"]:
        yield f"`{where}.bytes` is less than `{where}.more_files` have"
    if any(PurePath(each["file"]).stem != PurePath(row["file"]).stem for each in more):
        # Where they are opened, they are found by the name of the first.
        yield f"`{where}.more_files` have other names than its file"


def _version_faults(rows: list[dict[str, Any]]) -> Iterator[str]:
    for i, row in enumerate(rows):
        if row["format"] not in ("tflite", "onnx"):
            yield f"`artifacts[{i}].format` is none of version 1"
        if "more_files" in row:
            yield f"`artifacts[{i}].more_files` is none of version 1"


def _values(value: object, where: str) -> Iterator[str]:
    # Anywhere: text that no file and no terminal takes, and numbers that no array does.
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _values(key, where)
            yield from _values(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, where)
    elif isinstance(value, str):
        if any(unicodedata.category(letter) == "Cs" for letter in value if not letter.isascii()):
            yield f"`{where}` holds half of a surrogate pair"
    elif isinstance(value, int) and abs(value) > _GREATEST:
        yield f"`{where}` lies outside its limits"

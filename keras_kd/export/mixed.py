"""Files in which the layers that lose most stay float, where int8 alone costs too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from keras_kd.export.report.layer_report import LayerReport


class Work(Protocol):
    """What converts and measures files of one model."""

    layers: dict[str, list[dict[str, Any]]]

    def make(self, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Convert and measure."""

    def compare_layers(self, row: dict[str, Any], stage: Path) -> None:
        """Measure the noise of an int8 file's layers."""


def quietly(stage: str, done: int, total: int) -> None:
    """Tell nobody of a step that the caller did not ask for."""


def _failed(row: dict[str, Any]) -> bool:
    """Whether a file was made and is not good enough."""
    return row["bytes"] is not None and row["status"] == "failed"


def try_mixed(
    work: Work,
    rows: list[dict[str, Any]],
    judge: Callable[[list[dict[str, Any]]], None],
    path: str,
    aware: bool,
) -> list[dict[str, Any]]:
    """Make files that are int8 but for some layers, where int8 alone costs too much.

    Args:
        work: Converts and measures.
        rows: Entries of the manifest, judged. A failed int8 file without a mixed one beside it says
            why in `without_mixed`.
        judge: Marks entries that fail.
        path: Of the files, with `{precision}` and `{format}`.
        aware: Whether the Keras model is quantization-aware.

    Returns:
        Entries of the files that were made, judged.
    """
    # Where int8 alone costs too much, the layers that lose most stay float, with what they read:
    # one, then ever twice as many, until a file passes or half of the layers have been named and
    # little is left of the quantization.
    # Both formats go through a round together, since every round starts a converter.
    noisy: dict[str, list[str]] = {}
    for row in filter(_failed, rows):
        others = [each["precision"] for each in rows if each["format"] == row["format"]]
        if row["precision"] in ("uint8", "int8_qoperator") and "int8" not in others:
            row["without_mixed"] = "it is tried for int8: add that to `precisions`"
        if row["precision"] != "int8":
            continue
        if aware:
            row["without_mixed"] = "layers of a quantization-aware model cannot be kept float"
            continue
        if not work.layers.get(row["format"]):
            work.compare_layers(row, Path(path).parent)
        noisy[row["format"]] = LayerReport(work.layers).worst(row["format"])
        if not noisy[row["format"]]:
            row["without_mixed"] = (
                "no layer of the int8 file could be compared with the float32 file, so nothing "
                "says which to keep float"
            )
    if any(_failed(row) for row in rows):
        # The noise of layers says more about what happened.
        judge(rows)
    noise = LayerReport(work.layers)
    made: dict[str, dict[str, Any]] = {}
    count = 1
    while waiting := [
        fmt
        for fmt, layers in noisy.items()
        if count <= max(1, len(layers) // 2) and layers and (fmt not in made or _failed(made[fmt]))
    ]:
        tasks: list[dict[str, Any]] = [
            {
                "id": f"{fmt}-mixed",
                "format": fmt,
                "precision": "mixed",
                "keep": noise.with_inputs(fmt, noisy[fmt][:count]),
                "path": path.format(precision="mixed", format=fmt),
            }
            for fmt in waiting
        ]
        for task, entry in zip(tasks, work.make(tasks), strict=True):
            entry["kept"] = task["keep"]
            entry["notes"].append(f"float layers: {', '.join(task['keep'])}")
            made[task["format"]] = entry
        judge([*rows, *made.values()])
        count *= 2
    return list(made.values())

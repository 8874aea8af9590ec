"""Files in which the layers that lose most stay float, where int8 alone costs too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from keras_kd.export.formats.base import Format
from keras_kd.export.formats.registry import get
from keras_kd.export.report.layer_report import LayerReport
from keras_kd.export.rows import ArtifactRow, ConvertTask, LayerRow


class Work(Protocol):
    """What converts and measures files of one model."""

    layers: dict[str, tuple[LayerRow, ...]]

    def make(self, tasks: Sequence[ConvertTask]) -> list[ArtifactRow]:
        """Convert and measure."""

    def compare_layers(self, row: ArtifactRow, stage: Path) -> None:
        """Measure the noise of an int8 file's layers."""


Judge = Callable[[Sequence[ArtifactRow]], list[ArtifactRow]]
"""Gives rows with what was decided of them."""


def quietly(stage: str, done: int, total: int) -> None:
    """Tell nobody of a step that the caller did not ask for."""


def try_mixed(
    work: Work,
    rows: Sequence[ArtifactRow],
    judge: Judge,
    path: Callable[[Format], str],
    aware: bool,
) -> list[ArtifactRow]:
    """Make files that are int8 but for some layers, where int8 alone costs too much.

    Args:
        work: Converts and measures.
        rows: Of the manifest, judged.
        judge: Judges rows.
        path: Of the file in a format.
        aware: Whether the Keras model is quantization-aware.

    Returns:
        All rows, judged, with those of the files that were made. A failed int8 file without a mixed
        one beside it says why in `without_mixed`.
    """
    # Where int8 alone costs too much, the layers that lose most stay float, with what they read:
    # one, then ever twice as many, until a file passes or half of the layers have been named and
    # little is left of the quantization.
    # All formats go through a round together, since every round starts a converter.
    noisy: dict[str, list[str]] = {}
    told: list[ArtifactRow] = []
    for row in rows:
        reason = ""
        if row.failed:
            others = [each.precision for each in rows if each.format == row.format]
            if row.precision in ("uint8", "int8_qoperator") and "int8" not in others:
                reason = "it is tried for int8: add that to `precisions`"
            if row.precision == "int8":
                noisy[row.format], reason = _noisy(work, row, Path(path(get(row.format))), aware)
        told.append(replace(row, without_mixed=reason) if reason else row)
    if any(row.failed for row in rows):
        # The noise of layers says more about what happened.
        told = judge(told)
    noise = LayerReport(work.layers)
    made: dict[str, ArtifactRow] = {}
    count = 1
    while waiting := [
        fmt
        for fmt, layers in noisy.items()
        if count <= max(1, len(layers) // 2) and layers and (fmt not in made or made[fmt].failed)
    ]:
        tasks = [
            ConvertTask(
                f"{fmt}-mixed",
                fmt,
                "mixed",
                path(get(fmt)),
                keep=tuple(noise.with_inputs(fmt, noisy[fmt][:count])),
            )
            for fmt in waiting
        ]
        for task, row in zip(tasks, work.make(tasks), strict=True):
            note = f"float layers: {', '.join(task.keep)}"
            made[task.format] = replace(row, kept=task.keep, notes=(*row.notes, note))
        judged = judge([*told, *made.values()])
        told, made = judged[: len(told)], dict(zip(made, judged[len(told) :], strict=True))
        count *= 2
    return [*told, *made.values()]


def _noisy(work: Work, row: ArtifactRow, path: Path, aware: bool) -> tuple[list[str], str]:
    """The layers of a failed int8 file, the noisiest first; or why no mixed file is tried."""
    if aware:
        return [], "layers of a quantization-aware model cannot be kept float"
    if not get(row.format).mixes:
        return [], f"the format {row.format} cannot keep layers float"
    if not work.layers.get(row.format):
        work.compare_layers(row, path.parent)
    found = LayerReport(work.layers).worst(row.format)
    if found:
        return found, ""
    return [], (
        "no layer of the int8 file could be compared with the float32 file, so nothing "
        "says which to keep float"
    )

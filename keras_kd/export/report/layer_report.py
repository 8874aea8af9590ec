"""The noise of the layers of int8 files: a table, a plot, and which layers lose most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_kd.export.rows import LayerRow, from_json, to_json
from keras_kd.export.writing import write_file
from keras_kd.utils.escaping import plain

_CLEAN = 60.0
"""The SQNR in dB that stands for no noise; eight bits leave 50 at most."""


def _level(row: LayerRow) -> float:
    return _CLEAN if row.sqnr is None else min(_CLEAN, float(row.sqnr))


class LayerReport:
    """The noise of each layer of the int8 files against the float32 ones.

    Args:
        rows: For each format the rows of `layer_noise`, or those of a manifest.
    """

    def __init__(self, rows: Mapping[str, Sequence[LayerRow | Mapping[str, Any]]]) -> None:
        self._rows = {
            fmt: [row if isinstance(row, LayerRow) else from_json(LayerRow, row) for row in found]
            for fmt, found in rows.items()
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows as dicts with their `format`, in running order."""
        return [{"format": fmt, **to_json(row)} for fmt, rows in self._rows.items() for row in rows]

    def names(self) -> list[str]:
        """Return the layers of all formats, in running order."""
        merged: list[str] = []
        for rows in self._rows.values():
            place = 0
            for row in rows:
                if row.layer not in merged:
                    merged.insert(place, row.layer)
                place = merged.index(row.layer) + 1
        return merged

    def worst(self, fmt: str) -> list[str]:
        """Return the layers of a format, first those at which most of the signal is lost.

        A layer that only hands on the noise of what it reads comes after the layer at which the
        noise arose.

        Args:
            fmt: Its name, such as `"tflite"`.

        Returns:
            The layers with noise.
        """
        rows = self._rows.get(fmt, [])
        level = {row.layer: _level(row) for row in rows}

        def lost(row: LayerRow) -> float:
            return min([level[name] for name in row.reads], default=_CLEAN) - _level(row)

        noisy = [row for row in rows if row.sqnr is not None]
        return [row.layer for row in sorted(noisy, key=lost, reverse=True)]

    def with_inputs(self, fmt: str, layers: Collection[str]) -> list[str]:
        """Return layers and those they read, in running order: what must be float together.

        A range too wide for eight bits belongs to the layer before, and is felt in the next.

        Args:
            fmt: Its name, such as `"tflite"`.
            layers: Some of the layers.

        Returns:
            Those layers and the ones they read, each behind the layers that are part of it.
        """
        rows = self._rows.get(fmt, [])
        chosen = {name for row in rows if row.layer in layers for name in row.reads}
        kept = [row for row in rows if row.layer in chosen | set(layers)]
        names = [name for row in kept for name in (*row.covers, row.layer)]
        return list(dict.fromkeys(names))

    def table(self, width: int = 80) -> str:
        """Return layers and their SQNR in dB as text of at most so many columns."""
        formats = list(self._rows)
        if not formats:
            return "No float32 and int8 file of one format: nothing to compare layer by layer."
        names = self.names()
        figures = {fmt: {row.layer: row.sqnr for row in rows} for fmt, rows in self._rows.items()}
        covered: dict[str, dict[str, None]] = {}
        for row in (row for rows in self._rows.values() for row in rows):
            covered.setdefault(row.layer, {}).update(dict.fromkeys(row.covers))
        labels = {
            name: plain(f"{name} (with {', '.join(covered[name])})" if covered[name] else name)
            for name in names
        }
        room = min(60, width - 9 * len(formats))
        width = min(room, max(map(len, ("SQNR of int8 in dB", *labels.values()))))
        lines = [f"{'SQNR of int8 in dB':<{width}}" + "".join(f"{fmt:>9}" for fmt in formats)]
        for name in names:
            label = (
                labels[name] if len(labels[name]) <= width else "..." + labels[name][3 - width :]
            )
            cells = [
                "-"
                if name not in figures[fmt]
                else "exact"
                if figures[fmt][name] is None
                else f"{figures[fmt][name]:.1f}"
                for fmt in formats
            ]
            lines.append(f"{label:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
        return "\n".join(lines)

    def save_svg(self, path: str | Path) -> Path:
        """Write the plot of the layers, as in the HTML report.

        Args:
            path: The file; its folder must exist.

        Returns:
            The path.
        """
        from keras_kd.export.report.plots import layer_plot

        return write_file(path, layer_plot(self.rows(), self.names()))

    def __str__(self) -> str:
        return self.table()

"""A study in plots and as one HTML page that opens offline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from keras_kd.export.report import plots
from keras_kd.export.report.pages import filled
from keras_kd.export.report.plots import empty_figure, literally, svg
from keras_kd.utils.escaping import plain
from keras_kd.utils.values import all_digits, is_number


class Shown(Protocol):
    """What is drawn of a `Study`."""

    regression: bool
    minimize: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The options with which the best student is trained again."""

    @property
    def front(self) -> list[dict[str, Any]]:
        """The trials that no other one beats in everything."""

    def rows(self) -> list[dict[str, Any]]:
        """One dict a trial."""

    def parameters(self, varying: bool = False) -> list[str]:
        """Names of the values."""

    def error_text(self, error: float | None) -> str:
        """An error as it is shown."""


KINDS = ("front", "parallel")

_FIGURES = ("error", "bytes", "latency_ms")
_COLORS = {"done": "#1f6f8b", "stopped": "#b9c6cc", "beyond": "#e0d5c8"}
_LABELS = {"bytes": "bytes of the file", "latency_ms": "ms, one thread, batch of one"}


def save(study: Shown, path: str | os.PathLike[str], kind: str) -> Path:
    """Write one plot as PNG or SVG.

    Args:
        study: What is drawn.
        path: The file.
        kind: One of `KINDS`.

    Returns:
        The path.

    Raises:
        ValueError: If kind or suffix is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` is one of {', '.join(KINDS)}. Received: kind={kind!r}.")
    figure = front_figure if kind == "front" else parallel_figure
    return plots.save(lambda: figure(study), path)


@literally
def front_figure(study: Shown) -> Any:
    """Draw the error of each trial's file against its size, or its latency."""
    figure, axes = _figure()
    other = "latency_ms" if "latency_ms" in study.minimize else "bytes"
    rows = [row for row in study.rows() if row["error"] is not None and row[other]]
    scale = 1.0 if study.regression else 100.0
    for state, color in _COLORS.items():
        chosen = [row for row in rows if row["state"] == state]
        if chosen:
            x, y = [row[other] for row in chosen], [scale * row["error"] for row in chosen]
            axes.scatter(x, y, s=18, color=color, label=state, zorder=2)
    front = sorted(study.front, key=lambda row: row[other] or 0)
    if front:
        x, y = [row[other] for row in front], [scale * row["error"] for row in front]
        # With marks: a front of one trial is no line.
        mark = {"marker": "o", "ms": 6, "mfc": "none"}
        axes.step(x, y, where="post", color="#c1553b", lw=1.2, label="front", zorder=3, **mark)
    named: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row["role"]:
            named.setdefault((row[other], scale * row["error"]), []).append(row["role"])
    for point, roles in named.items():
        axes.annotate(
            ", ".join(roles), point, fontsize=7, xytext=(5, 4), textcoords="offset points"
        )
    axes.set_xlabel(_LABELS[other])
    axes.set_ylabel("mean squared error" if study.regression else "error on validation rows, %")
    if rows:
        axes.legend(fontsize=7, frameon=False)
    return figure


@literally
def parallel_figure(study: Shown) -> Any:
    """Draw a line a trial through its values and figures, the front on top."""
    figure, axes = _figure()
    rows = [row for row in study.rows() if row["error"] is not None]
    figures = [name for name in _FIGURES if any(row[name] is not None for row in rows)]
    names = [*study.parameters(varying=True), *figures]
    ticks = {name: _places([row.get(name) for row in rows]) for name in names}
    for i, row in enumerate(rows):
        color = "#c1553b" if row["front"] else _COLORS.get(row["state"], "#b9c6cc")
        heights = [ticks[name][i] for name in names]
        axes.plot(range(len(names)), heights, color=color, lw=1.2 if row["front"] else 0.6)
    for place, name in enumerate(names):
        values = [row.get(name) for row in rows]
        for height, text in _marks(values, ticks[name]):
            # On white, as lines pass beneath.
            behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
            axes.text(place, height, f" {plain(text)}", fontsize=6, va="center", bbox=behind)
    axes.set_xticks(range(len(names)), [plain(name) for name in names], fontsize=7)
    axes.set_yticks([])
    return figure


def _places(values: list[Any]) -> list[float]:
    """Heights in [0, 1]: numbers by their order of magnitude where it differs, names in turn."""
    if not values:
        return []
    if not all(map(is_number, values)):
        known = list(dict.fromkeys(map(str, values)))
        return [known.index(str(v)) / max(len(known) - 1, 1) for v in values]
    array = np.asarray(values, "float64")
    if array.min() > 0 and array.max() > 10 * array.min():
        array = np.log(array)
    span = float(np.ptp(array))
    return ((array - array.min()) / span if span else np.full(len(array), 0.5)).tolist()


def _marks(values: list[Any], heights: list[float]) -> list[tuple[float, str]]:
    """What is written along an axis: each name, or the least and the greatest number."""
    pairs = sorted({(height, _text(value)) for height, value in zip(heights, values)})
    names = any(isinstance(value, str) for value in values)
    return pairs if names or len(pairs) < 3 else [pairs[0], pairs[-1]]


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _exact(value: object) -> str:
    """A value of the configuration as it is, for who types it in."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return all_digits(value) if isinstance(value, float) else str(value)


def _figure() -> Any:
    figure = empty_figure(7.0)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def render(study: Shown) -> str:
    """Return the page.

    Args:
        study: What is shown.

    Returns:
        HTML with its plots as inline SVG and no outside reference.

    Raises:
        ImportError: If Jinja or Matplotlib is missing.
    """
    names = study.parameters()
    return filled(
        __package__,
        "study.html.j2",
        study=study,
        names=names,
        plots=[svg(front_figure(study)), svg(parallel_figure(study))],
        error=study.error_text,
        text=_text,
        again={name: _exact(value) for name, value in study.config.items()},
    )

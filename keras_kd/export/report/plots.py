"""The plots of a report, drawn by Matplotlib's objects: the caller's figures stay as they are."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_kd.export.formats import registry
from keras_kd.export.report.scorecard import Scorecard
from keras_kd.export.writing import write_file
from keras_kd.utils.escaping import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MARKERS = {
    "float32": "o",
    "float16": "s",
    "dynamic": "^",
    "int8": "D",
    "uint8": "d",
    "weight_int8": "v",
    "weight_int4": "<",
    "int16x8": "P",
    "int8_qoperator": "X",
}


_LONGEST_NAME = 60


def literally(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function draw text as it is: Matplotlib reads formulas between dollar signs, or TeX."""

    @functools.wraps(draw)
    def drawn(*arguments: object, **options: object) -> Any:
        try:
            drawing = _literal()
        except ImportError as error:
            raise _missing(error) from error
        with drawing:
            return draw(*arguments, **options)

    return drawn


def _literal() -> contextlib.AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context({"text.parse_math": False, "text.usetex": False})


def _name(text: str) -> str:
    text = plain(text)
    text = text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."
    # A legend leaves out what begins with an underscore.
    return f" {text}" if text.startswith("_") else text


@literally
def layer_plot(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return the SQNR of each layer as an SVG.

    Args:
        rows: Those of a `LayerReport`.
        names: Of its layers, in running order.
    """
    figure = empty_figure()
    axes = figure.subplots()
    for fmt in dict.fromkeys(row["format"] for row in rows):
        known = [row for row in rows if row["format"] == fmt and row["sqnr"] is not None]
        axes.plot(
            [names.index(row["layer"]) for row in known],
            [row["sqnr"] for row in known],
            "o-",
            color=registry.color(fmt),
            label=fmt,
            markersize=4,
        )
    axes.set_xticks(range(len(names)), map(_name, names), rotation=90, fontsize=6)
    axes.set_ylabel("SQNR in dB")
    axes.legend(fontsize=7)
    axes.grid(True, alpha=0.3)
    return svg(figure)


@literally
def bench_figure(rows: list[dict[str, Any]]) -> Any:
    """Draw latency, starts and memory of each file.

    Args:
        rows: Those of a `BenchReport`; a figure that is missing leaves its place empty.

    Returns:
        A Matplotlib figure.

    Raises:
        ImportError: If Matplotlib is missing.
    """
    figure = empty_figure(10.0, 1.6 + 0.28 * len(rows))
    latency_axes, start_axes, memory_axes = figure.subplots(1, 3, sharey=True)
    nan = float("nan")

    def values(key: str, factor: float = 1.0) -> list[float]:
        return [nan if row[key] is None else factor * row[key] for row in rows]

    places = range(len(rows))
    colors = [registry.color(row["name"].split()[0]) for row in rows]
    p50, p90 = values("p50_ms"), values("p90_ms")
    latency_axes.scatter(p50, places, color=colors, label="p50")
    latency_axes.scatter(p90, places, color=colors, marker="|", s=90, label="p90")
    latency_axes.hlines(places, p50, p90, color=colors, alpha=0.5)
    latency_axes.set_xlabel("one inference, ms")
    cold, warm = values("cold_start_ms"), values("warm_start_ms")
    start_axes.scatter(warm, places, color=colors, label="warm")
    start_axes.scatter(cold, places, facecolors="white", edgecolors=colors, label="cold")
    start_axes.hlines(places, warm, cold, color=colors, alpha=0.5)
    start_axes.set_xlabel("start, ms")
    memory_axes.barh(places, values("peak_memory_bytes", 1e-6), color=colors, height=0.6)
    memory_axes.set_xlabel("peak memory, MB")
    for axes, figures in ((latency_axes, p50), (start_axes, warm)):
        # Where no file ran, there is nothing to scale.
        if any(value > 0 for value in figures):
            _log_scale(axes)
        axes.legend(fontsize=7)
    for axes in (latency_axes, start_axes, memory_axes):
        axes.grid(True, axis="x", alpha=0.3)
        axes.tick_params(labelsize=7, which="both")
    latency_axes.set_yticks(places, [_name(row["name"]) for row in rows], fontsize=7)
    latency_axes.invert_yaxis()
    return figure


def empty_figure(width: float = 5.6, height: float = 3.6) -> Any:
    """Make a Matplotlib figure that no other one of the program sees.

    Args:
        width: In inches.
        height: The same.

    Raises:
        ImportError: If Matplotlib is missing.
    """
    try:
        # The object interface: pyplot would change the caller's backend and open figures.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _missing(error) from error
    return Figure(figsize=(width, height), layout="constrained")


def _missing(error: ImportError) -> ImportError:
    return ImportError(
        f"Plots need {error.name}, which is not installed. Install it with "
        '`pip install "keras_kd[report]"`.'
    )


def save(draw: Callable[[], Any], path: str | os.PathLike[str]) -> Path:
    """Write a plot as PNG or SVG.

    Args:
        draw: Makes the figure.
        path: The file; its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: If Matplotlib is missing.
        ValueError: If it is to be another kind of file.
    """
    kinds: dict[str, Callable[[Any], str | bytes]] = {".png": png, ".svg": svg}
    suffix = Path(path).suffix.lower()
    if suffix not in kinds:
        raise ValueError(f"A plot is a `.png` or `.svg` file. Received: `{path}`.")
    return write_file(path, kinds[suffix](draw()))


def svg(figure: Figure) -> str:
    """Return a Matplotlib figure as SVG, for a page or a file of its own."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # A fixed salt and no date: the same report gives the same bytes. Paths, since the reader's
    # machine may lack the font.
    with rc_context({"svg.hashsalt": "keras_kd", "svg.fonttype": "path"}), _literal():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    """Return a Matplotlib figure as PNG."""
    buffer = io.BytesIO()
    with _literal():
        figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


@literally
def scatter(
    rows: list[dict[str, Any]],
    key: str,
    label: str,
    factor: float,
    card: Scorecard | None = None,
) -> dict[str, str] | None:
    """Draw the quality of files against one of their costs.

    Args:
        rows: Those of a report.
        key: The cost, such as `"bytes"`.
        label: Of its axis.
        factor: From its unit to that of the axis.
        card: What files are judged by; accuracy without it.

    Returns:
        `title` and `svg`; `None` where no file has both.
    """
    quality = name = "accuracy"
    title, share = "accuracy in %", True
    if card is not None and card.name not in (None, "accuracy"):
        quality, name, title, share = "score", card.heading or "", card.heading or "", False
    if all(row.get(quality) is None for row in rows):
        quality = name = "agreement"
        title, share = "agreement with the Keras model in %", True
    points = [row for row in rows if row.get(key) is not None and row.get(quality) is not None]
    if not points:
        return None
    figure = empty_figure()
    axes = figure.subplots()
    for row in points:
        failed = row.get("status") == "failed"
        color = registry.color(row.get("format") or "")
        x, y = row[key] * factor, (100 if share else 1) * row[quality]
        axes.plot(
            [x],
            [y],
            _MARKERS.get(row.get("precision", ""), "*"),
            color=color,
            markersize=10 if row["best"] else 7,
            markerfacecolor="white" if failed else color,
            label=_name(row["name"])
            + (" (best)" if row["best"] else " (failed)" if failed else ""),
            alpha=0.8,
            clip_on=False,
        )
    values = [row[key] * factor for row in points]
    if min(values) > 0 and max(values) > 8 * min(values):
        _log_scale(axes)
    axes.margins(0.1, 0.15)
    # A share ends at 100 %: the axis does too, and points there are drawn whole.
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100.0) if share else high)
    # Names beside the points would lie on top of each other: exact files share one accuracy.
    figure.legend(loc="outside right upper", fontsize=7)
    axes.set_xlabel(label)
    axes.set_ylabel(title)
    axes.grid(True, alpha=0.3)
    what = "Size" if key == "bytes" else "Latency"
    return {"title": f"{what} against {name}", "svg": svg(figure)}


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    # Labels of Matplotlib's own choice, such as 2x10^-3 to 6x10^-3, lie on top of each other.
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


@literally
def curves(history: dict[str, list[float | None]]) -> list[dict[str, str]]:
    """Draw a training's losses and metrics by epoch.

    Args:
        history: A number an epoch by name.

    Returns:
        `title` and `svg` of each plot.
    """
    # One plot for each quantity, its validation curve in the same one.
    names = [name for name in history if not name.startswith("val_")]
    losses = [name for name in names if "loss" in name]
    others = [name for name in names if name not in losses]
    plots = []
    for title, group in (("Losses by epoch", losses), ("Metrics by epoch", others)):
        if not group:
            continue
        figure = empty_figure()
        axes = figure.subplots()
        for i, name in enumerate(group):
            for key, style in ((name, "-"), (f"val_{name}", "--")):
                if key in history:
                    values = [float("nan") if v is None else v for v in history[key]]
                    axes.plot(
                        range(1, len(values) + 1),
                        values,
                        style,
                        color=f"C{i}",
                        label=_name(key),
                        lw=1.5,
                    )
        axes.set_xlabel("epoch")
        axes.legend(fontsize=7)
        axes.grid(True, alpha=0.3)
        plots.append({"title": title, "svg": svg(figure)})
    return plots

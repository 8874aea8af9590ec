"""The report as one HTML page that opens offline."""

from __future__ import annotations

from keras_kd.export.formats.device_table import together
from keras_kd.export.report.figures import latency, number, percent, size
from keras_kd.export.report.pages import filled
from keras_kd.export.report.plots import curves, layer_plot, scatter
from keras_kd.export.report.results import Results
from keras_kd.export.report.scorecard import heading


def render(report: Results) -> str:
    """Return the page.

    Args:
        report: What was exported.

    Returns:
        HTML with its plots as inline SVG and no outside reference.

    Raises:
        ImportError: If Jinja or Matplotlib is missing.
    """
    rows, card = report.rows(), report.scorecard()
    plots = [
        plot
        for plot in (
            scatter(rows, "bytes", "size in KB", 1e-3, card),
            scatter(rows, "latency_ms", "latency in ms, one thread, batch of one", 1.0, card),
            *curves(report.manifest["history"] or {}),
            _noise(report),
        )
        if plot is not None
    ]
    return filled(
        __package__,
        "templates",
        "report.html.j2",
        report=report,
        manifest=report.manifest,
        rows=rows,
        plots=plots,
        size=size,
        percent=percent,
        number=number,
        latency=latency,
        card=card,
        columns=lambda table: list(dict.fromkeys(key for row in table for key in row)),
        together=together,
        heading=heading,
    )


def _noise(report: Results) -> dict[str, str] | None:
    layers = report.layers()
    if not layers.rows():
        return None
    return {"title": "Noise of int8 by layer", "svg": layer_plot(layers.rows(), layers.names())}

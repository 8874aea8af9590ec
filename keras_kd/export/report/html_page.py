"""The report as one HTML page that opens offline."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from keras_kd.export.formats.device_table import together
from keras_kd.export.report.figures import latency, number, percent, size
from keras_kd.export.report.plots import curves, layer_plot, scatter
from keras_kd.export.report.results import Results
from keras_kd.export.report.scorecard import heading
from keras_kd.utils.escaping import plain


def _finalized(value: Any) -> Any:
    # What is marked as safe is made here, and keeps its lines.
    return plain(value) if type(value) is str else value


def render(report: Results) -> str:
    """Return the page.

    Args:
        report: What was exported.

    Returns:
        HTML with its plots as inline SVG and no outside reference.

    Raises:
        ImportError: If Jinja or Matplotlib is missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The HTML report needs {error.name}, which is not installed. Install it with "
            '`pip install "keras_kd[report]"`.'
        ) from error
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_finalized
    ).from_string(
        files(__package__).joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    )
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
    return template.render(
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

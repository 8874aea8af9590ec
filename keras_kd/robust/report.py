"""What an evaluation found: figures, a table, and one HTML page with the reliability diagram.

May import: tables and drawing of the export's report.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from keras_kd.export.report.figures import percent
from keras_kd.export.report.pages import filled
from keras_kd.export.report.plots import empty_figure, literally, svg
from keras_kd.export.writing import write_file
from keras_kd.utils.escaping import plain
from keras_kd.utils.tables import fitted


class RobustReport:
    """How a model or a file stood up, as `keras_kd.robust.evaluate` measured it.

    Args:
        content: What was measured, as plain JSON values.

    Attributes:
        name: The model or file.
        rows: How many rows it was measured on.
        clean: Share of right decisions on the rows as they are, 0..1.
        adversarial: Share of rows that stay right under every attack of the threat; `None` without
            one. Of a file that was attacked without its Keras model it is an upper bound.
        attacks: That share by attack: `"fgsm"`, `"pgd"`, `"square"` (what it leaves of the rows
            that PGD left); of a file `"transferred fgsm"` and `"transferred pgd"`.
        second_opinion: What the second library leaves, 0..1; `None` if it was not asked.
        corrupted: Accuracy by corruption and severity: `report.corrupted["contrast"][3]`.
        mean_corruption_error: Mean error over all corruptions and severities, 0..1; `None` without
            any. It is not divided by that of AlexNet, as the papers' mCE is.
        ece: Expected calibration error on the rows as they are, 15 bins, 0..1.
        temperature: That of the least negative log-likelihood on `calibrate_on`; `None` without.
        calibrated_ece: Expected calibration error with that temperature.
        intervals: 95 % intervals by Wilson's score, by the names of attacks, and of corruptions and
            severities as `"contrast 3"`.
        flags: What says not to believe the robustness, as sentences.

    Examples:
        >>> report = evaluate(student, x_test, y_test, Linf(0.1), corruptions="all")
        >>> report.save_html("robust.html")
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content
        self.name: str = content["name"]
        self.rows: int = content["rows"]
        self.clean: float = content["clean"]
        self.adversarial: float | None = content.get("adversarial")
        self.attacks: dict[str, float] = dict(content["attacks"])
        opinion = content.get("second_opinion")
        self.second_opinion: float | None = None if opinion is None else opinion["accuracy"]
        self.corrupted: dict[str, dict[int, float]] = {
            name: {int(severity): share for severity, share in row.items()}
            for name, row in content["corrupted"].items()
        }
        shares = [share for row in self.corrupted.values() for share in row.values()]
        self.mean_corruption_error = 1 - sum(shares) / len(shares) if shares else None
        self.ece: float = content["sureness"]["ece"]
        after = content.get("calibration") or {}
        self.temperature: float | None = after.get("temperature")
        self.calibrated_ece: float | None = after.get("ece")
        self.intervals: dict[str, tuple[float, float]] = {
            name: (low, high) for name, (low, high) in content["intervals"].items()
        }
        self.flags: tuple[str, ...] = tuple(content["flags"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: all that was measured."""
        return {**self._content, "mean_corruption_error": self.mean_corruption_error}

    def lines(self) -> list[tuple[str, str, str]]:
        """Return what is said of the accuracies: name, percent, and 95 % interval in percent."""
        named = {"clean": self.clean, **self.attacks}
        if self.second_opinion is not None:
            named["second opinion"] = self.second_opinion
        if self.adversarial is not None:
            named["adversarial"] = self.adversarial
        return [(name, percent(share), self._interval(name)) for name, share in named.items()]

    def table(self, width: int = 80) -> str:
        """Return the figures as text, flags below.

        Args:
            width: Most columns of text.
        """
        lines = [f"{self.name}, {self.rows} rows, {self._content['threat'] or 'no attacks'}", ""]
        lines += fitted(("", "right %", "95 % interval"), self.lines(), width=width)
        if self.corrupted:
            levels = sorted({severity for row in self.corrupted.values() for severity in row})
            headings = ("corrupted, right %", *map(str, levels), "mean")
            cells = [
                (name, *(percent(row.get(s)) for s in levels), percent(_mean(row)))
                for name, row in self.corrupted.items()
            ]
            lines += ["", *fitted(headings, cells, width=width)]
            lines.append(f"Mean corruption error: {percent(self.mean_corruption_error)} %")
        lines += ["", *self._sure(width)]
        for flag in self.flags:
            lines += textwrap.wrap(f"! {flag}", min(width, 80), subsequent_indent="  ")
        return "\n".join(plain(line, "\n") for line in lines)

    def save_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file that opens offline.

        Args:
            path: The file; its folder must exist.

        Returns:
            The path.

        Raises:
            ImportError: If Jinja or Matplotlib is missing.
        """
        return write_file(path, _page(self))

    def __str__(self) -> str:
        return self.table()

    def _interval(self, name: str) -> str:
        if name not in self.intervals:
            return "-"
        low, high = self.intervals[name]
        return f"{100 * low:.2f} to {100 * high:.2f}"

    def _sure(self, width: int) -> list[str]:
        sure = self._content["sureness"]
        text = (
            f"Calibration error: {percent(sure['ece'])} % ({percent(sure['ece_low'])} to "
            f"{percent(sure['ece_high'])} by bootstrap), {percent(sure['ece_equal_mass'])} % in "
            f"bins of equal mass; negative log-likelihood {sure['nll']:.4f}, Brier "
            f"{sure['brier']:.4f}."
        )
        after = self._content.get("calibration")
        if after is not None:
            text += (
                f" With temperature {after['temperature']:.3f}: calibration error "
                f"{percent(after['ece'])} %, negative log-likelihood {after['nll']:.4f}."
            )
        return textwrap.wrap(text, min(width, 80))


def _mean(row: dict[int, float]) -> float:
    return sum(row.values()) / len(row)


def _page(report: RobustReport) -> str:
    plots = [{"title": "Reliability", "svg": _reliability(report)}]
    if report.corrupted:
        plots.append({"title": "Accuracy by severity", "svg": _curves(report)})
    levels = sorted({severity for row in report.corrupted.values() for severity in row})
    return filled(
        __package__,
        "report.html.j2",
        report=report,
        content=report.to_dict(),
        plots=plots,
        levels=levels,
        percent=percent,
        mean=_mean,
        sure=" ".join(report._sure(80)),
    )


def _axes() -> Any:
    figure = empty_figure(5.6, 3.8)
    return figure, figure.subplots()


@literally
def _reliability(report: RobustReport) -> str:
    """Accuracy by confidence; the width of a bar is its bin, its shade how many rows it holds."""
    bins = report.to_dict()["reliability"]
    figure, axes = _axes()
    most = max(max(bins["count"]), 1)
    for low, high, count, accuracy in zip(
        bins["edges"][:-1], bins["edges"][1:], bins["count"], bins["accuracy"], strict=True
    ):
        if count:
            shade = 0.25 + 0.75 * count / most
            axes.bar(
                (low + high) / 2, accuracy, width=high - low, color="#1f6f8b", alpha=shade,
                edgecolor="white",
            )  # fmt: skip
    axes.plot([0, 1], [0, 1], "--", color="#c1553b", lw=1.2, label="as sure as right")
    axes.set_xlabel("confidence")
    axes.set_ylabel("share of right decisions")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7, loc="upper left")
    axes.grid(True, alpha=0.3)
    return svg(figure)


@literally
def _curves(report: RobustReport) -> str:
    figure, axes = _axes()
    for i, (name, row) in enumerate(report.corrupted.items()):
        axes.plot(
            list(row),
            [100 * share for share in row.values()],
            ("-", "--", ":")[i // 10 % 3],
            marker=".",
            color=f"C{i % 10}",
            label=plain(name),
            lw=1.2,
        )
    axes.axhline(100 * report.clean, color="#444444", lw=1, label="clean")
    axes.set_xticks(sorted({severity for row in report.corrupted.values() for severity in row}))
    axes.set_xlabel("severity")
    axes.set_ylabel("right decisions in %")
    figure.legend(loc="outside right upper", fontsize=6)
    axes.grid(True, alpha=0.3)
    return svg(figure)

"""The result of an export: what was made, how good it is, which file to take."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from keras_kd.export import manifest
from keras_kd.export.report.artifact import Artifact
from keras_kd.export.report.figures import latency, number, percent, size
from keras_kd.export.report.results import Results
from keras_kd.export.report.scorecard import labels_of
from keras_kd.export.writing import write_file
from keras_kd.utils.escaping import plain
from keras_kd.utils.tables import fitted

_LEAST = {"": 21, "size": 9, "gzip": 9, "acc": 7, "agree": 7, "worst": 9, "SQNR": 7, "ms": 9}
_DISPENSABLE = ("worst", "gzip", "agree", "SQNR")


class Report(Results):
    """What an export made and measured.

    Args:
        folder: Where the files lie.
        content: The manifest.
        problems: What `verify` found wrong with files, one sentence each.

    Examples:
        >>> report = keras_kd.export.verify("exported/digits")  # doctest: +SKIP
        >>> print(report.table())  # doctest: +SKIP
    """

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read the report of an earlier export, without running anything.

        Args:
            folder: What `keras_kd.export` wrote.

        Returns:
            The report.

        Raises:
            ManifestError: If the manifest is missing, damaged or edited.
        """
        return cls(folder, manifest.read(Path(folder)))

    def table(self, width: int = 80) -> str:
        """Return the figures as text, failures and flags below.

        Sizes are in units of 1,000 bytes, latency is the median of one inference with one thread.

        Args:
            width: Most columns of text. Below 80 the least important figures are left out, which
                the line under them says.
        """
        card = self.scorecard()
        # A regression has no accuracy, and without labels it has no figure in its place.
        widths = {
            "" if key == "" else (card.heading or "") if key == "acc" else key: least
            for key, least in _LEAST.items()
            if key != "acc" or card.name is not None
        }
        if card.name == "accuracy":
            widths = _LEAST
        cells = []
        for row in self.rows():
            mark = "* " if row["best"] else "x " if row.get("status") == "failed" else "  "
            noise = row.get("sqnr")
            cells.append(
                (
                    mark + plain(row["name"]),
                    size(row.get("bytes")),
                    size(row.get("gzip_bytes")),
                    *((card.text(row["score"]),) if card.name is not None else ()),
                    percent(row.get("agreement")),
                    number(row.get("worst")),
                    "-" if noise is None else format(noise, ".1f"),
                    latency(row.get("latency_ms")),
                )
            )
        lines = fitted(
            list(widths), cells, width=width, dispensable=_DISPENSABLE, least=list(widths.values())
        )
        lines.append("")
        lines.extend(textwrap.wrap(plain(self._verdict()), min(width, 80)))
        lines.extend(line for text in self.given_up() for line in _wrap(width, text))
        for artifact in self.artifacts:
            name = f"{artifact.format} {artifact.precision}"
            if not artifact.passed:
                lines.extend(_wrap(width, f"x {name}: {artifact.reason}"))
            lines.extend(
                line for flag in artifact.flags for line in _wrap(width, f"! {name}: {flag}")
            )
            if artifact.sparsity is not None:
                lines.extend(_wrap(width, f"- {name}: {artifact.without_zeros()}"))
            worst = artifact.details.get("worst_output")
            if worst is not None and artifact.passed:
                outputs = artifact.details["metrics"]["outputs"]
                lines.extend(
                    _wrap(width, f"- {name}: worst output {_quality(worst, outputs[worst])}")
                )
        lines.extend(card.table(min(width, 80)))
        exact: dict[str, list[str]] = {}
        for artifact in self.artifacts:
            facts = artifact.details.get("integer_products")
            if facts and artifact.passed:
                exact.setdefault(facts["ran"], []).append(artifact.precision)
        for ran, precisions in exact.items():
            lines.extend(
                _wrap(
                    width,
                    f"- onnx {', '.join(precisions)}: the same sums on every x86 processor, by "
                    f"computation; run on {ran}",
                )
            )
        where = self.runtimes()
        if any(where.values()):
            lines += ["", "Where they run:", where.table(min(width, 80))]
        # Names of tensors and classes come from anywhere.
        return "\n".join(plain(line, "\n") for line in lines)

    def snippets(self, artifact: Artifact | None = None) -> dict[str, str]:
        """Return code that runs a file, for pasting into an app.

        Names, shapes, types and scales are those of the file.

        Args:
            artifact: One of `artifacts`; the best one by default.

        Returns:
            Code by language: for TFLite `kotlin`, `swift`, `cpp`, `javascript` and `python`; for
            ONNX the same, with ONNX Runtime.

        Raises:
            ValueError: If the artifact has no file, or none passed.
        """
        from keras_kd.export.report.snippets import snippets

        chosen = artifact or self.best
        if chosen is None or chosen.path is None:
            raise ValueError(
                "There is no file to write code for. Pass one of `report.artifacts` with a path."
            )
        named = labels_of(self.manifest)
        output = next(iter(named), None)
        # Names of classes belong to one row of them, and to no single number.
        if output is not None and len(named[output]) < 3:
            units = self.manifest["model"]["outputs"][0]["shape"]
            output = output if len(units) == 2 and units[-1] == len(named[output]) else None
        return snippets(chosen, None if output is None else named[output], output)

    def save_card(self, path: str | Path) -> Path:
        """Write a model card in Markdown, made of what was measured.

        Args:
            path: The file; its folder must exist.

        Returns:
            The path.
        """
        from keras_kd.export.report.card import render

        return write_file(path, render(self))

    def save_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file that opens offline.

        Args:
            path: The file; its folder must exist.

        Returns:
            The path.
        """
        from keras_kd.export.report.html_page import render

        return write_file(path, render(self))

    def __str__(self) -> str:
        return self.table()

    def _verdict(self) -> str:
        settings = self.manifest["settings"]
        budget = self.scorecard().limit(settings["max_drop"])
        best = self.best
        if best is None and self.ok:
            return f"* no single file runs in all targets ({budget}); one for each:"
        if best is None:
            return f"* no file passed ({budget})."
        kind = "smallest" if settings["objective"] == "size" else "fastest"
        targets = settings.get("targets") or []
        where = f" and runs in {', '.join(targets)}" if targets else ""
        return (
            f"* {kind} file that passed{where}, {budget}: {best.file} "
            f"({self.manifest['evaluation']['samples']} evaluation samples)."
        )


def _quality(name: str, row: dict[str, Any]) -> str:
    if row.get("chosen"):
        first = row["chosen"][0]
        return f"`{name}`, {first['name']} {first['value']:.4g} (Keras {first['before']:.4g})"
    if row["drop"] is not None:
        change = 100 * row["drop"]
        return f"`{name}`, accuracy {percent(row['accuracy'])} % ({-change:+.2f} points)"
    noise = f"{row['sqnr']:.1f} dB" if row["sqnr"] is not None else "no signal"
    if row["worst"] == 0:
        noise = "no noise"
    if row["agreement"] is None:
        return f"`{name}`, {noise}"
    return f"`{name}`, agreement {percent(row['agreement'])} %, {noise}"


def _wrap(width: int, text: str) -> list[str]:
    return textwrap.wrap(plain(text), min(width, 80), subsequent_indent="    ")

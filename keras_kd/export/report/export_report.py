"""The result of an export: what was made, how good it is, which file to take."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_kd.export import manifest
from keras_kd.export.formats.device_table import RuntimeReport
from keras_kd.export.report.scorecard import Scorecard, labels_of
from keras_kd.export.verification.layer_noise import LayerReport
from keras_kd.export.writing import write_file
from keras_kd.utils.escaping import plain
from keras_kd.utils.tables import fitted


@dataclass(frozen=True)
class Artifact:
    """One exported file and what was measured on it.

    Args:
        format: `"tflite"` or `"onnx"`.
        precision: For example `"int8"`.
        status: `"passed"` or `"failed"`.
        reason: Why it failed; empty if it passed.
        path: The file; `None` if none was made.
        bytes: Size of the file.
        gzip_bytes: Size when gzipped.
        accuracy: Share of right answers on the evaluation data, 0..1; `None` without labels. Of
            several outputs their mean.
        drop: Accuracy of the Keras model minus that of the file, at the output that loses most; of
            a chosen metric the share of it that is lost, see `keras_kd.export(metrics=...)`.
        score: The first chosen metric; without one accuracy, or of plain numbers the root of the
            mean squared error. `Report.scorecard().name` says which.
        agreement: Share of the Keras model's decisions that the file repeats, 0..1, at the output
            where it is lowest.
        worst: Greatest absolute difference from the Keras model's outputs.
        sqnr: Ratio of signal to quantization noise in dB; `None` where there is no noise.
        latency_ms: Median time of one inference with one thread, in milliseconds.
        batch: `"dynamic"` or `"static"` (batch of one).
        sparsity: Share of zeros among the weights, 0..1, if they are stored without the zeros; else
            `None`. `details["dense"]` then holds size and latency of the same file with its zeros.
        flags: What deserves a second look, as sentences.
        sha256: Hash of the file.
        details: The whole entry of the manifest.
    """

    format: str
    precision: str
    status: str
    reason: str
    path: Path | None
    bytes: int | None
    gzip_bytes: int | None
    accuracy: float | None
    score: float | None
    drop: float | None
    agreement: float | None
    worst: float | None
    sqnr: float | None
    latency_ms: float | None
    batch: str | None
    sparsity: float | None
    flags: tuple[str, ...]
    sha256: str | None
    details: dict[str, Any] = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether it was made, verified and within the budget."""
        return self.status == "passed"

    @property
    def file(self) -> str | None:
        """Name of the file, without its folder."""
        return None if self.path is None else self.path.name

    def without_zeros(self) -> str:
        """Say what a file saves that stores its weights without zeros; empty if it does not."""
        if self.sparsity is None:
            return ""
        dense = self.details["dense"]
        return (
            f"{percent(self.sparsity)} % of its weights are zeros and not stored: "
            f"{size(self.bytes)}, with them {size(dense['bytes'])} (gzipped "
            f"{size(self.gzip_bytes)}, with them {size(dense['gzip_bytes'])})"
        )

    def processors(self) -> str:
        """Say on which processors an ONNX file's integers add up alike; empty without integers."""
        facts = self.details.get("integer_products")
        if not facts:
            return ""
        counts = ", ".join(f"{count} {kind}" for kind, count in facts["weights"].items())
        return (
            f"all sums of its integer products ({counts}) are exact on x86: computed from the "
            f"weights for {', '.join(facts['computed'])}; run on {facts['ran']}"
        )


_LEAST = {"": 21, "size": 9, "gzip": 9, "acc": 7, "agree": 7, "worst": 9, "SQNR": 7, "ms": 9}
_DISPENSABLE = ("worst", "gzip", "agree", "SQNR")
_OWN = ("name", "best", "parameters", "flags")
_COLUMNS = (
    *("name", "best", "format", "precision", "status", "reason", "file", "parameters", "bytes"),
    *("gzip_bytes", "accuracy", "score", "drop", "agreement", "worst", "sqnr", "latency_ms"),
    *("batch", "sparsity", "flags", "sha256"),
)


class Report:
    """What an export made and measured.

    Args:
        folder: Where the files lie.
        content: The manifest.
        problems: What `verify` found wrong with files, one sentence each.

    Examples:
        >>> report = keras_kd.export.verify("exported/digits")  # doctest: +SKIP
        >>> print(report.table())  # doctest: +SKIP
    """

    def __init__(
        self, folder: str | Path, content: dict[str, Any], problems: Sequence[str] = ()
    ) -> None:
        self.folder = Path(folder)
        self.problems = tuple(problems)
        self.manifest = content
        self.artifacts = tuple(self._artifact(row) for row in content["artifacts"])

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

    @property
    def best(self) -> Artifact | None:
        """The smallest (or fastest) file that passed; `None` if none did."""
        for artifact in self.artifacts:
            if artifact.file is not None and artifact.file == self.manifest["best"]:
                return artifact
        return None

    @property
    def ok(self) -> bool:
        """Whether there is a best file, or one for each target, and nothing was found wrong."""
        targets = self.manifest.get("targets", {})
        each = bool(targets) and all(row["best"] is not None for row in targets.values())
        return (self.best is not None or each) and not self.problems

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict for the teacher if there is one, the Keras model, and each file.

        The keys are the same in all of them: `name`, `best`, `parameters`, and the fields of
        `Artifact`, with `file` for `path`. What does not apply is `None`.
        """
        rows = [
            {
                **dict.fromkeys(_COLUMNS),
                "name": name,
                "best": False,
                **{key: v for key, v in self.manifest[name].items() if key in _COLUMNS},
                "score": self.scorecard().of(self.manifest[name]),
            }
            for name in ("teacher", "keras")
            if self.manifest[name]
        ]
        for artifact in self.artifacts:
            known = {key: getattr(artifact, key) for key in _COLUMNS if key not in _OWN}
            rows.append(
                {
                    **known,
                    "name": f"{artifact.format} {artifact.precision}",
                    "best": artifact is self.best,
                    "parameters": None,
                    "flags": list(artifact.flags),
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the folder, the best file, the rows and the settings.

        `metric` is what files are judged by, `scores` and `classes` are the rows of the scorecard.
        """
        card = self.scorecard()
        return {
            "folder": str(self.folder),
            "best": None if self.best is None else self.best.file,
            "ok": self.ok,
            "problems": list(self.problems),
            "runtimes": {file: dict(answers) for file, answers in self.runtimes().items()},
            "targets": self.manifest.get("targets", {}),
            "rows": self.rows(),
            "metric": card.name,
            "scores": card.rows(),
            "classes": card.classes(),
            "settings": self.manifest["settings"],
            "evaluation": self.manifest["evaluation"],
        }

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

    def scorecard(self) -> Scorecard:
        """Return the figures that the task asks for: AUC, macro F1, classes, errors, ranks.

        Its `rows()` gives them for the Keras model and each file, `classes()` a table with support
        for each class, `name` what files are judged by.
        """
        return Scorecard(self.manifest, self.manifest["best"])

    def given_up(self) -> list[str]:
        """Return a sentence for each target: its file, and the better ones that it refuses."""
        sentences = []
        for name, row in self.manifest.get("targets", {}).items():
            lost = "; ".join(f"{file} ({answer})" for file, answer in row["gave_up"].items())
            taken = "no file that passed runs there" if row["best"] is None else row["best"]
            sentences.append(f"> {name}: {taken}" + (f"; given up: {lost}" if lost else ""))
        return sentences

    def layers(self) -> LayerReport:
        """Return the noise of each layer of the int8 files, measured against the float32 files.

        Its `table()` and `save_svg(path)` show it, `rows()` gives the figures. It says which layers
        to keep in higher precision where int8 costs too much accuracy.
        """
        return LayerReport(self.manifest.get("layers", {}))

    def runtimes(self) -> RuntimeReport:
        """Return where each file runs: which runtimes and compilers take it, and which do not.

        It maps file names to answers by runtime, such as `"yes"`, `"only batch 1"`,
        `"slow: float"` or `"no: FULLY_CONNECTED version 12, since 2.17"`; its `table()` and
        `rows()` show them. They follow from operators, versions, types and shapes in the files.
        """
        return RuntimeReport(self.manifest)

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

    def _artifact(self, row: dict[str, Any]) -> Artifact:
        metrics = row.get("metrics") or {}
        return Artifact(
            format=row["format"],
            precision=row["precision"],
            status=row["status"],
            reason=row["reason"],
            path=self.folder / row["file"] if row.get("file") else None,
            bytes=row.get("bytes"),
            gzip_bytes=row.get("gzip_bytes"),
            accuracy=metrics.get("accuracy"),
            score=self.scorecard().of(metrics),
            drop=row.get("drop"),
            agreement=metrics.get("agreement"),
            worst=metrics.get("worst"),
            sqnr=metrics.get("sqnr"),
            latency_ms=row.get("latency_ms"),
            batch=row.get("batch"),
            sparsity=row.get("sparsity"),
            flags=tuple(row["flags"]),
            sha256=row.get("sha256"),
            details=row,
        )


def size(count: int | None) -> str:
    """Return a number of bytes as a person reads it, in units of 1,000."""
    if count is None:
        return "-"
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("KB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def percent(share: float | None) -> str:
    """Return a share in 0..1 as percent with two digits."""
    return "-" if share is None else f"{100 * share:.2f}"


def number(value: float | None) -> str:
    """Return a difference in three significant digits."""
    return "-" if value is None else f"{value:.2g}"


def latency(milliseconds: float | None) -> str:
    """Return milliseconds with the digits that mean something."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:.1f}"


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

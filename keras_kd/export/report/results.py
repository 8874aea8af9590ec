"""What an export made and measured, as the tables, the page and the card of a report read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_kd.export.report.artifact import Artifact
from keras_kd.export.report.layer_report import LayerReport
from keras_kd.export.report.runtime_report import RuntimeReport
from keras_kd.export.report.scorecard import Scorecard

_OWN = ("name", "best", "parameters", "flags")
_COLUMNS = (
    *("name", "best", "format", "precision", "status", "reason", "file", "parameters", "bytes"),
    *("gzip_bytes", "accuracy", "score", "drop", "agreement", "worst", "sqnr", "latency_ms"),
    *("batch", "sparsity", "flags", "sha256"),
)


class Results:
    """The figures of an export; `Report` adds the forms in which they are shown.

    Args:
        folder: Where the files lie.
        content: The manifest.
        problems: What `verify` found wrong with files, one sentence each.
    """

    def __init__(
        self, folder: str | Path, content: dict[str, Any], problems: Sequence[str] = ()
    ) -> None:
        self.folder = Path(folder)
        self.problems = tuple(problems)
        self.manifest = content
        self.artifacts = tuple(self._artifact(row) for row in content["artifacts"])

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

        `metric` is what files are judged by, `scores`, `classes` and `entities` are the rows of
        the scorecard.
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
            "entities": card.entities(),
            "settings": self.manifest["settings"],
            "evaluation": self.manifest["evaluation"],
        }

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

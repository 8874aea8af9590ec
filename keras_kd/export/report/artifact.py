"""One exported file in a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keras_kd.export.report.figures import percent, size


@dataclass(frozen=True)
class Artifact:
    """One exported file and what was measured on it.

    Args:
        format: Its name, such as `"tflite"`.
        precision: For example `"int8"`.
        status: `"passed"` or `"failed"`.
        reason: Why it failed; empty if it passed.
        path: The file, of several the one that is opened; `None` if none was made.
        bytes: Size of the file, or of all of them.
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
    def files(self) -> tuple[Path, ...]:
        """All files of the artifact, the one that is opened first; none if none was made."""
        if self.path is None:
            return ()
        more = self.details.get("more_files", ())
        return (self.path, *(self.path.with_name(each["file"]) for each in more))

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

"""What modules of an export hand to one another: tasks, measurements, and the rows of a manifest.

A row is filled in one direction: a `ConvertTask` becomes a `Converted`, its file is `Measured`,
both make an `ArtifactRow`, which `acceptance` judges and the manifest holds. Each of them is
frozen; who adds something makes a new one. `to_json` and `from_json` are the border to files and
workers.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


LEFT_OUT = {"left out": True}
"""Marks a field that JSON does not hold where it is `None`."""


@dataclass(frozen=True)
class Failure:
    """What became of a task that failed.

    Args:
        error: The reason, as a sentence.
        crashed: Whether the process ended with it.
        started: Whether the worker had come as far as the task.
        errno: Number of the error of the disk, if it was one.
        outside: Why the file cannot be proven by its own bytes, if that is it.
    """

    error: str
    crashed: bool = False
    started: bool = True
    errno: int | None = None
    outside: str = ""


@dataclass(frozen=True)
class ConvertTask:
    """One artifact to be made.

    Args:
        id: Its name among the tasks.
        format: Name of the format.
        precision: One of the format's, or `"mixed"`.
        path: Of the first file; further ones have its name and other suffixes.
        keep: Layers that `"mixed"` leaves in float.
        compact: Path of a second file with the same weights stored without zeros; empty for none.
    """

    id: str
    format: str
    precision: str
    path: str
    keep: tuple[str, ...] = ()
    compact: str = ""


@dataclass(frozen=True)
class Converted:
    """What a conversion made, and what is to be said of it.

    Args:
        files: Names of the files beside the task's path, the one that is opened first.
        batch: `"dynamic"` or `"static"`.
        notes: Sentences.
        facts: What the format itself says in the row of the manifest, by key.
        sparsity: Share of zeros among the weights, if a file without them was made as well.
        full: Path of the float32 file that a float16 one was made of, if that tells anything.
    """

    files: tuple[str, ...]
    batch: str
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    sparsity: float | None = None
    full: str = ""


@dataclass(frozen=True)
class MeasureTask:
    """A file to be measured.

    Args:
        id: Its name among the tasks.
        format: Name of the format.
        path: The first file of the artifact.
        others: Names of the further ones.
        outputs: Archive that its answers are written to, `y<i>` by number; empty for none.
        full: Of a float16 file the float32 one; empty where nothing is compared.
        dense: Of a file without zeros the one with them; empty for others.
    """

    id: str
    format: str
    path: str
    others: tuple[str, ...] = ()
    outputs: str = ""
    full: str = ""
    dense: str = ""


@dataclass(frozen=True)
class TimeTask:
    """A file that is measured already, but for its latency.

    Args:
        id: Its name among the tasks.
        format: Name of the format.
        path: The file.
    """

    id: str
    format: str
    path: str


@dataclass(frozen=True)
class NoiseTask:
    """A quantized file and a float one, to be compared layer by layer.

    Args:
        id: Its name among the tasks.
        format: Name of the format.
        path: The quantized file.
        reference: The float file.
    """

    id: str
    format: str
    path: str
    reference: str


Task = MeasureTask | TimeTask | NoiseTask
"""What a measuring worker does."""

TASKS: dict[str, type[Task]] = {"measure": MeasureTask, "time": TimeTask, "noise": NoiseTask}
"""Its tasks by the name that they have on the way to it."""


@dataclass(frozen=True)
class Times:
    """The latency of a file in milliseconds.

    Args:
        latency_ms: The median.
        latency_low_ms: What the file can do when nothing else runs: the figure to compare files by.
    """

    latency_ms: float | None = field(default=None, metadata=LEFT_OUT)
    latency_low_ms: float | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class LayerRow:
    """The noise of one layer in a quantized file.

    Args:
        layer: Its name.
        tensor: The tensor that was compared.
        sqnr: Decibels of signal over noise; `None` where there is no noise.
        reads: Layers with rows of their own that it works on.
        covers: Those between, which the file computes in one step with it.
    """

    layer: str
    tensor: str
    sqnr: float | None
    reads: tuple[str, ...] = ()
    covers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Noise:
    """What came of a `NoiseTask`."""

    layers: tuple[LayerRow, ...]


@dataclass(frozen=True)
class Chosen:
    """One of the user's metrics at an output of a file.

    Args:
        name: Of the metric.
        direction: `"max"`, `"min"`, or nothing where nobody says.
        before: The Keras model's value.
        value: The file's; not a number where it failed.
        lost: How much worse it became, see `chosen_metrics.lost`; `None` without a direction.
    """

    name: str
    direction: str
    before: float
    value: float
    lost: float | None


@dataclass(frozen=True)
class OutputFigures:
    """How one output of a file compares with the Keras model's, see `metrics.compare`."""

    accuracy: float | None
    agreement: float | None
    worst: float
    relative: float
    sqnr: float
    finite: bool
    kind: str = "classes"
    drop: float | None = None
    kappa: float | None = None
    variation: float | None = None
    apart: float | None = field(default=None, metadata=LEFT_OUT)
    changed: int | None = field(default=None, metadata=LEFT_OUT)
    decided: int | None = field(default=None, metadata=LEFT_OUT)
    constant: bool | None = field(default=None, metadata=LEFT_OUT)
    still: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT)
    still_count: int | None = field(default=None, metadata=LEFT_OUT)
    scores: Mapping[str, Any] | None = field(default=None, metadata=LEFT_OUT)
    chosen: tuple[Chosen, ...] | None = field(default=None, metadata=LEFT_OUT)

    @property
    def lost(self) -> float | None:
        """What was lost of the first chosen metric, or of accuracy."""
        return self.chosen[0].lost if self.chosen else self.drop


@dataclass(frozen=True)
class FileFigures:
    """How a file compares with the Keras model, see `metrics.compare`."""

    accuracy: float | None
    agreement: float | None
    worst: float
    relative: float
    sqnr: float
    finite: bool
    outputs: Mapping[str, OutputFigures]


@dataclass(frozen=True)
class KerasOutput:
    """What the Keras model itself reaches at one output.

    Args:
        accuracy: Share of right answers, if it has labels and decides.
        scores: See `scores.scores`.
        chosen: Values of the user's metrics by name.
    """

    accuracy: float | None = None
    scores: Mapping[str, Any] | None = None
    chosen: Mapping[str, float] | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class KerasFigures:
    """What a Keras model reaches, and what it costs as far as that was measured.

    Args:
        accuracy: The mean over its outputs.
        outputs: By output.
        parameters: How many there are.
        bytes: Of the weights in float32.
        latency_ms: Of one sample.
    """

    accuracy: float | None
    outputs: Mapping[str, KerasOutput]
    parameters: int | None = field(default=None, metadata=LEFT_OUT)
    bytes: int | None = field(default=None, metadata=LEFT_OUT)
    latency_ms: float | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class Contents:
    """What is inside a file.

    Args:
        operators: How many there are of each.
        float_operators: Those that compute in float.
        weight_bits: Bytes of weights by their width in bits.
        flex: Operators that need TensorFlow.
    """

    operators: Mapping[str, int] = field(default_factory=dict)
    float_operators: tuple[str, ...] = ()
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    flex: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadScale:
    """A tensor whose scale no arithmetic survives.

    Args:
        tensor: Its name.
        scale: As text, since JSON has no infinity.
        finite: Whether the scale is.
        reader: The first result computed from the tensor.
    """

    tensor: str
    scale: str
    finite: bool
    reader: str | None = None


@dataclass(frozen=True)
class Scales:
    """The scales of a quantized file.

    Args:
        inputs: Scale by the name of each input that is quantized.
        broken: Some of those that are not finite, not positive or too small.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    broken: tuple[BadScale, ...] = ()


@dataclass(frozen=True)
class Beyond:
    """What float16 cannot hold of a network, see `float16_range.beyond`."""

    tensor: str
    value: str
    constant: bool
    vanishes: bool
    reader: str | None = None


@dataclass(frozen=True)
class Against:
    """A file without zeros beside the same one with them.

    Args:
        difference: Greatest difference of their answers over the greatest answer.
        slowdown: How many times slower it is where XNNPACK is switched off.
    """

    difference: float
    slowdown: float = 1.0


@dataclass(frozen=True)
class Measured:
    """What was measured of a file, see `measurer.Measurer`."""

    metrics: FileFigures
    check: FileFigures
    bytes: int
    gzip_bytes: int
    signature: Mapping[str, Any]
    contents: Contents
    scales: Scales = field(default_factory=Scales)
    runtimes: Mapping[str, str] = field(default_factory=dict)
    since: str | None = field(default=None, metadata=LEFT_OUT)
    steps: float | None = field(default=None, metadata=LEFT_OUT)
    float16: tuple[Beyond, ...] | None = field(default=None, metadata=LEFT_OUT)
    latency_ms: float | None = field(default=None, metadata=LEFT_OUT)
    latency_low_ms: float | None = field(default=None, metadata=LEFT_OUT)
    against: Against | None = field(default=None, metadata=LEFT_OUT)
    unlike: str | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class FileRow:
    """One file of an artifact.

    Args:
        file: Its name.
        sha256: Its hash.
        bytes: Its size.
    """

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Dense:
    """Size and latency of the same file with its zeros stored."""

    bytes: int
    gzip_bytes: int
    latency_ms: float
    latency_low_ms: float
    slowdown: float


@dataclass(frozen=True)
class ArtifactRow:
    """One artifact on its way into the manifest.

    Args:
        format: Name of the format.
        precision: Of the file.
        status: `"passed"` or `"failed"`.
        stage: Where it failed: `"convert"`, `"verify"`, `"budget"` or `None`.
        reason: Why.
        flags: What deserves a second look.
        notes: What conversion and measurement said.
        files: The files, the one that is opened first; none if none was made.
        batch: `"dynamic"`, `"static"` or `None`.
        measured: What was measured, if the file ran.
        facts: What the format itself says, by key.
        drop: See `report.Artifact`.
        worst_output: Of several outputs, the one nearest to its limit.
        kept: Layers that stay float.
        without_mixed: Why no mixed file was tried.
        sparsity: Share of zeros that are not stored.
        dense: The same file with them.
    """

    format: str
    precision: str
    status: str = "passed"
    stage: str | None = None
    reason: str = ""
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[FileRow, ...] = ()
    batch: str | None = None
    measured: Measured | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    drop: float | None = None
    worst_output: str | None = None
    kept: tuple[str, ...] | None = None
    without_mixed: str | None = None
    sparsity: float | None = None
    dense: Dense | None = None

    @property
    def file(self) -> str | None:
        """Name of the file that is opened."""
        return self.files[0].file if self.files else None

    @property
    def failed(self) -> bool:
        """Whether it was made and is not good enough."""
        return self.measured is not None and self.status == "failed"

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        entry: dict[str, Any] = {
            **{key: getattr(self, key) for key in ("format", "precision", "status", "stage")},
            "reason": self.reason,
            "flags": list(self.flags),
            "notes": list(self.notes),
            "file": self.file,
            "bytes": None,
            "batch": self.batch,
            **self.facts,
        }
        if self.measured is not None:
            found = to_json(self.measured)
            for key in ("against", "unlike"):
                found.pop(key, None)
            entry.update(found, drop=self.drop)
            entry["sha256"] = self.files[0].sha256 if self.files else None
            if len(self.files) > 1:
                entry["more_files"] = [to_json(each) for each in self.files[1:]]
        for key in ("worst_output", "kept", "without_mixed", "sparsity", "dense"):
            value = getattr(self, key)
            if value is not None:
                entry[key] = to_json(value)
        return entry


def to_json(value: object) -> Any:
    """Return plain JSON values of a dataclass of this module, or of what it holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            each.name: to_json(getattr(value, each.name))
            for each in dataclasses.fields(value)
            if getattr(value, each.name) is not None or not each.metadata.get("left out")
        }
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], content: Mapping[str, Any]) -> T:
    """Return a dataclass of this module of its JSON values.

    Args:
        kind: The dataclass.
        content: What `to_json` made; keys that are none of its fields are left out.

    Raises:
        TypeError: If a field is missing.
    """
    hints = _hints(kind)  # type: ignore[arg-type]
    return kind(**{key: _read(hints[key], value) for key, value in content.items() if key in hints})


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(hint: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if value is None or hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _read(next(part for part in parts if part is not type(None)), value)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type[Any], hint), value)
    if origin is tuple:
        return tuple(_read(parts[0], item) for item in value)
    if origin is Mapping:
        return {key: _read(parts[1], item) for key, item in value.items()}
    return value

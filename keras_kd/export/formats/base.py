"""What the export asks of a format of files.

A format is a class that derives from `Format`, and a line in `registry`, or a call of
`registry.register` for one of somebody else's. `Format` has all that conversion, measuring, reports
and `export.load` want to know; what it says of itself here is what holds for a plain format of
floats in a single file, so that a new one writes the first eight members and changes what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from keras_kd.export.rows import Beyond, Contents, Converted, ConvertTask, Scales
from keras_kd.export.signature import Arrays

if TYPE_CHECKING:
    from keras_kd.export.source.source_model import Source

OUTSIDE = "keeps weights in other files, which no hash covers"
"""What `Format.outside` says of a file whose weights lie elsewhere."""


class Runtime(Protocol):
    """A file in its runtime, fed and read in real numbers."""

    free_batch: bool
    """Whether it takes any number of samples at once."""

    def run(self, feed: Arrays) -> Arrays:
        """Run one batch: arrays by input name to arrays by output name."""

    def prepare(self, feed: Arrays) -> Callable[[], object]:
        """Return a call that only runs the network, on a batch of one."""

    def signature(self) -> dict[str, list[dict[str, Any]]]:
        """Return `inputs` and `outputs` as the file has them.

        Rows of `name`, `shape` (strings where a size is free), `dtype`, and of integers that stand
        for real numbers `scale` and `zero_point`.
        """


@dataclass(frozen=True)
class Settings:
    """What all conversions of one model have in common.

    Args:
        calibration: Samples by input name, if there are any.
        about: What files say of themselves: `name` of the model, its `signature`, the `labels` of
            the first output or `None`, `normalization` (mean and standard deviation by image
            input), `ranges` (least and greatest value by input) and `versions`.
        scratch: Folder for intermediate files.
        batch: 1 for files of one sample, `None` for any number where that works.
        opset: Operator set of ONNX files.
        allow_flex: Whether TensorFlow's operators may stay in TFLite files.
    """

    calibration: Arrays | None
    about: Mapping[str, Any]
    scratch: Path
    batch: int | None = None
    opset: int = 17
    allow_flex: bool = False


@dataclass(frozen=True)
class Borders:
    """What the tensors of a file say beyond its signature.

    Args:
        inputs: Names in the order of the Keras model, where the file knows it.
        outputs: The same of the outputs.
        scales: `scale`, `zero_point` and `dtype` by name, of tensors that are quantized inside.
        whole: Samples that the file must be given at once; 0 for any number.
    """

    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: int = 0


class Format(Protocol):
    """A format of exported files."""

    name: ClassVar[str]
    """What `formats=` calls it; the first part of its rows."""

    suffixes: ClassVar[tuple[str, ...]]
    """Of its files, the one that is opened first. No two formats share one."""

    precisions: ClassVar[tuple[str, ...]]
    """Those that it is made in; `"float32"` is what the others are compared with."""

    packages: ClassVar[tuple[str, ...]]
    """Modules that converting and running need, to be imported by name."""

    runtime_packages: ClassVar[tuple[str, ...]] = ()
    """Those that running needs: an app links them, so that they are no part of a start."""

    converter_packages: ClassVar[tuple[str, ...]] = ()
    """Those that converting needs: a waiting process imports them before its first job."""

    color: ClassVar[str] = "#444444"
    """In plots, as Matplotlib takes it."""

    runtime: ClassVar[str] = ""
    """What people call the runtime of which `since` is a version."""

    template: ClassVar[str] = ""
    """Name of the template of code snippets in `report/templates`; empty for none."""

    compacts: ClassVar[bool] = False
    """Whether `convert` can write a second file without the zeros among the weights."""

    mixes: ClassVar[bool] = False
    """Whether `convert` makes `"mixed"` files, some layers of which stay float."""

    computes_float16: ClassVar[bool] = False
    """Whether its runtime computes float16 files in float16."""

    def warm_up(self) -> None:
        """Do what the first conversion would do once, in the process that waits for jobs."""
        return

    def convert(self, source: Source, settings: Settings, task: ConvertTask) -> Converted:
        """Write the files of one artifact.

        Args:
            source: The model.
            settings: What holds for all artifacts of the model.
            task: Which one; `task.path` is that of the first file.

        Returns:
            The names of the files, and what is to be said of them.

        Raises:
            Exception: With the reason, if it cannot be made.
        """

    def open(self, path: Path, threads: int = 1) -> Runtime:
        """Load a file in its runtime.

        Args:
            path: The first file of an artifact; the others lie beside it.
            threads: Threads that the runtime may use.
        """

    def contents(self, path: Path) -> Contents:
        """Say what is inside a file."""

    def layer_outputs(self, path: Path, feed: Arrays) -> tuple[Arrays, dict[str, list[str]]]:
        """Run a file with its inner tensors kept.

        Args:
            path: The file.
            feed: Samples by input name.

        Returns:
            The tensors that operators make, `(samples, ...)` by name, in running order; and for
            each the names of those that its operator reads.
        """
        return {}, {}

    def check(self, path: Path) -> None:
        """Refuse a file that is not valid, even if its runtime takes it.

        Raises:
            ValueError: Saying why.
        """
        return

    def outside(self, path: Path) -> str:
        """Say why a file cannot be proven by its own bytes; empty if it can.

        Returns:
            The rest of a sentence, as in "`model.onnx` keeps weights in other files".
        """
        return ""

    def scales(self, path: Path) -> Scales:
        """Return the scales of a quantized file."""
        return Scales()

    def borders(self, path: Path) -> Borders:
        """Return what a file knows of its inputs and outputs beyond its signature."""
        return Borders()

    def says(self, path: Path) -> tuple[list[str] | None, dict[str, dict[str, list[float]]]] | None:
        """Return the class names and the normalization that a file carries; `None` if it cannot.

        Raises:
            ValueError: If what it carries cannot be read.
        """
        return None

    def most_samples(self, contents: Contents) -> int:
        """Return how many samples at once leave a file's answers those of a single one."""
        return 64

    def output_steps(self, path: Path) -> dict[str, float]:
        """Return the scale of each output that is an integer."""
        return {}

    def kernels(self, path: Path) -> list[Runtime]:
        """Return a file in each of the kernels that its runtime may compute it with."""
        return [self.open(path)]

    def beyond_float16(self, half: Path, full: Path, inputs: Arrays) -> tuple[Beyond, ...]:
        """Find what a float16 file lost since float16 cannot hold it.

        Args:
            half: The float16 file.
            full: The float32 file that it was made of.
            inputs: Samples by input name.
        """
        return ()

    def runtimes(
        self, path: Path, targets: Sequence[str], steps: float | None, images: Sequence[str]
    ) -> dict[str, str]:
        """Say for each runtime that reads the format whether it takes a file.

        Args:
            path: The file.
            targets: Names to answer for besides those of the table.
            steps: How far its integer answers lie apart from kernel to kernel.
            images: Names of the inputs whose normalization is known.
        """
        return {}

    def since(self, path: Path) -> str | None:
        """Return the first version of its runtime that knows all of a file, as `2.17`."""
        return None


def run_all(runtime: Runtime, inputs: Arrays, batch: int = 64) -> Arrays:
    """Run all samples, in batches where the file takes them, and join the outputs."""
    count = len(next(iter(inputs.values())))
    step = batch if runtime.free_batch else 1
    parts = [
        runtime.run({name: x[i : i + step] for name, x in inputs.items()})
        for i in range(0, count, step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

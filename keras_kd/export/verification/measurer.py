"""One file in its runtime: answers, size, latency. Runs in the worker process."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats import metadata_reader, registry
from keras_kd.export.formats.base import Format, Runtime, run_all
from keras_kd.export.rows import (
    Against,
    Failure,
    FileFigures,
    LayerRow,
    Measured,
    MeasureTask,
    Noise,
    NoiseTask,
    Task,
    Times,
    TimeTask,
)
from keras_kd.export.signature import Arrays, Signature
from keras_kd.export.verification.kernels import apart
from keras_kd.export.verification.layer_noise import layer_noise
from keras_kd.export.verification.metrics import compare
from keras_kd.export.verification.timing import quantile, time_calls
from keras_kd.utils import archives

# Samples on which two kernels are compared, each with each.
_FEW = 256


class Measurer:
    """Measures files against the same evaluation data.

    Args:
        job: `signature`, `evaluation` (path of an `.npz` with `x<i>` inputs, `y<i>` outputs of
            Keras, `t<i>` labels and `w<i>` weights), `kinds`, `stored` (how many of the samples
            travel with the files), `threads`, `time` (seconds for which latency is measured),
            `targets` and `images` (see `Format.runtimes`), perhaps `layers` (names of the model's),
            `whole`: whether files that keep weights in other ones are refused, see
            `Format.outside`, and `about`, what files are to say of themselves, see
            `metadata_reader.difference`.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        signature = Signature.from_dict(job["signature"])
        arrays = archives.arrays(job["evaluation"])
        self._inputs = {info.name: arrays[f"x{i}"] for i, info in enumerate(signature.inputs)}
        self._references = {info.name: arrays[f"y{i}"] for i, info in enumerate(signature.outputs)}
        self._labels, self._weights = (
            {
                info.name: arrays[f"{key}{i}"]
                for i, info in enumerate(signature.outputs)
                if f"{key}{i}" in arrays
            }
            for key in ("t", "w")
        )
        self._job = job

    def do(self, task: Task) -> Measured | Failure | Times | Noise:
        """Do a task of any kind."""
        if isinstance(task, NoiseTask):
            return Noise(tuple(self.noise(task)))
        if isinstance(task, TimeTask):
            fmt = registry.get(task.format)
            return self._latency(fmt.open(Path(task.path), self._job["threads"]))
        return self.measure(task)

    def noise(self, task: NoiseTask) -> list[LayerRow]:
        """Compare a quantized file with a float one, layer by layer."""
        layers = set(self._job["layers"]) | set(self._references)
        fmt = registry.get(task.format)
        return layer_noise(fmt, Path(task.reference), Path(task.path), self._inputs, layers)

    def measure(self, task: MeasureTask) -> Measured | Failure:
        """Measure one file.

        Args:
            task: Which one.

        Returns:
            What was measured; the reason, if the file cannot be proven by its own bytes.

        Raises:
            ValueError: If it is not valid, or its outputs are others than the model's.
        """
        fmt, path = registry.get(task.format), Path(task.path)
        if self._job.get("whole"):
            outside = fmt.outside(path)
            if outside:
                # Not even opened: the runtime would read what no hash covers.
                return Failure(f"it {outside}", outside=outside)
        fmt.check(path)
        runtime = fmt.open(path, self._job["threads"])
        contents = fmt.contents(path)
        outputs = run_all(runtime, self._inputs, fmt.most_samples(contents))
        # What the file answers is compared, whatever anybody says that it answers.
        if set(outputs) != set(self._references):
            raise ValueError(
                f"the file has outputs {sorted(outputs)}, and answers are known for "
                f"{sorted(self._references)}"
            )
        metrics = self._compare(outputs, slice(None), scores=True)
        check = self._compare(outputs, slice(self._job["stored"]))
        if task.outputs:
            arrays = {f"y{i}": outputs[name] for i, name in enumerate(self._references)}
            np.savez(task.outputs, **arrays)
        steps = apart(fmt, path, {name: x[:_FEW] for name, x in self._inputs.items()})
        files = [path, *(path.with_name(name) for name in task.others)]
        blobs = [each.read_bytes() for each in files]
        times = self._latency(runtime) if self._job["time"] else Times()
        return Measured(
            metrics,
            check,
            sum(map(len, blobs)),
            sum(len(gzip.compress(blob, mtime=0)) for blob in blobs),
            runtime.signature(),
            contents,
            fmt.scales(path),
            fmt.runtimes(path, self._job["targets"], steps, self._job["images"]),
            fmt.since(path),
            steps,
            fmt.beyond_float16(path, Path(task.full), self._inputs) if task.full else None,
            against=self._against(fmt, path, Path(task.dense)) if task.dense else None,
            unlike=self._unlike(fmt, path) if "about" in self._job else None,
            latency_ms=times.latency_ms,
            latency_low_ms=times.latency_low_ms,
        )

    def _unlike(self, fmt: Format, path: Path) -> str:
        try:
            said = fmt.says(path)
        except ValueError as error:
            return f"what it says of its labels and pixels cannot be read ({error})"
        return "" if said is None else metadata_reader.difference(said, self._job["about"])

    def _latency(self, runtime: Runtime) -> Times:
        one = {name: x[:1] for name, x in self._inputs.items()}
        times = time_calls(runtime.prepare(one), seconds=self._job["time"])
        return Times(*(quantile(times, share) * 1e3 for share in (0.5, 0.1)))

    def _against(self, fmt: Format, sparse: Path, dense: Path) -> Against:
        feed = {name: x[:64] for name, x in self._inputs.items()}
        one = {name: x[:1] for name, x in self._inputs.items()}
        pairs = list(zip(fmt.kernels(dense), fmt.kernels(sparse), strict=True))
        differences = []
        for files in pairs:
            want, got = (run_all(file, feed) for file in files)
            for name, array in want.items():
                peak = np.max(np.abs(array), initial=0.0)
                most = np.max(np.abs(got[name].astype(np.float64) - array), initial=0.0)
                differences.append(float(most / peak if peak > 0 else most))
        low = [quantile(time_calls(f.prepare(one), seconds=0.1), 0.1) for f in pairs[-1]]
        # The largest of numbers one of which is none would depend on their order.
        return Against(float(np.max(differences)), float(low[1] / low[0]))

    def _compare(self, outputs: Arrays, rows: slice, *, scores: bool = False) -> FileFigures:
        return compare(
            {name: array[rows] for name, array in self._references.items()},
            {name: array[rows] for name, array in outputs.items()},
            {name: array[rows] for name, array in self._labels.items()},
            self._job["kinds"],
            {name: array[rows] for name, array in self._weights.items()},
            scores=scores,
        )

"""One file in its runtime: answers, size, latency. Runs in the worker process."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd import archives

from . import embedded, external, half, runtimes, scales
from .benchmark import time_calls
from .contents import check_onnx, inspect
from .kernels import apart
from .layers import layer_noise
from .metrics import compare
from .runtime import ONNXRuntime, TFLiteRuntime, open_file, run_all
from .signature import Signature

# Samples on which two kernels are compared, each with each.
_FEW = 256


class Measurer:
    """Measures files against the same evaluation data.

    Args:
        job: `signature`, `evaluation` (path of an `.npz` with `x<i>` inputs, `y<i>` outputs of
            Keras, `t<i>` labels and `w<i>` weights), `kinds`, `stored` (how many of the samples
            travel with the files), `threads`, `time` (seconds for which latency is measured),
            `targets` and `images` (see `runtimes.answers`), and perhaps `whole`: whether files
            that keep weights in other ones are refused, see `external`, and `about`, what files are
            to say of themselves, see `embedded.difference`.
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

    def measure(self, task: dict[str, Any]) -> dict[str, Any]:
        """Measure one file.

        Args:
            task: `path`; of a file that stores the weights of another one without zeros, the
                path of that one as `dense`; perhaps `outputs`, an archive to write the answers to,
                `y<i>` by number; and of a float16 file `full`, the path of the float32 one. With
                `timing`, only the latency is measured.

        Returns:
            JSON values, or `error` and `outside` of a refused file: `metrics`, `check` (the same on
            the samples that travel along), `bytes`,
            `gzip_bytes`, `latency_ms`, `signature`, `contents`, `runtimes` (where it runs), `since`
            (the first version of its runtime that knows all of it), `steps`, see `kernels.apart`,
            of a file with integer outputs, `scales` (see `scales.inspect`),
            and of a float16 file `float16`, see `half.beyond`. For a task with `float32`, the path
            of the float file, only `layers`, see `layer_noise`. For a task with `dense` also
            `against`: the greatest `difference` of the two files' answers over
            the greatest answer, with and without XNNPACK, and `slowdown`, how many times slower the
            file is without. With `about` in the job also `unlike`, in what the file differs.
        """
        if "float32" in task:
            layers = set(self._job["layers"]) | set(self._references)
            rows = layer_noise(Path(task["float32"]), Path(task["path"]), self._inputs, layers)
            return {"layers": rows}
        path = Path(task["path"])
        if "timing" in task:
            return self._latency(open_file(path, self._job["threads"]))
        if self._job.get("whole"):
            outside = external.problem(path)
            if outside:
                # Not even opened: the runtime would read what no hash covers.
                return {"error": f"it {outside}", "outside": outside}
        blob = path.read_bytes()
        if path.suffix == ".onnx":
            check_onnx(blob)
        runtime = open_file(path, self._job["threads"])
        contents = inspect(path)
        # One range for a whole batch: such a file answers otherwise than on a device that gives it
        # one sample at a time.
        batch = 1 if "DynamicQuantizeLinear" in contents["operators"] else 64
        outputs = run_all(runtime, self._inputs, batch)
        # What the file answers is compared, whatever anybody says that it answers.
        if set(outputs) != set(self._references):
            raise ValueError(
                f"the file has outputs {sorted(outputs)}, and answers are known for "
                f"{sorted(self._references)}"
            )
        result: dict[str, Any] = {
            "metrics": self._compare(outputs, slice(None), scores=True),
            "check": self._compare(outputs, slice(self._job["stored"])),
            "bytes": len(blob),
            "gzip_bytes": len(gzip.compress(blob, mtime=0)),
            "signature": runtime.signature(),
            "contents": contents,
            "scales": scales.inspect(path),
        }
        if "outputs" in task:
            np.savez(
                task["outputs"],
                **{f"y{i}": outputs[name] for i, name in enumerate(self._references)},
            )
        if "full" in task:
            result["float16"] = half.beyond(path, Path(task["full"]), self._inputs)
        steps = apart(path, {name: x[:_FEW] for name, x in self._inputs.items()})
        if steps is not None:
            result["steps"] = steps
        result["runtimes"] = runtimes.answers(
            path, self._job["targets"], steps=steps, images=self._job["images"]
        )
        result["since"] = runtimes.minimum(path)
        if self._job["time"]:
            result.update(self._latency(runtime))
        if "about" in self._job:
            result["unlike"] = embedded.difference(path, self._job["about"])
        if "dense" in task:
            result["against"] = self._against(path, Path(task["dense"]))
        return result

    def _latency(self, runtime: TFLiteRuntime | ONNXRuntime) -> dict[str, float]:
        one = {name: x[:1] for name, x in self._inputs.items()}
        times = time_calls(runtime.prepare(one), seconds=self._job["time"])
        return {
            "latency_ms": float(np.median(times)) * 1e3,
            # What the file can do when nothing else runs: the figure to compare files by.
            "latency_low_ms": float(np.quantile(times, 0.1)) * 1e3,
        }

    def _against(self, sparse: Path, dense: Path) -> dict[str, float]:
        feed = {name: x[:64] for name, x in self._inputs.items()}
        one = {name: x[:1] for name, x in self._inputs.items()}
        differences, times = [], []
        for delegates in (True, False):
            files = [TFLiteRuntime(path, 1, delegates) for path in (dense, sparse)]
            want, got = (run_all(file, feed) for file in files)
            for name, array in want.items():
                peak = np.max(np.abs(array), initial=0.0)
                apart = np.max(np.abs(got[name].astype(np.float64) - array), initial=0.0)
                differences.append(float(apart / peak if peak > 0 else apart))
            if not delegates:
                times = [
                    np.quantile(time_calls(file.prepare(one), seconds=0.1), 0.1) for file in files
                ]
        # The largest of numbers one of which is none would depend on their order.
        return {
            "difference": float(np.max(differences)),
            "slowdown": float(times[1] / times[0]),
        }

    def _compare(
        self, outputs: dict[str, np.ndarray], rows: slice, *, scores: bool = False
    ) -> dict[str, Any]:
        return compare(
            {name: array[rows] for name, array in self._references.items()},
            {name: array[rows] for name, array in outputs.items()},
            {name: array[rows] for name, array in self._labels.items()},
            self._job["kinds"],
            {name: array[rows] for name, array in self._weights.items()},
            scores=scores,
        )

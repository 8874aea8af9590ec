"""One model to many files, in the worker process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats import metadata
from keras_kd.export.formats.tflite import sparsity
from keras_kd.export.signature import Arrays
from keras_kd.export.source.source_model import Source
from keras_kd.export.writing import write_file


class Converter:
    """Converts one model to the artifacts asked for.

    Args:
        job: Job of the worker: see `Source`, and `calibration` (path or `None`), `allow_flex`,
            `opset`, `scratch`, `attempt`, and `about`, see `embed.tflite`.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        scratch = Path(job["scratch"]) / f"attempt-{job['attempt']}"
        scratch.mkdir(parents=True, exist_ok=True)
        self._source = Source(job, scratch)
        self._calibration: Arrays | None = None
        if job["calibration"]:
            with np.load(job["calibration"]) as arrays:
                names = [info.name for info in self._source.signature.inputs]
                self._calibration = {name: arrays[f"x{i}"] for i, name in enumerate(names)}
        self._litert: Any = None
        self._onnx: Any = None

    def convert(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write one artifact.

        Args:
            task: `format`, `precision`, `path`, for `mixed` the layers to `keep` in float, and
                perhaps `sparse`, the path of a second file.

        Returns:
            What the report says about the conversion: `batch` and `notes`; and `sparse`, see
            `sparse.encode`, if there is a second file that stores the same weights without zeros;
            of a float16 file `full`, the path of the float32 one it was made of.
        """
        if task["format"] == "tflite":
            if self._litert is None:
                from keras_kd.export.formats.tflite.converter import LiteRT

                self._litert = LiteRT(
                    self._source,
                    self._calibration,
                    self._job["allow_flex"],
                    self._job["about"]["normalization"],
                    self._job["batch"],
                )
            blob, result = self._litert.convert(task["precision"], task.get("keep", ()))
            if "sparse" in task:
                self._without_zeros(blob, task, result)
            blob = metadata.tflite(blob, self._job["about"], task["precision"])
        else:
            if self._onnx is None:
                from keras_kd.export.formats.onnx.converter import ONNX

                self._onnx = ONNX(
                    self._source,
                    self._calibration,
                    self._job["opset"],
                    Path(self._job["scratch"]) / f"attempt-{self._job['attempt']}",
                )
            blob, result = self._onnx.convert(task["precision"], task.get("keep", ()))
            blob = metadata.onnx(blob, self._job["about"], task["precision"])
        write_file(task["path"], blob)
        if task["precision"] == "float16":
            result["full"] = str(self._full(task["format"]))
        return result

    def _full(self, fmt: str) -> Path:
        """The file that a float16 one was made of, which tells what float16 cannot hold."""
        path = Path(self._job["scratch"]) / f"full.{fmt}"
        made = self._litert if fmt == "tflite" else self._onnx
        # Kept by the converter, and written here whether or not that precision is asked for.
        write_file(path, made.convert("float32")[0])
        return path

    def _without_zeros(self, blob: bytes, task: dict[str, Any], result: dict[str, Any]) -> None:
        try:
            smaller, facts = sparsity.encode(blob)
        except Exception as error:
            # The file itself is made and may be all that is wanted.
            result["notes"].append(f"its zeros could not be left out ({type(error).__name__})")
            return
        if smaller is not None:
            smaller = metadata.tflite(smaller, self._job["about"], task["precision"])
            write_file(task["sparse"], smaller)
            result["sparse"] = facts
        if facts["refused"] > sparsity.LEAST_SAVING * len(blob):
            result["notes"].append(
                f"{facts['refused']} bytes of zeros stay in weights that LiteRT does not run "
                "sparse, such as int8 ones that multiply floats"
            )

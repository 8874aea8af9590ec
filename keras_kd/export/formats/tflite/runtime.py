"""A TFLite file in LiteRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats.tflite import xnnpack
from keras_kd.export.signature import Arrays


class TFLiteRuntime:
    """A TFLite file in LiteRT, fed and read in real numbers.

    Args:
        model: The file, or its bytes.
        threads: Threads of the interpreter.
        delegates: Whether XNNPACK may run what it can, as it does by default.
    """

    def __init__(self, model: Path | bytes, threads: int = 1, delegates: bool = True) -> None:
        self._model = model
        self._threads = threads
        self._delegates = delegates
        self._runner = self._explained(lambda: self._interpreter().get_signature_runner())
        self._inputs = self._runner.get_input_details()
        self._outputs = self._runner.get_output_details()
        # Rows are run one by one, a few microseconds each: what holds for all is found once.
        self._whole = {name: _encoding(row) for name, row in self._inputs.items()}
        self._real = {name: _decoding(row) for name, row in self._outputs.items()}
        self.free_batch = all(
            len(row["shape_signature"]) and row["shape_signature"][0] == -1
            for row in self._inputs.values()
        )

    def run(self, feed: Arrays) -> Arrays:
        """Run one batch; quantizes float inputs and dequantizes outputs with the file's scales."""
        given = {name: self._whole[name](x) for name, x in feed.items()}
        result = self._explained(lambda: self._runner(**given))
        return {name: self._real[name](x) for name, x in result.items()}

    def prepare(self, feed: Arrays) -> Callable[[], Any]:
        """Return a call that only runs the network on an already set batch of one."""
        # The signature runner holds the interpreter's memory, which forbids its other methods, and
        # sets the shapes anew in every call: what is timed gets an interpreter of its own.
        interpreter = self._interpreter()
        for name, row in self._inputs.items():
            if tuple(row["shape"]) != feed[name].shape:
                interpreter.resize_tensor_input(row["index"], feed[name].shape)
        interpreter.allocate_tensors()
        for name, x in feed.items():
            interpreter.set_tensor(self._inputs[name]["index"], self._whole[name](x))
        return interpreter.invoke

    def signature(self) -> dict[str, list[dict[str, Any]]]:
        """Return names, shapes, dtypes and scales of inputs and outputs, as the file has them."""
        return {
            "inputs": [_row(name, row) for name, row in self._inputs.items()],
            "outputs": [_row(name, row) for name, row in self._outputs.items()],
        }

    def _explained(self, work: Callable[[], Any]) -> Any:
        """Do something with the file; what XNNPACK refuses is told by its operators."""
        try:
            return work()
        except (RuntimeError, ValueError) as error:
            reason = xnnpack.refused(self._model, error)
            if reason is None:
                raise
            raise type(error)(reason) from error

    def _interpreter(self) -> Any:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        options: dict[str, Any] = {"num_threads": self._threads}
        if not self._delegates:
            kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            options["experimental_op_resolver_type"] = kernels
        if isinstance(self._model, bytes):
            return Interpreter(model_content=self._model, **options)
        return Interpreter(model_path=str(self._model), **options)


def _encoding(row: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """What makes real numbers those that an input holds."""
    (scale, zero), dtype = row["quantization"], row["dtype"]
    if not scale or not np.issubdtype(dtype, np.integer):
        return lambda x: x.astype(dtype, copy=False)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def encoded(x: np.ndarray) -> np.ndarray:
        steps = np.rint(x / scale) + zero
        return np.minimum(np.maximum(steps, low), high).astype(dtype)

    return encoded


def _decoding(row: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """What makes real numbers of those that an output holds."""
    (scale, zero), dtype = row["quantization"], row["dtype"]
    if not scale or not np.issubdtype(dtype, np.integer):
        return lambda x: x
    step = np.float32(scale)
    return lambda x: (x.astype(np.float32) - zero) * step


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    # -1 is LiteRT's mark for a free dimension; the first one is the batch.
    shape = [
        int(size) if size >= 0 else ("batch" if axis == 0 else f"{name}_{axis}")
        for axis, size in enumerate(row["shape_signature"])
    ]
    result: dict[str, Any] = {
        "name": name,
        "shape": shape,
        "dtype": np.dtype(row["dtype"]).name,
    }
    scale, zero = row["quantization"]
    if scale:
        result["scale"], result["zero_point"] = float(scale), int(zero)
    return result

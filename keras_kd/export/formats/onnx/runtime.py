"""An ONNX file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_kd.export.signature import Arrays
from keras_kd.utils.onnx_types import DTYPES

if TYPE_CHECKING:
    import onnxruntime


class ONNXRuntime:
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: The file.
        threads: Threads within an operator; operators run one after the other.
        fused: Whether operators may be joined and replaced, as they are by default.
    """

    def __init__(self, path: Path, threads: int = 1, fused: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if not fused:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = self._session.get_inputs()
        self._outputs = self._session.get_outputs()
        self._names = [row.name for row in self._outputs]
        self.free_batch = all(
            row.shape and not isinstance(row.shape[0], int) for row in self._inputs
        )

    def run(self, feed: Arrays) -> Arrays:
        """Run one batch."""
        return dict(zip(self._names, self._session.run(self._names, feed), strict=True))

    def prepare(self, feed: Arrays) -> Callable[[], Any]:
        """Return a call that runs the network on a batch of one."""
        return lambda: self._session.run(self._names, feed)

    def signature(self) -> dict[str, list[dict[str, Any]]]:
        """Return names, shapes and dtypes of the inputs and outputs, as the file has them."""

        def rows(values: Sequence[onnxruntime.NodeArg]) -> list[dict[str, Any]]:
            return [
                {"name": v.name, "shape": list(v.shape), "dtype": DTYPES[v.type]} for v in values
            ]

        return {"inputs": rows(self._inputs), "outputs": rows(self._outputs)}

"""Exported files in their runtimes, by the suffix of the file."""

from __future__ import annotations

from pathlib import Path

from keras_kd.export.formats import registry
from keras_kd.export.formats.base import Runtime, run_all

__all__ = ["open_file", "run_all"]


def open_file(path: Path, threads: int = 1) -> Runtime:
    """Load a file in its own runtime.

    Args:
        path: The first file of an artifact, such as a `.tflite` or `.onnx` file.
        threads: Threads to run it with.

    Returns:
        The runtime, ready to run.

    Raises:
        ValueError: If no format has this suffix.
    """
    return registry.of_file(path).open(path, threads)

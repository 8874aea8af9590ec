"""An exported file as a Python function: real numbers or the file's own integers, in and out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.formats import registry
from keras_kd.export.formats.base import Borders, Runtime
from keras_kd.export.signature import Arrays
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Tensors
from keras_kd.utils.values import misfit

_BATCH = 64
"""Samples that a file with a free batch is given at once: memory stays bounded."""


def load(path: str | os.PathLike[str], *, threads: int = 1, integers: bool = False) -> LoadedModel:
    """Load an exported file, ready to be called.

    Args:
        path: A `.tflite` or `.onnx` file, or a folder that `keras_kd.export` wrote, whose best file
            is taken.
        threads: Threads of the runtime, LiteRT or ONNX Runtime.
        integers: Whether outputs that the file computes as integers come back as those integers,
            not as real numbers.

    Returns:
        The file as a function, see `LoadedModel`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the runtime is not installed.
        ManifestError: If the folder holds no export, or its best file is not the exported one.
        TypeError: If `threads` is no integer.
        ValueError: If the file is none of the two formats, is damaged, needs operators that the
            runtime does not have, keeps weights in other files, or no file of the folder passed its
            check.

    Examples:
        >>> classify = keras_kd.export.load("exported/digits/model_int8.tflite")  # doctest: +SKIP
        >>> classify(images).argmax(axis=-1)  # doctest: +SKIP
    """
    from keras_kd.export.checks import number

    number("threads", threads, whole=True)
    if threads < 1:
        raise ValueError(f"`threads` must be positive. Received: threads={threads!r}.")
    given = find(path)
    fmt = registry.of_file(given)
    try:
        outside = fmt.outside(given)
        runtime = fmt.open(given, int(threads))
        borders = fmt.borders(given)
    except ImportError as error:
        raise ImportError(
            f"Running `{given.name}` needs {error.name}, which is not installed. Install it with "
            '`pip install "keras_kd[export]"`.'
        ) from error
    except Exception as error:
        # Each runtime has error types of its own for a file that it cannot read.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"`{given}` cannot be loaded: {reason}. It is damaged, or needs operators that this "
            "runtime does not have; export it again."
        ) from error
    if outside:
        raise ValueError(f"`{given}` {outside}. Save it with its weights inside.")
    return LoadedModel(given, runtime, integers, borders)


def find(path: str | os.PathLike[str]) -> Path:
    """Find the file that is to be loaded, without loading it.

    Args:
        path: As for `load`.

    Returns:
        The file: of a folder its best one, which is the one that was exported.

    Raises:
        FileNotFoundError: If there is no such file.
        ManifestError: If the folder holds no export, or its best file is not the exported one.
        ValueError: If the file is of no known format, or no file of the folder passed its check.
    """
    given = Path(path)
    if given.is_dir():
        given = _best(given)
    if not given.is_file():
        raise FileNotFoundError(
            f"The exported file `{given}` does not exist. Pass a `.tflite` or `.onnx` file, or the "
            "folder that `keras_kd.export` wrote."
        )
    try:
        registry.of_file(given)
    except ValueError as error:
        raise ValueError(f"{error} A `.keras` file loads with `keras.saving.load_model`.") from None
    return given


class LoadedModel:
    """An exported file that is called like the Keras model it was made from.

    Inputs are an array of a model with one input, a list or tuple in the Keras model's order, or a
    dict by input name; each array is `(samples, ...)`, of any number of samples. An output is an
    array `(samples, ...)`; several are a dict by output name.

    Floating-point arrays are real numbers. Where the file takes integers of a scale, as int8 files
    do, they are rounded and clipped to what the file can hold, `clip(round(x / scale) +
    zero_point)`, as a device does it. An array of exactly the file's integer dtype is taken as
    those integers, `real = (integer - zero_point) * scale`; integers of any other dtype are real
    numbers. Outputs are real numbers, or integers of the file with `integers=True`. `inputs` and
    `outputs` tell the scales. ONNX files quantize inside, behind float borders; the integers are
    those of their first `QuantizeLinear` and last `DequantizeLinear`.

    Files are run in batches where they take them. ONNX files that quantize activations while
    running take one range for a whole batch, so they are run sample by sample, as a device does it.

    Args:
        path: The file.
        runtime: The file in its runtime.
        integers: Whether outputs come back as the file's integers.
        borders: What the file knows of its inputs and outputs beyond the signature.

    Attributes:
        path: The file.
        inputs: `name`, `shape` (strings where the size is free), `dtype` of each input in the order
            of the Keras model, and `scale` and `zero_point` where it is quantized. The dtype is
            that of the integers where there are any.
        outputs: The same of each output.
    """

    def __init__(
        self,
        path: Path,
        runtime: Runtime,
        integers: bool = False,
        borders: Borders | None = None,
    ) -> None:
        self.path = path
        self._runtime = runtime
        self._integers = integers
        # An interpreter has one memory for its tensors.
        self._lock = threading.Lock()
        signature = runtime.signature()
        known = borders or Borders()
        self._whole = known.whole
        self.inputs = _described(signature["inputs"], known.inputs, known.scales)
        self.outputs = _described(signature["outputs"], known.outputs, known.scales)
        if integers and not any("scale" in row for row in self.outputs):
            raise ValueError(
                f"`integers=True` was given, and no output of `{path.name}` is quantized. Leave it "
                "out, or load an int8 file."
            )

    def __call__(self, x: Tensors) -> Any:
        """Run the file.

        Args:
            x: Inputs, see `LoadedModel`.

        Returns:
            The output, or a dict of them by name.

        Raises:
            TypeError: If an input holds no numbers.
            ValueError: If an input is missing, unknown, of another shape, or holds values that the
                file cannot take or compute, or if an output has not one row for each sample.
        """
        feed = {row["name"]: self._real(array, row) for array, row in self._matched(x)}
        counts = {name: len(array) for name, array in feed.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"The inputs of `{self.path.name}` differ in length: {counts}.")
        with self._lock:
            results = self._run(feed, next(iter(counts.values())))
        outputs = {}
        for row in self.outputs:
            array = results[row["name"]]
            if self._integers and "scale" in row:
                # Dequantized once, the integers come back exactly.
                limits = np.iinfo(row["dtype"])
                steps = np.round(array.astype(np.float64) / row["scale"]) + row["zero_point"]
                array = np.clip(steps, limits.min, limits.max).astype(row["dtype"])
            outputs[row["name"]] = array
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def __repr__(self) -> str:
        return f"<LoadedModel {self.path.name}: {_list(self.inputs)} to {_list(self.outputs)}>"

    def _matched(self, x: Tensors) -> list[tuple[Any, dict[str, Any]]]:
        rows = {row["name"]: row for row in self.inputs}
        if isinstance(x, dict):
            flat = dict(_flat(x))
            for name in flat:
                if name not in rows:
                    hint = did_you_mean(name, rows)
                    raise ValueError(
                        f"`{name}` is no input of `{self.path.name}`; its inputs are "
                        f"{_list(self.inputs)}.{hint}"
                    )
            missing = [name for name in rows if name not in flat]
            if missing:
                raise ValueError(
                    f"The inputs {missing} of `{self.path.name}` are missing. Pass one array for "
                    f"each of {_list(self.inputs)}."
                )
            return [(flat[name], row) for name, row in rows.items()]
        # A list is the rows of one input, or one array an input.
        single = len(rows) == 1
        parts: Sequence[Any] = x if isinstance(x, (list, tuple)) else [x]
        if single and not (len(parts) == 1 and np.ndim(parts[0]) == len(self.inputs[0]["shape"])):
            parts = [x]
        if len(parts) != len(rows):
            raise ValueError(
                f"`{self.path.name}` has {len(rows)} inputs and was given {len(parts)}. Pass a "
                f"list, or a dict by name, of {_list(self.inputs)}."
            )
        return list(zip(parts, self.inputs, strict=True))

    def _real(self, value: np.ndarray, row: dict[str, Any]) -> np.ndarray:
        """One input as the runtime takes it: real numbers, or whole ones as they are."""
        from keras_kd.export.source.data import as_array

        try:
            array = as_array(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Input `{row['name']}` of `{self.path.name}` is no array: {error}."
            ) from error
        if array.dtype.kind not in "biuf" and "float" not in str(array.dtype):
            raise TypeError(
                f"Input `{row['name']}` of `{self.path.name}` has dtype {array.dtype}; numbers are "
                "needed."
            )
        wanted = row["shape"]
        fits = array.ndim == len(wanted) and all(
            not isinstance(size, int) or size == got
            for size, got in zip(wanted[1:], array.shape[1:], strict=True)
        )
        if not fits:
            one = array.ndim == len(wanted) - 1
            hint = " For one sample pass `x[None]`." if one else ""
            raise ValueError(
                f"Input `{row['name']}` of `{self.path.name}` has shape {array.shape}, and the "
                f"file takes ({', '.join(['samples', *map(str, wanted[1:])])}).{hint}"
            )
        dtype = np.dtype(row["dtype"])
        if "scale" in row:
            if array.dtype == dtype:
                steps = array.astype(np.float64) - row["zero_point"]
                return (steps * row["scale"]).astype(np.float32)
            if not np.isfinite(array.astype(np.float64)).all():
                raise ValueError(
                    f"Input `{row['name']}` holds NaN or infinite values, which {dtype} cannot "
                    f"hold, as `{self.path.name}` would have to."
                )
        given = np.dtype(np.float32) if "scale" in row else dtype
        reason = misfit(array, given)
        if reason is not None:
            raise ValueError(
                f"Input `{row['name']}` of `{self.path.name}` takes {dtype}, and {reason}."
            )
        return array.astype(given, copy=False)

    def _run(self, feed: Arrays, count: int) -> Arrays:
        fixed = next((row["shape"][0] for row in self.inputs if row["shape"]), None)
        step = self._whole or (fixed if isinstance(fixed, int) else _BATCH)
        parts = []
        # With no samples, one of zeros tells the shapes of the outputs.
        for i in range(0, max(count, 1), step):
            batch = {name: array[i : i + step] for name, array in feed.items()}
            rows = len(next(iter(batch.values())))
            short = (step if isinstance(fixed, int) else max(rows, 1)) - rows
            if short:
                batch = {
                    name: np.concatenate([x, np.zeros((short, *x.shape[1:]), x.dtype)])
                    for name, x in batch.items()
                }
            results = self._answers(batch)
            self._check_rows(results, rows + short)
            parts.append({name: array[:rows] for name, array in results.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _answers(self, batch: Arrays) -> Arrays:
        """Run one batch; each runtime has error types of its own for values it cannot compute."""
        try:
            return self._runtime.run(batch)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"`{self.path.name}` cannot compute these inputs: {reason}. Numbers that look up "
                "rows, as those of words, must be those of rows that there are."
            ) from error

    def _check_rows(self, results: Arrays, rows: int) -> None:
        """Outputs that are not one row a sample cannot be cut into samples, nor be joined."""
        for name, array in results.items():
            if array.ndim == 0 or len(array) != rows:
                raise ValueError(
                    f"Output `{name}` of `{self.path.name}` has shape {array.shape} for {rows} "
                    "samples; one row for each sample was expected. Let the model keep the samples "
                    "on the first axis of each output."
                )


def _best(folder: Path) -> Path:
    from keras_kd.export import manifest

    content = manifest.read(folder)
    manifest.check_files(folder, content)
    if content["best"] is None:
        names = ", ".join(row["file"] for row in content["artifacts"] if row["file"] is not None)
        raise ValueError(
            f"No file in `{folder}` passed its check. Pass the path of one of its files"
            f"{f': {names}' if names else ''}."
        )
    return folder / str(content["best"])


def _described(
    rows: list[dict[str, Any]], order: Sequence[str], scales: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    known = {row["name"]: {**row, **scales.get(row["name"], {})} for row in rows}
    return [known[name] for name in (order if sorted(order) == sorted(known) else known)]


def _flat(x: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    # Nested dicts of inputs have names joined by "/", as in the file.
    for key, value in x.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _list(rows: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"`{row['name']}` ({', '.join(map(str, row['shape']))}) {row['dtype']}" for row in rows
    )

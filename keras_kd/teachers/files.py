"""Files as teachers: what is the same whatever runtime runs them.

A new kind of file is a function that opens it, as in `onnx_files`, and hands it to `teacher_of`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.teachers.black_box import UNKNOWN, BlackBox, Told
from keras_kd.utils import archives
from keras_kd.utils.types import PathLike, Tensors


class Tensor(NamedTuple):
    """An input or output of a file.

    Attributes:
        name: As the file has it.
        shape: Batch first, `None` where the size is free.
        dtype: As NumPy names it; another for what is no array of numbers.
        form: What an output ends in, as in `keras_kd.teachers.black_box`.
        binary: Whether it ends in a sigmoid.
        step: The distance of two neighboring values where they are quantized, else 0.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    form: str = UNKNOWN
    binary: bool = False
    step: float = 0.0


class Opened(NamedTuple):
    """A file in its runtime.

    Attributes:
        inputs: In the order of the file.
        outputs: In the order of the file.
        run: From inputs by name to the outputs of these names.
        labels: Names of the classes that the file holds, or `None`.
        parts: Paths of the file and of those in which it keeps its weights.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    run: Callable[[dict[str, np.ndarray], list[str]], dict[str, Any]]
    labels: list[str] | None
    parts: list[str]


class FileTeacher(BlackBox):
    """What `from_onnx` and `from_tflite` make: a black box that is known by the bytes of its file.

    Args:
        digest: SHA-256 of the file, and of those in which it keeps its weights.
        *arguments: As for `BlackBox`.
        **options: As for `BlackBox`.
    """

    def __init__(self, digest: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Not by its name, since a copy of the file answers the same.
        forms = sorted((name, told.form) for name, told in self.told.items())
        said = ["file", digest, self.version, forms, self.binary]
        self._identity = hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Identify the teacher by the bytes of its file and by what is read of it."""
        return self._identity


def existing(path: PathLike, kind: str) -> str:
    """The path of a file, or `ValueError` where there is none."""
    file = os.fspath(path)
    problem = archives.file_problem(file)
    if problem is not None:
        raise ValueError(f"The teacher `{file}` {problem}. Expected {kind} file.")
    return str(file)


def teacher_of(
    file: str,
    opened: Opened,
    outputs: str | Mapping[str, str] | None,
    *,
    classes: Sequence[Any] | None,
    binary: bool | None,
    name: str | None,
    version: str | None,
) -> BlackBox:
    """A teacher of a file that is open in its runtime."""
    numbers = [each for each in opened.outputs if each.dtype.startswith(("float", "map"))]
    if isinstance(outputs, Mapping):
        known = {each.name: each for each in numbers}
        unknown = [each for each in outputs if each not in known]
        if unknown:
            raise ValueError(
                f"`outputs` names {unknown}, and the outputs of `{file}` that hold numbers are "
                f"{list(known)}."
            )
        numbers = [known[each] for each in outputs]
    if not numbers:
        raise ValueError(
            f"`{file}` has no output of floats that could teach. Its outputs are "
            f"{[(each.name, each.dtype) for each in opened.outputs]}."
        )
    several = len(numbers) > 1
    if binary is None:
        binary = any(each.binary for each in numbers) and not isinstance(outputs, str)
    given = dict(outputs) if isinstance(outputs, Mapping) else {}
    one = outputs if isinstance(outputs, str) else None
    forms = {each.name: given.get(each.name, one or each.form) for each in numbers}
    units = numbers[0].shape[-1] if numbers[0].shape else None
    labels = opened.labels if not several and units == len(opened.labels or ()) else None
    if classes is not None and labels is not None and [str(c) for c in classes] != labels:
        raise ValueError(
            f"`{file}` has the classes {labels}, in this order. Received: classes="
            f"{[str(c) for c in classes]}."
        )
    names = [each.name for each in numbers]

    def predict(x: Tensors) -> Any:
        found = _in_pieces(opened, _feed(file, opened.inputs, x), names)
        found = {key: _table(value, teacher.classes) for key, value in found.items()}
        return found if several else found[names[0]]

    teacher = FileTeacher(
        "".join(map(_digest, opened.parts)),
        predict,
        forms if several else forms[names[0]],
        name=name or os.path.basename(file),
        version=version,
        classes=None if several else (classes if classes is not None else labels),
        binary=binary,
    )
    teacher.reads = [each.shape for each in opened.inputs]
    told = {}
    for each in numbers:
        form = forms[each.name]
        shape = tuple(size for size in each.shape[1:] if size is not None)
        whole = form != UNKNOWN and 0 < len(shape) == len(each.shape) - 1
        fixed = shape if whole else None
        told[each.name if several else "output"] = Told(form, fixed, None, each.step)
    return teacher.expect(**told)


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with archives.opened(path) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _feed(file: str, inputs: list[Tensor], x: Tensors) -> dict[str, np.ndarray]:
    """The inputs of a file by name, in its types."""
    if isinstance(x, dict) and {each.name for each in inputs} <= set(x):
        leaves = [x[each.name] for each in inputs]
    else:
        leaves = keras.tree.flatten(x)
        if len(leaves) != len(inputs) or (isinstance(x, dict) and len(inputs) > 1):
            found = f"a dict of {list(x)}" if isinstance(x, dict) else f"{len(leaves)} inputs"
            raise ValueError(
                f"`{file}` reads the inputs {[each.name for each in inputs]}, and the batch is "
                f"{found}. Pass `teacher_inputs=`, which maps the batch to them"
            )
    feed = {}
    for each, leaf in zip(inputs, leaves):
        shape = np.shape(leaf)
        if len(shape) != len(each.shape) or any(
            size is not None and size != given
            for size, given in zip(each.shape[1:], shape[1:], strict=True)
        ):
            raise ValueError(
                f"`{file}` reads `{each.name}` of shape {each.shape}, and the batch has the shape "
                f"{shape}. Pass `teacher_inputs=`, which maps the batch to what it reads"
            )
        dtype = each.dtype if each.dtype != "object" else None
        feed[each.name] = np.asarray(leaf, dtype)
    return feed


def _in_pieces(opened: Opened, feed: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """Run a batch, in pieces where the file takes batches of one size; the last one is filled."""
    sizes = {each.shape[0] for each in opened.inputs if each.shape}
    size = next((s for s in sizes if s is not None), None)
    count = len(next(iter(feed.values())))
    if size is None or size == count:
        return opened.run(feed, names)
    parts: list[dict[str, Any]] = []
    for start in range(0, count, size):
        piece = {key: x[start : start + size] for key, x in feed.items()}
        short = size - min(size, count - start)
        if short:
            piece = {
                key: np.concatenate([x, np.repeat(x[-1:], short, axis=0)])
                for key, x in piece.items()
            }
        found = opened.run(piece, names)
        parts.append({key: value[: size - short] for key, value in found.items()})
    return {
        key: np.concatenate([part[key] for part in parts])
        if isinstance(parts[0][key], np.ndarray)
        else [row for part in parts for row in part[key]]
        for key in names
    }


def _table(answer: object, classes: list[str] | None) -> Any:
    """Rows of numbers, also of rows that are dicts from classes to numbers."""
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], dict):
        return answer
    keys = list(answer[0])
    table = np.asarray([[row[key] for key in keys] for row in answer], "float32")
    if classes is None:
        return table
    return {key: table[:, i] for i, key in enumerate(keys)}

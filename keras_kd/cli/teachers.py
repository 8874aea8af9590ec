"""Teachers by name: a file of any kind, a cache of answers, or an estimator trained here."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.cli import inputs, recipes
from keras_kd.cli.console import native_silence
from keras_kd.datasets import TaskData, files
from keras_kd.datasets.task_data import rows_of
from keras_kd.utils import archives, folders
from keras_kd.utils.errors import did_you_mean
from keras_kd.utils.types import Array

ESTIMATORS = ("gradient-boosting", "random-forest")
"""Estimators of scikit-learn that are trained on the training rows, for rows of plain numbers."""

_FILES = (".keras", ".npz", ".onnx", ".tflite")


@dataclasses.dataclass(frozen=True)
class NamedTeacher:
    """A teacher from the command line.

    Args:
        name: As it was given.
        teacher: What the distiller takes.
        model: The Keras model, if it is one.
        answers: Its answers to every row of the data's file, if that is all it is.
        asked: Whether it is asked on the host, as files of other runtimes and estimators are.
    """

    name: str
    teacher: Any
    model: Any = None
    answers: Array | None = None
    asked: bool = False

    def test_answers(self, data: TaskData) -> Array | None:
        """Return its answers to the test rows, or `None` if nobody can ask it."""
        if self.model is not None:
            return np.asarray(self.model.predict(data.test.x, batch_size=256, verbose=0))
        if self.asked:
            import keras

            x = data.test.x
            parts = [
                self.teacher.answer(rows_of(x, slice(i, i + 256))).output
                for i in range(0, len(data.test), 256)
            ]
            return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])
        if self.answers is not None and (data.test.index >= 0).all():
            return self.answers[data.test.index]
        return None


def check(name: str, *, inside: bool = True) -> None:
    """Refuse a name behind which there is no teacher, before Keras is imported.

    Args:
        name: As it was given.
        inside: Whether to look into files.

    Raises:
        ValueError: If there is no such file, folder or estimator.
    """
    # An empty path is the folder that the command runs in.
    if name and Path(name).is_dir():
        if folders.holds(name) != "cache":
            raise ValueError(
                f"The folder `{name}` holds no cache of a teacher's answers. Pass one that "
                "`keras-kd cache write` wrote, or the file of a teacher."
            )
        return
    if name in ESTIMATORS or _is_file(name, inside):
        return
    hint = did_you_mean(name, ESTIMATORS)
    raise ValueError(
        f"`{name}` is no teacher. Expected a file that ends in {', '.join(_FILES)}, the folder of "
        f"a cache, or {' or '.join(ESTIMATORS)}, trained on your rows.{hint}"
    )


def check_file(name: str, kinds: Sequence[str] = _FILES) -> None:
    """Refuse what is no file of a teacher, before Keras is imported.

    Args:
        name: Path of the file.
        kinds: How it may end.

    Raises:
        ValueError: If there is no such file, or one of another kind.
    """
    if name.endswith(tuple(kinds)) and _is_file(name):
        return
    problem = archives.file_problem(name)
    why = "is no such file" if problem is None else problem
    raise ValueError(
        f"The teacher `{name}` {why}. Expected a file that ends in {', '.join(kinds)}."
    )


def _is_file(name: str, inside: bool = True) -> bool:
    """Whether a teacher's file has this name; an error where there is none that can be read."""
    if name.endswith(".keras"):
        inputs.check_model_file(name, "teacher", inside=inside)
        return True
    problem = archives.file_problem(name)
    if problem is not None and name.endswith(_FILES):
        raise ValueError(f"The teacher `{name}` {problem}. Pass the path of its file.")
    if name.endswith(".npz") and inside:
        _kind_of_answers(name, archives.names(name))
    return name.endswith(_FILES)


def of_file(name: str) -> Any:
    """Load what can be asked from a file: a Keras model, or a file of another runtime.

    Args:
        name: Path of a `.keras`, `.onnx` or `.tflite` file.

    Raises:
        ValueError: If it cannot be loaded.
        ImportError: If the package that runs it is missing.
    """
    import keras_kd.teachers

    if name.endswith(".keras"):
        return inputs.load_model(name, "teacher")
    if name.endswith(".onnx"):
        return keras_kd.teachers.from_onnx(name)
    # LiteRT says on stderr which kernels it takes.
    with native_silence():
        return keras_kd.teachers.from_tflite(name)


def load(
    name: str, data: TaskData, stack: contextlib.ExitStack, single: bool = False
) -> NamedTeacher:
    """Load a teacher by its name.

    Args:
        name: See `check`.
        data: What it is asked about.
        stack: Holds what must live as long as the teacher.
        single: Whether the student has one unit for two classes.

    Returns:
        The teacher.

    Raises:
        ValueError: If it cannot be loaded, or does not fit the data.
        ImportError: If a package that it needs is missing.
    """
    import keras_kd

    if name.endswith(".keras"):
        model = of_file(name)
        recipes.check_model(model, "teacher", data)
        return NamedTeacher(name, model, model)
    if name.endswith((".onnx", ".tflite")):
        found = of_file(name)
        _check_classes(name, found.classes, data)
        _check_units(name, found.output_shapes(), data)
        return NamedTeacher(name, found, asked=True)
    if name.endswith(".npz"):
        return _from_answers(name, data, stack)
    if name in ESTIMATORS:
        made = keras_kd.teachers.from_sklearn(
            _trained(name, data),
            units=1 if single and data.learns == "classification" else None,
            name=name,
        )
        return NamedTeacher(name, made, asked=True)
    return NamedTeacher(name, keras_kd.teachers.CachedTeacher(name))


def together(found: Sequence[NamedTeacher]) -> Any:
    """Return one teacher of several: a list is an ensemble with equal weights.

    Raises:
        ValueError: If one of several cannot be asked, since it is answers alone.
    """
    if len(found) == 1:
        return found[0].teacher
    for one in found:
        if one.name.endswith(".npz") or Path(one.name).is_dir():
            raise ValueError(
                f"The teacher `{one.name}` is answers that exist already, which no ensemble asks. "
                "Average them beforehand, or leave it out."
            )
    return [one.teacher for one in found]


def _from_answers(name: str, data: TaskData, stack: contextlib.ExitStack) -> NamedTeacher:
    import keras_kd
    from keras_kd.cache import from_answers

    arrays = files.read(name)
    kind = _kind_of_answers(name, arrays)
    answers = np.asarray(arrays[kind])
    named = arrays.get("class_names")
    _check_classes(name, None if named is None else files.names_of(named), data)
    rows = 1 + int(max(data.train.index.max(), data.validation.index.max(), data.test.index.max()))
    if len(answers) not in (rows, len(data.train)):
        raise ValueError(
            f"`{name}` holds {len(answers):,} answers, but `{data.name}` has {rows:,} rows to "
            "train on. Store one for each, in the order of the file."
        )
    shape = (data.units,) if data.task != "tokens" else (*data.train.y.shape[1:], data.units)
    # Of the most probable classes alone there are fewer.
    if answers.shape[1:] != shape and kind != "log_probabilities":
        raise ValueError(
            f"The answers in `{name}` have the shape {answers.shape}, but `{data.name}` needs "
            f"{('rows', *shape)}: {', '.join(data.class_names[:8])}."
        )
    every = len(answers) == rows
    chosen = data.train.index if every else np.arange(len(answers))
    options: dict[str, Any] = {}
    if kind == "log_probabilities":
        options["vocabulary"] = data.units
    if data.task == "multilabel":
        options["binary"] = True
    mask = _ends(data, rows if every else None)

    def given(some: Any) -> dict[str, Any]:
        """Some of the answers."""
        found: dict[str, Any] = {kind: answers[some]}
        if kind == "log_probabilities":
            found = {"top_k": (np.asarray(arrays["indices"])[some], answers[some])}
        return {**found, **options, **({} if mask is None else {"mask": mask[some]})}

    with _of_file(name):
        # All of them, so that rows are told by their number in the file.
        from_answers.check_answers(**given(slice(None)))
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="keras_kd_answers_"))
    cache = str(Path(folder) / "cache")
    keras_kd.cache.write_answers(cache, data.train.x, name=name, **given(chosen))
    whole = answers if every and kind != "log_probabilities" else None
    return NamedTeacher(name, keras_kd.teachers.CachedTeacher(cache), answers=whole)


@contextlib.contextmanager
def _of_file(name: str) -> Iterator[None]:
    """Name the file in errors about what is in it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}`: {error}") from error


def _ends(data: TaskData, rows: int | None) -> Array | None:
    """Where sentences are, `(rows, length)`: behind the end of one there is nothing to answer."""
    x = data.train.x
    if data.task != "tokens" or isinstance(x, dict) or x.ndim != 2:
        return None
    if rows is None:
        return np.asarray(x != 0)
    mask = np.zeros((rows, x.shape[1]), bool)
    for split in (data.train, data.validation, data.test):
        own = split.index >= 0
        mask[split.index[own]] = split.x[own] != 0
    return mask


def _kind_of_answers(name: str, arrays: Collection[str]) -> str:
    kinds = [kind for kind in ("logits", "probabilities", "log_probabilities") if kind in arrays]
    if len(kinds) != 1 or ("indices" in arrays) != (kinds[0] == "log_probabilities"):
        raise ValueError(
            f"`{name}` holds {', '.join(f'`{key}`' for key in arrays) or 'no arrays'}. A teacher's "
            "answers are `logits`, `probabilities`, or `indices` with `log_probabilities`, one row "
            "for each row of the data."
        )
    return kinds[0]


def answers_of(name: str) -> dict[str, Any]:
    """Read answers that exist already, as `keras_kd.cache.write_answers` takes them.

    Args:
        name: Path of a `.npz` file: `logits`, `probabilities`, or `indices` with
            `log_probabilities` and the number of classes, `vocabulary` or as many `class_names`;
            and maybe `mask`, which is false for padding.

    Raises:
        ValueError: If it holds no answers.
    """
    arrays = files.read(name)
    kind = _kind_of_answers(name, arrays)
    given: dict[str, Any] = {kind: arrays[kind]}
    if kind == "log_probabilities":
        names = arrays.get("class_names")
        units = arrays.get("vocabulary", None if names is None else np.size(names))
        if units is None or np.size(units) != 1 or np.asarray(units).dtype.kind not in "iu":
            raise ValueError(
                f"`{name}` names the most probable classes alone, and not how many there are. "
                "Store the number as `vocabulary`, or the names of all as `class_names`."
            )
        given = {"top_k": (arrays["indices"], arrays[kind])}
        given["vocabulary"] = int(np.reshape(units, ()))
    if "mask" in arrays:
        given["mask"] = arrays["mask"]
    return given


def _check_units(name: str, shapes: list[Any] | None, data: TaskData) -> None:
    """Refuse a file that answers another number of units, as far as it says how many."""
    for shape in shapes or []:
        one = data.task == "classification" and data.units == 2 and shape[-1] == 1
        if shape[-1] not in (data.units, None) and not one:
            raise ValueError(
                f"The teacher `{name}` answers {shape[-1]} numbers a row, but `{data.name}` with "
                f"the task `{data.task}` needs {data.units}. Choose a teacher of this task."
            )


def _check_classes(name: str, given: Sequence[Any] | None, data: TaskData) -> None:
    if given is None or not data.class_names:
        return
    theirs = [str(one) for one in given]
    ours = list(data.class_names)
    if theirs == ours:
        return
    if sorted(theirs) == sorted(ours):
        place = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        raise ValueError(
            f"`{name}` has the classes of `{data.name}` in another order: number {place} is "
            f"`{theirs[place]}` there and `{ours[place]}` here. Reorder its columns, or pass "
            f"`--classes {','.join(theirs)[:200]}`."
        )
    odd = next((one for one in theirs if one not in ours), None)
    raise ValueError(
        f"`{name}` names {len(theirs)} classes and `{data.name}` has {len(ours)}"
        + (f"; `{odd}` is none of these" if odd is not None else "")
        + ". Choose answers about these classes."
    )


def _trained(name: str, data: TaskData) -> Any:
    x = data.train.x
    plain = not isinstance(x, dict) and x.ndim == 2 and data.inputs.get("kind") != "text"
    if (
        not plain
        or data.learns not in ("classification", "regression")
        or (data.learns == "regression" and data.train.y.shape[1] > 1)
    ):
        raise ValueError(
            f"`--teacher {name}` is trained on rows of plain numbers, for `classification` and a "
            f"`regression` of one target, or a ranking with `--group`. `{data.name}` is no such "
            "data: pass a teacher's file."
        )
    from sklearn import ensemble

    kinds = {
        ("gradient-boosting", "classification"): ensemble.HistGradientBoostingClassifier,
        ("gradient-boosting", "regression"): ensemble.HistGradientBoostingRegressor,
        ("random-forest", "classification"): ensemble.RandomForestClassifier,
        ("random-forest", "regression"): ensemble.RandomForestRegressor,
    }
    y = data.train.y if data.task == "classification" else data.train.y[:, 0]
    if data.task == "classification":
        missing = set(range(len(data.class_names))) - set(np.unique(y[data.labeled]).tolist())
        if missing:
            raise ValueError(
                f"The class `{data.class_names[min(missing)]}` has no training row, so that "
                f"`--teacher {name}` cannot answer for it. Name the classes that there are with "
                "`--classes`."
            )
    # It is asked in float32, and would decide otherwise where a number is at a threshold.
    x = x.astype(np.float32)
    return kinds[name, data.learns](random_state=0).fit(x[data.labeled], y[data.labeled])

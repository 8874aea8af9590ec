"""A deployed student learns from new data, and is replaced only where no task is the worse for it.

The way of one refresh: measure the int8 file in service, fine-tune the teacher if that is asked
for, distil, export into a folder of its own, measure the new int8 file, and only then, if every
task of old and new data holds, put the new folder in the place of the old one by one rename. Each
finished step lies in the folder of the refresh, so that a run that was killed goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_kd import students, teachers
from keras_kd.callbacks.resume import ResumableBackup
from keras_kd.distill.distiller import Distiller
from keras_kd.lifelong.heads import GrowingHead
from keras_kd.lifelong.streams import Stream, held_out, rows_of
from keras_kd.models import graph, training_identity
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils import checks, escaping, files, tables
from keras_kd.utils.types import Array, PathLike

if TYPE_CHECKING:
    from keras_kd.export import Report


STUDENT = "student.keras"
"""The model that a folder's files were made from; the next refresh goes on from it."""


@dataclasses.dataclass(frozen=True)
class Refreshed:
    """What a refresh came to.

    Args:
        shipped: Whether the folder in service holds the new files.
        reason: Why, in a sentence; of a refusal by how much.
        tasks: Of each task its `name`, whether it is `"old"` or `"new"`, the number of test
            `rows`, the accuracies `before` and `after` of the int8 files, and `drop`, their
            difference.
        folder: Where the new files lie: in service, or in the folder of the refresh.
        report: The report of the export, or `None` where there was nothing to export.
    """

    shipped: bool
    reason: str
    tasks: list[dict[str, Any]]
    folder: Path
    report: Report | None = dataclasses.field(default=None, repr=False)

    def table(self, width: int = 80) -> str:
        """Lay out the tasks as text.

        Args:
            width: Characters a line.
        """
        rows = [
            [
                escaping.plain(row["name"]),
                row["part"],
                f"{row['rows']:,}",
                f"{100 * row['before']:.2f}",
                f"{100 * row['after']:.2f}",
                f"{100 * row['drop']:+.2f}",
            ]
            for row in self.tasks
        ]
        headings = ["task", "data", "rows", "before %", "after %", "drop"]
        return "\n".join([*tables.fitted(headings, rows, width=width), "", self.reason])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "shipped": self.shipped,
            "reason": self.reason,
            "tasks": self.tasks,
            "folder": str(self.folder),
        }


class _Part:
    """One task: rows to train on and rows to test on."""

    def __init__(self, name: str, part: str, x: Array, y: Array, x_test: Array, y_test: Array):
        self.name, self.part = name, part
        self.x, self.y, self.x_test, self.y_test = x, y, x_test, y_test


def refresh(
    deployed_folder: str | os.PathLike[str],
    teacher: Any,
    old: object,
    new: object,
    folder: str | os.PathLike[str],
    max_drop: float = 0.01,
    *,
    student: keras.Model | None = None,
    fine_tune: int = 0,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    test: float = 0.2,
    seed: int = 0,
    verbose: int | str = "auto",
    callbacks: Sequence[Any] | None = None,
) -> Refreshed:
    """Teach a deployed student new data, and ship it only if it is not worse anywhere.

    The files are judged, not the Keras model: the accuracy of the new int8 file on the test rows of
    each task, against that of the int8 file in service. If none falls by more than `max_drop`, the
    new folder takes the place of the one in service in one rename, and the one before lies in
    `folder/previous`. Otherwise the folder in service is not touched.

    The student begins with the weights of `student.keras` in the folder in service, which a refresh
    leaves there; its head grows where the teacher knows more classes. Without that file and without
    `student` it is half as wide as the teacher and begins anew.

    Args:
        deployed_folder: What `keras_kd.export` wrote and what is in service; or a link to it, which
            then is what is replaced.
        teacher: A Keras model that answers for old and new data, or another teacher that
            `Distiller` takes.
        old: What the student has learned: `(x, y)`, of which a share is held out for the test;
            `(x, y, x_test, y_test)`; a `Stream`; or a dict of these by name, a task each.
        new: The same of what it is to learn.
        folder: For the work, on any disk.
        max_drop: Accuracy that a task may lose, as a share: 0.01 is one point.
        student: A model to go on from, a `keras.Model` or the path of a `.keras` file.
        fine_tune: Epochs for which a copy of the teacher is trained on old and new rows first.
        epochs: Epochs of the distillation.
        batch_size: Rows a step.
        learning_rate: Of Adam.
        test: Share of each class that is held out of `(x, y)`.
        seed: Of what is held out.
        verbose: As in `keras.Model.fit`.
        callbacks: Keras callbacks of the distillation.

    Returns:
        What it came to.

    Raises:
        FileNotFoundError: If there is no deployed folder.
        ImportError: If a package of the extra `export` is missing.
        ManifestError: If the folder holds no export, or its files are not those exported.
        OSError: If the system cannot replace the folder in one rename; said before any work.
        TypeError: If data are no arrays.
        ValueError: If an argument cannot be used. The folder in service is not touched.

    Examples:
        >>> done = keras_kd.lifelong.refresh(  # doctest: +SKIP
        ...     "service/digits", teacher, old=(x, y), new=(x_new, y_new), folder="runs/refresh"
        ... )
        >>> done.shipped, done.reason  # doctest: +SKIP
    """
    import keras_kd.export
    from keras_kd.export import manifest

    checks.number("max_drop", max_drop, 0)
    checks.whole("epochs", epochs)
    checks.whole("batch_size", batch_size)
    checks.whole("fine_tune", fine_tune, 0)
    checks.positive("learning_rate", learning_rate)
    checks.whole("seed", seed, 0)
    parts = [*_parts(old, "old", test, seed), *_parts(new, "new", test, seed)]
    deployed, work = Path(deployed_folder), Path(folder)
    if not deployed.is_dir():
        raise FileNotFoundError(
            f"There is no folder `{deployed}`. Pass the one that `keras_kd.export` wrote."
        )
    content = manifest.read(deployed)
    manifest.check_files(deployed, content)
    if work.resolve() in (deployed.resolve(), *deployed.resolve().parents):
        raise ValueError(f"`folder` holds the folder in service, `{deployed}`. Choose another one.")
    judged = _judged(content)
    before = [_accuracy(deployed / judged["file"], part) for part in parts]
    _require_replaceable(deployed)
    start = _student(deployed, student, teacher)
    start, teacher = _with_columns(start, teacher, parts, fine_tune)
    given = start if student is not None else None
    settings = {
        "fine_tune": fine_tune,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": float(learning_rate),
    }
    done = _Done(work, _identity(content, parts, teacher, given, settings))
    x, y = (np.concatenate([getattr(p, name) for p in parts]) for name in ("x", "y"))

    def trained(model: keras.Model, name: str, count: int, inner: keras.Model | None = None) -> Any:
        """A model trained on all rows, or what an earlier run has made of it."""
        if done.has(name):
            return keras.saving.load_model(done.path(name))
        fitted = inner if inner is not None else model
        backup = ResumableBackup(work / f"backup-{name}", 500)
        fitted.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=count,
            verbose=verbose,
            callbacks=[*(callbacks or [] if inner is not None else []), backup],
        )
        with files.replacing_by_name(done.path(name)) as temporary:
            model.save(temporary)
        return model

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if fine_tune:
        teacher.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
        teacher = trained(teacher, "teacher", fine_tune)
    distiller = Distiller(start, teacher)
    distiller.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    start = trained(start, "student", epochs, distiller)
    candidate = work / "candidate"
    report = _exported(start, candidate, content, x, parts, max_drop, seed)
    with files.replacing_by_name(candidate / STUDENT) as temporary:
        start.save(temporary)
    # Made in the same format as the one in service, or it could not take its place.
    made = [row for row in report.manifest["artifacts"] if row["precision"] == "int8"]
    named = next(row for row in made if row["format"] == judged["format"])
    if not named.get("file"):
        why = f"Not shipped: there is no int8 file to take its place ({named['reason']})."
        return Refreshed(False, why, [], candidate, report)
    rows = _compared(parts, before, candidate / named["file"])
    refusal = _refusal(rows, max_drop)
    if refusal is None and named["status"] != "passed":
        refusal = f"Not shipped: `{named['file']}` failed its own check: {named['reason']}."
    if refusal is not None:
        return Refreshed(False, refusal, rows, candidate, report)
    _put_in_service(candidate, deployed, content, work / "previous")
    worst = max(row["drop"] for row in rows)
    reason = (
        f"Shipped: no task falls by more than {100 * max_drop:.2f} points; the most is "
        f"{100 * max(worst, 0.0):.2f}."
    )
    return Refreshed(True, reason, rows, deployed, keras_kd.export.Report.load(deployed))


class _Done:
    """What a refresh has finished, in its folder."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "refresh.json"
        if path.exists():
            other = training_identity.difference(json.loads(path.read_text()), identity)
            if other is not None:
                raise ValueError(
                    f"`{folder}` holds another refresh: {other}. Choose another folder, or delete "
                    "it to begin anew."
                )
            return
        with files.replacing(path) as file:
            file.write(json.dumps(identity).encode())

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.keras"

    def has(self, name: str) -> bool:
        return self.path(name).exists()


def _identity(
    content: dict[str, Any],
    parts: Sequence[_Part],
    teacher: TeacherLike,
    student: keras.Model | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    made = teachers.make(teacher, None, "float32")
    # By its form: a program that is run again may draw its first weights anew.
    weights = [] if student is None else student.weights
    return {
        "rows": [
            [p.name, *(zlib.crc32(np.ascontiguousarray(a)) for a in (p.x, p.y, p.x_test, p.y_test))]
            for p in parts
        ],
        "teacher": None if made is None else made.fingerprint(),
        "student": [list(map(int, weight.shape)) for weight in weights],
        **settings,
        "deployed": content["model"]["name"],
    }


def _parts(data: object, part: str, test: float, seed: int) -> list[_Part]:
    """The tasks of old or new data."""
    if isinstance(data, dict):
        return [
            each
            for name, inner in data.items()
            for each in _one(inner, str(name), part, test, seed)
        ]
    return _one(data, part, part, test, seed)


def _one(data: object, name: str, part: str, test: float, seed: int) -> list[_Part]:
    if isinstance(data, Stream):
        missing = [task.name for task in data if task.x_test is None or not len(task.x_test)]
        if missing:
            raise ValueError(
                f"The tasks {missing} of `{part}` have no test part, so that nothing tells whether "
                "they are worse. Make the stream with `test=(x_test, y_test)`, or `test=0.2`."
            )
        return [_Part(t.name, part, t.x, t.y, t.x_test, t.y_test) for t in data]
    if not isinstance(data, list | tuple) or len(data) not in (2, 4):
        raise ValueError(
            f"`{part}` is `(x, y)`, `(x, y, x_test, y_test)`, a `Stream`, or a dict of these. "
            f"Received: {type(data).__name__}."
        )
    x, y = rows_of(data[0], data[1])
    if len(data) == 4:
        return [_Part(name, part, x, y, *rows_of(data[2], data[3]))]
    if not 0 < checks.number("test", test) < 1:
        raise ValueError(f"`test` is a share of the rows, in (0, 1). Received: test={test!r}.")
    stay, out = held_out(y, test, seed)
    if not len(out):
        raise ValueError(
            f"`{part}` has one row a class, of which none can be held out. Pass `(x, y, x_test, "
            "y_test)`."
        )
    return [_Part(name, part, x[stay], y[stay], x[out], y[out])]


def _judged(content: dict[str, Any], fmt: str | None = None) -> dict[str, Any]:
    """The row of the file whose accuracy counts: int8, in TFLite where there is one.

    Args:
        content: A manifest.
        fmt: The format that it has to be of, or `None`.
    """
    int8 = sorted(
        (
            row
            for row in content["artifacts"]
            if row.get("file") and row["precision"] == "int8" and fmt in (None, row["format"])
        ),
        key=lambda row: (row["status"] != "passed", row["format"] != "tflite"),
    )
    if int8:
        return dict(int8[0])
    raise ValueError(
        "The export holds no int8 file, by which a refresh is judged. Export with 'int8' among the "
        "`precisions`, and calibration data."
    )


def _accuracy(file: Path, part: _Part) -> float:
    import keras_kd.export

    answers = keras_kd.export.load(file)(part.x_test.astype("float32"))
    if isinstance(answers, dict) or answers.ndim != 2:
        raise ValueError(f"`{file}` is no classifier of one output, which a refresh needs.")
    return float(np.mean(answers.argmax(-1) == part.y_test))


def _student(deployed: Path, student: keras.Model | PathLike | None, teacher: TeacherLike) -> Any:
    """The model that the distillation begins with; none of the user's own is changed."""
    if student is None and (deployed / STUDENT).is_file():
        student = deployed / STUDENT
    if isinstance(student, str | os.PathLike):
        return keras.saving.load_model(student, safe_mode=True)
    if student is None:
        if not graph.is_graph(teacher):
            raise ValueError(
                f"There is no `{STUDENT}` in `{deployed}`, and a student is derived from teachers "
                "that are Functional. Pass `student=`, a model or the path of a `.keras` file."
            )
        return students.shrink(teacher)
    if not isinstance(student, keras.Model):
        raise TypeError(f"`student` is a model or a path. Received: {type(student).__name__}.")
    return _copied(student)


def _copied(model: keras.Model) -> Any:
    return graph.rebuild(model, lambda layer, _graph: graph.copy_built(layer))


def _with_columns(
    student: keras.Model, teacher: Any, parts: Sequence[_Part], fine_tune: int
) -> tuple[Any, Any]:
    """Student and teacher with as many columns as there are classes."""
    classes = 1 + max(int(max(p.y.max(), p.y_test.max())) for p in parts)
    if not isinstance(teacher, keras.Model):
        if fine_tune:
            raise ValueError(
                f"`fine_tune` trains a Keras model, and the teacher is a {type(teacher).__name__}."
            )
        return student, teacher
    if fine_tune:
        teacher = _grown(_copied(teacher), classes)
    known = teacher.output_shape[-1]
    if known < classes:
        raise ValueError(
            f"The teacher knows {known} classes, and the data hold class {classes - 1}. Take one "
            "that knows them, or let it learn them: `fine_tune=5`."
        )
    return _grown(student, known), teacher


def _grown(model: keras.Model, columns: int) -> Any:
    units = model.output_shape[-1]
    if units >= columns:
        return model
    head = GrowingHead(model, known=range(units))
    head.grow(np.arange(columns))
    return head.model


def _exported(
    student: keras.Model,
    candidate: Path,
    content: dict[str, Any],
    x: Array,
    parts: Sequence[_Part],
    max_drop: float,
    seed: int,
) -> Report:
    """Export as the folder in service was: formats, precisions and names of the files."""
    import keras_kd.export

    rows = content["artifacts"]
    known = ("float32", "float16", "dynamic", "int8")
    precisions = [name for name in known if any(row["precision"] == name for row in rows)]
    first = Path(_judged(content)["file"]).stem
    chosen = np.random.default_rng(seed).permutation(len(x))[:512]
    x_test, y_test = (
        np.concatenate([getattr(p, name) for p in parts]) for name in ("x_test", "y_test")
    )
    about = content["model"]
    labels = about.get("labels") or None
    if labels is not None and len(labels) != student.output_shape[-1]:
        # There are more classes by now, whose names nobody has told.
        labels = None
    inputs = {tensor.name for tensor in student.inputs}
    pixels = {
        name: (pair["mean"], pair["std"])
        for name, pair in (about.get("normalization") or {}).items()
        if name in inputs
    }
    return keras_kd.export.export_model(
        student,
        candidate,
        formats=list(dict.fromkeys(row["format"] for row in rows)),
        precisions=precisions,
        calibration=x[chosen].astype("float32"),
        evaluation=(x_test.astype("float32"), y_test),
        max_drop=max_drop,
        labels=labels,
        normalization=pixels or None,
        name=first.removesuffix("_int8") or "model",
        overwrite=True,
    )


def _compared(parts: Sequence[_Part], before: Sequence[float], file: Path) -> list[dict[str, Any]]:
    rows = []
    for part, earlier in zip(parts, before, strict=True):
        after = _accuracy(file, part)
        rows.append(
            {
                "name": part.name,
                "part": part.part,
                "rows": len(part.y_test),
                "before": earlier,
                "after": after,
                "drop": earlier - after,
            }
        )
    return rows


def _refusal(rows: Sequence[dict[str, Any]], max_drop: float) -> str | None:
    # Of shares of the same rows a drop is a whole number of them, but for rounding.
    worse = [row for row in rows if row["drop"] > max_drop + 1e-12]
    if not worse:
        return None
    said = "; ".join(
        f"`{escaping.plain(row['name'])}` ({row['part']}) falls from {100 * row['before']:.2f} % "
        f"to {100 * row['after']:.2f} %, by {100 * row['drop']:.2f} points"
        for row in worse
    )
    return (
        f"Not shipped: {said}, and at most {100 * max_drop:.2f} are allowed. The folder in service "
        "is as it was."
    )


def _require_replaceable(deployed: Path) -> None:
    """Find out whether the folder can be replaced in one rename, before any work."""
    if deployed.is_symlink():
        files.require_writable(deployed.parent)
        return
    parent = deployed.resolve().parent
    probes = [parent / files.temporary_name("probe") for _ in range(2)]
    try:
        for probe in probes:
            probe.mkdir()
        files.exchange(*probes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"`{deployed}` cannot be replaced in one rename: {error.strerror or error}. Make it a "
            "link to the folder, which can be replaced everywhere, or choose another disk",
        ) from error
    finally:
        for probe in probes:
            with contextlib.suppress(OSError):
                probe.rmdir()


def _put_in_service(
    candidate: Path, deployed: Path, content: dict[str, Any], previous: Path
) -> None:
    """Put a copy of the new folder in the place of the one in service, by one rename."""
    from keras_kd.export import manifest, staged_folder

    target = deployed.resolve()
    staged = target.parent / f".{target.name}.refresh"
    _keep_replaced(staged, target, previous)
    shutil.copytree(candidate, staged)
    replaced = {*staged_folder.first_names(content), manifest.FILE}
    for path in target.iterdir():
        # Files of other origin stay in service.
        if path.name not in replaced and not (staged / path.name).exists():
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, staged / path.name)
    for path in staged.rglob("*"):
        files.sync(path)
    files.sync(staged)
    if deployed.is_symlink():
        new = target.with_name(
            f"{target.name.split('.refreshed-')[0]}.refreshed-{os.urandom(4).hex()}"
        )
        os.rename(staged, new)
        link = deployed.with_name(files.temporary_name(deployed.name))
        link.symlink_to(os.path.relpath(new, deployed.parent.resolve()), target_is_directory=True)
        os.replace(link, deployed)
        files.sync(deployed.parent)
        return
    with files.replacing(_copy_of(previous)) as file:
        file.write(str(staged.stat().st_ino).encode())
    files.exchange(staged, target)
    _keep_replaced(staged, target, previous)


def _copy_of(previous: Path) -> Path:
    """The file that tells the copy which goes into service from the folder that comes out of it."""
    return previous.with_name(f".{previous.name}.copy")


def _keep_replaced(staged: Path, target: Path, previous: Path) -> None:
    """Keep the folder that was replaced as `previous`; a copy that never replaced one goes."""
    copy = _copy_of(previous)
    if (
        staged.is_dir()
        and copy.exists()
        and copy.read_text() != str(staged.stat().st_ino)
        # A run that was killed here ships the same files once more.
        and _exported_files(staged) != _exported_files(target)
    ):
        # It may go to another disk, which takes its time.
        kept = previous.with_name(f".{previous.name}")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(staged, kept, symlinks=True)
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(kept, previous)
        files.sync(previous.parent)
    shutil.rmtree(staged, ignore_errors=True)
    files.remove(copy)


def _exported_files(folder: Path) -> dict[str, str]:
    """Names and hashes of the models of an export."""
    from keras_kd.export import manifest

    artifacts = manifest.read(folder)["artifacts"]
    return {each.file: each.sha256 for row in artifacts for each in manifest.files_of(row)}

"""Methods for one student, compared on the validation rows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_kd.cache.asked_once import asked_once
from keras_kd.distill import candidates, method_choice
from keras_kd.distill.candidates import Situation
from keras_kd.distill.distiller import Distiller
from keras_kd.distill.method_choice import MethodChoice
from keras_kd.distill.row_errors import RowErrors
from keras_kd.distill.training_rows import Rows
from keras_kd.distill.trial_setting import Setting
from keras_kd.export.writing import write_file
from keras_kd.models import meaning
from keras_kd.search import record, task
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils import archives, checks
from keras_kd.utils.types import Data, Losses, PathLike


def best_method(
    student_fn: Callable[[], Any],
    teacher: TeacherLike,
    train: Data,
    validation: Data,
    methods: object = "default",
    seeds: int | Sequence[int] = 3,
    *,
    epochs: int | None = None,
    batch_size: int = task.BATCH_SIZE,
    optimizer: str | keras.optimizers.Optimizer | None = None,
    loss: Losses = None,
    teacher_inputs: Callable[[Any], Any] | None = None,
    student_inputs: Callable[[Any], Any] | None = None,
    from_logits: bool | dict[str, bool | None] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    folder: str | os.PathLike[str] | None = None,
    verbose: int | str = "auto",
) -> MethodChoice:
    """Find the method that a student learns best by, plain training among them.

    Every method trains the same student from the same seeds, on the same batches, for as many
    epochs; the teacher is asked once. They are compared by the error on the validation rows, seed
    by seed, and by the log loss, each at its best temperature. Plain training is kept unless
    another method is wrong less often and is better beyond chance. Either its log loss is: the
    lower ends of the one-sided 95 % intervals of what it gains are above zero, over the seeds,
    `mean - t * s / sqrt(seeds)`, and over the rows, which all seeds share. Or its error is, in the
    same sense, and its log loss is no higher. Labels that are shares of more than ten items are
    lists: the error is 1 - NDCG@10. The default, where it is such a method, gives way only to what
    is better than it in the same sense. Of several methods the one that gains most is best. A
    method that is clearly worse than the best one with the first seed is not trained again.

    The candidates are `"plain"`; `"default"`, the defaults of `Distiller.compile` (`LogitMSE` for
    regressions); `"answers"`, its loss alone, without the labels; `"standardized"`, 0.1 CE + 9 w
    `SoftTargets(2.0, standardize=True)`; `"dist"`, CE + 2 max(w, 1/16) `DIST(temperature=4.0)`,
    where `w = min(1, 10 / classes)` shrinks with the number of classes; `"soft"`,
    `BinarySoftTargets` at temperature 2 for independent classes; `"huber"`, `LogitHuber` for
    regressions; `"features"`, the defaults and, where the layers match, a loss of the last matched
    ones: `ICKD` of maps, `HiddenState` of sequences, `PKT` of vectors.

    Args:
        student_fn: Makes a new student: a `keras.Model` as it begins. One that is compiled brings
            its loss and optimizer.
        teacher: A built `keras.Model`, a list of them, or a `keras_kd.teachers.Teacher`.
        train: `(x, y)`, `(x, y, sample_weight)`, or a dataset of batches that ends. Datasets are
            read into memory.
        validation: The same. It chooses, so it is not what the result is reported on.
        methods: `"default"` for all candidates that apply; a list of their names; or a dict from
            names to keywords of `Distiller.compile`, to functions of the student that return such
            (needed where they hold transfers), or to `None` for the candidate of that name.
        seeds: How many, or the seeds themselves.
        epochs: Passes over the training rows. Defaults to as many as show 36,000 samples, from 5 to
            30.
        batch_size: Rows a step.
        optimizer: An optimizer, of which each training gets a fresh copy, or its name. Defaults to
            the student's, or to Adam at 5e-3 with a cosine.
        loss: The hard loss. Defaults to the student's, or to what labels and output say.
        teacher_inputs: As for `keras_kd.Distiller`.
        student_inputs: As for `keras_kd.Distiller`.
        from_logits: As for `keras_kd.Distiller`.
        callbacks: Keras callbacks of every training.
        folder: Where finished trainings are kept, so that the same call goes on after a kill.
            `None` keeps them in memory.
        verbose: 0 says nothing; otherwise the cost is told before the first training.

    Returns:
        The choice: `.best` is the name of the method, `.arguments` the keywords of `compile` for
        it, `.table()` a line a method, `.verdict` a sentence.

    Raises:
        ValueError: If a method is unknown, data have no labels or do not fit together, or the
            folder holds the trainings of another call.
        TypeError: If an argument is of another type.
        ImportError: If SciPy is missing.

    Examples:
        >>> choice = kd.search.best_method(make_student, teacher, (x, y), (x_val, y_val))
        >>> print(choice.table())
        >>> distiller.compile(optimizer="adam", loss=hard, **choice.arguments)

    Reference:
        - [Student, 1908](https://doi.org/10.2307/2331554), the paired comparison
    """
    task.function("student_fn", student_fn)
    asked = candidates.chosen(methods)
    several = isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str)
    listed: Any = seeds if several else range(checks.whole("seeds", seeds))
    drawn = [checks.whole("seeds", seed, 0) for seed in listed]
    if not drawn or len(set(drawn)) < len(drawn):
        raise ValueError(f"`seeds` is at least 1, or different seeds. Received: seeds={seeds!r}.")
    checks.whole("batch_size", batch_size)
    checks.logits_flags(from_logits)
    checks.functions(teacher_inputs=teacher_inputs, student_inputs=student_inputs)
    if teacher is None:
        raise TypeError("`best_method` compares what a teacher adds, and there is none. Pass one.")
    rows, held = task.rows_of(train, "train"), task.rows_of(validation, "validation")
    task.require_alike(rows, held)
    epochs = task.epochs_for(rows.count) if epochs is None else checks.whole("epochs", epochs)
    keras.utils.set_random_seed(drawn[0])
    probe = student_fn()
    if not isinstance(probe, keras.Model):
        raise TypeError(
            f"`student_fn` returns a `keras.Model`. Received: {type(probe).__name__} from it."
        )
    hard = task.hard_loss(probe, rows) if loss is None else loss
    if student_inputs is None:
        ends = keras.tree.flatten(probe(rows.taken(slice(0, 1)).x, training=False))
        task.require_labels(probe, hard, [end.shape for end in ends], train=rows, validation=held)
    total = task.steps(rows.count, batch_size, epochs)
    setting = Setting(
        distiller=Distiller,
        make_student=lambda seed: student_fn(),
        train=rows,
        validation=held,
        hard=hard,
        make_optimizer=task.optimizer_maker(optimizer, probe, total),
        epochs=epochs,
        batch_size=batch_size,
        made_with={"student_inputs": student_inputs, "from_logits": from_logits},
        fitted_with={} if callbacks is None else {"callbacks": callbacks},
    )
    mapped = teacher_inputs is not None or student_inputs is not None
    model = None if mapped else method_choice.model_of(teacher)

    def situation(student: keras.Model) -> Situation:
        return setting.situation(student, model)

    prepared = method_choice.prepared(asked, situation(probe), rows.count)
    taps = method_choice.taps_of(prepared)
    told = from_logits.get("teacher") if isinstance(from_logits, dict) else from_logits
    if verbose != 0:
        print(method_choice.cost(prepared, len(drawn), setting, rows.count))
    with _kept(
        folder, rows, held, (epochs, batch_size, probe.count_params(), *sorted(taps)), setting
    ) as (place, known):
        answers = asked_once(
            teacher,
            rows.x,
            place,
            taps=taps,
            teacher_inputs=teacher_inputs,
            from_logits=told,
        )
        choice = method_choice.choose(
            setting, prepared, answers, drawn, situation=situation, known=known, tell=_told(verbose)
        )
    if verbose != 0:
        print(choice.verdict)
    return choice


@contextmanager
def _kept(
    folder: PathLike | None,
    rows: Rows,
    held: Rows,
    settings: Iterable[Any],
    setting: Setting,
) -> Iterator[tuple[Path, MutableMapping[tuple[str, int], RowErrors]]]:
    """Where the answers go, and the trainings that are known."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="keras_kd-methods-") as temporary:
            yield Path(temporary) / "answers", {}
        return
    about = {
        "train": task.digest(rows.x, rows.y, rows.weight),
        "validation": task.digest(held.x, held.y, held.weight),
        "settings": list(settings),
        "loss": meaning.name_of(setting.hard),
        "optimizer": _settings_of(setting.make_optimizer()),
    }
    place = record.opened(folder, "methods", about)
    yield place / "answers", _Known(place)


def _settings_of(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """What makes an optimizer what it is: its name differs from one to the next."""
    config = record.plain(optimizer.get_config())
    return {name: value for name, value in config.items() if name != "name"}


class _Known(MutableMapping[tuple[str, int], RowErrors]):
    """Trainings in a folder: one file each, that appears whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, key: tuple[str, int]) -> Path:
        return self.folder / f"{record.slug(key[0])}-{key[1]}.npz"

    def __getitem__(self, key: tuple[str, int]) -> RowErrors:
        path = self._path(key)
        if not path.exists():
            raise KeyError(key)
        arrays = archives.arrays(path)
        return RowErrors(
            arrays["errors"], arrays["weights"], arrays.get("losses"), arrays.get("refined")
        )

    def __setitem__(self, key: tuple[str, int], run: RowErrors) -> None:
        given = {name: value for name, value in run._asdict().items() if value is not None}
        packed = record.packed(**given)
        write_file(self._path(key), packed)

    def __delitem__(self, key: tuple[str, int]) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        raise NotImplementedError("Only single trainings are asked for.")

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.npz")))


def _told(verbose: int | str) -> method_choice.Tell:
    """What shows how many trainings are done."""
    bars: list[Any] = []

    def tell(stage: str, done: int, total: int) -> None:
        if verbose == 0:
            return
        if not bars:
            bars.append(keras.utils.Progbar(total, unit_name="training"))
        bars[0].target = total
        if done:
            bars[0].update(done, finalize=done == total)

    return tell

"""The search for the best exported file within a budget."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import keras

from keras_kd import teachers
from keras_kd.cache.asked_once import asked_once
from keras_kd.distill import method_choice
from keras_kd.distill.trial_setting import meanings
from keras_kd.export.formats.device_table import check_targets
from keras_kd.export.scratch import working_folder
from keras_kd.export.writing import write_file
from keras_kd.models import meaning
from keras_kd.search import candidate, finals, record, task
from keras_kd.search.budget import Budget
from keras_kd.search.candidate import Trainer
from keras_kd.search.files import Exporter, Weighed
from keras_kd.search.halving import goes_on
from keras_kd.search.space import TRAINING, Space
from keras_kd.search.study import Study, objectives
from keras_kd.students.shrink import shrink
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils import archives, checks, files
from keras_kd.utils.types import Data, Losses

Progress = Callable[[str, int, int, str], None]
"""Called with a stage, how many steps of it are done, how many there are, and a remark."""

TRIAL_SEED = 0
"""Of all trials, so that they differ by their values alone; the last trainings have others."""

_DAY = 86_400.0


def tune(
    build: Callable[..., Any] | str,
    teacher: TeacherLike,
    train: Data,
    validation: Data,
    space: Mapping[str, Any] | None = None,
    minimize: Sequence[str] = ("error",),
    device: str | Sequence[str] | None = None,
    budget: Budget | None = None,
    seeds: int = 3,
    folder: str | os.PathLike[str] = "runs/search",
    *,
    epochs: int | None = None,
    final_epochs: int | None = None,
    batch_size: int = task.BATCH_SIZE,
    loss: Losses = None,
    seed: int = 0,
    sampler: str = "tpe",
    config: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] | None = None,
    progress: Progress | None = None,
    verbose: int | str = "auto",
) -> Study:
    """Search the values by which a student becomes the best exported file within a budget.

    Each trial is a set of values that Optuna proposes. Its untrained student is exported and
    weighed first, and one whose file is beyond the budget is never trained. The others are trained,
    with the teacher's answers that were computed once for all; a training that is behind others of
    its size after a ninth or a third of the epochs is stopped. Then the trained student is
    exported, and the file is run on the validation rows, weighed and timed: what is minimized are
    the figures of the file.

    Plain training and the defaults are always among the trials. In the end the trial with the
    lowest error within the budget is trained again, for longer and with seeds that no trial had,
    and beside it plain training and the defaults in the same size and at the same learning rate. It
    is kept only if the lower end of the one-sided 95 % interval of its paired gain over both is
    above zero.

    The folder holds all there is: the call can be killed and made again, and several processes may
    make it at once and share the trials.

    Args:
        build: `build(values)` makes an untrained student of a dict of values; or `"shrink"`, the
            teacher in a smaller `width` and `depth`, see `keras_kd.students.shrink`.
        teacher: A built `keras.Model`, a list of them, or a `keras_kd.teachers.Teacher`; with
            `"shrink"` one that has a single Keras model.
        train: `(x, y)`, `(x, y, sample_weight)`, or a dataset of batches that ends.
        validation: The same. It chooses, so it is not what the result is reported on.
        space: By parameter a `Float`, `Log`, `Choice`, list of options or value. Known are
            `method` (`"plain"`, `"default"`, `"standardized"`, `"DIST"`), `temperature`, `alpha`,
            `learning_rate`, `precision` (`"int8"`, `"float16"`, ...), and with `"shrink"` `width`
            and `depth`; a `build` of your own may have others. Those that are left out have the
            defaults. `None` searches all of them but the precision, which is int8.
        minimize: Any of `"error"` (share of wrong answers, or the mean squared error),
            `"bytes"`, `"latency_ms"`, all of the exported file.
        device: Names of runtimes in which the file has to run, such as `"tflite-2.14"` or
            `"ethos-u55"`. `None` asks for LiteRT on this machine alone.
        budget: What is spent at most, and what the file may weigh and take.
        seeds: How often the winner is trained again, at least 2.
        folder: Of the search.
        epochs: Passes of a trial over the training rows. Defaults to as many as show 36,000
            samples, from 5 to 30.
        final_epochs: Passes of the last trainings. Defaults to three times `epochs`, or to `epochs`
            where that would take more than half of the budget's minutes.
        batch_size: Rows a step.
        loss: The hard loss. Defaults to that of a compiled student, or what labels and output say.
        seed: Of the proposals.
        sampler: `"tpe"`, or `"random"` to compare it with.
        config: More keys of `Study.config`, such as the paths of teacher and data.
        export: What every file carries along: `labels`, `normalization` and `name`, as for
            `keras_kd.export`.
        callbacks: Keras callbacks of every training.
        progress: Called as `progress(stage, done, total, remark)`.
        verbose: 0 says nothing, 1 a line a trial, 2 shows Keras's progress bars as well.

    Returns:
        The study.

    Raises:
        ValueError: If an argument is out of range or unknown, there is nothing to choose, or the
            data do not fit.
        TypeError: If an argument is of another type.
        FileExistsError: If the folder holds another study, or anything else.
        ImportError: If Optuna, or a package of the export, is missing.

    Examples:
        >>> study = kd.search.tune(
        ...     "shrink", teacher, (x, y), (x_val, y_val), minimize=("error", "bytes"),
        ...     budget=kd.search.Budget(minutes=10, bytes=20_000), folder="runs/search",
        ... )
        >>> print(study.table())
        >>> study.best["file"]

    Reference:
        - [Bergstra et al., 2011](https://papers.nips.cc/paper/4443), TPE
        - [Li et al., 2018](https://arxiv.org/abs/1810.05934), asynchronous successive halving
    """
    search = Search(
        build=build,
        teacher=teacher,
        train=train,
        validation=validation,
        space=space,
        minimize=minimize,
        device=device,
        budget=budget or Budget(),
        seeds=seeds,
        folder=Path(folder),
        epochs=epochs,
        final_epochs=final_epochs,
        batch_size=batch_size,
        loss=loss,
        seed=seed,
        sampler=sampler,
        config=config,
        export=export,
        callbacks=callbacks,
        progress=progress,
        verbose=verbose,
    )
    return search.run()


class Search:
    """One call of `tune`.

    Args:
        answers: Folder of a cache that several searches share; `None` keeps one in the search's.
        precisions: See `Space`.
        least: Share of right answers that is asked for; `None` asks for none.
        **others: As for `tune`.
    """

    def __init__(
        self,
        *,
        build: Callable[..., Any] | str,
        teacher: TeacherLike,
        train: Data,
        validation: Data,
        space: object,
        minimize: Sequence[str],
        device: str | Sequence[str] | None,
        budget: Budget,
        folder: Path,
        seeds: int = 3,
        epochs: int | None = None,
        final_epochs: int | None = None,
        batch_size: int = task.BATCH_SIZE,
        loss: Losses = None,
        seed: int = 0,
        sampler: str = "tpe",
        config: Mapping[str, Any] | None = None,
        export: Mapping[str, Any] | None = None,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        progress: Progress | None = None,
        verbose: int | str = "auto",
        answers: Path | None = None,
        precisions: Sequence[str] | None = None,
        least: float | None = None,
    ) -> None:
        _require_packages()
        self.minimize = objectives(minimize)
        for name, given in (("config", config), ("export", export)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"`{name}` is a dict. Received: {name}={given!r}.")
        self.device = tuple(check_targets(device))
        if not isinstance(budget, Budget):
            raise TypeError(f"`budget` is a `keras_kd.search.Budget`. Received: budget={budget!r}.")
        self.budget = budget
        self.seeds = checks.whole("seeds", seeds, 2)
        self.seed = checks.whole("seed", seed, 0)
        if sampler not in ("tpe", "random"):
            raise ValueError(f'`sampler` is "tpe" or "random". Received: sampler={sampler!r}.')
        self.sampler = sampler
        self.own = not isinstance(build, str)
        if self.own:
            task.function("build", build, {})
        elif build != candidate.SHRINK:
            raise ValueError(f'`build` is a function or "shrink". Received: build={build!r}.')
        if teacher is None:
            raise TypeError(
                "`tune` searches how to distill a teacher, and there is none. Pass one."
            )
        self.teacher = teacher
        model = method_choice.model_of(teacher)
        if not self.own and model is None:
            raise TypeError(
                '`build="shrink"` derives students from a single Keras model. Received: teacher '
                f"of type {type(teacher).__name__}. Pass a function as `build`."
            )
        rows, held = task.rows_of(train, "train"), task.rows_of(validation, "validation")
        task.require_alike(rows, held)
        epochs = task.epochs_for(rows.count) if epochs is None else checks.whole("epochs", epochs)
        last = None if final_epochs is None else checks.whole("final_epochs", final_epochs)
        checks.whole("batch_size", batch_size)
        self.length = partial(
            finals.length, epochs=epochs, given=last, seeds=self.seeds, minutes=budget.minutes
        )
        # One probe tells what the outputs mean and which ranges apply.
        depth = not self.own and _has_depth(model)
        settings: dict[str, Any] = {"own": self.own, "depth": depth, "precisions": precisions}
        first = Space(space, classes=True, **settings)
        keras.utils.set_random_seed(TRIAL_SEED)
        probe = candidate.build_student(build, model, first.defaults())
        one = rows.taken(slice(0, 1)).x
        units = [tuple(y.shape) for y in keras.tree.flatten(probe(one, training=False))]
        hard = task.hard_loss(probe, rows) if loss is None else loss
        task.require_labels(probe, hard, units, train=rows, validation=held)
        told = meanings(probe, hard)
        classes = len(units) == 1 and told[0] == meaning.CLASSES and units[0][-1] > 2
        self.space = first
        if not classes:
            self.space = Space(space, classes=False, **settings)
        self.regression = candidate.is_regression(probe, hard)
        self.least = least
        if self.regression and least is not None:
            raise ValueError(
                "`min_accuracy` is for classes, and the labels are numbers. Leave it out."
            )
        self.verbose = verbose
        self._tell = progress
        checks.known_keys(export or {}, ("labels", "normalization", "name"), "export")
        self.sized: list[tuple[dict[str, Any], Weighed]] = []
        """The sizes that were weighed, see `_reference_shape`."""
        about = {
            "space": self.space.to_json(),
            "minimize": list(self.minimize),
            "device": list(self.device),
            "limits": budget.limits(),
            "epochs": epochs,
            "final_epochs": last or "by default",
            "batch_size": int(batch_size),
            "seeds": self.seeds,
            "seed": self.seed,
            "sampler": sampler,
            "build": task.builder_name(build),
            "loss": task.names_of(hard),
            "regression": self.regression,
            "task": task.of_command(told[0], units[0]),
            "teacher": _fingerprint(teacher),
            "train": task.digest(rows.x, rows.y, rows.weight),
            "validation": task.digest(held.x, held.y, held.weight),
            "config": record.plain(config or {}),
            "export": record.plain(export or {}),
        }
        self.folder = record.opened(folder, "tune", about)
        self.about = about
        self.answers = answers or self.folder / "answers"
        self.trainer = Trainer(
            build=build,
            model=model,
            answers=None,
            train=rows,
            validation=held,
            hard=hard,
            epochs=epochs,
            batch_size=int(batch_size),
            verbose=1 if verbose == 2 else 0,
            callbacks=callbacks,
        )
        self.exporter = Exporter(
            self.folder / "weighed", rows, held, self.device, hard, dict(export or {})
        )

    def run(self) -> Study:
        """Search until the budget is spent, and train the winner again."""
        from keras_kd.search import journal

        began = time.time()
        with journal.quietly():
            trials = self._trials()
            shape, reason = self._reference_shape()
            if shape is None:
                return self._unreachable(reason)
            self._ask()
            with trials.working():
                self._work(trials, shape, began)
                self._finish(trials)
        return Study(self.folder)

    def work_on(self, candidates: Sequence[Mapping[str, Any]]) -> None:
        """Judge candidates that are given, in place of those that Optuna would propose.

        Args:
            candidates: All values of each.
        """
        from keras_kd.search import journal

        with journal.quietly():
            trials = self._trials()
            self._ask()
            named = []
            for number, values in enumerate(candidates):
                searched = {name: values[name] for name in self.space.ranges}
                named.append((f"given {number}", searched, dict(values)))
            with trials.working():
                while (trial := trials.propose(named, len(candidates))) is not None:
                    self._judge(trials, trial, dict(trial.values or {}))

    def _trials(self) -> Any:
        from keras_kd.search import journal

        searched = self.about["space"]["searched"]
        ranges = {name: journal.distribution(found) for name, found in searched.items()}
        random = self.sampler == "random"
        return journal.Trials(self.folder, self.minimize, ranges, self.seed, random)

    # ------------------------------------------------------------------ trials

    def _reference_shape(self) -> tuple[dict[str, Any] | None, str]:
        """The size in which the references are trained: the default, or the largest that fits."""
        usual = self.space.defaults()
        shapes, complete = self.space.shapes()
        names = list(shapes[0])
        default = {name: usual[name] for name in names}
        limited = any(self.budget.limits().values()) or self.device
        if not limited:
            return default, ""
        sized = []
        for shape in [default, *(each for each in shapes if each != default)]:
            with contextlib.suppress(ValueError):
                built = self.trainer.student({**usual, **shape}, TRIAL_SEED)
                sized.append((int(built.count_params()), shape))
        # The default first, then the largest: what is larger teaches more.
        order = sized[:1] + sorted(sized[1:], key=lambda pair: -pair[0])
        nearest: tuple[tuple[bool, float], str] | None = None
        for number, (_, shape) in enumerate(order):
            self._say("weigh", number, len(order), _listed(shape))
            weighed = self._weighed({**usual, **shape})
            self.sized.append((shape, weighed))
            excess = self.excess(weighed)
            worst = max(excess.values(), default=0.0)
            if worst <= 0:
                self._say("weigh", len(order), len(order), "")
                return shape, ""
            # However far beyond, a file is nearer than none.
            far = bool(weighed.reason), worst
            if nearest is None or far < nearest[0]:
                nearest = far, self._miss(weighed, shape)
        assert nearest is not None
        return (None if complete else default), nearest[1]

    def weigh_all(self) -> None:
        """Weigh the sizes of the space that were not needed so far."""
        known = [shape for shape, _ in self.sized]
        for shape in self.space.shapes()[0]:
            if shape not in known:
                with contextlib.suppress(ValueError):
                    weighed = self._weighed({**self.space.defaults(), **shape})
                    self.sized.append((shape, weighed))

    def _weighed(self, values: Mapping[str, Any]) -> Weighed:
        key = {name: value for name, value in values.items() if name not in TRAINING}
        precision = str(values["precision"])

        def build() -> Any:
            return self.trainer.student(values, TRIAL_SEED)

        return self.exporter.weigh(key, precision, build)

    def excess(self, weighed: Weighed) -> dict[str, float]:
        """By limit how far a file is beyond it; what no file or runtime takes is 1 beyond."""
        # Within the noise of this machine it may be within the budget.
        found = self.budget.excess(weighed.bytes, weighed.low_ms)
        if self.device:
            found["device"] = float(len(weighed.refused))
        if weighed.reason:
            found["file"] = 1.0
        return found

    def _miss(self, weighed: Weighed, shape: Mapping[str, Any]) -> str:
        """Say how near a file came to the budget."""
        if weighed.reason:
            return f"{_listed(shape) or 'it'} gives no file: {weighed.reason}"
        parts = []
        if self.budget.bytes is not None and (weighed.bytes or 0) > self.budget.bytes:
            parts.append(f"{weighed.bytes:,} bytes against {self.budget.bytes:,}")
        limit = self.budget.latency_ms
        if limit is not None and (weighed.low_ms or 0.0) > limit:
            parts.append(f"{weighed.latency_ms:.3g} ms against {limit:g}")
        parts += [f"{name} answers `{said}`" for name, said in weighed.refused.items()]
        return f"the nearest file ({_listed(shape) or 'all sizes'}): {'; '.join(parts)}"

    def _work(self, trials: Any, shape: dict[str, Any], began: float) -> None:
        """Do trials until the budget is spent."""
        from keras_kd.search import journal

        defaults = {**self.space.defaults(), **shape}
        fixed = {"method": "default", "alpha": 0.5, "temperature": 1.0}
        references = []
        for role, own in (
            ("plain", {**fixed, "method": "plain", "alpha": 1.0}),
            ("defaults", fixed),
        ):
            values = {**defaults, **own}
            searched = {name: r.nearest(values[name]) for name, r in self.space.ranges.items()}
            references.append((role, searched, values))
        limit = None if self.budget.trials is None else int(self.budget.trials)
        while True:
            records = trials.records()
            spent = journal.spent(records, began, time.time())
            if self._is_spent(records, spent):
                break
            trial = trials.propose(references, limit)
            if trial is None:
                break
            values = trial.values or {**self.space.fixed, **trial.searched}
            total = limit or max(len(records) + 1, trial.slot + 1)
            self._say("trials", min(len(records), total), total, _listed(values))
            self._judge(trials, trial, values)
        done = len(trials.records())
        self._say("trials", done, done, "")

    def _is_spent(self, records: Sequence[Any], spent: float) -> bool:
        """Whether the minutes are over but for those that the last trainings take."""
        if self.budget.minutes is None:
            return False
        if not {r.role for r in records if r.state != "running"} >= {"plain", "defaults"}:
            return False
        return spent + self.length(records).seconds > 60 * self.budget.minutes

    def _judge(self, trials: Any, trial: Any, values: dict[str, Any]) -> None:
        """Weigh, train, export, run: one trial to its end."""
        reference = trial.role in (finals.PLAIN, finals.DEFAULTS)
        for other in trials.records():
            if other.state == "done" and other.values == values:
                # The same values from the same seed are the same student.
                self._repeat(trial, other)
                return
        try:
            weighed = self._weighed(values)
            excess = self.excess(weighed)
            trial.note(values=values, weighed=asdict(weighed))
            if any(value > 0 for value in excess.values()):
                missed = self._miss(weighed, {}).partition(": ")[2]
                trial.note(reason=f"not trained, {missed}")
                trial.beyond(excess)
                return

            def keeps_on(epochs: int, error: float) -> bool:
                trial.note(**{f"rung_{epochs}": error})
                others = trials.records()
                by_size = len(self.minimize) > 1
                return reference or goes_on(trial.slot, epochs, error, weighed, others, by_size)

            student, epochs = self.trainer.trained(values, TRIAL_SEED, keeps_on)
            stopped = epochs < self.trainer.epochs
            if stopped:
                # It can be no part of the front: the untrained file says enough of it.
                found = weighed
                error: float | None = self.trainer.error(student)
            else:
                path = self.folder / "trials" / f"{trial.slot}.tflite"
                found, error = self._file(student, path, str(values["precision"]))
        except (ValueError, ArithmeticError) as problem:
            if reference:
                raise
            trial.note(values=values, reason=" ".join(str(problem).split())[:300])
            trial.beyond({"failed": 1.0})
            return
        excess = self.excess(found)
        early = {"stopped": epochs} if stopped else {}
        beyond = {name: value for name, value in excess.items() if value > 0}
        trial.note(file=asdict(found), error=error, excess=beyond, **early)
        if found.reason:
            trial.note(reason=found.reason)
            trial.beyond(excess)
            return
        measured = {"error": error, "bytes": found.bytes, "latency_ms": found.latency_ms}
        trial.done([measured[name] for name in self.minimize], excess)

    def _repeat(self, trial: Any, other: Any) -> None:
        """End a trial with what another one of the same values found."""
        kept = ("weighed", "file", "error", "excess", "stopped")
        said = {name: other.said[name] for name in kept if name in other.said}
        trial.note(values=other.values, reason=f"as trial {other.slot}", **said)
        path = self.folder / "trials" / f"{other.slot}.tflite"
        if path.exists():
            with files.replacing(path.with_name(f"{trial.slot}.tflite")) as stream:
                stream.write(path.read_bytes())
        measured = {"error": said["error"], **said["file"]}
        trial.done([measured[name] for name in self.minimize], said["excess"])

    def _file(
        self, student: keras.Model, path: Path, precision: str
    ) -> tuple[Weighed, float | None]:
        """Export a trained student, run the file, and keep it."""
        with working_folder() as scratch:
            made, found = self.exporter.export(student, scratch / "file", precision)
            if made is None:
                return found, None
            error = self.exporter.errors(made, student).mean
            path.parent.mkdir(exist_ok=True)
            with files.replacing(path) as stream:
                stream.write(made.read_bytes())
        return found, error

    # ------------------------------------------------------------------- finals

    def _finish(self, trials: Any) -> None:
        """Train the winner and the references again, with every process that is at work."""
        path, result = self.folder / "winner.json", self.folder / "result.json"
        with files.claimed(self.folder / "winner.lock", _busy, _DAY):
            self._wait_for_trials(trials)
            records = trials.records()
            if finals.trials_of(path) != len(records):
                self._say("choose", 0, 1, f"of {len(records)} trials")
                found = finals.winner(
                    self.folder, records, self.minimize, self.budget, self.exporter
                )
                # Here, so that all processes that train the last ones agree.
                found["epochs"] = self.length(records).epochs
                write_file(path, json.dumps(found, indent=2) + "\n")
            chosen = json.loads(archives.read_bytes(path))
        if chosen["values"] is None:
            write_file(result, json.dumps(chosen, indent=2) + "\n")
            return
        trainer = dataclasses.replace(self.trainer, epochs=int(chosen["epochs"]))
        runs = finals.Finals(self.folder, trainer, self.exporter, self.seeds, chosen["values"])
        runs.train(self._say)
        with files.claimed(self.folder / "result.lock", _busy, _DAY):
            if not finals.is_concluded(result, chosen["trials"], self.least):
                said = runs.conclude(chosen, self.regression, self.budget, self._say, self.least)
                write_file(result, json.dumps(said, indent=2) + "\n")

    def _wait_for_trials(self, trials: Any) -> None:
        """Wait for the trials of other processes, and do those of processes that ended."""
        while any(r.state == "running" for r in trials.records()):
            trial = trials.propose((), 0)
            if trial is None:
                time.sleep(0.2)
                continue
            self._judge(trials, trial, trial.values or {**self.space.fixed, **trial.searched})

    def _unreachable(self, reason: str) -> Study:
        said = {
            "trials": 0,
            "front": [],
            "timed": {},
            "values": None,
            "verdict": f"not reachable: no student of the space fits the budget; {reason}",
        }
        write_file(self.folder / "result.json", json.dumps(said, indent=2) + "\n")
        return Study(self.folder)

    def _say(self, stage: str, done: int, total: int, remark: str) -> None:
        if self._tell is not None:
            self._tell(stage, done, total, remark)
        elif self.verbose != 0 and remark:
            print(f"{stage} {done + 1}/{total}: {remark}")

    def _ask(self) -> None:
        """Ask the teacher about the training rows, once for all trials and processes."""
        self.answers.parent.mkdir(parents=True, exist_ok=True)

        def told(done: int, total: int | None) -> None:
            self._say("ask the teacher", done, total or done, "")

        with files.claimed(self.answers.with_name("answers.lock"), _busy, _DAY):
            answers = asked_once(self.teacher, self.trainer.train.x, self.answers, progress=told)
        self.trainer = dataclasses.replace(self.trainer, answers=answers)


def _busy(owner: str) -> str:
    return f"Process {owner} is at work on the same study. Call this again."


def _require_packages() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "`keras_kd.search.tune` needs Optuna, which is not installed. Install it with "
            '`pip install "keras_kd[search]"`.'
        ) from error


def _has_depth(model: keras.Model) -> bool:
    """Whether `shrink` can drop blocks of a model."""
    try:
        shrink(model, depth=0.5)
    except ValueError:
        return False
    return True


def _fingerprint(teacher: TeacherLike) -> str:
    made = teachers.make(teacher, None)
    assert made is not None
    return made.fingerprint()


def _listed(values: Mapping[str, Any]) -> str:
    texts = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return ", ".join(texts)

"""Methods tried on rows that were held out, under equal chances, and what is chosen of them.

Every candidate trains the same student from the same seeds on the same batches; the teacher is
asked once for all of them. Plain training is among them and wins ties: another method is chosen
only where its error or its log loss is lower beyond chance, over the seeds and over the rows, and
the other one of the two does not speak against it. The log loss is that at each model's best
temperature, so that being sure of itself speaks neither for nor against a method. Where the default
is better than plain training, it wins ties in its turn.
`keras_kd.search.best_method` and `compile(distillation_loss="auto")` are two doors to this.
"""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_kd.distill.candidates import DEFAULT, PLAIN, Candidate, Made, Situation
from keras_kd.distill.row_errors import RowErrors
from keras_kd.distill.trial_setting import Setting, meanings
from keras_kd.models import meaning
from keras_kd.teachers.base import TeacherLike
from keras_kd.utils import paired
from keras_kd.utils.tables import fitted

MOST_FEATURES = 1 << 30
"""Bytes of the teacher's layers that are kept for methods that read them."""

_MOST_OPEN = 2
"""Methods that more seeds are spent on, beside plain training."""

Tell = Callable[[str, int, int], None]
"""Called with what is at work, how many trainings are done, and how many there are."""


@dataclasses.dataclass
class Method:
    """What became of one candidate.

    Args:
        name: Its name.
        made: What it is here; `None` where it does not apply.
        reason: Why it does not apply, or was not trained to the end.
        runs: Its errors by seed.
        seconds: What it took, all seeds.
        folds: Whether every seed has validation rows of its own.
    """

    name: str
    made: Made | None
    reason: str = ""
    runs: dict[int, RowErrors] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    folds: bool = False

    def gains(self, plain: Method) -> list[float]:
        """How much less wrong it is than plain training with each seed that both have."""
        seeds = [seed for seed in self.runs if seed in plain.runs]
        return [plain.runs[seed].mean - self.runs[seed].mean for seed in seeds]

    def loss_gains(self, plain: Method) -> list[float] | None:
        """How much lower its log loss is than that of plain training with each seed.

        Each is taken at its best temperature, where that is known.
        """
        found = [
            np.average(other.proper - own.proper, weights=own.weights)
            for own, other in self._pairs(plain)
            if own.proper is not None and other.proper is not None
        ]
        return [float(gain) for gain in found] if len(found) == len(self._pairs(plain)) else None

    def loss_bound(self, plain: Method) -> float | None:
        """The lower bound of what the log loss gains: the lesser of that over seeds and over rows.

        The log loss is sensitive enough to tell methods apart by few seeds, so that the rows, which
        may be the same with every seed, have to bear it out.
        """
        gains = self.loss_gains(plain)
        if gains is None:
            return None
        of_rows = self._over_rows(plain, lambda run: run.proper)
        return of_rows if len(gains) < 2 else min(of_rows, paired.lower_bound(gains))

    def is_better(self, plain: Method) -> bool:
        """Whether it is better than plain training beyond chance."""
        losses, loss = self.loss_gains(plain), self.loss_bound(plain)
        if losses is not None and float(np.mean(losses)) < 0 and self._is_refined(plain):
            # One that is right more often and knows less all the same has been lucky, or will be
            # found out by another metric than the share of errors.
            return False
        if min(self.bound(plain), self.row_bound(plain)) > 0:
            return True
        if loss is None or loss <= 0:
            return False
        # Means of equal errors differ by what they are rounded to.
        fewer = float(np.mean(self.gains(plain))) > 1e-9
        # The errors of a few hundred rows come and go by chance where what is known grows a little.
        return fewer or (self._is_refined(plain) and plain.row_bound(self) <= 0)

    def merit(self, plain: Method) -> tuple[float, float]:
        """What those that are better are put in order by.

        The shares of the error and of the log loss that are gone, together; where the log loss is
        not known at its best temperature, the error alone, and the log loss where it is equal.
        """
        gain, losses = float(np.mean(self.gains(plain))), self.loss_gains(plain)
        loss = 0.0 if losses is None else float(np.mean(losses))
        if not self._is_refined(plain):
            return gain, loss
        pairs = self._pairs(plain)
        error = float(np.mean([other.mean for _, other in pairs]))
        whole = float(np.mean([np.average(o.refined, weights=o.weights) for _, o in pairs]))
        return gain / max(error, 1e-9) + loss / max(whole, 1e-9), gain

    def _is_refined(self, plain: Method) -> bool:
        return all(
            own.refined is not None and other.refined is not None
            for own, other in self._pairs(plain)
        )

    def _pairs(self, plain: Method) -> list[tuple[RowErrors, RowErrors]]:
        return [(run, plain.runs[seed]) for seed, run in self.runs.items() if seed in plain.runs]

    def bound(self, plain: Method) -> float:
        """The lower bound of what it gains: over seeds, of a single one over rows."""
        gains = self.gains(plain)
        return paired.lower_bound(gains) if len(gains) > 1 else self.row_bound(plain)

    def row_bound(self, plain: Method) -> float:
        """The same over rows: of the mean over the seeds, or of the rows of all seeds."""
        return self._over_rows(plain, lambda run: run.errors)

    def _over_rows(self, plain: Method, values: Callable[[RowErrors], Any]) -> float:
        pairs = self._pairs(plain)
        join = np.concatenate if self.folds else lambda each: np.mean(each, axis=0)
        own, other = (join([values(each[i]) for each in pairs]) for i in (0, 1))
        return paired.lower_bound_of_rows(own, other, join([each[0].weights for each in pairs]))


class MethodChoice:
    """Which method to train a student by, and what it was found by.

    Attributes:
        best: Name of the method: `"plain"` unless another one is better beyond chance.
        arguments: Keywords of `Distiller.compile` for it; `{"alpha": 1.0}` for plain training.
        verdict: The choice in a sentence.
        regression: Whether errors are mean squared ones, and no shares.
        student: The student of the best method with the lowest error, where it was kept.
    """

    def __init__(
        self, methods: Sequence[Method], regression: bool, student: keras.Model | None = None
    ) -> None:
        self._methods = {method.name: method for method in methods}
        self.regression = regression
        self.student = student
        plain = self._methods[PLAIN]
        better = [
            method
            for method in methods
            # Dropped after the first seed, it was clearly worse there.
            if method.name != PLAIN
            and len(method.runs) == len(plain.runs)
            and method.is_better(plain)
        ]

        default = self._methods.get(DEFAULT)
        if default in better:
            # It wins ties in its turn.
            better = [method for method in better if method.is_better(default)] or [default]

        chosen = max(better, key=lambda method: method.merit(plain), default=plain)
        self.best = chosen.name
        assert chosen.made is not None
        self.arguments = dict(chosen.made.arguments)
        self.verdict = self._verdict(chosen, plain)

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict a method, in the order in which they were tried.

        Keys: `method`, `seeds` (how many), `error` and `std` over seeds, `gain` over plain training
        with equal seeds and its lower bounds over the seeds, `bound`, and over the rows,
        `row_bound` (one-sided, 95 %), `loss_gain` and `loss_bound`, the lesser of both, of the log
        loss, `seconds`, `reason`. What does not apply is `None`.
        """
        plain = self._methods[PLAIN]
        found = []
        for method in self._methods.values():
            errors = [run.mean for run in method.runs.values()]
            versus = bool(errors) and method.name != PLAIN
            found.append(
                {
                    "method": method.name,
                    "best": method.name == self.best,
                    "seeds": len(errors),
                    "error": float(np.mean(errors)) if errors else None,
                    "std": float(np.std(errors, ddof=1)) if len(errors) > 1 else None,
                    "gain": float(np.mean(method.gains(plain))) if versus else None,
                    "bound": method.bound(plain) if versus else None,
                    "row_bound": method.row_bound(plain) if versus else None,
                    **_of_losses(method if versus else None, plain),
                    "seconds": method.seconds,
                    "reason": method.reason,
                }
            )
        return found

    def table(self, width: int = 80) -> str:
        """Return the figures as text: errors in percent, of regressions as they are.

        Args:
            width: Most columns of text.
        """
        headings = ["", "error" if self.regression else "error %", "gain", "lower bound", "seeds"]
        rows = self.rows()
        cells = [
            [
                ("* " if row["best"] else "  ") + row["method"],
                _spread(row["error"], row["std"], self.scale),
                _signed(row["gain"], self.scale),
                _signed(row["bound"], self.scale),
                str(row["seeds"]),
                f"{row['seconds']:.1f}",
            ]
            for row in rows
            if row["seeds"]
        ]
        lines = fitted([*headings, "s"], cells, width=width, dispensable=("s", "seeds"))
        lines += ["", *textwrap.wrap(self.verdict, width)]
        for row in rows:
            if row["reason"]:
                lines += textwrap.wrap(
                    f"- {row['method']}: {row['reason']}", width, subsequent_indent="  "
                )
        return "\n".join(lines)

    @property
    def scale(self) -> float:
        """What errors are multiplied by where they are shown."""
        return 1.0 if self.regression else 100.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"best": self.best, "verdict": self.verdict, "methods": self.rows()}

    def _verdict(self, chosen: Method, plain: Method) -> str:
        seeds = len(plain.runs)
        how = f"{seeds} seeds" if seeds > 1 else "one seed, so that the rows alone are counted"
        unit = "of the mean squared error" if self.regression else "points"
        if chosen is not plain:
            gain = self.scale * float(np.mean(chosen.gains(plain)))
            bound = self.scale * min(chosen.bound(plain), chosen.row_bound(plain))
            if bound <= 0:
                losses, loss = chosen.loss_gains(plain), chosen.loss_bound(plain)
                return (
                    f"use {chosen.name}: {abs(gain):.3g} {unit} {'less' if gain >= 0 else 'more'} "
                    "error than plain training on the "
                    f"validation rows, which may be chance, and a log loss lower by "
                    f"{np.mean(losses or 0):.3g}, at least {loss or 0:.3g} at 95 % ({how})"
                )
            return (
                f"use {chosen.name}: {gain:.3g} {unit} less error than plain training on the "
                f"validation rows, at least {bound:.3g} at 95 % ({how})"
            )
        others = [m for m in self._methods.values() if m is not plain and m.runs]
        if not others:
            return "keep plain training: no other method applies"
        nearest = max(others, key=lambda method: float(np.mean(method.gains(plain))))
        gain = self.scale * float(np.mean(nearest.gains(plain)))
        bound = self.scale * min(nearest.bound(plain), nearest.row_bound(plain))
        if bound > 0:
            losses = nearest.loss_gains(plain) or [0.0]
            return (
                f"keep plain training: the best of the others, {nearest.name}, has {gain:.3g} "
                f"{unit} less error, and yet a log loss that is higher by {-np.mean(losses):.3g} "
                f"at the best temperature of each ({how})"
            )
        return (
            f"keep plain training: the best of the others, {nearest.name}, has {abs(gain):.3g} "
            f"{unit} {'less' if gain > 0 else 'more'} error, and the lower bound of what it gains "
            f"is {bound:.3g}, not above zero ({how})"
        )


def _of_losses(method: Method | None, plain: Method) -> dict[str, float | None]:
    gains = None if method is None else method.loss_gains(plain)
    if method is None or gains is None:
        return {"loss_gain": None, "loss_bound": None}
    return {"loss_gain": float(np.mean(gains)), "loss_bound": method.loss_bound(plain)}


def choose(
    setting: Setting,
    methods: Mapping[str, tuple[Candidate, Made | str]],
    teacher: TeacherLike,
    seeds: Sequence[int],
    *,
    situation: Callable[[Any], Situation],
    folds: Callable[[int], tuple[Setting, TeacherLike]] | None = None,
    more: Sequence[int] = (),
    known: MutableMapping[tuple[str, int], RowErrors] | None = None,
    tell: Tell = lambda stage, done, total: None,
) -> MethodChoice:
    """Train every method with every seed, but for what is clearly worse with the first.

    Worse than the best of the others, that is: plain training alone goes on in any case.

    Args:
        setting: What is the same for all.
        methods: By name the candidate and what it is here, see `prepared`.
        teacher: What knows the teacher's answers to the training rows.
        seeds: The seeds.
        situation: Makes the situation of a student, so that each training has losses of its own.
        folds: From a seed to its own setting and teacher, where no validation row is one of
            another seed; `None` for the same ones with all seeds.
        more: Seeds that plain training and what may be better are trained with where no method is
            better beyond chance with the first ones.
        known: Errors by method and seed: trainings that it has are not repeated, the others are
            put into it.
        tell: Hears of the trainings.

    Returns:
        The choice.
    """
    known = {} if known is None else known
    tried = {
        name: Method(
            name,
            None if isinstance(made, str) else made,
            made if isinstance(made, str) else "",
            folds=folds is not None,
        )
        for name, (_, made) in methods.items()
    }
    alive = [method for method in tried.values() if method.made is not None]
    total, done = len(alive) * len(seeds), 0
    kept: dict[str, tuple[float, Any]] = {}
    for number, seed in enumerate([*seeds, *more]):
        if number == len(seeds):
            alive = _open(alive, tried[PLAIN])
            total = done + len(alive) * len(more)
        if not alive:
            break
        of_seed = (setting, teacher) if folds is None else folds(seed)
        for method in list(alive):
            tell(f"{method.name}, seed {seed}", done, total)
            began = time.perf_counter()
            run = known.get((method.name, seed))
            if run is None:
                run, student = _once(*of_seed, methods[method.name][0], method, seed, situation)
                known[method.name, seed] = run
                if method.name not in kept or run.mean < kept[method.name][0]:
                    kept[method.name] = run.mean, student
            method.runs[seed] = run
            method.seconds += time.perf_counter() - began
            done += 1
        if number == 0 and len(seeds) > 1:
            best = min(alive, key=lambda method: method.runs[seed].mean)
            for method in list(alive):
                if method.name != PLAIN and _clearly_worse(method, best, seed):
                    method.reason = "clearly worse with the first seed, not tried again"
                    alive.remove(method)
                    total -= len(seeds) - 1
    tell("", total, total)
    told = meanings(setting.make_student(seeds[0]), setting.hard)
    regression = not any(kind in (meaning.CLASSES, meaning.INDEPENDENT) for kind in told)
    choice = MethodChoice(list(tried.values()), regression)
    choice.student = kept.get(choice.best, (0.0, None))[1]
    return choice


def _open(methods: Sequence[Method], plain: Method) -> list[Method]:
    """What more seeds are spent on: plain training and what may be better, or nothing."""
    others = [method for method in methods if method is not plain]
    if any(method.is_better(plain) for method in others):
        return []
    hopeful = [method for method in others if max(method.merit(plain)) > 0]
    hopeful = sorted(hopeful, key=lambda method: method.merit(plain), reverse=True)[:_MOST_OPEN]
    return [plain, *hopeful] if hopeful else []


def _once(
    setting: Setting,
    teacher: TeacherLike,
    candidate: Candidate,
    method: Method,
    seed: int,
    situation: Callable[[Any], Situation],
) -> tuple[RowErrors, Any]:
    if method.name == PLAIN:
        return setting.trained(None, None, seed)

    def made(student: keras.Model) -> Made:
        # Losses with weights, and projectors, belong to one distiller.
        found = candidate(situation(student))
        if isinstance(found, str):
            raise ValueError(f"The method `{method.name}` fits not every student: {found}.")
        return found

    return setting.trained(made, teacher, seed)


def _clearly_worse(method: Method, best: Method, seed: int) -> bool:
    own, other = method.runs[seed], best.runs[seed]
    return paired.lower_bound_of_rows(other.errors, own.errors, own.weights) > 0


def prepared(
    candidates: Mapping[str, Candidate], situation: Situation, rows: int
) -> dict[str, tuple[Candidate, Made | str]]:
    """Find out which candidates apply.

    Args:
        candidates: By name.
        situation: What they look at.
        rows: Number of training rows, for each of which the layers that they read are kept.

    Returns:
        For each name the candidate, and what it is here or why it is not tried.
    """
    found: dict[str, tuple[Candidate, Made | str]] = {}
    for name, candidate in candidates.items():
        made = candidate(situation)
        if isinstance(made, Made) and made.taps:
            size = rows * made.features * 4
            if size > MOST_FEATURES:
                made = f"the teacher's layers would take {size / 1e9:.1f} GB"
        found[name] = candidate, made
    return found


def taps_of(methods: Mapping[str, tuple[Candidate, Made | str]]) -> list[str]:
    """The layers of the teacher that any of the methods reads."""
    each = [made for _, made in methods.values() if isinstance(made, Made)]
    return list(dict.fromkeys(tap for made in each for tap in made.taps))


def cost(
    methods: Mapping[str, tuple[Candidate, Made | str]],
    seeds: int,
    setting: Setting,
    asked: int,
    more: int = 0,
    folds: bool = False,
) -> str:
    """Say what the choice will cost, before it begins.

    Args:
        methods: See `prepared`.
        seeds: How many.
        setting: What is the same for all.
        asked: Rows that the teacher is asked about for it.
        more: Seeds that are added where the first ones leave it open.
        folds: Whether every seed has validation rows of its own.
    """
    names = [name for name, (_, made) in methods.items() if isinstance(made, Made)]
    count, rows, held = len(names), setting.train.count, setting.validation.count
    once = f"; the teacher is asked once about {asked:,} rows" if asked else ""
    later = ""
    if more:
        trainings = more * min(count, 1 + _MOST_OPEN)
        later = f" Where they leave it open, {more} more seeds: at most {trainings} trainings more."
    others = f"{seeds} times {held:,} other" if folds and seeds > 1 else f"{held:,}"
    return (
        f"Trying {count} methods ({', '.join(names)}) with {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}: at most {count * seeds} trainings of the student, "
        f"{setting.epochs} {'epoch' if setting.epochs == 1 else 'epochs'} of {rows:,} rows "
        f"each{once}. {others} rows compare them.{later}"
    )


def model_of(teacher: TeacherLike) -> Any:
    """The single Keras model behind a teacher, whose layers can be read, or `None`."""
    if isinstance(teacher, keras.Model):
        return teacher
    models = getattr(teacher, "models", [])
    return models[0] if len(models) == 1 else None


def _spread(mean: float | None, std: float | None, scale: float) -> str:
    if mean is None:
        return "-"
    return f"{scale * mean:.2f}" + ("" if std is None else f" ± {scale * std:.2f}")


def _signed(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{scale * value:+.2f}"

"""The last trainings: the winner, plain training and the defaults with seeds that no trial had."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_kd.export.scratch import working_folder
from keras_kd.export.staged_folder import made_aside
from keras_kd.export.writing import write_file
from keras_kd.search import record
from keras_kd.search.budget import Budget
from keras_kd.search.candidate import Trainer
from keras_kd.search.files import Exporter, Times, latencies
from keras_kd.search.journal import Record
from keras_kd.utils import archives, files, paired

WINNER, PLAIN, DEFAULTS = "winner", "plain", "defaults"
ROLES = (WINNER, PLAIN, DEFAULTS)

LONGER = 3
"""How many times the epochs of a trial, unless the caller says: the next step of the halving."""

STUDENT = "student.keras"

Say = Callable[[str, int, int, str], None]


def within(record: Record) -> bool:
    """Whether a trial was trained to the end and its file is within the budget."""
    return _is_full(record) and not record.said["excess"]


def _is_full(record: Record) -> bool:
    """Whether a trial was trained to the end."""
    return record.state == "done" and not record.said.get("stopped")


def measured(record: Record, timed: Mapping[int, Times]) -> dict[str, float]:
    """The figures of a trial's file, its latency as measured last."""
    file = record.said["file"]
    latency = timed[record.slot].median_ms if record.slot in timed else file["latency_ms"]
    return {
        "error": float(record.said["error"]),
        "bytes": float(file["bytes"]),
        "latency_ms": float(latency),
    }


def front(
    records: Sequence[Record], minimize: Sequence[str], timed: Mapping[int, Times]
) -> list[int]:
    """The trials that no other one is better than in everything.

    Latencies whose quartiles overlap are the same: then the rest decides. Of trials that are alike
    in everything one is kept: the fastest by its median, where that is minimized, else the first.

    Args:
        records: Trials within the budget.
        minimize: The objectives.
        timed: Latencies that were measured together, by slot.

    Returns:
        Their slots, the lowest error first.
    """

    def compare(one: Record, other: Record, name: str) -> int:
        a, b = measured(one, timed)[name], measured(other, timed)[name]
        if name == "latency_ms" and one.slot in timed and other.slot in timed:
            p, q = timed[one.slot], timed[other.slot]
            if p.low_ms <= q.high_ms and q.low_ms <= p.high_ms:
                return 0
        return (a > b) - (a < b)

    def place(one: Record) -> tuple[float, int]:
        # By the slot alone three could beat one another in a circle, as overlaps do not carry on.
        median = measured(one, timed)["latency_ms"] if "latency_ms" in minimize else 0.0
        return median, one.slot

    def beats(one: Record, other: Record) -> bool:
        signs = [compare(one, other, name) for name in minimize]
        return max(signs) <= 0 and (min(signs) < 0 or place(one) < place(other))

    kept = [
        record
        for record in records
        if not any(beats(other, record) for other in records if other is not record)
    ]
    return [r.slot for r in sorted(kept, key=lambda r: (measured(r, timed)["error"], r.slot))]


def winner(
    folder: Path,
    records: Sequence[Record],
    minimize: Sequence[str],
    budget: Budget,
    exporter: Exporter,
) -> dict[str, Any]:
    """Choose the trial that is trained again.

    Args:
        folder: Of the study.
        records: All trials.
        minimize: The objectives.
        budget: Its limits.
        exporter: Has the rows that files answer.

    Returns:
        `trials` (how many there were), `values`, `slot`, `front` and `timed` of the files that were
        timed together; without a file within the budget `values` is `None` and `verdict` says why.
    """
    ended = [record for record in records if record.state != "running"]
    fitting = [record for record in ended if within(record)]
    timed: dict[int, Times] = {}
    if fitting and ("latency_ms" in minimize or budget.latency_ms is not None):
        rest = fitting
        while rest:
            # By the latencies of each trial's own time, with room for their noise.
            best = front(rest, minimize, {})
            near = [record for record in rest if record.slot in best]
            paths = [folder / "trials" / f"{record.slot}.tflite" for record in near]
            timed |= {r.slot: t for r, t in zip(near, latencies(paths, exporter.validation))}
            limit = math.inf if budget.latency_ms is None else budget.latency_ms
            fitting = [r for r in near if timed[r.slot].low_ms <= limit]
            # Where none of them is fast enough any more, the next best ones may be.
            rest = [] if fitting else [r for r in rest if r not in near]
    said: dict[str, Any] = {
        "trials": len(ended),
        "front": front(fitting, minimize, timed),
        "timed": {str(slot): asdict(times) for slot, times in timed.items()},
    }
    if not fitting:
        return {
            **said,
            "values": None,
            "verdict": f"not reachable: {_nearest(ended, budget, timed)}",
        }
    chosen = min(
        fitting,
        key=lambda r: (
            measured(r, timed)["error"],
            measured(r, timed)["bytes"],
            # Of equals the one that needs no search.
            ("plain", "defaults", "").index(r.role),
            r.slot,
        ),
    )
    return {**said, "slot": chosen.slot, "values": chosen.values}


def _nearest(records: Sequence[Record], budget: Budget, timed: Mapping[int, Times]) -> str:
    """Say which file came nearest to the budget, its latency as measured last."""
    known = [r for r in records if (r.said.get("file") or r.said.get("weighed") or {}).get("bytes")]
    if not known:
        return "no trial gave a file"

    def file(record: Record) -> dict[str, Any]:
        found = dict(record.said.get("file") or record.said["weighed"])
        if record.slot in timed:
            last = timed[record.slot]
            found |= {"latency_ms": last.median_ms, "low_ms": last.low_ms}
        return found

    def worst(record: Record) -> float:
        excess = budget.excess(file(record)["bytes"], file(record)["low_ms"])
        return max(excess.values(), default=0.0)

    best = min(known, key=worst)
    made = file(best)
    limits = [
        f"{made['bytes']:,} bytes" + (f" of {budget.bytes:,}" if budget.bytes else ""),
        f"{made['latency_ms']:.3g} ms"
        + (f" of {budget.latency_ms:g}" if budget.latency_ms else ""),
    ]
    refused = [f"{name} answers `{said}`" for name, said in made["refused"].items()]
    return f"the nearest file of {len(records)} trials has {'; '.join(limits + refused)}"


class Length(NamedTuple):
    """How many epochs each of the last trainings has, and about how many seconds all of them take.

    Args:
        epochs: Of each.
        seconds: Of all of them; 0 where no trial was trained to its end.
    """

    epochs: int
    seconds: float


def length(
    records: Sequence[Record], epochs: int, given: int | None, seeds: int, minutes: float | None
) -> Length:
    """Say how long the last trainings are.

    Args:
        records: The trials so far.
        epochs: Of a trial.
        given: What the caller asked for, `None` for `LONGER` times the epochs of a trial, or as
            many where that would take more than half of the minutes.
        seeds: Of each role.
        minutes: Of the search, `None` without a limit.
    """
    full = [r.ended - r.began for r in records if _is_full(r) and r.ended and r.began]
    short = len(ROLES) * seeds * float(np.mean(full)) if full else 0.0
    if given is not None:
        return Length(given, short * given / epochs)
    if minutes is not None and LONGER * short > 60 * minutes / 2:
        return Length(epochs, short)
    return Length(LONGER * epochs, LONGER * short)


class Finals:
    """The last trainings of a study.

    Args:
        folder: Of the study.
        trainer: Trains them, for as many epochs as it has.
        exporter: Makes their files.
        seeds: How many; the seeds are 1, 2, ...
        values: Of the winner.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        exporter: Exporter,
        seeds: int,
        values: Mapping[str, Any],
    ) -> None:
        self.folder = folder
        self.trainer = trainer
        self.exporter = exporter
        self.seeds = range(1, seeds + 1)
        fixed = {"method": "default", "alpha": 0.5, "temperature": 1.0}
        self.values = {
            WINNER: dict(values),
            PLAIN: {**values, **fixed, "method": "plain", "alpha": 1.0},
            DEFAULTS: {**values, **fixed},
        }

    def train(self, say: Say) -> None:
        """Train what is not trained yet, beside other processes that do the same."""
        tasks = [(role, seed) for seed in self.seeds for role in ROLES]
        waits = True
        while waits:
            waits = False
            for number, (role, seed) in enumerate(tasks):
                path = self._path(role, seed, "json")
                if path.exists():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with files.claimed(self._path(role, seed, "lock"), lambda owner: owner):
                        if not path.exists():
                            say("train again", number, len(tasks), f"{role}, seed {seed}")
                            self._run(role, seed)
                except BlockingIOError:
                    waits = True
            if waits:
                time.sleep(0.2)
        say("train again", len(tasks), len(tasks), "")

    def result(self, role: str, seed: int) -> dict[str, Any]:
        """Return what was measured: `error`, and the fields of `Weighed` as `file`."""
        return dict(json.loads(archives.read_bytes(self._path(role, seed, "json"))))

    def conclude(
        self,
        chosen: Mapping[str, Any],
        regression: bool,
        budget: Budget,
        say: Say,
        least: float | None = None,
    ) -> dict[str, Any]:
        """Decide between the three, and export the best student of the one that is kept.

        Args:
            chosen: See `winner`.
            regression: Whether errors are mean squared ones.
            budget: What the file has to keep to.
            say: Hears of it.
            least: Share of right answers that is asked for: where what is kept does not reach it,
                the one of the three is taken that comes nearest.

        Returns:
            The result as plain JSON values.
        """
        errors = {role: [self.result(role, seed)["error"] for seed in self.seeds] for role in ROLES}
        kept, verdict = decide(errors, regression)
        if self.values[WINNER] == self.values[PLAIN]:
            kept, verdict = PLAIN, "keep plain training: no trial with the teacher had less error"
        elif self.values[WINNER] == self.values[DEFAULTS]:
            gain = paired.lower_bound(np.subtract(errors[PLAIN], errors[DEFAULTS]).tolist())
            kept = DEFAULTS if gain > 0 else PLAIN
            verdict = f"keep {'the defaults' if gain > 0 else 'plain training'}: {_THE_SAME}"
        found = {role: self._least(role, budget) for role in ROLES}
        best = min(ROLES, key=lambda role: found[role])
        if least is not None and not reaches(found[kept], least) and found[best] < found[kept]:
            reach = "reaches" if reaches(found[best], least) else "comes nearest to"
            verdict += f"; but {_NAMES[best]} {reach} the accuracy that is asked for"
            kept = best
        made = {s: self.result(kept, s)["file"] for s in self.seeds}
        beyond = {s: _worst(file, budget) for s, file in made.items()}
        fitting = [s for s in self.seeds if beyond[s] <= 0]
        said = {**chosen, "kept": kept, "verdict": verdict, "errors": errors, "least": least}
        if not fitting:
            file = made[min(self.seeds, key=lambda s: beyond[s])]
            return {
                **said,
                "verdict": "not reachable: trained again, the nearest file has "
                f"{file['bytes']:,} bytes and {file['latency_ms']:.3g} ms",
            }
        seed = min(fitting, key=lambda s: errors[kept][s - 1])
        say("export", 0, 1, f"{kept}, seed {seed}")
        run = self.result(kept, seed)
        exported = {"bytes": run["file"]["bytes"], **self._export(kept, seed)}
        say("export", 1, 1, "")
        if _worst({"bytes": exported["bytes"], "low_ms": None}, budget) > 0:
            return {
                **said,
                "verdict": f"not reachable: exported again, the file has {exported['bytes']:,} "
                f"bytes of {budget.bytes:,}, as names of layers and inputs that Keras counts up "
                "are part of it. Give them names in `build`",
            }
        return {
            **said,
            "best": {
                **self.values[kept],
                "seed": seed,
                "epochs": self.trainer.epochs,
                "error": run["error"],
                "latency_ms": run["file"]["latency_ms"],
                **exported,
            },
        }

    def _least(self, role: str, budget: Budget) -> float:
        """The least error of a role's files within the budget; infinite where there is none."""
        runs = [self.result(role, seed) for seed in self.seeds]
        return min((r["error"] for r in runs if _worst(r["file"], budget) <= 0), default=math.inf)

    def _run(self, role: str, seed: int) -> None:
        twin = next(r for r in ROLES if self.values[r] == self.values[role])
        if twin != role and self._path(twin, seed, "json").exists():
            for suffix in ("npz", "tflite"):
                same = self._path(twin, seed, suffix).read_bytes()
                write_file(self._path(role, seed, suffix), same)
            write_file(self._path(role, seed, "json"), json.dumps(self.result(twin, seed)) + "\n")
            return
        student, _ = self.trainer.trained(self.values[role], seed)
        with working_folder() as scratch:
            precision = str(self.values[role]["precision"])
            made, found = self.exporter.export(student, scratch / "file", precision)
            if made is None:
                raise ArithmeticError(f"The last training of {role} gave no file: {found.reason}.")
            error = self.exporter.errors(made, student).mean
            with files.replacing(self._path(role, seed, "tflite")) as stream:
                stream.write(made.read_bytes())
        arrays = {f"w{i}": array for i, array in enumerate(student.get_weights())}
        write_file(self._path(role, seed, "npz"), record.packed(**arrays))
        said = {"error": error, "file": asdict(found)}
        write_file(self._path(role, seed, "json"), json.dumps(said) + "\n")

    def _export(self, role: str, seed: int) -> dict[str, Any]:
        """Export the student of a run in full, with labels, into a folder of that run.

        The file of the best student before stays what the result on disk says of it, until that
        names the new one.
        """
        values = self.values[role]
        student = self.trainer.student(values, seed)
        twin = next(
            r for r in ROLES if self._path(r, seed, "npz").exists() and self.values[r] == values
        )
        arrays = archives.arrays(self._path(twin, seed, "npz"))
        student.set_weights([arrays[f"w{i}"] for i in range(len(arrays))])
        target = self._path(role, seed, "npz").with_suffix("")
        held = self.trainer.validation
        evaluation = (held.x, held.y) if held.weight is None else (held.x, held.y, held.weight)
        with made_aside(target, overwrite=True, beside=(STUDENT,)) as made:
            precision = str(values["precision"])
            report = self.exporter.report(student, made, precision, evaluation)
            # Whatever cannot be saved is made by the user's own function again.
            with (
                contextlib.suppress(ValueError, TypeError),
                files.replacing_by_name(made / STUDENT) as name,
            ):
                student.save(name)
        first = report.artifacts[0]
        file = target.relative_to(self.folder) / (first.file or "")
        return {"file": file.as_posix(), "bytes": first.bytes}

    def _path(self, role: str, seed: int, suffix: str) -> Path:
        told = json.dumps([self.values[WINNER], self.trainer.epochs], sort_keys=True)
        of_winner = hashlib.sha256(told.encode()).hexdigest()[:16]
        return self.folder / "finals" / of_winner / f"{role}-{seed}.{suffix}"


_THE_SAME = "no trial had less error"


def decide(errors: Mapping[str, Sequence[float]], regression: bool) -> tuple[str, str]:
    """Say what is kept: the winner, the defaults, or plain training.

    Args:
        errors: Of each role, one a seed, in the same order.
        regression: Whether they are mean squared ones.

    Returns:
        The role and the verdict.
    """
    scale, unit = (1.0, "of the mean squared error") if regression else (100.0, "points")

    def gain(one: str, other: str) -> tuple[float, float]:
        differences = [b - a for a, b in zip(errors[one], errors[other])]
        return scale * float(np.mean(differences)), scale * paired.lower_bound(differences)

    over = {other: gain(WINNER, other) for other in (PLAIN, DEFAULTS)}
    told = ", ".join(
        f"{mean:+.3g} {unit} over {_NAMES[other]} (at least {bound:+.3g} at 95 %)"
        for other, (mean, bound) in over.items()
    )
    seeds = f"{len(errors[WINNER])} seeds that no trial had"
    if all(bound > 0 for _, bound in over.values()):
        return WINNER, f"take the winner: {told}; {seeds}"
    bound = gain(DEFAULTS, PLAIN)[1]
    kept = DEFAULTS if bound > 0 else PLAIN
    return kept, f"keep {_NAMES[kept]}: the winner gains {told}; {seeds}"


_NAMES = {WINNER: "the winner", PLAIN: "plain training", DEFAULTS: "the defaults"}


def reaches(error: float, least: float) -> bool:
    """Whether files with a share of wrong answers are right as often as is asked for."""
    return 1 - error >= least - 1e-9


def _worst(file: Mapping[str, Any], budget: Budget) -> float:
    """How far a file is beyond the budget, at most 0 within it."""
    return max(budget.excess(file["bytes"], file["low_ms"]).values(), default=0.0)


def trials_of(path: Path) -> int | None:
    """How many trials there were when a file was written; `None` without it."""
    return int(json.loads(archives.read_bytes(path))["trials"]) if path.exists() else None


def is_concluded(path: Path, trials: int, least: float | None) -> bool:
    """Whether a result is that of so many trials, or of more by another process.

    Args:
        path: Of the result.
        trials: How many there are.
        least: Share of right answers that is asked for.
    """
    if not path.exists():
        return False
    said = json.loads(archives.read_bytes(path))
    more = int(said["trials"]) - trials
    return more > 0 or (more == 0 and said.get("least") == least)

"""Trials of one study in a folder, shared by processes that may be killed at any moment.

Optuna proposes values and keeps what became of them in its journal. What it lacks is here: a lock
that a killed process does not keep, a torn last line that does not spoil what follows, trials of
dead processes that are done again with the same values, and a seed for every trial, so that a
search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from keras_kd.utils import files

_WAIT = 120.0
"""Seconds to wait for a lock that is held for milliseconds at a time."""

_NAME = "tune"


@dataclass(frozen=True)
class Record:
    """One trial as the journal has it.

    Args:
        slot: Its number; a trial that is done again has that of the one whose process died.
        role: `"plain"` or `"defaults"` of the references, else empty.
        values: Its values by parameter.
        state: `"running"`, `"done"` or `"beyond"` (the budget).
        said: What was noted of it, by name.
        began: Seconds since 1970.
        ended: The same; `None` while it runs.
    """

    slot: int
    role: str
    values: dict[str, Any]
    state: str
    said: dict[str, Any] = field(repr=False)
    began: float | None = None
    ended: float | None = None


Reference = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""A trial that comes first: its role, the values that Optuna knows of, and all values."""


class Trials:
    """The trials of a study, for one of the processes that work on it.

    Args:
        folder: Of the study.
        objectives: Names of what is minimized.
        ranges: What Optuna chooses from, by parameter.
        seed: Of the proposals.
        random: Whether values are drawn at random, without looking at earlier trials.
    """

    def __init__(
        self,
        folder: Path,
        objectives: Sequence[str],
        ranges: Mapping[str, BaseDistribution],
        seed: int,
        random: bool = False,
    ) -> None:
        self.folder = folder
        self._ranges = dict(ranges)
        self._seed = seed
        self._random = random
        self.worker = uuid.uuid4().hex
        (folder / "workers").mkdir(exist_ok=True)
        path = folder / "journal.log"
        lock = _Lock(folder / "journal.lock")
        lock.acquire()
        try:
            mend(path)
        finally:
            lock.release()
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
        with self._asking():
            self._study = optuna.create_study(
                storage=storage,
                study_name=_NAME,
                directions=["minimize"] * len(objectives),
                load_if_exists=True,
            )

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Be known as alive: trials that begin inside are given up when this process is no more."""
        path = self._worker_lock(self.worker)
        with files.claimed(path, lambda owner: f"`{path}` is held by process {owner}."):
            yield

    def propose(
        self,
        references: Sequence[Reference],
        most: int | None,
    ) -> Trial | None:
        """Take the next trial.

        Args:
            references: Trials that come first.
            most: Trials of the study, `None` without a limit.

        Returns:
            The trial, or `None` where all have begun.
        """
        with self._asking():
            self._give_up_dead()
            living = self._living()
            roles = {trial.user_attrs.get("role", "") for trial in living}
            taken = {trial.user_attrs["slot"] for trial in living if "slot" in trial.user_attrs}
            for role, searched, values in references:
                if role not in roles:
                    slot = _free(taken)
                    taken.add(slot)
                    said = {"slot": slot, "role": role, "values": dict(values)}
                    self._study.enqueue_trial(dict(searched), user_attrs=said)
            waiting = any(t.state == TrialState.WAITING for t in self._trials())
            slot = _free(taken)
            if not waiting and most is not None and slot >= most:
                return None
            # From the seed of the slot the same history leads to the same values.
            self._study.sampler = self._sampler(self._seed * 1_000_003 + slot)
            trial = self._study.ask(self._ranges)
            if "slot" not in trial.user_attrs:
                trial.set_user_attr("slot", slot)
            trial.set_user_attr("worker", self.worker)
        return Trial(self, trial)

    def records(self) -> list[Record]:
        """Return the trials that have begun and were not given up, in order."""
        states = {
            TrialState.RUNNING: "running",
            TrialState.COMPLETE: "done",
            TrialState.PRUNED: "beyond",
        }
        found = []
        for trial in self._trials():
            if trial.state not in states or "worker" not in trial.user_attrs:
                continue
            said = trial.user_attrs
            found.append(
                Record(
                    said["slot"],
                    said.get("role", ""),
                    {**trial.params, **said.get("values", {})},
                    states[trial.state],
                    dict(said),
                    _seconds(trial.datetime_start),
                    _seconds(trial.datetime_complete),
                )
            )
        return sorted(found, key=lambda record: record.slot)

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        if self._random:
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=10)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _living(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self._trials() if trial.state != TrialState.FAIL]

    def _give_up_dead(self) -> None:
        """Do the trials again that processes had begun which are no more."""
        alive: dict[str, bool] = {self.worker: True}
        for trial in self._trials():
            if trial.state != TrialState.RUNNING:
                continue
            worker = trial.user_attrs.get("worker")
            # Nobody else is asking now: one without a worker was killed while it asked.
            if worker is not None:
                if worker not in alive:
                    alive[worker] = self._is_alive(worker)
                if alive[worker]:
                    continue
            self._study.tell(trial.number, state=TrialState.FAIL)
            said = {k: v for k, v in trial.user_attrs.items() if k in ("slot", "role", "values")}
            if set(trial.params) >= set(self._ranges) and "slot" in said:
                self._study.enqueue_trial(dict(trial.params), user_attrs=said)
            elif "role" in said:
                fixed = trial.system_attrs.get("fixed_params", {})
                self._study.enqueue_trial(dict(fixed), user_attrs=said)

    def _is_alive(self, worker: str) -> bool:
        try:
            with files.claimed(self._worker_lock(worker), lambda owner: owner):
                return False
        except BlockingIOError:
            return True

    def _worker_lock(self, worker: str) -> Path:
        return self.folder / "workers" / f"{worker}.lock"

    def _asking(self) -> contextlib.AbstractContextManager[Any]:
        return files.claimed(
            self.folder / "ask.lock",
            lambda owner: f"`{self.folder}` is held by process {owner}. Call this again.",
            _WAIT,
        )


class Trial:
    """A trial that this process works on.

    Args:
        trials: Of the study.
        trial: Optuna's.
    """

    def __init__(self, trials: Trials, trial: optuna.trial.Trial) -> None:
        self._trials = trials
        self._trial = trial
        said = trial.user_attrs
        self.slot: int = said["slot"]
        self.role: str = said.get("role", "")
        self.searched = dict(trial.params)
        self.values: dict[str, Any] | None = said.get("values")

    def note(self, **said: object) -> None:
        """Keep plain JSON values with the trial.

        Args:
            **said: Values by name.
        """
        for name, value in said.items():
            self._trial.set_user_attr(name, value)

    def done(self, objectives: Sequence[float], excess: Mapping[str, float]) -> None:
        """End it with what was measured.

        Args:
            objectives: One number each.
            excess: By limit how far it is beyond it, at most 0 within.
        """
        for name, value in excess.items():
            self._trial.set_constraint(name, float(value))
        self._trials._study.tell(self._trial, [float(value) for value in objectives])

    def beyond(self, excess: Mapping[str, float]) -> None:
        """End it without a training.

        Args:
            excess: By limit how far it is beyond it; one is above 0.
        """
        for name, value in excess.items():
            self._trial.set_constraint(name, float(value))
        self._trials._study.tell(self._trial, state=TrialState.PRUNED)


def read(folder: Path, about: Mapping[str, Any]) -> list[Record]:
    """Read the trials of a study that may be at work.

    Args:
        folder: Of the study.
        about: What its record says of it.
    """
    with quietly():
        return Trials(folder, about["minimize"], {}, 0).records()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep Optuna from logging every trial inside."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def distribution(found: Any) -> BaseDistribution:
    """What Optuna calls a range of `keras_kd.search.space`.

    Args:
        found: Its `to_json()`.
    """
    ((kind, values),) = found.items()
    if kind == "choice":
        return CategoricalDistribution(tuple(values))
    return FloatDistribution(float(values[0]), float(values[1]), log=kind == "log")


def spent(records: Sequence[Record], since: float, now: float) -> float:
    """Seconds during which at least one process worked.

    Args:
        records: Trials.
        since: When this process began, in seconds since 1970.
        now: The time.
    """
    spans = [(since, now)]
    spans += [(r.began, r.ended) for r in records if r.began is not None and r.ended is not None]
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def mend(path: Path) -> None:
    """Cut off a last line that was not written to its end: Optuna would append to it.

    Args:
        path: The journal, which nobody else may be writing.

    Raises:
        ValueError: If another line is damaged.
    """
    if not path.exists():
        return
    blob = path.read_bytes()
    whole = blob[: blob.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"Line {number} of `{path}` is damaged. Restore it, or begin in another folder."
            ) from error
    if len(whole) < len(blob):
        with open(path, "r+b") as stream:
            stream.truncate(len(whole))
            stream.flush()
            os.fsync(stream.fileno())


class _Lock(JournalFileOpenLock):
    """A lock of the system, which goes with its holder: Optuna's own outlives it by 30 seconds."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), grace_period=None)
        self._path = path
        self._held: contextlib.ExitStack | None = None

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        stack = contextlib.ExitStack()
        stack.enter_context(
            files.claimed(
                self._path, lambda owner: f"`{self._path}` is held by process {owner}.", _WAIT
            )
        )
        self._held = stack
        return True

    def release(self) -> None:
        """Give it back."""
        held, self._held = self._held, None
        if held is not None:
            held.close()


def _free(taken: set[int]) -> int:
    slot = 0
    while slot in taken:
        slot += 1
    return slot


def _seconds(time: datetime.datetime | None) -> float | None:
    return None if time is None else time.timestamp()

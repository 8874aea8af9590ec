"""The journal of a search: shared by processes, killed at any moment, gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from keras_kd.search import journal
from keras_kd.search.journal import Record, Trials

RANGES = {
    "a": journal.distribution({"float": [0.0, 1.0]}),
    "b": journal.distribution({"log": [1.0, 20.0]}),
    "c": journal.distribution({"choice": ["x", "y"]}),
}
REFERENCES = [
    ("plain", {"a": 1.0, "b": 1.0, "c": "x"}, {"a": 1.0, "b": 1.0, "c": "x", "d": 0}),
    ("defaults", {"a": 0.5, "b": 1.0, "c": "x"}, {"a": 0.5, "b": 1.0, "c": "x", "d": 0}),
]


def objective(values):
    return (values["a"] - 0.3) ** 2 + abs(values["b"] - 4) / 20 + (values["c"] == "y")


def opened(folder, **options):
    with journal.quietly():
        return Trials(folder, ["error"], RANGES, 3, **options)


def work(trials, most, end=None):
    """Do trials, of which the last one of `end` is left as a kill would leave it."""
    done = 0
    while True:
        trial = trials.propose(REFERENCES, most)
        if trial is None:
            return
        done += 1
        if end is not None and done == end:
            return
        values = trial.values or trial.searched
        trial.note(error=objective(values), excess={})
        if values["c"] == "y" and not trial.role:
            trial.beyond({"bytes": 0.5})
        else:
            trial.done([objective(values)], {"bytes": -0.1})


def listed(trials):
    return [(r.slot, r.role, r.state, sorted(r.values.items())) for r in trials.records()]


@pytest.mark.parametrize("killed_at", [1, 2, 6, 13])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, killed_at):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = opened(tmp_path / "whole")
    with whole.working():
        work(whole, 16)
    # Past the random start, so that TPE looks at what came before.
    assert len(listed(whole)) == 16
    first = opened(tmp_path / "killed")
    with first.working():
        work(first, 16, end=killed_at)
    again = opened(tmp_path / "killed")
    with again.working():
        work(again, 16)
    assert listed(again) == listed(whole)


def test_references_come_first_and_once(tmp_path):
    trials = opened(tmp_path)
    with trials.working():
        work(trials, 4)
        work(trials, 6)
    records = trials.records()
    assert [r.role for r in records] == ["plain", "defaults", "", "", "", ""]
    assert records[0].values == {"a": 1.0, "b": 1.0, "c": "x", "d": 0}
    assert [r.slot for r in records] == list(range(6))
    assert {r.state for r in records} <= {"done", "beyond"}


def test_a_torn_last_line_spoils_nothing(tmp_path):
    trials = opened(tmp_path)
    with trials.working():
        work(trials, 3)
    path = tmp_path / "journal.log"
    before = path.read_bytes()
    path.write_bytes(before + b'{"op_code": 4, "worker')
    again = opened(tmp_path)
    assert path.read_bytes().startswith(before)
    with again.working():
        work(again, 5)
    assert len(listed(opened(tmp_path))) == 5
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_damaged_line_is_named(tmp_path):
    trials = opened(tmp_path)
    with trials.working():
        work(trials, 2)
    path = tmp_path / "journal.log"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "{oops\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"Line 4 of .*journal\.log. is damaged"):
        opened(tmp_path)


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_journal import *
trials = opened(Path({folder!r}))
with trials.working():
    while (trial := trials.propose(REFERENCES, 12)) is not None:
        print(trial.slot, flush=True)
        time.sleep({pause})
        values = trial.values or trial.searched
        trial.note(error=objective(values), excess={{}})
        trial.done([objective(values)], {{}})
"""


def test_three_processes_share_a_folder_and_one_is_killed(tmp_path):
    def begin(pause):
        code = WORKER.format(here=str(Path(__file__).parent), folder=str(tmp_path), pause=pause)
        root = str(Path(journal.__file__).parents[2])
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )

    # The first would never come to the end of its first trial.
    stuck = begin(600)
    held = int(stuck.stdout.readline())
    others = [begin(0.05), begin(0.05)]
    slots = [int(others[0].stdout.readline())]
    stuck.send_signal(signal.SIGKILL)
    stuck.wait()
    for other in others:
        slots += [int(line) for line in other.stdout.read().split()]
        assert other.wait() == 0
    stuck.stdout.close()
    assert sorted(slots) == list(range(12)), "each slot is done once by those that live"
    assert held in slots
    records = opened(tmp_path).records()
    assert [(r.slot, r.state) for r in records] == [(i, "done") for i in range(12)]
    assert not list((tmp_path / "workers").iterdir())


def test_time_that_several_processes_spend_together_counts_once():
    def record(began, ended):
        return Record(0, "", {}, "done", {}, began, ended)

    records = [record(0, 10), record(5, 12), record(20, 30), record(40, None)]
    assert journal.spent(records, 100, 107) == pytest.approx(12 + 10 + 7)
    assert journal.spent([], 100, 107) == 7

"""A writer that is stopped, or disturbed, at every single step: never a wrong cache, never two."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_kd import cache
from keras_kd.cache.reader import Records

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork")


class Writers:
    """The process that forks the writers."""

    def __init__(self):
        self.driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stepped_writers.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KERAS_BACKEND": "numpy"},
        )

    def __call__(self, path, when=0, what="nothing", whose="ours"):
        """The exit code, the number of steps, and how this writer and the other one ended."""
        self.driver.stdin.write(json.dumps([str(path), when, what, whose]) + "\n")
        self.driver.stdin.flush()
        return json.loads(self.driver.stdout.readline())

    def stop(self):
        self.driver.stdin.close()
        self.driver.wait(60)


@pytest.fixture(scope="module")
def write():
    writers = Writers()
    yield writers
    writers.stop()


def files(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def whole(write, tmp_path_factory):
    """The files of both caches, and how many steps one takes."""
    found = {}
    for whose in ("ours", "theirs"):
        path = tmp_path_factory.mktemp("whole") / "cache"
        code, steps, said, _ = write(path, whose=whose)
        assert (code, said) == (0, "complete")
        found[whose] = files(path)
    # Two shards, each of three files and a lock, and the manifest twice.
    assert 50 < steps < 150
    return found, steps


def there(path):
    """Whose finished cache lies in a folder, checked in every byte."""
    try:
        return cache.verify(path).teacher["name"]
    except (OSError, ValueError):
        return None


@pytest.mark.parametrize("what", ["kill", "full"])
def test_stopped_at_every_step_and_continued(write, whole, tmp_path, what):
    expected, steps = whole
    for step in range(1, steps + 1):
        path = tmp_path / str(step)
        code, _, said, _ = write(path, step, what)
        if what == "kill":
            assert code == -signal.SIGKILL
        else:
            assert code == 0
            # A folder that cannot be synced, or a rest that cannot be removed, is no error.
            assert said == "complete" or "No space left" in said or "cannot be written" in said
            if said == "complete":
                assert there(path) == "ours"
        assert there(path) in (None, "ours"), step
        assert write(path)[2] == "complete", step
        assert files(path) == expected["ours"], step
        shutil.rmtree(path)


@pytest.mark.parametrize("what", ["other", "unlocked"])
def test_another_teacher_writes_the_same_cache_at_every_step(write, whole, tmp_path, what):
    _, steps = whole
    winners = set()
    for step in range(1, steps + 1):
        path = tmp_path / str(step)
        path.mkdir()
        code, _, ours, theirs = write(path, step, what)
        assert code == 0
        ended = [name for name, said in (("ours", ours), ("theirs", theirs)) if said == "complete"]
        # Where a lock was removed by hand both may be refused.
        assert len(ended) == 1 or (not ended and what == "unlocked"), (step, ours, theirs)
        assert [there(path)] == (ended or [None]), (step, ours, theirs)
        winners |= set(ended)
        shutil.rmtree(path)
    assert winners == {"ours", "theirs"}


def test_another_teacher_replaces_the_cache_at_every_step(write, whole, tmp_path):
    _, steps = whole
    for step in range(1, steps + 1):
        path = tmp_path / str(step)
        path.mkdir()
        code, _, ours, theirs = write(path, step, "replaced")
        assert code == 0
        # It came last. Only what is left to do after the last manifest may end well.
        assert theirs == "complete", step
        assert ours != "complete" or step > steps - 15, step
        assert there(path) == "theirs", (step, ours)
        shutil.rmtree(path)


def test_a_twin_writes_the_same_cache_at_every_step(write, whole, tmp_path):
    expected, steps = whole
    for step in range(1, steps + 1):
        path = tmp_path / str(step)
        path.mkdir()
        code, _, ours, theirs = write(path, step, "twin")
        assert code == 0
        assert "complete" in (ours, theirs), (step, ours, theirs)
        for said in (ours, theirs):
            assert said == "complete" or said.startswith("BlockingIOError"), (step, said)
        assert there(path) == "ours"
        assert write(path)[2] == "complete"
        assert files(path) == expected["ours"], step
        shutil.rmtree(path)


def test_the_records_are_those_of_the_teacher(whole, tmp_path):
    # Both caches are what they say, so that one taken for the other would show.
    found = []
    for whose in ("ours", "theirs"):
        path = tmp_path / whose
        path.mkdir()
        for name, content in whole[0][whose].items():
            (path / name).write_bytes(content)
        found.append(Records(path).read(np.arange(30))["logits_0"])
    assert not np.allclose(found[0], found[1], atol=0.1)

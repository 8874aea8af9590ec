"""A writer that is killed at any point is continued: the same bytes, nothing done twice."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keras_kd.cache.reader import Records

# Keras is loaded once, on the backend that starts fastest; each line of its input is then a writer
# in a fork of its own. It answers with the exit code and the batches that the teacher answered.
_WRITERS = """
import json, os, signal, sys
import numpy as np
import keras
from keras_kd import cache
from keras_kd.cache import shards, storage, writer

keras.utils.set_random_seed(0)
inputs = keras.Input((4,))
teacher = keras.Model(inputs, keras.layers.Dense(6)(inputs))
x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")

def augment(sample, seed):
    return sample * (1 + seed % 7)

def write(path, where, when, report):
    def counted(function, calls=[]):
        def run(*arguments):
            calls.append(1)
            if len(calls) == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        return run

    def answer(self, x, epoch, row, count, original=writer._Writer._answer):
        os.write(report, f"{epoch}:{row} ".encode())
        return original(self, x, epoch, row, count)

    writer._Writer._answer = answer
    if where == "append":
        shards.Shard.append = counted(shards.Shard.append)
    elif where == "rename":
        os.replace = counted(os.replace)
    elif where == "say":
        storage.write_text = counted(storage.write_text)
    cache.write(teacher, x, path, augment=augment, epochs=2, batch_size=8, shard_size=20)

for line in sys.stdin:
    path, where, when = json.loads(line)
    heard, report = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(path, where, when, report)
            code = 0
        finally:
            os._exit(code)
    os.close(report)
    rows = b"".join(iter(lambda: os.read(heard, 4096), b"")).decode().split()
    os.close(heard)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, rows]), flush=True)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork")


@pytest.fixture(scope="module")
def write() -> Iterator[Callable[..., tuple[int, list[str]]]]:
    """`write(path, where, when)`: the exit code, and `epoch:row` of each batch answered."""
    driver = subprocess.Popen(
        [sys.executable, "-c", _WRITERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "numpy"},
    )

    def run(path: Path, where: str = "nowhere", when: int = 0) -> tuple[int, list[str]]:
        driver.stdin.write(json.dumps([str(path), where, when]) + "\n")
        driver.stdin.flush()
        code, rows = json.loads(driver.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code, rows

    yield run
    driver.stdin.close()
    driver.wait(60)


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def whole(write: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("whole")
    code, rows = write(path)
    assert code == 0
    return _files(path), rows


@pytest.mark.parametrize(
    ("where", "when", "finished"),
    [
        # In the middle of the second shard of the first epoch, with half-written records.
        ("append", 5, 1),
        # Before the records of that shard have their name (the manifest was the first file to
        # get one, then four for each shard).
        ("rename", 6, 1),
        # When the records have it, and nothing says so yet.
        ("say", 6, 4),
    ],
)
def test_killed_and_continued(tmp_path, write, whole, where, when, finished):
    files, rows = whole
    code, first = write(tmp_path, where, when)
    assert code == -signal.SIGKILL
    with pytest.raises(ValueError, match="half written"):
        Records(tmp_path)
    entries = sorted(tmp_path.glob("shard-*.json"))
    assert len(entries) == finished
    kept = [
        tmp_path / file.name.replace("shard", "records").replace("json", "bin") for file in entries
    ]
    stamps = [file.stat().st_mtime_ns for file in kept]
    code, second = write(tmp_path)
    assert code == 0
    assert _files(tmp_path) == files
    assert [file.stat().st_mtime_ns for file in kept] == stamps
    # Each shard of 20 rows takes batches of 8, 8 and 4.
    assert second == rows[3 * finished :]
    assert first == rows[: len(first)]

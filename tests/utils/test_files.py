"""Files that appear whole or not at all, and what a killed process leaves of them."""

import os
import signal
import subprocess
import sys

import pytest

from keras_kd.utils import files

PROGRAM = """
import os, sys, time
from keras_kd.utils import files

with files.{writer}(sys.argv[1]) as given:
    if isinstance(given, os.PathLike):
        with open(given, "wb") as file:
            file.write(b"half")
    else:
        given.write(b"half")
        given.flush()
    print("half", flush=True)
    time.sleep(60)
"""


def begun(writer, path):
    """A process that has written half of a file."""
    code = PROGRAM.format(writer=writer)
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    return process


def write(writer, path, content=b"new"):
    with getattr(files, writer)(path) as given:
        if isinstance(given, os.PathLike):
            given.write_bytes(content)
        else:
            given.write(content)


WRITERS = ["replacing", "replacing_by_name"]


@pytest.mark.parametrize("writer", WRITERS)
def test_the_next_writer_clears_what_a_killed_one_left(writer, tmp_path):
    path = tmp_path / "student.keras"
    path.write_bytes(b"old")
    # No temporary names of this file, or nothing that was written.
    others = [".other.0123456789abcdef.tmp.keras", ".student.0123.tmp.keras", "student.tmp.keras"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".student.0123456789abcdef.tmp.keras").symlink_to(path)
    first = begun(writer, path)
    second = begun(writer, path)
    try:
        assert len(os.listdir(tmp_path)) == 1 + len(others) + 1 + 2
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert path.read_bytes() == b"old"
        write(writer, path)
        # What the other one is writing stays, and so does what is no file.
        assert path.read_bytes() == b"new"
        assert len(os.listdir(tmp_path)) == 1 + len(others) + 1 + 1
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
            process.stdout.close()
    write(writer, path, b"newer")
    assert path.read_bytes() == b"newer"
    assert {*others, "student.keras"} < set(os.listdir(tmp_path))
    assert len(os.listdir(tmp_path)) == 1 + len(others) + 1


@pytest.mark.parametrize("writer", WRITERS)
def test_an_error_leaves_the_file_before_and_nothing_else(writer, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    class StopError(Exception):
        pass

    with pytest.raises(StopError), getattr(files, writer)(path):
        raise StopError
    assert os.listdir(tmp_path) == ["a.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["a" * 240 + ".json", "é" * 120, ".hidden", "no_suffix", "a.b.c"])
def test_any_name_of_a_file_can_be_written(writer, name, tmp_path):
    write(writer, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"new"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_system_without_locks_is_written_all_the_same(writer, tmp_path, monkeypatch):
    def none(handle):
        raise OSError("No locks available")

    left = tmp_path / ".a.0123456789abcdef.tmp.txt"
    left.write_bytes(b"")
    monkeypatch.setattr(files, "lock", none)
    write(writer, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    # Nobody can tell whether it is still being written.
    assert left.exists()


def test_what_is_handed_over_appears_whole(tmp_path):
    path = tmp_path / "message"
    files.hand_over(path, b"first")
    files.hand_over(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["message"]
    with pytest.raises(FileNotFoundError):
        files.hand_over(tmp_path / "missing" / "message", b"")

"""Putting an export in place: whatever moment it is stopped at, the folder holds a whole one."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from keras_kd.export import manifest, scratch, staged_folder, target

DIGITS = Path(__file__).parents[2] / "exported" / "digits"
BESIDE = ("student.keras", "distill.toml")
STEPS = ("replace", "rename", "link", "unlink", "mkdir", "rmdir")


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it and go on."""


def staged(folder, suffix, precisions):
    """The files of an export with those precisions, told apart by what they hold."""
    folder.mkdir()
    content = manifest.read(DIGITS)
    row = next(row for row in content["artifacts"] if row["format"] == "tflite")
    content["artifacts"] = []
    for precision in precisions:
        name = f"m_{precision}.tflite"
        (folder / name).write_bytes(f"{precision} {suffix}".encode())
        digest = manifest.digest(folder / name)
        content["artifacts"].append({**row, "precision": precision, "file": name, "sha256": digest})
    (folder / "evaluation.npz").write_bytes(f"samples {suffix}".encode())
    content["evaluation"]["sha256"] = manifest.digest(folder / "evaluation.npz")
    content["best"] = content["artifacts"][0]["file"]
    (folder / "student.keras").write_text(f"student {suffix}")
    if suffix == "old":
        (folder / "distill.toml").write_text("options old")
    content["settings"]["opset"] = 17 if suffix == "old" else 18
    return {key: value for key, value in content.items() if key != "seal"}


def which(folder, beside=BESIDE):
    """`"old"` or `"new"`, after every file has been compared with the manifest."""
    content = manifest.read(folder)
    manifest.check_files(folder, content)
    beside = [name for name in beside if (folder / name).exists()]
    names = [*staged_folder.first_names(content), *beside]
    texts = {(folder / name).read_text().split()[1] for name in names}
    assert len(texts) == 1
    (suffix,) = texts
    assert content["settings"]["opset"] == (17 if suffix == "old" else 18)
    wanted = {"old": {"int8", "float16"}, "new": {"int8", "float32"}}[suffix]
    assert {row["precision"] for row in content["artifacts"]} == wanted
    return suffix


@contextlib.contextmanager
def stop_at(monkeypatch, step, after, clear):
    """Die at the given call of the file system, before or after it; counts from 0."""
    calls = []
    with monkeypatch.context() as patched:
        for name in STEPS:
            real = getattr(os, name)

            def call(*arguments, real=real, **options):
                calls.append(real)
                if len(calls) > step + 1 or (len(calls) == step + 1 and not after):
                    # A dead process clears nothing, an interrupted one may.
                    if len(calls) > step + 1 and clear:
                        return real(*arguments, **options)
                    raise Killed
                result = real(*arguments, **options)
                if len(calls) == step + 1:
                    raise Killed
                return result

            patched.setattr(os, name, call)
        yield calls


@pytest.mark.parametrize("clear", [False, True], ids=["killed", "interrupted"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("earlier", ["old", "foreign", "empty", "none"])
def test_every_moment_finds_a_whole_export(tmp_path, monkeypatch, earlier, after, clear):
    # Nobody pulls the plug here, and waiting for the disk takes longer than all the rest.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for step in range(200):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        goal = folder / "out"
        if earlier != "none":
            goal.mkdir()
        if earlier == "old":
            content = staged(folder / "first", "old", ["int8", "float16"])
            staged_folder.place(folder / "first", goal, content, overwrite=False, beside=BESIDE)
            assert which(goal) == "old"
        if earlier in ("old", "foreign"):
            (goal / "notes.txt").write_text("mine")
        if earlier == "foreign":
            (goal / "m_int8.tflite").write_text("somebody's")
            (goal / "student.keras").write_text("somebody's")
        content = staged(folder / "second", "new", ["int8", "float32"])
        ended = False
        overwrite = earlier in ("old", "foreign")
        with stop_at(monkeypatch, step, after, clear), contextlib.suppress(Killed):
            staged_folder.place(
                folder / "second", goal, content, overwrite=overwrite, beside=BESIDE
            )
            ended = True
        if earlier == "old":
            suffix = which(goal)
            kept = [path.read_text() for path in goal.glob("student.*")]
            assert f"student {suffix}" in kept
            assert not (clear or ended) or (goal / "student.keras").exists()
        elif (goal / manifest.FILE).exists():
            assert which(goal) == "new"
        elif earlier == "foreign":
            assert (goal / "m_int8.tflite").read_text() == "somebody's"
            assert "somebody's" in [path.read_text() for path in goal.glob("student.*")]
        elif clear and not ended:
            assert not goal.exists() or list(goal.iterdir()) == []
        whole = which(goal) if (goal / manifest.FILE).exists() else ""
        # The next export finds nothing in its way and leaves nothing of this one. One that has no
        # student leaves that of the export before as it is, like all that is not its own.
        content = staged(folder / "third", "new", ["int8", "float32"])
        again = earlier in ("old", "foreign") or (goal / manifest.FILE).exists()
        (folder / "third" / "student.keras").unlink()
        staged_folder.place(folder / "third", goal, content, overwrite=again)
        if whole or earlier == "foreign":
            kept = (goal / "student.keras").read_text()
            assert kept == (f"student {whole}" if whole else "somebody's")
        assert which(goal, beside=()) == "new"
        names = {"m_int8.tflite", "m_float32.tflite", "evaluation.npz", manifest.FILE}
        names |= {"student.keras"} if whole or earlier == "foreign" else set()
        names |= {"distill.toml"} if whole == "old" else set()
        names |= {"notes.txt"} if earlier in ("old", "foreign") else set()
        assert set(os.listdir(goal)) == names
        shutil.rmtree(folder)
        if ended:
            break
    assert ended
    assert step >= (10 if earlier != "none" else 4)


def test_a_long_name_is_no_obstacle_and_a_like_one_no_other(tmp_path):
    with staged_folder.staging(tmp_path / "out-2"), staged_folder.staging(tmp_path / "out"):
        assert len(os.listdir(tmp_path)) == 4
    with staged_folder.staging(tmp_path / ("ü" * 120)) as stage:
        assert stage.is_dir()
    assert os.listdir(tmp_path) == []


def test_the_stage_of_a_dead_process_goes_with_the_next_export(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom keras_kd.export import staged_folder\n"
        "with staged_folder.staging(Path(sys.argv[1])) as stage:\n"
        "    (stage / 'half').write_text('x')\n    os._exit(9)\n"
    )
    goal = tmp_path / "out"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(goal)], check=False)
    left = os.listdir(tmp_path)
    # The second has cleared what the first left behind.
    assert len(left) == 2
    mine = tmp_path / ".out-keep"
    mine.mkdir()
    (tmp_path / ".out-0123456789ab.lock").write_text("a file of somebody's, not locked")
    (tmp_path / ".out-0123456789ab").mkdir()
    with staged_folder.staging(goal):
        pass
    assert sorted(os.listdir(tmp_path)) == [
        ".out-0123456789ab",
        ".out-0123456789ab.lock",
        ".out-keep",
    ]


def test_a_link_at_the_place_of_a_lock_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(scratch._MARK)
    (tmp_path / ".out-0123456789ab.lock").symlink_to(precious)
    (tmp_path / ".out-0123456789ab").mkdir()
    with staged_folder.staging(tmp_path / "out"):
        pass
    assert precious.read_bytes() == scratch._MARK
    assert (tmp_path / ".out-0123456789ab").is_dir()


@pytest.mark.parametrize("make", [staged_folder.made_aside, staged_folder.written_together])
def test_a_full_disk_leaves_what_was_there(tmp_path, make):
    goal = tmp_path / "out"
    goal.mkdir()
    (goal / "student.keras").write_text("earlier")
    more = {"overwrite": True, "beside": BESIDE} if make is staged_folder.made_aside else {}
    with pytest.raises(OSError, match="disk is full"), make(goal, **more) as made:
        made.mkdir(exist_ok=True)
        (made / "student.keras").write_text("half")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "student.keras"]
    assert (goal / "student.keras").read_text() == "earlier"


def test_two_exports_into_one_folder_are_one_and_an_error(tmp_path):
    goal = tmp_path / "out"
    with staged_folder.staging(goal) as stage:
        with (
            pytest.raises(FileExistsError, match="Another export is being written"),
            staged_folder.staging(goal),
        ):
            raise AssertionError("two stages at once")
        content = staged(stage / "files", "new", ["int8", "float32"])
        # Somebody else has put one there by other means.
        other = staged(tmp_path / "other", "old", ["int8", "float16"])
        staged_folder.place(tmp_path / "other", goal, other, overwrite=False)
        with pytest.raises(FileExistsError, match="is not empty"):
            staged_folder.place(stage / "files", goal, content, overwrite=False)
    assert which(goal) == "old"


def test_what_an_export_does_not_replace(tmp_path):
    cache, foreign, damaged = (tmp_path / name for name in ("cache", "foreign", "damaged"))
    for folder in (cache, foreign, damaged):
        folder.mkdir()
    (cache / manifest.FILE).write_text('{"format": "keras_kd.cache"}')
    (foreign / manifest.FILE).write_text('{"name": "a web app", "icons": []}')
    (damaged / manifest.FILE).write_text('{"schema": 1, "artif')
    (damaged / "evaluation.npz").write_text("x")
    with pytest.raises(FileExistsError, match="holds a teacher's cache"):
        target.check_folder(cache, True)
    with pytest.raises(FileExistsError, match="is none that `keras_kd.export` wrote"):
        target.check_folder(foreign, True)
    target.check_folder(damaged, True)
    (damaged / "m_int8.tflite").mkdir()
    with pytest.raises(FileExistsError, match="m_int8.tflite` is in the way"):
        target.check_names_free(damaged, ["m_float32.tflite", "m_int8.tflite"])


def test_a_full_disk_is_told_whatever_error_takes_its_place(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def closing():
        try:
            full()
        finally:
            raise ValueError(
                "Can't close the ZIP file while there is an open writing handle on it."
            )

    def in_text():
        raise RuntimeError("Can't decrement id ref count (... errno = 28, error message = ...)")

    for fail in (full, closing, in_text):
        with (
            pytest.raises(OSError, match=r"disk is full.*Free some space") as caught,
            staged_folder.staging(tmp_path / "deep" / "out"),
        ):
            fail()
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="a bug"), staged_folder.staging(tmp_path / "out"):
        raise ValueError("a bug")


EXPORTING = textwrap.dedent(
    """
    import sys, time
    import keras, numpy as np
    import keras_kd.export
    x = np.random.default_rng(0).random((8, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    told = []

    def wait(stage, done, total):
        print(stage, flush=True)
        told.append(stage)
        if "convert" in told and stage != "convert":
            # However slow the machine is, the signal comes before the export is over.
            time.sleep(120)

    keras_kd.export(
        model, sys.argv[1], "onnx", "float32", evaluation=x, progress=wait, overwrite=True
    )
    """
)


def children(pid):
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.add(int(path.parent.name))
    return found


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_ended_leaves_nothing_at_work(tmp_path, number):
    goal, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORTING, str(goal)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    # The callback is told before the worker starts.
    while process.stdout.readline() != "convert\n":
        assert process.poll() is None
    end = time.monotonic() + 60
    while not (workers := children(process.pid)):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    code = process.wait(60)
    process.stdout.close()
    end = time.monotonic() + 60
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < end, "the worker runs on"
        time.sleep(0.05)
    if number == signal.SIGTERM:
        assert code == 143
        assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
        assert list(temporary.iterdir()) == []
    else:
        assert code == -signal.SIGKILL
        assert len(list(tmp_path.glob(".out-*"))) == 2
        with staged_folder.staging(goal):
            assert len(list(tmp_path.glob(".out-*"))) == 2
        with scratch.held_folder(temporary, "keras-kd-"):
            assert len(list(temporary.glob("keras-kd-*"))) == 2
        assert list(temporary.glob("keras-kd-*")) == []

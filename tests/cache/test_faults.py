"""Folders that were tampered with, disks that fill up, files that shrink while they are read."""

import errno
import io
import json
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from keras_kd import cache
from keras_kd.cache import layout, reader, samples, storage
from keras_kd.cache.reader import Records
from keras_kd.teachers import CachedTeacher
from keras_kd.utils import files

OPTIONS = {"dtype": "float32", "taps": ["hidden"], "batch_size": 32, "shard_size": 64}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and locks of POSIX")


def resealed(path, change):
    """Give a cache a manifest that says something else, with a checksum that fits."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    change(content)
    file.write_text(layout.sealed(content))


# ------------------------------------------------------------------------- claims


def drop(content):
    del content["shards"][1]


def double(content):
    content["shards"].append(content["shards"][2])


def swap_for_another(content):
    content["shards"][1] = content["shards"][0]


def beyond(content):
    content["shards"].append({**content["shards"][3], "shard": 4})


def another_epoch(content):
    content["shards"].append({**content["shards"][3], "epoch": 1})


def fewer_samples(content):
    content["count"] = 128
    del content["shards"][2:]


def more_samples(content):
    content["count"] = 210


def shorter_shard(content):
    content["shards"][1]["samples"] = 60


def more_epochs(content):
    content["epochs"] = 2


def other_first(content):
    content["first"] ^= 1


def other_order(content):
    content["order"] = "0" * 64


def no_order(content):
    content["order"] = None


def smaller_shards(content):
    content["shard_size"] = 50


def huge(content):
    content["count"] = 10**18
    content["shard_size"] = 1


def no_list(content):
    content["shards"] = {"0": content["shards"][0]}


def text_count(content):
    content["count"] = "200"


def no_shards_a_shard(content):
    content["shard_size"] = 0


def negative_epoch(content):
    content["shards"][0]["epoch"] = -1


def true_epoch(content):
    content["shards"][0]["epoch"] = False


def another_shape(content):
    content["layout"]["outputs"][0]["shape"] = [6]


def no_shape(content):
    content["layout"]["outputs"][0]["shape"] = [-5]


def other_dtype(content):
    content["layout"]["dtype"] = "float64"


def other_kind(content):
    content["layout"]["outputs"][0]["kind"] = "tanh"


def too_many(content):
    content["layout"]["outputs"][0]["top_k"] = 9


def seeds(content):
    content["layout"]["seeded"] = True


@pytest.mark.parametrize(
    "change",
    [
        drop,
        double,
        swap_for_another,
        beyond,
        another_epoch,
        fewer_samples,
        more_samples,
        shorter_shard,
        more_epochs,
        other_first,
        other_order,
        no_order,
        smaller_shards,
        huge,
        no_list,
        text_count,
        no_shards_a_shard,
        negative_epoch,
        true_epoch,
        another_shape,
        no_shape,
        other_dtype,
        other_kind,
        too_many,
        seeds,
    ],
)
def test_a_manifest_that_claims_other_than_there_is(written, change):
    resealed(written, change)
    if change is fewer_samples:
        # All that it says is true but the checksum over the inputs.
        with pytest.raises(ValueError, match="the order of the samples is not that of the shards"):
            cache.verify(written)
    for opened in (cache.verify, CachedTeacher):
        with pytest.raises(ValueError, match=r"is not what its manifest says|damaged|half written"):
            opened(written)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, "1 shards are not listed, the first is shard 1 of epoch 0"),
        (double, "shard 2 of epoch 0 is listed twice"),
        (beyond, "shard 4 of epoch 0 is listed, and 200 samples in 1 epochs have shards 0 to 3"),
        (shorter_shard, "shard 1 of epoch 0 is said to have 60 samples, and has 64 of 200"),
    ],
)
def test_what_is_wrong_with_the_list_of_shards_is_said_at_once(written, change, reason):
    resealed(written, change)
    with pytest.raises(ValueError, match=reason):
        CachedTeacher(written, verify=False)


def test_write_mends_a_dropped_shard(written, teacher, x):
    before = (written / "manifest.json").read_bytes()
    resealed(written, drop)
    assert cache.write(teacher, x, written, **OPTIONS).complete
    assert (written / "manifest.json").read_bytes() == before


def rewrite(path, change):
    """Change records, and have the manifest say their new checksum."""
    file = path / "records-000-00001.bin"
    records = np.fromfile(file, Records(path, verify=False).manifest.layout.record)
    change(records)
    records.tofile(file)

    def reseal(content):
        entry = next(e for e in content["shards"] if (e["epoch"], e["shard"]) == (0, 1))
        entry["sha256"] = storage.checksum(file)

    resealed(path, reseal)


def test_records_that_no_teacher_gave(written, tmp_path, teacher, x):
    def spoil(records):
        records["tap_0"][5, 3] = np.nan

    rewrite(written, spoil)
    with pytest.raises(ValueError, match="row 69 of epoch 0 holds NaN or infinite numbers"):
        cache.verify(written)

    def name_another(records):
        records["classes_0"][10, 1] = 5

    path = tmp_path / "top"
    cache.write(teacher, x, path, top_k=2, shard_size=64)
    rewrite(path, name_another)
    with pytest.raises(ValueError, match="row 74 of epoch 0 names a class beyond the 5"):
        cache.verify(path)

    def other_seed(records):
        records["seed"][0] ^= 1

    path = tmp_path / "views"
    cache.write(teacher, x, path, augment=lambda sample, seed: sample + seed % 3, shard_size=64)
    assert cache.verify(path).augment["seed"] == 0
    rewrite(path, other_seed)
    with pytest.raises(ValueError, match="row 64 of epoch 0 has the seed of another view"):
        cache.verify(path)
    resealed(path, lambda content: content["augment"].update(first_view=7))
    with pytest.raises(ValueError, match="the first view is not that of the shards"):
        cache.verify(path)
    assert samples.seeds(0, 0, np.arange(1)).dtype == np.uint32


# -------------------------------------------------------------------------- links

NAMES = [
    ".writable",
    "manifest.json",
    "manifest.json.tmp",
    f"manifest.json.{os.getpid()}.tmp",
    "manifest.json.lock",
    "records-000-00001.bin",
    "records-000-00001.bin.tmp",
    "records-000-00001.bin.lock",
    "inputs-00001.crc",
    "inputs-00001.crc.tmp",
    "shard-000-00001.json",
    "shard-000-00001.json.tmp",
    f"shard-000-00001.json.{os.getpid()}.tmp",
]


@pytest.mark.parametrize("hard", [False, True], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", NAMES, ids=[n.replace(f".{os.getpid()}.", ".PID.") for n in NAMES])
def test_links_in_the_folder_are_not_followed(tmp_path, teacher, x, name, hard):
    precious = tmp_path / "precious"
    precious.write_text("do not lose me")
    rights = precious.stat().st_mode
    path = tmp_path / "cache"
    path.mkdir()
    (os.link if hard else os.symlink)(precious, path / name)
    said = None
    try:
        assert cache.write(teacher, x, path, **OPTIONS).complete
    except (OSError, ValueError) as error:
        said = str(error)
    if said is None:
        assert cache.verify(path, teacher=teacher, data=x).count == 200
    else:
        # What already is a manifest, an entry or a lock is not replaced.
        assert name in said
    assert precious.read_text() == "do not lose me"
    assert precious.stat().st_mode == rights


def test_dangling_links_make_nothing_elsewhere(tmp_path, teacher, x):
    path = tmp_path / "cache"
    path.mkdir()
    for name in NAMES:
        os.symlink(tmp_path / f"made-by-{name}", path / name)
    with pytest.raises(OSError, match="is a link, where a lock is to be made"):
        cache.write(teacher, x, path, **OPTIONS)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("made-by")]


@pytest.mark.parametrize("name", ["manifest.json", "records-000-00001.bin.lock", "shard-0-1.json"])
def test_pipes_in_the_folder_are_not_waited_for(tmp_path, teacher, x, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises((OSError, ValueError), match="regular file"):
        cache.write(teacher, x, tmp_path, **OPTIONS)
    with pytest.raises((OSError, ValueError)):
        cache.verify(tmp_path)


def test_a_pipe_in_place_of_records(written):
    file = written / "records-000-00001.bin"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="`records-000-00001.bin` is a named pipe"):
        cache.verify(written)


def test_the_umask_counts_and_is_left_alone(tmp_path, teacher, x, monkeypatch):
    before = os.umask(0o027)
    try:
        called = []
        monkeypatch.setattr(os, "umask", lambda mask: called.append(mask))
        cache.write(teacher, x, tmp_path / "cache", **OPTIONS)
        monkeypatch.undo()
        modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "cache").iterdir()}
    finally:
        os.umask(before)
    assert modes == {0o640}
    assert not called


# -------------------------------------------------------------------------- locks


def busy(owner):
    return f"{owner} is at it"


def test_a_lock_has_one_holder_whoever_removes_its_file(tmp_path):
    file = tmp_path / "lock"
    with files.claimed(file, busy) as first_holds:
        first_holds()
        with (
            pytest.raises(BlockingIOError, match=f"{os.getpid()} is at it"),
            files.claimed(file, busy),
        ):
            pass
        file.unlink()
        with files.claimed(file, busy) as second_holds:
            second_holds()
            with pytest.raises(OSError, match="removed while it was held"):
                first_holds()
        # The second one gave back its own, and no more.
        assert not file.exists()
    assert not file.exists()


def test_who_waits_for_a_lock_does_not_get_the_file_that_was_removed(tmp_path, monkeypatch):
    file = tmp_path / "lock"
    lock_file = files._lock_file
    opened, go_on = threading.Event(), threading.Event()

    def slow(path):
        stream = lock_file(path)
        if threading.current_thread().name == "waiting" and not opened.is_set():
            opened.set()
            go_on.wait(20)
        return stream

    monkeypatch.setattr(files, "_lock_file", slow)
    held, order = threading.Event(), []

    def wait():
        with files.claimed(file, busy, wait=20) as require_held:
            order.append("waiting")
            require_held()
            held.set()

    thread = threading.Thread(target=wait, name="waiting")
    with files.claimed(file, busy):
        thread.start()
        # It has opened the very file that is removed now.
        assert opened.wait(20)
    with files.claimed(file, busy) as require_held:
        go_on.set()
        assert not held.wait(0.3)
        require_held()
        order.append("new")
    thread.join(20)
    assert order == ["new", "waiting"]
    assert not file.exists()


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def none(stream):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock", none)
    with (
        pytest.raises(OSError, match="has no locks") as caught,
        files.claimed(tmp_path / "lock", busy),
    ):
        pass
    assert not isinstance(caught.value, BlockingIOError)


# -------------------------------------------------------------------------- disks


class _FullWhenClosed(io.BufferedIOBase):
    """A buffered file of a disk that is full: it fails when written, and again when closed."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self):
        return self.stream.fileno()

    def flush(self):
        if not self.stream.closed:
            raise OSError(errno.EIO, "could not flush")

    def close(self):
        self.stream.close()
        raise OSError(errno.EIO, "could not close")


def test_the_advice_of_a_full_disk_outlives_a_second_error(tmp_path, teacher, x, monkeypatch):
    create = files.create

    def full(path):
        stream = create(path)
        return _FullWhenClosed(stream) if "records-000-00002" in str(path) else stream

    monkeypatch.setattr(files, "create", full)
    with pytest.raises(OSError, match="2 finished shards are untouched; mend the disk") as caught:
        cache.write(teacher, x, tmp_path / "cache", **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "cache").glob("*.tmp"))
    monkeypatch.undo()
    assert cache.write(teacher, x, tmp_path / "cache", **OPTIONS).complete


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["in memory", "from files"])
def test_a_cache_that_is_cut_short_while_it_is_read(written, limit):
    # In a process of its own: where the file is mapped, the system ends it.
    code = f"""
import os, sys
from keras_kd.cache import reader
reader.HELD_UP_TO = {limit}
records = reader.Records(sys.argv[1], verify=False)
records.read([0])
for shard in range(4):
    os.truncate(os.path.join(sys.argv[1], f"records-000-0000{{shard}}.bin"), 0)
for rows in ([3, 4], [190, 5, 70], [64, 65, 66]):
    try:
        records.read(rows)
    except OSError as error:
        print("refused", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(written)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # What is in memory already is there to stay.
    assert done.stdout.count("refused") == (2 if limit else 3)
    assert done.stdout.count("changed while it was read") == (2 if limit else 3)


def test_checksums_that_are_cut_short_while_they_are_read(written):
    records = Records(written)
    os.truncate(written / "inputs-00002.crc", 8)
    with pytest.raises(OSError, match="`inputs-00002.crc` became shorter"):
        records.inputs(np.array([129, 190]))


def test_reading_part_of_a_record_is_an_error(written, monkeypatch):
    monkeypatch.setattr(reader, "HELD_UP_TO", 0)
    records = Records(written)
    item = records.manifest.record_bytes
    os.truncate(written / "records-000-00000.bin", 10 * item + item // 2)
    assert len(records.read(np.array([9, 3]))) == 2
    for rows in ([10], [11], [3, 10], [9, 10, 11]):
        with pytest.raises(OSError, match="became shorter"):
            records.read(np.array(rows))

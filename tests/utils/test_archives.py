"""Files of unknown origin: what is no file, or claims too much, is refused before it is read."""

import contextlib
import io
import os
import resource
import socket
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from keras_kd import datasets
from keras_kd.cli import inputs
from keras_kd.utils import archives, folders

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no FIFOs")

GIBIBYTE = 1 << 30


@contextlib.contextmanager
def frugal():
    """What is read here never takes more than a few MiB."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def bomb(path, name, size, header=b""):
    """An archive with one member of `header` and zeros, made piece by piece."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as member,
    ):
        member.write(header)
        left = size - len(header)
        while left:
            piece = min(left, 1 << 20)
            member.write(bytes(piece))
            left -= piece


def npy_header(shape, dtype="|u1"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def declare(path, size):
    """Write another unpacked size into the directory of an archive of one member."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", size)
    path.write_bytes(bytes(content))


def readers(path):
    """All that read a `.npz` or `.keras` file from outside."""
    if path.suffix == ".npz":
        return [lambda: archives.arrays(path), lambda: datasets.load(str(path))]
    return [lambda: archives.keras_file(path), lambda: inputs.load_model(str(path), "teacher")]


@pytest.mark.parametrize("suffix", [".npz", ".keras"])
@pytest.mark.parametrize("declared", [GIBIBYTE, (1 << 32) - 2])
def test_a_small_archive_that_declares_gigabytes(tmp_path, suffix, declared):
    path = tmp_path / f"bomb{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json" if suffix == ".keras" else "x_train.npy", bytes(1000))
    declare(path, declared)
    for read in readers(path):
        with (
            frugal(),
            pytest.raises(ValueError, match=f"would unpack to {declared:,}, more than 50 times"),
        ):
            read()


def test_a_real_one_of_many_members(tmp_path):
    path = tmp_path / "many.npz"
    header = npy_header((40 << 20,))
    bomb(path, "a.npy", len(header) + (40 << 20), header)
    one = path.read_bytes()
    assert len(one) < 1 << 20
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i in range(15):
            with archive.open(f"b{i}.npy", "w") as member:
                for _ in range(40):
                    member.write(bytes(1 << 20))
    with frugal(), pytest.raises(ValueError, match=r"would unpack to [\d,]+, more than 50 times"):
        archives.arrays(path)


def test_a_directory_that_declares_too_little_unpacks_no_more(tmp_path):
    path = tmp_path / "liar.npz"
    header = npy_header((8 << 20,))
    bomb(path, "x.npy", len(header) + (8 << 20), header)
    declare(path, 4096)
    with frugal(), pytest.raises(ValueError, match="not a readable `.npz` file"):
        archives.arrays(path)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1 << 40,), "|u1"), ((1 << 20, 1 << 20), "<f8"), ((-1,), "|u1"), ((7,), "<f4")],
)
def test_a_header_that_claims_other_than_there_is(tmp_path, shape, dtype):
    path = tmp_path / "claims.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy_header(shape, dtype) + bytes(64))
    with frugal(), pytest.raises(ValueError, match="not a readable `.npz` file"):
        archives.arrays(path)


@pytest.mark.parametrize("header", [b"{" * 400, b"[(" * 900, b"\xff" * 60, b"{'descr': 'O'}"])
def test_headers_that_are_none(tmp_path, header):
    path = tmp_path / "header.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with frugal(), pytest.raises(ValueError, match="not a readable `.npz` file"):
        archives.arrays(path)


def test_what_compresses_well_is_read(tmp_path):
    path = tmp_path / "zeros.npz"
    expected = {
        "x": np.zeros((1 << 20, 4), "float32"),
        "names": np.array(["a", "bc"]),
        "turned": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "one": np.array(7),
        "none": np.zeros((0, 3)),
    }
    np.savez_compressed(path, **expected)
    found = archives.arrays(path)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_more_than_the_memory_of_the_machine(tmp_path, monkeypatch):
    path = tmp_path / "plain.npz"
    np.savez(path, x=np.arange(1000.0))
    monkeypatch.setattr(archives, "memory_available", lambda: 5000)
    for read in readers(path):
        with pytest.raises(ValueError, match="5,000 bytes of memory are available"):
            read()


def test_memory_that_is_available_is_less_than_there_is():
    found = archives.memory_available()
    assert found is None or 0 < found <= os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()


def not_files(folder):
    os.mkfifo(folder / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    listening.close()
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "pipe")
    return {
        folder / "pipe": "named pipe",
        folder / "socket": "socket",
        folder / "folder": "is a folder",
        folder / "link": "named pipe",
        "/dev/zero": "device",
        "/dev/null": "device",
    }


def test_what_is_no_file_is_never_opened(tmp_path, monkeypatch):
    # A socket's path has a hundred characters at most.
    monkeypatch.chdir(tmp_path)
    for path, reason in not_files(tmp_path.__class__()).items():
        for read in (
            lambda path=path: archives.arrays(path),
            lambda path=path: archives.read_bytes(path),
            lambda path=path: archives.keras_file(path),
            lambda path=path: inputs.check_model_file(str(path), "teacher"),
        ):
            with pytest.raises(ValueError, match=reason):
                read()


def test_encrypted_members_and_too_many(tmp_path, monkeypatch):
    path = tmp_path / "some.npz"
    np.savez(path, x=np.zeros(3), y=np.zeros(3))
    monkeypatch.setattr(archives, "MEMBERS", 1)
    with pytest.raises(ValueError, match="2 members, and at most 1"):
        archives.arrays(path)
    monkeypatch.undo()
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is encrypted"):
        archives.arrays(path)


def test_a_manifest_of_gigabytes(tmp_path):
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(GIBIBYTE)
    with frugal(), pytest.raises(ValueError, match="more than 1,000 bytes"):
        archives.read_bytes(path, 1000)


# ----------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "nothing"),
        ({"notes.txt": "records-000-00000.bin"}, "nothing"),
        ({"manifest.json": '{"format": "keras_kd.cache"}'}, "cache"),
        ({"records-000-00000.bin": ""}, "cache"),
        ({"shard-000-00012.json": "", "manifest.json": "{}"}, "cache"),
        ({"records-000-00000.bin.123.tmp": ""}, "cache"),
        ({"manifest.json": '{"schema": 1, "artifacts": []}'}, "export"),
        ({"manifest.json": "{}"}, "other"),
        ({"manifest.json": "[" * 100_000}, "other"),
        ({"manifest.json": "\0"}, "other"),
    ],
)
def test_what_a_folder_holds(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert folders.holds(tmp_path) == expected
    if expected == "cache":
        with pytest.raises(FileExistsError, match="holds a teacher's cache"):
            folders.require_no_cache(tmp_path)
    else:
        folders.require_no_cache(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    assert folders.holds(tmp_path / "none") == "nothing"
    os.mkfifo(tmp_path / "manifest.json")
    assert folders.holds(tmp_path) == "other"

"""Reads records anywhere in a cache; in memory is no more than what was asked for."""

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_kd.cache import claims, layout, storage
from keras_kd.cache.layout import Manifest
from keras_kd.cache.remote import Place
from keras_kd.utils import archives
from keras_kd.utils.types import PathLike, Tensor

CHECKED_AT_OPENING = 1 << 30
"""Bytes up to which a cache is compared with its checksums when it is opened: about a second."""

HELD_UP_TO = 128 << 20
"""Bytes up to which the shards of a cache stay in memory once they were read.

They are read and not mapped: where a mapped file is cut short, the system ends
the process. Larger caches are read record by record.
"""

# Shards of a large cache that are open at a time; systems allow about a thousand files.
_OPEN_FILES = 256


def has_manifest(root: Place) -> bool:
    """Whether a folder holds a cache, finished or not."""
    return bool((root / layout.MANIFEST).exists())


def read_manifest(root: Place) -> Manifest:
    """Read the manifest of a cache, finished or not.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    file = root / layout.MANIFEST
    if not has_manifest(root):
        shards = root.exists() and any(each.name.startswith("records-") for each in root.iterdir())
        raise FileNotFoundError(
            f"`{root}` holds no teacher's cache: there is no `{layout.MANIFEST}`"
            + (" beside its shards" if shards else "")
            + ". Write it with `keras_kd.cache.write(teacher, data, path)`."
        )
    manifest = Manifest.loads(storage.read_bytes(file), file)
    problem = claims.form_problem(manifest)
    if problem is not None:
        raise ValueError(
            f"`{file}` is damaged: it is no manifest of a teacher's cache ({problem}). Write the "
            "cache again; the shards beside it cannot be told apart without it."
        )
    return manifest


class Records:
    """The records of a finished cache.

    Args:
        path: Folder of the cache, or a URL.
        verify: Whether every byte is compared with the checksums now. Defaults
            to `None`: up to 1 GiB.

    Raises:
        FileNotFoundError: If there is no cache.
        ValueError: If it is not finished, or a file is missing or damaged.
    """

    def __init__(self, path: PathLike, verify: bool | None = None) -> None:
        self.root = storage.folder(path)
        self.manifest = read_manifest(self.root)
        if not self.manifest.complete:
            raise ValueError(
                f"The cache `{self.root}` is half written. Call `keras_kd.cache.write` with the "
                "same arguments again; it goes on where it stopped."
            )
        if verify is None:
            verify = self.manifest.nbytes <= CHECKED_AT_OPENING
        refuse_claim(self.root, claims.shards_problem(self.manifest))
        problems = find_problems(self.root, self.manifest, verify)
        if problems:
            raise ValueError(_listed(self.root, problems))
        if verify:
            refuse_claim(self.root, claims.checksums_problem(self.root, self.manifest))
        self.count: int = self.manifest.count or 0
        self._record = self.manifest.layout.record
        self._item = self._record.itemsize
        self._local = storage.Local()
        self.in_memory = self.manifest.nbytes <= HELD_UP_TO or not hasattr(os, "pread")
        self._held: dict[tuple[int, int], np.ndarray] = {}
        self._files: dict[tuple[int, int], Any] = {}
        self._crc: dict[str, np.ndarray] = {}

    def read(self, rows: np.ndarray, epoch: int = 0) -> np.ndarray:
        """Read records.

        Args:
            rows: `(n,)` row numbers, in any order.
            epoch: Which view of the samples.

        Returns:
            `(n,)` records, a copy.

        Raises:
            IndexError: If a row is not in the cache.
        """
        rows = self._checked(rows)
        shards = rows // self.manifest.shard_size
        offsets = rows - shards * self.manifest.shard_size
        if self.in_memory:
            found = self._read_held(epoch, shards, offsets)
        else:
            found = self._read_files(epoch, shards, offsets)
        return found.view(self._record)[:, 0]

    def _read_held(self, epoch: int, shards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        result = np.empty((len(shards), self._item), "u1")
        order = np.argsort(shards, kind="stable")
        found, starts = np.unique(shards[order], return_index=True)
        for shard, part in zip(found.tolist(), np.split(order, starts[1:])):
            result[part] = self._shard(epoch, shard).take(offsets[part], 0, mode="clip")
        return result

    def _read_files(self, epoch: int, shards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        item = self._item
        if len(shards) and (shards == shards[0]).all() and (np.diff(offsets) == 1).all():
            # Rows in a row, as a dataset in the written order asks for them.
            file = self._file(epoch, int(shards[0]))
            read = os.pread(file.fileno(), item * len(shards), int(offsets[0]) * item)
            self._require_whole(len(read), item * len(shards), epoch, shards[:1])
            return np.frombuffer(bytearray(read), "u1").reshape(-1, item)
        # The files are held here, so that none is closed meanwhile; a call for each record is what
        # reading costs, and nothing else is done beside it.
        held = {shard: self._file(epoch, shard) for shard in set(shards.tolist())}
        number = {shard: file.fileno() for shard, file in held.items()}
        pread = os.pread
        pieces = [
            pread(number[shard], item, start)
            for shard, start in zip(shards.tolist(), (offsets * item).tolist())
        ]
        joined = bytearray().join(pieces)
        self._require_whole(len(joined), item * len(shards), epoch, shards)
        return np.frombuffer(joined, "u1").reshape(-1, item)

    def _require_whole(self, found: int, wanted: int, epoch: int, shards: np.ndarray) -> None:
        """Raise `OSError` where files have become shorter since the cache was opened."""
        if found != wanted:
            names = [layout.records_file(epoch, shard) for shard in sorted(set(shards.tolist()))]
            raise _cut_short(self.root, " or ".join(f"`{name}`" for name in names[:5]))

    def inputs(self, rows: np.ndarray) -> np.ndarray:
        """The CRC-32 of the inputs of these rows, `(n,)` of uint32."""
        return self._checksums(rows, layout.inputs_file)

    def views(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """The CRC-32 of the views of these rows in an epoch, `(n,)` of uint32."""
        return self._checksums(rows, lambda shard: layout.views_file(epoch, shard))

    def _checksums(self, rows: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
        rows = self._checked(rows)
        size = self.manifest.shard_size
        result = np.empty(len(rows), "<u4")
        shards = rows // size
        for shard in np.unique(shards).tolist():
            file = name(shard)
            crc = self._crc.get(file)
            if crc is None:
                crc = np.frombuffer(storage.read_bytes(self._local(self.root / file)), "<u4")
                if len(crc) != min(size, self.count - shard * size):
                    raise _cut_short(self.root, f"`{file}`")
                self._crc[file] = crc
                if len(self._crc) > _OPEN_FILES:
                    # Other threads may be at it as well.
                    self._crc.pop(next(iter(self._crc)), None)
            part = shards == shard
            result[part] = crc[rows[part] - shard * size]
        return result

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, "int64")
        if len(rows) and (rows.min() < 0 or rows.max() >= self.count):
            raise IndexError(
                f"The cache `{self.root}` holds rows 0 to {self.count - 1}. Received: rows from "
                f"{rows.min()} to {rows.max()}."
            )
        return rows

    def _shard(self, epoch: int, shard: int) -> np.ndarray:
        known = self._held.get((epoch, shard))
        if known is None:
            file = self._local(self.root / layout.records_file(epoch, shard))
            size = self.manifest.shard_size
            wanted = min(size, self.count - shard * size) * self._item
            known = np.empty(wanted, "u1")
            with archives.opened(file) as stream:
                found = stream.readinto(known.data)  # type: ignore[attr-defined]
            self._require_whole(found, wanted, epoch, np.array([shard]))
            known = known.reshape(-1, self._item)
            self._held[epoch, shard] = known
        return known

    def _file(self, epoch: int, shard: int) -> Any:
        file = self._files.get((epoch, shard))
        if file is None:
            name = self._local(self.root / layout.records_file(epoch, shard))
            file = self._files[epoch, shard] = name.open("rb", buffering=0)
            if len(self._files) > _OPEN_FILES:
                # Closed when no other thread reads from it any more.
                self._files.pop(next(iter(self._files)), None)
        return file


def decode(records: np.ndarray) -> dict[str, Tensor]:
    """The fields of records as contiguous arrays that any backend takes.

    Args:
        records: `(n,)` records.

    Returns:
        `logits_i`, `values_i`, `tap_i` in the dtype on disk, `classes_i` as
        int32, without seeds.
    """
    return {
        name: np.ascontiguousarray(records[name], "int32" if name.startswith("classes") else None)
        for name in records.dtype.names or ()
        if name != "seed"
    }


def find_problems(root: Place, manifest: Manifest, whole: bool) -> list[str]:
    """What is wrong with the files of a cache, one sentence each.

    Args:
        root: The folder.
        manifest: Its manifest.
        whole: Whether checksums are computed, or files are only counted and
            measured.
    """
    problems = []
    seen = set()
    for entry in manifest.shards:
        for name, size, sha256 in layout.files_of(entry, manifest.record_bytes):
            # Every epoch's entry names the inputs, and the first one's their checksum.
            if name in seen:
                continue
            seen.add(name)
            problem = file_problem(root / name, size, sha256 if whole else None)
            if problem is not None:
                problems.append(problem)
    return problems


def file_problem(file: Place, size: int, sha256: str | None) -> str | None:
    """What is wrong with one file, or `None`.

    Args:
        file: The file.
        size: Bytes that it has.
        sha256: What its SHA-256 is, `None` where that is not computed.
    """
    problem = _problem(file, size)
    if problem is None and sha256 is not None and storage.checksum(file) != sha256:
        problem = f"`{file.name}` is damaged: its SHA-256 is not that of the manifest"
    return problem


def _problem(file: Place, size: int) -> str | None:
    problem = storage.problem(file)
    if problem is not None:
        return f"`{file.name}` {problem}"
    found = storage.size(file)
    if found != size:
        return f"`{file.name}` is half written: it has {found} of {size} bytes"
    return None


def _cut_short(root: Place, names: str) -> OSError:
    return OSError(
        errno.EIO,
        f"The cache `{root}` was changed while it was read: {names} became shorter. Stop what "
        "writes there, and call `keras_kd.cache.write` again, which mends it",
    )


def refuse_claim(root: Place, problem: str | None) -> None:
    """Raise `ValueError` where something keeps a cache from being what its manifest says."""
    if problem is not None:
        raise ValueError(
            f"The cache `{root}` is not what its manifest says: {problem}. Write it again, to "
            "another path or after deleting the folder."
        )


def _listed(root: Place, problems: list[str]) -> str:
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
    return (
        f"The cache `{root}` cannot be read: {shown}. Delete the files named and call "
        "`keras_kd.cache.write` again; it writes only these."
    )

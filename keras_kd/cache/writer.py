"""Writes the records of a cache in shards, and goes on where an earlier call stopped."""

import contextlib
import errno
import hashlib
import itertools
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_kd.cache import earlier as earlier_calls
from keras_kd.cache import layout, reader, samples, shards, sources, storage
from keras_kd.cache.answers import AnswerSource
from keras_kd.cache.layout import Manifest
from keras_kd.cache.reader import has_manifest, read_manifest
from keras_kd.cache.remote import Place
from keras_kd.utils import files
from keras_kd.utils.types import PathLike, Tensors

LOCK_SECONDS = 30.0
"""How long one process waits for another that is writing the manifest, which takes milliseconds."""


def run(
    path: PathLike,
    source: sources.Source,
    answers: AnswerSource,
    *,
    precision: str,
    views: shards.Views,
    process: tuple[int, int],
    progress: Callable[[int, int | None], None] | None,
    shard_size: int | None,
) -> Manifest:
    """Write a cache, or what is missing of it.

    Args:
        path: Its folder.
        source: The data.
        answers: Who answers them.
        precision: What the teacher was asked to run in.
        views: Which views of the data are answered.
        process: Number of this process, and how many write the cache together.
        progress: As in `keras_kd.cache.write`.
        shard_size: As in `keras_kd.cache.write`.

    Returns:
        The manifest.
    """
    root = storage.folder(path)
    made_here = not storage.is_remote(root) and not root.exists()
    root = _writable(root)
    writer = _Writer(
        root=root,
        source=source,
        teacher=answers,
        precision=precision,
        views=views,
        process=process,
        progress=_called(progress),
    )
    try:
        return writer.run(shard_size)
    finally:
        if made_here:
            # Refused before the first shard: no empty folder stays. One with files in it does.
            with contextlib.suppress(OSError):
                root.rmdir()


def _writable(root: Place) -> Any:
    """Make the folder, or say why not before the teacher runs."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not isinstance(root, pathlib.Path):
            probe = root / ".writable"
            probe.write_text("")
            probe.unlink()
        else:
            files.require_writable(root)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"The cache cannot be written to `{root}`: {error.strerror or error}. Choose a folder "
            "in which you may create files",
        ) from error
    return root


class _Answered(NamedTuple):
    """A batch as it is stored, the CRC-32 of its views or `None`, and the views."""

    records: np.ndarray
    crc: np.ndarray | None
    view: Any


class _Writer:
    """One call of `write`."""

    manifest: Manifest

    def __init__(
        self,
        root: Place,
        source: sources.Source,
        teacher: AnswerSource,
        precision: str,
        views: shards.Views,
        process: tuple[int, int],
        progress: Callable[[int, int | None], None],
    ) -> None:
        self.root = root
        self.source = source
        self.teacher = teacher
        self.precision = precision
        self.views = views
        self.index, self.processes = process
        self.progress = progress
        self.finished: dict[tuple[int, int], dict[str, Any]] = {}
        self.done = 0
        # The inputs of the shard that was compared last.
        self._known: tuple[int, Any] = (-1, None)
        # What this call has finished.
        self._written: list[tuple[int, int]] = []
        # Those at the beginning of each shard that another process writes.
        self._others: dict[int, np.ndarray] = {}

    def run(self, shard_size: int | None) -> Manifest:
        while True:
            earlier = self._prepare(shard_size)
            if earlier is not None or self._begun():
                break
        if self.views.augment is not None:
            samples.written_here[self.manifest.identity] = self.views.augment
        for epoch in range(self.views.epochs):
            with contextlib.ExitStack() as stack:
                self._write_epoch(epoch, stack)
        return self._complete(earlier)

    def _prepare(self, shard_size: int | None) -> Manifest | None:
        """Find out what is to be written, and gives the manifest that is there."""
        earlier = read_manifest(self.root) if has_manifest(self.root) else None
        x = self.source.first()
        self.teacher.require_batch(x)
        view, seed = self.views(x, 0, 0, len(keras.tree.flatten(x)[0]))
        teacher = self.teacher
        if earlier is not None and earlier.teacher["precision"] == self.precision:
            # What is faster may be another today, and one cache holds one precision.
            teacher.take_precisions(earlier.teacher["runs"])
        self.first = self.teacher.prepare(view, seed is not None)
        self.first_crc = samples.digests(x)
        if seed is not None:
            self.first["seed"] = seed
        self.manifest = Manifest(
            teacher={
                "name": teacher.name,
                "fingerprint": teacher.fingerprint(),
                "precision": self.precision,
                "runs": teacher.precisions,
                "given": teacher.given(samples.part(view, 0, 1)),
                **({} if teacher.classes() is None else {"classes": teacher.classes()}),
            },
            layout=teacher.layout,
            template=teacher.template(),
            inputs=samples.describe(x),
            augment=self.views.to_json(),
            epochs=self.views.epochs,
            shard_size=shard_size or self._shard_size(),
            count=self.source.count,
            first=int(self.first_crc[0]),
            versions=_versions(),
        )
        if earlier is not None:
            earlier_calls.require_same(earlier, self.manifest, self.root, shard_size)
            self.manifest.shard_size = earlier.shard_size
            self._find_finished(earlier)
        self._require_space()
        return earlier

    def _claimed(self) -> contextlib.AbstractContextManager[Any]:
        """The lock under which the manifest is written."""
        lock = self.root / f"{layout.MANIFEST}.lock"
        return storage.claimed(lock, f"the manifest of `{self.root}`", LOCK_SECONDS)

    def _begun(self) -> bool:
        """Write the first manifest, unless another process has begun a cache here by now."""
        with self._claimed() as require_held:
            if has_manifest(self.root):
                return False
            file = self.root / layout.MANIFEST
            storage.write_text(file, self.manifest.dumps(), require_held)
        return True

    def _look(self, epoch: int, shard: int) -> dict[str, Any] | None:
        """The entry of a shard that another process has finished since this call began.

        Raises:
            ValueError: If the folder is that of another cache by now.
        """
        there = self._require_ours()
        while True:
            found = earlier_calls.entries(self.root, there, self.manifest.identity)
            for entry in reversed(found):
                if (entry["epoch"], entry["shard"]) == (epoch, shard) and not any(
                    reader.file_problem(self.root / name, size, sha256)
                    for name, size, sha256 in layout.files_of(entry, there.record_bytes)
                ):
                    return entry
            before, there = there, self._require_ours()
            # Entries go when the manifest is complete, maybe just now.
            if before.complete or not there.complete:
                return None

    def _require_ours(self) -> Manifest:
        """The manifest as it lies on disk, which has to be that of this cache."""
        there = read_manifest(self.root) if has_manifest(self.root) else None
        if there is None or there.identity != self.manifest.identity:
            now = "is gone" if there is None else f"is that of `{there.teacher['name']}` by now"
            raise ValueError(
                f"The cache `{self.root}` was replaced while it was written: its manifest {now}, "
                "or says other things than when this call began. Give each cache a folder of its "
                "own, and write it again."
            )
        return there

    def _shard_size(self) -> int:
        """A sixteenth of the data within bounds, so that a kill costs little."""
        estimate = self.source.estimate
        sixteenth = 16384 if estimate is None else math.ceil(estimate / 16)
        fitting = max(1, (256 << 20) // self.teacher.layout.record.itemsize)
        return min(max(sixteenth, 1024), 65536, fitting)

    def _find_finished(self, earlier: Manifest) -> None:
        """Which shards are there in full, by their entries and the sizes of their files."""
        item = earlier.record_bytes
        entries = [
            entry
            for entry in earlier_calls.entries(self.root, earlier, self.manifest.identity)
            if (entry["epoch"], entry["shard"]) not in self.finished
        ]
        # Damaged ones are written anew, as far as it is found out in about a second.
        whole = sum(entry["samples"] for entry in entries) * item <= reader.CHECKED_AT_OPENING
        for entry in entries:
            key = entry["epoch"], entry["shard"]
            if key not in self.finished and not any(
                reader.file_problem(self.root / name, size, sha256 if whole else None)
                for name, size, sha256 in layout.files_of(entry, item)
            ):
                self.finished[key] = entry

    def _require_space(self) -> None:
        """Refuse a disk that is too small before the teacher runs."""
        if self.source.count is None or not isinstance(self.root, pathlib.Path):
            return
        there = sum(entry["samples"] for entry in self.finished.values())
        total = self.source.count * self.views.epochs
        need = (total - there) * self.manifest.record_bytes // self.processes
        free = shutil.disk_usage(self.root).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"The cache takes {need:,} bytes more in `{self.root}`, and {free:,} are free. "
                'Free some, store fewer classes with `top_k`, or pass dtype="float16"',
            )

    def _mine(self, shard: int) -> bool:
        return shard % self.processes == self.index

    def _total(self) -> int | None:
        """How many records this process answers for."""
        count, size = self.source.estimate, self.manifest.shard_size
        if count is None:
            return None
        shards = range(self.index, self.manifest.shard_count(count), self.processes)
        return self.views.epochs * sum(min(size, count - shard * size) for shard in shards)

    def _write_epoch(self, epoch: int, stack: contextlib.ExitStack) -> None:
        size = self.manifest.shard_size
        rows, total = 0, self._total()
        shard: shards.Shard | None = None
        for row, x in self.source.batches(size):
            count = len(keras.tree.flatten(x)[0])
            rows = row + count
            touched = range(row // size, -(-rows // size))
            wanted = [i for i in touched if self._mine(i)]
            if epoch == 0:
                with self._undone():
                    self._look_at_others(row, x, [i for i in touched if not self._mine(i)])
            if not wanted:
                continue
            inputs = samples.arrays(x)
            crc = samples.digests(inputs)
            with self._undone():
                self._compare_inputs(epoch, row, inputs, crc, wanted)
            answered: _Answered | None = None
            for i in wanted:
                start, stop = max(row, i * size), min(rows, (i + 1) * size)
                here = slice(start - row, stop - row)
                if (epoch, i) not in self.finished:
                    if answered is None:
                        answered = self._answer(x, epoch, row, count)
                    if shard is None:
                        first = samples.part(answered.view, here.start, here.start + 1)
                        shard = self._open(epoch, i, self.teacher.given(first), stack)
                    if shard.finished is not None:
                        self.finished[epoch, i] = shard.finished
                        shard = None
                        self.done += stop - start
                        continue
                    with self._named_failure(i):
                        views = None if answered.crc is None else answered.crc[here]
                        shard.append(answered.records[here], crc[here], views)
                        if stop == (i + 1) * size:
                            self.finished[epoch, i] = shard.finish()
                            self._written.append((epoch, i))
                            shard = None
                elif start == i * size:
                    with self._undone():
                        self._compare_given(epoch, i, samples.part(x, here.start, here.start + 1))
                self.done += stop - start
            self.progress(self.done, total)
        if shard is not None:
            with self._named_failure(shard.index):
                self.finished[epoch, shard.index] = shard.finish()
                self._written.append((epoch, shard.index))
        self._require_length(epoch, rows)

    def _open(
        self, epoch: int, index: int, given: str, stack: contextlib.ExitStack
    ) -> shards.Shard:
        with self._named_failure(index):
            return shards.Shard(
                self.root, epoch, index, self.manifest.identity, given, self._look, stack
            )

    def _answer(self, x: Tensors, epoch: int, row: int, count: int) -> _Answered:
        view, seed = self.views(x, epoch, row, count)
        if epoch == 0 == row and len(self.first) == count:
            records = self.first
        else:
            records = self.teacher.records(view, row)
            if seed is not None:
                records["seed"] = seed
        return _Answered(records, None if seed is None else samples.digests(view), view)

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Take back what this call wrote where it shows not to belong to the other shards."""
        try:
            yield
        except ValueError:
            for epoch, shard in self._written:
                for name in (layout.entry_file(epoch, shard), layout.records_file(epoch, shard)):
                    (self.root / name).unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _named_failure(self, shard: int) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"Shard {shard} of `{self.root}` could not be written: {error.strerror or error}. "
                f"{len(self.finished)} finished shards are untouched; mend the disk and call "
                "`write` again, which goes on there",
            ) from error

    def _compare_inputs(
        self, epoch: int, row: int, inputs: Tensors, crc: np.ndarray, touched: Sequence[int]
    ) -> None:
        """Find data that differ from those of an earlier call or epoch."""
        size = self.manifest.shard_size
        described = samples.describe(inputs)
        if described != self.manifest.inputs:
            raise ValueError(
                f"The inputs change within the data: from row {row} on they are {described}, and "
                f"the first are {self.manifest.inputs}. Give all samples one shape and dtype."
            )
        if row == 0:
            self._compare_first(crc)
        for i in touched:
            if (0, i) in self.finished:
                start, stop = max(row, i * size), min(row + len(crc), (i + 1) * size)
                self._compare_known(i, start, crc[start - row : stop - row], epoch)

    def _compare_first(self, crc: np.ndarray) -> None:
        """Find data that came in another order when the first batch was looked at."""
        both = min(len(crc), len(self.first_crc))
        if (crc[:both] != self.first_crc[:both]).any():
            raise ValueError(
                "The data come in another order each time they are read: the first batch is "
                "another than a moment ago. Write the cache before the data are shuffled (or pass "
                "`reshuffle_each_iteration=False`), and shuffle what was joined."
            )

    def _compare_known(self, shard: int, start: int, found: np.ndarray, epoch: int = 0) -> None:
        """Compare rows from `start` on with those of a finished shard."""
        if self._known[0] != shard:
            file = self.root / layout.inputs_file(shard)
            self._known = (shard, np.frombuffer(storage.read_bytes(file), "<u4"))
        offset = start - shard * self.manifest.shard_size
        known = self._known[1][offset : offset + len(found)]
        if len(known) != len(found) or (known != found).any():
            short = len(known) < len(found)
            first = start + (len(known) if short else int(np.argmax(known != found)))
            when = "earlier in this call" if epoch else "when the shards were written"
            raise ValueError(
                f"The data are not those of the cache `{self.root}`: row {first} differs from "
                f"what it was {when}. Pass the same samples in the same order (no shuffling "
                "before the cache), or choose another path."
            )

    def _look_at_others(self, row: int, x: Tensors, others: Sequence[int]) -> None:
        """Compare the beginnings of shards that other processes write, as far as they are there."""
        size = self.manifest.shard_size
        for i in others:
            if i * size < row:
                continue
            crc = samples.digests(samples.part(x, i * size - row, (i + 1) * size - row))
            self._others[i] = crc
            if (0, i) in self.finished:
                self._compare_known(i, i * size, crc)

    def _compare_given(self, epoch: int, shard: int, x: Tensors) -> None:
        """Find another augmentation or other `teacher_inputs` than a finished shard was made with.

        Args:
            epoch: The epoch.
            shard: The shard.
            x: Its first sample, as a batch of one.
        """
        entry = self.finished[epoch, shard]
        row = shard * self.manifest.shard_size
        view = self.views.one(x, epoch, row)
        if "views" in entry:
            file = self.root / layout.views_file(epoch, shard)
            if samples.digests(view)[0] != np.frombuffer(storage.read_bytes(file), "<u4")[0]:
                raise ValueError(
                    f"`{self.root}` holds other views: the augmentation gives another one of row "
                    f"{row} in epoch {epoch} than when the shards were written. Choose another "
                    "path, or delete the folder to write it anew."
                )
        given = self.teacher.given(view)
        if given != entry["given"]:
            raise ValueError(
                f"`{self.root}` holds answers to other `teacher_inputs`: of row {row} the teacher "
                f"was given {entry['given']} there, {given} now. Choose another path, or delete "
                "the folder to write it anew."
            )

    def _require_length(self, epoch: int, rows: int) -> None:
        count = self.manifest.count
        if count is None:
            self.manifest.count = count = rows
        there = sum(entry["samples"] for (e, _), entry in self.finished.items() if e == epoch)
        if rows != count or there > rows:
            raise ValueError(
                f"The data have {rows} samples in epoch {epoch}, and the cache `{self.root}` was "
                f"begun with {max(count, there)}. Pass the same data, or choose another path."
            )

    def _complete(self, earlier: Manifest | None) -> Manifest:
        """Put all checksums into the manifest if every shard is there."""
        manifest = self.manifest
        count = manifest.count or 0
        wanted = list(itertools.product(range(manifest.epochs), range(manifest.shard_count(count))))
        if earlier is not None and earlier.complete:
            # What other processes completed in the meantime counts as well.
            manifest.versions = earlier.versions
        with self._claimed() as require_held:
            if not self._gather(wanted):
                return manifest
            with self._undone():
                for shard, crc in self._others.items():
                    self._compare_known(shard, shard * manifest.shard_size, crc)
            order = hashlib.sha256()
            for shard in range(manifest.shard_count(count)):
                order.update(storage.read_bytes(self.root / layout.inputs_file(shard)))
            manifest.order = order.hexdigest()
            manifest.shards = [self.finished[key] for key in wanted]
            manifest.complete = True
            storage.write_text(self.root / layout.MANIFEST, manifest.dumps(), require_held)
            for epoch, shard in wanted:
                (self.root / layout.entry_file(epoch, shard)).unlink(missing_ok=True)
        storage.clear(self.root)
        return manifest

    def _gather(self, wanted: Sequence[tuple[int, int]]) -> bool:
        """Whether every shard is there, by what the folder says of it now.

        Raises:
            ValueError: If a shard that this call found or wrote is another, or gone, by now.
        """
        there = self._require_ours()
        found = earlier_calls.entries(self.root, there, self.manifest.identity)
        said = {(entry["epoch"], entry["shard"]): entry for entry in found}
        item = self.manifest.record_bytes
        for key in wanted:
            entry = said.get(key)
            if entry is None and key not in self.finished:
                return False
            if entry is None or any(
                reader.file_problem(self.root / name, size, None)
                for name, size, _ in layout.files_of(entry, item)
            ):
                raise ValueError(
                    f"Shard {key[1]} of epoch {key[0]} of `{self.root}` was removed while the "
                    "cache was written. Call `write` again; it writes only what is missing."
                )
            self.finished[key] = entry
        return True


def _versions() -> dict[str, str]:
    import keras_kd

    return {
        "keras_kd": keras_kd.__version__,
        "keras": keras.version(),
        "numpy": np.__version__,
        "backend": keras.backend.backend(),
    }


def _called(
    progress: Callable[[int, int | None], None] | None,
) -> Callable[[int, int | None], None]:
    """What is told how far the work is, or `TypeError` before it begins."""
    if progress is not None and not callable(progress):
        raise TypeError(
            "`progress` is a function of two numbers, records done and in all. Received: progress="
            f"{progress!r}."
        )
    return progress or (lambda done, total: None)

"""What is written of a shard, and which views of the data it answers."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_kd.cache import layout, samples, storage
from keras_kd.cache.remote import Place
from keras_kd.utils.types import Tensors


@dataclasses.dataclass
class Views:
    """Which view of the data each epoch shows."""

    augment: Callable[[Any, int], Any] | None
    seed: int
    epochs: int
    first_view: int | None = None

    def __call__(self, x: Tensors, epoch: int, row: int, count: int) -> tuple[Any, Any]:
        """One batch as the teacher sees it, and the seeds or `None`."""
        if self.augment is None:
            return x, None
        seed = samples.seeds(self.seed, epoch, np.arange(row, row + count))
        view = samples.views(self.augment, x, seed)
        self._require_repeatable(x, seed[:1], view, row)
        if epoch == 0 == row:
            self.first_view = int(samples.digests(view)[0])
        return view, seed

    def one(self, x: Tensors, epoch: int, row: int) -> Any:
        """The view of one sample, given as a batch of one."""
        if self.augment is None:
            return x
        return samples.views(self.augment, x, samples.seeds(self.seed, epoch, np.array([row])))

    def _require_repeatable(self, x: Tensors, seed: np.ndarray, view: Tensors, row: int) -> None:
        """Find an augmentation that draws from more than its seed: one sample a batch."""
        again = samples.views(self.augment, samples.part(x, 0, 1), seed)  # type: ignore[arg-type]
        if samples.digests(again)[0] != samples.digests(samples.part(view, 0, 1))[0]:
            raise ValueError(
                f"The augmentation `{samples.name_of(self.augment)}` gives "  # type: ignore[arg-type]
                f"another view of row {row} when it is called again with the same seed. It must "
                "depend on the sample and the seed alone: draw from "
                "`np.random.default_rng(seed)`."
            )

    def to_json(self) -> dict[str, Any] | None:
        """What the manifest says of the views."""
        if self.augment is None:
            return None
        return {
            "name": samples.name_of(self.augment),
            "seed": self.seed,
            "first_view": self.first_view,
        }


class Shard:
    """A shard that is being written, under a temporary name and a lock.

    Args:
        root: The cache's folder.
        epoch: Its epoch.
        index: Its number.
        cache: What tells this cache from another.
        given: What the teacher was given for the first row.
        look: Called once the lock is held: raises where the folder is that of
            another cache by now, and gives the entry of a shard that another
            process has finished in the meantime.
        stack: Closes what is open if anything fails.

    Attributes:
        finished: The entry, where the shard is there already; nothing is open then.
    """

    def __init__(
        self,
        root: Place,
        epoch: int,
        index: int,
        cache: str,
        given: str,
        look: Callable[[int, int], dict[str, Any] | None],
        stack: contextlib.ExitStack,
    ) -> None:
        self.root, self.epoch, self.index = root, epoch, index
        self._cache, self._given = cache, given
        file = root / layout.records_file(epoch, index)
        lock = root / f"{file.name}.lock"
        self._lock = stack.enter_context(contextlib.ExitStack())
        self._require_held = self._lock.enter_context(
            storage.claimed(lock, f"shard {index} of `{root}`")
        )
        self._look = look
        self.finished = look(epoch, index)
        if self.finished is not None:
            self._lock.close()
            return
        self._file = stack.enter_context(contextlib.ExitStack())
        self._stream = self._file.enter_context(storage.replacing(file, self._require_held))
        self._digest = hashlib.sha256()
        self._crc: list[np.ndarray] = []
        self._views: list[np.ndarray] = []
        self.samples = 0

    def append(self, records: np.ndarray, crc: np.ndarray, views: np.ndarray | None) -> None:
        """Write records, and keep the CRC-32 of their inputs and views for the end."""
        data = np.ascontiguousarray(records).view("u1").data
        self._stream.write(data)
        self._digest.update(data)
        self._crc.append(crc)
        if views is not None:
            self._views.append(views)
        self.samples += len(records)

    def finish(self) -> dict[str, Any]:
        """Give the shard its name, and only then say that it is there."""
        self._look(self.epoch, self.index)
        self._file.close()
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "shard": self.index,
            "samples": self.samples,
            "given": self._given,
            "sha256": self._digest.hexdigest(),
        }
        if self.epoch == 0:
            entry["inputs"] = self._write(layout.inputs_file(self.index), self._crc)
        if self._views:
            entry["views"] = self._write(layout.views_file(self.epoch, self.index), self._views)
        name = layout.entry_file(self.epoch, self.index)
        said = layout.sealed({**entry, "cache": self._cache})
        storage.write_text(self.root / name, said, self._require_held)
        self._lock.close()
        return entry

    def _write(self, name: str, crc: list[np.ndarray]) -> str:
        """Write checksums; gives the SHA-256 of the file."""
        data = np.concatenate(crc).astype("<u4").tobytes()
        with storage.replacing(self.root / name, self._require_held) as stream:
            stream.write(data)
        return hashlib.sha256(data).hexdigest()

"""Whether a cache is whole, and whose answers to what it holds.

Keras is imported where data or a teacher are compared; the files alone are checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keras_kd.cache import claims
from keras_kd.cache.layout import Manifest
from keras_kd.cache.reader import Records, refuse_claim
from keras_kd.utils.types import Data, PathLike, Tensors

if TYPE_CHECKING:
    from keras_kd.teachers.base import Teacher, TeacherLike


def verify(path: PathLike, teacher: TeacherLike = None, data: Data | None = None) -> Manifest:
    """Compare every byte of a cache with its checksums, and the manifest with the shards.

    Every sample of every epoch has to be there once, in the order and with the
    first sample, view and seeds that the manifest names, and every record has to
    hold what a teacher can answer: finite numbers of known classes.

    The checksums guard against accidents. Whoever can write into the folder can
    write another cache there, with checksums that fit: pass `teacher` and
    `data` to know whose answers to what these should be.

    Args:
        path: Folder of the cache, or a URL.
        teacher: The model, list or `Teacher` whose answers these should be, or
            `None`.
        data: The data they should belong to, as for `write`, or `None`.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: If there is no cache.
        ValueError: If it is not finished, files are missing or damaged, or the
            teacher or the data are others.

    Examples:
        >>> keras_kd.cache.verify("cache").count
        60000
    """
    records = Records(path, verify=True)
    refuse_claim(records.root, claims.records_problem(records.read, records.manifest))
    if teacher is not None:
        from keras_kd.teachers import resolve

        require_teacher(records, resolve.make(teacher, None))
    if data is not None:
        from keras_kd.cache import sources

        rows = 0
        for row, x in sources.source(data, 1024).batches(1 << 30):
            rows = row + require_inputs(records, x, row)
        require_count(records, rows)
    return records.manifest


def require_teacher(records: Records, teacher: Teacher | None) -> None:
    """Raise `ValueError` unless the cache holds the answers of this teacher; `None` is any."""
    saved = records.manifest.teacher
    if teacher is not None and teacher.fingerprint() != saved["fingerprint"]:
        raise ValueError(
            f"`{records.root}` is the cache of another teacher, `{saved['name']}`, whose layers or "
            f"weights differ from those of the given `{teacher.name}`. Pass that teacher, or write "
            "a cache of this one to another path."
        )


def require_count(records: Records, rows: int) -> None:
    """Raise `ValueError` unless the data have as many samples as the cache."""
    if rows != records.count:
        raise ValueError(
            f"The data have {rows} samples, and the cache `{records.root}` has {records.count}. "
            "Pass the data that the cache was written from, in full."
        )


def require_views(records: Records, view: Tensors, rows: np.ndarray, epoch: int, name: str) -> None:
    """Raise `ValueError` unless views are those that the teacher answered.

    Args:
        records: The cache.
        view: A batch of views.
        rows: `(n,)` their row numbers.
        epoch: Which view of the samples they are.
        name: What the augmentation is called.
    """
    from keras_kd.cache import samples

    other = samples.digests(view) != records.views(rows, epoch)
    if other.any():
        raise ValueError(
            f"The augmentation `{name}` gives another view of row {rows[int(np.argmax(other))]} "
            f"in epoch {epoch} than when the cache was written. It must depend on the sample and "
            "the seed alone; if it was changed, write the cache again."
        )


def require_inputs(records: Records, x: Tensors, row: int) -> int:
    """Raise `ValueError` unless a batch is the one that the teacher answered.

    Args:
        records: The cache.
        x: Inputs as they were when the cache was written.
        row: The row number of the first.

    Returns:
        How many samples the batch has.
    """
    from keras_kd.cache import samples

    inputs = samples.arrays(x)
    described = samples.describe(inputs)
    if described != records.manifest.inputs:
        raise ValueError(
            f"The data are not those of the cache `{records.root}`: it answers inputs of the form "
            f"{records.manifest.inputs}. Received: {described}. Pass the very inputs that the "
            "teacher was given."
        )
    found = samples.digests(inputs)
    if row + len(found) > records.count:
        raise ValueError(
            f"The data have more samples than the cache `{records.root}`, which has "
            f"{records.count}. Pass the data that the cache was written from."
        )
    known = records.inputs(np.arange(row, row + len(found)))
    if (found != known).any():
        first = row + int(np.argmax(found != known))
        raise ValueError(
            f"The data are not those of the cache `{records.root}`, or not in its order: row "
            f"{first} is another sample. Pass the same data in the order in which they were "
            "cached; join them before shuffling and augmenting."
        )
    return len(found)

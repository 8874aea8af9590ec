"""What a manifest says, compared with itself and with the shards."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from keras_kd.cache import layout, storage
from keras_kd.cache.layout import Manifest
from keras_kd.cache.remote import Place

_KINDS = ("logits", "softmax", "sigmoid")
_ROWS = 1 << 14


def form_problem(manifest: Manifest) -> str | None:
    """What no manifest says that `write` wrote, or `None`.

    Args:
        manifest: A manifest of this version, whose values may be anything that
            JSON holds.
    """
    teacher, augment = manifest.teacher, manifest.augment
    named = isinstance(teacher, dict) and all(
        isinstance(teacher.get(key), str) for key in ("name", "fingerprint")
    )
    form = manifest.layout
    wrong = {
        "`teacher` lacks its name or fingerprint": not named,
        "`epochs` is no positive integer": not _whole(manifest.epochs, 1),
        "`shard_size` is no positive integer": not _whole(manifest.shard_size, 1),
        "`count` is no positive integer": not _whole(manifest.count, 1, manifest.complete),
        "`first` is no CRC-32": not _whole(manifest.first, 0, False, 1 << 32),
        "`augment` names no seed": augment is not None
        and not (isinstance(augment, dict) and _whole(augment.get("seed"), 0)),
        "seeds are stored without views, or views without seeds": form.seeded
        is not (augment is not None),
        "`layout` has another dtype": form.dtype not in ("float16", "float32"),
        "`layout` has no outputs": not form.outputs,
        "an output has a shape that is none": not all(
            _is_shape(output.shape) and output.shape for output in form.outputs
        ),
        "a tap has a shape that is none": not all(_is_shape(shape) for _, shape in form.taps),
        "an output is of no known kind": not all(output.kind in _KINDS for output in form.outputs),
        "an output stores more classes than it has": not all(
            output.top_k is None or _whole(output.top_k, 1) for output in form.outputs
        ),
        "an output does not tell which classes it stores": not all(
            type(output.partial) is bool for output in form.outputs
        ),
        "`shards` is no list of entries": not (
            isinstance(manifest.shards, list) and all(map(_is_entry, manifest.shards))
        ),
    }
    found = next((what for what, is_wrong in wrong.items() if is_wrong), None)
    if found is None and any(o.top_k is not None and o.top_k > o.classes for o in form.outputs):
        return "an output stores more classes than it has"
    return found


def _whole(value: object, low: int, needed: bool = True, end: int | None = None) -> bool:
    """Whether a value is an integer of a range, or `None` where it is not needed."""
    if value is None:
        return not needed
    return type(value) is int and value >= low and (end is None or value < end)


def _is_shape(shape: Iterable[object]) -> bool:
    return all(_whole(size, 0) for size in shape)


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and _whole(entry.get("epoch"), 0)
        and _whole(entry.get("shard"), 0)
        and _whole(entry.get("samples"), 1)
        and isinstance(entry.get("sha256"), str)
    )


def shards_problem(manifest: Manifest) -> str | None:
    """What keeps the entries of a finished cache from covering every sample of every epoch once.

    Args:
        manifest: The manifest of a finished cache.
    """
    count, size = manifest.count or 0, manifest.shard_size
    wanted = manifest.shard_count(count)
    seen = set()
    for entry in manifest.shards:
        epoch, shard = key = entry["epoch"], entry["shard"]
        if key in seen:
            return f"shard {shard} of epoch {epoch} is listed twice"
        if epoch >= manifest.epochs or shard >= wanted:
            return (
                f"shard {shard} of epoch {epoch} is listed, and {count} samples in "
                f"{manifest.epochs} epochs have shards 0 to {wanted - 1} of epochs 0 to "
                f"{manifest.epochs - 1}"
            )
        samples_there = min(size, count - shard * size)
        if entry["samples"] != samples_there:
            return (
                f"shard {shard} of epoch {epoch} is said to have {entry['samples']} samples, and "
                f"has {samples_there} of {count}"
            )
        seen.add(key)
    if len(seen) != manifest.epochs * wanted:
        first = next(
            (epoch, shard)
            for epoch in range(manifest.epochs)
            for shard in range(wanted)
            if (epoch, shard) not in seen
        )
        return (
            f"{manifest.epochs * wanted - len(seen)} shards are not listed, the first is shard "
            f"{first[1]} of epoch {first[0]}"
        )
    return None


def checksums_problem(root: Place, manifest: Manifest) -> str | None:
    """What the manifest says of all inputs that their checksums do not.

    Args:
        root: The folder, whose files have the sizes of the manifest.
        manifest: The manifest of a finished cache.
    """
    count = manifest.shard_count(manifest.count or 0)
    order, first = hashlib.sha256(), b""
    for shard in range(count):
        data = storage.read_bytes(root / layout.inputs_file(shard))
        first = first or data[:4]
        order.update(data)
    if manifest.order != order.hexdigest():
        return "the order of the samples is not that of the shards"
    if manifest.first != int.from_bytes(first, "little"):
        return "the first sample is not that of the shards"
    if manifest.augment is not None:
        data = storage.read_bytes(root / layout.views_file(0, 0))
        if manifest.augment.get("first_view") != int.from_bytes(data[:4], "little"):
            return "the first view is not that of the shards"
    return None


def records_problem(
    read: Callable[[np.ndarray, int], np.ndarray], manifest: Manifest
) -> str | None:
    """What the records hold that a teacher's answers never are, or `None`.

    Args:
        read: From row numbers and an epoch to records.
        manifest: The manifest of a finished cache.
    """
    count, form = manifest.count or 0, manifest.layout
    for epoch in range(manifest.epochs):
        for start in range(0, count, _ROWS):
            rows = np.arange(start, min(start + _ROWS, count))
            records = read(rows, epoch)
            if form.seeded:
                from keras_kd.cache import samples

                seeds = samples.seeds((manifest.augment or {})["seed"], epoch, rows)
                other = records["seed"] != seeds
                if other.any():
                    return f"{_row(rows, other, epoch)} has the seed of another view"
            for i, output in enumerate(form.outputs):
                if output.top_k is None:
                    continue
                bad = records[f"classes_{i}"] >= output.classes
                bad = bad.reshape(len(rows), -1).any(axis=1)
                if bad.any():
                    where = _row(rows, bad, epoch)
                    return f"{where} names a class beyond the {output.classes} of the teacher"
            for name in records.dtype.names or ():
                if records.dtype[name].base.kind != "f":
                    continue
                bad = ~np.isfinite(records[name]).reshape(len(rows), -1).all(axis=1)
                if bad.any():
                    return f"{_row(rows, bad, epoch)} holds NaN or infinite numbers"
    return None


def _row(rows: np.ndarray, bad: np.ndarray, epoch: int) -> str:
    return f"row {rows[int(np.argmax(bad))]} of epoch {epoch}"

"""What an earlier call, or another process, left in the folder of a cache."""

from typing import Any

from keras_kd.cache import layout, storage
from keras_kd.cache.layout import Manifest
from keras_kd.cache.remote import Place


def entries(root: Place, there: Manifest, cache: str) -> list[dict[str, Any]]:
    """What a folder says of the finished shards of a cache, the newest word last.

    Args:
        root: The folder.
        there: Its manifest.
        cache: What tells this cache from another.
    """
    found = []
    for file in root.iterdir():
        if file.name.startswith("shard-") and file.name.endswith(".json"):
            entry = _read_entry(file)
            # Not one that an earlier cache left in the same folder.
            if entry is not None and entry.pop("cache", None) == cache:
                found.append(entry)
    return [*there.shards, *found]


def _read_entry(file: Place) -> dict[str, Any] | None:
    """What a finished shard says of itself; `None` where the cache was completed meanwhile."""
    try:
        entry = layout.unsealed(storage.read_bytes(file).decode())
        int(entry["epoch"]), int(entry["shard"]), int(entry["samples"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`{file}` is damaged: it is no entry of a finished shard ({error!r}). Delete it and "
            "call `write` again; only that shard is written anew."
        ) from error
    return entry


def require_same(earlier: Manifest, now: Manifest, root: Place, shard_size: int | None) -> None:
    """Raise `ValueError` where a folder holds another cache than the one to be written.

    Args:
        earlier: The manifest in the folder.
        now: The one that would be written.
        root: The folder.
        shard_size: What the user asked for.
    """
    pairs = [
        (
            f"the cache of another teacher, `{earlier.teacher['name']}`",
            earlier.teacher["fingerprint"],
            now.teacher["fingerprint"],
        ),
        (
            "answers of the teacher in another precision",
            earlier.teacher["precision"],
            now.teacher["precision"],
        ),
        (
            "answers of the teacher in another precision",
            earlier.teacher["runs"],
            now.teacher["runs"],
        ),
        ("records of another form", earlier.layout.to_json(), now.layout.to_json()),
        ("answers to other inputs", earlier.inputs, now.inputs),
        (
            "answers to other data, or to data in another order, by the CRC-32 of row 0",
            earlier.first,
            now.first,
        ),
        (
            "answers to other `teacher_inputs`, by what the teacher is given for row 0",
            earlier.teacher["given"],
            now.teacher["given"],
        ),
        ("other views", earlier.augment, now.augment),
        ("another number of epochs", earlier.epochs, now.epochs),
        ("shards of another size", earlier.shard_size, shard_size or earlier.shard_size),
        (
            "answers to another number of samples",
            earlier.count,
            earlier.count if now.count is None else now.count,
        ),
    ]
    for what, there, given in pairs:
        if there is not None and there != given:
            raise ValueError(
                f"`{root}` holds {what}: {there} there, {given} now. Choose another path, or "
                "delete the folder to write it anew."
            )

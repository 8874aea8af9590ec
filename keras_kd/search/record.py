"""What a folder of a search says of itself, so that another search never goes on in it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_kd.export.writing import write_file
from keras_kd.utils import archives, files, folders

FILE = "search.json"
FORMAT = "keras_kd.search"


def opened(folder: str | os.PathLike[str], kind: str, about: dict[str, Any]) -> Path:
    """Make a folder for a search, or find the same search in it.

    Args:
        folder: Made if it is missing.
        kind: `"methods"` or `"tune"`.
        about: Plain JSON values that make this search what it is; but for `config`, of which the
            last one given counts.

    Returns:
        The folder.

    Raises:
        FileExistsError: If it holds another search, or anything else.
        ValueError: If its record is damaged.
        OSError: If it cannot be written.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"`{place}` is a file. Pass the path of a folder.")
    files.require_writable(place)
    said = {"format": FORMAT, "kind": kind, "about": json.loads(json.dumps(about))}
    place.mkdir(parents=True, exist_ok=True)
    # Two processes that begin at once must not both think that they were first.
    with files.claimed(place / f"{FILE}.lock", lambda owner: _BUSY.format(place, owner), 60.0):
        if (place / FILE).exists():
            found = read(place / FILE)
            _require_same(found, said, place)
            if about.get("config") and found["about"].get("config") != about["config"]:
                found["about"]["config"] = said["about"]["config"]
                write_file(place / FILE, json.dumps(found, indent=2) + "\n")
            return place
        names = [name for name in os.listdir(place) if not name.startswith(FILE)]
        if names:
            what = {"cache": "a teacher's cache", "export": "exported files"}.get(
                folders.holds(place), f"other files (`{sorted(names)[0]}`)"
            )
            raise FileExistsError(
                f"`{place}` holds {what} and no search. Pass an empty or a new folder."
            )
        write_file(place / FILE, json.dumps(said, indent=2) + "\n")
    return place


_BUSY = "The folder `{}` is being opened by process {}. Call this again in a moment."


def read(path: Path) -> dict[str, Any]:
    """Read what a folder says of itself.

    Args:
        path: The file in it.

    Raises:
        ValueError: If it is damaged, or the record of something else.
    """
    try:
        found = json.loads(archives.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`{path}` is damaged: {error}. Restore it, or begin in another folder."
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"`{path}` is no record of a search. Begin in another folder.")
    return found


def _require_same(found: dict[str, Any], said: dict[str, Any], place: Path) -> None:
    if found.get("kind") != said["kind"]:
        raise FileExistsError(
            f"`{place}` holds a search of kind {found.get('kind')!r}, and this one is of kind "
            f"{said['kind']!r}. Pass another folder."
        )
    before = found.get("about") or {}
    for key, value in said["about"].items():
        # Where things lie may change: what they are is known by their digests.
        if key != "config" and before.get(key) != value:
            raise FileExistsError(
                f"`{place}` holds another search: its {key} differs "
                f"({_short(before.get(key))} there, {_short(value)} here). Pass the same arguments "
                "to go on with it, or another folder."
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def slug(name: str) -> str:
    """A name as part of a file's name, different for different names."""
    kept = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:40]
    own = "" if kept == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{kept}{own}"


def packed(**arrays: np.ndarray) -> bytes:
    """Arrays as the bytes of an `.npz` file."""
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(array) for name, array in arrays.items()})
    return stream.getvalue()


def plain(value: object) -> Any:
    """A configuration as JSON values, numbers of NumPy among them."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | type(None)) else repr(value)

"""What kind of folder a path is, by its `manifest.json` and its files."""

import json
import os
import re

from keras_kd.utils import archives

MANIFEST = "manifest.json"
CACHE_FORMAT = "keras_kd.cache"

_CACHE_FILE = re.compile(r"(records-\d+-\d+\.bin|shard-\d+-\d+\.json|inputs-\d+\.crc)(\..*)?")


def holds(folder: str | os.PathLike[str]) -> str:
    """What a local folder holds that one of this package's commands wrote.

    Damaged ones count as what they were: nothing may be written over them either.

    Args:
        folder: A path, at which there may be nothing.

    Returns:
        `"cache"` for the folder of a teacher's cache, finished or not,
        `"export"` for one that `keras_kd.export` wrote, `"other"` where a
        `manifest.json` of something else lies, `"nothing"` otherwise.
    """
    try:
        names = set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    if any(_CACHE_FILE.fullmatch(name) for name in names):
        return "cache"
    if MANIFEST not in names:
        return "nothing"
    try:
        said = json.loads(archives.read_bytes(os.path.join(folder, MANIFEST)))
    except (OSError, ValueError, RecursionError):
        return "other"
    if not isinstance(said, dict):
        return "other"
    if said.get("format") == CACHE_FORMAT:
        return "cache"
    return "export" if "schema" in said and "artifacts" in said else "other"


def require_no_cache(folder: str | os.PathLike[str]) -> None:
    """Raise `FileExistsError` where an export would replace the manifest of a teacher's cache."""
    if holds(folder) == "cache":
        raise FileExistsError(
            f"`{os.fspath(folder)}` holds a teacher's cache, whose `{MANIFEST}` and answers an "
            "export would replace. Choose another folder, or delete the cache first."
        )

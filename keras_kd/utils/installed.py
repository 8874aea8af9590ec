"""Which packages are installed, as the names of their folders say it.

`importlib.metadata` takes longer than importing ONNX does to say as much: it imports the parser of
e-mails, and reads all that a package says of itself. It is asked where the names do not tell.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, in the order of the names."""
    told = _told()
    found = {name: told.get(_same(name)) or _asked(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}


def _told() -> dict[str, str]:
    """What folders `NAME-VERSION.dist-info` say; the first one of a package counts."""
    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            entries = os.listdir(folder or os.curdir)
        except OSError:
            # A zipped file, or a folder that is no more.
            continue
        for entry in entries:
            stem, ending = os.path.splitext(entry)
            if ending in (".dist-info", ".egg-info"):
                name, _, version = stem.partition("-")
                # The older form holds its version inside.
                found.setdefault(_same(name), version if ending == ".dist-info" else "")
    return found


def _same(name: str) -> str:
    """One spelling of all those that mean one package."""
    return re.sub(r"[-_.]+", "_", name).lower()


def _asked(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

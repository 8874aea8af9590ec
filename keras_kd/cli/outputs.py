"""Where the commands write, checked before any work starts."""

from __future__ import annotations

from pathlib import Path

from keras_kd.export.target import check_names_free, check_writable


def folder_of(out: str | None, default: Path, option: str = "--out") -> Path:
    """Return the folder that an option names.

    Raises:
        ValueError: If it is empty, which would be the folder that the command runs in.
    """
    if out == "":
        raise ValueError(f"`{option}` is empty. Name a folder, or leave it out for `{default}`.")
    return default if out is None else Path(out)


def check_file_to_write(path: str | None, option: str) -> None:
    """Refuse a path at which no file can be written, before any work.

    Args:
        path: What the option gave.
        option: Its name.

    Raises:
        ValueError: If it is empty, or there is no folder that it lies in.
        OSError: If something else has its name, or nothing can be written there.
    """
    if path is None:
        return
    if not path:
        raise ValueError(f"`{option}` is empty. Name a file, or leave it out.")
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f"`{option}`: there is no folder `{file.parent}`. Make it first.")
    check_names_free(file.parent, (file.name,))
    check_writable(file.parent)

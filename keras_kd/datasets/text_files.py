"""Text files of data: plain or gzipped UTF-8, read whole, within bounds."""

from __future__ import annotations

import gzip
import os
import re
import unicodedata
import zlib

from keras_kd.utils import archives

MAX_BYTES = 4 * 2**30
"""Bytes of text that a file may hold, unpacked: tables in memory are several times as large."""


_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")


def read(path: str | os.PathLike[str], what: str) -> str:
    """Read a text file.

    Args:
        path: Path of the file; one that ends in `.gz` is unpacked.
        what: What the errors expect, such as `"a CSV file"`.

    Returns:
        Its text, line ends as they are, without a byte-order mark.

    Raises:
        ValueError: If it is missing, no regular file, damaged, not UTF-8, empty or too large, or
            holds a zero byte.
    """
    name = os.fspath(path)
    problem = archives.file_problem(name)
    if problem is not None:
        raise ValueError(f"`{name}` {problem}. Pass the path of {what}.")
    try:
        with archives.opened(name) as stream:
            if name.endswith(".gz"):
                with gzip.GzipFile(fileobj=stream) as unpacked:
                    data = unpacked.read(MAX_BYTES + 1)
            else:
                data = stream.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"`{name}` is damaged or no gzip file: {error}. Copy it again.") from error
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"`{name}` has more than {MAX_BYTES >> 30} GiB of text. Train from a "
            "`tf.data.Dataset` with `keras_kd.Distiller`."
        )
    try:
        # A program that adds a mark to what has one leaves two.
        text = data.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"`{name}`, line {line}: byte {data[error.start]:#04x} is not UTF-8. Save the file as "
            "UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"`{name}` is empty. Pass the path of {what}.")
    zero = text.find("\0")
    if zero >= 0:
        raise ValueError(
            f"`{name}`, line {len(lines(text[:zero]))} holds a zero byte: the file is damaged, no "
            "text, or in another encoding. Save the file as UTF-8."
        )
    return text


def lines(text: str) -> list[str]:
    """The lines of a text, whatever system ended them, and no others.

    `str.splitlines` also splits at characters that words may hold.
    """
    return re.split(r"\r\n|\n|\r", text)


def visible(text: str) -> bool:
    """Whether anything of a text is seen: spaces, control and format characters are not."""
    return any(unicodedata.category(letter) not in _UNSEEN for letter in text)

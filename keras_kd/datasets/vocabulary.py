"""Words and their numbers: the same numbers for every split, and for whoever runs the file later.

Number 0 is padding and 1 any unknown word, as in Keras's `TextVectorization` and `StringLookup`,
whose `get_vocabulary()` a vocabulary file may hold. It imports NumPy alone.
"""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from keras_kd.datasets import text_files
from keras_kd.datasets.tfds import MAX_BYTES

PADDING, UNKNOWN = "", "[UNK]"

MOST_WORDS = 20_000
"""Words of the training rows that get a number, the most frequent first."""

LONGEST = 128
"""Words that are read of a row where no model says how many it takes."""

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def words(text: str) -> list[str]:
    """Split a text as Keras's `TextVectorization` does: lowercase, without punctuation."""
    return _PUNCTUATION.sub("", text.lower()).split()


def build(rows: Iterable[Sequence[str]], most: int = MOST_WORDS, least: int = 2) -> list[str]:
    """Number the words of the training rows, the most frequent first, equals in alphabetical order.

    Args:
        rows: Words of each row.
        most: Entries of the vocabulary, padding and unknown included.
        least: How often a word must occur. Of those that occur once a model learns what to do with
            words that it does not know.

    Returns:
        The words by number.
    """
    counts = Counter(word for row in rows for word in row)
    known = [word for word in counts if counts[word] >= least]
    ranked = sorted(known, key=lambda word: (-counts[word], word))
    return [PADDING, UNKNOWN, *ranked[: most - 2]]


def read(path: str | os.PathLike[str]) -> list[str]:
    """Read a vocabulary: one word a line, the first line empty, the second `[UNK]`.

    Raises:
        ValueError: If the file cannot be read, does not begin so, or names a word twice.
    """
    name = os.fspath(path)
    text = text_files.read(name, "a vocabulary, one word a line")
    found = text_files.lines(text.removesuffix("\n").removesuffix("\r"))
    if len(found) < 3 or found[0] != PADDING or found[1] != UNKNOWN:
        raise ValueError(
            f"`{name}` begins with {found[:2]}, but the first two lines of a vocabulary are an "
            f"empty one (padding) and `{UNKNOWN}`, as Keras's `get_vocabulary()` has them."
        )
    seen: dict[str, int] = {}
    for line, word in enumerate(found, 1):
        if word in seen:
            raise ValueError(
                f"`{name}` has the word `{word}` in line {seen[word]} and in line {line}. Each "
                "number is one word's."
            )
        seen[word] = line
    return found


def encode(
    rows: Sequence[Sequence[str]], vocabulary: Sequence[str], length: int
) -> tuple[Any, int, int]:
    """Turn words into numbers.

    Args:
        rows: Words of each row.
        vocabulary: Words by number.
        length: Numbers of a row; longer rows are cut, shorter ones are padded with 0.

    Returns:
        int32 `(rows, length)`, how many rows were cut, and how many words have no number.

    Raises:
        ValueError: If that needs too much memory.
    """
    if 4 * len(rows) * length > MAX_BYTES:
        raise ValueError(
            f"{len(rows):,} rows of `length={length:,}` need more than {MAX_BYTES >> 30} GiB. Pass "
            f"a smaller length: the longest row has {max(map(len, rows)):,} words."
        )
    numbers = {word: i for i, word in enumerate(vocabulary) if i > 1}
    ids = np.zeros((len(rows), length), np.int32)
    cut = unknown = 0
    for i, row in enumerate(rows):
        kept = row[:length]
        cut += len(row) > length
        found = [numbers.get(word, 1) for word in kept]
        unknown += found.count(1)
        ids[i, : len(found)] = found
    return ids, cut, unknown

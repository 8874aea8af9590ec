"""Texts as people type them. A letter that a severity changes, a greater one changes too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEAR = {
    key: "".join(
        row[j]
        for r, row in enumerate(_KEYS)
        for j in range(len(row))
        if abs(r - at) <= 1 and abs(j - place) <= 1 and row[j] != key
    )
    for at, keys in enumerate(_KEYS)
    for place, key in enumerate(keys)
}


def typos(text: str, severity: int, rng: np.random.Generator) -> str:
    """Letters left out, doubled, swapped with the next one, or hit beside their key."""
    rate = (0.02, 0.05, 0.1, 0.15, 0.25)[severity - 1]
    draws, ways, keys = rng.random(len(text)), rng.integers(0, 4, len(text)), rng.random(len(text))
    found: list[str] = []
    i = 0
    while i < len(text):
        letter = text[i]
        if not letter.isalpha() or draws[i] >= rate:
            found.append(letter)
        elif ways[i] == 0:
            pass
        elif ways[i] == 1:
            found.append(letter * 2)
        elif ways[i] == 2 and i + 1 < len(text) and text[i + 1].isalpha():
            found.append(text[i + 1] + letter)
            i += 1
        else:
            near = _NEAR.get(letter.lower(), letter)
            key = near[int(keys[i] * len(near))]
            found.append(key.upper() if letter.isupper() else key)
        i += 1
    return "".join(found)


def casing(text: str, severity: int, rng: np.random.Generator) -> str:
    """Small letters in place of capitals, and the other way round."""
    rate = (0.05, 0.1, 0.25, 0.5, 1.0)[severity - 1]
    draws = rng.random(len(text))
    return "".join(
        letter.swapcase() if draw < rate else letter
        for letter, draw in zip(text, draws, strict=True)
    )


def spacing(text: str, severity: int, rng: np.random.Generator) -> str:
    """Spaces left out, and spaces inside of words."""
    out, within = ((0.05, 0.01), (0.1, 0.02), (0.2, 0.04), (0.35, 0.07), (0.5, 0.1))[severity - 1]
    draws = rng.random(len(text))
    found = []
    for letter, draw in zip(text, draws, strict=True):
        if letter == " ":
            found.append("" if draw < out else letter)
        else:
            found.append(f" {letter}" if draw < within and found else letter)
    return "".join(found)


CORRUPTIONS: dict[str, Callable[[str, int, np.random.Generator], str]] = {
    "typos": typos,
    "casing": casing,
    "spacing": spacing,
}
"""The corruptions of texts by name."""

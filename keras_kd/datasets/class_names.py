"""Names of classes as people read them: two that look the same are one that was written twice."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence

from keras_kd.utils.errors import did_you_mean


def check(names: Sequence[str], where: Callable[[str], str]) -> None:
    """Refuse names that differ only in characters that nobody sees.

    Args:
        names: Of the classes, each once.
        where: Says where a name stands first.

    Raises:
        ValueError: Naming both, and where the second one stands.
    """
    for first, second in _pairs(names, _read):
        raise ValueError(
            f"{where(second)} has the class {ascii(second)[:60]}, which reads like "
            f"{ascii(first)[:60]} and is another one by characters that are not seen. Write the "
            "class in one way."
        )


def by_case(names: Iterable[str]) -> str | None:
    """Return a sentence on names that differ by case alone, or `None`."""
    found = [f"`{first}` and `{second}`" for first, second in _pairs(names, str.casefold)]
    if not found:
        return None
    more = f", and {len(found) - 1:,} more pairs" if len(found) > 1 else ""
    return f"The classes {found[0]} differ by case alone{more}: each is a class of its own."


def hint(name: str, known: Sequence[str]) -> str:
    """Hint at the class that was meant, to end a sentence with.

    Args:
        name: What is no class.
        known: The classes.
    """
    for one in known:
        if one != name and _read(one) == _read(name):
            return f" It reads like {ascii(one)[:60]}, and is {ascii(name)[:60]}."
    return did_you_mean(name, known)


def _read(name: str) -> str:
    """A name as it looks: composed, without what has no width, one space for several."""
    seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFC", seen).split())


def _pairs(names: Iterable[str], form: Callable[[str], str]) -> Iterable[tuple[str, str]]:
    """Names with the first one before them that has the same form."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(form(name), name)
        if first != name:
            yield first, name

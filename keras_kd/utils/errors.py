"""Words that errors share."""

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, known: Iterable[str], *, most: int = 1, quote: str = "`") -> str:
    """Hint at the names that are closest to one that is not known.

    Args:
        given: What was passed.
        known: The names that there are.
        most: How many of them to offer.
        quote: What stands around a name, or `""`.

    Returns:
        `" Did you mean ...?"` with a space before it, to end a sentence with; empty where nothing
        is close.

    Examples:
        >>> did_you_mean("int88", ["int8", "float32"])
        ' Did you mean `int8`?'
    """
    # Letters of another case are nearer than any others.
    names_of = list(known)
    same = [name for name in names_of if name.casefold() == str(given).casefold()]
    close = same[:most] or difflib.get_close_matches(
        str(given), names_of, most, 0.5 if most > 1 else 0.6
    )
    names = [f"{quote}{name}{quote}" for name in close]
    return f" Did you mean {' or '.join(names)}?" if names else ""

"""Names and sentences of unknown origin, made harmless for where they are shown.

A layer may be called anything, and a manifest may come from anywhere: what is text in one place is
a command in another.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 4000
"""Characters of one text that are shown: more is no name and no sentence."""


def plain(text: object, keep: str = "") -> str:
    """Return a text in which nothing acts on a terminal or on the order of its letters.

    Control characters, separators of lines, marks that turn the direction of writing or have no
    width, and halves of surrogate pairs are written as Python writes them in a string.

    Args:
        text: Any value.
        keep: Characters that stay as they are, such as a line break in a text of lines.
    """
    text = str(text)
    if len(text) > LONGEST and "\n" not in keep:
        text = f"{text[:LONGEST]}..."
    # Most texts are plain, and are told so by C.
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter
        if letter in keep or unicodedata.category(letter) not in _ACTING or letter in _JOINERS
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


_ACTING = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
# Emoji and the scripts of South Asia are written with these.
_JOINERS = "\u200c\u200d"


def markdown(text: object) -> str:
    """Return a text that Markdown, HTML in it included, shows as it is, in one line."""
    text = re.sub(r"([\\`*_<>\[\]#|~$&!{}])", r"\\\1", " ".join(plain(text, "\n\t").split()))
    # What GitHub and others make links of without any brackets.
    return re.sub(r"(?i)(?<=\w)(:)(?=//)|(?<=www)(\.)", r"\\\1\2", text).replace("@", "&#64;")


def code(text: object, *, cell: bool = False) -> str:
    """Return a text as a code span of Markdown.

    Args:
        text: Any value.
        cell: Whether it stands in a table, where `|` ends a cell even in a code span.
    """
    text = plain(text) or " "
    if cell:
        text = text.replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    # A space on both sides is not shown, and keeps the text's own backticks from the fence.
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{space}{text}{space}{fence}"


def comment(text: object) -> str:
    """Return a text that ends no comment of Kotlin, Swift, C++, JavaScript or Python early."""
    # A backslash at the end of a line of C++ makes the next line part of the comment.
    return plain(text).replace("*/", "* /").replace("/*", "/ *").replace("\\", "\\\\").rstrip("\\")


def quoted(text: str, language: str) -> str:
    """Return a string literal.

    Args:
        text: What the string holds; halves of surrogate pairs cannot be written.
        language: `"kotlin"`, `"swift"`, `"cpp"`, `"javascript"` or `"python"`.
    """
    return '"' + "".join(_letter(letter, language) for letter in text) + '"'


def _letter(letter: str, language: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    if letter == "$" and language == "kotlin":
        # Kotlin reads `$name` inside a string as a variable.
        return "\\$"
    if letter == "?" and language == "cpp":
        # Two of them and a third character were one letter before C++17.
        return "\\?"
    if unicodedata.category(letter) not in _ACTING or letter in _JOINERS:
        return letter
    number = ord(letter)
    if language == "swift":
        return f"\\u{{{number:x}}}"
    if language == "cpp":
        # Octal, in three digits each: a hexadecimal escape takes what follows with it, and a
        # universal one may name no control character.
        return "".join(f"\\{byte:03o}" for byte in letter.encode(errors="replace"))
    if number < 0x10000:
        return f"\\u{number:04x}"
    if language == "python":
        return f"\\U{number:08x}"
    pair = letter.encode("utf-16-be", "surrogatepass").hex()
    return f"\\u{pair[:4]}\\u{pair[4:]}"

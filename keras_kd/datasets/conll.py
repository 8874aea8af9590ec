"""Tokens with a tag each, from CoNLL files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_kd.datasets import bio, class_names, text_files, vocabulary
from keras_kd.datasets.task_data import UNLABELED, Raw, TaskData, assemble

_COMMENT = re.compile(r"#\s*[\w.:-]+\s*=|#\s*[\w.:-]+( [\w.:-]+)+ = |#\s*(?P<word>[\w.:-]+)$")


@dataclasses.dataclass(frozen=True)
class Sentences:
    """A file as tokens and tags.

    Args:
        path: Of the file.
        tokens: Of each sentence.
        tags: The same.
        lines: The line in which each sentence begins, from 1.
    """

    path: str
    tokens: list[list[str]]
    tags: list[list[str]]
    lines: list[int]

    def where(self, sentence: int) -> str:
        """Say where a sentence stands."""
        return f"`{self.path}`, the sentence from line {self.lines[sentence]}"

    def first(self, tag: str) -> str:
        """Say where a tag stands first."""
        return self.where(next(i for i, tags in enumerate(self.tags) if tag in tags))


def load(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    words: str | os.PathLike[str] | None = None,
    length: int | None = None,
) -> TaskData:
    """Load sentences whose tokens have a tag each.

    A line holds a token, maybe other columns, and its tag, separated by tabs or spaces; an empty
    line ends a sentence. Tags that begin with `B-` or `I-` follow BIO (IOB2): inside a span comes
    `I-` of the same type behind `B-` or `I-`. Other tags, as parts of speech, are taken as they
    are. Classes are `O` and then the tags in alphabetical order of their types, `B-` before `I-`.

    Args:
        path: Path of the file, UTF-8, maybe gzipped.
        validation: The same for this split.
        test: The same.
        classes: The tags in the order of their numbers.
        words: A vocabulary file; built from the training sentences without.
        length: Tokens that are read of a sentence; as many as the longest has, 128 at most,
            without. Behind the end the number of the token is 0 and its class -1.

    Returns:
        The data.

    Raises:
        ValueError: Naming file and line, if a file cannot be read, a line has no tag, a tag does
            not follow BIO, or one outside the training file is none of its tags.
    """
    files = {"train": read(path)}
    for split, other in (("validation", validation), ("test", test)):
        if other is not None:
            files[split] = read(other)
    train = files["train"]
    if len(train.tokens) == 1 and len(files) < 3:
        raise ValueError(
            f"`{train.path}` holds one sentence of {len(train.tokens[0]):,} tokens: no empty line "
            "stands between any. An empty line ends a sentence."
        )
    class_names.check(_in_order(train), train.first)
    names = list(classes) if classes is not None else _in_order(train)
    known = vocabulary.build(train.tokens) if words is None else vocabulary.read(words)
    if length is None:
        length = min(max(map(len, train.tokens)), vocabulary.LONGEST)
    notes: list[str] = []
    if bio.bare(names):
        notes.append(
            "The tags B and I have no type: tokens are judged, and entities are counted of B-TYPE "
            "and I-TYPE alone."
        )
    raw: dict[str, Raw] = {}
    for split, one in files.items():
        ids, cut, unknown = vocabulary.encode(one.tokens, known, length)
        total = sum(min(len(row), length) for row in one.tokens)
        notes.append(
            f"{split}: {unknown:,} of {total:,} tokens are not in the vocabulary of {len(known):,}"
            + (f", and {cut:,} sentences were cut to {length} tokens." if cut else ".")
        )
        y = _numbers(one, names, length, train, classes is not None)
        raw[split] = Raw(ids, y, one.where, one.path)
    return assemble(
        os.fspath(path),
        "tokens",
        raw["train"],
        validation=raw.get("validation"),
        test=raw.get("test"),
        class_names=names,
        inputs={"kind": "tokens", "length": length, "vocabulary": known},
        notes=notes,
        texts={split: [tuple(tokens) for tokens in one.tokens] for split, one in files.items()},
    )


def read(path: str | os.PathLike[str]) -> Sentences:
    """Read a CoNLL file.

    Args:
        path: Path of the file.

    Returns:
        Its sentences.

    Raises:
        ValueError: If it cannot be read, a line has no tag, or a tag does not follow BIO.
    """
    name = os.fspath(path)
    found = Sentences(name, [], [], [])
    places: list[list[int]] = []
    fresh, columns = True, 0
    seen: set[str] = set()
    for number, line in enumerate(text_files.lines(text_files.read(name, "a CoNLL file")), 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            fresh = True
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        comment = _COMMENT.match(line) if fresh and "\t" not in line else None
        # `# newdoc` is a comment, and `# O` a token and its tag.
        word = comment["word"] if comment and len(cells) == 2 else None
        if comment and not (word and (bio.is_tag(word) or word in seen)):
            continue
        if len(cells) < 2 or not text_files.visible(cells[0]) or not cells[-1].strip():
            raise ValueError(
                f"`{name}`, line {number}: `{line.strip()[:40]}` has no tag. A line holds a token "
                "and its tag, separated by a tab or spaces; an empty line ends a sentence."
            )
        columns = columns or len(cells)
        if len(cells) != columns:
            raise ValueError(
                f"`{name}`, line {number}: `{line.strip()[:40]}` has {len(cells)} columns, and the "
                f"lines before it {columns}. All lines have the same: a token, maybe others, and "
                "the tag. A token with a space in it needs tabs between the columns."
            )
        if fresh:
            found.tokens.append([])
            found.tags.append([])
            found.lines.append(number)
            places.append([])
            fresh = False
        found.tokens[-1].append(cells[0].strip())
        found.tags[-1].append(cells[-1].strip())
        seen.add(found.tags[-1][-1])
        places[-1].append(number)
    if not found.tokens:
        raise ValueError(f"`{name}` holds no sentences. A line holds a token and its tag.")
    _check_columns(found, places, columns)
    _check_bio(found, places)
    return found


def _check_columns(found: Sentences, places: list[list[int]], columns: int) -> None:
    """Refuse a first column that holds no tokens, as in CoNLL-U, or holds the tags."""
    advice = "A line holds the token first and its tag last. Write these two columns so."
    if columns > 2 and all(map(_counts, found.tokens)) and max(map(len, found.tokens)) > 1:
        raise ValueError(
            f"`{found.path}`, line {places[0][0]}: the first of {columns} columns counts the "
            f"tokens and holds none of them, as in CoNLL-U. {advice}"
        )
    firsts = {token for tokens in found.tokens for token in tokens}
    tags = {tag for row in found.tags for tag in row}
    if bio.mean_spans(firsts) and all(map(bio.is_tag, firsts)) and not bio.mean_spans(tags):
        raise ValueError(
            f"`{found.path}`, line {places[0][0]}: the tags stand in the first column. {advice}"
        )


def _counts(tokens: Sequence[str]) -> bool:
    """Whether words are 1, 2, 3, ..., with `2-3` and `2.1` among them as in CoNLL-U."""
    whole = [int(token) for token in tokens if token.isdecimal()]
    others = [token for token in tokens if not token.isdecimal()]
    begin = whole[0] if whole else 2
    return (
        begin < 2
        and whole == list(range(begin, begin + len(whole)))
        and all(re.fullmatch(r"\d+[-.]\d+", token) for token in others)
    )


def _check_bio(found: Sentences, places: list[list[int]]) -> None:
    every = {tag for tags in found.tags for tag in tags}
    bare = bio.bare(every)
    if not bare and not bio.mean_spans(every):
        return
    for tags, lines in zip(found.tags, places, strict=True):
        before = "O"
        for tag, line in zip(tags, lines, strict=True):
            if not bare and not bio.is_tag(tag):
                raise ValueError(
                    f"`{found.path}`, line {line}: the tag `{tag[:40]}` does not follow BIO. Tags "
                    "are O, B-TYPE and I-TYPE, written so. BIOES becomes BIO with E- as I- "
                    "and S- as B-."
                )
            if not bio.goes_on(before, tag):
                raise ValueError(
                    f"`{found.path}`, line {line}: `{tag[:40]}` follows `{before[:40]}`, and does "
                    f"not follow BIO: a span begins with `B{tag[1:41]}`."
                )
            before = tag


def _in_order(train: Sentences) -> list[str]:
    tags = {tag for row in train.tags for tag in row}
    spans = any(tag[:2] in ("B-", "I-") for tag in tags)
    key: Any = (lambda tag: (tag[2:], tag[:2])) if spans else (lambda tag: tag)
    return [*(["O"] if "O" in tags else []), *sorted(tags - {"O"}, key=key)]


def _numbers(
    one: Sentences, names: Sequence[str], length: int, train: Sentences, asked: bool
) -> Any:
    place = {name: i for i, name in enumerate(names)}
    y = np.full((len(one.tags), length), UNLABELED, np.int32)
    for i, tags in enumerate(one.tags):
        for j, tag in enumerate(tags[:length]):
            if tag not in place:
                hint = class_names.hint(tag, names)
                which = "`--classes` names" if asked else f"`{train.path}` has"
                raise ValueError(
                    f"{one.where(i)} has the tag `{tag[:40]}`, which is none of those that "
                    f"{which}.{hint}"
                )
            y[i, j] = place[tag]
    return y

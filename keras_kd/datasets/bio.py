"""Tags of spans in BIO (IOB2): which names are such tags, and whether numbered tags follow it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from keras_kd.datasets.task_data import Place
from keras_kd.utils.types import Array

_NEARLY = re.compile(r"[BbIi][-_:./]\S")
"""Begins of tags that mean spans, in this form or another."""


def mean_spans(tags: Iterable[str]) -> bool:
    """Whether tags are those of spans: one is, or all but `O` nearly are, in another form."""
    kinds = set(tags) - {"O", "o"}
    spans = any(tag[:2] in ("B-", "I-") for tag in kinds)
    return spans or (bool(kinds) and all(_NEARLY.match(tag) for tag in kinds))


def is_tag(tag: str) -> bool:
    """Whether this is `O`, `B-TYPE` or `I-TYPE`."""
    return tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def bare(tags: Iterable[str]) -> bool:
    """Whether tags are `B`, `I` and `O`, of spans without a type."""
    return set(tags) - {"O"} == {"B", "I"}


def goes_on(before: str, tag: str) -> bool:
    """Whether a tag of BIO may follow another one."""
    return tag[0] != "I" or (before != "O" and before[2:] == tag[2:])


def check(y: Array, names: Sequence[str], path: str, where: Place) -> str | None:
    """Refuse numbered tags that do not follow BIO, where the names of the classes are such tags.

    Inside of a span comes `I-` of its type behind `B-` or `I-`. What comes behind a token without a
    label is not judged, and neither is the first one of a row, since rows may be windows of longer
    texts.

    Args:
        y: Class numbers `(rows, length)`, -1 where there is no label; of other arrays nothing is
            said.
        names: Of the classes.
        path: Of the file.
        where: Says where a row comes from.

    Returns:
        A sentence on rows that begin inside of a span, or `None`.

    Raises:
        ValueError: Naming the class, or the row and the position.
    """
    if not mean_spans(names) and not bare(names):
        return None
    for name in names if mean_spans(names) else ():
        if not is_tag(name):
            raise ValueError(
                f"`{path}` names the class `{name[:40]}`, which does not follow BIO. Tags are O, "
                "B-TYPE and I-TYPE, written so. BIOES becomes BIO with E- as I- and S- as B-."
            )
        if name[:2] == "I-" and f"B-{name[2:]}" not in names:
            raise ValueError(
                f"`{path}` names the class `{name[:40]}` and no `B-{name[2:42]}`, so that no span "
                "of it could begin. In BIO (IOB2) every span begins with B-."
            )
    if y.ndim != 2 or y.dtype.kind not in "iu" or not y.size:
        return None
    if y.min() < -1 or y.max() >= len(names):
        return None
    # Behind the last class stands what has no label, and anything may follow that.
    inside = np.array([*(name[0] == "I" for name in names), False])
    follows = np.ones((len(names) + 1, len(names) + 1), bool)
    follows[:-1, :-1] = [[goes_on(before, tag) for tag in names] for before in names]
    odd = (y[:, 1:] >= 0) & ~follows[y[:, :-1], y[:, 1:]]
    if odd.any():
        row, place = (int(i) for i in np.argwhere(odd)[0])
        before, tag = names[y[row, place]], names[y[row, place + 1]]
        more = int(odd.any(axis=1).sum()) - 1
        raise ValueError(
            f"{where(row)}, position {place + 1}: `{tag[:40]}` follows `{before[:40]}`, and does "
            f"not follow BIO: a span begins with `B{tag[1:41]}`."
            + (f" So it is in {more:,} more rows." if more else "")
        )
    first = y[np.arange(len(y)), (y >= 0).argmax(axis=1)]
    begun = int(inside[first].sum())
    if not begun:
        return None
    return (
        f"{begun:,} of {len(y):,} rows begin with I-, as windows of a longer text do: the rest of "
        "such a span counts as none."
    )

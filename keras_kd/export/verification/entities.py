"""Entities: spans of tokens that carry one type, by tags of BIO (IOB2), counted whole.

`tag_names` says whether the names of classes are such tags, and `figures` counts. A span is right
where its beginning, its end and its type are, as in CoNLL's shared tasks. It imports NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

OUTSIDE = "O"
"""The tag of a token that is in no entity."""


def tag_names(names: Sequence[str] | None, outputs: np.ndarray) -> list[str] | None:
    """Return the names of classes if they are tags of BIO, of outputs that tag tokens.

    Args:
        names: Of the classes, or `None`.
        outputs: Of the model, `(samples, length, classes)` where it tags tokens.

    Returns:
        The names, in the order of the classes; `None` unless each is `O`, `B-TYPE` or `I-TYPE`, one
        at least begins an entity, and there is one for each class.
    """
    if names is None or outputs.ndim != 3 or len(names) != outputs.shape[-1]:
        return None
    spans = [name for name in names if name != OUTSIDE]
    tagged = all(name[:2] in ("B-", "I-") and len(name) > 2 for name in spans)
    begins = any(name[:2] == "B-" for name in spans)
    return list(names) if tagged and begins else None


def known_tags(names: Sequence[str] | None, outputs: np.ndarray) -> dict[str, Any]:
    """Return `tag_names` as what an output is known to be: empty where there are none."""
    found = tag_names(names, outputs)
    return {} if found is None else {"tags": found}


def types(tags: Sequence[str]) -> list[str]:
    """Return the types of entities that tags name, in the order in which they first do."""
    return list(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))


def figures(
    truth: np.ndarray, decisions: np.ndarray, counted: np.ndarray, tags: Sequence[str]
) -> dict[str, Any]:
    """Count whole entities.

    They are those of seqeval with `mode="strict"` and `scheme=IOB2`: one begins with `B-` and goes
    on as long as `I-` of its type follows; `I-` that follows nothing of its type begins none.

    Args:
        truth: Numbers of the right tags, `(samples, length)`.
        decisions: Of the answered ones, same shape.
        counted: Which tokens count, same shape. The others are left out of their sentence, so that
            an entity goes on behind them: the later pieces of a word have no label.
        tags: Names by number.

    Returns:
        `entity_precision`, `entity_recall` and `entity_f1` over all entities (`None` without any
        entity among the labels), and `per_entity`, lists of `support`, `precision`, `recall` and
        `f1` by type. What divides by nothing is 0.
    """
    kinds = types(tags)
    of_type = np.array([kinds.index(tag[2:]) if tag != OUTSIDE else -1 for tag in tags])
    begins = np.array([tag[:2] == "B-" for tag in tags])
    sentence = np.broadcast_to(np.arange(len(truth))[:, None], truth.shape)[counted]
    first = np.concatenate([[True], sentence[1:] != sentence[:-1]])[: len(sentence)]
    right, said = (
        _spans(part[counted].astype(np.int64), first, of_type, begins)
        for part in (truth, decisions)
    )
    hit = right[np.isin(_keys(right, len(first)), _keys(said, len(first)))]
    hits, support, answered = (
        np.bincount(part[:, 0], minlength=len(kinds)) for part in (hit, right, said)
    )
    whole = [_share(*map(np.sum, pair)) for pair in ((hits, answered), (hits, support))]
    known = bool(support.sum())
    return {
        "entity_precision": whole[0] if known else None,
        "entity_recall": whole[1] if known else None,
        "entity_f1": _share(2 * hits.sum(), support.sum() + answered.sum()) if known else None,
        "per_entity": {
            "support": support.tolist(),
            "precision": [_share(a, b) for a, b in zip(hits, answered)],
            "recall": [_share(a, b) for a, b in zip(hits, support)],
            "f1": [_share(2 * a, b) for a, b in zip(hits, support + answered)],
        },
    }


def _spans(
    numbers: np.ndarray, first: np.ndarray, of_type: np.ndarray, begins: np.ndarray
) -> np.ndarray:
    """Type, first token and token behind the last of each entity, `(entities, 3)`."""
    kind, opens = of_type[numbers], begins[numbers]
    same = np.concatenate([[False], kind[1:] == kind[:-1]])[: len(kind)]
    goes_on = (kind >= 0) & ~opens & same & ~first
    edges = np.flatnonzero(~goes_on)
    ends = np.append(edges[1:], len(kind))
    chosen = opens[edges]
    edges, ends = edges[chosen], ends[chosen]
    return np.stack([kind[edges], edges, ends], axis=1)


def _keys(spans: np.ndarray, length: int) -> np.ndarray:
    """One number for each span, equal where type, beginning and end are."""
    return (spans[:, 0] * (length + 1) + spans[:, 1]) * (length + 1) + spans[:, 2]


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole > 0 else 0.0

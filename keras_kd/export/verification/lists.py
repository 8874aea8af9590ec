"""Rankings whose items are rows of their own, told together by the number of their list."""

from __future__ import annotations

import numpy as np

from keras_kd.export.verification.scores import LIST


def ndcg(outputs: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float | None:
    """Return NDCG@10 as scikit-learn defines it, the mean over lists.

    Args:
        outputs: Score of each item, `(items,)` or `(items, 1)`.
        labels: Gain of each item, 0 or more, of the same shape.
        groups: Number of the list of each item, `(items,)`; items of a list may lie apart.

    Returns:
        The mean over the lists of two items and more, a list without any gain being 0; `None` where
        all lists have one item.
    """
    from sklearn.metrics import ndcg_score

    order = np.argsort(groups, kind="stable")
    scores, gains = (np.asarray(part).reshape(-1)[order] for part in (outputs, labels))
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order][:1] - 1))
    sizes = np.diff(starts, append=len(order))
    total, lists = 0.0, 0
    for size in sorted(set(sizes[sizes > 1].tolist())):
        # Lists of one length at once: the function takes longer to call than to compute.
        places = starts[sizes == size][:, None] + np.arange(size)
        total += len(places) * float(ndcg_score(gains[places], scores[places], k=LIST))
        lists += len(places)
    return total / lists if lists else None

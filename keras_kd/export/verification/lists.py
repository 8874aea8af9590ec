"""Rankings whose items are rows of their own, told together by the number of their list."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class ByList:
    """NDCG@10 by list as one of the `metrics` of an export, which travels with its samples.

    Args:
        groups: Number of the list of each evaluation row, whole numbers `(rows,)`.
    """

    groups: np.ndarray

    name = "ndcg@10"

    def __call__(
        self, labels: np.ndarray, outputs: np.ndarray, sample_weight: np.ndarray | None = None
    ) -> float:
        """Return the mean over the lists; rows of weight 0 are in none.

        Raises:
            ValueError: If there are other rows than those of `groups`, weights between 0 and 1, or
                no list of two items.
        """
        kept = np.ones(len(outputs), bool)
        if sample_weight is not None:
            kept = sample_weight.reshape(len(sample_weight), -1).any(axis=1)
            if (sample_weight[kept] != sample_weight.max(initial=0)).any():
                raise ValueError("lists have no weights: rows count or they do not")
        if len(self.groups) != len(outputs):
            raise ValueError(
                f"{len(self.groups)} rows have the number of their list, and there are "
                f"{len(outputs)} answers"
            )
        groups = self.groups[kept].astype(np.int64)
        found = ndcg(outputs[kept], labels[kept], groups)
        if found is None:
            raise ValueError("every list has one item")
        return found

"""Labels made wrong on purpose, to see what a training makes of them.

May import: NumPy, `classifier`.
"""

from __future__ import annotations

import numpy as np

from keras_kd.robust.classifier import of_one_hot
from keras_kd.utils import checks

_KINDS = ("symmetric", "pairs")


def noisy_labels(
    y: np.ndarray | None,
    rate: float = 0.4,
    kind: str = "symmetric",
    seed: int = 0,
    classes: int | None = None,
) -> np.ndarray:
    """Give some rows another class than their own.

    `round(rate * rows)` rows are changed, no more and no less, and none keeps its class: some
    papers draw the new class among all of them, so that a tenth of the symmetric noise of ten
    classes is none.

    Args:
        y: Class numbers `(rows,)` or `(rows, 1)`, or one-hot `(rows, classes)`.
        rate: Share of the rows that become wrong, in `[0, 1]`.
        kind: `"symmetric"`: any other class, each as likely as the next. `"pairs"`: the next class,
            and the first after the last.
        seed: Of the choice. A greater rate changes the rows of a smaller one and more.
        classes: How many classes there are. Defaults to what `y` shows.

    Returns:
        Labels in the form and dtype of `y`.

    Raises:
        TypeError: If `rate` is no number, or `seed` or `classes` no whole one.
        ValueError: If it is out of range, the kind is unknown, or `y` holds no class numbers.

    Examples:
        >>> noisy_labels(np.array([0, 1, 2, 3]), rate=0.5, kind="pairs")
        array([0, 1, 3, 0])

    Reference:
        - [Patrini et al., 2017](https://arxiv.org/abs/1609.03683)
    """
    share = checks.number("rate", rate)
    if not 0 <= share <= 1:
        raise ValueError(f"`rate` is a share in [0, 1]. Received: rate={rate!r}.")
    checks.one_of("kind", kind, _KINDS)
    checks.whole("seed", seed, 0)
    given = checks.as_array(y)
    if given.dtype.kind not in "biuf" or not given.ndim:
        raise ValueError(
            f"`y` holds class numbers from 0, or one-hot rows. Received: {given.dtype}, shape "
            f"{given.shape}."
        )
    if not len(given):
        return given.copy()
    one_hot = given.ndim == 2 and given.shape[1] > 1
    labels = of_one_hot(given, "`y`") if one_hot else given.reshape(len(given), -1)
    if not one_hot and labels.shape[1:] != (1,):
        raise ValueError(f"`y` holds one class number a row. Received: shape {given.shape}.")
    labels = np.asarray(labels).reshape(-1)
    numbers = labels.astype("int64")
    if not np.array_equal(numbers, labels) or (len(numbers) and numbers.min() < 0):
        raise ValueError("`y` holds class numbers from 0, or one-hot rows.")
    found = given.shape[1] if one_hot else int(numbers.max(initial=0)) + 1
    count = found if classes is None else checks.whole("classes", classes)
    if one_hot and count != found:
        raise ValueError(
            f"`y` has {found} columns, one a class. Received: classes={classes!r}. Leave it out."
        )
    if count < found or count < 2:
        raise ValueError(
            f"There are at least {max(found, 2)} classes, since another one than its own is given "
            f"to a row. Received: classes={classes!r}."
        )
    if given.dtype.kind in "iu" and count - 1 > np.iinfo(given.dtype).max and not one_hot:
        raise ValueError(
            f"Class {count - 1} does not fit into {given.dtype}. Pass `y.astype('int64')`."
        )
    if given.dtype.kind == "b" and count > 2 and not one_hot:
        raise ValueError(f"`y` is yes and no, and `classes={count}`. Pass `y.astype('int64')`.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(numbers))
    shift = np.ones(len(numbers), "int64")
    if kind == "symmetric":
        shift = rng.integers(1, count, len(numbers))
    chosen = order[: round(share * len(numbers))]
    numbers[chosen] = (numbers[chosen] + shift[chosen]) % count
    if one_hot:
        return np.eye(given.shape[1], dtype=given.dtype)[numbers]
    return numbers.astype(given.dtype).reshape(given.shape)

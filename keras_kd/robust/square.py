"""The square attack: random search over squares, which needs answers and no gradients.

It works on a NumPy function from inputs to logits, so on an exported file as on a model. Images
`(rows, height, width, channels)` are searched by squares, other inputs by windows of their first
axis. May import: NumPy, `threats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from keras_kd.robust.threats import Linf, Threat
from keras_kd.utils import checks

Predict = Callable[[np.ndarray, int], np.ndarray]
_SHARE = 0.8
"""Share of the pixels that the first square covers."""
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 queries those after which the square is half as large."""


def search(
    predict: Predict,
    x: np.ndarray,
    labels: np.ndarray,
    threat: Threat,
    queries: int,
    seed: int,
    targeted: bool = False,
    batch_size: int = 256,
) -> np.ndarray:
    """Search each row for a point of the ball that is answered wrongly.

    Args:
        predict: `fn(x, batch_size)`: logits `(rows, classes)`.
        x: `(rows, ...)`, float32, within the bounds.
        labels: `(rows,)` class numbers; those to be reached with `targeted`.
        threat: `Linf` or `L2`.
        queries: Answers that may be asked for, for each row.
        seed: Of the search; each row has draws of its own.
        targeted: Whether to reach the labels, not to leave them.
        batch_size: Rows at once.

    Returns:
        float32 `(rows, ...)`: the point of the least margin. Rows that are wrong stay as they are.

    Raises:
        TypeError: If `queries` is no whole number.
        ValueError: If it is less than 1.

    Reference:
        - [Andriushchenko et al., 2020](https://arxiv.org/abs/1912.00049), algorithms 1 to 3
    """
    checks.whole("queries", queries)

    def margins(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        logits = predict(rows.astype("float32"), batch_size).astype("float64")
        number = np.arange(len(rows))
        own = logits[number, labels[chosen]]
        logits[number, labels[chosen]] = -np.inf
        gap = own - logits.max(axis=1)
        # A file may answer two classes alike, where the first one counts.
        ahead = (gap == 0) & (logits.argmax(axis=1) < labels[chosen])
        gap = np.where(ahead, -1e-12, gap)
        return -gap if targeted else gap

    def wrong(margin: np.ndarray) -> np.ndarray:
        return margin <= 0 if targeted else margin < 0

    everyone = np.arange(len(x))
    best, least = x.copy(), margins(x, everyone)
    rngs = [np.random.default_rng((seed, row)) for row in everyone]
    moves = _Cube(threat, x) if isinstance(threat, Linf) else _Sphere(threat, x)
    left = everyone[~wrong(least)]
    if len(left):
        first = np.stack([moves.start(x[row], rngs[row]) for row in left])
        found = margins(first, left)
        # The search goes on from the stripes even where they are no better yet.
        best[left], least[left] = first, found
    for query in range(1, queries):
        left = left[~wrong(least[left])]
        if not len(left):
            break
        share = _share(query, queries)
        tried = np.stack([moves.tried(best[row], x[row], share, rngs[row]) for row in left])
        found = margins(tried, left)
        better = found < least[left]
        best[left[better]], least[left[better]] = tried[better], found[better]
    return best


def _share(query: int, queries: int) -> float:
    """The share of the pixels that a square covers after so many queries."""
    done = int(query / queries * 10000)
    return _SHARE / 2 ** sum(done > limit for limit in _HALVINGS)


class _Cube:
    """Moves in the cube: squares whose numbers all lie on its walls."""

    def __init__(self, threat: Threat, x: np.ndarray) -> None:
        self.threat = threat
        self.shape = _as_image(x.shape[1:])

    def start(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Vertical stripes."""
        _, width, channels = self.shape
        stripes = rng.choice([-1.0, 1.0], size=(1, width, channels))
        return self._kept(x, np.broadcast_to(stripes, self.shape) * self.threat.epsilon)

    def tried(
        self, best: np.ndarray, x: np.ndarray, share: float, rng: np.random.Generator
    ) -> np.ndarray:
        """One square of one sign a channel."""
        change = (best.astype("float64") - x).reshape(self.shape)
        square = _square(self.shape, share, rng)
        signs = rng.choice([-1.0, 1.0], size=(1, 1, self.shape[2]))
        change[square] = signs * self.threat.epsilon
        return self._kept(x, change)

    def _kept(self, x: np.ndarray, change: np.ndarray) -> np.ndarray:
        found = x.astype("float64") + change.reshape(x.shape)
        if self.threat.bounds is not None:
            found = np.clip(found, *self.threat.bounds)
        return found.astype("float32")


class _Sphere(_Cube):
    """Moves on the sphere: a square takes what another square and the radius leave over."""

    def start(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A tiling of the image by peaks of random signs."""
        height, width, channels = self.shape
        side = max(1, min(height, width) // 5)
        change = np.zeros(self.shape)
        for row in range(0, height, side):
            for column in range(0, width, side):
                tile = change[row : row + side, column : column + side]
                signs = rng.choice([-1.0, 1.0], size=(1, 1, channels))
                tile += _peaks(*tile.shape[:2])[..., None] * signs
        return self._on_sphere(x, change)

    def tried(
        self, best: np.ndarray, x: np.ndarray, share: float, rng: np.random.Generator
    ) -> np.ndarray:
        """A new peak in one square, with the length that it and another square had."""
        change = (best.astype("float64") - x).reshape(self.shape)
        here, there = _square(self.shape, share, rng), _square(self.shape, share, rng)
        # Clipping to the bounds leaves some of the radius unused.
        unused = max(self.threat.epsilon**2 - float(np.sum(change**2)), 0.0)
        moved = np.zeros(self.shape, bool)
        moved[here] = moved[there] = True
        total = float(np.sum(change[moved] ** 2)) + unused
        size = change[here].shape
        peak = _peaks(*size[:2])[..., None] * rng.choice([-1.0, 1.0], size=(1, 1, self.shape[2]))
        old = change[here]
        length = np.linalg.norm(old)
        peak = peak / np.linalg.norm(peak) + (old / length if length > 0 else 0.0)
        change[there] = 0.0
        change[here] = peak / max(float(np.linalg.norm(peak)), 1e-12) * math.sqrt(total)
        return self._on_sphere(x, change)

    def _on_sphere(self, x: np.ndarray, change: np.ndarray) -> np.ndarray:
        length = float(np.linalg.norm(change))
        return self._kept(x, change * (self.threat.epsilon / max(length, 1e-12)))


def _as_image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels; what is no image has one column, or its rest for channels."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) <= 1:
        return (math.prod(shape), 1, 1)
    return (shape[0], 1, math.prod(shape[1:]))


def _square(
    shape: tuple[int, int, int], share: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """A square of about this share of the pixels, or a window of a single column."""
    height, width, _ = shape
    if width == 1:
        sides = (max(1, round(share * height)), 1)
    else:
        side = max(1, round(math.sqrt(share * height * width)))
        sides = (min(side, height), min(side, width))
    corner = [int(rng.integers(0, size - side + 1)) for size, side in zip((height, width), sides)]
    return tuple(slice(at, at + side) for at, side in zip(corner, sides, strict=True))  # type: ignore[return-value]


def _peaks(height: int, width: int) -> np.ndarray:
    """Two heaps of opposite signs, `(height, width)`, of length 1."""

    def heap(rows: int, columns: int) -> np.ndarray:
        down = np.abs(np.arange(rows) - (rows - 1) / 2)[:, None]
        across = np.abs(np.arange(columns) - (columns - 1) / 2)[None]
        return 1.0 / (1.0 + np.maximum(down, across)) ** 2

    half = max(height // 2, 1)
    found = np.zeros((height, width))
    found[:half] = heap(half, width)
    if height > half:
        found[half:] = -heap(height - half, width)
    return found / np.linalg.norm(found)

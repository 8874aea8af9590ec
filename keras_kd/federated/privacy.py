"""Noise on answers: what it protects, what it costs, and when it leaves nothing to learn from.

What is protected is a client, all of its rows together: replacing all of them moves each of its `Q`
answers, rows of probabilities, by at most `sqrt(2)`, so that the sensitivity of `Q` answers is
`sqrt(2 Q)`. The client itself adds the noise, before its answers cross, so that it needs to trust
nobody. dp-accounting counts; `ledger` keeps the count. Imports `aggregation`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_kd.federated.aggregation import RULES
from keras_kd.utils import checks

Array = Any
"""A NumPy array."""


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise on the probabilities that each client sends.

    Each of `Q` rows of probabilities gets normal noise of standard deviation `noise_multiplier *
    sqrt(2 Q)`, independent for every class. Each round of a client is one such release. The client
    answers no more once the next one would cost more than `max_epsilon`.

    Args:
        noise_multiplier: Standard deviation of the noise in units of the sensitivity, above 0.
        delta: Of `(epsilon, delta)`-differential privacy, in (0, 1).
        max_epsilon: The most that a client spends, over all rounds and all federations in its
            folder.

    Raises:
        TypeError: If something is no number.
        ValueError: If a number is out of range.

    Examples:
        >>> privacy = Gaussian(noise_multiplier=10.0, delta=1e-5, max_epsilon=2.0)

    Reference:
        - [Dwork and Roth, 2014](https://doi.org/10.1561/0400000042), appendix A
        - [Mironov, 2017](https://arxiv.org/abs/1702.07476), corollary 3
    """

    noise_multiplier: float
    delta: float
    max_epsilon: float

    def __post_init__(self) -> None:
        checks.positive("noise_multiplier", self.noise_multiplier)
        checks.positive("max_epsilon", self.max_epsilon)
        if not 0 < checks.number("delta", self.delta) < 1:
            raise ValueError(f"`delta` lies in (0, 1). Received: delta={self.delta!r}.")

    def weaker(self, other: Gaussian) -> bool:
        """Whether this protects less than another one in any respect.

        Args:
            other: The other one.
        """
        return (
            self.noise_multiplier < other.noise_multiplier
            or self.delta > other.delta
            or self.max_epsilon > other.max_epsilon
        )

    def settings(self) -> dict[str, float]:
        """What clients have to know."""
        return {name: float(value) for name, value in vars(self).items()}


def sensitivity(queries: int) -> float:
    """How far all rows of one client can move its answers, in the Euclidean norm: `sqrt(2 Q)`.

    Args:
        queries: Rows of probabilities.
    """
    return math.sqrt(2.0 * queries)


def noised(probabilities: Array, noise_multiplier: float, rng: np.random.Generator) -> Array:
    """Answers with noise, float32 `(rows, classes)`.

    Args:
        probabilities: `(rows, classes)`, rows that sum to 1.
        noise_multiplier: As in `Gaussian`.
        rng: Draws the noise. Nobody else may know its seed.
    """
    scale = noise_multiplier * sensitivity(len(probabilities))
    return (probabilities + rng.normal(0.0, scale, probabilities.shape)).astype("float32")


def epsilon(noise_multipliers: Sequence[float], delta: float) -> float:
    """What releases have cost together, by Renyi differential privacy.

    Args:
        noise_multipliers: One for each release.
        delta: In (0, 1).

    Returns:
        The least epsilon that dp-accounting proves; 0 of no releases.

    Raises:
        ImportError: If dp-accounting is missing.
    """
    if not noise_multipliers:
        return 0.0
    accounting = _accounting()
    # A client is there in all of its releases, with other rows or with these.
    relation = accounting.NeighboringRelation.REPLACE_ONE
    accountant = accounting.rdp.RdpAccountant(neighboring_relation=relation)
    for multiplier in sorted(set(noise_multipliers)):
        event = accounting.GaussianDpEvent(multiplier)
        accountant.compose(event, list(noise_multipliers).count(multiplier))
    return float(accountant.get_epsilon(delta))


def _accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            "Counting privacy needs dp-accounting, which is not installed. Install it with "
            '`pip install "keras_kd[federated]"`.'
        ) from error
    return dp_accounting


# ------------------------------------------------------------------------ is anything left


def kept(noise: float, classes: int) -> float:
    """How often an answer that everybody agrees on keeps its class under noise.

    `P(1 + e_1 > max(e_2, ..., e_C))` of independent normal `e`.

    Args:
        noise: Standard deviation on each mean probability.
        classes: Number of classes `C`.
    """
    x, weights = np.polynomial.hermite_e.hermegauss(128)
    below = np.array([0.5 * math.erfc(-(v + 1.0 / noise) / math.sqrt(2.0)) for v in x])
    return float((weights * below ** (classes - 1)).sum() / weights.sum())


@functools.cache
def tolerable(classes: int) -> float:
    """The noise under which such answers keep their class halfway between chance and always.

    Args:
        classes: Number of classes.
    """
    least = (1.0 + 1.0 / classes) / 2.0
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if kept(middle, classes) >= least else (low, middle)
    return low


@functools.cache
def varies(rule: str, clients: int) -> float:
    """How much more the joined noise of clients varies than its mean would: a ratio of deviations.

    A median of normal values varies by 1.16 times as much as their mean where there are three, and
    by 1.25 where there are many; a trimmed mean of many by 1.06. Drawn, within one per cent.

    Args:
        rule: A name of `aggregation.RULES`.
        clients: How many are joined.
    """
    if rule == "mean" or clients < 3:
        return 1.0
    # Beyond so many clients it changes no more.
    n = min(clients, 101)
    drawn = np.random.default_rng(0).normal(size=(n, 20_000))
    return float(RULES[rule](drawn).std() * math.sqrt(n))


def left(privacy: Gaussian, clients: int, queries: int, rule: str = "mean") -> float:
    """Standard deviation of the noise on each probability once the answers are joined.

    Args:
        privacy: The noise.
        clients: How many clients answer.
        queries: Rows that each is asked about in a round.
        rule: How answers are joined.
    """
    alone = privacy.noise_multiplier * sensitivity(queries)
    return alone * varies(rule, clients) / math.sqrt(clients)


def require_audible(
    privacy: Gaussian, clients: int, queries: int, classes: int, rule: str = "mean"
) -> None:
    """Raise `ValueError` where the noise would drown the answers.

    Args:
        privacy: The noise.
        clients: How many clients answer.
        queries: Rows that each is asked about in a round.
        classes: Number of classes.
        rule: How answers are joined.

    Raises:
        ValueError: With the arithmetic, and what would be needed.
    """
    z, of_all = privacy.noise_multiplier, sensitivity(queries)
    joined, limit = left(privacy, clients, queries, rule), tolerable(classes)
    if joined <= limit:
        return
    ratio = limit / joined
    least = clients / max(ratio**2, 1e-300)
    needed = f"{math.ceil(least):,}" if least < 1e12 else "more than 10^12"
    fewer, weaker = math.floor(queries * ratio**2), z * ratio
    raise ValueError(
        f"The noise would drown the answers. All rows of one client move its {queries:,} answers "
        f"by at most sqrt(2 * {queries:,}) = {of_all:.4g}, so that each probability gets noise of "
        f"standard deviation {z:g} * {of_all:.4g} = {z * of_all:.4g}; the {rule} of {clients:,} "
        f"clients leaves {joined:.4g}, and a probability is 1 at most. An answer that all agree on "
        f"would keep its class in {kept(joined, classes):.0%} of the rows, by chance it does in "
        f"{1 / classes:.0%}. At most {limit:.3g} may be left: that needs {needed} clients, or "
        f"{f'{fewer:,} queries' if fewer else 'less than one query'} a round, or "
        f"`noise_multiplier={weaker:.2g}`, which protects less. Among few clients noise on answers "
        "protects nothing that is still of use: leave `privacy` out and agree on the public rows."
    )


def require_affordable(privacy: Gaussian, rounds: int, spent: Sequence[float] = ()) -> float:
    """Raise `ValueError` where so many rounds cost more than a client may spend.

    Args:
        privacy: The noise and the limit.
        rounds: Rounds that are to come.
        spent: Noise multipliers of the releases before them.

    Returns:
        The epsilon after all of them.
    """
    total = epsilon([*spent, *[privacy.noise_multiplier] * rounds], privacy.delta)
    if total <= privacy.max_epsilon:
        return total
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        cost = epsilon([*spent, *[privacy.noise_multiplier] * middle], privacy.delta)
        low, high = (middle, high) if cost <= privacy.max_epsilon else (low, middle)
    raise ValueError(
        f"{rounds} rounds with `noise_multiplier={privacy.noise_multiplier:g}` cost epsilon = "
        f"{total:.4g} at delta = {privacy.delta:g}, more than `max_epsilon={privacy.max_epsilon:g}`"
        f"{f', beside {len(spent)} releases before' if spent else ''}. {low} rounds are within it; "
        "or take a larger `noise_multiplier`."
    )

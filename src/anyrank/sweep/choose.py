"""Which rank to ship: the smallest that is as good as the best, as far as the rows can tell.

All ranks are measured on the same rows, so two of them are compared by their difference on every
row: what makes a row hard for both cancels. With n rows, the nats a_i and b_i of two ranks on row i
and its t_i tokens,

    D  = sum(a_i - b_i) / sum(t_i)                                      nats per token
    se = sqrt(n / (n - 1) * sum((a_i - b_i - D t_i)^2)) / sum(t_i)

the linearised standard error of a ratio estimate (W. G. Cochran, Sampling Techniques, 3rd ed.,
section 6.4; rows are the units drawn). The rule is the one-standard-error rule (Breiman et al.,
CART, 1984, section 3.4.3) in its paired form: the smallest rank with D <= se to the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

NEGLIGIBLE = 0.002
"""Nats per token that never justify a larger adapter, however sure the rows are of them: 0.2 % of
the perplexity. It is what decides where rows are so many that the standard error is smaller."""


class Difference(NamedTuple):
    """How far a rank is above the best one on the same rows.

    Attributes:
        mean: nats per token; 0 for the best rank itself, NaN where a loss is not finite.
        se: its standard error, nats per token; NaN from a single row.
    """

    mean: float
    se: float


def paired_difference(
    nats: Sequence[float], best: Sequence[float], tokens: Sequence[int]
) -> Difference:
    """The difference of two models on the same rows, in nats per token.

    Args:
        nats: of the one, summed over the tokens of each row: [rows].
        best: of the other, likewise: [rows].
        tokens: completion tokens of each row: [rows].

    Returns:
        sum(nats - best) / sum(tokens) and its linearised standard error.
    """
    total, n = sum(tokens), len(tokens)
    each = [a - b for a, b in zip(nats, best, strict=True)]
    mean = sum(each) / total
    if n < 2:
        return Difference(mean, math.nan)
    squares = sum((d - mean * t) ** 2 for d, t in zip(each, tokens, strict=True))
    return Difference(mean, math.sqrt(n / (n - 1) * squares) / total)


def differences(
    nats: Mapping[int, Sequence[float]], tokens: Sequence[int]
) -> dict[int, Difference]:
    """Every rank beside the best one: that of the lowest loss, the smallest of several.

    Args:
        nats: by rank, summed over the tokens of each row: [rows].
        tokens: completion tokens of each row: [rows].

    Returns:
        By rank; NaN where the loss of that rank, or of every rank, is not finite.
    """
    sums = {rank: sum(values) for rank, values in nats.items()}
    finite = {rank: total for rank, total in sums.items() if math.isfinite(total)}
    unknown = Difference(math.nan, math.nan)
    if not finite:
        return dict.fromkeys(nats, unknown)
    best = min(finite, key=lambda rank: (finite[rank], rank))
    return {
        rank: paired_difference(values, nats[best], tokens) if rank in finite else unknown
        for rank, values in nats.items()
    }


def choose_within_error(
    found: Mapping[int, Difference], negligible: float = NEGLIGIBLE
) -> int | None:
    """The smallest rank at most one standard error above the best.

    Args:
        found: what `differences` returns.
        negligible: nats per token that a smaller rank may lose in any case; 0: none.

    Returns:
        The rank, or None where no loss is finite. Where the standard error is not known (a single
        row), only `negligible` counts.
    """

    def allowed(se: float) -> float:
        return max(negligible, se) if math.isfinite(se) else negligible

    return min((rank for rank, d in found.items() if d.mean <= allowed(d.se)), default=None)


def choose_rank(losses: Mapping[int, float], tolerance: float) -> int | None:
    """The smallest rank whose loss is at most `tolerance` nats per token above the best.

    Args:
        losses: nats per token by rank.
        tolerance: nats per token, at least 0.

    Returns:
        The rank, or None where no loss is finite.
    """
    finite = {rank: loss for rank, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return None
    best = min(finite.values())
    return min(rank for rank, loss in finite.items() if loss <= best + tolerance)

"""Which rank to ship: the smallest whose loss is within a tolerance of the best."""

from __future__ import annotations

import math
from collections.abc import Mapping

TOLERANCE = 0.02
"""Nats per token that a smaller rank may lose against the best one."""


def choose_rank(losses: Mapping[int, float], tolerance: float = TOLERANCE) -> int | None:
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

"""s_k: the one scale of an adapter at rank k.

    alpha/k         DyLoRA, QDyLoRA: each rank as strong as a LoRA of that rank
    alpha/sqrt(k)   rank-stabilised LoRA
    alpha/r         LoRA: the same scale at every rank, so a prefix approximates the whole

k and r count *nominal* ranks: Q-BaRA of rank r holds 2r rows (as many parameters as a LoRA of rank
r) and its released code scales by alpha/r, so k rows of it are the nominal rank k/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError, nearest

SCALES: dict[str, Callable[[float, float, float], float]] = {
    "alpha/k": lambda alpha, k, r: alpha / k,
    "alpha/sqrt(k)": lambda alpha, k, r: alpha / math.sqrt(k),
    "alpha/r": lambda alpha, k, r: alpha / r,
}


def scale_at(name: str, alpha: float, k: float, r: float) -> float:
    """The scale s_k.

    Args:
        name: a key of `SCALES`.
        alpha: the strength, dimensionless.
        k: the nominal rank in use, 0 < k <= r; r for a dense core.
        r: the nominal rank of the whole adapter.

    Raises:
        ConfigError: `name` is not a scale.
    """
    if name not in SCALES:
        raise ConfigError(f"scale={name!r} is unknown; {nearest(name, SCALES)}")
    return SCALES[name](alpha, k, r)

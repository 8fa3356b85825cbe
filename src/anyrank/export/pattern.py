"""A rank for every layer, as `anyrank sweep --budget` writes it or a user does by hand.

{"layers": {"model.layers.0.self_attn.q_proj": 8, ...}}     budget.json
{"model.layers.0.self_attn.q_proj": 8, ...}                 by hand
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..files import read_json


def read_pattern(path: Path) -> dict[str, int]:
    """The rank of every layer; which layers there are is checked against an adapter later.

    Raises:
        RunError: the file is missing or no JSON.
        ConfigError: it does not hold a rank per layer.
    """
    held = read_json(path)
    ranks = held.get("layers", held) if isinstance(held, dict) else held
    if not isinstance(ranks, dict) or not ranks:
        raise ConfigError(
            f"{path}: holds no ranks of layers; name a budget.json that anyrank sweep --budget "
            'wrote, or write {"model.layers.0.self_attn.q_proj": 8, ...}'
        )
    for layer, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ConfigError(
                f"{path}: {layer}: rank {rank!r} must be a whole number from 0 (0 leaves the layer "
                "out)"
            )
    return ranks

"""The methods, as data: a row each of y = W x + s_k * R C_k P x.

A method is a preset, not a class. `nested` makes every prefix of rows an adapter of its own; any
low-rank method can be nested by option.
"""

from __future__ import annotations

from dataclasses import dataclass

from .algebra import DENSE, LOW_RANK
from .errors import ConfigError, nearest


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        base: how the frozen weight is stored: "any", "nf4", or "affine" (needed only to fold).
        p: neighbouring inputs that share a mean.
        q: neighbouring outputs that share a value.
        core: `LOW_RANK` or `DENSE`.
        rows_per_rank: rows that make one nominal rank.
        nested: every rank is trained, not only the largest.
        frozen_a: A keeps its first values (LoRA-FA).
        scale: the default scale, a key of `algebra.SCALES`.
        schedule: the default rule that says which ranks a step trains, a key of `schedule.KINDS`.
        source: where the method was published.
    """

    base: str = "any"
    p: int = 1
    q: int = 1
    core: str = LOW_RANK
    rows_per_rank: int = 1
    nested: bool = False
    frozen_a: bool = False
    scale: str = "alpha/r"
    schedule: str = "uniform"
    source: str = ""


METHODS: dict[str, Method] = {
    "anyrank": Method(base="nf4", nested=True, schedule="settle", source="docs/log.md"),
    "lora": Method(source="arXiv 2106.09685"),
    "qlora": Method(base="nf4", source="arXiv 2305.14314"),
    "dylora": Method(nested=True, scale="alpha/k", source="arXiv 2210.07558"),
    "qdylora": Method(base="nf4", nested=True, scale="alpha/k", source="arXiv 2402.10462"),
    "qalora": Method(base="affine", p=32, source="arXiv 2309.14717"),
    "qbara": Method(base="nf4", p=2, q=2, rows_per_rank=2, source="arXiv 2407.17029"),
    "qahira": Method(base="affine", p=4, q=8, core=DENSE, source="arXiv 2407.17029"),
    "qablora": Method(base="affine", p=32, q=2, source="TACL 13 (2025), 861-877"),
    "lora_fa": Method(frozen_a=True, source="arXiv 2308.03303"),
}


def method(name: str) -> Method:
    """The preset of a method.

    Raises:
        ConfigError: the name is not in the table; the nearest names are offered.
    """
    if name not in METHODS:
        raise ConfigError(f"method={name!r} is unknown; {nearest(name, METHODS)}")
    return METHODS[name]

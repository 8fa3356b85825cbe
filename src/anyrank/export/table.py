"""The tables of offsets that a fold writes: an adapter, a rank, a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .adapter import SavedAdapter


@dataclass(frozen=True)
class Table:
    """One table of offsets.

    Attributes:
        variant: its name; None: the one that loads by default, and the only one.
        adapter: whose update it holds.
        rank: at which rank; None for a dense core.
    """

    variant: str | None
    adapter: SavedAdapter
    rank: int | None

    @property
    def name(self) -> str:
        """For messages."""
        at = "" if self.rank is None else f" at rank {self.rank}"
        return f"{self.adapter.folder}{at}"


def plan_tables(chosen: Sequence[tuple[SavedAdapter, Sequence[int]]]) -> list[Table]:
    """The tables of every adapter at its ranks, under names that tell them apart.

    Args:
        chosen: adapters of one base, each with its ranks; none for a dense core.

    Raises:
        ConfigError: ranks of an adapter without ranks, or two adapters of one name.
        RankError: a rank that an adapter does not have.
    """
    found = []
    for adapter, ranks in chosen:
        if ranks and not adapter.config.low_rank:
            raise ConfigError(
                f"{adapter.folder}: {adapter.config.method} holds dense blocks, which have no "
                "ranks and fold as they are; leave --rank out"
            )
        for rank in ranks or [None]:
            if rank is not None:
                adapter.check_rank(rank)
            names = [adapter.folder.resolve().name] if len(chosen) > 1 else []
            names += [f"rank{rank}"] if len(ranks) > 1 else []
            found.append(Table("-".join(names).replace(".", "_") or None, adapter, rank))
    seen = [table.variant for table in found]
    if len(set(seen)) < len(seen):
        raise ConfigError(
            f"two tables would be named alike ({', '.join(map(str, seen))}); name every rank once, "
            "or rename a run"
        )
    return found

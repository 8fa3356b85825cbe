"""Which ranks to train in a step: pure functions of (step, total, seed).

Nothing here reads a global random state, so the draw is the same on every process and after a
resume. A schedule is data:

    uniform    one rank, uniform over `ranks` (1..r when none are listed)    DyLoRA, QDyLoRA
    sandwich   the largest, the smallest and a random one                     US-Nets
    full       always the largest                                             LoRA
    settle     the largest for a part of the run; then, once the rows lie in   ours, docs/log.md
               order, the lowest ranks and the largest in turn; at the end the
               other rows are put in order again; every micro-batch is a step

`unit` groups rows: with unit 4 the ranks are 4, 8, 12, ... `per_step` ranks are drawn without
replacement and share the micro-batches of a step. `frozen` trains only the last unit of the drawn
prefix (DyLoRA's frozen mode).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .errors import ConfigError, RankError, nearest

KINDS = ("full", "uniform", "sandwich", "settle")
LONG = 750  # a run of more steps is long: the second of each pair below
SETTLE_AT = (0.7, 0.4)  # share of the steps before the lower ranks settle
LOWEST = (3, 4)  # ranks that are trained then, beside the largest; those between follow
SLOWLY = 0.4  # of the learning rate, at which the largest rank goes on then in a short run
PARTS = 4  # micro-batches of a step, each of which is then a step of its own


@dataclass(frozen=True)
class Draw:
    """What one optimizer step trains.

    Attributes:
        ranks: the prefixes, one after another over the micro-batches.
        first: the first row that is trained; rows below pass no gradient.
        order: after this step, put the rows from this one on in the order of what they do to its
            inputs; None: leave them as they are.
        apart: each micro-batch is an optimizer step of its own.
        speeds: by rank, how many times faster than at the optimizer's rate its rows move; a rank
            that is not listed moves at that rate, in a step apart at that of so small a batch.
    """

    ranks: tuple[int, ...]
    first: int = 0
    order: int | None = None
    apart: bool = False
    speeds: Mapping[int, float] = field(default_factory=dict)

    @property
    def trained(self) -> range:
        """The rows that this step may move."""
        return range(self.first, max(self.ranks))


@dataclass(frozen=True)
class Schedule:
    """A rule that maps a step to a `Draw`.

    Attributes:
        rows: the largest rank.
        kind: one of `KINDS`.
        ranks: the ranks to choose from; None: every multiple of `unit` up to `rows`.
        unit: rows per group.
        per_step: ranks per optimizer step (uniform only).
        frozen: train only the last unit of the prefix.
    """

    rows: int
    kind: str = "uniform"
    ranks: tuple[int, ...] | None = None
    unit: int = 1
    per_step: int = 1
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"schedule={self.kind!r} is unknown; {nearest(self.kind, KINDS)}")
        if self.unit < 1 or self.rows % self.unit:
            raise ConfigError(f"rank_unit={self.unit} must divide the rank {self.rows}")
        for rank in self.ranks or ():
            if not 1 <= rank <= self.rows or rank % self.unit:
                raise RankError(
                    f"schedule rank {rank} must be a multiple of rank_unit={self.unit} "
                    f"in 1..{self.rows}, the largest rank"
                )
        if not 1 <= self.per_step <= len(self.choices):
            raise ConfigError(
                f"ranks_per_step={self.per_step} must lie in 1..{len(self.choices)}, "
                "the number of ranks to choose from"
            )
        if self.per_step > 1 and self.kind != "uniform":
            raise ConfigError(
                f"ranks_per_step={self.per_step} draws several ranks at random, which "
                f"schedule={self.kind!r} does not; use schedule='uniform', or leave it out"
            )
        if self.frozen and (self.kind != "uniform" or self.per_step > 1):
            raise ConfigError(
                "frozen_rows trains one prefix per step: it needs schedule='uniform' "
                f"and ranks_per_step=1, got {self.kind!r} and {self.per_step}"
            )

    @property
    def choices(self) -> tuple[int, ...]:
        """The ranks that can be drawn, ascending."""
        every = range(self.unit, self.rows + 1, self.unit)
        return tuple(sorted(set(every if self.ranks is None else self.ranks)))

    @property
    def draws(self) -> int:
        """How many ranks a step trains: micro-batches per step must be a multiple of it."""
        if self.kind == "sandwich":
            return min(3, len(self.choices))
        return self.per_step if self.kind == "uniform" else 1

    @property
    def parts(self) -> int:
        """Micro-batches per step with which the schedule trains best; any number will do."""
        return PARTS if self.kind == "settle" else 1

    def __call__(self, step: int, total: int, seed: int) -> Draw:
        """The draw of a step.

        Args:
            step: optimizer steps done so far, from 0.
            total: optimizer steps of the whole run; schedules that change over a run need it.
            seed: the seed of the run.
        """
        if self.kind == "full":
            return Draw((self.rows,))
        if self.kind == "settle":
            return self._settle(step, total)
        rng = random.Random(f"anyrank rank draw {seed} {step}")
        if self.kind == "sandwich":
            return Draw(_sandwich(self.choices, rng))
        drawn = tuple(rng.sample(self.choices, self.per_step))
        return Draw(drawn, first=drawn[0] - self.unit if self.frozen else 0)

    def _settle(self, step: int, total: int) -> Draw:
        """The largest rank r, then the lowest and r by turns, a micro-batch at a time.

            up to 750 steps    r for 70 % of them, then 1, 2, r, 1, 4, r, where r goes on slowly
            more than that     r for 40 %, then 1, r, 2, r, 4, r, 8, r

        Steps are small throughout: updates are what an adapter is short of, and low ranks most of
        all (docs/log.md). In a short run r gives them a start and then has to stay what it is while
        the first rows move: slowly, since its last rows are small. In a long run it goes on
        learning. At one learning rate and the scale alpha/k, a LoRA of rank k moves its product
        sqrt(r/k) times as far per step as at alpha/r: that is the speed of rank k here. Adam moves
        the last rows by as much as the large ones, so they end out of order.
        """
        long = total > LONG
        start = max(round(SETTLE_AT[long] * total), 1)  # a fresh adapter has no order
        if step < start:
            return Draw((self.rows,), order=0 if step == start - 1 else None, apart=True)
        turns = self._turns(long)
        shift = (step - start) % len(turns)  # so each has its turn, however many a step takes
        ranks = turns[shift:] + turns[:shift]
        lower = [rank for rank in turns if rank < self.rows]
        order = max(lower) if lower and step == total - 1 else None
        speeds = {rank: (self.rows / rank) ** 0.5 for rank in lower}
        if not long:
            speeds[self.rows] = SLOWLY
        return Draw(ranks, order=order, apart=True, speeds=speeds)

    def _turns(self, long: bool) -> tuple[int, ...]:
        """1, 2, r, 1, 4, r or 1, r, 2, r, 4, r, 8, r, of the lowest ranks to choose from."""
        count = LOWEST[long]
        doubled = (self.unit * 2**i for i in range(count))
        lowest = doubled if self.ranks is None else self.choices[:count]
        lower = [rank for rank in lowest if rank < self.rows]
        if long or len(lower) < 2:
            return tuple(turn for rank in lower for turn in (rank, self.rows)) or (self.rows,)
        first, *others = lower
        return tuple(turn for other in others for turn in (first, other, self.rows))


def rank_list(given: str | Sequence[int] | None, name: str) -> list[int] | None:
    """'1,2,4', or a list of a YAML file, as [1, 2, 4]: ascending, each once.

    Raises:
        ConfigError: an entry is not a positive whole number.
    """
    if given is None:
        return None
    parts = str(given).strip("[]()").replace(",", " ").split()
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"{name}={given!r} must be whole numbers from 1, such as 1,2,4,8")
    return sorted({int(part) for part in parts})


def _sandwich(choices: Sequence[int], rng: random.Random) -> tuple[int, ...]:
    between = choices[1:-1]
    middle = (rng.choice(between),) if between else ()
    return tuple(dict.fromkeys((choices[-1], choices[0], *middle)))

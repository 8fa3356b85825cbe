"""Every layer at its own rank under a budget, without new training: estimate, move, measure.

The search starts at the largest uniform rank that the budget holds. In each round `gates.estimate`
says what other ranks of every layer would do, `allocate` chooses among them, and the choice is
measured: it counts only if the loss falls. If it does not, the layers that would have moved are
measured one by one, the measured values take the place of the estimates, and it chooses again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, RankError, RunError
from .allocate import Ranks, allocate, nearby
from .choose import Difference, paired_difference
from .evaluate import Rows, completion_tokens, evaluation, row_nats
from .gates import estimate, gated_layers

REACH = 3  # steps of the ladder that a layer moves in one round: about a factor of 3
ROUNDS, ALONE = 12, 16  # rounds at most, and layers that are measured one by one in each


@dataclass
class Search:
    """One search on one model; `best` after `run` is what it found.

    Attributes:
        model: a PEFT model with an any-rank adapter.
        rows: token ids and labels to choose on.
        choices: the ranks that every layer may have, ascending.
        costs: parameters of one row of each layer.
        budget: parameters of all layers together.
        batch_size: rows per forward pass.
        progress: called with what is being done.
        measured: how many times the loss was measured.
    """

    model: Any
    rows: Rows
    choices: Sequence[int]
    costs: Mapping[str, int]
    budget: int
    batch_size: int = 8
    progress: Callable[[str], None] = lambda text: None
    measured: int = field(default=0, init=False)

    def run(self, start: Ranks) -> Ranks:
        """The ranks after the last round that made the loss fall, or `start`.

        Raises:
            RunError: the loss at `start` is not finite.
        """
        with evaluation(self.model):
            best, nats = dict(start), self.measure(start)
            if not math.isfinite(sum(nats)):
                raise RunError(
                    "the loss at one rank for all layers is not finite: the run diverged; train "
                    "with a lower --learning_rate"
                )
            for turn in range(ROUNDS):
                self.progress(f"round {turn + 1}")
                found = self._round(best, nats)
                if found is None:
                    break
                best, nats = found
        return best

    def measure(self, ranks: Mapping[str, int]) -> list[float]:
        """The nats of every row at these ranks: [rows]."""
        self.measured += 1
        with self.model.set_rank(ranks):
            return row_nats(self.model, self.rows, self.batch_size)

    def above(self, nats: Sequence[float], best: Sequence[float]) -> Difference:
        """The paired difference on the rows to choose on."""
        return paired_difference(nats, best, completion_tokens(self.rows))

    def _round(self, now: Ranks, nats: list[float]) -> tuple[Ranks, list[float]] | None:
        """Better ranks with their nats; None where none was found."""
        near = {layer: nearby(self.choices, rank, REACH) for layer, rank in now.items()}
        values = estimate(self.model, self.rows, now, near)
        alone: set[tuple[str, int]] = set()
        for _ in range(3):
            ranks = allocate(values, self.costs, self.budget)
            moved = [layer for layer in now if ranks[layer] != now[layer]]
            if not moved:
                return None
            got = self.measure(ranks)
            if self.above(got, nats).mean < 0:
                return ranks, got
            doubted = [layer for layer in moved if (layer, ranks[layer]) not in alone]
            doubted.sort(key=lambda layer: -abs(values[layer][ranks[layer]]))
            for layer in doubted[:ALONE]:
                one = self.measure(now | {layer: ranks[layer]})
                values[layer][ranks[layer]] = self.above(one, nats).mean
                alone.add((layer, ranks[layer]))
        return None


def layer_costs(model: Any) -> dict[str, int]:
    """Parameters of one row of every adapted layer: a row of A and a column of B."""
    name = model.active_adapter
    return {
        key: layer.adapters[name].geometry.parameters(1)
        for key, layer in gated_layers(model).items()
    }


def uniform_rank(choices: Sequence[int], costs: Mapping[str, int], budget: int) -> int:
    """The largest rank above 0 that all layers may have together.

    Raises:
        RankError: the smallest does not fit.
        ConfigError: the largest fits, so there is nothing to choose.
    """
    row, ranks = sum(costs.values()), sorted(k for k in choices if k)
    if budget < row * ranks[0]:
        raise RankError(
            f"budget={budget:,}: rank {ranks[0]} of all layers holds {row * ranks[0]:,} "
            "parameters; name at least that"
        )
    if budget >= row * ranks[-1]:
        raise ConfigError(
            f"budget={budget:,}: rank {ranks[-1]} of all layers holds {row * ranks[-1]:,} "
            "parameters; name less, or leave --budget out"
        )
    return max(k for k in ranks if row * k <= budget)


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """Every second row to choose on, and the others to report on.

    Raises:
        ConfigError: there are not four rows, so one half would have no error bars.
    """
    if len(rows) < 4:
        raise ConfigError(
            f"--budget chooses on one half of the rows and reports on the other, but there are "
            f"{len(rows)}; name 4 or more with --dataset or --limit"
        )
    return rows[::2], rows[1::2]

"""Standard tasks at every rank, on one load of the base, and the rank to choose by them.

With value v_k and standard error e_k of a task's main metric at rank k, and b the best rank, rank k
is good enough where v_k >= v_b - e_b (v_k <= v_b + e_b where lower is better). Chosen is the
smallest rank that is good enough on every task or, where no rank is, on the most of them. e is
lm-eval's, over the rows of the task.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import DataError
from .evaluate import each_rank

logger = logging.getLogger("anyrank")

Figures = dict[str, Any]
"""What lm-eval found for one task: {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9}."""


@dataclass(frozen=True)
class TaskScore:
    """The main metric of one task.

    Attributes:
        metric: its name and its filter, as lm-eval writes them: "exact_match,strict-match".
        value: in the unit of the metric; accuracies are shares.
        stderr: standard error of `value`, in the same unit; None where lm-eval gives none.
        higher_is_better: which way is better.
    """

    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool = True


Measured = tuple[dict[str, Any], dict[int, dict[str, Any]], dict[str, Any]]
"""What was measured of the base, of each rank, and what holds for all of them."""


class Suite(Protocol):
    """Tasks and the model that they evaluate, at whatever rank it is set to.

    `names` are the tasks, and the groups with a score of their own, that are reported.
    """

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102

    def evaluate(self) -> tuple[dict[str, Figures], dict[str, dict[str, Any]]]:
        """Figures of every task and group; how the reported ones were evaluated."""
        ...


def task_scores(options: Any, tokenizer: Any, ranks: Sequence[int]) -> Callable[[Any], Measured]:
    """Load tasks and their data, for a measurement of their metrics at every rank.

    Args:
        options: `SweepOptions`.
        tokenizer: of the model.
        ranks: the ranks; empty for an adapter without ranks, which is evaluated as 0.

    Raises:
        AnyRankError: see `harness.load_tasks`.
    """
    from .harness import load_tasks

    tasks = load_tasks(options, tokenizer)
    names = ", ".join(tasks.names)

    def of(model: Any) -> Measured:
        return measure(model, tasks.on(model), ranks, lambda at: logger.info("%s: %s", at, names))

    return of


def measure(
    model: Any,
    suite: Suite,
    ranks: Sequence[int],
    progress: Callable[[str], None] = lambda what: None,
) -> Measured:
    """Evaluate the base without adapter, then every rank, on the same tasks.

    Args:
        model: a PEFT model with an any-rank adapter; the one that `suite` evaluates.
        suite: the tasks.
        ranks: as in `task_scores`.
        progress: called with what is being evaluated.

    Returns:
        Of the base and of each rank, {"tasks": {name: {"value", "stderr"}}, "lm_eval": figures};
        of all, the chosen rank and what is to be known about each reported task, with the ranks
        that are good enough on it.

    Raises:
        DataError: a task has no metric.
    """

    def once() -> tuple[dict[str, Figures], dict[str, TaskScore], dict[str, dict[str, Any]]]:
        figures, facts = suite.evaluate()
        return figures, {n: main_score(n, figures[n], facts[n]) for n in suite.names}, facts

    def row(figures: dict[str, Figures], scores: dict[str, TaskScore]) -> dict[str, Any]:
        short = {name: {"value": s.value, "stderr": s.stderr} for name, s in scores.items()}
        return {"tasks": short, "lm_eval": figures}

    base, found = each_rank(model, ranks, once, progress)
    tasks = {
        name: base[2][name]
        | {
            "metric": score.metric,
            "higher_is_better": score.higher_is_better,
            "good_enough": good_enough({rank: found[rank][1][name] for rank in found}),
        }
        for name, score in base[1].items()
    }
    chosen = choose_by_tasks([facts["good_enough"] for facts in tasks.values()])
    about = {"chosen_rank": chosen or None, "tolerance": None, "tasks": tasks}
    return row(*base[:2]), {rank: row(*each[:2]) for rank, each in found.items()}, about


def main_score(name: str, figures: Figures, facts: Mapping[str, Any]) -> TaskScore:
    """The main metric of a task: acc_norm where it has one, else the first in its own order.

    Args:
        name: of the task.
        figures: what lm-eval found for it.
        facts: of these "higher_is_better", a truth value by metric; None counts as true.

    Raises:
        DataError: the task has no metric.
    """
    keys = [key for key in figures if "," in key and "_stderr," not in key]
    if not keys:
        raise DataError(f"task {name}: has no metric to compare ranks by; name its tasks instead")
    key = next((key for key in keys if key.startswith("acc_norm,")), keys[0])
    metric, _, filtered = key.partition(",")
    stderr = figures.get(f"{metric}_stderr,{filtered}")
    known = isinstance(stderr, int | float) and math.isfinite(stderr)
    better = facts["higher_is_better"].get(metric) is not False
    return TaskScore(key, figures[key], stderr if known else None, better)


def good_enough(scores: Mapping[int, TaskScore]) -> list[int]:
    """The ranks, ascending, within one standard error of the best; no standard error counts as 0.

    Args:
        scores: one task, by rank. A rank whose value is not finite is never good enough.
    """
    finite = {k: scores[k] for k in sorted(scores) if math.isfinite(scores[k].value)}
    if not finite:
        return []
    sign = 1 if next(iter(finite.values())).higher_is_better else -1
    best = max(finite.values(), key=lambda score: sign * score.value)
    limit = sign * best.value - (best.stderr or 0.0)
    return [k for k, score in finite.items() if sign * score.value >= limit]


def choose_by_tasks(accepted: Sequence[Sequence[int]]) -> int | None:
    """The smallest rank that is good enough on every task or, where none is, on the most tasks.

    Args:
        accepted: for each task the ranks that are good enough.

    Returns:
        The rank, or None where no rank is good enough on any task.
    """
    ranks = sorted({rank for good in accepted for rank in good})
    return max(ranks, key=lambda rank: sum(rank in good for good in accepted), default=None)

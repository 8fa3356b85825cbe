"""`anyrank sweep RUN --budget 2M`: the search on a finished run, budget.json, and what to print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from rich.progress import SpinnerColumn, TextColumn
from transformers import AutoTokenizer

from ..export.adapter import SavedAdapter
from ..files import write_json
from ..training.run import Run
from .allocate import ladder, size
from .budget import Search, halves, layer_costs, uniform_rank
from .choose import Difference, paired_difference
from .evaluate import completion_tokens, evaluation
from .sweep_run import SweepOptions, load_model, stderr_progress, token_rows

FILE = "budget.json"


def budget_run(folder: str | Path, options: SweepOptions, budget: int) -> dict[str, Any]:
    """Choose a rank for every layer of a run; write budget.json; return what it holds.

    Ranks are chosen on every second row; the other rows are for the report, on which the result
    stands beside the largest uniform rank that the budget holds.

    Args:
        folder: a finished run with a low-rank adapter.
        options: the rows; `ranks` are the ones to choose among, beside 0.
        budget: numbers in A and B of all layers together.

    Raises:
        AnyRankError: the run, the data, a rank or the budget is not as needed.
    """
    run = Run.open(folder)
    disable_progress_bars()
    adapter = SavedAdapter.read(run.folder)
    choices = ranks_to_choose_from(adapter, options.ranks)
    source, rows = token_rows(run, options, AutoTokenizer.from_pretrained(run.folder))
    chosen_on, held_out = halves(rows)
    model = load_model(run, options)
    costs = layer_costs(model)
    rank = uniform_rank(choices, costs, budget)
    start = dict.fromkeys(costs, rank)
    with stderr_progress(SpinnerColumn(), TextColumn("{task.description}")) as show:
        task = show.add_task("budget")
        search = Search(
            model, chosen_on, choices, costs, budget, options.batch_size,
            progress=lambda text: show.update(task, description=text),
        )  # fmt: skip
        ranks = search.run(start)
        show.update(task, description="done")
    found = {
        "budget": budget,
        "parameters": size(ranks, costs),
        "layers": ranks,
        "uniform": {"rank": rank, "parameters": size(start, costs)},
        "chosen_on": _compared(search, ranks, start),
        "measured": search.measured,
    }
    search.rows = held_out
    found |= {
        "held_out": _compared(search, ranks, start),
        "method": adapter.config.method,
        "scale": adapter.config.scale,
        "nested": adapter.config.nested,
        "dataset": source,
    }
    out = options.out or run.folder
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, found)
    return found


def ranks_to_choose_from(adapter: SavedAdapter, asked: list[int] | None) -> list[int]:
    """0 and the ranks asked for, or those that were trained, or a ladder of a factor of 1.5.

    Raises:
        ConfigError: the adapter holds dense blocks.
        RankError: it does not hold a rank that was asked for.
    """
    config = adapter.config
    for rank in asked or [1]:
        adapter.check_rank(rank)
    if asked or config.ranks:
        return sorted({0, *(asked or config.ranks)})
    return ladder(config.rows, config.rank_unit)


def _compared(search: Search, ranks: Mapping[str, int], start: Mapping[str, int]) -> dict[str, Any]:
    """Both losses on the rows of the search, and their paired difference."""
    tokens = completion_tokens(search.rows)
    with evaluation(search.model):
        nats, uniform = search.measure(ranks), search.measure(start)
    difference = paired_difference(nats, uniform, tokens)
    return {
        "rows": len(tokens),
        "tokens": sum(tokens),
        "loss": sum(nats) / sum(tokens),
        "uniform_loss": sum(uniform) / sum(tokens),
        "above_uniform": difference.mean,
        "above_uniform_se": difference.se,
    }


def layer_table(found: dict[str, Any]) -> Any:
    """The rank of every layer as a rich table: a row per decoder layer, a column per module."""
    from rich.table import Table

    places = {name: _place(name) for name in found["layers"]}
    columns = list(dict.fromkeys(part for _, part in places.values()))
    lines: dict[str, dict[str, str]] = {}
    for name, (block, part) in places.items():
        lines.setdefault(block, {})[part] = str(found["layers"][name])
    out = Table(title=f"rank of every layer, {found['parameters']:,} parameters", box=None)
    out.add_column("layer")
    for part in columns:
        out.add_column(part.rpartition(".")[2], justify="right")
    for block, cells in lines.items():
        out.add_row(block, *(cells.get(part, "") for part in columns))
    return out


def _place(layer: str) -> tuple[str, str]:
    """'model.layers.3.self_attn.q_proj' as ('model.layers.3', 'self_attn.q_proj')."""
    parts = layer.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def verdict(found: dict[str, Any]) -> Iterator[str]:
    """What the rows that took no part say, a line each."""
    held, uniform = found["held_out"], found["uniform"]
    above = Difference(held["above_uniform"], held["above_uniform_se"])
    yield (
        f"On {held['rows']} rows that took no part: {held['loss']:.4f} nats per token; rank "
        f"{uniform['rank']} for all, {uniform['parameters']:,} parameters: "
        f"{held['uniform_loss']:.4f}; "
        f"difference {above.mean:+.4f} ± {above.se:.4f}."
    )
    if not better(found):
        yield f"Not better than rank {uniform['rank']} for all by more than one standard error."


def better(found: dict[str, Any]) -> bool:
    """Whether the held-out rows favour ranks of their own by more than one standard error."""
    held = found["held_out"]
    return held["above_uniform"] < -held["above_uniform_se"]

"""What a sweep found: sweep.json, a table for the terminal and the picture of the rank curve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..files import write_json
from .choose import NEGLIGIBLE, choose_rank
from .task_report import plot_tasks, task_cells, task_headers, why_by_tasks

TOLERANCE = 0.02  # nats per token, 2 % of the perplexity: a usual price for a smaller file


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Write sweep.png (where there is a curve) and then sweep.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if found["chosen_rank"] and len(found["ranks"]) > 1:
        draw = plot_tasks if "tasks" in found else plot
        draw(folder / "sweep.png", found)
    write_json(folder / "sweep.json", found)


def table(found: dict[str, Any]) -> Any:
    """The figures as a rich table; the chosen rank is marked."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    with_loss, with_answers = "loss" in found["base"], "exact_match" in found["base"]
    title = f"{found['rows']} rows, {found['tokens']:,} completion tokens" if with_loss else None
    out = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))  # fits 80 columns
    names = ["nats per\ntoken", "above the best", "perplexity"] if with_loss else []
    names += ["exact\nmatch"] if with_answers else []
    for name in ("rank", *names, *task_headers(found), "parameters", "LoRA\nfile"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in (found["base"] | {"rank": "base", "parameters": 0, "bytes": 0}, *found["ranks"]):
        chosen = row["rank"] is not None and row["rank"] == found["chosen_rank"]
        cells = [f"{row['rank'] or 'dense'}{' <' if chosen else ''}"]
        if with_loss:
            cells += [f"{row['loss']:.3f}", above_best(row), f"{row['perplexity']:.2f}"]
        cells += [f"{row['exact_match']:.1%}"] if with_answers else []
        cells += task_cells(row).values()
        cells += [f"{row['parameters']:,}" if row["parameters"] else "-"]
        cells += [f"{row['bytes'] / 1e6:.2f} MB" if row["bytes"] else "-"]
        out.add_row(*cells, style="bold green" if chosen else None)
    return out


def above_best(row: dict[str, Any]) -> str:
    """How far a rank is above the best one, with its standard error; "-" for that one itself."""
    mean = row.get("above_best", 0.0)  # the base is not compared
    return f"{mean:.4f} ± {row['above_best_se']:.4f}" if mean else "-"


def why_chosen(found: dict[str, Any]) -> str:
    """By which rule the rank was chosen, to stand behind its name."""
    if len(found["ranks"]) == 1:
        return "the only one"
    if "tasks" in found:
        return why_by_tasks(found)
    if found["tolerance"] is not None:
        return f"the smallest within {found['tolerance']:g} nats per token of the best"
    row = next(row for row in found["ranks"] if row["rank"] == found["chosen_rank"])
    if not row["above_best"]:
        return "the best; every smaller one is more than one standard error above it"
    if row["above_best"] <= row["above_best_se"]:
        return f"the smallest within one standard error of the best ({above_best(row)})"
    return f"the smallest within {NEGLIGIBLE:g} nats per token of the best ({above_best(row)})"


def cheaper(found: dict[str, Any]) -> str | None:
    """The rank that a usual tolerance would choose, where it is another one and losses choose."""
    if "tasks" in found or found["tolerance"] is not None:
        return None
    losses = {row["rank"]: row["loss"] for row in found["ranks"]}
    rank = choose_rank(losses, TOLERANCE)
    if rank in (None, found["chosen_rank"]):
        return None
    row = next(row for row in found["ranks"] if row["rank"] == rank)
    price = f"{above_best(row)} above the best"
    return f"With --tolerance {TOLERANCE:g} it would be rank {rank} ({price})."


def plot(path: Path, found: dict[str, Any]) -> None:
    """Loss against log2 of the rank, with the base and the chosen rank marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    ranks = [row["rank"] for row in found["ranks"]]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    losses = [row["loss"] for row in found["ranks"]]
    errors = [row["above_best_se"] for row in found["ranks"]]
    axes.errorbar(
        ranks, losses, yerr=errors, fmt="o-", color="#1f5fa8", capsize=4,
        label="loss, ± standard error of the\ndifference to the best rank",
    )  # fmt: skip
    best = min(loss for loss in losses if math.isfinite(loss))
    axes.axhline(best, color="#1f5fa8", linestyle=":", linewidth=1)
    chosen = next(row for row in found["ranks"] if row["rank"] == found["chosen_rank"])
    axes.plot(
        chosen["rank"], chosen["loss"], "o", markersize=14, markerfacecolor="none",
        markeredgecolor="#c4412b", markeredgewidth=2, linestyle="none",
        label=f"chosen: rank {chosen['rank']}",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rank")
    axes.set_ylabel("loss (nats per completion token)")
    axes.grid(alpha=0.25)
    axes.set_title(f"One run, every rank: {found['method']}, base at {found['base']['loss']:.2f}")
    handles, labels = axes.get_legend_handles_labels()
    if "exact_match" in found["base"]:
        right = axes.twinx()
        share = [100 * row["exact_match"] for row in found["ranks"]]
        right.plot(ranks, share, "s--", color="#6a8f3c", label="exact match")
        right.set_ylabel("exact match (%)")
        right.set_ylim(0, 103)
        right.xaxis.set_minor_locator(NullLocator())
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels, loc="center right", frameon=False)
    figure.savefig(path, dpi=150)

"""What a sweep found: sweep.json, a table for the terminal and the picture of the rank curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_json
from . import tasks
from .task_report import plot_tasks, task_cells, task_headers


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Write sweep.png (where there is a curve) and then sweep.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if found["chosen_rank"] and len(found["ranks"]) > 1:
        draw = plot_tasks if "tasks" in found else plot
        draw(folder / "sweep.png", found)
    write_json(folder / "sweep.json", found)


def table(found: dict[str, Any]) -> Any:
    """The figures as a rich table; the chosen rank is marked."""
    from rich.table import Table

    with_loss, with_answers = "loss" in found["base"], "exact_match" in found["base"]
    title = f"{found['rows']} rows, {found['tokens']:,} completion tokens" if with_loss else None
    out = Table(title=title)
    names = ["nats/token", "perplexity"] * with_loss + ["exact match"] * with_answers
    for name in ("rank", *names, *task_headers(found), "parameters", "LoRA file"):
        out.add_column(name, justify="right")
    for row in (found["base"] | {"rank": "base", "parameters": 0, "bytes": 0}, *found["ranks"]):
        chosen = row["rank"] is not None and row["rank"] == found["chosen_rank"]
        cells = [f"{row['rank'] or 'dense'}{' <' if chosen else ''}"]
        cells += [f"{row['loss']:.3f}", f"{row['perplexity']:.2f}"] if with_loss else []
        cells += [f"{row['exact_match']:.1%}"] if with_answers else []
        cells += task_cells(row).values()
        cells += [f"{row['parameters']:,}" if row["parameters"] else "-"]
        cells += [f"{row['bytes'] / 1e6:.2f} MB" if row["bytes"] else "-"]
        out.add_row(*cells, style="bold green" if chosen else None)
    return out


def reason(found: dict[str, Any]) -> str:
    """Why the chosen rank was chosen, to follow 'rank 8, the smallest'."""
    if "tasks" in found:
        return tasks.reason(found)
    return f"within {found['tolerance']:g} nats per token of the best"


def plot(path: Path, found: dict[str, Any]) -> None:
    """Loss against log2 of the rank, with the base and the chosen rank marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    ranks = [row["rank"] for row in found["ranks"]]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(ranks, [row["loss"] for row in found["ranks"]], "o-", color="#1f5fa8", label="loss")
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

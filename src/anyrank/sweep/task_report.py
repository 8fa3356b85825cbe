"""What a sweep over tasks found: columns of its table, sentences, the picture of its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def task_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The cell of each task, by task: its value and, where there is one, its standard error."""
    return {
        name: f"{score['value']:.3f}"
        + (f" ± {score['stderr']:.3f}" if score["stderr"] is not None else "")
        for name, score in row.get("tasks", {}).items()
    }


def task_headers(found: Mapping[str, Any]) -> list[str]:
    """Each task with its main metric."""
    tasks = found.get("tasks", {})
    return [f"{name}\n{facts['metric'].removesuffix(',none')}" for name, facts in tasks.items()]


def why_by_tasks(found: Mapping[str, Any]) -> str:
    """By which tasks the rank was chosen, to stand behind its name."""
    rank, tasks = found["chosen_rank"], found["tasks"]
    good = [name for name, facts in tasks.items() if rank in facts["good_enough"]]
    text = f"the smallest within one standard error of the best on {', '.join(good)}"
    return text + (f" ({len(good)} of {len(tasks)} tasks)" if len(good) < len(tasks) else "")


def without_gain(found: Mapping[str, Any]) -> list[str]:
    """The tasks on which no rank is more than one standard error better than the base."""
    names = []
    for name, facts in found["tasks"].items():
        sign = 1 if facts["higher_is_better"] else -1
        floor = sign * found["base"]["tasks"][name]["value"]
        scores = [row["tasks"][name] for row in found["ranks"]]
        if not any(sign * s["value"] - (s["stderr"] or 0.0) > floor for s in scores):
            names.append(name)
    return names


def plot_tasks(path: Path, found: Mapping[str, Any]) -> None:
    """The main metric of each task against log2 of the rank, with standard errors and the base."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    ranks = [row["rank"] for row in found["ranks"]]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, facts) in enumerate(found["tasks"].items()):
        scores = [row["tasks"][name] for row in found["ranks"]]
        values = [score["value"] for score in scores]
        errors = [score["stderr"] or 0.0 for score in scores]
        color = f"C{number}"
        label = f"{name}: {facts['metric'].removesuffix(',none')}"
        axes.errorbar(ranks, values, errors, fmt="o-", capsize=3, label=label, color=color)
        axes.axhline(found["base"]["tasks"][name]["value"], linestyle=":", color=color)
    axes.axvline(found["chosen_rank"], color="#c4412b", alpha=0.4, linewidth=6, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rank")
    axes.set_ylabel("score, and one standard error")
    axes.grid(alpha=0.25)
    chosen = f"chosen: rank {found['chosen_rank']}"
    axes.set_title(f"One run, every rank: {found['method']}, base dotted, {chosen}")
    axes.legend(loc="best", framealpha=0.8)
    figure.savefig(path, dpi=150)

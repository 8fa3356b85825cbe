"""The plan of a run as a table, as lines and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from .estimate import BRIEF, KEPT, Estimate, Planner
from .search import MOST_ROWS, UNIT, Change, changes, largest_batch, largest_length
from .size import GIB, gib
from .step import ADAPTER, CODES, FLOAT, GRADIENTS, OPTIMIZER, SCALES, UPDATE

_ROWS = {
    CODES: "base: quantized weights",
    SCALES: "base: their scales",
    FLOAT: "base: float weights",
    ADAPTER: "adapter",
    OPTIMIZER: "optimizer state",
    GRADIENTS: "gradients",
    KEPT: "kept by the forward pass",
    BRIEF: "temporary, on top",
}


@dataclass
class Report:
    """The answer.

    Attributes:
        device: "GPU" or "CPU".
        batch: rows per micro-batch.
        length: tokens per row.
        estimate: the bytes at the peak.
        budget: bytes to fit in; None: none was named.
        largest: batch at the length, length at the batch, length of one row; {} without a budget.
        longest: tokens that the model has positions for.
        changes: what to change; [] when it fits.
        notes: what the figures rest on.
    """

    device: str
    batch: int
    length: int
    estimate: Estimate
    budget: int | None
    largest: dict[str, int]
    longest: int
    changes: list[Change]
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the run stays within the budget; True without one."""
        return self.budget is None or self.estimate.total <= self.budget


def make_report(planner: Planner, budget: int | None) -> Report:
    """Plan at the batch and the length of the run, and around them where a budget is named."""
    args = planner.args
    batch, length = args.per_device_train_batch_size, args.max_length or 0
    estimate = planner.estimate(batch, length)
    found: dict[str, int] = {}
    ways: list[Change] = []
    if budget is not None:
        found = {
            "batch": largest_batch(planner, budget, length),
            "length": largest_length(planner, budget, batch),
        }
        found["length_of_one_row"] = (
            found["length"] if batch == 1 else largest_length(planner, budget, 1)
        )
        if estimate.total > budget:
            ways = changes(planner, budget, found["length"])
    device = "GPU" if planner.on_gpu else "CPU"
    notes, longest = _notes(planner, estimate), planner.longest
    return Report(device, batch, length, estimate, budget, found, longest, ways, notes)


def _notes(planner: Planner, estimate: Estimate) -> list[str]:
    notes = [f"the peak lies in {phase_name(estimate.phase)}"]
    if planner.on_gpu:
        notes.append("what CUDA holds is assumed; the allocator's own slack is not counted")
    else:
        notes.append("what the process holds is assumed")
    if estimate.host:
        notes.append(f"{gib(estimate.host)} of optimizer state are paged to the host's memory")
    if planner.adapter.config().nested and estimate.phase == UPDATE:
        notes.append("rows of ranks that a step does not train are copied around its update")
    if (planner.args.max_length or 0) > planner.longest:
        notes.append(f"the model has positions for {planner.longest} tokens only")
    if planner.flash:
        asked = planner.model.attn_implementation
        notes.append(f"attn_implementation={asked!r} is counted as sdpa without a mask")
    if planner.stays_float > 0.05:
        notes.append(
            f"{planner.stays_float:.0%} of the weights of the layers stay float: Transformers "
            "quantizes plain nn.Linear, no linear layers of a model's own and no experts "
            "in one tensor"
        )
    return notes


def phase_name(phase: str) -> str:
    """A phase of `step` in words."""
    if phase.startswith("backward"):
        return "the backward pass"
    return {"forward": "the forward pass", "loss": "the loss"}.get(phase, "the optimizer step")


def table(report: Report) -> Table:
    """The bytes at the peak, row by row."""
    shape = f"{report.batch} x {report.length} tokens"
    made = Table(title=f"Memory of a training step on a {report.device}, {shape}", min_width=60)
    made.add_column("at the peak")
    made.add_column("GiB", justify="right")
    parts = report.estimate.parts
    for kind, name in _ROWS.items():
        if parts[kind] or kind not in (CODES, SCALES):
            made.add_row(name, f"{parts[kind] / GIB:.2f}")
    what = "CUDA context" if report.device == "GPU" else "Python and its libraries"
    made.add_row(f"{what} (assumed)", f"{report.estimate.overhead / GIB:.2f}")
    made.add_section()
    made.add_row("total", f"{report.estimate.total / GIB:.2f}")
    if report.budget is not None:
        made.add_row("budget", f"{report.budget / GIB:.2f}")
    return made


def lines(report: Report) -> list[str]:
    """What follows the table."""
    said = []
    if report.budget is not None:
        verdict = "It fits" if report.fits else "It does not fit"
        said.append(f"{verdict}: {gib(report.estimate.total)} of {gib(report.budget)}.")
        said += _limits(report)
        if report.changes:
            said.append("What needs less, each by itself:")
        for change in report.changes:
            mark = "fits" if change.total <= report.budget else "does not fit"
            said.append(f"  {gib(change.total):>10}  {mark:<12}  {change.options}")
    return [*said, *(f"Note: {note}." for note in report.notes)]


def _limits(report: Report) -> list[str]:
    """The largest batch and lengths that fit."""
    rows = report.largest["batch"]
    more = " or more" if rows == MOST_ROWS else ""
    said = [f"Largest batch at {report.length} tokens: {rows or 'none'}{more}"]
    for batch, name in {report.batch: "length", 1: "length_of_one_row"}.items():
        tokens = report.largest[name]
        end = ", all that the model has positions for" if tokens > report.longest - UNIT else ""
        said.append(f"Largest length at batch {batch}: {tokens or 'none'}{end}")
    return said


def as_json(report: Report) -> dict[str, Any]:
    """Everything, in bytes."""
    parts = {kind.replace(" ", "_"): report.estimate.parts[kind] for kind in _ROWS}
    return {
        "device": report.device.lower(),
        "batch": report.batch,
        "length": report.length,
        "fits": report.fits,
        "budget": report.budget,
        "total": report.estimate.total,
        "parts": {**parts, "overhead_assumed": report.estimate.overhead},
        "host": report.estimate.host,
        "peak_in": phase_name(report.estimate.phase).removeprefix("the "),
        "largest": report.largest,
        "changes": [asdict(change) for change in report.changes],
        "notes": report.notes,
    }

"""What still fits, and what to change when a run does not."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.training_args import OptimizerNames

from .estimate import Planner

MOST_ROWS = 1024
UNIT = 64  # tokens
FARTHEST = 8.0  # times as far as known to fit, for the next look
EIGHT_BIT = "paged_adamw_8bit"
LOW_RANK = 8


@dataclass(frozen=True)
class Change:
    """A way to need less.

    Attributes:
        options: what to write on the command line.
        total: bytes of the run with it.
    """

    options: str
    total: int


def largest(total: Callable[[int], int], budget: int, top: int, start: int) -> int:
    """The largest n in 1..top whose total is within the budget; 0: none is.

    Bytes grow in straight pieces that only get steeper. So the line between the nearest known
    points on both sides of the budget meets it too early, and the lines through two points on one
    side meet it too late: the answer lies between, and few looks find it.

    Args:
        total: bytes at n, growing with n.
        budget: bytes.
        top: the largest n to consider.
        start: an n to begin with.
    """
    known = {1: total(1)}
    if known[1] > budget:
        return 0
    n = min(max(start, 2), top)
    while True:
        if n not in known:
            known[n] = total(n)
        below = sorted(n for n in known if known[n] <= budget)
        above = sorted(n for n in known if known[n] > budget)
        low, high = below[-1], (above or [top + 1])[0]
        late = [float(high), FARTHEST * low]
        late += [_meets(known, budget, *below[-2:])] if below[1:] else []
        late += [_meets(known, budget, *above[:2])] if above[1:] else []
        if high - low <= 1 or min(late) < low + 1:
            return low
        early = _meets(known, budget, low, high) if above else min(late)
        n = min(max(int(math.sqrt(early * min(late))), low + 1), high - 1)


def _meets(known: dict[int, int], budget: int, a: int, b: int) -> float:
    """Where the line through the points at a and b meets the budget."""
    slope = (known[b] - known[a]) / (b - a)
    return a + (budget - known[a]) / slope if slope else math.inf


def largest_batch(planner: Planner, budget: int, length: int) -> int:
    """Rows per micro-batch of `length` tokens each, up to `MOST_ROWS`; 0: not even one."""
    asked = planner.args.per_device_train_batch_size
    return largest(lambda rows: planner.estimate(rows, length).total, budget, MOST_ROWS, asked)


def largest_length(planner: Planner, budget: int, batch: int) -> int:
    """Tokens per row at `batch` rows, a multiple of `UNIT`, up to what the model has positions for.

    0: not even `UNIT` tokens fit.
    """
    top, asked = max(planner.longest // UNIT, 1), (planner.args.max_length or 0) // UNIT
    return UNIT * largest(lambda n: planner.estimate(batch, n * UNIT).total, budget, top, asked)


def changes(planner: Planner, budget: int, length_that_fits: int) -> list[Change]:
    """Ways to need less, each by itself, the one that costs the user least first.

    The last one is all of them together but for the length, at one row; and with the largest
    length that then fits, if the length must give way too.

    Args:
        planner: the run as asked for, which does not fit.
        budget: bytes.
        length_that_fits: the largest length at its batch; 0: none.
    """
    args = planner.args
    batch, length = args.per_device_train_batch_size, args.max_length or 0
    switches = _switches(planner)
    found = {}
    for name, value in switches.items():
        total = _switched(planner, {name: value}).estimate(batch, length).total
        found[name] = Change(f"--{name} {str(value).lower()}", total)
    if batch > 1:
        found["batch"] = _smaller_batch(planner, budget)
    if length_that_fits:
        total = planner.estimate(batch, length_that_fits).total
        found["length"] = Change(f"--max_length {length_that_fits}", total)
    listed = [found[name] for name in _ORDER if name in found]
    if len(switches) + (batch > 1) > 1 and all(change.total > budget for change in listed):
        listed.append(_together(planner, switches, budget))
    return listed


_ORDER = (
    "gradient_checkpointing",
    "batch",
    "label_smoothing_factor",
    "optim",
    "load_in_4bit",
    "lora_r",
    "length",
)


def _switches(planner: Planner) -> dict[str, Any]:
    """Options that would need less, with their values."""
    args, found = planner.args, {}
    if not args.gradient_checkpointing:
        found["gradient_checkpointing"] = True
    if args.label_smoothing_factor:  # it needs all logits at once, the plain loss does not
        found["label_smoothing_factor"] = 0
    with_nf4 = importlib.util.find_spec("bitsandbytes") is not None
    if with_nf4 and planner.on_gpu and "8bit" not in OptimizerNames(args.optim).value:
        found["optim"] = EIGHT_BIT
    if with_nf4 and not planner.quantized:
        found["load_in_4bit"] = True
    if planner.adapter.config().low_rank and planner.adapter.lora_r > LOW_RANK:
        found["lora_r"] = LOW_RANK
    return found


def _switched(planner: Planner, switches: dict[str, Any]) -> Planner:
    options = dict(switches)
    if "optim" in options:
        options["optim"] = OptimizerNames(options["optim"])
    if "lora_r" in options:  # what was chosen among the larger ranks does not fit the smaller one
        options |= {"ranks": None, "rank_unit": 1, "ranks_per_step": 1}
    return planner.with_options(**options)


def _smaller_batch(planner: Planner, budget: int) -> Change:
    """Fewer rows at once and more micro-batches, whose gradients stay in memory."""
    args, length = planner.args, planner.args.max_length or 0
    batch, before = args.per_device_train_batch_size, args.gradient_accumulation_steps
    accumulating = planner.with_options(gradient_accumulation_steps=max(before, 2))
    rows = (
        largest(lambda n: accumulating.estimate(n, length).total, budget, batch - 1, batch // 2)
        or 1
    )
    steps = math.ceil(batch / rows) * before
    options = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {steps}"
    return Change(options, accumulating.estimate(rows, length).total)


def _together(planner: Planner, switches: dict[str, Any], budget: int) -> Change:
    args, length = planner.args, planner.args.max_length or 0
    steps = args.gradient_accumulation_steps * args.per_device_train_batch_size
    least = _switched(planner, switches | {"gradient_accumulation_steps": steps})
    options = [f"--{name} {str(value).lower()}" for name, value in switches.items()]
    options.append(f"--per_device_train_batch_size 1 --gradient_accumulation_steps {steps}")
    total = least.estimate(1, length).total
    if total > budget and (shorter := largest_length(least, budget, 1)):
        options.append(f"--max_length {shorter}")
        total = least.estimate(1, shorter).total
    return Change(" ".join(options), total)

"""`anyrank sweep`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .words import count, nats, numbers, regex, verb_parser

_ONLY_WITH = {
    "answer_pattern": "exact_match",
    "max_new_tokens": "exact_match",
    "dataset_config": "dataset",
    "split": "dataset",
    "prompt_column": "dataset",
    "completion_column": "dataset",
}

_TOLERANCE = """choose the smallest rank at most NATS per token above the best (default: at most one
standard error of its difference to the best, row by row, or 0.002 where many rows make the error
smaller than that; name your own price where a smaller file is worth more)"""
_BUDGET = """give every layer its own rank: the best that N numbers in A and B hold, such as 2M or
500k, beside the uniform rank of that size; writes budget.json, which anyrank export --rank_pattern
reads (for PEFT: vLLM wants one rank for all layers)"""


def _arguments() -> argparse.ArgumentParser:
    parser = verb_parser(
        "sweep", "The loss of a finished run at every rank, and the rank to choose."
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a finished anyrank train")
    add("--dataset", help="rows to evaluate on (default: the run's validation rows)")
    add("--dataset_config", help="configuration of a Hub data set")
    add("--split", help="split of a Hub data set or a folder (test)")
    add("--prompt_column", help="column of the prompt (default: as in the run)")
    add("--completion_column", help="column of the completion (default: as in the run)")
    add("--ranks", help="such as 1,2,4,8 (default: those trained, or a doubling series)")
    add("--limit", type=count, metavar="N", help="use the first N rows")
    add("--batch_size", type=count, metavar="N", help="rows per forward pass (8)")
    add("--tolerance", type=nats, metavar="NATS", help=_TOLERANCE)
    add("--budget", type=numbers, metavar="N", help=_BUDGET)
    add("--exact_match", action="store_true", help="also answer every row and compare")
    add("--answer_pattern", type=regex, metavar="REGEX", help="compare only its last match")
    add("--max_new_tokens", type=count, metavar="N", help="longest answer (128)")
    add("--trust_remote_code", action="store_true", help="run code that the model brings along")
    add("--out", type=Path, help="folder for sweep.json and sweep.png, or budget.json (RUN)")
    add("--json", action="store_true", help="print sweep.json instead of the table")
    return parser


def main(argv: list[str]) -> None:
    """Sweep, and print the table."""
    chosen = vars(_arguments().parse_args(argv))
    from ..training.run import Run

    run = Run.open(chosen["run"])  # before the imports that take seconds
    from ..schedule import rank_list
    from ..sweep.report import cheaper, table, why_chosen
    from ..sweep.sweep_run import SweepOptions, sweep_run

    run_folder, as_json = chosen.pop("run"), chosen.pop("json")
    chosen["ranks"] = rank_list(chosen["ranks"], "ranks")
    given = {k: v for k, v in chosen.items() if v is not None and v is not False}
    for key, needs in _ONLY_WITH.items():
        if key in given and needs not in given:
            raise ConfigError(
                f"--{key} does nothing without --{needs}; add it, or leave --{key} out"
            )
    if (budget := given.pop("budget", None)) is not None:
        _budget(run_folder, given, budget, as_json)
        return
    found = sweep_run(run_folder, SweepOptions(**given))
    if as_json:
        print(((chosen["out"] or run_folder) / "sweep.json").read_text(encoding="utf-8"), end="")
        return
    from rich.console import Console

    Console().print(table(found))
    if not found["nested"] and len(found["ranks"]) > 1:
        print("Note: this run trained its largest rank alone; its prefixes never learned to stand.")
    if found["chosen_rank"] is None and found["ranks"][0]["rank"]:
        print("No rank has a finite loss: the run diverged; train with a lower --learning_rate.")
        return
    where, rank = shlex.quote(str(run_folder)), found["chosen_rank"]
    if rank:
        print(f"Chosen: rank {rank}, {why_chosen(found)}.")
        if (other := cheaper(found)) is not None:
            print(other)
        print(f"Next: anyrank export {where} --rank {rank} --to lora OUT")
    if run.config.get("foldable"):
        at = f" --rank {rank}" if rank else ""
        print(f"{'  or' if rank else 'Next'}: anyrank fold {where} OUT{at}")


def _budget(folder: Path, given: dict[str, Any], budget: int, as_json: bool) -> None:
    """A rank for every layer, and how it compares with one rank for all."""
    from ..sweep import budget_run as layers
    from ..sweep.sweep_run import SweepOptions

    layers.check_options(given)
    found = layers.budget_run(folder, SweepOptions(**given), budget)
    file = given.get("out", folder) / layers.FILE
    if as_json:
        print(file.read_text(encoding="utf-8"), end="")
        return
    from rich.console import Console

    Console().print(layers.layer_table(found))
    print("\n".join(layers.verdict(found)))
    how = f"--rank_pattern {shlex.quote(str(file))}"
    if not layers.better(found):
        how = f"--rank {found['uniform']['rank']}"
    print(f"Next: anyrank export {shlex.quote(str(folder))} {how} --to lora OUT")

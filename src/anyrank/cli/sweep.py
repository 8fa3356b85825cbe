"""`anyrank sweep`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .words import count, count_from_0, names, nats, numbers, regex, verb_parser

if TYPE_CHECKING:
    from ..sweep.sweep_run import SweepOptions
    from ..training.run import Run

_ONLY_WITH = {
    "answer_pattern": "exact_match",
    "max_new_tokens": "exact_match",
    "dataset_config": "dataset",
    "split": "dataset",
    "prompt_column": "dataset",
    "completion_column": "dataset",
    "num_fewshot": "tasks",
    "apply_chat_template": "tasks",
}

_LOSSES = "which compares losses alone; leave one of them out"
_NOT_WITH = (
    ("tasks", "budget", _LOSSES),
    ("tolerance", "budget", _LOSSES),
    ("exact_match", "budget", _LOSSES),
    ("tolerance", "tasks", "whose standard errors choose; leave it out"),
)

_TASKS = "lm-eval tasks, YAML files, folders: mmlu,./a.yaml"
_TOLERANCE = """choose the smallest rank at most NATS per token above the best (default: one
standard error of the difference, at least 0.002)"""
_BUDGET = """a rank for every layer instead: the best that N numbers in A and B hold (2M, 500k);
writes budget.json for anyrank export --rank_pattern"""


def _arguments() -> argparse.ArgumentParser:
    parser = verb_parser(
        "sweep", "A finished run at every rank: its loss or its tasks, and the rank to choose."
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a finished anyrank train")
    add("--dataset", metavar="NAME", help="rows to evaluate on (the run's validation rows)")
    add("--dataset_config", metavar="NAME", help="configuration of a Hub data set")
    add("--split", metavar="NAME", help="split of a Hub data set or a folder (test)")
    add("--prompt_column", metavar="NAME", help="column of the prompt (default: as in the run)")
    add("--completion_column", metavar="NAME", help="column of the completion (likewise)")
    add("--tasks", type=names, metavar="A,B", help=_TASKS)
    add("--num_fewshot", type=count_from_0, metavar="N", help="examples (default: the task's)")
    add("--apply_chat_template", action="store_true", help="put tasks into the chat template")
    add("--ranks", metavar="1,2,4", help="ranks (those trained, or a doubling series)")
    add("--limit", type=count, metavar="N", help="use the first N rows (of each task)")
    add("--batch_size", type=count, metavar="N", help="rows per forward pass (8)")
    add("--tolerance", type=nats, metavar="NATS", help=_TOLERANCE)
    add("--budget", type=numbers, metavar="N", help=_BUDGET)
    add("--exact_match", action="store_true", help="also answer every row and compare")
    add("--answer_pattern", type=regex, metavar="REGEX", help="compare only its last match")
    add("--max_new_tokens", type=count, metavar="N", help="longest answer (128)")
    add("--trust_remote_code", action="store_true", help="run code that model or tasks fetch")
    add("--out", type=Path, help="folder of sweep.json, sweep.png, budget.json (RUN)")
    add("--json", action="store_true", help="print that JSON instead of the table")
    return parser


def main(argv: list[str]) -> None:
    """Sweep, or search a rank for every layer, and print what was found."""
    chosen = vars(_arguments().parse_args(argv))
    from ..schedule import rank_list
    from ..training.run import Run

    run = Run.open(chosen.pop("run"))  # before the imports that take seconds
    chosen["ranks"] = rank_list(chosen["ranks"], "ranks")
    given = {k: v for k, v in chosen.items() if v is not None and v is not False}
    _check(given)
    as_json, budget = given.pop("json", False), given.pop("budget", None)
    from ..sweep.sweep_run import SweepOptions

    options = SweepOptions(**given)
    if budget is None:
        _every_rank(run, options, as_json)
    else:
        _every_layer(run, options, budget, as_json)


def _check(given: dict[str, Any]) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigError: it names the option, and what it needs or stands beside.
    """
    for key, needs in _ONLY_WITH.items():
        if key in given and needs not in given:
            raise ConfigError(
                f"--{key} does nothing without --{needs}; add it, or leave --{key} out"
            )
    for key, other, why in _NOT_WITH:
        if key in given and other in given:
            raise ConfigError(f"--{key} does nothing with --{other}, {why}")
    if {"exact_match", "tasks"} <= given.keys() and "dataset" not in given:
        raise ConfigError(
            "--exact_match does nothing with --tasks alone; add --dataset, or leave it out"
        )


def _every_rank(run: Run, options: SweepOptions, as_json: bool) -> None:
    """The table of all ranks, why one was chosen, and what to do next."""
    from ..sweep.report import cheaper, table, why_chosen
    from ..sweep.sweep_run import sweep_run
    from ..sweep.task_report import without_gain

    found = sweep_run(run.folder, options)
    if as_json:
        _print_file((options.out or run.folder) / "sweep.json")
        return
    from rich.console import Console

    Console().print(table(found))
    if not found["nested"] and len(found["ranks"]) > 1:
        print("Note: this run trained its largest rank alone; its prefixes never learned to stand.")
    if "tasks" in found and (flat := without_gain(found)):
        print(f"Note: no rank is a standard error better than the base on {', '.join(flat)}.")
    if found["chosen_rank"] is None and found["ranks"][0]["rank"]:
        what = "score" if "tasks" in found else "loss"
        print(f"No rank has a finite {what}: the run diverged; train with a lower --learning_rate.")
        return
    where, rank = shlex.quote(str(run.folder)), found["chosen_rank"]
    if rank:
        print(f"Chosen: rank {rank}, {why_chosen(found)}.")
        if (other := cheaper(found)) is not None:
            print(other)
        print(f"Next: anyrank export {where} --rank {rank} --to lora OUT")
    if run.config.get("foldable"):
        at = f" --rank {rank}" if rank else ""
        print(f"{'  or' if rank else 'Next'}: anyrank fold {where} OUT{at}")


def _every_layer(run: Run, options: SweepOptions, budget: int, as_json: bool) -> None:
    """A rank for every layer, how it compares with one rank for all, and what to do next."""
    from ..sweep.budget_run import FILE, better, budget_run, layer_table, verdict

    found = budget_run(run.folder, options, budget)
    file = (options.out or run.folder) / FILE
    if as_json:
        _print_file(file)
        return
    from rich.console import Console

    Console().print(layer_table(found))
    print("\n".join(verdict(found)))
    how = f"--rank_pattern {shlex.quote(str(file))}"
    if not better(found):
        how = f"--rank {found['uniform']['rank']}"
    print(f"Next: anyrank export {shlex.quote(str(run.folder))} {how} --to lora OUT")


def _print_file(path: Path) -> None:
    print(path.read_text(encoding="utf-8"), end="")

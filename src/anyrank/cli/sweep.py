"""`anyrank sweep`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .words import count, count_from_0, names, nats, regex, verb_parser

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


def _arguments() -> argparse.ArgumentParser:
    parser = verb_parser(
        "sweep", "A finished run at every rank: its loss or its tasks, and the rank to choose."
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a finished anyrank train")
    add("--dataset", help="rows to evaluate on (default: the run's validation rows)")
    add("--dataset_config", metavar="NAME", help="configuration of a Hub data set")
    add("--split", help="split of a Hub data set or a folder (test)")
    add("--prompt_column", metavar="NAME", help="column of the prompt (default: as in the run)")
    add("--completion_column", metavar="NAME", help="column of the completion (likewise)")
    add("--tasks", type=names, help="lm-eval tasks, YAML files or folders: mmlu,gsm8k,./my.yaml")
    add("--num_fewshot", type=count_from_0, metavar="N", help="examples (default: the task's)")
    add("--apply_chat_template", action="store_true", help="put tasks into the chat template")
    add("--ranks", help="such as 1,2,4,8 (default: those trained, or a doubling series)")
    add("--limit", type=count, metavar="N", help="use the first N rows (of each task)")
    add("--batch_size", type=count, metavar="N", help="rows per forward pass (8)")
    add("--tolerance", type=nats, metavar="NATS", help="loss that a smaller rank may lose (0.02)")
    add("--exact_match", action="store_true", help="also answer every row and compare")
    add("--answer_pattern", type=regex, metavar="REGEX", help="compare only its last match")
    add("--max_new_tokens", type=count, metavar="N", help="longest answer (128)")
    add("--trust_remote_code", action="store_true", help="run code that model or tasks fetch")
    add("--out", type=Path, help="folder for sweep.json and sweep.png (default: RUN)")
    add("--json", action="store_true", help="print sweep.json instead of the table")
    return parser


def main(argv: list[str]) -> None:
    """Sweep, and print the table."""
    chosen = vars(_arguments().parse_args(argv))
    from ..training.run import Run

    run = Run.open(chosen["run"])  # before the imports that take seconds
    from ..schedule import rank_list
    from ..sweep.report import reason, table
    from ..sweep.sweep_run import SweepOptions, sweep_run
    from ..sweep.tasks import without_gain

    run_folder, as_json = chosen.pop("run"), chosen.pop("json")
    chosen["ranks"] = rank_list(chosen["ranks"], "ranks")
    given = {k: v for k, v in chosen.items() if v is not None and v is not False}
    for key, needs in _ONLY_WITH.items():
        if key in given and needs not in given:
            raise ConfigError(
                f"--{key} does nothing without --{needs}; add it, or leave --{key} out"
            )
    if "tasks" in given:
        _check_tasks(given)
    found = sweep_run(run_folder, SweepOptions(**given))
    if as_json:
        print(((chosen["out"] or run_folder) / "sweep.json").read_text(encoding="utf-8"), end="")
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
    where, rank = shlex.quote(str(run_folder)), found["chosen_rank"]
    if rank:
        print(
            f"Chosen: rank {rank}, the smallest {reason(found)}.\n"
            f"Next: anyrank export {where} --rank {rank} --to lora OUT"
        )
    if run.config.get("foldable"):
        at = f" --rank {rank}" if rank else ""
        print(f"{'  or' if rank else 'Next'}: anyrank fold {where} OUT{at}")


def _check_tasks(given: dict[str, Any]) -> None:
    """Refuse what does nothing beside --tasks.

    Raises:
        ConfigError: an option of the loss.
    """
    if "tolerance" in given:
        raise ConfigError(
            "--tolerance does nothing with --tasks, whose standard errors choose; leave it out"
        )
    if "exact_match" in given and "dataset" not in given:
        raise ConfigError(
            "--exact_match does nothing with --tasks alone; add --dataset, or leave it out"
        )

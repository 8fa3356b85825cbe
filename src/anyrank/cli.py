"""The command line: one verb each, one line per error, exit code 2."""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import allocator
from .errors import AnyRankError, ConfigError, nearest

HELP = """\
anyrank: fine-tune a quantized language model once; ship it at any rank.

  anyrank train  --model_name_or_path M --dataset D --output_dir RUN   every rank, in one run
  anyrank sweep  RUN                                                   the loss at every rank
  anyrank export RUN --rank 8 --to lora OUT                            an ordinary PEFT LoRA
  anyrank demo                                                         all three, on a tiny model

anyrank VERB --help says more. --debug shows the traceback of an error; --keep_malloc leaves the
memory allocator of a CPU as it is (see docs/log.md).
"""

TRAIN_HELP = """\
anyrank train --model_name_or_path M --dataset D --output_dir RUN [--config FILE.yaml] [--key value]

Model    --model_name_or_path     folder or Hub name          --dtype          auto
         --load_in_4bit           as the method says          --attn_implementation
Data     --dataset                .jsonl .json .csv .parquet or a Hub name; alpaca, prompt and
                                  completion, messages, sharegpt or text columns
         --prompt_column, --completion_column                 for other names
         --eval_dataset           validation rows             --eval_size      or a share, a count
         --max_length             1024 tokens                 --packing        false
Adapter  --method                 {methods}
         --lora_r                 64                          --lora_alpha     16
         --lora_target_modules    all-linear                  --lora_dropout   0
         --nested                 every rank                  --scale          alpha/k, alpha/r ...
         --ranks                  1,2,4,8,16,32,64 to draw from; default: all of them
         --schedule               uniform or sandwich         --rank_unit, --ranks_per_step
Steps    --max_steps              or --num_train_epochs 3     --learning_rate  2e-4
         --per_device_train_batch_size 8                      --gradient_accumulation_steps 1
         --lr_scheduler_type      linear                      --warmup_steps   0.03
         --optim                  adamw_torch_fused           --seed           42
         --gradient_checkpointing on a GPU                    --bf16           true
Run      --output_dir             new folder                  --report_to      none
         --save_steps             500                         --logging_steps  10
         --resume_from_checkpoint true, or a checkpoint

--config takes the same keys from YAML. --help_all lists every key (all of TRL's SFTConfig).
"""


def main() -> NoReturn:
    """The `anyrank` command."""
    argv = sys.argv[1:]
    if "--keep_malloc" in argv:
        argv.remove("--keep_malloc")
    elif argv and argv[0] in ("train", "sweep", "demo"):
        allocator.keep_buffers(argv)
    sys.exit(run(argv))


def run(argv: Sequence[str]) -> int:
    """Run one verb; return the exit code: 0, or 2 with one line on stderr."""
    arguments = list(argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    _quiet(debug)
    try:
        verb = arguments.pop(0)
        if verb not in VERBS:
            raise ConfigError(f"verb {verb!r} is unknown; {nearest(verb, VERBS)}")
        VERBS[verb](arguments)
    except KeyboardInterrupt:
        print(f"anyrank {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        _end_bars()
        print(f"anyrank: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _train(argv: list[str]) -> None:
    if set(argv) & {"-h", "--help"}:
        from .methods import METHODS

        print(TRAIN_HELP.format(methods=" ".join(METHODS)), end="")
        return
    from .training.parse import parse_train

    chosen = parse_train(argv)
    from .training.train import train

    result = train(*chosen)
    folder = chosen[-1].output_dir
    if chosen[-1].process_index:
        return
    if allocator.keeps_buffers():
        print("glibc was told to keep freed buffers for reuse; --keep_malloc leaves it as it is.")
    print(f"Trained {result['steps']} steps in {result['seconds']:.0f} s; the run is in {folder}.")
    print(f"Next: anyrank sweep {folder}")


def _sweep_parser() -> argparse.ArgumentParser:
    parser = _parser("sweep", "The loss of a finished run at every rank, and the rank to choose.")
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a finished anyrank train")
    add("--dataset", help="rows to evaluate on (default: the run's validation rows)")
    add("--dataset_config", help="configuration of a Hub data set")
    add("--split", help="split of a Hub data set or a folder (test)")
    add("--prompt_column", help="column of the prompt (default: as in the run)")
    add("--completion_column", help="column of the completion (default: as in the run)")
    add("--ranks", help="such as 1,2,4,8 (default: those trained, or a doubling series)")
    add("--limit", type=_count, metavar="N", help="use the first N rows")
    add("--batch_size", type=_count, metavar="N", help="rows per forward pass (8)")
    add("--tolerance", type=_nats, metavar="NATS", help="loss that a smaller rank may lose (0.02)")
    add("--exact_match", action="store_true", help="also answer every row and compare")
    add("--answer_pattern", type=_regex, metavar="REGEX", help="compare only its last match")
    add("--max_new_tokens", type=_count, metavar="N", help="longest answer (128)")
    add("--trust_remote_code", action="store_true", help="run code that the model brings along")
    add("--out", type=Path, help="folder for sweep.json and sweep.png (default: RUN)")
    add("--json", action="store_true", help="print sweep.json instead of the table")
    return parser


def _sweep(argv: list[str]) -> None:
    chosen = vars(_sweep_parser().parse_args(argv))
    from .training.run import Run

    Run.open(chosen["run"])  # before the imports that take seconds
    from .schedule import rank_list
    from .sweep.report import table
    from .sweep.sweep_run import SweepOptions, sweep_run

    run_folder, as_json = chosen.pop("run"), chosen.pop("json")
    chosen["ranks"] = rank_list(chosen["ranks"], "ranks")
    given = {k: v for k, v in chosen.items() if v is not None and v is not False}
    for key, needs in _ONLY_WITH.items():
        if key in given and needs not in given:
            raise ConfigError(
                f"--{key} does nothing without --{needs}; add it, or leave --{key} out"
            )
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
    elif found["chosen_rank"]:
        rank = found["chosen_rank"]
        print(
            f"Chosen: rank {rank}, the smallest within {found['tolerance']:g} nats per token of "
            f"the best.\nNext: anyrank export {run_folder} --rank {rank} --to lora OUT"
        )


def _export(argv: list[str]) -> None:
    parser = _parser("export", "Write a rank of a run in a form that runs without anyrank.")
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run, or a folder with an anyrank adapter")
    add("out", metavar="OUT", type=Path, help="new folder (with --ranks: OUT/rank4, ...)")
    add("--rank", help="the rank to write")
    add("--ranks", help="several ranks in one call, such as 4,8,16")
    add("--to", default="lora", help="format: lora, a plain PEFT LoRA")
    chosen = parser.parse_args(argv)
    from .export.verb import export_ranks
    from .schedule import rank_list

    name = "rank" if chosen.ranks is None else "ranks"
    ranks = rank_list(getattr(chosen, name), name) or []
    if (chosen.rank is None) == (chosen.ranks is None) or (name == "rank" and len(ranks) != 1):
        raise ConfigError("name one rank with --rank 8, or several with --ranks 4,8,16")
    for line in export_ranks(chosen.run, chosen.out, ranks, chosen.to, several=name == "ranks"):
        print(line)


def _demo(argv: list[str]) -> None:
    parser = _parser("demo", "Train, sweep and export on the tiny model that comes along.")
    parser.add_argument("--output_dir", type=Path, help="new folder (default: demo-run, -2, ...)")
    chosen = parser.parse_args(argv)
    from . import demo
    from .files import read_json, refuse_filled

    out = chosen.output_dir or _first_free("demo-run")
    refuse_filled(out)

    def step(words: list[str]) -> None:
        print(f"\n$ anyrank {shlex.join(words)}", flush=True)
        VERBS[words[0]](words[1:])

    step(demo.train_command(out))
    step(demo.sweep_command(out))
    rank = read_json(out / "run" / "sweep.json")["chosen_rank"]
    step(demo.export_command(out, rank))
    print(f"\nThe rank curve: {out / 'run' / 'sweep.png'}\nThe LoRA: {out / 'lora'}\n\n{demo.NEXT}")


def _first_free(name: str) -> Path:
    """`name`, or name-2, name-3, ... where that is taken."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


_ONLY_WITH = {
    "answer_pattern": "exact_match",
    "max_new_tokens": "exact_match",
    "dataset_config": "dataset",
    "split": "dataset",
    "prompt_column": "dataset",
    "completion_column": "dataset",
}


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def _nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0, in nats per token")
    return value


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None
    return text


VERBS: dict[str, Callable[[list[str]], Any]] = {
    "train": _train,
    "sweep": _sweep,
    "export": _export,
    "demo": _demo,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser(verb: str, text: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"anyrank {verb}", description=text, allow_abbrev=False)


def _quiet(debug: bool) -> None:
    """Our own lines go to stderr; what other libraries deprecate is nothing a user can act on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anyrank").setLevel(logging.INFO)
    if not debug:
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _end_bars() -> None:
    """Leave the line of a progress bar before an error is printed."""
    if "tqdm" in sys.modules and getattr(sys.modules["tqdm"].tqdm, "_instances", None):
        print(file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AnyRankError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"

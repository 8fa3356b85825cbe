"""`anyrank demo`."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

from . import export, sweep, train
from .words import verb_parser

_VERBS = {"train": train.main, "sweep": sweep.main, "export": export.main}


def main(argv: list[str]) -> None:
    """Run three commands one after the other."""
    parser = verb_parser("demo", "Train, sweep and export on the tiny model that comes along.")
    parser.add_argument("--output_dir", type=Path, help="new folder (default: demo-run, -2, ...)")
    chosen = parser.parse_args(argv)
    from .. import demo
    from ..files import read_json, refuse_filled

    out = chosen.output_dir or _first_free("demo-run")
    refuse_filled(out)

    def step(words: list[str]) -> None:
        print(f"\n$ anyrank {shlex.join(words)}", flush=True)
        _VERBS[words[0]](words[1:])

    step(demo.train_command(out))
    step(demo.sweep_command(out))
    rank = read_json(out / "run" / "sweep.json")["chosen_rank"]
    step(demo.export_command(out, rank))
    print(f"\nThe rank curve: {out / 'run' / 'sweep.png'}\nThe LoRA: {out / 'lora'}\n\n{demo.NEXT}")


def _first_free(name: str) -> Path:
    """`name`, or name-2, name-3, ... where that is taken."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())

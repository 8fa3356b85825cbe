"""`anyrank export`."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .words import verb_parser


def main(argv: list[str]) -> None:
    """Export, and say where to."""
    parser = verb_parser("export", "Write a rank of a run in a form that runs without anyrank.")
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run, or a folder with an anyrank adapter")
    add("out", metavar="OUT", type=Path, help="new folder (with --ranks: OUT/rank4, ...)")
    add("--rank", help="the rank to write")
    add("--ranks", help="several ranks in one call, such as 4,8,16")
    add("--to", default="lora", help="format: lora, a plain PEFT LoRA")
    chosen = parser.parse_args(argv)
    from ..export.verb import export_ranks
    from ..schedule import rank_list

    name = "rank" if chosen.ranks is None else "ranks"
    ranks = rank_list(getattr(chosen, name), name) or []
    if (chosen.rank is None) == (chosen.ranks is None) or (name == "rank" and len(ranks) != 1):
        raise ConfigError("name one rank with --rank 8, or several with --ranks 4,8,16")
    for line in export_ranks(chosen.run, chosen.out, ranks, chosen.to, several=name == "ranks"):
        print(line)

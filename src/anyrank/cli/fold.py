"""`anyrank fold`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .words import verb_parser


def main(argv: list[str]) -> None:
    """Fold, and say what was kept."""
    parser = verb_parser(
        "fold", "Fold runs into the offsets of their quantized base: no adapter is left."
    )
    add = parser.add_argument
    add("runs", metavar="RUN", type=Path, nargs="+", help="runs of one base, or adapter folders")
    add("out", metavar="OUT", type=Path, help="new folder; from_pretrained(OUT) loads it")
    add("--rank", help="the rank to fold (default: the one that a sweep chose)")
    add("--ranks", help="several ranks, such as 4,8,16: a table of offsets each, one set of codes")
    add("--base", type=Path, help="folder of the quantized base, if it was moved")
    add("--dataset", help="rows to compare on (default: validation or training rows of the run)")
    add("--limit", type=int, default=8, metavar="N", help="compare on N rows (8); 0: do not")
    add("--trust_remote_code", action="store_true", help="run code that the model brings along")
    chosen = parser.parse_intermixed_args(argv)
    from ..schedule import rank_list

    if chosen.rank is not None and chosen.ranks is not None:
        raise ConfigError("name one rank with --rank 8, or several with --ranks 4,8,16")
    name = "rank" if chosen.ranks is None else "ranks"
    ranks = rank_list(getattr(chosen, name), name)
    if name == "rank" and ranks is not None and len(ranks) > 1:
        raise ConfigError(f"--rank {chosen.rank}: several ranks go into --ranks")
    from ..sweep.fold_run import fold_run

    found = fold_run(
        chosen.runs,
        chosen.out,
        ranks=ranks,
        base=chosen.base,
        dataset=chosen.dataset,
        limit=chosen.limit,
        trust_remote_code=chosen.trust_remote_code,
    )
    for variant, table in found["tables"].items():
        print(_line(variant, table))
    from ..export.folder import formats_for
    from ..quant.checkpoint import QuantizedModel

    names = list(found["tables"])
    variant = "" if len(names) == 1 else f", variant={names[-1]!r}"
    print(f"Load: AutoModelForCausalLM.from_pretrained({str(chosen.out)!r}{variant})")
    form = formats_for(QuantizedModel.open(chosen.out).form)[0]
    words = ["anyrank", "export", str(chosen.out), "OUT.gguf" if form == "gguf" else "OUT"]
    words += ["--to", form, *(["--variant", names[-1]] if len(names) > 1 else [])]
    print(f"Next: {shlex.join(words)}")


def _line(variant: str, table: dict[str, Any]) -> str:
    """One table in one line."""
    rank = "" if table["rank"] is None else f" rank {table['rank']}"
    kl = "not compared" if table["kl"] is None else f"KL {table['kl']:.1e} nats per token"
    return (
        f"{variant}: {table['adapter']}{rank}; codes and scales identical, largest difference to "
        f"the trained weight {table['largest_difference']:g}; {kl}"
    )

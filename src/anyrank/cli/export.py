"""`anyrank export`."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .words import verb_parser

_PATTERN = """of a run, to lora: every layer at its own rank, from the budget.json of anyrank sweep
--budget or a JSON of {layer: rank}; PEFT reads it, vLLM wants one rank for all (--rank)"""


def main(argv: list[str]) -> None:
    """Export, and say where to."""
    parser = verb_parser(
        "export", "Write a rank of a run, or a folded model, in a form that runs without anyrank."
    )
    add = parser.add_argument
    add("source", metavar="RUN|MODEL", type=Path, help="a run or adapter, or a folded model")
    add("out", metavar="OUT", type=Path, help="new folder, or OUT.gguf (--ranks: OUT/rank4, ...)")
    add("--to", help="of a run: lora (default) or gguf; of a model: gguf, mlx, hqq or torchao")
    add("--rank", help="of a run: the rank to write")
    add("--ranks", help="of a run: several ranks in one call, such as 4,8,16")
    add("--rank_pattern", type=Path, metavar="FILE", help=_PATTERN)
    add("--base", type=Path, help="of a run, to gguf: its base model, if it was moved")
    add("--variant", help="of a model: which of its ranks or tasks, such as rank8")
    add("--embeddings", choices=("F16", "Q8_0"), help="of a model, to gguf: their precision (F16)")
    add("--tokenizer_pre", help="of a model, to gguf: pre-tokenizer, where it is not recognised")
    add("--target", choices=("any", "cuda"), help="to torchao: every device (any), or tensor cores")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="to mlx: computes in (float16)")
    chosen = vars(parser.parse_args(argv))
    from ..export.verb import ExportOptions, export
    from ..schedule import rank_list

    one, many = chosen.pop("rank"), chosen.pop("ranks")
    if one is not None and many is not None:
        raise ConfigError("name one rank with --rank 8, or several with --ranks 4,8,16")
    ranks = rank_list(one, "rank") if many is None else rank_list(many, "ranks")
    if one is not None and len(ranks or []) != 1:
        raise ConfigError("name one rank with --rank 8, or several with --ranks 4,8,16")
    source, out, form = (chosen.pop(name) for name in ("source", "out", "to"))
    options = ExportOptions(form, tuple(ranks or ()), many is not None, **chosen)
    for line in export(source, out, options):
        print(line)

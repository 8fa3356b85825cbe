"""Which claims of the papers on quantized adapters hold here, each method at its best rate.

    python benchmarks/claims.py --model ../shared/models/t0-6m --data ../shared/data/gsm8k
    python benchmarks/claims.py --groups rows --methods 'Q-BaRA r 16, 3 bits'       only some

    rows      Q-BaRA against QLoRA at equal parameters, on codes of 4, 3 and 2 bits
    foldable  QA-LoRA, QA-BLoRA, QA-HiRA, PEQA and the skips of IR-QLoRA, on the same codes
    nested    every rank of QA-LoRA and QA-BLoRA from one run, a run for each, and the SVD cut

250 steps of 8 rows in one order, nats per answer token on the first test rows; one scale or offset
per 32 weights everywhere (quality_runs.py). Results: claims.json, and Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from quality_runs import Losses, Plan, add_options, measure, refuse_unknown, spread

WIDE = ("3e-3", "1e-2", "2e-2")
HIGH = ("1e-2", "3e-2", "6e-2")  # where inputs are means of 32
SCALES = ("1e-2", "3e-2", "1e-1")
NESTED = "1,2,4,8"


def codes(bits: int, blocks: str = "--group_size 32") -> str:
    """The options of a base."""
    return f"--bits {bits} {blocks}"


def rows_plans(bits: int) -> dict[str, Plan]:
    """Twice the rows on means of two inputs and for pairs of outputs: the same parameters."""
    base = codes(bits)
    return {
        f"LoRA r 16, {bits} bits": Plan("--method lora --lora_r 16", WIDE, base=base),
        f"Q-BaRA r 16, {bits} bits": Plan("--method qbara --lora_r 16", WIDE, base=base),
    }


def foldable_plans(bits: int) -> dict[str, Plan]:
    """What folds into codes, or trains them."""
    base, tiles = codes(bits), codes(bits, "--tile 8x4")
    folds = "--foldable true --lora_r 8 --method"
    return {
        f"QA-LoRA r 8, {bits} bits": Plan(f"{folds} qalora", HIGH, base=base),
        f"QA-LoRA r 8 with skips, {bits} bits": Plan(
            layer="skips --rank 8 --pool 32", rates=HIGH, base=base
        ),
        f"QA-BLoRA r 8, {bits} bits": Plan(f"{folds} qablora", HIGH, base=base),
        f"QA-HiRA, tiles of 8 x 4, {bits} bits": Plan(f"{folds} qahira", WIDE, base=tiles),
        f"PEQA, {bits} bits": Plan(layer="scales", rates=SCALES, base=base),
        f"PEQA, tiles of 8 x 4, {bits} bits": Plan(layer="scales", rates=SCALES, base=tiles),
        f"LoRA r 8, {bits} bits": Plan("--method lora --lora_r 8", WIDE, base=base),
        f"LoRA r 8 with skips, {bits} bits": Plan(layer="skips --rank 8", rates=WIDE, base=base),
    }


def nested_plans(name: str, method: str) -> dict[str, Plan]:
    """Every rank of a foldable method, which has no more than 8 on layers of 256 inputs."""
    base, options = codes(4), f"--method {method} --foldable true --lora_r"
    return {
        **{
            f"{name} alone r {rank}": Plan(f"{options} {rank}", HIGH, base=base)
            for rank in (1, 2, 4, 8)
        },
        f"{name} 8, SVD cut": Plan(
            cut="svd", from_=f"{name} alone r 8", ranks=NESTED, rates=HIGH, base=base
        ),
        f"{name} nested, a rank a step": Plan(
            f"{options} 8 --nested true --ranks {NESTED}", HIGH, base=base
        ),
        f"{name} nested, settled": Plan(
            f"{options} 8 --nested true --schedule settle", HIGH, compute=1.15, parts=4, base=base
        ),
    }


GROUPS: dict[str, dict[str, Plan]] = {
    "rows": {k: v for bits in (4, 3, 2) for k, v in rows_plans(bits).items()},
    "foldable": {k: v for bits in (4, 3, 2) for k, v in foldable_plans(bits).items()},
    "nested": nested_plans("QA-LoRA", "qalora") | nested_plans("QA-BLoRA", "qablora"),
}


def lines(rates: dict[str, str], by_seed: dict[str, list[Losses]]) -> Iterator[str]:
    """A row per method: its rate, and mean and deviation over the seeds by rank."""
    yield "| method | rate | loss |\n|---|---|---|"
    for name, seeds in by_seed.items():
        cells = []
        for rank in seeds[0]:
            values = [losses[rank] for losses in seeds]
            label = f"{rank}: " if len(seeds[0]) > 1 else ""
            cells.append(f"{label}{statistics.fmean(values):.3f} ± {spread(values):.3f}")
        yield f"| {name} | {rates[name]} | {', '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, Path("runs/claims"))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--methods", nargs="+", help="only these of the groups, by name")
    chosen = parser.parse_args()
    every = [name for group in chosen.groups for name in GROUPS[group]]
    wanted, found = chosen.methods or every, {}
    refuse_unknown(parser, wanted, every)
    for group in chosen.groups:
        plans = GROUPS[group]
        chosen.methods = [name for name in plans if name in wanted]
        rates, by_seed = measure(chosen, plans)
        found[group] = {name: [rates[name], by_seed[name]] for name in by_seed}
        print(f"\n{group}\n\n" + "\n".join(lines(rates, by_seed)), flush=True)
    (chosen.out / "claims.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

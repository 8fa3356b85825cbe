"""Is each rank of one run as good as a run of its own? Every method on equal terms, one table.

    python benchmarks/quality.py --model ../shared/models/t0-6m --data ../shared/data/gsm8k
    python benchmarks/quality.py --methods lora anyrank --seeds 1       only some

Every method sees the same rows in the same order: `--steps` steps of 8 rows, of similar lengths;
`anyrank` may take 15 % more, the sandwich trains as many rows in steps of 9. LoRA is also trained
in four times as many steps of 2 rows, the size of those of `anyrank`. It chooses its rate at each
rank, and so do the cuts of LoRA 64, for themselves (quality_runs.py). The merit is the mean over
log2 of the rank of the loss above that of a LoRA trained at that rank in small steps.

Results: quality.json, quality.png, and Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality_runs import Losses, Plan, add_options, measure, refuse_unknown, spread

RANKS = (1, 2, 4, 8, 16, 32, 64)
LISTED = ",".join(map(str, RANKS))
EACH = {f"lora {rank}": f"--method qlora --lora_r {rank}" for rank in RANKS}
SMALL = {f"small-step {name}": options for name, options in EACH.items()}
RATES = ("3e-3", "5e-3", "1e-2")
ALONE = {"LoRA of each rank": EACH, "LoRA of each rank, small steps": SMALL}  # of several runs
PLANS: dict[str, Plan] = {
    **{name: Plan(options, ("5e-3", "1e-2", "2e-2")) for name, options in EACH.items()},
    "LoRA 64, SVD cut": Plan(cut="svd", from_="lora 64", ranks=LISTED),
    "LoRA 64, prefix": Plan(cut="prefix", from_="lora 64", ranks=LISTED),
    **{name: Plan(options, RATES, rows=2) for name, options in SMALL.items()},
    "LoRA 64, small steps, SVD cut": Plan(cut="svd", from_="small-step lora 64", ranks=LISTED),
    "QDyLoRA": Plan(f"--method qdylora --ranks {LISTED}", RATES),
    "QDyLoRA, frozen rows": Plan("--method qdylora --frozen_rows true", ("3e-3", "1e-2", "3e-2")),
    "MatryoshkaLoRA": Plan(
        "--method qlora", ("3e-3", "1e-2", "2e-2"), layer=f"matryoshka --rank 64 --ranks {LISTED}"
    ),
    "sandwich, 3 ranks a step": Plan(
        f"--method qdylora --ranks {LISTED} --schedule sandwich", RATES, rows=9, parts=3
    ),
    "4 ranks a step": Plan(f"--method qdylora --ranks {LISTED} --ranks_per_step 4", RATES, parts=4),
    "anyrank": Plan("--method anyrank", RATES, compute=1.15, parts=4),
}


def join(rates: dict[str, str], by_seed: dict[str, list[Losses]], row: str) -> None:
    """The runs of each rank as one row of the table, of the seeds that all of them have."""
    names = list(ALONE[row])
    seeds = zip(*(by_seed[name] for name in names), strict=False)
    by_seed[row] = [dict(kv for losses in seed for kv in losses.items()) for seed in seeds]
    rates[row] = ", ".join(dict.fromkeys(rates[name] for name in names))
    for name in names:
        del rates[name], by_seed[name]


def merit(losses: Losses, alone: Losses) -> float:
    """The mean over log2 of the rank of the loss above LoRA trained at that rank."""
    return statistics.fmean(losses[rank] - alone[rank] for rank in RANKS)


def summary(rates: dict[str, str], by_seed: dict[str, list[Losses]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, by method and rank; small steps measure all."""
    alone = by_seed["LoRA of each rank, small steps"]
    out = {}
    for name, seeds in sorted(by_seed.items(), key=lambda item: item[0] not in ALONE):
        merits = [merit(losses, own) for losses, own in zip(seeds, alone, strict=False)]
        out[name] = {
            "learning_rate": rates[name],
            "mean": {rank: statistics.fmean(s[rank] for s in seeds) for rank in RANKS},
            "sd": {rank: spread([s[rank] for s in seeds]) for rank in RANKS},
            "merit": statistics.fmean(merits),
            "merit_sd": spread(merits),
            "seeds": len(seeds),
        }
    return out


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The table in Markdown."""
    yield "| method | rate | " + " | ".join(map(str, RANKS)) + " | above LoRA |"
    yield "|---" * (len(RANKS) + 3) + "|"
    for name, row in found.items():
        cells = [f"{row['mean'][rank]:.3f}" for rank in RANKS]
        merits = f"{row['merit']:+.3f}"
        merits += f" ± {row['merit_sd']:.3f}" if row["seeds"] > 1 else ""
        yield f"| {name} | {row['learning_rate']} | " + " | ".join(cells) + f" | {merits} |"


def plot(found: dict[str, Any], path: Path) -> None:
    """A curve per method, error bars over the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    colours = ("blue", "cyan", "orange", "green", "purple", "olive", "gray", "pink", "brown")
    axes.set_prop_cycle(color=[*(f"tab:{colour}" for colour in colours), "black"])
    for name, row in found.items():
        bold = name == "anyrank" or name in ALONE
        means, errors = ([row[key][rank] for rank in RANKS] for key in ("mean", "sd"))
        axes.errorbar(
            RANKS, means, errors, marker="o", capsize=2, label=name,
            linewidth=2.5 if bold else 1.2, color={"anyrank": "#c4412b"}.get(name),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    lowest = min(min(row["mean"].values()) for row in found.values())
    axes.set_ylim(lowest - 0.1, lowest + 1.9)
    axes.set_xlabel("rank")
    axes.set_ylabel("test loss (nats per answer token)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, Path("runs/quality"))
    parser.add_argument("--methods", nargs="+", default=list(PLANS), help="'lora' is all of LoRA's")
    chosen = parser.parse_args()
    each = [*EACH, *SMALL]
    refuse_unknown(parser, chosen.methods, ["lora", *PLANS])
    if "lora" in chosen.methods:
        chosen.methods += each
    rates, by_seed = measure(chosen, PLANS)
    if not set(each) <= by_seed.keys():
        print(json.dumps({name: [rates[name], by_seed[name]] for name in by_seed}, indent=1))
        return
    for row in ALONE:
        join(rates, by_seed, row)
    found = summary(rates, by_seed)
    folder = chosen.out / f"{chosen.steps}-steps"
    (folder / "quality.json").write_text(json.dumps(found, indent=1))
    plot(found, folder / "quality.png")
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()

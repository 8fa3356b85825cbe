"""Is each rank of one run as good as a run of its own? Every method on equal terms, one table.

    python benchmarks/quality.py --model ../shared/models/t0-6m --data ../shared/data/gsm8k
    python benchmarks/quality.py --methods lora anyrank --seeds 1       only some

Every method sees the same rows in the same order: `--steps` steps of 8 rows, of similar lengths;
`anyrank` may take 15 % more, the sandwich trains as many rows in steps of 9. Each is trained at its
learning rates from the first seed, and at the best of them from the others: the one with the lowest
mean loss over its ranks. LoRA chooses at each rank, and so do both cuts of LoRA 64, for themselves.
The merit is the mean over log2 of the rank of the loss above that of a LoRA trained at that rank.

A run is a folder of `anyrank train` and `anyrank sweep`; what is finished is not done again.
`--jobs` runs go on side by side, a core each. Results: quality.json, quality.png, and Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_cut import write_cut

RANKS = (1, 2, 4, 8, 16, 32, 64)
LISTED = ",".join(map(str, RANKS))
ROWS = 8  # of a step


@dataclass(frozen=True)
class Plan:
    """How a method is trained.

    Attributes:
        options: of `anyrank train`.
        rates: learning rates to choose from.
        compute: steps, to those of LoRA.
        parts: micro-batches of a step.
        cut: how the ranks are cut from an adapter that was trained at one; "": they were trained.
        from_: the method whose runs are cut.
    """

    options: str = ""
    rates: tuple[str, ...] = ("1e-3", "3e-3", "1e-2")
    compute: float = 1.0
    parts: int = 1
    cut: str = ""
    from_: str = ""


LORA = [f"lora {rank}" for rank in RANKS]
PLANS: dict[str, Plan] = {
    **{
        name: Plan(f"--method qlora --lora_r {rank}", ("5e-3", "1e-2", "2e-2"))
        for name, rank in zip(LORA, RANKS, strict=True)
    },
    "LoRA 64, SVD cut": Plan(cut="svd", from_="lora 64"),
    "LoRA 64, prefix": Plan(cut="prefix", from_="lora 64"),
    "QDyLoRA": Plan(f"--method qdylora --ranks {LISTED}"),
    "QDyLoRA, frozen rows": Plan("--method qdylora --frozen_rows true"),
    "sandwich, 3 ranks a step": Plan(
        f"--method qdylora --ranks {LISTED} --schedule sandwich", compute=8 / 9, parts=3
    ),
    "4 ranks a step": Plan(f"--method qdylora --ranks {LISTED} --ranks_per_step 4", parts=4),
    "anyrank": Plan("--method anyrank", ("3e-3", "5e-3", "1e-2"), compute=1.15, parts=4),
}


@dataclass(frozen=True)
class Run:
    """One training run with its evaluation, in a folder of its own."""

    method: str
    rate: str
    seed: int

    @property
    def folder(self) -> str:
        words = self.method.replace(",", "").split()
        return f"{'-'.join(words)}-{self.rate}-seed{self.seed}"


Losses = dict[int, float]


class Bench:
    """Runs what is missing and reads what is there."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.out: Path = chosen.out / f"{chosen.steps}-steps"
        self.out.mkdir(parents=True, exist_ok=True)

    def measure(self, runs: list[Run]) -> dict[Run, dict[str, Losses]]:
        """Train and sweep, `jobs` at a time."""
        with ThreadPoolExecutor(self.chosen.jobs) as pool:
            return dict(zip(runs, pool.map(self.losses, runs), strict=True))

    def losses(self, run: Run) -> dict[str, Losses]:
        """Nats per answer token by rank, for every way in which the run is cut ("": as trained)."""
        folder = self.out / run.folder
        if not (folder / "result.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # it was interrupted
            self.train(run, folder)
        found = {"": self.sweep(folder)}
        for name, plan in PLANS.items():
            if plan.from_ == run.method and name in self.chosen.methods:
                cut = folder.with_name(f"{folder.name}-{plan.cut}")
                if not (cut / "result.json").exists():
                    write_cut(folder, cut, plan.cut)
                found[plan.cut] = self.sweep(cut, "--ranks", LISTED)
        return found

    def train(self, run: Run, folder: Path) -> None:
        plan, chosen = PLANS[run.method], self.chosen
        rows = 3 if plan.parts == 3 else ROWS // plan.parts
        self.anyrank(
            "train", "--model_name_or_path", chosen.model, "--dataset", chosen.data / "train.jsonl",
            "--prompt_column", "question", "--completion_column", "answer", *plan.options.split(),
            "--max_steps", int(chosen.steps * plan.compute), "--learning_rate", run.rate,
            "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", plan.parts,
            "--train_sampling_strategy", "group_by_length", "--warmup_steps", 0,
            "--max_length", 512, "--save_strategy", "no", "--seed", run.seed,
            "--output_dir", folder,
        )  # fmt: skip

    def sweep(self, folder: Path, *ranks: str) -> Losses:
        if not (folder / "sweep.json").exists():
            test = self.chosen.data / "test.jsonl"
            self.anyrank("sweep", folder, "--dataset", test, "--limit", self.chosen.limit, *ranks)
        found = json.loads((folder / "sweep.json").read_text())["ranks"]
        return {row["rank"]: float(row["loss"] or "nan") for row in found}

    def anyrank(self, *words: object) -> None:
        command = [sys.executable, "-m", "anyrank", *map(str, words)]
        alone = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // self.chosen.jobs, 1))}
        done = subprocess.run(command, capture_output=True, text=True, env={**alone, **os.environ})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        print(".", end="", file=sys.stderr, flush=True)


def best_rate(found: dict[Run, dict[str, Losses]], method: str, cut: str, seed: int) -> str:
    """The learning rate with the lowest mean loss over the ranks."""
    mean = {
        run.rate: statistics.fmean(losses[cut].values())
        for run, losses in found.items()
        if run.method == method and run.seed == seed
    }
    finite = {rate: loss for rate, loss in mean.items() if loss == loss}
    return min(finite, key=lambda rate: finite[rate])


def measure(chosen: argparse.Namespace) -> tuple[dict[str, str], dict[str, list[Losses]]]:
    """The best rate and the losses by seed, of every method asked for."""
    bench, first = Bench(chosen), chosen.seeds[0]
    names = [name for name in PLANS if name in chosen.methods]
    trained = [name for name in names if not PLANS[name].cut]
    runs = [Run(n, rate, first) for n in trained for rate in chosen.rates or PLANS[n].rates]
    found = bench.measure(runs)
    rates = {
        name: best_rate(found, PLANS[name].from_ or name, PLANS[name].cut, first) for name in names
    }
    wanted = {
        name: [Run(PLANS[name].from_ or name, rates[name], seed) for seed in chosen.seeds]
        for name in names
    }
    found |= bench.measure(list(dict.fromkeys(run for runs in wanted.values() for run in runs)))
    by_seed = {n: [found[run][PLANS[n].cut] for run in wanted[n]] for n in names}
    return rates, by_seed


def join_lora(rates: dict[str, str], by_seed: dict[str, list[Losses]]) -> None:
    """LoRA trained at each rank as one row of the table."""
    present = [name for name in LORA if name in by_seed]
    joined = [dict(kv for name in present for kv in by_seed[name][i].items())
              for i in range(min(len(by_seed[name]) for name in present))]  # fmt: skip
    rate = ", ".join(dict.fromkeys(rates[name] for name in present))
    for name in present:
        del rates[name], by_seed[name]
    rates["LoRA of each rank"] = rate
    by_seed["LoRA of each rank"] = joined


def merit(losses: Losses, alone: Losses) -> float:
    """The mean over log2 of the rank of the loss above LoRA trained at that rank."""
    return statistics.fmean(losses[rank] - alone[rank] for rank in RANKS)


def summary(rates: dict[str, str], by_seed: dict[str, list[Losses]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, by method and rank."""
    alone = by_seed["LoRA of each rank"]
    out = {}
    for name, seeds in sorted(by_seed.items(), key=lambda item: item[0] != "LoRA of each rank"):
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


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


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

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = ("blue", "orange", "green", "purple", "olive", "gray", "cyan")
    axes.set_prop_cycle(color=[f"tab:{colour}" for colour in colours])
    for name, row in found.items():
        bold = name in ("anyrank", "LoRA of each rank")
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
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("../shared/models/t0-6m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--methods", nargs="+", default=list(PLANS), help="'lora' is all of LoRA's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", help="instead of those of each method")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--limit", type=int, default=160, help="test rows")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    if "lora" in chosen.methods:
        chosen.methods += LORA
    rates, by_seed = measure(chosen)
    if not set(LORA) <= by_seed.keys():
        print(json.dumps({name: [rates[name], by_seed[name]] for name in by_seed}, indent=1))
        return
    join_lora(rates, by_seed)
    found = summary(rates, by_seed)
    folder = chosen.out / f"{chosen.steps}-steps"
    (folder / "quality.json").write_text(json.dumps(found, indent=1))
    plot(found, folder / "quality.png")
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()

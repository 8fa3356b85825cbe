"""Runs of a comparison: trained by `anyrank train`, evaluated by `anyrank sweep`, kept in folders.

A method is a Plan. Each is trained at its learning rates from the first seed and at the best of
them from the others: the one with the lowest mean loss over its ranks. What is finished is not done
again, and what was interrupted starts again. `jobs` runs go on side by side, a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quality_cut import write_cut

ROWS = 8  # of a step, unless a plan says otherwise
Losses = dict[int, float]


@dataclass(frozen=True)
class Plan:
    """How a method is trained.

    Attributes:
        options: of `anyrank train`.
        rates: learning rates to choose from.
        compute: rows of all steps, to those of LoRA.
        rows: of a step.
        parts: micro-batches of a step.
        cut: how the ranks are cut from an adapter that was trained at one; "": they were trained.
        from_: the method whose runs are cut.
        base: options of `anyrank quantize` for the base; "": the float model.
        ranks: those that a cut is evaluated at.
        layer: a layer of other_layers.py, with which that script trains instead.
    """

    options: str = ""
    rates: tuple[str, ...] = ("1e-3", "3e-3", "1e-2")
    compute: float = 1.0
    rows: int = ROWS
    parts: int = 1
    cut: str = ""
    from_: str = ""
    base: str = ""
    ranks: str = ""
    layer: str = ""


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


class Bench:
    """Runs what is missing and reads what is there."""

    def __init__(self, chosen: argparse.Namespace, plans: dict[str, Plan]) -> None:
        self.chosen, self.plans = chosen, plans
        self.out: Path = chosen.out / f"{chosen.steps}-steps"
        self.out.mkdir(parents=True, exist_ok=True)

    def measure(self, runs: list[Run]) -> dict[Run, dict[str, Losses]]:
        """Train and sweep, `jobs` at a time."""
        for run in runs:
            self.base(self.plans[run.method])
        with ThreadPoolExecutor(self.chosen.jobs) as pool:
            return dict(zip(runs, pool.map(self.losses, runs), strict=True))

    def losses(self, run: Run) -> dict[str, Losses]:
        """Nats per answer token by rank, for every way in which the run is cut ("": as trained)."""
        folder = self.out / run.folder
        if not (folder / "result.json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # it was interrupted
            self.train(run, folder)
        found = {"": self.sweep(folder)}
        for name, plan in self.plans.items():
            if plan.from_ == run.method and name in self.chosen.methods:
                cut = folder.with_name(f"{folder.name}-{plan.cut}")
                if not (cut / "result.json").exists():
                    write_cut(folder, cut, plan.cut)
                found[plan.cut] = self.sweep(cut, "--ranks", plan.ranks)
        return found

    def base(self, plan: Plan) -> Path:
        """The model, quantized if the plan says so."""
        if not plan.base:
            return self.chosen.model
        folder = self.chosen.out / "-".join(["base", *plan.base.replace("--", "").split()])
        if not folder.exists():
            self.anyrank("quantize", self.chosen.model, folder, *plan.base.split())
        return folder

    def train(self, run: Run, folder: Path) -> None:
        plan, chosen = self.plans[run.method], self.chosen
        steps = int(chosen.steps * ROWS / plan.rows * plan.compute)
        words = (
            "--model_name_or_path", self.base(plan), "--dataset", chosen.data / "train.jsonl",
            "--prompt_column", "question", "--completion_column", "answer", *plan.options.split(),
            "--max_steps", steps, "--learning_rate", run.rate,
            "--per_device_train_batch_size", plan.rows // plan.parts,
            "--gradient_accumulation_steps", plan.parts,
            "--train_sampling_strategy", "group_by_length", "--warmup_steps", 0,
            "--max_length", 512, "--save_strategy", "no", "--seed", run.seed,
            "--output_dir", folder,
        )  # fmt: skip
        if plan.layer:
            script = Path(__file__).with_name("other_layers.py")
            test = ("--test", chosen.data / "test.jsonl", "--limit", chosen.limit)
            self.run([script, *plan.layer.split(), *test, "--", *words])
        else:
            self.anyrank("train", *words)

    def sweep(self, folder: Path, *ranks: str) -> Losses:
        if not (folder / "sweep.json").exists():
            test = self.chosen.data / "test.jsonl"
            self.anyrank("sweep", folder, "--dataset", test, "--limit", self.chosen.limit, *ranks)
        found = json.loads((folder / "sweep.json").read_text())["ranks"]
        return {row["rank"]: float(row["loss"] or "nan") for row in found}

    def anyrank(self, *words: object) -> None:
        self.run(["-m", "anyrank", *words])

    def run(self, words: list[object]) -> None:
        """A Python process; it must succeed."""
        command = [sys.executable, *map(str, words)]
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


def measure(
    chosen: argparse.Namespace, plans: dict[str, Plan]
) -> tuple[dict[str, str], dict[str, list[Losses]]]:
    """The best rate and the losses by seed, of every method asked for."""
    bench, first = Bench(chosen, plans), chosen.seeds[0]
    names = [name for name in plans if name in chosen.methods]
    trained = list(dict.fromkeys(plans[name].from_ or name for name in names))
    runs = [Run(n, rate, first) for n in trained for rate in chosen.rates or plans[n].rates]
    found = bench.measure(runs)
    rates = {
        name: best_rate(found, plans[name].from_ or name, plans[name].cut, first) for name in names
    }
    wanted = {
        name: [Run(plans[name].from_ or name, rates[name], seed) for seed in chosen.seeds]
        for name in names
    }
    found |= bench.measure(list(dict.fromkeys(run for runs in wanted.values() for run in runs)))
    by_seed = {n: [found[run][plans[n].cut] for run in wanted[n]] for n in names}
    return rates, by_seed


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """The options of every comparison."""
    parser.add_argument("--model", type=Path, default=Path("../shared/models/t0-6m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="+", help="instead of those of each method")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--limit", type=int, default=160, help="test rows")
    parser.add_argument("--jobs", type=int, default=2)


def refuse_unknown(
    parser: argparse.ArgumentParser, given: Iterable[str], known: Iterable[str]
) -> None:
    """Name a method that does not exist, and those that do."""
    if unknown := set(given) - set(known):
        parser.error(f"no method {sorted(unknown)}; there are\n  " + "\n  ".join(known))


def spread(values: list[float]) -> float:
    """The standard deviation over seeds; of one seed 0."""
    return statistics.stdev(values) if len(values) > 1 else 0.0

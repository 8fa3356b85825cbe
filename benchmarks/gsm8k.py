"""QDyLoRA and QLoRA on GSM8K as published, every rank of one run each: tables of docs/log.md.

    python benchmarks/gsm8k.py --model ../shared/models/t0-6m --data ../shared/data/gsm8k --out runs

Runs the command line as a user would, so a finished run is kept and not done again. About four
minutes a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RANKS = [1, 2, 4, 8, 16, 32, 64]
RUNS = [("qdylora", "1e-3"), ("qdylora", "3e-3"), ("qlora", "1e-3"), ("qlora", "3e-3")]


def anyrank(*words: object) -> None:
    command = [sys.executable, "-m", "anyrank", *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr)  # stdout is for the table


def measure(method: str, rate: str, seed: int, chosen: argparse.Namespace) -> dict[int, float]:
    """Nats per answer token by rank, on the first 160 rows of the test set."""
    run = chosen.out / f"{method}-{rate}-seed{seed}"
    if not (run / "result.json").exists():
        nested = ["--ranks", ",".join(map(str, RANKS))] if method == "qdylora" else []
        anyrank(
            "train", "--model_name_or_path", chosen.model, "--dataset", chosen.data / "train.jsonl",
            "--prompt_column", "question", "--completion_column", "answer", "--method", method,
            *nested, "--max_steps", 250, "--learning_rate", rate, "--warmup_steps", 0,
            "--max_grad_norm", 0.3, "--max_length", 512, "--save_strategy", "no", "--seed", seed,
            "--output_dir", run,
        )  # fmt: skip
    if not (run / "sweep.json").exists():
        anyrank("sweep", run, "--dataset", chosen.data / "test.jsonl", "--limit", 160)
    found = json.loads((run / "sweep.json").read_text())
    return {row["rank"]: row["loss"] for row in found["ranks"]} | {0: found["base"]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/t0-6m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--seed", type=int, default=42)
    chosen = parser.parse_args()
    print("| run | base | " + " | ".join(map(str, RANKS)) + " |")
    print("|---" * (len(RANKS) + 2) + "|")
    for method, rate in RUNS:
        losses = measure(method, rate, chosen.seed, chosen)
        cells = [f"{losses[rank]:.2f}" if rank in losses else "-" for rank in (0, *RANKS)]
        print(f"| {method}, {rate} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

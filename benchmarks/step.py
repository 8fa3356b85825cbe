"""A training step of anyrank beside one of PEFT + bitsandbytes, and beside its bare products.

    python benchmarks/step.py                            every table, about half an hour
    python benchmarks/step.py --shapes llama --dropouts 0 --only sides

Every side lives in a process of its own with the same allocator settings, and they take turns, one
step each; medians are reported. `sides` is the comparison, `methods` our own methods beside LoRA,
`growth` how time and memory grow, `curves` the losses of 100 steps. On a GPU (--device cuda) add
--shapes llama-7b --rows 4 --tokens 2048 --checkpointing; Unsloth takes part where it is installed.
TFLOP/s over what the device can do (989 on an H100 or H200 in bf16) is the model FLOP utilisation.
Results go into --out: one JSON per table, growth.png, and the tables as Markdown on stdout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anyrank.allocator import SETTINGS

WORKER = Path(__file__).with_name("step_worker.py")
WARM = 2  # steps before the first that counts


class Side:
    """One worker."""

    def __init__(self, name: str, **job: Any) -> None:
        self.name, self.job = name, job
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **SETTINGS},
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.ready = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the worker ended; run {WORKER.name} by hand to see why")
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read()

    def step(self) -> None:
        result = self.ask("step")
        self.seconds.append(result["seconds"])
        self.losses.append(result["loss"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def take_turns(jobs: dict[str, dict[str, Any]], rounds: int, memory: bool = True) -> dict[str, Any]:
    """Every side steps once per round; the median time and the memory of each."""
    sides = [Side(name, **job) for name, job in jobs.items()]
    try:
        for i in range(WARM + rounds):
            for side in sides:
                if i == WARM:
                    side.ask("forget")
                side.step()
        results = {}
        for side in sides:
            counted = side.seconds[WARM:]
            results[side.name] = {
                "job": side.job,
                "median_s": statistics.median(counted),
                "seconds": counted,
                "losses": side.losses,
                "tflops": side.ready["flops"] / statistics.median(counted) / 1e12,
                **(side.ask("memory") if memory else {}),
            }
        return results
    finally:
        for side in sides:
            side.close()


def compare(args: argparse.Namespace, shape: str, dropout: float) -> dict[str, Any]:
    """PEFT, ours and the floor."""
    job = common(args) | {"shape": shape, "dropout": dropout}
    jobs = {name: job | {"side": side} for name, side in (("peft", "peft"), ("ours", "qlora"))}
    if args.device != "cpu" and importlib.util.find_spec("unsloth"):
        jobs["unsloth"] = job | {"side": "unsloth"}
    results = take_turns(jobs | {"floor": job | {"side": "floor"}}, args.rounds)
    peft, ours, floor = (results[name] for name in ("peft", "ours", "floor"))
    results["ratios"] = {
        "PEFT / ours, time": peft["median_s"] / ours["median_s"],
        "ours / floor, time": ours["median_s"] / floor["median_s"],
        "PEFT / floor, time": peft["median_s"] / floor["median_s"],
        "ours / PEFT, memory": ours["growth"] / peft["growth"],
        "ours / PEFT, tensors": ours["tensors"] / peft["tensors"],
    }
    return results


def methods(args: argparse.Namespace) -> dict[str, Any]:
    """Our methods beside our LoRA on NF4, in one run."""
    job = common(args) | {"shape": args.shapes[0]}
    jobs = {"qlora r 64": job | {"side": "qlora"}}
    jobs |= {f"qdylora drawn {k}": job | {"side": "qdylora", "drawn": k} for k in (64, 32, 8, 1)}
    for name, at in (("one rank", 0), ("by turns", 800)):
        jobs[f"anyrank in four steps, {name}"] = job | {"side": "anyrank", "at": at}
    jobs["qbara r 64 (128 rows)"] = job | {"side": "qbara"}
    jobs["lora_fa r 64"] = job | {"side": "lora_fa"}
    jobs["qalora on 4-bit codes, folded"] = job | {"side": "qalora", "affine": True, "rank": 8}
    jobs["qahira on NF4"] = job | {"side": "qahira"}
    return take_turns(jobs, args.rounds)


GROWTH = {
    "rank": ("rank", (16, 32, 64, 128)),
    "length": ("tokens", (128, 256, 512, 1024)),
    "depth": ("num_hidden_layers", (3, 6, 12, 24)),
    "width": ("hidden_size", (512, 1024, 2048, 4096)),
}


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Each of rank, length, depth and width doubled three times, PEFT and ours."""
    found: dict[str, Any] = {}
    for name, (key, values) in GROWTH.items():
        for value in values:
            job = common(args) | {"shape": "llama"}
            if key in ("rank", "tokens"):
                job |= {key: value}
            else:
                sizes = {key: value}
                if key == "hidden_size":  # two layers, so that the widest takes seconds
                    sizes |= {"intermediate_size": value * 11 // 4, "num_hidden_layers": 2}
                    sizes |= {
                        "num_attention_heads": value // 64,
                        "num_key_value_heads": value // 64,
                    }
                job |= {"sizes": sizes}
            jobs = {"peft": job | {"side": "peft"}, "ours": job | {"side": "qlora"}}
            found[f"{name} {value}"] = take_turns(jobs, max(args.rounds // 2, 1))
            print_growth(name, value, found[f"{name} {value}"])
    return found


def curves(args: argparse.Namespace, steps: int = 100) -> dict[str, Any]:
    """Losses of 100 steps: ours and PEFT from one seed, and PEFT from another one."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "vocab_size": 512}
    job = {"shape": "llama", "sizes": sizes, "device": args.device, "rows": 8, "tokens": 128}
    jobs = {
        "ours, seed 0": job | {"side": "qlora"},
        "PEFT, seed 0": job | {"side": "peft"},
        "PEFT, seed 1": job | {"side": "peft", "seed": 1},
    }
    results = take_turns(jobs, steps - WARM, memory=False)
    ours, same, other = (result["losses"] for result in results.values())
    return results | {
        "first and last loss": [same[0], same[-1]],
        "ours - PEFT, same seed, rms": rms(a - b for a, b in zip(ours, same, strict=True)),
        "PEFT - PEFT, two seeds, rms": rms(a - b for a, b in zip(other, same, strict=True)),
    }


def rms(values: Iterable[float]) -> float:
    return statistics.fmean(value**2 for value in values) ** 0.5


def common(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("rows", "tokens", "device", "checkpointing")
    return {key: getattr(args, key) for key in keys}


def print_growth(name: str, value: int, result: dict[str, Any]) -> None:
    peft, ours = result["peft"], result["ours"]
    print(
        f"| {name} {value} | {peft['median_s']:.2f} s | {ours['median_s']:.2f} s | "
        f"{peft['median_s'] / ours['median_s']:.2f} | {peft['growth']:.0f} MB | "
        f"{ours['growth']:.0f} MB | {ours['growth'] / peft['growth']:.2f} |",
        flush=True,
    )


def print_sides(title: str, results: dict[str, Any], tokens: int) -> None:
    print(f"\n{title}\n\n| | s per step | tokens/s | TFLOP/s | memory growth | of tensors |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        if name != "ratios":
            spread = f"{min(result['seconds']):.3f}-{max(result['seconds']):.3f}"
            print(
                f"| {name} | {result['median_s']:.3f} ({spread}) | "
                f"{tokens / result['median_s']:.0f} | {result['tflops']:.2f} | "
                f"{result['growth']:.0f} MB | "
                f"{result['tensors']:.0f} MB |"
            )
    for name, ratio in results.get("ratios", {}).items():
        print(f"\n{name}: {ratio:.2f}")
    sys.stdout.flush()


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(GROWTH), figsize=(12, 5.5), layout="constrained")
    for column, (name, (_, values)) in enumerate(GROWTH.items()):
        for row, (key, unit) in enumerate((("median_s", "s per step"), ("growth", "MB"))):
            axis = axes[row][column]
            for side, colour in (("peft", "tab:gray"), ("ours", "tab:blue")):
                heights = [found[f"{name} {value}"][side][key] for value in values]
                axis.plot(values, heights, "o-", color=colour, label=side)
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(value) for value in values])
            axis.set_ylim(bottom=0)
            axis.set_xlabel(name if row else "")
            axis.set_ylabel(unit if column == 0 else "")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/step"))
    parser.add_argument("--shapes", nargs="+", default=["llama", "falcon", "qwen3"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--only", nargs="+", default=["sides", "methods", "growth", "curves"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(name: str, results: dict[str, Any]) -> dict[str, Any]:
        (args.out / f"{name}.json").write_text(json.dumps(results, indent=1))
        return results

    tokens = args.rows * args.tokens
    if "sides" in args.only:
        for shape in args.shapes:
            for dropout in args.dropouts:
                results = keep(f"{shape}-{dropout:g}", compare(args, shape, dropout))
                print_sides(f"{shape}, dropout {dropout:g}", results, tokens)
    if "methods" in args.only:
        print_sides("methods", keep("methods", methods(args)), tokens)
    if "curves" in args.only:
        found = keep("curves", curves(args))
        print("\nlosses of 100 steps:", {k: v for k, v in found.items() if "seed " not in k})
    if "growth" in args.only:
        print("\n| | PEFT | ours | ratio | PEFT grows | ours grows | ratio |")
        print("|---|---|---|---|---|---|---|")
        plot(keep("growth", growth(args)), args.out / "growth.png")


if __name__ == "__main__":
    main()

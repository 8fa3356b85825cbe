"""What a fold keeps of the tuning, and what merging and quantizing again loses, at 4, 3 and 2 bits.

    python benchmarks/fold.py --model ../shared/models/t0-6m --data ../shared/data/gsm8k --out runs

Two adapters are trained on each quantized base: QA-LoRA, which folds, and QLoRA's adapter (a LoRA
of rank 64 on the same base), each at the two best learning rates of a search at 4 bits
(docs/log.md), and the LoRA at QLoRA's published rate as well. The LoRA is then merged and quantized
again to the same format, once from the weights of the quantized base and once from the original
ones; the best rate is chosen for every row by itself, which favours the rows that lose. Finished
runs are kept and not done again. About four minutes a run on one core; --jobs 2 trains two at a
time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyrank.files import write_json
from anyrank.quant.checkpoint import QuantizedModel
from anyrank.quantize.model import STREAMED
from anyrank.sweep.evaluate import evaluation, score
from anyrank.sweep.sweep_run import SweepOptions, token_rows
from anyrank.training.run import Run
from anyrank.tuner import adapter_layers

ADAPTERS = {
    "qalora": ("--method", "qalora", "--lora_r", 8, "--foldable", "true"),
    "lora": ("--method", "lora", "--lora_r", 64),
}
RATES = {"qalora": ("3e-2", "6e-2"), "lora": ("1e-2", "2e-2")}
PUBLISHED = "2e-4"  # QLoRA's own rate: small updates, most of which re-quantization rounds away


WAYS = {
    "folded": "folded",
    "requantized": "merged and quantized again",
    "original": "merged into the original, quantized",
}


def anyrank(*words: object) -> None:
    command = [sys.executable, "-m", "anyrank", *map(str, words)]
    subprocess.run(
        command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def base_of(bits: int, chosen: argparse.Namespace) -> Path:
    base = chosen.out / f"base-{bits}bit"
    if not base.exists():
        words = ("--bits", bits, "--group_size", 32, "--quantizer", chosen.quantizer)
        anyrank("quantize", chosen.model, base, *words)
    return base


def train(bits: int, method: str, rate: str, chosen: argparse.Namespace) -> Path:
    """The folder of a finished run, evaluated on the first test rows."""
    run = chosen.out / f"{method}-{bits}bit-{rate}"
    if not (run / "result.json").exists():
        anyrank(
            "train", "--model_name_or_path", chosen.out / f"base-{bits}bit",
            "--dataset", chosen.data / "train.jsonl", "--prompt_column", "question",
            "--completion_column", "answer", *ADAPTERS[method], "--max_steps", 250,
            "--learning_rate", rate, "--warmup_steps", 0, "--max_grad_norm", 0.3,
            "--max_length", 512, "--save_strategy", "no", "--seed", 1, "--disable_tqdm", "true",
            "--output_dir", run,
        )  # fmt: skip
    if not (run / "sweep.json").exists():
        anyrank("sweep", run, "--dataset", chosen.data / "test.jsonl", "--limit", chosen.rows)
    return run


def deployed(run: Path, method: str, chosen: argparse.Namespace) -> dict[str, float]:
    """The losses after the fold, or after merging and quantizing again."""
    path = run / "deployed.json"
    if path.exists():
        return json.loads(path.read_text())
    rows = test_rows(run, chosen)
    base = Path(Run.open(run).config["model_name_or_path"])
    if method == "qalora":
        folded = run.with_name(run.name + "-folded")
        if not folded.exists():
            anyrank("fold", run, folded)
        found = {"folded": loss(AutoModelForCausalLM.from_pretrained(folded), rows)}
    else:
        found = {
            "requantized": loss(merged(run, base, None), rows),
            "original": loss(merged(run, base, chosen.model), rows),
        }
    write_json(path, found)
    return found


def merged(run: Path, base: Path, original: Path | None) -> Any:
    """The LoRA merged into the base or the original weights, and quantized as the base was."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    quantizer = STREAMED[model.config.quantization_config.quantizer]
    whole = None if original is None else AutoModelForCausalLM.from_pretrained(original)
    adapter = PeftModel.from_pretrained(model, str(run))
    for name, layer in adapter_layers(adapter):
        name = name.removeprefix("base_model.model.")
        held = layer.get_base_layer()
        weight = held.affine.weight() if whole is None else whole.get_submodule(name).weight
        weight = weight.detach().float() + layer.get_delta_weight("default").float()
        held.codes, held.scales, held.offsets, _ = quantizer(weight, held.form)
    return adapter.unload()


def test_rows(run: Path, chosen: argparse.Namespace) -> Any:
    options = SweepOptions(dataset=str(chosen.data / "test.jsonl"), limit=chosen.rows)
    return token_rows(Run.open(run), options, AutoTokenizer.from_pretrained(run))[1]


def loss(model: Any, rows: Any) -> float:
    """Nats per answer token."""
    with evaluation(model):
        return score(model, rows, 8).loss


def table(bits: int, chosen: argparse.Namespace) -> list[tuple[str, float, float, float | None]]:
    """(row, bits per weight, loss, share of its own tuning gain that is kept)."""
    model = QuantizedModel.open(chosen.out / f"base-{bits}bit")
    weights = sum(a.codes.numel() * 8 // bits for _, a in model.weights())
    plain, found = model.form.bits_per_weight, []
    for method, rates in (*RATES.items(), ("lora", (PUBLISHED,))):
        runs = [chosen.out / f"{method}-{bits}bit-{rate}" for rate in rates]
        sweeps = [json.loads((run / "sweep.json").read_text()) for run in runs]
        before = sweeps[0]["base"]["loss"]
        best = min(sweeps, key=lambda s: s["ranks"][0]["loss"])["ranks"][0]
        if not found:
            found.append(("base", plain, before, None))
        name = f"{method} at {PUBLISHED}" if rates == (PUBLISHED,) else method
        beside = plain + 16 * best["parameters"] / weights
        found.append((f"{name}, beside", beside, best["loss"], 1.0))
        after = [deployed(run, method, chosen) for run in runs]
        for way in after[0]:
            least = min(losses[way] for losses in after)
            kept = (before - least) / (before - best["loss"])
            found.append((f"{name}, {WAYS[way]}", plain, least, kept))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/t0-6m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--out", type=Path, default=Path("runs/fold"))
    parser.add_argument("--quantizer", default="half_quadratic")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for bits in chosen.bits:
        base_of(bits, chosen)
    work = [(b, m, rate) for b in chosen.bits for m in ADAPTERS for rate in RATES[m]]
    work += [(b, "lora", PUBLISHED) for b in chosen.bits]
    with ThreadPoolExecutor(chosen.jobs) as pool:
        list(pool.map(lambda item: train(*item, chosen), work))
    print("| bits | row | bits per weight | loss | gain kept |\n|---|---|---|---|---|")
    for bits in chosen.bits:
        for row, size, nats, kept in table(bits, chosen):
            share = "" if kept is None else f"{kept:.1%}"
            print(f"| {bits} | {row} | {size:.2f} | {nats:.3f} | {share} |", flush=True)


if __name__ == "__main__":
    main()

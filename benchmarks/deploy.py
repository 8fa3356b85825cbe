"""Time and peak memory of quantize, fold and export on a random Llama of one billion parameters.

    python benchmarks/deploy.py --out runs/deploy

Each verb runs as a user runs it, in a process of its own; memory is sampled from /proc (Linux), and
stands above that of an idle process with the same imports. `file` is memory that holds pages of
files that are being read, which the kernel takes back when it needs them; `own` is the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import anyrank
from anyrank.quant.checkpoint import write_index

IDLE = "import sys, torch, transformers, peft, anyrank.sweep.fold_run; sys.stdin.read()"


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, vocab_size=32_000,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def make_model(folder: Path, layers: int) -> None:
    """Random bfloat16 weights, a file per layer; the tokenizer of the demo."""
    shape = config(layers)
    hidden, inner, kv = shape.hidden_size, shape.intermediate_size, 8 * shape.head_dim
    folder.mkdir(parents=True)
    torch.manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02)

    files, size = {}, 0
    for i in range(-1, layers):
        if i < 0:
            tensors = {"model.embed_tokens.weight": random(shape.vocab_size, hidden)}
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        else:
            sides = {
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }  # fmt: skip
            tensors = {f"model.layers.{i}.{n}.weight": random(*s) for n, s in sides.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                ones = torch.ones(hidden, dtype=torch.bfloat16)
                tensors[f"model.layers.{i}.{norm}.weight"] = ones
        name = f"model-{i + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, files, size)
    shape.save_pretrained(folder)
    for path in (Path(anyrank.__file__).parent / "demo" / "model").glob("tokenizer*"):
        shutil.copy(path, folder)


def memory(pid: int) -> dict[str, int]:
    """Resident megabytes of a process now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    kinds = {"VmRSS": "all", "RssAnon": "own", "RssFile": "file"}
    found = (line.split() for line in lines if line.split(":")[0] in kinds)
    return {kinds[words[0].rstrip(":")]: int(words[1]) // 1024 for words in found}


def idle() -> dict[str, int]:
    process = subprocess.Popen([sys.executable, "-c", IDLE], stdin=subprocess.PIPE)
    seen: list[dict[str, int]] = []
    while len(seen) < 5 or seen[-1] != seen[-5]:
        time.sleep(1)
        seen.append(memory(process.pid))
    process.communicate()
    return seen[-1]


def run(*words: object) -> tuple[float, dict[str, int]]:
    """Seconds, and the peak of each kind of memory."""
    command = [sys.executable, "-m", "anyrank", *map(str, words)]
    start, peak = time.monotonic(), {"all": 0, "own": 0, "file": 0}
    process = subprocess.Popen(command, stdout=sys.stderr)
    while process.poll() is None:
        for kind, megabytes in memory(process.pid).items():
            peak[kind] = max(peak[kind], megabytes)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/deploy"))
    parser.add_argument("--layers", type=int, default=16, help="16 make one billion parameters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="*", default=["gguf", "mlx", "hqq", "torchao"])
    parser.add_argument("--only", default="", help="rows whose name begins so")
    chosen = parser.parse_args()
    out = chosen.out
    if not (out / "model").exists():
        make_model(out / "model", chosen.layers)
    rows = out / "rows.jsonl"
    text = {"prompt": "What is two and two?", "completion": " Two and two make four."}
    rows.write_text(f"{json.dumps(text)}\n" * 16)
    if not (out / "base").exists():
        run("quantize", out / "model", out / "base")
    if not (out / "run" / "result.json").exists():
        run("train", "--model_name_or_path", out / "base", "--dataset", rows, "--method", "qalora",
            "--foldable", "true", "--nested", "true", "--max_steps", 1, "--max_length", 64,
            "--per_device_train_batch_size", 1, "--save_strategy", "no",
            "--output_dir", out / "run")  # fmt: skip
    if not (out / "folded").exists():
        run("fold", out / "run", out / "folded", "--rank", 8)
    made = out / "made"
    verbs = {
        "quantize": ("quantize", out / "model", made),
        "quantize, min-max": ("quantize", out / "model", made, "--quantizer", "minmax"),
        "fold": ("fold", out / "run", made, "--rank", 8),
        "fold, 3 ranks": ("fold", out / "run", made, "--ranks", "4,8,64"),
    }
    for form in chosen.formats:
        verbs[f"export, {form}"] = ("export", out / "folded", made, "--to", form)
    rest = idle()
    print(f"idle process: {rest['all']} MB\n")
    print("| verb | seconds | peak above idle, MB | own | file |\n|---|---|---|---|---|")
    for name, words in verbs.items():
        if not name.startswith(chosen.only):
            continue
        seen = []
        for _ in range(chosen.repeats):
            shutil.rmtree(made, ignore_errors=True)
            seen.append(run(*words))
        shutil.rmtree(made, ignore_errors=True)
        seconds = statistics.median(second for second, _ in seen)
        peak = {k: statistics.median(p[k] for _, p in seen) - rest[k] for k in rest}
        figures = " | ".join(f"{peak[kind]:,.0f}" for kind in ("all", "own", "file"))
        print(f"| {name} | {seconds:.1f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

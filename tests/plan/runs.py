"""Small runs: planned from their configuration, and trained for real under torch's profiler."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import quantized
from tiny_tokenizers import tiny_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from anyrank.plan.estimate import Planner
from anyrank.training.base import load_base, load_tokenizer, wants_4bit
from anyrank.training.head import small_tiles
from anyrank.training.parse import parse_train
from anyrank.training.train import sft_trainer
from anyrank.tuner.decoder import lean_decoder

SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 5}
TEXT = {"vocab_size": 512, "max_position_embeddings": 512, "dtype": "bfloat16"}
MLP = {"intermediate_size": 352, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE, **TEXT, **MLP),
    "qwen3": lambda: Qwen3Config(**SHAPE, **TEXT, **MLP, head_dim=32),
    "falcon": lambda: FalconConfig(
        **SHAPE, **TEXT, num_kv_heads=2, new_decoder_architecture=True, bias=False
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=128, n_head=4, n_layer=5, vocab_size=512, n_positions=512, dtype="bfloat16"
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **(SHAPE | {"num_hidden_layers": 12}), **TEXT, **MLP, head_dim=32, sliding_window=32
    ),
    "moe": lambda: Qwen3MoeConfig(
        **(SHAPE | {"num_hidden_layers": 8}), **TEXT, **MLP, head_dim=32,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=2,
    ),
}  # fmt: skip


def write_base(name: str, folder: Path, *, codes: bool = False) -> Path:
    """A random model on disk, in bfloat16 or in 4-bit groups of 32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).to(torch.bfloat16)
    (quantized(model) if codes else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words_of(base: Path, batch: int, length: int, options: str) -> list[str]:
    """The command line of a run."""
    given = {
        "model_name_or_path": base,
        "per_device_train_batch_size": batch,
        "max_length": length,
        "report_to": "none",
        "disable_tqdm": "true",
        "save_strategy": "no",
        "max_steps": 2,
        "logging_steps": 99,
        "output_dir": base / "run",
    }
    return [str(w) for k, v in given.items() for w in (f"--{k}", v)] + options.split()


def planner(words: Sequence[str], *, on_gpu: bool = False) -> Planner:
    """The plan of a run."""
    model, adapter, _, args = parse_train([*words, "--use_cpu", "true"])
    return Planner(model, adapter, args, on_gpu=on_gpu)


def trainer_of(words: Sequence[str]) -> Any:
    """The same run with memory; one row of a batch has the full length, the others less."""
    model, adapter, _, args = parse_train(words)
    base = load_base(model, in_4bit=wants_4bit(model, adapter.method), trust_remote_code=False)
    base.config.use_cache = False
    if model.lean:
        lean_decoder(base, exact=False)
    batch, length = args.per_device_train_batch_size, args.max_length or 0
    whole = 1 if args.packing else batch  # packing fills every row
    lengths = [length - 5 * bool(i % whole) for i in range(4 * batch)]
    rows = Dataset.from_dict({key: [[5] * n for n in lengths] for key in ("input_ids", "labels")})
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    folder = Path(args.output_dir or "")
    return sft_trainer(base, args, rows, None, tokenizer, adapter.config(), folder)


def weights(model: torch.nn.Module) -> int:
    """Bytes of everything that lies in memory before training starts."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def profiled_peak(run: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator held at once, beyond those before `run`."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    assert watched.profiler is not None
    events = watched.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measured_peak(words: Sequence[str]) -> int:
    """Bytes at the peak of a real run on the CPU."""
    trainer = trainer_of(words)
    with small_tiles("cpu"):  # as anyrank train does
        return weights(trainer.model) + profiled_peak(trainer.train)

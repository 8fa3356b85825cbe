"""The models of benchmarks/step.py: random weights of a real shape, the adapter of each side."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

ALPHA = 16
FIRST = ("q_proj", "k_proj", "v_proj", "query_key_value", "dense_h_to_4h")  # read embeddings


@dataclass(frozen=True)
class Job:
    """What one side trains.

    Attributes:
        side: "floor", "peft", or a method of anyrank; "affine" marks one on our 4-bit codes.
        shape: a key of SHAPES; `sizes` overrides fields of its configuration.
        rank: of the adapter, and of a draw (`drawn`) where it is lower.
        rows, tokens: of a batch.
        at: the step of 1,000 of a schedule that makes each fourth of the rows a step; None: one.
    """

    side: str
    shape: str = "llama"
    rank: int = 64
    drawn: int = 0
    at: int | None = None
    dropout: float = 0.0
    rows: int = 4
    tokens: int = 256
    affine: bool = False
    lean: bool = True
    checkpointing: bool = False
    device: str = "cpu"
    seed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)


LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "qwen3": ("qwen3", LLAMA | {"num_key_value_heads": 8, "head_dim": 64}),
    "falcon": (
        "falcon",
        {k: v for k, v in LLAMA.items() if k != "intermediate_size"}
        | {"num_kv_heads": 4, "new_decoder_architecture": True, "bias": False},
    ),
    "llama-7b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 8192,
        },
    ),
}


def base_model(job: Job) -> Any:
    """A random model of the shape in bf16, its decoder's linears in NF4 or in our codes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[job.shape]
    config = AutoConfig.for_model(kind, **(sizes | job.sizes), tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            make = affine_linear if job.affine else nf4_linear
            setattr(model.get_submodule(parent), child, make(layer, job.device))
    return model.to(job.device)


def nf4_linear(layer: nn.Linear, device: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = Linear4bit(
        *(layer.in_features, layer.out_features, False, torch.bfloat16), quant_type="nf4"
    )
    made.weight = Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return made.to(device)


def affine_linear(layer: nn.Linear, device: str) -> nn.Module:
    from anyrank.kernels import AffineFormat
    from anyrank.quant.affine import AffineLinear
    from anyrank.quantize.minmax import minmax

    form = AffineFormat(4, (1, 32))
    made = AffineLinear(layer.in_features, layer.out_features, form)
    made.codes, made.scales, made.offsets, _ = minmax(layer.weight.data.float(), form)
    return made.to(device)


def adapted_model(job: Job) -> Any:
    """The model of one side with its adapter."""
    from peft import LoraConfig, get_peft_model

    import anyrank

    if job.side == "unsloth":
        return unsloth_model(job)
    model = base_model(job)
    options = {"r": job.rank, "lora_alpha": ALPHA, "lora_dropout": job.dropout}
    options |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if job.side == "peft":
        config: Any = LoraConfig(**options)
    else:
        config = anyrank.AnyRankConfig(method=job.side, **options)
        if job.lean:
            anyrank.lean_decoder(model, exact=job.device != "cpu")
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, config)


def unsloth_model(job: Job) -> Any:
    """Unsloth loads from a folder only: the same random weights by way of one."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    kind, sizes = SHAPES[job.shape]
    config = AutoConfig.for_model(kind, **(sizes | job.sizes), tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=job.tokens, dtype=torch.bfloat16, load_in_4bit=True
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=ALPHA,
        lora_dropout=job.dropout,
        target_modules=[*FIRST[:3], "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if job.checkpointing else False,
    )


def model_flops(job: Job) -> float:
    """Multiplications and additions of a step, counted twice each, without what is recomputed:
    forward and input gradient of every product, three products of each adapter factor with its
    gradient, and causal attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[job.shape]
    config = AutoConfig.for_model(kind, **(sizes | job.sizes), tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    n, total = job.rows * job.tokens, 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            total += 4 * n * layer.in_features * layer.out_features
            if "lm_head" not in name:
                total += 6 * n * job.rank * (layer.in_features + layer.out_features)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 7 * n * job.tokens * config.num_attention_heads * size  # half of 4 + 10
    return total + config.num_hidden_layers * attention

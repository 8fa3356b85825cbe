"""Model folders to quantize, and what is looked up in them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import SHAPE
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from anyrank.quant.affine import AffineLinear

FAMILIES = {
    "mistral": MistralConfig(**SHAPE, vocab_size=128),
    "qwen2": Qwen2Config(**SHAPE, vocab_size=128),
    "qwen3": Qwen3Config(**SHAPE, vocab_size=128, head_dim=16),
    "gemma": GemmaConfig(**SHAPE, vocab_size=128, head_dim=16),
    "mixtral": MixtralConfig(**SHAPE, vocab_size=128, num_local_experts=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, bos_token_id=0,
                       eos_token_id=0),
    "falcon": FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                           vocab_size=128),
}  # fmt: skip


def saved(folder: Path, model: nn.Module, **options) -> Path:
    """`model` on disk, its biases and norms no longer all zero or one."""
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
    model.save_pretrained(folder, **options)
    return folder


def family(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    return saved(folder, AutoModelForCausalLM.from_config(FAMILIES[name]))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a folder."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def loaded(folder: Path, **options):
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **options
    )
    assert not any(found.values()), found
    return model.eval()


def quantized_layers(model: nn.Module) -> dict[str, AffineLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AffineLinear)}

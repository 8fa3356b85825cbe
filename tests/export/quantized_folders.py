"""Quantized models on disk, as the exports of whole models read them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_tokenizers import CHAT, tiny_tokenizer

from anyrank.kernels import Affine, unpack
from anyrank.quant import checkpoint
from anyrank.quant.checkpoint import QuantizedModel

SHAPE = {**tiny.SHAPE, "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# model_type: its configuration; each with a rope base that is nobody's default
MODELS: dict[str, Any] = {
    "llama": tf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mistral": tf.MistralConfig(
        **SHAPE, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 3000.0}
    ),
    "qwen2": tf.Qwen2Config(
        **SHAPE,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 4000.0},
    ),
    "qwen3": tf.Qwen3Config(
        **SHAPE, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    ),
}
PROMPT = "How many apples?"


def quantized_folder(
    folder: Path, bits: int = 4, tile: tuple[int, int] = (1, 32), model: str = "llama"
) -> Path:
    """A model with trained-looking offsets, a constant tile, random biases, and a tokenizer."""
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(MODELS[model]).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    tiny.quantized(made, bits, tile)
    layers = [layer for layer in made.modules() if hasattr(layer, "offsets")]
    for layer in layers:
        layer.offsets += (torch.randn(layer.offsets.shape) * 2e-3).to(layer.offsets.dtype)
    layers[0].scales[0, 0] = 0
    made.save_pretrained(folder)
    tiny_tokenizer(chat=CHAT).save_pretrained(folder)
    return folder


def add_variant(folder: Path, name: str) -> None:
    """A second table of offsets beside the first."""
    stored = load_file(folder / checkpoint.WEIGHTS)
    other = {key: value + 0.5 for key, value in stored.items() if key.endswith(".offsets")}
    save_file(other, folder / f"offsets.{name}.safetensors")
    files = dict.fromkeys(stored, checkpoint.WEIGHTS)
    checkpoint.write_index(
        folder, files | dict.fromkeys(other, f"offsets.{name}.safetensors"), 0, name
    )


def trained(folder: Path, variant: str | None = None) -> dict[str, Affine]:
    """The quantized layers of a folder."""
    return dict(QuantizedModel.open(folder, variant).weights())


def per_weight(weight: Affine) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code, scale and offset of every single weight [d_out, d_in], in float64."""
    rows, columns = weight.form.tile
    spread = [
        values.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        for values in (weight.scales, weight.offsets)
    ]
    return unpack(weight.codes, weight.form.bits).double(), *spread


def exact(weight: Affine) -> torch.Tensor:
    """scale * code + offset without rounding, in float64."""
    code, scale, offset = per_weight(weight)
    return scale * code + offset


def quotient_bound(weight: Affine, middle: int = 0) -> torch.Tensor:
    """How far (code - zero) * scale in float32 may lie from `exact`.

    zero = -offset / scale - middle is rounded once, the difference once and the product once, each
    by 2^-24 of itself.
    """
    _, scale, offset = per_weight(weight)
    return 2.0**-24 * ((offset + middle * scale).abs() + 2 * exact(weight).abs()) * (1 + 1e-6)


def kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL divergence of logits [..., vocabulary] in nats, in float64."""
    p, q = (values.double().log_softmax(-1) for values in (reference, logits))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package look as if it were not installed."""
    for name in list(sys.modules):
        if name.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)

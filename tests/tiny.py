"""Tiny models with random weights, for tests."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import anyrank
from anyrank.kernels import AffineFormat
from anyrank.quant.hf import AffineConfig, quantized_linears, replace_linears
from anyrank.quantize.minmax import minmax
from anyrank.tuner import AnyRankLinear, adapter_layers

IDS = torch.arange(2 * 9).reshape(2, 9)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LOW_RANK = [name for name in anyrank.METHODS if name != "qahira"]


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    """A Llama with grouped queries: hidden 64, two layers; the same weights every time."""
    torch.manual_seed(0)
    shape = dict(SHAPE, vocab_size=128, max_position_embeddings=128)
    return LlamaForCausalLM(LlamaConfig(**(shape | options))).to(dtype).eval()


def config(method: str, r: int = 4, **options: Any) -> anyrank.AnyRankConfig:
    """A configuration that fits on `llama`: pools of 16 instead of 32."""
    if method in ("qalora", "qablora"):
        options.setdefault("pool", 16)
    return anyrank.AnyRankConfig(method=method, r=r, **options)


def adapted(base: nn.Module, method: str = "qdylora", r: int = 4, **options: Any) -> PeftModel:
    """`base` with an adapter whose values are all random (a fresh one would change nothing)."""
    model = get_peft_model(base, config(method, r, **options))
    fill(model)
    return model


def fill(model: nn.Module, seed: int = 1) -> None:
    """Random values for every adapter parameter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "anyrank_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data = values.to(parameter.dtype)


def nf4(d_in: int, d_out: int, bias: bool = False, compute: torch.dtype = torch.bfloat16) -> Any:
    """A Linear4bit of bitsandbytes with double quantization and random weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(d_in, d_out, bias=bias, compute_dtype=compute, quant_type="nf4")
    weight = torch.randn(d_out, d_in) * 0.02
    layer.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return layer.to("cpu")


def layers(model: nn.Module) -> list[AnyRankLinear]:
    """The adapted layers."""
    return [layer for _, layer in adapter_layers(model)]


def quantized(model: nn.Module, bits: int = 4, tile: tuple[int, int] = (1, 32)) -> nn.Module:
    """`model` with min-max codes in every linear layer but lm_head, in place.

    Its `save_pretrained` then writes what `from_pretrained` reads.
    """
    form = AffineFormat(bits, tile)
    keep = ["lm_head"]
    weights = {name: layer.weight.data for name, layer in quantized_linears(model, keep)}
    replace_linears(model, form, keep)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        layer.codes, layer.scales, layer.offsets, _ = minmax(weight, form)
    config = AffineConfig(bits, tile, modules_to_not_convert=keep, quantizer="minmax")
    model.config.quantization_config = config
    return model

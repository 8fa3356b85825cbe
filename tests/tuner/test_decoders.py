"""Adapters on the decoder families that people fine-tune: tiny, random, float32, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from anyrank import AnyRankConfig
from anyrank.tuner import adapter_layers

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
LLAMA_LAYERS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
FALCON_LAYERS = "query_key_value dense dense_h_to_4h dense_4h_to_h"


@dataclass(frozen=True)
class Family:
    """A decoder family: how to build a tiny one, and the last names of its linear layers."""

    config: Callable[[], Any]
    layers: str


FAMILIES = {
    "llama": Family(lambda: tf.LlamaConfig(**GATED), LLAMA_LAYERS),
    "mistral": Family(lambda: tf.MistralConfig(**GATED, sliding_window=8), LLAMA_LAYERS),
    "qwen2, with biases": Family(lambda: tf.Qwen2Config(**GATED), LLAMA_LAYERS),
    "qwen3": Family(lambda: tf.Qwen3Config(**GATED), LLAMA_LAYERS),
    "gemma": Family(lambda: tf.GemmaConfig(**GATED), LLAMA_LAYERS),
    "phi": Family(
        lambda: tf.PhiConfig(**SIZES, intermediate_size=96, num_key_value_heads=4),
        "q_proj k_proj v_proj dense fc1 fc2",
    ),
    "gpt-neox": Family(
        lambda: tf.GPTNeoXConfig(**SIZES, intermediate_size=96),
        "query_key_value dense dense_h_to_4h dense_4h_to_h",
    ),
    "falcon, old": Family(
        lambda: tf.FalconConfig(
            **SIZES, multi_query=True, parallel_attn=True, new_decoder_architecture=False
        ),
        FALCON_LAYERS,
    ),
    "falcon, new": Family(
        lambda: tf.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
        FALCON_LAYERS,
    ),
    "opt": Family(
        lambda: tf.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
        "q_proj k_proj v_proj out_proj fc1 fc2",
    ),
    "gpt-2, with Conv1D": Family(
        lambda: tf.GPT2Config(
            vocab_size=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        "c_attn c_proj c_fc",
    ),
}
TOKENS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))

every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", ["qdylora", "qbara"])


@cache
def built(family: str) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family].config()).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases start at 0 and would hide a layer that drops them
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def base(family: str) -> Any:
    """A fresh copy of the family's base model."""
    return copy.deepcopy(built(family))


def fresh(family: str, method: str) -> Any:
    return get_peft_model(base(family), AnyRankConfig(method=method, r=8)).eval()


def adapted(family: str, method: str) -> Any:
    """A model whose adapters hold random values."""
    model = fresh(family, method)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "anyrank_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def linear_layers(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, tf.pytorch_utils.Conv1D)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@every_method
@every_family
def test_a_fresh_adapter_changes_no_logit(family, method):
    before = logits(built(family))
    assert torch.isfinite(before).all()
    assert torch.equal(logits(fresh(family, method)), before)


@every_method
@every_family
def test_every_linear_layer_but_the_output_head_is_adapted(family, method):
    heads = {"lm_head", "embed_out"}
    wanted = {name for name in linear_layers(built(family)) if name not in heads}
    held = {name for name, _ in adapter_layers(fresh(family, method).get_base_model())}
    assert held == wanted
    assert {name.rsplit(".", 1)[-1] for name in held} == set(FAMILIES[family].layers.split())


@every_method
@every_family
def test_gradients_reach_every_adapter_parameter_and_no_other(family, method):
    model = adapted(family, method).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(list(adapter_layers(model)))
    for name, parameter in model.named_parameters():
        assert (name in trained) == ("anyrank_" in name)
        assert (parameter.grad is not None) == (name in trained)
    assert [name for name, p in trained.items() if not p.grad.abs().sum() > 0] == []


@every_method
@every_family
def test_every_rank_gives_logits_of_its_own(family, method):
    model = adapted(family, method)
    found = [logits(built(family))]
    for rank in (1, 3, 8):
        with model.set_rank(rank):
            found.append(logits(model))
    assert all(torch.isfinite(one).all() for one in found)
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-3 for other in found[:i])


@every_method
@every_family
def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_base(family, method, tmp_path):
    model = adapted(family, method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    model.set_rank(3)
    loaded.set_rank(3)
    assert torch.equal(logits(loaded), logits(model))

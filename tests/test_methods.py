"""The table of methods, and the parameter counts that METHODS published for it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from anyrank import METHODS, AnyRankConfig
from anyrank.errors import ConfigError
from anyrank.methods import method

LLAMA = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
}


@pytest.mark.parametrize(
    ("size", "name", "millions"),
    [
        ("7B", "lora", 159.9),
        ("7B", "qbara", 159.9),
        ("7B", "qalora", 89.3),
        ("7B", "qahira", 202.4),
        ("13B", "lora", 250.3),
        ("13B", "qbara", 250.3),
        ("13B", "qalora", 139.9),
        ("13B", "qahira", 396.5),
    ],
)
def test_parameters_of_llama_are_the_published_ones(size, name, millions):
    shape = LLAMA[size]
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(num_attention_heads=32 if size == "7B" else 40, vocab_size=32000, **shape)
        )
    model = get_peft_model(base, AnyRankConfig(method=name, r=64), low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6, 1) == millions


def test_the_table_holds_the_published_presets():
    assert set(METHODS) == {
        "anyrank",
        "lora",
        "qlora",
        "dylora",
        "qdylora",
        "qalora",
        "qbara",
        "qahira",
        "qablora",
        "lora_fa",
    }
    assert (METHODS["qbara"].p, METHODS["qbara"].q, METHODS["qbara"].rows_per_rank) == (2, 2, 2)
    assert (METHODS["qahira"].p, METHODS["qahira"].q, METHODS["qahira"].core) == (4, 8, "dense")
    assert {name for name, m in METHODS.items() if m.nested} == {"anyrank", "dylora", "qdylora"}
    assert all(m.source for m in METHODS.values())


def test_an_unknown_method_offers_the_nearest():
    with pytest.raises(ConfigError) as error:
        method("qdlora")
    assert str(error.value) == "method='qdlora' is unknown; did you mean qdylora, qlora or qalora?"

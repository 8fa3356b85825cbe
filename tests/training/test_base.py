"""Loading a base in NF4."""

from __future__ import annotations

import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon import modeling_falcon

from anyrank.training.arguments import ModelArguments
from anyrank.training.base import load_base


def test_falcon_is_loaded_in_nf4_although_its_linears_are_of_a_class_of_their_own(tmp_path):
    from bitsandbytes.nn import Linear4bit

    own = modeling_falcon.FalconLinear
    torch.manual_seed(0)
    config = FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    model = FalconForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), dtype="float32")
    loaded = load_base(arguments, in_4bit=True, trust_remote_code=False)
    layers = [m for m in loaded.transformer.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 8
    assert all(type(layer) is Linear4bit for layer in layers)
    assert modeling_falcon.FalconLinear is own
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        gap = (loaded(ids).logits - model(ids).logits).pow(2).mean()
        assert gap < 0.1 * model(ids).logits.pow(2).mean()

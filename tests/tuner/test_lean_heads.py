"""`lean_decoder` on a Falcon: heads are split with the same bits, and so are their gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import IDS, adapted, llama
from torch import Tensor

from anyrank.tuner.decoder import lean_decoder
from anyrank.tuner.heads import SPLIT, split_heads

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
NEW = {**SHAPE, "new_decoder_architecture": True}
SHAPES = {
    "falcon-7b, one key for all": SHAPE,
    "falcon-40b, groups": {**NEW, "num_kv_heads": 2},
    "new architecture, one group": {**NEW, "num_kv_heads": 1},
    "falcon-rw, a key for each": {**SHAPE, "multi_query": False},
}
every_shape = pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)


def falcon(options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return tf.FalconForCausalLM(tf.FalconConfig(**options))


@every_shape
def test_heads_and_their_gradients_are_the_same_bits(options):
    layer = falcon(options).transformer.h[0].self_attention
    results = []
    for function in (type(layer)._split_heads, split_heads):
        torch.manual_seed(1)
        width = layer.query_key_value.out_features
        fused = torch.randn(2, 7, width, dtype=torch.bfloat16, requires_grad=True)
        parts = function(layer, fused)
        upstream = [torch.randn(part.shape).to(part.dtype) for part in parts]
        results.append([*parts, *torch.autograd.grad(parts, fused, upstream)])
    for theirs, ours in zip(*results, strict=True):
        assert theirs.shape == ours.shape
        assert torch.equal(theirs, ours)


@every_shape
def test_a_training_step_stays_the_same_to_the_last_bit(options):
    model = adapted(falcon(options), "lora").train()
    lean = lean_decoder(model)
    assert lean.heads == sum(SPLIT in vars(module) for module in model.modules()) == 2
    with_split = outcome(model)
    for module in model.modules():
        vars(module).pop(SPLIT, None)
    assert all(torch.equal(a, b) for a, b in zip(outcome(model), with_split, strict=True))


def outcome(model: Any) -> list[Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return [out.logits, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_generation_copies_and_the_way_back():
    model = falcon(NEW).eval()
    wanted = model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False)
    with lean_decoder(model) as lean:
        assert lean.heads == 2
        twin = copy.deepcopy(model)
        attention = twin.transformer.h[0].self_attention
        assert attention._split_heads.__self__ is attention
        for one in (model, twin):
            assert torch.equal(one.generate(IDS[:, :5], max_new_tokens=6, do_sample=False), wanted)
    assert not any(SPLIT in vars(module) for module in model.modules())


def test_others_are_left_alone():
    assert lean_decoder(llama()).heads == 0

    class Own(tf.models.falcon.modeling_falcon.FalconAttention):
        def _split_heads(self, fused_qkv: Tensor) -> tuple[Tensor, ...]:
            q, k, v = super()._split_heads(fused_qkv)
            return q, v, k

    model = falcon(NEW)
    for block in model.transformer.h:
        block.self_attention.__class__ = Own
    assert lean_decoder(model).heads == 0

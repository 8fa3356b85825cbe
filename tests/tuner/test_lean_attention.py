"""`lean_decoder(exact=False)`: attention layers that take the kernel for short rows."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import IDS, SHAPE, adapted
from torch import Tensor, nn
from torch.nn import functional as F

from anyrank.kernels import attention as short
from anyrank.tuner import attention as lean_layers
from anyrank.tuner.decoder import lean_decoder

LLAMA = {**SHAPE, "vocab_size": 128}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
GROUPS = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
FAMILIES = {
    "llama": tf.LlamaConfig(**LLAMA),
    "qwen 3, shared keys": tf.Qwen3Config(**{**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "mistral": tf.MistralConfig(**LLAMA),
    "falcon, its own call": tf.FalconConfig(**FALCON),
    "falcon, groups of heads": tf.FalconConfig(**GROUPS),
}
two_families = pytest.mark.parametrize("family", ["llama", "falcon, groups of heads"])
every_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """A word for every pass of our kernel."""
    made: list[str] = []
    for name in ("forward", "backward"):
        own = getattr(short._ShortAttention, name)

        def counted(*args: Any, own: Any = own, name: str = name) -> Any:
            made.append(name)
            return own(*args)

        monkeypatch.setattr(short._ShortAttention, name, staticmethod(counted))
    monkeypatch.setattr(short, "multiplies_bf16", lambda: True)
    return made


def built(config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).bfloat16()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # random models are tiny, and their attention flat
            parameter.data *= 3
    return adapted(model, "lora").train()


def outcome(model: nn.Module, mask: Tensor | None = None) -> list[Tensor]:
    """The logits, where a mask has words, and all gradients."""
    model.zero_grad()
    out: Any = model(input_ids=IDS, attention_mask=mask, labels=IDS, use_cache=False)
    out.loss.backward()
    seen = out.logits if mask is None else out.logits[mask.bool()]
    return [seen, *(p.grad for p in model.parameters() if p.grad is not None)]


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    mine, theirs = (torch.cat([t.double().flatten() for t in side]) for side in (got, wanted))
    return ((mine - theirs).norm() / theirs.norm()).item()


@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_every_layer_takes_it_and_rounds_as_torch_does(config, padded, calls):
    mask = None
    if padded:
        mask = torch.ones_like(IDS)
        mask[0, -3:] = 0
    model = built(config)
    wanted = outcome(model, mask)
    assert not calls
    lean = lean_decoder(model, exact=False)
    assert lean.attention == 2
    got = outcome(model, mask)
    assert calls == ["forward"] * 2 + ["backward"] * 2
    assert 0 < distance(got, wanted) < 2e-2
    lean.undo()
    calls.clear()
    assert distance(outcome(model, mask), wanted) == 0
    assert not calls


def test_logits_stay_exact_unless_asked(calls):
    model = built(FAMILIES["llama"])
    wanted = outcome(model)[0]
    assert lean_decoder(model).attention == 0
    assert torch.equal(outcome(model)[0], wanted)
    assert not calls


@two_families
def test_with_gradient_checkpointing_it_is_the_same_to_the_last_bit(family, calls):
    model = built(FAMILIES[family])
    lean_decoder(model, exact=False)
    wanted = outcome(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls.clear()
    assert distance(outcome(model), wanted) == 0
    assert calls.count("forward") == 4


def test_torchs_attention_is_back_after_a_layer_and_after_one_that_fails(monkeypatch):
    model = built(FAMILIES["llama"])
    lean_decoder(model, exact=False)
    own, seen = F.scaled_dot_product_attention, []
    rotary = tf.models.llama.modeling_llama.apply_rotary_pos_emb

    def looks(*args: Any) -> Any:
        seen.append(F.scaled_dot_product_attention)
        if len(seen) == 3:
            raise ZeroDivisionError
        return rotary(*args)

    monkeypatch.setattr(tf.models.llama.modeling_llama, "apply_rotary_pos_emb", looks)
    model(input_ids=IDS)
    assert F.scaled_dot_product_attention is own
    with pytest.raises(ZeroDivisionError):
        model(input_ids=IDS)
    assert seen == [short.attention] * 3
    assert F.scaled_dot_product_attention is own


def test_threads_leave_torchs_attention():
    own = F.scaled_dot_product_attention
    models = [built(FAMILIES["llama"]) for _ in range(3)]
    for model in models:
        lean_decoder(model, exact=False)

    def steps(model: nn.Module) -> None:
        for _ in range(20):
            model(input_ids=IDS)

    with ThreadPoolExecutor() as pool:
        list(pool.map(steps, models))
    assert F.scaled_dot_product_attention is own


@two_families
def test_eager_attention_and_float32_stay_as_they_are(family, calls):
    config = FAMILIES[family]
    for model in (built(config, attn_implementation="eager"), built(config)):
        if model.config._attn_implementation == "sdpa":
            model.float()
        wanted = outcome(model)
        assert lean_decoder(model, exact=False).attention == 2
        assert distance(outcome(model), wanted) < 1e-2
    assert not calls


@two_families
def test_generation_with_a_cache_says_the_same_words(family, calls):
    model = built(FAMILIES[family]).eval()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(IDS, **options)
    lean_decoder(model, exact=False)
    assert torch.equal(model.generate(IDS, **options), wanted)
    assert calls == ["forward"] * 2  # the prompt; then a token at a time


def test_keys_of_a_falcon_stay_in_groups_unless_somebody_keeps_them(monkeypatch):
    model = built(FAMILIES["falcon, groups of heads"])
    heads = []

    def counted(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads.append(key.shape[1])
        return short.attention(query, key, *args, **kwargs)

    monkeypatch.setattr(lean_layers, "attention", counted)
    lean_decoder(model, exact=False)
    outcome(model)
    assert heads == [2, 2]
    model(input_ids=IDS, use_cache=True)
    assert heads == [2, 2, 4, 4]
    assert all(block.self_attention.new_decoder_architecture for block in model.transformer.h)


def test_a_falcon_with_alibi_takes_groups_to_torch(calls):
    model = built(tf.FalconConfig(**GROUPS, alibi=True))
    wanted = outcome(model)
    lean_decoder(model, exact=False)
    assert distance(outcome(model), wanted) < 2e-2
    assert not calls


def test_a_compiled_layer_keeps_torchs_attention_in_one_graph(calls):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES["llama"]).bfloat16().eval()
    layer = model.model.layers[0].self_attn
    x = torch.randn(2, 9, 64).bfloat16()
    turns = model.model.rotary_emb(x, torch.arange(9)[None])

    def run(module: Any) -> Tensor:
        return module(x, position_embeddings=turns, attention_mask=None)[0]

    with torch.no_grad():
        wanted = run(layer)
        assert lean_decoder(model, exact=False).attention == 2
        got = run(torch.compile(layer, backend="aot_eager", fullgraph=True))
        assert not calls
        run(layer)
    assert torch.equal(got, wanted)
    assert calls == ["forward"]

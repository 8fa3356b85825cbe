"""The adapter inside of a model: identity, saving, several adapters, ranks, dtypes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IDS, adapted, config, fill, layers, llama, quantized

import anyrank
from anyrank.errors import GeometryError, LayerError


@pytest.mark.parametrize("method", list(anyrank.METHODS))
def test_a_fresh_adapter_changes_no_logit(method):
    wanted = llama()(IDS).logits
    assert torch.equal(get_peft_model(llama(), config(method))(IDS).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", list(anyrank.METHODS))
def test_save_and_load_is_bitwise(method, dtype, tmp_path):
    model = adapted(llama(dtype), method)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
    again = PeftModel.from_pretrained(llama(dtype), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == []


def test_set_rank_holds_until_it_is_set_again_and_a_with_block_restores_it():
    model = adapted(llama())
    whole = model(IDS).logits
    with model.set_rank(1):
        small = model(IDS).logits
        with model.set_rank(3):
            assert not torch.equal(model(IDS).logits, small)
        assert torch.equal(model(IDS).logits, small)
    assert torch.equal(model(IDS).logits, whole)
    model.set_rank(1)
    assert torch.equal(model(IDS).logits, small)


def test_several_adapters_have_ranks_and_methods_of_their_own():
    model = adapted(llama(), "qdylora")
    first = model(IDS).logits
    model.add_adapter("other", config("qbara", 2))
    fill(model, seed=2)
    model.set_adapter("other")
    model.set_rank(3)
    assert {layer.adapters["other"].rank for layer in layers(model)} == {3}
    assert {layer.adapters["default"].rank for layer in layers(model)} == {4}
    second = model(IDS).logits
    model.set_rank(1, "default")
    assert torch.equal(model(IDS).logits, second)
    model.set_rank(4, "default")
    model.set_adapter("default")
    fill(model, seed=1)
    assert not torch.equal(first, second)
    model.delete_adapter("other")
    assert all(set(layer.adapters) == {"default"} for layer in layers(model))


def test_two_active_adapters_add_up():
    model = adapted(llama(torch.float64), "lora")
    model.add_adapter("other", config("qahira"))
    fill(model, seed=5)
    deltas = [layer.get_delta_weight("default") for layer in layers(model)]
    model.base_model.set_adapter(["default", "other"])
    both = model(IDS).logits
    base = llama(torch.float64)
    merged = adapted(base, "qahira")
    for layer, theirs, delta in zip(layers(merged), layers(model), deltas, strict=True):
        layer.anyrank_S["default"].data = theirs.anyrank_S["other"].data
        layer.base_layer.weight.data += delta
    assert (merged(IDS).logits - both).abs().max() < 1e-12


def test_a_second_adapter_leaves_the_first_one_trainable():
    model = adapted(llama(), "qdylora")
    model.add_adapter("other", config("qbara", 2))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers(model))
    assert all(".default" in name for name in trained)


def test_disabling_the_adapter_gives_the_base():
    model = adapted(llama())
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (llama, "qdylora"),
        (lambda: quantized(llama(), 4, (1, 16)), "qalora"),
        (lambda: quantized(llama(), 4, (8, 4)), "qahira"),
    ],
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(base, method, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(base(), method)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            options = {"use_reentrant": reentrant}
            model.base_model.model.gradient_checkpointing_enable(options)
        with model.set_rank(3) if method != "qahira" else nullcontext():
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_bf16_base_keeps_fp32_adapters_and_casts_only_the_factors():
    model = adapted(llama(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layer = layers(model)[0]
    out = layer(torch.randn(2, 3, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_fa_trains_b_alone(dtype):
    model = adapted(llama(dtype), "lora_fa")
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"anyrank_B"}
    model.set_adapter("default")
    assert not layers(model)[0].anyrank_A["default"].requires_grad


def test_a_layer_that_does_not_fit_is_named_before_anything_is_built():
    base = llama()
    with pytest.raises(GeometryError) as error:
        get_peft_model(base, anyrank.AnyRankConfig(method="qbara", r=4, pool=48))
    assert str(error.value) == (
        "model.layers.0.self_attn.q_proj: pool=48 must divide d_in=64; nearest divisors: 32, 64"
    )
    assert layers(base) == []
    assert torch.equal(base(IDS).logits, llama()(IDS).logits)


def test_a_failing_second_adapter_leaves_the_first_one_alone():
    model = adapted(llama())
    wanted = model(IDS).logits
    with pytest.raises(GeometryError):
        model.add_adapter("other", config("qbara", 4, pool=48))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
def test_a_layer_with_an_adapter_of_peft_is_refused():
    base = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    del base.peft_config
    with pytest.raises(LayerError, match="q_proj: already holds a Linear of PEFT; merge or unload"):
        get_peft_model(base, config("lora", target_modules=["q_proj"]))


def test_the_mixin_of_transformers_loads_and_deletes_an_adapter(tmp_path):
    model = adapted(llama())
    model.save_pretrained(tmp_path)
    base = llama()
    base.load_adapter(str(tmp_path))
    assert torch.equal(base(IDS).logits, model(IDS).logits)
    base.delete_adapter("default")
    assert all(not layer.adapters for layer in layers(base))

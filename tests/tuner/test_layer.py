"""One adapted layer against the naive equation in float64, for every method and base."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny import IDS, LOW_RANK, adapted, config, fill, layers, llama, nf4
from torch import nn
from transformers.pytorch_utils import Conv1D

import anyrank
from anyrank.errors import ConfigError, LayerError, MergeError, RankError
from anyrank.tuner import AnyRankLinear

D_IN, D_OUT = 64, 96


def wrap(base: nn.Module, method: str, r: int = 4, **options) -> AnyRankLinear:
    layer = AnyRankLinear(base, "q_proj")
    layer.add_adapter("default", config(method, r, **options))
    fill(layer)
    return layer.double()


def dense(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "conv1d":
        layer = Conv1D(D_OUT, D_IN)
        nn.init.normal_(layer.bias)
        return layer
    return nn.Linear(D_IN, D_OUT, bias=kind == "bias")


def naive(layer: AnyRankLinear, x: torch.Tensor, k: int) -> torch.Tensor:
    """W x + b + s R C_k P x with every operator written out as a matrix."""
    adapter = layer.adapters["default"]
    p, q = adapter.geometry.p, adapter.geometry.q
    pool = torch.eye(D_IN // p, dtype=torch.float64).repeat_interleave(p, 1) / p
    repeat = torch.eye(D_OUT // q, dtype=torch.float64).repeat_interleave(q, 0)
    if k:
        core = layer.anyrank_B["default"][:, :k] @ layer.anyrank_A["default"][:k]
    else:
        core = layer.anyrank_S["default"]
    base = layer.base_layer
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    y = x @ weight.T + (0 if base.bias is None else base.bias)
    return y + adapter.scale * (x @ (repeat @ core @ pool).T)


def plain(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, linear.weight, linear.bias)


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("base", ["plain", "bias", "conv1d"])
@pytest.mark.parametrize("method", list(anyrank.METHODS))
def test_forward_and_all_gradients_equal_the_naive_reference(method, base):
    layer = wrap(dense(base), method)
    torch.manual_seed(4)
    x = torch.randn(3, 5, D_IN, dtype=torch.float64, requires_grad=True)
    for k in (0,) if method == "qahira" else (1, 3, layer.adapters["default"].geometry.rows):
        if k:
            layer.set_rank("default", k)
        trained = [p for n, p in layer.named_parameters() if "anyrank_" in n and p.requires_grad]
        assert len(trained) == {"qahira": 1, "lora_fa": 1}.get(method, 2)
        y, reference = layer(x), naive(layer, x, k)
        upstream = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, *trained), upstream)
        wanted = torch.autograd.grad(reference, (x, *trained), upstream)
        assert relative_rms(y, reference) < 1e-13
        for mine, theirs in zip(got, wanted, strict=True):
            assert relative_rms(mine, theirs) < 1e-13


@pytest.mark.parametrize("method", ["qdylora", "qbara", "qahira"])
def test_an_nf4_base_computes_its_own_product_and_the_adapter_is_added(method):
    base = nf4(D_IN, D_OUT, compute=torch.float32)
    layer = AnyRankLinear(base, "q_proj")
    layer.add_adapter("default", config(method))
    fill(layer)
    weight = layer.base_weight.read()
    assert weight.shape == (D_OUT, D_IN)
    x = torch.randn(2, 7, D_IN, requires_grad=True)
    y = layer(x)
    wanted = x.double() @ (weight.double() + layer.get_delta_weight("default").double()).T
    assert relative_rms(y.double(), wanted) < 1e-6
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    (reference,) = torch.autograd.grad(wanted, x, upstream.double())
    assert relative_rms(gradient.double(), reference.double()) < 1e-6


@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_a_base_layer_that_does_more_than_its_product_is_called(kind):
    base = nn.Linear(D_IN, D_OUT)
    if kind == "hook":
        base.register_forward_hook(lambda module, args, y: 2 * y)
    else:
        base.__class__ = type("Loud", (nn.Linear,), {"forward": lambda self, x: 2 * plain(self, x)})
    layer = wrap(base, "lora")
    x = torch.randn(5, D_IN, dtype=torch.float64)
    wanted = 2 * plain(layer.base_layer, x) + x @ layer.get_delta_weight("default").T
    assert relative_rms(layer(x), wanted) < 1e-13


def test_a_base_weight_that_is_trained_too_gets_its_gradient():
    layer = wrap(nn.Linear(D_IN, D_OUT), "lora")
    layer.base_layer.weight.requires_grad_(True)
    x, upstream = torch.randn(5, D_IN).double(), torch.randn(5, D_OUT).double()
    layer(x).backward(upstream)
    assert relative_rms(layer.base_layer.weight.grad, upstream.T @ x) < 1e-13


def test_an_nf4_base_still_passes_gradients_after_an_evaluation():
    base = nf4(D_IN, D_OUT)
    with torch.no_grad():
        base.eval()(torch.randn(1, 3, D_IN, dtype=torch.bfloat16))  # bitsandbytes repacks here
    layer = AnyRankLinear(base, "q_proj")
    layer.add_adapter("default", config("lora"))
    x = torch.randn(1, 3, D_IN, dtype=torch.bfloat16, requires_grad=True)
    first = torch.autograd.grad(layer.train()(x).sum(), x)[0]
    with torch.no_grad():
        layer.eval()(x)
    again = torch.autograd.grad(layer.train()(x).sum(), x)[0]
    assert first.abs().sum() > 0
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", LOW_RANK)
def test_set_rank_equals_an_adapter_built_with_the_first_rows_bit_for_bit(method, dtype):
    options = {"scale": "alpha/k"}
    if method in ("qalora", "qablora"):
        options["pool"] = 8
    if method == "anyrank":
        options["schedule"] = "uniform"  # settling wants one scale for all ranks
    whole = adapted(llama(dtype), method, r=8, **options)
    rows = layers(whole)[0].adapters["default"].geometry.rows
    for k in (2, 6, rows):
        small = get_peft_model(llama(dtype), config(method, k * 8 // rows, **options))
        for mine, theirs in zip(layers(small), layers(whole), strict=True):
            mine.anyrank_A["default"].data = theirs.anyrank_A["default"].data[:k].clone()
            mine.anyrank_B["default"].data = theirs.anyrank_B["default"].data[:, :k].clone()
        whole.set_rank(k)
        assert torch.equal(whole(IDS).logits, small(IDS).logits)
        whole(IDS).logits.sum().backward()
        small(IDS).logits.sum().backward()
        for mine, theirs in zip(layers(small), layers(whole), strict=True):
            if mine.anyrank_A["default"].requires_grad:
                grad = theirs.anyrank_A["default"].grad
                assert torch.equal(mine.anyrank_A["default"].grad, grad[:k])
                assert grad[k:].count_nonzero() == 0
            grad = theirs.anyrank_B["default"].grad
            assert torch.equal(mine.anyrank_B["default"].grad, grad[:, :k])
            assert grad[:, k:].count_nonzero() == 0
        whole.zero_grad()


@pytest.mark.parametrize("method", list(anyrank.METHODS))
def test_a_float_base_merges_and_unmerges(method):
    model = adapted(llama(torch.float64), method)
    wanted = model(IDS).logits
    model.merge_adapter()
    assert relative_rms(model(IDS).logits, wanted) < 1e-12
    model.unmerge_adapter()
    assert relative_rms(model(IDS).logits, wanted) < 1e-12
    assert relative_rms(model.merge_and_unload()(IDS).logits, wanted) < 1e-12


def test_a_merge_happens_at_the_rank_in_use_and_pins_it():
    model = adapted(llama(torch.float64))
    model.set_rank(2)
    wanted = model(IDS).logits
    model.merge_adapter()
    assert relative_rms(model(IDS).logits, wanted) < 1e-12
    with pytest.raises(RankError, match="adapter 'default' is merged at rank 2; unmerge it first"):
        model.set_rank(4)


def test_an_nf4_base_refuses_a_merge_and_stays_as_it_is():
    layer = AnyRankLinear(nf4(D_IN, D_OUT), "q_proj")
    layer.add_adapter("default", config("qdylora"))
    before = layer.base_layer.weight.data.clone()
    with pytest.raises(MergeError) as error:
        layer.merge()
    assert str(error.value) == (
        "q_proj: NF4 and FP4 weights have no offset; merging would round most of the adapter away; "
        "keep the adapter beside the base (anyrank export), or load the base unquantized and "
        "merge there"
    )
    assert torch.equal(layer.base_layer.weight.data, before)
    assert not layer.merged


def test_a_broken_adapter_is_not_merged_when_asked_to_be_careful():
    model = adapted(llama())
    layers(model)[0].anyrank_B["default"].data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="q_proj: adapter 'default' holds NaN or infinity"):
        model.merge_and_unload(safe_merge=True)


def test_dropout_changes_training_and_not_evaluation():
    model = adapted(llama(), lora_dropout=0.5).eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_layer_that_no_adapter_fits_is_refused_by_name():
    with pytest.raises(LayerError) as error:
        AnyRankLinear(nn.Embedding(4, 4), "embed")
    assert str(error.value).startswith("embed: no adapter fits on torch.Embedding; supported are")


def test_mixed_batches_are_refused_with_the_way_out():
    with pytest.raises(LayerError, match="one adapter per row of a batch is not supported"):
        adapted(llama())(IDS, adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda m: m.set_rank(0),
            RankError,
            "adapter 'default': rank 0 must be a whole number in 1..4",
        ),
        (
            lambda m: m.set_rank(5),
            RankError,
            "adapter 'default': rank 5 must be a whole number in 1..4",
        ),
        (
            lambda m: m.set_rank(2.5),
            RankError,
            "adapter 'default': rank 2.5 must be a whole number in 1..4",
        ),
        (
            lambda m: m.set_rank(2, first=2),
            RankError,
            "adapter 'default': first=2 must lie in 0..1",
        ),
        (
            lambda m: m.set_rank(2, "defualt"),
            ConfigError,
            "adapter 'defualt' is unknown; did you mean default?",
        ),
    ],
)
def test_a_rank_that_is_not_there_is_refused_and_nothing_changes(call, kind, text):
    model = adapted(llama())
    with pytest.raises(kind) as error:
        call(model)
    assert str(error.value) == text
    assert {layer.adapters["default"].rank for layer in layers(model)} == {4}


def test_a_dense_core_has_no_ranks():
    with pytest.raises(RankError, match="its core is one dense matrix without ranks"):
        adapted(llama(), "qahira").set_rank(2)

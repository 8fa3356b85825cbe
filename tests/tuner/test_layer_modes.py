"""One adapted layer under torch.compile and in bfloat16, on every kind of base."""

from __future__ import annotations

import pytest
import torch
from tiny import adapted, config, fill, layers, llama, nf4, quantized
from torch import nn

import anyrank
from anyrank.algebra import adapter_output
from anyrank.tuner import AnyRankLinear


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


# torch.compile makes an instance of autograd.Function, of which autograd.Function warns
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("base", ["float", "nf4", "affine"])
@pytest.mark.parametrize("method", ["qdylora", "qbara", "qalora"])
def test_a_layer_compiles_without_a_graph_break(method, base):
    model = adapted(quantized(llama()) if base == "affine" else llama(), method, lora_dropout=0.1)
    layer = layers(model)[0]
    if base == "nf4":
        layer.base_layer = nf4(64, 64, compute=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        layer.train(mode)
        x = torch.randn(2, 7, 64, requires_grad=True)
        y = compiled(x)
        got = torch.autograd.grad(y.sum(), (x, layer.anyrank_B["default"]))
        assert all(gradient.abs().sum() > 0 for gradient in got)
        if not mode:  # in training the two draw different masks
            wanted = torch.autograd.grad(layer(x).sum(), (x, layer.anyrank_B["default"]))
            for mine, theirs in zip(got, wanted, strict=True):
                assert relative_rms(mine, theirs) < 1e-6


@pytest.mark.parametrize("base", ["nf4", "affine", "float"])
@pytest.mark.parametrize("method", list(anyrank.METHODS))
def test_bf16_gradients_stay_within_a_hundredth_of_the_float64_reference(method, base):
    if base == "affine":
        model = quantized(llama(torch.bfloat16), 4, (1, 16))
        linear = model.model.layers[0].self_attn.q_proj
    elif base == "nf4":
        linear = nf4(64, 64)
    else:
        linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    layer = AnyRankLinear(linear, "q_proj")
    layer.add_adapter("default", config(method))
    fill(layer)
    torch.manual_seed(6)
    x = torch.randn(3, 11, 64).bfloat16().requires_grad_()
    upstream = torch.randn(3, 11, 64).bfloat16()
    trained = [p for n, p in layer.named_parameters() if "anyrank_" in n and p.requires_grad]
    got = torch.autograd.grad(layer(x), (x, *trained), upstream)
    exact = x.detach().double().requires_grad_()
    wide = {id(p): p.detach().double().requires_grad_() for p in trained}
    update = layer.update("default")
    cores = [wide.get(id(part), part.detach().double()) for part in update.core]
    weight = layer.base_weight.read().double()
    reference = exact @ weight.T + adapter_output(exact, cores, *update[1:])
    wanted = torch.autograd.grad(reference, (exact, *wide.values()), upstream.double())
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_rms(mine.double(), theirs) < 1e-2

"""GPTQ through a model: which layers, which inputs; test_quantize has the whole."""

import pytest
import torch
from tiny import llama
from torch import nn

from anyrank.errors import DataError
from anyrank.kernels import AffineFormat
from anyrank.quant.hf import quantized_linears
from anyrank.quantize.gptq import gptq
from anyrank.quantize.minmax import minmax
from anyrank.quantize.sequential import _Hessians, decoder_layers, gptq_layers

FORM = AffineFormat(4, (1, 16))


def test_the_decoder_layers_are_the_list_with_the_most_layers():
    model = llama()
    linears = dict(quantized_linears(model, ["lm_head"]))
    name, layers = decoder_layers(model, linears)
    assert name == "model.layers"
    assert layers is model.model.layers


def test_a_model_without_a_list_of_layers_is_refused():
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(DataError) as caught:
        list(gptq_layers(model, {"0": model[0]}, FORM, [torch.arange(3)]))
    assert str(caught.value) == (
        "gptq: Sequential has no list of decoder layers to go through; "
        "use the quantizer half_quadratic"
    )


def test_layers_that_read_the_same_tensor_share_a_hessian():
    linears = {name: nn.Linear(16, 4) for name in ("q", "k", "o", "unused")}
    sums = _Hessians(linears)
    rows = torch.randn(2, 3, 16), torch.randn(1, 5, 16)
    with sums, torch.no_grad():
        for x in rows:
            linears["q"](x)
            linears["k"](x)
            linears["o"](2 * x)
    wanted = sum(x.flatten(0, 1).T @ x.flatten(0, 1) for x in rows)
    assert torch.allclose(sums.of("q"), wanted, atol=1e-5)
    assert sums.of("k") is sums.of("q")
    assert torch.allclose(sums.of("o"), 4 * wanted, atol=1e-5)
    assert torch.equal(sums.of("unused"), torch.zeros(16, 16))
    before = sums.of("q").clone()
    linears["q"](rows[0])
    assert torch.equal(sums.of("q"), before)  # the hooks are gone


class TwoLayers(nn.Module):
    """A projection, then two decoder layers that are given different masks."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, hidden_states, mask):
            return (hidden_states + self.up(hidden_states * mask),)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.into = nn.Embedding(8, 16), nn.Linear(16, 16)
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, input_ids, use_cache):
        assert not use_cache
        x = self.into(self.embed(input_ids))
        for number, layer in enumerate(self.layers):
            (x,) = layer(hidden_states=x, mask=float(number + 1))
        raise AssertionError("nothing after the last decoder layer is needed")


@torch.no_grad()
def test_every_layer_keeps_its_own_mask_and_sees_the_quantized_ones_before_it():
    torch.manual_seed(0)
    model = TwoLayers()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    floats = {n: m.weight.data.clone() for n, m in linears.items()}
    rows = [torch.tensor([1, 2, 3, 7]), torch.tensor([4, 5])]
    found = {name: rest for name, *rest in gptq_layers(model, linears, FORM, rows)}
    assert list(found) == ["into", "layers.0.up", "layers.1.up"]
    assert all(torch.equal(found[n][1], floats[n]) for n in floats)
    assert torch.equal(found["into"][0].codes, minmax(floats["into"], FORM).codes)
    hidden = [model.into(model.embed(row)) for row in rows]
    for number in range(2):
        inputs = [x * (number + 1) for x in hidden]
        wanted = gptq(floats[f"layers.{number}.up"], FORM, sum(x.T @ x for x in inputs))
        affine = found[f"layers.{number}.up"][0]
        assert torch.equal(affine.codes, wanted.codes)
        assert torch.equal(model.layers[number].up.weight, affine.weight())
        hidden = [x + model.layers[number].up(y) for x, y in zip(hidden, inputs, strict=True)]


def test_activations_that_are_not_finite_name_the_layer():
    model = llama()
    model.model.layers[0].input_layernorm.weight.data[:] = torch.inf
    linears = dict(quantized_linears(model, ["lm_head"]))
    with pytest.raises(DataError, match=r"^model\.layers\.0\.self_attn\.q_proj: the Hessian of"):
        list(gptq_layers(model, linears, FORM, [torch.arange(5)]))

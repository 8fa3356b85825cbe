"""Whole models by GPTQ."""

import pytest
import torch
from model_folders import family, loaded, quantized_layers, saved, tensors
from tiny import IDS, llama

from anyrank.kernels import AffineFormat
from anyrank.quant.checkpoint import QuantizedModel
from anyrank.quantize.gptq import gptq
from anyrank.quantize.model import quantize_model


def rows(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10)
    return [torch.randint(0, 128, (20 + i,), generator=generator) for i in range(count)]


def test_gptq_goes_through_the_model_layer_by_layer(base, tmp_path):
    out = quantize_model(
        base, tmp_path / "out", bits=3, tile=(1, 16), quantizer="gptq", calibration=rows()
    )
    before, model = tensors(base), QuantizedModel.open(out)
    for name in model.others:
        assert torch.equal(model.tensor(name), before[name])
    plain = loaded(
        quantize_model(base, tmp_path / "plain", bits=3, tile=(1, 16), quantizer="minmax")
    )
    ours, float_model = loaded(out), loaded(base)
    assert len(quantized_layers(ours)) == 14
    with torch.no_grad():
        lost = {
            key: sum(
                float((m(row[None]).logits - float_model(row[None]).logits).square().sum())
                for row in rows()
            )
            for key, m in (("gptq", ours), ("minmax", plain))
        }
    assert lost["gptq"] < 0.8 * lost["minmax"]


@torch.no_grad()
def test_every_layer_sees_what_the_quantized_layers_before_it_compute(tmp_path):
    """The Hessian of the last linear layer, from hooks on the finished model."""
    base = saved(tmp_path / "base", llama())
    out = quantize_model(
        base, tmp_path / "out", tile=(1, 16), quantizer="gptq", calibration=rows(2)
    )
    model = loaded(base)
    for name, affine in QuantizedModel.open(out).weights():
        if ".layers.0." in name:
            model.get_submodule(name).weight.data = affine.weight()
    seen = []
    last = model.model.layers[1].mlp.down_proj
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for row in rows(2):
        model(row[None])
    wanted = gptq(last.weight.data, AffineFormat(4, (1, 16)), sum(x.T @ x for x in seen))
    got = QuantizedModel.open(out).affine("model.layers.1.mlp.down_proj")
    assert torch.equal(got.codes, wanted.codes)
    assert torch.equal(got.offsets, wanted.offsets)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma", "mixtral"])
def test_gptq_goes_through_every_family(name, tmp_path):
    base = family(tmp_path / "base", name)
    out = quantize_model(base, tmp_path / "out", tile=(8, 4), quantizer="gptq", calibration=rows(3))
    with torch.no_grad():
        assert torch.isfinite(loaded(out)(IDS).logits).all()

"""Quantizing whole models: what comes out loads, bit for bit."""

import json

import pytest
import torch
from model_folders import family, loaded, quantized_layers, tensors
from safetensors import safe_open
from tiny import IDS
from torch import nn

from anyrank.kernels import AffineFormat
from anyrank.quant.checkpoint import QuantizedModel
from anyrank.quantize.half_quadratic import half_quadratic
from anyrank.quantize.minmax import minmax
from anyrank.quantize.model import REPORT, in_chunks, quantize_model


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma", "mixtral"])
def test_a_model_of_every_family_comes_back_bit_for_bit(name, tmp_path):
    base = family(tmp_path / "base", name)
    out = quantize_model(base, tmp_path / "out", bits=4, tile=(1, 16))
    model, before = loaded(out), loaded(base).state_dict()
    layers = quantized_layers(model)
    projections = 4 if name == "mixtral" else 7  # Mixtral's experts are no linear layers
    assert len(layers) == 2 * projections
    for layer, module in layers.items():
        wanted = half_quadratic(before.pop(f"{layer}.weight"), AffineFormat(4, (1, 16)))
        assert torch.equal(module.affine.weight(), wanted.weight()), layer
    after = model.state_dict()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    assert type(model.get_output_embeddings()) is nn.Linear
    with torch.no_grad():
        dense = loaded(base)
        for layer, module in layers.items():
            dense.get_submodule(layer).weight.data = module.affine.weight()
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


def test_a_tied_output_embedding_is_written_once_and_stays_tied(tmp_path):
    base = family(tmp_path / "base", "gemma")
    out = quantize_model(base, tmp_path / "out", tile=(1, 16))
    model = loaded(out)
    assert "lm_head.weight" not in tensors(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert json.loads((out / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ] == ["lm_head"]


def test_falcon_comes_back(tmp_path):
    base = family(tmp_path / "base", "falcon")
    assert len(quantized_layers(loaded(quantize_model(base, tmp_path / "out", tile=(1, 16))))) == 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tile", [(1, 16), (8, 4)])
@pytest.mark.parametrize("quantizer", [minmax, half_quadratic])
def test_codes_are_those_of_the_quantizer(bits, tile, quantizer, base, tmp_path):
    out = quantize_model(base, tmp_path / "out", bits=bits, tile=tile, quantizer=quantizer.__name__)
    before, model = tensors(base), QuantizedModel.open(out)
    assert len(model.layers) == 14
    for layer, affine in model.weights():
        wanted = quantizer(before.pop(f"{layer}.weight"), AffineFormat(bits, tile))
        for name in ("codes", "scales", "offsets"):
            assert torch.equal(getattr(affine, name), getattr(wanted, name)), (layer, name)
    assert sorted(model.others) == sorted(before)
    for name, tensor in before.items():
        assert torch.equal(model.tensor(name), tensor)
        assert model.tensor(name).dtype == torch.bfloat16


def test_shards_hold_at_most_what_was_asked_and_offsets_lie_apart(base, tmp_path):
    out = quantize_model(base, tmp_path / "out", tile=(1, 16), max_shard_size=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(str(file), "pt") as shard:
            sizes = {k: shard.get_tensor(k).nbytes for k in shard.keys()}  # noqa: SIM118
        found |= dict.fromkeys(sizes, file.name)
        offsets = {k for k in sizes if k.endswith(".offsets")}
        if file.name == "offsets.safetensors":
            assert offsets == set(sizes)
        else:
            assert not offsets
            assert sum(sizes.values()) <= 20_000 or len(sizes) == 1
    assert found == index
    names = sorted({name for name in index.values() if name.startswith("model-")})
    assert names == [
        f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)
    ]
    assert len(names) > 2
    loaded(out)


def test_what_belongs_to_a_model_is_copied(base, tmp_path):
    out = quantize_model(base, tmp_path / "out", tile=(1, 16))
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, out))
    assert after.pop("quantization_config") == {
        "quant_method": "anyrank",
        "bits": 4,
        "tile": [1, 16],
        "storage_dtype": "float16",
        "modules_to_not_convert": ["lm_head"],
        "quantizer": "half_quadratic",
    }
    assert after == before
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model-00001-of-00001.safetensors",
        "offsets.safetensors",
        "model.safetensors.index.json",
        "quantize.json",
    }


def test_the_report_says_what_was_lost(base, tmp_path):
    seen = []
    out = quantize_model(
        base,
        tmp_path / "out",
        bits=3,
        tile=(1, 16),
        quantizer="minmax",
        progress=lambda *step: seen.append(step),
    )
    report = json.loads((out / REPORT).read_text())
    before, lost, whole = tensors(base), 0.0, 0.0
    for layer, affine in QuantizedModel.open(out).weights():
        weight = before[f"{layer}.weight"].double()
        error = (weight - affine.weight().double()).square().sum()
        lost, whole = lost + error, whole + weight.square().sum()
        wanted = float((error / weight.square().sum()) ** 0.5)
        assert report["layers"][layer] == pytest.approx(wanted, rel=1e-5)
    assert report["relative_error"] == pytest.approx(float((lost / whole) ** 0.5), rel=1e-5)
    assert report["bits_per_weight"] == 3 + 32 / 16
    assert report["quantizer"] == "minmax"
    assert report["taken_over"] is False
    assert report["weights_quantized"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert report["weights_kept"] == 2 * 128 * 64 + 5 * 64
    assert [step[0] for step in seen] == list(range(1, len(before) + 1))
    assert {step[1] for step in seen} == {len(before)}


def test_layers_to_keep_stay_as_they_are(base, tmp_path):
    out = quantize_model(base, tmp_path / "out", tile=(1, 16), keep=["down_proj", "layers.0"])
    model = loaded(out)
    assert sorted(quantized_layers(model)) == [
        f"model.layers.1.{part}_proj"
        for part in ("mlp.gate", "mlp.up", "self_attn.k", "self_attn.o", "self_attn.q",
                     "self_attn.v")
    ]  # fmt: skip
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.weight,
        tensors(base)["model.layers.1.mlp.down_proj.weight"],
    )


def test_chunks_of_rows_change_no_bit(monkeypatch):
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(9))
    form = AffineFormat(3, (2, 16))
    wanted = half_quadratic(weight, form)
    monkeypatch.setattr("anyrank.quantize.model.CHUNK", 300)
    got = in_chunks(half_quadratic, weight, form)
    assert got.form == form
    for name in ("codes", "scales", "offsets"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))

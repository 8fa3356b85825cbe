"""HQQ: the codes are the trained ones, and HQQ's own layers answer like torch."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_folders import (
    MODELS,
    PROMPT,
    add_variant,
    exact,
    hide,
    kl,
    per_weight,
    quantized_folder,
    quotient_bound,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyrank.errors import ConfigError, GeometryError, MissingPackageError, RunError
from anyrank.export import folder as shared
from anyrank.export.hqq import export_hqq, load_hqq

# bits: (codes in a word, type of the word)
WORDS = {
    2: (4, torch.uint8),
    3: (10, torch.int32),
    4: (2, torch.uint8),
    5: (1, torch.uint8),
    6: (1, torch.uint8),
    8: (1, torch.uint8),
}


def layer_of(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {
        name.rpartition(".")[2]: value
        for name, value in tensors.items()
        if name.rpartition(".")[0] == layer
    }


def unpacked(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The codes [rows, g]: the first of n equal parts of the rows has the highest bits."""
    count, word = WORDS[bits]
    assert packed.dtype == word
    assert len(packed) == -(-rows // count)
    parts = [packed.long() >> (bits * (count - 1 - i)) & (2**bits - 1) for i in range(count)]
    return torch.cat(parts)[:rows]


def text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode("ascii")


@pytest.mark.parametrize(
    ("bits", "tile"),
    [
        (2, (1, 32)),
        (3, (1, 32)),
        (4, (1, 32)),
        (4, (1, 16)),
        (5, (1, 64)),
        (6, (1, 32)),
        (8, (1, 32)),
        (4, (8, 32)),
        (3, (4, 8)),
    ],
)
def test_codes_scales_and_offsets_are_those_that_were_trained(tmp_path, monkeypatch, bits, tile):
    hide(monkeypatch, "hqq")
    source = quantized_folder(tmp_path / "base", bits, tile)
    out = export_hqq(source, tmp_path / "out")
    tensors = load_file(out / "qmodel.safetensors")
    constant = 0
    for layer, weight in trained(source).items():
        found, group = layer_of(tensors, layer), tile[1]
        code, scale, offset = per_weight(weight)
        rows = code.numel() // group
        read = unpacked(found["W_q"], bits, rows).view(code.shape)
        live = scale != 0
        constant += int((~live).sum())
        assert read[live].equal(code[live].long())
        assert read[~live].eq(0).all()
        own = found["scale"].double().expand(-1, group).reshape(code.shape)
        zero = found["zero"].double().expand(-1, group).reshape(code.shape)
        assert own[live].equal(scale[live])
        assert zero[live].equal((-offset / scale)[live].float().double())
        assert own[~live].eq(1).all()
        assert zero[~live].equal(-offset[~live])
        assert found["scale"].shape == found["zero"].shape == (rows, 1)
        assert found["scale"].dtype == found["zero"].dtype == torch.float32
        error = (read.double() - zero) * own - exact(weight)
        assert (error.abs() <= quotient_bound(weight)).all()
    assert constant == tile[0] * tile[1]


def test_settings_are_encoded_as_hqq_decodes_them(tmp_path):
    source = quantized_folder(tmp_path / "base", 3)
    tensors = load_file(export_hqq(source, tmp_path / "out") / "qmodel.safetensors")
    found = layer_of(tensors, "model.layers.1.mlp.down_proj")
    assert found["shape"].tolist() == [64, 128]
    for name, value in {"nbits": 3, "group_size": 32, "axis": 1}.items():
        assert (found[name].item(), found[name].dtype) == (value, torch.int32)
    for name, value in {
        "packing": "3bit_32",
        "unpack_view_dtype": "torch.int32",
        "compute_dtype": "torch.float32",
    }.items():
        assert (text(found[name]), found[name].dtype) == (value, torch.uint8)
    flags = {
        name for name, value in found.items() if value.dtype == torch.uint8 and not value.dim()
    }
    assert {name for name in flags if found[name].item() == 1} == {
        "channel_wise",
        "encoded_state_dict",
        "stores_quant_config",
    }
    assert {name for name in flags if found[name].item() == 0} == {
        "offload_meta",
        "optimize",
        "quant_scale",
        "quant_zero",
        "round_zero",
        "view_as_float",
    }


def test_everything_else_is_copied(tmp_path):
    source = quantized_folder(tmp_path / "base", model="qwen2")
    out = export_hqq(source, tmp_path / "out")
    stored, tensors = (
        load_file(source / "model.safetensors"),
        load_file(out / "qmodel.safetensors"),
    )
    layers = trained(source)
    kept = {
        name for name in stored if name.rpartition(".")[2] not in ("codes", "scales", "offsets")
    }
    assert "model.layers.0.self_attn.q_proj.bias" in kept
    assert all(tensors[name].equal(stored[name]) for name in kept)
    assert {name.rpartition(".")[0] for name in set(tensors) - kept} == set(layers)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": {
                "nbits": 4,
                "channel_wise": True,
                "group_size": 32,
                "optimize": False,
                "round_zero": False,
                "axis": 1,
                "view_as_float": False,
            },
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": ["lm_head"],
    }
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_variant_brings_its_own_zeros(tmp_path):
    source = quantized_folder(tmp_path / "base")
    add_variant(source, "rank8")
    default = load_file(export_hqq(source, tmp_path / "default") / "qmodel.safetensors")
    other = load_file(export_hqq(source, tmp_path / "o", variant="rank8") / "qmodel.safetensors")
    changed = {key for key in default if not default[key].equal(other[key])}
    assert changed == {f"{layer}.zero" for layer in trained(source)}


@pytest.mark.parametrize(
    ("bits", "tile", "form"),
    [(4, (8, 4), "4 bits in tiles of 8x4"), (7, (1, 32), "7 bits in groups of 32")],
)
def test_a_format_that_hqq_lacks_is_refused(tmp_path, bits, tile, form):
    source = quantized_folder(tmp_path / "base", bits, tile)
    with pytest.raises(GeometryError) as caught:
        export_hqq(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{next(iter(trained(source)))}: {form} do not fit HQQ, which holds 2, 3, 4, 5, 6 or 8 "
        "bits in groups of a multiple of 8; quantize with such a --bits and --group_size, or "
        "export to torchao, which holds any"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_groups_that_do_not_fill_a_word_are_refused(monkeypatch, tmp_path):
    source = quantized_folder(tmp_path / "base", 2, (1, 64))
    planned = shared.plan(source, None)
    layers = {"model.layers.0.self_attn.q_proj": (66, 64)}
    odd = shared.Plan(planned.model, layers, planned.others)
    monkeypatch.setattr("anyrank.export.hqq.plan", lambda *_: odd)
    with pytest.raises(GeometryError) as caught:
        export_hqq(source, tmp_path / "out")
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj: its 66 groups of 64 are no multiple of 4, which HQQ "
        "packs together at 2 bits; keep the layer in its precision with --keep q_proj, or export "
        "to torchao"
    )


def test_loading_without_hqq_says_what_to_install(tmp_path, monkeypatch):
    hide(monkeypatch, "hqq")
    with pytest.raises(MissingPackageError) as caught:
        load_hqq(tmp_path)
    assert str(caught.value) == "hqq is not installed; pip install 'anyrank[hqq]'"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("model", "bits", "tile"),
    [
        *((model, 4, (1, 32)) for model in MODELS),
        *(("llama", bits, (1, 64)) for bits in (2, 3, 5, 6, 8)),
        ("llama", 4, (8, 32)),
    ],
)
def test_hqq_answers_like_torch(tmp_path, monkeypatch, model, bits, tile):
    pytest.importorskip("hqq")
    source = quantized_folder(tmp_path / "base", bits, tile, model)
    monkeypatch.setattr(shared, "SHARD_BYTES", 50_000)
    out = export_hqq(source, tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.randint(5, 290, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(ids).logits
        for dtype, bound in ((torch.float16, 1e-6), (torch.bfloat16, 1e-4), (torch.float32, 1e-10)):
            loaded = load_hqq(out, dtype=dtype)
            assert kl(wanted, loaded(ids).logits) < bound
            assert loaded.model.rotary_emb.inv_freq.equal(reference.model.rotary_emb.inv_freq)
    stored = {
        name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()
    }
    for layer, weight in trained(source).items():
        module = loaded.get_submodule(layer)
        assert type(module).__name__ == "HQQLinear"
        assert (module.bias is not None) == (f"{layer}.bias" in stored)
        error = module.dequantize().double() - exact(weight)
        assert (error.abs() <= quotient_bound(weight)).all()
        # HQQ writes what it read, setting by setting
        for key, value in module.state_dict().items():
            assert value.equal(stored[f"{layer}.{key}"]), key
        assert set(module.state_dict()) == set(layer_of(stored, layer))
    prompt = AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt").input_ids
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 2}
    assert loaded.generate(prompt, **options).equal(reference.generate(prompt, **options))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_zero_beyond_float16_is_refused_and_named(tmp_path):
    pytest.importorskip("hqq")
    source = quantized_folder(tmp_path / "base")
    tensors = load_file(source / "model.safetensors")
    layer = "model.layers.1.self_attn.v_proj"
    tensors[f"{layer}.scales"][0, 0] = 6e-8
    tensors[f"{layer}.offsets"][0, 0] = 0.1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = export_hqq(source, tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        load_hqq(out)
    assert str(caught.value) == (
        f"{layer}: a zero does not fit float16; load with dtype=torch.float32 or torch.bfloat16"
    )
    weight = trained(source)[layer]
    module = load_hqq(out, dtype=torch.float32).get_submodule(layer)
    error = module.dequantize().double() - exact(weight)
    assert (error.abs() <= quotient_bound(weight)).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nobody_opens_the_folder_by_mistake(tmp_path):
    pytest.importorskip("hqq")
    out = export_hqq(quantized_folder(tmp_path / "base"), tmp_path / "out")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(RunError) as caught:
        load_hqq(tmp_path / "base")
    assert str(caught.value) == (
        f"{tmp_path / 'base'}: holds no qmodel.safetensors; make it with anyrank export --to hqq"
    )

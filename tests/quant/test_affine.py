"""Quantized layers inside of a model: cast, saved, loaded, adapted, merged."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from tiny import IDS, adapted, config, layers, llama, quantized
from transformers import AutoModelForCausalLM

import anyrank
from anyrank.errors import ConfigError, GeometryError, MergeError
from anyrank.kernels import AffineFormat
from anyrank.quant.affine import AffineLinear, check_format, tile_obstacle

FOLDABLE = [  # method, options, tile
    ("qalora", {"pool": 16}, (1, 16)),
    ("qalora", {"pool": 32, "nested": True, "r": 2}, (1, 16)),
    ("qablora", {"pool": 16, "repeat": 4, "nested": True}, (1, 16)),
    ("qahira", {}, (8, 4)),
    ("qahira", {"pool": 16, "repeat": 1}, (1, 16)),
    ("dylora", {"pool": 16}, (1, 16)),
]


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if "anyrank_" not in name}


def test_a_cast_of_the_model_leaves_the_stored_weight_alone():
    model = quantized(llama())
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.scales.clone(), layer.offsets.clone(), layer.affine.weight()
    for cast in (model.bfloat16, model.double, model.half, lambda: model.to("cpu", torch.float32)):
        cast()
        assert (layer.scales.dtype, layer.codes.dtype) == (torch.float16, torch.uint8)
        for was, now in zip(
            before, (layer.scales, layer.offsets, layer.affine.weight()), strict=True
        ):
            assert torch.equal(was, now)
    assert model.lm_head.weight.dtype == torch.float32


def test_preparing_for_low_bit_training_leaves_the_stored_weight_alone():
    model = quantized(llama(torch.bfloat16, attention_bias=True), 4, (1, 16))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for name, tensor in model.state_dict().items():
        if name.endswith((".codes", ".scales", ".offsets")):
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    adapted(model, "qalora")(IDS).logits.sum().backward()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tile", [(1, 16), (1, 32), (8, 4)])
def test_from_pretrained_loads_and_saves_the_same_bytes(bits, tile, tmp_path):
    model = quantized(llama(attention_bias=True), bits, tile)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    layer = loaded.model.layers[1].mlp.down_proj
    assert isinstance(layer, AffineLinear)
    assert layer.form == AffineFormat(bits, tile)
    assert type(loaded.lm_head) is torch.nn.Linear
    for name, tensor in buffers(model).items():
        assert torch.equal(tensor, buffers(loaded)[name]), name
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    loaded.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_quantized_model_loads_in_another_dtype_with_its_storage_as_it_was(tmp_path):
    model = quantized(llama())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mine, theirs = model.model.layers[0].mlp.up_proj, loaded.model.layers[0].mlp.up_proj
    assert torch.equal(mine.offsets, theirs.offsets)
    assert torch.equal(mine.affine.weight(), theirs.affine.weight())
    assert loaded(IDS).logits.dtype == torch.bfloat16


def test_from_pretrained_does_not_quantize(tmp_path):
    from anyrank.quant.hf import AffineConfig

    llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=AffineConfig(bits=4, tile=(1, 32))
        )
    assert str(caught.value) == (
        "quantization_config: from_pretrained does not quantize; run anyrank quantize MODEL OUT "
        "and load OUT"
    )


@pytest.mark.parametrize("method", list(anyrank.METHODS))
def test_every_method_attaches_saves_and_loads_on_codes(method, tmp_path):
    fresh = adapted(quantized(llama(), 4, (1, 16)), method)
    for layer in layers(fresh):
        for name in ("anyrank_B", "anyrank_S"):
            for part in getattr(layer, name).values():
                part.data.zero_()
    assert torch.equal(fresh(IDS).logits, quantized(llama(), 4, (1, 16))(IDS).logits)
    model = adapted(quantized(llama(), 4, (1, 16)), method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(llama(), 4, (1, 16)), tmp_path)
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert not torch.equal(model(IDS).logits, fresh(IDS).logits)
    model(IDS).logits.sum().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("anyrank_" in name for name in trained)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("method", "options", "tile"), FOLDABLE)
def test_a_merge_changes_no_logit_and_an_unmerge_brings_every_bit_back(method, options, tile, bits):
    model = adapted(quantized(llama(), bits, tile), method, foldable=True, **options)
    nested = model.peft_config["default"].nested
    before = {name: t.clone() for name, t in buffers(model).items()}
    for rank in range(1, model.peft_config["default"].rows + 1) if nested else [None]:
        if rank is not None:
            model.set_rank(rank)
        wanted = model(IDS).logits
        model.merge_adapter()
        changed = {n for n, t in buffers(model).items() if not torch.equal(t, before[n])}
        assert changed == {name for name in before if name.endswith(".offsets")}
        assert torch.equal(model(IDS).logits, wanted)
        model.unmerge_adapter()
        assert all(torch.equal(t, before[n]) for n, t in buffers(model).items())
    whole = model(IDS).logits
    merged = model.merge_and_unload()
    assert torch.equal(merged(IDS).logits, whole)
    assert not [name for name, _ in merged.named_parameters() if "anyrank_" in name]


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    model = adapted(quantized(llama(), 4, (1, 16)), "qalora", lora_dropout=0.5).eval()
    plain = adapted(quantized(llama(), 4, (1, 16)), "qalora")
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    layer, x = layers(model.train())[0], torch.randn(5, 64)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    dropped = layer.anyrank_dropout["default"](x)
    assert (dropped == 0).any()
    wanted = layers(plain)[0](x) + (dropped - x) @ layer.get_delta_weight("default").T
    assert torch.allclose(y, wanted, atol=1e-6)


def test_an_adapter_that_cannot_fold_is_added_beside_and_refuses_the_merge():
    model = adapted(quantized(llama(), 4, (1, 16)), "lora")
    base = quantized(llama(), 4, (1, 16))
    layer, plain = layers(model)[0], base.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64)
    wanted = plain(x) + x @ layer.get_delta_weight("default").T
    assert torch.allclose(layer(x), wanted, atol=1e-6)
    with pytest.raises(MergeError) as caught:
        model.merge_adapter()
    assert str(caught.value) == (
        "model.layers.0.self_attn.q_proj: its groups of 16 cannot take the adapter (pool=1 is no "
        "multiple of 16: use pool=16); keep the adapter beside the base (anyrank export), or load "
        "the base unquantized and merge there"
    )


@pytest.mark.parametrize(
    ("base", "method", "options", "text"),
    [
        (
            lambda: quantized(llama(), 4, (1, 32)),
            "qalora",
            {"pool": 16},
            "model.layers.0.self_attn.q_proj: not foldable: its groups of 32 cannot take the "
            "adapter (pool=16 is no multiple of 32: use pool=32); train on the output of anyrank "
            "quantize with a geometry that fits its groups, or leave foldable out",
        ),
        (
            lambda: quantized(llama(), 4, (8, 4)),
            "qablora",
            {"pool": 2, "repeat": 4},
            "model.layers.0.self_attn.q_proj: not foldable: its tiles of 8x4 cannot take the "
            "adapter (pool=2 is no multiple of 4: use pool=4; repeat=4 is no multiple of 8: use "
            "repeat=8); train on the output of anyrank quantize with a geometry that fits its "
            "groups, or leave foldable out",
        ),
        (
            llama,
            "qalora",
            {},
            "model.layers.0.self_attn.q_proj: not foldable: a float weight has no codes; train on "
            "the output of anyrank quantize with a geometry that fits its groups, or leave "
            "foldable out",
        ),
    ],
)
def test_foldable_is_checked_before_the_first_layer_is_replaced(base, method, options, text):
    model = base()
    with pytest.raises(MergeError) as caught:
        adapted(model, method, foldable=True, **options)
    assert str(caught.value) == text
    assert not layers(model)


@pytest.mark.parametrize(
    ("tile", "p", "q", "folds"),
    [
        ((1, 32), 32, 1, True),
        ((1, 32), 64, 2, True),
        ((1, 32), 4, 8, False),
        ((1, 32), 2, 2, False),
        ((8, 4), 4, 8, True),
        ((8, 4), 8, 16, True),
        ((8, 4), 32, 1, False),
        ((8, 4), 4, 4, False),
    ],
)
def test_an_update_folds_when_every_tile_lies_inside_one_of_its_own(tile, p, q, folds):
    """The condition against the definition: every tile of W sees one value of the update."""
    d_in, d_out = 128, 64
    assert (tile_obstacle(tile, p, q, d_in, d_out) is None) == folds
    blocks = torch.arange(d_out // q * (d_in // p)).view(d_out // q, d_in // p)
    update = blocks.repeat_interleave(q, 0).repeat_interleave(p, 1)
    tiles = update.view(d_out // tile[0], tile[0], d_in // tile[1], tile[1])
    assert bool((tiles.amin((1, 3)) == tiles.amax((1, 3))).all()) == folds


@pytest.mark.parametrize(
    ("form", "shape", "text"),
    [
        (
            AffineFormat(4, (1, 32)),
            (64, 48),
            "mlp.up_proj: groups of 32 columns must divide d_in=48; choose another --group_size "
            "or --tile, or keep the layer in its precision with --keep up_proj",
        ),
        (
            AffineFormat(4, (8, 4)),
            (36, 48),
            "mlp.up_proj: groups of 8 rows must divide d_out=36; choose another --group_size "
            "or --tile, or keep the layer in its precision with --keep up_proj",
        ),
        (
            AffineFormat(3, (8, 4)),
            (64, 36),
            "mlp.up_proj: d_in=36 must be a multiple of 8, so that codes fill whole bytes; keep "
            "the layer in its precision with --keep up_proj",
        ),
    ],
)
def test_a_weight_that_does_not_fit_the_format_is_named(form, shape, text):
    with pytest.raises(GeometryError) as caught:
        check_format(form, shape[1], shape[0], "mlp.up_proj")
    assert str(caught.value) == text


def test_a_configuration_says_whether_it_must_fold():
    assert config("qalora").foldable is False
    assert config("qalora", foldable=True).foldable is True

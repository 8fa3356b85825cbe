"""GPTQ and AWQ checkpoints: the same weights, bit for bit."""

import json

import pytest
import torch
from packed_folders import GROUP, change, checkpoint
from tiny import llama
from transformers import AutoModelForCausalLM

from anyrank.errors import ConfigError, LayerError, RunError
from anyrank.kernels import unpack
from anyrank.quant.affine import AffineLinear
from anyrank.quant.checkpoint import QuantizedModel
from anyrank.quantize.model import quantize_model

KINDS = [
    ("gptq", 2, {}),
    ("gptq", 3, {}),
    ("gptq", 4, {}),
    ("gptq", 8, {}),
    ("gptq", 3, {"checkpoint_format": "gptq_v2"}),
    ("gptq", 4, {"checkpoint_format": "gptq_v2"}),
    ("awq", 4, {"version": "gemm", "zero_point": True}),
]


@pytest.mark.parametrize(("kind", "bits", "fields"), KINDS)
def test_every_weight_is_reproduced_bit_for_bit(kind, bits, fields, tmp_path):
    base, weights = checkpoint(tmp_path / "base", kind, bits, **fields)
    out = quantize_model(base, tmp_path / "out")
    model = QuantizedModel.open(out)
    assert sorted(model.layers) == sorted(weights)
    assert (model.form.bits, model.form.tile) == (bits, (1, GROUP))
    assert model.form.dtype == torch.float32  # scale * zero does not fit into fp16
    for layer, affine in model.weights():
        codes, exact = weights[layer]
        assert torch.equal(unpack(affine.codes, bits).long(), codes), layer
        assert torch.equal(affine.weight().double(), exact), layer
    report = json.loads((out / "quantize.json").read_text())
    assert report["relative_error"] == 0.0
    assert report["taken_over"] is True
    assert report["quantizer"] == kind


def test_the_result_loads_and_computes(tmp_path):
    base, weights = checkpoint(tmp_path / "base", "gptq")
    out = quantize_model(base, tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    dense = llama()
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, (_, exact) in weights.items():
        assert isinstance(model.get_submodule(name), AffineLinear)
        state[f"{name}.weight"] = exact.float()
    dense.load_state_dict({name: state[name] for name in dense.state_dict()})
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(("kind", "bits"), [("gptq", 4), ("gptq", 3), ("awq", 4)])
def test_symmetric_zeros_need_no_more_than_the_precision_of_the_scales(kind, bits, tmp_path):
    base, weights = checkpoint(tmp_path / "base", kind, bits, symmetric=True)
    model = QuantizedModel.open(quantize_model(base, tmp_path / "out"))
    assert model.form.dtype == torch.float16
    for layer, affine in model.weights():
        assert torch.equal(affine.weight().double(), weights[layer][1])


def test_a_narrower_storage_is_taken_when_asked_for_and_its_rounding_is_reported(tmp_path):
    base, weights = checkpoint(tmp_path / "base", "gptq")
    out = quantize_model(base, tmp_path / "out", dtype=torch.float16)
    lost = whole = 0.0
    for layer, affine in QuantizedModel.open(out).weights():
        codes, exact = weights[layer]
        assert torch.equal(unpack(affine.codes, 4).long(), codes)
        lost += float((affine.weight().double() - exact).square().sum())
        whole += float(exact.square().sum())
    report = json.loads((out / "quantize.json").read_text())
    assert report["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert 0 < report["relative_error"] < 1e-3


def test_groups_of_a_whole_row_become_smaller_ones(tmp_path):
    """Rows of 64 and of 96 share groups of 32."""
    base, weights = checkpoint(tmp_path / "base", "gptq", group=-1)
    model = QuantizedModel.open(quantize_model(base, tmp_path / "out"))
    assert model.form.tile == (1, 32)
    for layer, affine in model.weights():
        assert torch.equal(affine.weight().double(), weights[layer][1])


def test_smaller_groups_can_be_asked_for(tmp_path):
    base, weights = checkpoint(tmp_path / "base", "awq")
    model = QuantizedModel.open(quantize_model(base, tmp_path / "out", bits=4, tile=(1, 16)))
    assert model.form.tile == (1, 16)
    for layer, affine in model.weights():
        assert torch.equal(affine.weight().double(), weights[layer][1])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bits": 3}, "bits=3 in 1x32 needs the float model"),
        ({"tile": (1, 64)}, "bits=4 in 1x64 needs the float model"),
        ({"tile": (8, 4)}, "bits=4 in 8x4 needs the float model"),
    ],
)
def test_another_format_needs_the_float_model(options, wanted, tmp_path):
    base, _ = checkpoint(tmp_path / "base", "gptq")
    with pytest.raises(ConfigError) as caught:
        quantize_model(base, tmp_path / "out", **options)
    assert str(caught.value) == (
        f"{base}: holds gptq codes of 4 bits in groups of 32, which are taken over as they are; "
        f"{wanted}"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"quantizer": "half_quadratic"}, "quantizer=half_quadratic needs the float model"),
        ({"keep": ["q_proj", "up_proj"]}, "keep=q_proj,up_proj needs the float model"),
    ],
)
def test_options_that_choose_codes_need_the_float_model(options, wanted, tmp_path):
    base, _ = checkpoint(tmp_path / "base", "awq")
    with pytest.raises(ConfigError) as caught:
        quantize_model(base, tmp_path / "out", **options)
    assert str(caught.value) == (
        f"{base}: holds awq codes, which are taken over as they are; {wanted}"
    )


UP = "model__layers__1__mlp__up_proj__"


def test_shuffled_groups_are_refused(tmp_path):
    base, _ = checkpoint(tmp_path / "base", "gptq", desc_act=True)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // GROUP
    change(base, **{f"{UP}g_idx": shuffled.int()})
    with pytest.raises(ConfigError) as caught:
        quantize_model(base, tmp_path / "out")
    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj: its groups are shuffled by act-order (desc_act), which no "
        "tile can hold; take a checkpoint without act-order, or quantize the float model"
    )
    change(base, **{f"{UP}g_idx": None})
    with pytest.raises(ConfigError, match="up_proj: its groups are shuffled"):
        quantize_model(base, tmp_path / "out")


def test_desc_act_with_groups_in_order_is_taken_over(tmp_path):
    base, _ = checkpoint(tmp_path / "base", "gptq", desc_act=True)
    assert len(QuantizedModel.open(quantize_model(base, tmp_path / "out")).layers) == 14


def test_a_zero_of_0_comes_back(tmp_path):
    """Version 1 stores it as the largest code."""
    base, weights = checkpoint(tmp_path / "base", "gptq")
    assert any((exact[:, :GROUP] >= 0).all(1).any() for _, exact in weights.values())
    model = QuantizedModel.open(quantize_model(base, tmp_path / "out"))
    assert all(torch.equal(a.weight().double(), weights[n][1]) for n, a in model.weights())


def test_biases_of_zeros_that_the_model_lacks_are_dropped(tmp_path):
    base, _ = checkpoint(tmp_path / "base", "gptq")
    change(base, **{f"{UP}bias": torch.zeros(96, dtype=torch.float16)})
    out = quantize_model(base, tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.bias" not in QuantizedModel.open(out).files
    change(base, **{f"{UP}bias": torch.ones(96, dtype=torch.float16)})
    with pytest.raises(RunError) as caught:
        quantize_model(base, tmp_path / "again")
    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj.bias: the model has no such bias, and it is not zero"
    )


def test_layers_that_stayed_float_stay(tmp_path):
    base, _ = checkpoint(tmp_path / "base", "awq")
    weight = torch.randn(96, 64).half()
    gone = {f"{UP}{part}": None for part in ("qweight", "qzeros", "scales")}
    change(base, **gone, **{f"{UP}weight": weight})
    out = quantize_model(base, tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, weight)


@pytest.mark.parametrize(
    ("tensors", "kind", "text"),
    [
        (
            {f"{UP}qzeros": None},
            RunError,
            "model.layers.1.mlp.up_proj.qzeros is missing; gptq with 4 bits and group_size=32 has "
            "[2, 12]",
        ),
        (
            {f"{UP}scales": torch.ones(1, 96, dtype=torch.float16)},
            RunError,
            "model.layers.1.mlp.up_proj.scales is [1, 96]; gptq with 4 bits and group_size=32 has "
            "[2, 96]",
        ),
        (
            {"model__odd__qweight": torch.zeros(8, 8, dtype=torch.int32)},
            LayerError,
            "model.odd: LlamaForCausalLM has no torch.nn.Linear of this name, so its gptq codes "
            "cannot be taken over; quantize the float model",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tensors, kind, text, tmp_path):
    base, _ = checkpoint(tmp_path / "base", "gptq")
    change(base, **tensors)
    with pytest.raises(kind) as caught:
        quantize_model(base, tmp_path / "out")
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (
            "gptq",
            {"bits": 5},
            "gptq codes of 5 bits; those of 2 or 3 or 4 or 8 bits can be taken over",
        ),
        ("awq", {"bits": 3}, "awq codes of 3 bits; those of 4 bits can be taken over"),
        ("awq", {"version": "GEMV"}, "awq weights in the layout gemv; gemm can be taken over"),
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            "gptq weights in the layout marlin; gptq or gptq_v2 can be taken over",
        ),
    ],
)
def test_a_layout_that_is_not_known_is_refused(kind, fields, text, tmp_path):
    base, _ = checkpoint(tmp_path / "base", kind)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] |= fields
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        quantize_model(base, tmp_path / "out")
    assert str(caught.value) == f"{base}: {text}"


def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path):
    base, _ = checkpoint(tmp_path / "base", "gptq")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["group_size"] = 48
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"qzeros is \[3, 8\]; gptq with 4 bits and group_size=48"):
        quantize_model(base, tmp_path / "out")

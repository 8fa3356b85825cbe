"""torchao: the codes are the trained ones, and its tensor classes answer like torch."""

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
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyrank.errors import ConfigError, GeometryError, MissingPackageError
from anyrank.export import folder as shared
from anyrank.export.torchao import export_torchao, load_int4_cpu, scale_and_zero, tile_packed
from anyrank.kernels import Affine, AffineFormat, unpack
from anyrank.quantize.minmax import minmax

LAYER = "model.layers.1.mlp.down_proj"


def header(path) -> dict[str, str]:
    with safe_open(str(path), "pt") as tensors:
        return tensors.metadata()


@pytest.mark.parametrize(
    ("bits", "tile"),
    [
        (2, (1, 32)),
        (3, (1, 64)),
        (4, (1, 32)),
        (4, (1, 16)),
        (4, (8, 4)),
        (7, (1, 32)),
        (8, (1, 64)),
    ],
)
def test_codes_scales_and_offsets_are_those_that_were_trained(tmp_path, monkeypatch, bits, tile):
    hide(monkeypatch, "torchao")
    source = quantized_folder(tmp_path / "base", bits, tile)
    out = export_torchao(source, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    half, constant = 2 ** (bits - 1), 0
    for layer, weight in trained(source).items():
        q, own, zero = (tensors[f"{layer}._weight_{x}"] for x in ("qdata", "scale", "zero_point"))
        assert (q.dtype, own.dtype, zero.dtype) == (torch.int8, torch.float32, torch.float32)
        assert own.shape == zero.shape == weight.scales.shape
        code, scale, _ = per_weight(weight)
        live = weight.scales != 0
        everywhere = scale != 0
        constant += int((~everywhere).sum())
        assert (q.double() + half)[everywhere].equal(code[everywhere])
        assert own[live].equal(weight.scales[live].float())
        wanted = -weight.offsets[live].double() / weight.scales[live].double() - half
        assert zero[live].equal(wanted.float())
        assert q[~everywhere].eq(0).all()
        assert own[~live].eq(1).all()
        assert zero[~live].equal(-weight.offsets[~live].float())
        _, each, less = per_weight(Affine(weight.codes, own, zero, weight.form))
        error = (q.double() - less) * each - exact(weight)
        assert (error.abs() <= quotient_bound(weight, half)).all()
    assert constant == tile[0] * tile[1]


def test_the_header_names_class_and_settings(tmp_path):
    source = quantized_folder(tmp_path / "base", 3, (8, 4))
    out = export_torchao(source, tmp_path / "out")
    tensors, meta = load_file(out / "model.safetensors"), header(out / "model.safetensors")
    assert json.loads(meta[f"{LAYER}.weight"]) == {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": {"_type": "torch.dtype", "_data": "int3"},
            "block_size": [8, 4],
            "dtype": {"_type": "torch.dtype", "_data": "float32"},
            "activation_quantization": None,
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }
    assert json.loads(meta["lm_head.weight"]) == {"_type": "Tensor"}
    named = {name for name in tensors if "._weight_" not in name}
    named |= {f"{layer}.weight" for layer in trained(source)}
    assert set(json.loads(meta["tensor_names"])) == named
    assert set(meta) == named | {"tensor_names", "format"}


def test_everything_else_is_copied(tmp_path):
    source = quantized_folder(tmp_path / "base", model="qwen2")
    out = export_torchao(source, tmp_path / "out")
    stored = load_file(source / "model.safetensors")
    tensors = load_file(out / "model.safetensors")
    kept = [
        name for name in stored if name.rpartition(".")[2] not in ("codes", "scales", "offsets")
    ]
    assert all(tensors[name].equal(stored[name]) for name in kept)
    assert "model.layers.0.self_attn.q_proj.bias" in kept
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    assert config["dtype"] == "float32"
    assert quantization["quant_method"] == "torchao"
    assert quantization["modules_to_not_convert"] == ["lm_head"]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_every_shard_has_the_whole_header(tmp_path, monkeypatch):
    source = quantized_folder(tmp_path / "base")
    whole = export_torchao(source, tmp_path / "one") / "model.safetensors"
    monkeypatch.setattr(shared, "SHARD_BYTES", 50_000)
    out = export_torchao(source, tmp_path / "many")
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(header(path) == header(whole) for path in files)


def test_a_variant_brings_its_own_zeros(tmp_path):
    source = quantized_folder(tmp_path / "base")
    add_variant(source, "rank8")
    default = load_file(export_torchao(source, tmp_path / "default") / "model.safetensors")
    out = export_torchao(source, tmp_path / "other", variant="rank8")
    other = load_file(out / "model.safetensors")
    changed = {key for key in default if not default[key].equal(other[key])}
    assert changed == {f"{layer}._weight_zero_point" for layer in trained(source)}


def from_tensor_cores(packed: Tensor, d_out: int, d_in: int) -> Tensor:
    """Undo `_convert_weight_to_int4pack`, walking its threads as native/cuda/int4mm.cu does.

    One thread (lane) packs eight codes of one row into a word: from two 16-wide tiles of inputs the
    elements 2c, 2c + 1, 2c + 8 and 2c + 9, with the even ones in the low half of the word.
    """
    codes = torch.full((d_out, d_in), -1)
    words = packed.tolist()
    for n, of_n in enumerate(words):
        for k, of_k in enumerate(of_n):
            for lane, of_lane in enumerate(of_k):
                for pair, word in enumerate(of_lane):
                    first = (k * 8 + 2 * pair) * 16 + lane % 4 * 2
                    inputs = [first + tile + step for tile in (0, 16) for step in (0, 1, 8, 9)]
                    order = (0, 2, 4, 6, 1, 3, 5, 7)
                    row = n * 8 + lane // 4
                    for nibble, which in enumerate(order):
                        if row < d_out and inputs[which] < d_in:
                            codes[row, inputs[which]] = word >> (4 * nibble) & 15
    return codes


@pytest.mark.parametrize(("d_out", "d_in"), [(16, 1024), (12, 160)])
def test_the_layout_of_tensor_cores(d_out, d_in):
    torch.manual_seed(0)
    weight = minmax(torch.randn(d_out, d_in) * 0.02, AffineFormat(4, (1, 32)))
    found = tile_packed(weight)
    n, k = -(-d_out // 8), -(-d_in // 1024) * 8
    assert found["qdata"].shape == (n, k, 32, 4)
    assert found["qdata"].dtype == torch.int32
    codes = from_tensor_cores(found["qdata"], d_out, d_in)
    assert codes.equal(unpack(weight.codes, 4).long())
    both = found["scale_and_zero"]
    assert both.shape == (k * 128 // 32, n * 8, 2)
    assert both.dtype == torch.bfloat16
    inside = both[: d_in // 32, :d_out]
    assert inside[..., 0].T.equal(weight.scales.bfloat16())
    zero = weight.offsets.double() + 8 * weight.scales.double()
    assert inside[..., 1].T.equal(zero.bfloat16())
    assert both[d_in // 32 :].eq(0).all()
    assert both[:, d_out:].eq(0).all()


def test_a_folder_for_cuda(tmp_path, monkeypatch):
    hide(monkeypatch, "torchao")
    source = quantized_folder(tmp_path / "base", tile=(8, 64))
    out = export_torchao(source, tmp_path / "out", target="cuda")
    tensors, meta = load_file(out / "model.safetensors"), header(out / "model.safetensors")
    assert json.loads(meta[f"{LAYER}.weight"]) == {
        "_type": "Int4TilePackedTo4dTensor",
        "_data": {"block_size": [1, 64], "shape": [64, 128]},
        "_tensor_data_names": ["qdata", "scale_and_zero"],
    }
    weight = trained(source)[LAYER]
    codes = from_tensor_cores(tensors[f"{LAYER}._weight_qdata"], 64, 128)
    assert codes.equal(unpack(weight.codes, 4).long())
    scales = tensors[f"{LAYER}._weight_scale_and_zero"][:2, :64, 0].T
    assert scales[::8].equal(weight.scales.bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("bits", "tile", "form"),
    [
        (3, (1, 32), "3 bits in groups of 32"),
        (4, (1, 16), "4 bits in groups of 16"),
        (4, (8, 4), "4 bits in tiles of 8x4"),
    ],
)
def test_a_format_that_the_4_bit_kernels_lack_is_refused(tmp_path, bits, tile, form):
    source = quantized_folder(tmp_path / "base", bits, tile)
    with pytest.raises(GeometryError) as caught:
        export_torchao(source, tmp_path / "out", target="cuda")
    assert str(caught.value) == (
        f"{next(iter(trained(source)))}: {form} do not fit torchao's 4-bit kernels, which hold 4 "
        "bits in groups of 32, 64, 128 or 256; quantize with --bits 4 and such a --group_size, or "
        "export with target='any'"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_unknown_target_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        export_torchao(tmp_path, tmp_path / "out", target="cud")
    assert str(caught.value) == "target=cud is unknown; did you mean cuda?"


def test_loading_without_torchao_says_what_to_install(tmp_path, monkeypatch):
    hide(monkeypatch, "torchao")
    with pytest.raises(MissingPackageError) as caught:
        load_int4_cpu(tmp_path)
    assert str(caught.value) == "torchao is not installed; pip install 'anyrank[torchao]'"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("model", "bits", "tile"),
    [
        *((model, 4, (1, 32)) for model in MODELS),
        *(("llama", bits, (1, 64)) for bits in (2, 3, 5, 6, 7, 8)),
        ("llama", 4, (8, 4)),
    ],
)
def test_transformers_answers_like_torch(tmp_path, monkeypatch, model, bits, tile):
    pytest.importorskip("torchao")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    source = quantized_folder(tmp_path / "base", bits, tile, model)
    monkeypatch.setattr(shared, "SHARD_BYTES", 100_000)
    out = export_torchao(source, tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(source)
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    ids = torch.randint(5, 290, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(ids).logits
        assert kl(wanted, loaded(ids).logits) < 1e-10
    meta = header(next(out.glob("*.safetensors")))
    for layer, weight in trained(source).items():
        tensor = loaded.get_submodule(layer).weight.data
        assert type(tensor).__name__ == "IntxUnpackedToInt8Tensor"
        error = tensor.dequantize().double() - exact(weight)
        assert (error.abs() <= quotient_bound(weight, 2 ** (bits - 1))).all()
        # torchao writes what it read
        again, described = flatten_tensor_state_dict({f"{layer}.weight": tensor})
        assert json.loads(described[f"{layer}.weight"]) == json.loads(meta[f"{layer}.weight"])
        stored = {
            key: value
            for path in out.glob("*.safetensors")
            for key, value in load_file(path).items()
        }
        assert all(stored[name].equal(value) for name, value in again.items())
    prompt = AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt").input_ids
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 2}
    assert loaded.generate(prompt, **options).equal(reference.generate(prompt, **options))
    with torch.no_grad():
        assert kl(wanted, loaded.to(torch.bfloat16)(ids).logits) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model", MODELS)
def test_the_4_bit_cpu_kernel_answers_like_torch(tmp_path, model):
    pytest.importorskip("torchao")
    source = quantized_folder(tmp_path / "base", 4, (1, 32), model)
    add_variant(source, "rank8")
    ids = torch.randint(5, 290, (2, 48), generator=torch.Generator().manual_seed(0))
    for variant in (None, "rank8"):
        reference = AutoModelForCausalLM.from_pretrained(source, variant=variant)
        loaded = load_int4_cpu(source, variant=variant)
        with torch.no_grad():
            assert kl(reference(ids).logits, loaded(ids).logits) < 1e-10
        assert type(loaded.get_submodule(LAYER).weight).__name__ == "Int4OpaqueTensor"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformers_reads_the_folder_for_cuda(tmp_path):
    pytest.importorskip("torchao")
    source = quantized_folder(tmp_path / "base")
    out = export_torchao(source, tmp_path / "out", target="cuda")
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    for layer, weight in trained(source).items():
        tensor, wanted = loaded.get_submodule(layer).weight.data, tile_packed(weight)
        assert type(tensor).__name__ == "Int4TilePackedTo4dTensor"
        assert tensor.shape == weight.weight().shape
        assert tensor.block_size == [1, 32]
        assert tensor.qdata.equal(wanted["qdata"])
        assert tensor.scale_and_zero.equal(wanted["scale_and_zero"])


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_tensor_cores_read_the_layout_and_answer_like_torch(tmp_path):
    pytest.importorskip("torchao")
    source = quantized_folder(tmp_path / "base")
    out = export_torchao(source, tmp_path / "out", target="cuda")
    weight = trained(source)[LAYER]
    codes = unpack(weight.codes, 4)
    padded = torch.nn.functional.pad(codes, (0, 1024 - codes.shape[1])).cuda()
    pairs = (padded[:, ::2] << 4 | padded[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8).cpu()
    assert packed.equal(tile_packed(weight)["qdata"])
    loaded = AutoModelForCausalLM.from_pretrained(out, device_map="cuda")
    inputs = torch.eye(codes.shape[1], dtype=torch.bfloat16, device="cuda")
    found = loaded.get_submodule(LAYER)(inputs).T.cpu().double()
    scale, zero = (
        values.T.double().repeat_interleave(32, 1)
        for values in scale_and_zero(weight, torch.bfloat16).unbind(-1)
    )
    wanted = (codes.double() - 8) * scale + zero
    assert (
        (found - wanted).abs()
        <= 2.0**-8 * ((codes.double() - 8) * scale).abs() + 2.0**-8 * wanted.abs()
    ).all()
    ids = torch.randint(5, 290, (2, 48), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        logits = loaded(ids.cuda()).logits.cpu()
        assert kl(reference(ids).logits, logits) < 1e-3

"""MLX: the bytes are the trained ones, and mlx-lm answers like torch."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from quantized_folders import (
    LLAMA3,
    MODELS,
    PROMPT,
    add_variant,
    hide,
    kl,
    quantized_folder,
    trained,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anyrank.errors import ConfigError, GeometryError, RunError
from anyrank.export import folder as shared
from anyrank.export.mlx import export_mlx
from anyrank.kernels import Affine, AffineFormat, unpack

Q_PROJ = "model.layers.0.self_attn.q_proj"


def weight_of(tensors: dict[str, torch.Tensor], layer: str, bits: int) -> Affine:
    """A layer of an export, read as MLX describes it: words of 32 bits, little end first."""
    words = tensors[f"{layer}.weight"]
    assert words.dtype == torch.uint32
    scales, biases = tensors[f"{layer}.scales"], tensors[f"{layer}.biases"]
    d_in = words.shape[1] * 32 // bits
    form = AffineFormat(bits, (1, d_in // scales.shape[1]), scales.dtype)
    return Affine(words.view(torch.uint8), scales, biases, form)


@pytest.mark.parametrize(
    ("bits", "tile", "group"),
    [
        (2, (1, 32), 32),
        (3, (1, 32), 32),
        (4, (1, 32), 32),
        (4, (1, 64), 64),
        (5, (1, 32), 32),
        (6, (1, 64), 64),
        (8, (1, 32), 32),
        (4, (8, 32), 32),
    ],
)
def test_codes_scales_and_offsets_are_those_that_were_trained(
    tmp_path, monkeypatch, bits, tile, group
):
    hide(monkeypatch, "mlx")
    source = quantized_folder(tmp_path / "base", bits, tile)
    out = export_mlx(source, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    layers = trained(source)
    assert len(layers) == 14
    for layer, weight in layers.items():
        found = weight_of(tensors, layer, bits)
        assert found.form == AffineFormat(bits, (1, group))
        assert unpack(found.codes, bits).equal(unpack(weight.codes, bits))
        assert found.scales[:: tile[0]].equal(weight.scales)
        assert found.offsets[:: tile[0]].equal(weight.offsets)
        assert found.weight().equal(weight.weight())
    others = load_file(source / "model.safetensors")
    kept = [name for name in others if name.rpartition(".")[0] not in layers]
    assert set(tensors) == {
        *kept,
        *(f"{layer}.{part}" for layer in layers for part in ("weight", "scales", "biases")),
    }
    assert all(tensors[name].equal(others[name].half()) for name in kept)


@pytest.mark.parametrize("model", MODELS)
def test_the_configuration_speaks_to_mlx_lm(tmp_path, model):
    source = quantized_folder(tmp_path / "base", model=model)
    config = json.loads((export_mlx(source, tmp_path / "out") / "config.json").read_text())
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert config["quantization"] == config["quantization_config"] == quantization
    assert config["dtype"] == "float16"
    rope = MODELS[model].rope_parameters
    assert config["rope_theta"] == rope["rope_theta"] not in (10000.0, 1000000.0)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert config["rope_scaling"] == (scaling if model == "llama" else None)
    assert config["tie_word_embeddings"] is (model == "qwen2")


def test_a_configuration_from_before_transformers_5_keeps_its_rope(tmp_path):
    source = quantized_folder(tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    made = json.loads((export_mlx(source, tmp_path / "out") / "config.json").read_text())
    assert made["rope_theta"] == 7.0
    assert "rope_scaling" not in made


def test_side_files_are_copied_and_the_origin_is_named(tmp_path):
    source = quantized_folder(tmp_path / "base")
    out = export_mlx(source, tmp_path / "out")
    copied = ["chat_template.jinja", "generation_config.json"]
    copied += ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*copied, "anyrank.json", "config.json", "model.safetensors"]
    )
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    origin = json.loads((out / "anyrank.json").read_text())
    del origin["anyrank"]
    assert origin == {
        "exported": "mlx",
        "variant": None,
        "bits": 4,
        "tile": [1, 32],
        "storage_dtype": "float16",
        "quantizer": "minmax",
    }


def test_other_tensors_in_the_asked_precision(tmp_path):
    source = quantized_folder(tmp_path / "base")
    out = export_mlx(source, tmp_path / "out", dtype=torch.float32)
    tensors, stored = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert tensors["lm_head.weight"].equal(stored["lm_head.weight"])
    assert tensors["lm_head.weight"].dtype == torch.float32
    assert tensors[f"{Q_PROJ}.biases"].equal(stored[f"{Q_PROJ}.offsets"])


def test_shards_hold_what_one_file_would(tmp_path, monkeypatch):
    source = quantized_folder(tmp_path / "base")
    whole = load_file(export_mlx(source, tmp_path / "one") / "model.safetensors")
    monkeypatch.setattr(shared, "SHARD_BYTES", 50_000)
    out = export_mlx(source, tmp_path / "many")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    parts = {name: load_file(out / name) for name in files}
    assert index["weight_map"] == {key: name for name in files for key in parts[name]}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(sum(t.nbytes for t in part.values()) <= 50_000 for part in parts.values())
    merged = {key: value for part in parts.values() for key, value in part.items()}
    assert set(merged) == set(whole)
    assert all(merged[key].equal(value) for key, value in whole.items())


def test_a_variant_brings_its_own_offsets(tmp_path):
    source = quantized_folder(tmp_path / "base")
    add_variant(source, "rank8")
    default = load_file(export_mlx(source, tmp_path / "default") / "model.safetensors")
    other = load_file(export_mlx(source, tmp_path / "o", variant="rank8") / "model.safetensors")
    changed = {key for key in default if not default[key].equal(other[key])}
    assert changed == {f"{layer}.biases" for layer in trained(source)}
    weight = trained(source, "rank8")[Q_PROJ]
    assert other[f"{Q_PROJ}.biases"].equal(weight.offsets)


@pytest.mark.parametrize(
    ("bits", "tile", "form"),
    [
        (4, (8, 4), "4 bits in tiles of 8x4"),
        (4, (1, 16), "4 bits in groups of 16"),
        (7, (1, 32), "7 bits in groups of 32"),
    ],
)
def test_a_format_that_mlx_lacks_is_refused(tmp_path, bits, tile, form):
    source = quantized_folder(tmp_path / "base", bits, tile)
    with pytest.raises(GeometryError) as caught:
        export_mlx(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{next(iter(trained(source)))}: {form} do not fit MLX, which holds 2, 3, 4, 5, 6 or 8 "
        "bits in groups of 32, 64 or 128; quantize with such a --bits and --group_size, or export "
        "to torchao, which holds any"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_model_whose_names_nobody_checked_is_refused(tmp_path):
    source = quantized_folder(tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ConfigError) as caught:
        export_mlx(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{source}: model_type gpt2 is none of llama, mistral, qwen2, qwen3, whose names and "
        "configuration are known to agree with mlx-lm; export to hqq or torchao"
    )


def rewrite(source: Path, **changed: torch.Tensor | None) -> None:
    tensors = load_file(source / "model.safetensors") | changed
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})


def test_a_value_beyond_float16_is_refused(tmp_path):
    source = quantized_folder(tmp_path / "base")
    rewrite(source, **{"model.norm.weight": torch.full((64,), 1e5)})
    with pytest.raises(ConfigError) as caught:
        export_mlx(source, tmp_path / "out")
    assert str(caught.value) == (
        "model.norm.weight: its values reach 1e+05, more than float16 holds; "
        "export with dtype=torch.float32"
    )
    export_mlx(source, tmp_path / "out", dtype=torch.float32)


def test_a_broken_layer_is_named_before_anything_is_written(tmp_path):
    source = quantized_folder(tmp_path / "base")
    rewrite(source, **{f"{Q_PROJ}.scales": None})
    with pytest.raises(RunError) as caught:
        export_mlx(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{source}: {Q_PROJ}.scales is missing, but its codes need (64, 2); "
        "quantize or fold the model again"
    )
    rewrite(source, **{f"{Q_PROJ}.scales": torch.zeros(64, 4).half()})
    with pytest.raises(RunError, match=r"q_proj.scales is \(64, 4\), but its codes need \(64, 2\)"):
        export_mlx(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_filled_folder_is_refused(tmp_path):
    source = quantized_folder(tmp_path / "base")
    with pytest.raises(RunError, match="exists already; name another folder"):
        export_mlx(source, source)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    source = quantized_folder(tmp_path / "base")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared, "save_file", full)
    with pytest.raises(RunError) as caught:
        export_mlx(source, tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: the disk is full, nothing was written; free some room, or name a "
        "folder on another disk"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("model", "bits", "tile"),
    [*((model, 4, (1, 32)) for model in MODELS), *(("llama", b, (1, 64)) for b in (2, 3, 5, 6, 8))],
)
def test_mlx_lm_answers_like_torch(tmp_path, model, bits, tile):
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    source = quantized_folder(tmp_path / "base", bits, tile, model)
    reference = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.randint(5, 290, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(ids).logits
    for dtype, bound in ((torch.float32, 1e-10), (None, 1e-6)):
        out = export_mlx(source, tmp_path / str(dtype), dtype=dtype)
        loaded, tokenizer = mlx_lm.load(str(out))
        logits = loaded(mx.array(ids.tolist())).astype(mx.float32)
        assert kl(wanted, torch.tensor(logits.tolist())) < bound
    assert (dtype, logits.dtype) == (None, mx.float32)
    modules = dict(loaded.named_modules())
    for layer, weight in trained(source).items():
        at = modules[layer]
        scales, biases = at.scales.astype(mx.float32), at.biases.astype(mx.float32)
        found = mx.dequantize(at.weight, scales, biases, at.group_size, at.bits)
        assert torch.tensor(found.tolist()).equal(weight.weight())
    assert type(modules["model.embed_tokens"]).__name__ == "Embedding"
    assert_same_text(mlx_lm, tmp_path, reference, tokenizer)


def assert_same_text(mlx_lm, tmp_path, reference, tokenizer) -> None:
    """The float32 export writes the same greedy text; the tokenizer has its chat template."""
    loaded, _ = mlx_lm.load(str(tmp_path / "torch.float32"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )
    ids = torch.tensor([prompt])
    answer = reference.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=2)
    tokens = [
        response.token
        for response in mlx_lm.stream_generate(loaded, tokenizer, prompt, max_tokens=8)
    ]
    assert tokens == answer[0, len(prompt) :].tolist()

"""A quantized model as GGUF: its own numbers bit for bit, under llama.cpp's names and in its order.

The reader is the `gguf` package of llama.cpp. llama.cpp itself reads the files in test_llama_cpp.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import dequantized, model, read, rewrite, save, small
from safetensors.torch import load_file, save_file

from anyrank.errors import ConfigError
from anyrank.export.gguf import export_gguf
from anyrank.kernels import AffineFormat
from anyrank.quant.checkpoint import QuantizedModel

KINDS = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# what a kind has beside the layers: biases, norms of heads, a head size of its own
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 64, "tie_word_embeddings": True},
}


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2 i + s of a head of d rows is row s d/2 + i: written as it is said, row by row."""
    size = len(rows) // heads
    order = []
    for row in range(len(rows)):
        head, (i, s) = row // size, divmod(row % size, 2)
        order.append(head * size + s * size // 2 + i)
    return rows[order]


def in_order(kind: str, layer: str, rows: torch.Tensor, config: Any) -> torch.Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = layer.rpartition(".")[2]
    rotated = kind in ("llama", "mistral") and part in heads
    return interleaved(rows, heads[part]) if rotated else rows


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def check_weights(kind: str, saved: Path, path: Path, config: Any, block: str) -> None:
    """Every quantized layer, dequantized by the gguf package, is the trained weight."""
    _, tensors = read(path)
    source = QuantizedModel.open(saved)
    assert len(source.layers) == 7 * config.num_hidden_layers
    for layer, weight in source.weights():
        _, _, number, part = layer.split(".", 3)
        tensor = tensors[f"blk.{number}.{LAYERS[part]}.weight"]
        assert tensor.tensor_type.name == block
        assert same_bits(dequantized(tensor), in_order(kind, layer, weight.weight(), config))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_the_trained_weights_norms_and_biases(kind, tmp_path):
    made = save(tmp_path / "model", model(kind, **OPTIONS[kind]))
    path = export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert path == tmp_path / "out.gguf"
    check_weights(kind, tmp_path / "model", path, made.config, "Q4_1")
    _, tensors = read(path)
    floats = {name: p.data for name, p in made.named_parameters()}
    renamed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inside = LAYERS | {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    for name, values in floats.items():
        layer, _, part = name.rpartition(".")
        if layer in renamed:
            tensor = tensors.pop(f"{renamed[layer]}.{part}")
        else:
            _, _, number, rest = layer.split(".", 3)
            tensor = tensors.pop(f"blk.{number}.{inside[rest]}.{part}")
        wanted = in_order(kind, layer, values, made.config)
        stored = wanted.half().float() if wanted.dim() == 2 else wanted
        assert tensor.tensor_type.name == ("F16" if wanted.dim() == 2 else "F32")
        assert same_bits(dequantized(tensor), stored), name
    assert {name.split(".")[2] for name in tensors} == set(LAYERS.values())  # nothing else


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_every_format_is_bitwise_the_trained_weight(bits, group, tmp_path):
    made = model("llama", num_hidden_layers=1)
    save(tmp_path / "model", made, form=AffineFormat(bits, (1, group)))
    path = export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    block = "Q5_1" if bits == 5 else "Q4_1"
    check_weights("llama", tmp_path / "model", path, made.config, block)
    fields, _ = read(path)
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{block}"]


def test_a_tile_of_several_rows_gives_each_row_its_scale(tmp_path):
    made = model("llama", num_hidden_layers=1)
    save(tmp_path / "model", made, form=AffineFormat(4, (8, 64)))
    path = export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    check_weights("llama", tmp_path / "model", path, made.config, "Q4_1")


def test_the_bytes_of_a_block_are_those_of_its_definition(tmp_path):
    saved = small(tmp_path, "qwen2")
    _, tensors = read(export_gguf(saved, tmp_path / "out.gguf"))
    weight = QuantizedModel.open(saved).affine("model.layers.0.mlp.down_proj")
    values = weight.weight().double()
    block = tensors["blk.0.ffn_down.weight"].data[3, 20:40].tobytes()
    d, m = np.frombuffer(block[:4], np.float16)
    assert (d, m) == (weight.scales[3, 1].item(), weight.offsets[3, 1].item())
    for j in range(16):
        low, high = block[4 + j] & 15, block[4 + j] >> 4
        assert float(d) * low + float(m) == pytest.approx(values[3, 32 + j].item(), abs=1e-7)
        assert float(d) * high + float(m) == pytest.approx(values[3, 48 + j].item(), abs=1e-7)


def test_metadata(tmp_path):
    made = save(tmp_path / "tuned", model("qwen3", head_dim=64, rms_norm_eps=1e-5))
    fields, _ = read(export_gguf(tmp_path / "tuned", tmp_path / "out.gguf"))
    wanted = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "tuned",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "qwen3.vocab_size": 768,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 128,
        "qwen3.feed_forward_length": 256,
        "qwen3.block_count": 2,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 64,
        "qwen3.attention.value_length": 64,
        "qwen3.rope.dimension_count": 64,
        "qwen3.rope.freq_base": made.config.rope_parameters["rope_theta"],
        "qwen3.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    }
    own = {k: v for k, v in fields.items() if not k.startswith(("tokenizer.", "GGUF."))}
    assert own == wanted


@pytest.mark.parametrize(
    ("kind", "options", "context"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 4096}, 512),
        ("mistral", {"sliding_window": None}, 512),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, 512),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, 512),
    ],
)
def test_the_context_ends_where_a_window_that_llama_cpp_lacks_begins(
    kind, options, context, tmp_path
):
    save(tmp_path / "model", model(kind, **options))
    fields, _ = read(export_gguf(tmp_path / "model", tmp_path / "out.gguf"))
    name = "llama" if kind == "mistral" else kind
    assert fields["general.architecture"] == name
    assert fields[f"{name}.context_length"] == context


def test_frequencies_of_llama_3(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    save(tmp_path / "model", model("llama", rope_parameters=rope))
    _, tensors = read(export_gguf(tmp_path / "model", tmp_path / "out.gguf"))
    wanted = []
    for i in range(16):  # a head has 32 rows
        turns = 64 * 10000.0 ** (-i / 16) / (2 * math.pi)  # within the original context
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        wanted.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert 1.0 < wanted[3] < 8.0  # one of them lies between
    np.testing.assert_allclose(tensors["rope_freqs.weight"].data, wanted, rtol=1e-6)


def test_linear_and_yarn_scaling(tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    save(tmp_path / "linear", model("qwen2", rope_parameters=linear))
    fields, _ = read(export_gguf(tmp_path / "linear", tmp_path / "linear.gguf"))
    rope = {name.partition(".")[2]: value for name, value in fields.items()}
    assert (rope["rope.scaling.type"], rope["rope.scaling.factor"]) == ("linear", 4.0)
    yarn = linear | {"rope_type": "yarn", "original_max_position_embeddings": 64}
    for factor, written in ((None, 1.0), (1.0, 1 / (0.1 * math.log(4.0) + 1))):
        asked = yarn | ({"attention_factor": factor} if factor else {})
        save(tmp_path / f"yarn{factor}", model("llama", rope_parameters=asked))
        fields, _ = read(export_gguf(tmp_path / f"yarn{factor}", tmp_path / f"{factor}.gguf"))
        assert fields["llama.rope.scaling.type"] == "yarn"
        assert fields["llama.rope.scaling.factor"] == 4.0
        assert fields["llama.rope.scaling.original_context_length"] == 64
        assert fields["llama.rope.scaling.attn_factor"] == pytest.approx(written, rel=1e-6)


def test_embeddings_as_q8_0(tmp_path):
    saved = small(tmp_path)
    _, tensors = read(export_gguf(saved, tmp_path / "out.gguf", embeddings="Q8_0"))
    floats = load_file(saved / "model.safetensors")
    for name, key in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        tensor, values = tensors[f"{name}.weight"], floats[f"{key}.weight"]
        assert tensor.tensor_type.name == "Q8_0"
        step = values.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        wrong = (dequantized(tensor) - values).unflatten(-1, (-1, 32)).abs()
        assert (wrong <= step * 0.6).all()  # half a step, and its rounding to fp16
        assert wrong.max() > 0


def test_a_layer_that_was_kept_is_f16_and_a_quantized_output_keeps_its_codes(tmp_path):
    made = save(tmp_path / "model", model("llama"), keep=("down_proj",))
    _, tensors = read(export_gguf(tmp_path / "model", tmp_path / "out.gguf"))
    down = made.model.layers[1].mlp.down_proj.weight.data
    assert same_bits(dequantized(tensors["blk.1.ffn_down.weight"]), down.half().float())
    assert tensors["output.weight"].tensor_type.name == "Q4_1"
    assert same_bits(dequantized(tensors["output.weight"]), made.lm_head.affine.weight())


def test_a_variant_has_its_own_offsets_and_the_same_codes(tmp_path):
    saved = small(tmp_path)
    tensors = load_file(saved / "model.safetensors")
    moved = {k: (v + 0.01).to(v.dtype) for k, v in tensors.items() if k.endswith(".offsets")}
    save_file(moved, saved / "offsets.rank8.safetensors")
    places = {
        k: "offsets.rank8.safetensors" if k in moved else "model.safetensors" for k in tensors
    }
    index = {"metadata": {}, "weight_map": places}
    (saved / "model.safetensors.index.rank8.json").write_text(json.dumps(index))
    export_gguf(saved, tmp_path / "base.gguf")
    fields, found = read(export_gguf(saved, tmp_path / "rank8.gguf", variant="rank8"))
    assert fields["general.name"] == "model rank8"
    _, base = read(tmp_path / "base.gguf")
    old, new = (x["blk.0.attn_v.weight"].data.reshape(-1, 20) for x in (base, found))
    assert np.array_equal(old[:, :2], new[:, :2])
    assert np.array_equal(old[:, 4:], new[:, 4:])
    offsets = moved["model.layers.0.self_attn.v_proj.offsets"].flatten().numpy()
    assert np.array_equal(np.ascontiguousarray(new[:, 2:4]).view(np.float16)[:, 0], offsets)


def test_float32_is_exported_where_fp16_holds_the_same_numbers(tmp_path):
    saved, form = tmp_path / "model", AffineFormat(4, (1, 32), torch.float32)
    made = save(saved, model("llama", num_hidden_layers=1), form=form)
    scales = made.model.layers[0].mlp.down_proj.scales
    worst = (scales.half().double() - scales.double()).abs().max().item()
    with pytest.raises(ConfigError) as error:
        export_gguf(saved, tmp_path / "out.gguf")
    assert str(error.value) == (
        "model.layers.0.mlp.down_proj: GGUF blocks would round its float32 scales to float16, by "
        f"up to {worst:.1e}; try --to mlx or --to hqq, or quantize again with "
        "--storage_dtype float16"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    stored = load_file(saved / "model.safetensors")
    halves = {k: v.half().float() for k, v in stored.items() if k.endswith(("scales", "offsets"))}
    rewrite(saved, **{name.replace(".", "__"): values for name, values in halves.items()})
    path = export_gguf(saved, tmp_path / "out.gguf")
    check_weights("llama", saved, path, made.config, "Q4_1")


def test_bfloat16_is_exported_unless_a_number_lies_outside_of_fp16(tmp_path):
    saved, form = tmp_path / "model", AffineFormat(4, (1, 32), torch.bfloat16)
    made = save(saved, model("llama", num_hidden_layers=1), form=form)
    path = export_gguf(saved, tmp_path / "out.gguf")
    check_weights("llama", saved, path, made.config, "Q4_1")
    offsets = load_file(saved / "model.safetensors")["model.layers.0.mlp.up_proj.offsets"]
    offsets[0, 0] = 1e-9
    rewrite(saved, model__layers__0__mlp__up_proj__offsets=offsets)
    with pytest.raises(ConfigError, match=r"up_proj: GGUF blocks would round its bfloat16 offsets"):
        export_gguf(saved, tmp_path / "again.gguf")

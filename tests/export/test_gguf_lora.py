"""An adapter as a LoRA GGUF: the tensors of the ordinary LoRA, under llama.cpp's names and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gguf_models import SHAPE, change, model, read
from peft import get_peft_model

from anyrank import AnyRankConfig
from anyrank.errors import ConfigError, RankError, RunError
from anyrank.export.adapter import SavedAdapter
from anyrank.export.gguf import export_gguf_lora
from anyrank.export.lora import lora_tensors

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def adapter(root: Path, kind: str = "llama", method: str = "qdylora", **options: Any) -> Path:
    """A saved adapter with random values, beside the model that it names."""
    made = model(kind)
    made.save_pretrained(root / "base")
    made.name_or_path = str(root / "base")
    tuned = get_peft_model(made, AnyRankConfig(method=method, r=4, **options))
    tiny.fill(tuned)
    tuned.save_pretrained(root / "adapter")
    return root / "adapter"


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    halves = rows.unflatten(0, (heads, 2, -1))
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).flatten(0, 2)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("method", "options", "rank"),
    [("qdylora", {}, 4), ("qdylora", {}, 1), ("qbara", {}, 8), ("qalora", {"pool": 16}, 4)],
)
def test_the_tensors_are_those_of_the_lora(kind, method, options, rank, tmp_path):
    saved = adapter(tmp_path, kind, method, **options)
    path = export_gguf_lora(saved, tmp_path / "out.gguf", rank)
    assert path == tmp_path / "out.gguf"
    fields, tensors = read(path)
    assert {k: v for k, v in fields.items() if not k.startswith("GGUF.")} == {
        "general.architecture": "llama" if kind == "mistral" else kind,
        "general.type": "adapter",
        "general.name": f"adapter rank {rank}",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
    }
    wanted = lora_tensors(SavedAdapter.read(saved), rank)
    assert len(wanted) == 2 * 2 * 7
    for key, values in wanted.items():
        number, part = key.removeprefix("base_model.model.model.layers.").split(".", 1)
        layer, _, end = part.partition(".lora_")
        tensor = tensors.pop(f"blk.{number}.{NAMES[layer]}.weight.lora_{end[0].lower()}")
        heads = {"q_proj": 4, "k_proj": SHAPE["num_key_value_heads"]}.get(layer[-6:])
        rotated = kind in ("llama", "mistral") and heads and end[0] == "B"
        ordered = interleaved(values, heads) if rotated else values
        assert tensor.tensor_type.name == "F32"
        assert torch.equal(torch.from_numpy(tensor.data.copy()), ordered)
    assert tensors == {}


def test_the_base_can_be_named_and_out_can_be_a_folder(tmp_path):
    saved = adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError) as error:
        export_gguf_lora(saved, tmp_path / "out", 2)
    start = f"{tmp_path / 'base'}: its configuration cannot be read ("
    assert str(error.value).startswith(start)
    change(saved / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ConfigError) as error:
        export_gguf_lora(saved, tmp_path / "out", 2)
    assert str(error.value) == (
        f"{saved}: names no base model, whose configuration is needed; name it with "
        'base="..." (--base)'
    )
    out = export_gguf_lora(saved, tmp_path / "out", 2, base=tmp_path / "moved")
    assert out == tmp_path / "out" / "model.gguf"
    with pytest.raises(RunError, match="exists already; name another folder"):
        export_gguf_lora(saved, tmp_path / "out", 2, base=tmp_path / "moved")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_an_adapter_on_the_output_is_refused(options, what, tmp_path):
    saved = adapter(tmp_path, **options)
    with pytest.raises(ConfigError) as error:
        export_gguf_lora(saved, tmp_path / "out.gguf", 2)
    assert str(error.value) == (
        f"{saved}: it changes {what}, but a LoRA GGUF holds the linear layers of the decoder "
        "alone; train without it, or merge the adapter into its base"
    )
    assert not (tmp_path / "out.gguf").exists()


def test_a_rank_that_is_not_there(tmp_path):
    saved = adapter(tmp_path)
    with pytest.raises(RankError, match=r"rank 5 must lie in 1\.\.4"):
        export_gguf_lora(saved, tmp_path / "out.gguf", 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]

"""What llama.cpp calls the layers of a model, and in which order it wants their rows.

llama.cpp rotates neighbouring pairs (0, 1), (2, 3), ... of a head of a Llama or a Mistral, where
Transformers rotates (0, d/2), (1, d/2 + 1), ...; the rows of q and k are interleaved for it:

    row 2 i + s of a head of d rows  =  row s d/2 + i,        i < d/2,  s in {0, 1}

Codes, scales, offsets, biases and the B of a LoRA move together. Qwen2 and Qwen3 are rotated in
llama.cpp as in Transformers. Source: src/llama-arch.cpp, src/models/*.cpp and conversion/llama.py
of llama.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...files import read_json

PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Architecture:
    """A kind of model, as llama.cpp reads it.

    Attributes:
        name: general.architecture.
        interleaved: whether the rows of q and k are interleaved.
        biases: the projections that may have a bias.
        required_biases: those of them that must.
        head_norms: whether q and k are normalized per head.
        rope_factors: whether a factor per frequency is read (Llama 3).
    """

    name: str
    interleaved: bool = False
    biases: frozenset[str] = frozenset()
    required_biases: frozenset[str] = frozenset()
    head_norms: bool = False
    rope_factors: bool = False

    def parts(self) -> dict[str, str]:
        """The parts of a decoder layer: the name here -> the name in llama.cpp."""
        return PROJECTIONS | _NORMS | (_HEAD_NORMS if self.head_norms else {})

    def gguf_name(self, name: str) -> str | None:
        """The name of a tensor `<layer>.weight` or `<layer>.bias`; None: it is not read."""
        layer, _, part = name.rpartition(".")
        if layer in _OUTSIDE and part == "weight":
            return f"{_OUTSIDE[layer]}.weight"
        found = _LAYER.fullmatch(layer)
        inside = self.parts().get(found[2]) if found else None
        if not found or inside is None:
            return None
        if part != "weight" and (part != "bias" or found[2] not in self.biases):
            return None
        return f"blk.{found[1]}.{inside}.{part}"

    def required(self, layers: int) -> list[str]:
        """The tensors that a model of so many decoder layers must have."""
        inside = [f"{part}.weight" for part in self.parts()]
        inside += [f"{part}.bias" for part in sorted(self.required_biases)]
        names = [f"model.layers.{i}.{name}" for i in range(layers) for name in inside]
        return ["model.embed_tokens.weight", "model.norm.weight", *names]

    def row_order(self, name: str, config: Any) -> Tensor | None:
        """Which rows of a tensor to write, one after the other; None: as they are.

        Args:
            name: the name here, of a weight, a bias or a projection.
            config: the configuration of the model.
        """
        if not self.interleaved:
            return None
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        found = next((n for part, n in heads.items() if f".{part}" in name), None)
        return None if found is None else interleave(found, head_size(config))


def interleave(heads: int, size: int) -> Tensor:
    """The row order of `heads` heads of `size` rows each."""
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def head_size(config: Any) -> int:
    """Rows of a head."""
    found = getattr(config, "head_dim", None)
    return found or config.hidden_size // config.num_attention_heads


_QKV = frozenset(f"self_attn.{part}_proj" for part in "qkv")
_LLAMA = Architecture("llama", interleaved=True, biases=frozenset(PROJECTIONS), rope_factors=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", biases=_QKV, required_biases=_QKV),
    "qwen3": Architecture("qwen3", head_norms=True),
}


def read_config(folder: str | Path) -> tuple[Architecture, Any]:
    """The architecture of a model and its configuration, with every default filled in.

    Args:
        folder: a folder with config.json, or a name on the Hub.

    Raises:
        ConfigError: the configuration cannot be read, or is of another type.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if path.is_file():
        check_type(read_json(path).get("model_type"), folder)
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder}: its configuration cannot be read ({reason})") from error
    check_type(config.model_type, folder)
    return ARCHITECTURES[config.model_type], config


def check_type(model_type: str | None, folder: str | Path) -> None:
    """Raise unless models of this type can be written.

    Raises:
        ConfigError: they cannot.
    """
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"{folder}: a GGUF file is written for {', '.join(ARCHITECTURES)}, not for "
            f"model_type {model_type!r}; try --to mlx or --to hqq"
        )

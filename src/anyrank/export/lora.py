"""An any-rank adapter as an ordinary PEFT LoRA of one rank, or of one rank per layer.

    A' = A[:k] P,  B' = s_k R B[:, :k],  alpha = rank, so the reader's own scale is 1

The scale is baked into B': vLLM, TensorRT-LLM, exllama and diffusers have each got a scale wrong
before. The configuration holds only keys that every PEFT knows, and no rank or alpha pattern unless
layers have ranks of their own. Then k and s_k are those of the layer, r and alpha are the largest
k, and rank_pattern and alpha_pattern both hold k for every layer: alpha / rank is 1 in each of
them, also for a reader that overlooks the patterns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..algebra import lora_factors, rows
from ..files import new_folder, require_disk, write_json
from ..quant.checkpoint import copy_companions
from .adapter import CONFIG, WEIGHTS, Rank, SavedAdapter, layer_name

_COPIED = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def lora_tensors(adapter: SavedAdapter, rank: Rank) -> dict[str, Tensor]:
    """The tensors of the LoRA at `rank`: `lora_A.weight` [k, d_in], `lora_B.weight` [d_out, k].

    A layer of rank 0 has none.
    """
    config, ranks = adapter.config, adapter.layer_ranks(rank)
    tensors = {k: v for k, v in adapter.tensors.items() if ".anyrank_" not in k}
    for prefix, a, b in adapter.layers():
        if k := ranks[layer_name(prefix)]:
            a_k, b_k = lora_factors(*rows(a, b, k), config.pool, config.repeat)
            tensors[prefix + "lora_A.weight"] = a_k.contiguous()
            tensors[prefix + "lora_B.weight"] = (b_k * config.scale_of(k)).contiguous()
    return tensors


def lora_size(adapter: SavedAdapter, rank: Rank) -> int:
    """Bytes of the weights file that an export at `rank` writes."""
    shapes = {key: tensor.to("meta") for key, tensor in adapter.tensors.items()}
    tensors = lora_tensors(SavedAdapter(adapter.folder, adapter.config, shapes), rank)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
    offset = 0
    for key, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + t.numel() * t.element_size()
        dtype = names.get(str(t.dtype), str(t.dtype))
        header[key] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset


def lora_config(adapter: SavedAdapter, rank: Rank) -> dict[str, Any]:
    """adapter_config.json of the LoRA at `rank`; its scale is alpha/r = 1."""
    saved = {key: getattr(adapter.config, key, None) for key in _COPIED}
    if isinstance(saved["target_modules"], set | list):
        saved["target_modules"] = sorted(saved["target_modules"])
    largest = rank if isinstance(rank, int) else max(rank.values())
    if not isinstance(rank, int):
        saved |= _pattern(adapter.layer_ranks(rank))
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **{key: value for key, value in saved.items() if value not in (None, False)},
    }


def _pattern(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The keys of a configuration that give every layer its rank, and leave out those of rank 0.

    PEFT takes the first key of a pattern that a layer's name ends with, so longer names go first.
    """
    held = {k: ranks[k] for k in sorted(ranks, key=lambda k: (-len(k), k)) if ranks[k]}
    free = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return free | {
        "target_modules": sorted(held),
        "rank_pattern": held,
        "alpha_pattern": held,
    }


def export_lora(adapter: SavedAdapter | str | Path, out: str | Path, rank: Rank) -> Path:
    """Write the LoRA of one rank, or of one rank per layer, into a new folder.

    Args:
        adapter: a folder with an any-rank adapter, or one already read.
        out: the folder to make.
        rank: 1..rows of the adapter; or a rank for every layer, by its name in the base model,
            where 0 leaves the layer out. vLLM wants one rank for all layers.

    Returns:
        The folder, with adapter_config.json, adapter_model.safetensors and anyrank.json.

    Raises:
        RunError: the adapter cannot be read, `out` exists, or the disk is full.
        RankError: the adapter does not have this rank, or a layer got none.
        ConfigError: the adapter is not a low-rank one, or has no such layer.
    """
    from safetensors.torch import save_file

    if not isinstance(adapter, SavedAdapter):
        adapter = SavedAdapter.read(adapter)
    out = Path(out)
    tensors = lora_tensors(adapter, rank)
    require_disk(out, sum(t.numel() * t.element_size() for t in tensors.values()), "the export")
    with new_folder(out) as beside:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        write_json(beside / CONFIG, lora_config(adapter, rank))
        write_json(beside / "anyrank.json", _provenance(adapter, rank))
        copy_companions(adapter.folder, beside)
    return out


def vllm_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` of vLLM that serves this rank; None: it serves no such."""
    return next((r for r in VLLM_RANKS if r >= rank), None)


def _provenance(adapter: SavedAdapter, rank: Rank) -> dict[str, Any]:
    from .. import __version__

    return {
        "anyrank": __version__,
        "exported": "lora",
        "rank": rank if isinstance(rank, int) else dict(rank),
        "method": adapter.config.method,
        "scale": adapter.config.scale,
        "scale_baked_into": "lora_B",
        "largest_rank": adapter.config.rows,
        "nested": adapter.config.nested,
    }

"""A low-rank adapter as a LoRA GGUF, for `llama-cli --lora`.

    W x + alpha / rank * B (A x),        A = lora_a [rank, d_in],  B = lora_b [d_out, rank]

alpha is the rank, because the scale is baked into B as in every export here; the rows of B move
with those of the base weight (architecture.py). Source: src/llama-adapter.cpp and
convert_lora_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import ConfigError
from ...files import refuse_file, refuse_filled
from ..adapter import SavedAdapter
from ..lora import lora_tensors
from .architecture import Architecture, read_config
from .write import SUFFIX, Planned, new_writer, write_gguf

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def export_gguf_lora(
    adapter: SavedAdapter | str | Path,
    out: str | Path,
    rank: int,
    *,
    base: str | Path | None = None,
) -> Path:
    """Write one rank of an adapter for llama.cpp.

    Args:
        adapter: a folder with an any-rank adapter, or one already read.
        out: a new file that ends in .gguf, or a new folder that will hold model.gguf.
        rank: 1..rows of the adapter.
        base: the base model, of which the configuration is read; None: the one that the adapter
            names.

    Returns:
        The file.

    Raises:
        RunError: the adapter cannot be read, `out` exists, or the disk is full.
        RankError: the adapter does not have this rank.
        ConfigError: it is no low-rank adapter of a decoder that llama.cpp reads.
        MissingPackageError: the `gguf` package is missing.
    """
    out = Path(out)
    refuse_file(out) if out.suffix == SUFFIX else refuse_filled(out)
    new_writer("")  # missing packages are told first
    if not isinstance(adapter, SavedAdapter):
        adapter = SavedAdapter.read(adapter)
    adapter.check_rank(rank)
    named = base or adapter.config.base_model_name_or_path
    if not named:
        raise ConfigError(
            f"{adapter.folder}: names no base model, whose configuration is needed; name it with "
            'base="..." (--base)'
        )
    arch, config = read_config(named)
    tensors = _plan(adapter, rank, arch, config)

    writer = new_writer(arch.name)
    _add_adapter(writer, adapter.folder.resolve().name, rank)
    return write_gguf(out, writer, tensors)


def _add_adapter(writer: Any, name: str, rank: int) -> None:
    from gguf import GGUFType, Keys, LlamaFileType

    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(f"{name} rank {rank}")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))


def _plan(adapter: SavedAdapter, rank: int, arch: Architecture, config: Any) -> list[Planned]:
    """Both factors of every adapted layer."""
    planned = []
    for key, tensor in lora_tensors(adapter, rank).items():
        layer = key.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        name = arch.gguf_name(f"{layer}.weight")
        if not key.endswith((_A, _B)) or name is None or not name.startswith("blk."):
            what = layer.removesuffix(".weight").removesuffix(".base_layer")
            raise ConfigError(
                f"{adapter.folder}: it changes {what}, but a LoRA GGUF holds the linear layers of "
                "the decoder alone; train without it, or merge the adapter into its base"
            )
        order = arch.row_order(layer, config) if key.endswith(_B) else None
        part = "lora_b" if key.endswith(_B) else "lora_a"
        planned.append(_planned(f"{name}.{part}", tensor if order is None else tensor[order]))
    return planned


def _planned(name: str, tensor: Tensor) -> Planned:
    values: np.ndarray = tensor.detach().float().cpu().numpy()
    return Planned(name, "F32", values.shape, lambda: [values])

"""A block-quantized model for MLX, in plain safetensors that mlx-lm loads.

    W[i, j] = scales[i, j // g] * code[i, j] + biases[i, j // g]

    <layer>.weight   [d_out, d_in * bits / 32] of uint32: a row is one stream of bits, little end
                     first. That is how anyrank packs, so the bytes are copied.
    <layer>.scales   [d_out, d_in / g] in the storage precision
    <layer>.biases   the offsets, likewise: they are the trained ones, bit for bit
    config.json      quantization: {group_size, bits, mode}; a layer without .scales stays float

MLX computes in the common precision of activations and scales. Scales of float16 with other tensors
of bfloat16 make float32 of every activation and of the KV cache. So the other tensors are written
in the precision of the scales, as mlx-lm's own converter does, unless `dtype` says otherwise:
float32 computes with the trained weights exactly and costs memory, and time on a GPU; in float16 a
weight is rounded once more whenever it is used. On a CPU take float32: MLX's kernel for float16 is
far slower there and sums in float16, which loses ten times as much as the rounding of the weights.

Configurations of Transformers 5 hold rope_theta inside of rope_parameters, where mlx-lm does not
look for it for llama, mistral and qwen2: it would silently take its default. It is written in both
places. (Source: mlx.core.dequantize, mlx_lm.utils.load_model, mlx 0.32, mlx-lm 0.32.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, GeometryError
from ..files import write_json
from .folder import Plan, group_for, in_groups, new_model, plan, write_shards

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MODELS = ("llama", "mistral", "qwen2", "qwen3")


def export_mlx(
    folder: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a quantized or folded model for `mlx_lm.load`.

    Args:
        folder: a model that anyrank quantized or folded.
        out: the folder to make.
        variant: which table of offsets; None: the default one.
        dtype: precision of the tensors that are not quantized, in which MLX then computes; None:
            that of the scales.

    Returns:
        The folder.

    Raises:
        RunError: the model cannot be read, `out` exists, or the disk is full.
        GeometryError: MLX has no such format.
        ConfigError: mlx-lm has no such model, or a tensor does not fit `dtype`.
    """
    out, planned = Path(out), plan(folder, variant)
    group = _checked_group(planned)
    dtype = dtype or planned.model.form.dtype
    _check_range(planned, dtype)
    config = mlx_config(planned.model.config, planned.model.form.bits, group, dtype)
    bits = planned.model.form.bits + 16 * planned.model.form.dtype.itemsize / group
    with new_model(planned.model, out, planned.bytes(bits, dtype.itemsize), "mlx") as beside:
        write_shards(beside, "model", _tensors(planned, group, dtype))
        write_json(beside / "config.json", config)
    return out


def _checked_group(planned: Plan) -> int:
    """The group of inputs in which MLX can hold every layer."""
    form, model_type = planned.model.form, planned.model.config.get("model_type")
    group = group_for(form, GROUPS)
    if group is None or form.bits not in BITS:
        raise GeometryError(
            f"{next(iter(planned.layers))}: {form} do not fit MLX, which holds 2, 3, 4, "
            "5, 6 or 8 bits in groups of 32, 64 or 128; quantize with such a --bits and "
            "--group_size, or export to torchao, which holds any"
        )
    if model_type not in MODELS:
        raise ConfigError(
            f"{planned.model.folder}: model_type {model_type} is none of {', '.join(MODELS)}, "
            "whose names and configuration are known to agree with mlx-lm; export to hqq or torchao"
        )
    return group


def _check_range(planned: Plan, dtype: torch.dtype) -> None:
    for name in planned.others:
        tensor = planned.model.tensor(name)
        if tensor.is_floating_point() and tensor.dtype != dtype:
            top = tensor.abs().max().item() if tensor.numel() else 0.0
            if top > torch.finfo(dtype).max:
                raise ConfigError(
                    f"{name}: its values reach {top:.3g}, more than "
                    f"{str(dtype).removeprefix('torch.')} holds; export with dtype=torch.float32"
                )


def _tensors(planned: Plan, group: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in planned.others:
        tensor = planned.model.tensor(name)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    for layer, weight in planned.model.weights():
        grouped = in_groups(weight, group)
        yield f"{layer}.weight", grouped.codes.contiguous().view(torch.uint32)
        yield f"{layer}.scales", grouped.scales
        yield f"{layer}.biases", grouped.offsets


def mlx_config(config: dict[str, Any], bits: int, group: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as mlx-lm reads it."""
    quantization = {"group_size": group, "bits": bits, "mode": "affine"}
    made = {**config, "quantization": quantization, "quantization_config": quantization}
    made["dtype"] = str(dtype).removeprefix("torch.")
    rope = config.get("rope_parameters")
    if rope:
        made["rope_theta"] = rope["rope_theta"]
        scaled = rope.get("rope_type", "default") != "default"
        made["rope_scaling"] = (
            {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None
        )
    return made

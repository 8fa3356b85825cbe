"""A block-quantized model for torchao: its tensor classes, in safetensors that Transformers loads.

target "any"    IntxUnpackedToInt8Tensor: 2 to 8 bits, every group and tile, every device

    W = (q - zero) * scale,    q = code - 2^(b-1),    zero = -offset / scale - 2^(b-1)

    <layer>._weight_qdata        q [d_out, d_in] of int8: one byte to a code, whatever the bits
    <layer>._weight_scale        [d_out/rows, d_in/columns] of float32
    <layer>._weight_zero_point   likewise; 6e-8 of the offset is lost in the quotient, nothing else
    The weight is computed anew in every forward.

target "cuda"   Int4TilePackedTo4dTensor: 4 bits in groups of 32, 64, 128 or 256 for tensor cores

    W = (code - 8) * scale + zero,    zero = offset + 8 * scale

    <layer>._weight_qdata            [N/8, K/128, 32, 4] of int32, where d_out and d_in are padded
                                     to N, a multiple of 8, and K, one of 1024. Bits 4 b + 16 e on
                                     of word [n, k, lane, i] hold the code of row 8 n + lane / 4
                                     and input 128 k + 32 i + 8 b + 2 (lane % 4) + e
    <layer>._weight_scale_and_zero   [K/g, N, 2] of bfloat16, in which this kernel computes: scale
                                     and zero are rounded to 8 bits each. Codes are kept to the
                                     last bit, weights are not.

The header of every file holds, per tensor, the class with its settings as JSON, and tensor_names.
`load_int4_cpu` makes torchao's four-bit CPU tensors, which have no form on disk, from the quantized
folder itself: the mid-point form of "cuda" in the precision of the caller's choice.

Source: torchao 0.18, prototype/safetensors and quantize_/workflows; PyTorch, native/cuda/int4mm.cu.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, GeometryError, nearest
from ..files import write_json
from ..kernels import Affine, AffineFormat, unpack
from .folder import (
    Plan,
    code_units,
    consumer,
    group_for,
    in_groups,
    new_model,
    plan,
    write_shards,
)

TARGETS = ("any", "cuda")
GROUPS = (32, 64, 128, 256)
# Outputs and inputs to a tile of the tensor-core layout; the CPU kernel takes 16 outputs at once.
N_TILE, K_TILE, CPU_ROWS = 8, 1024, 16


def export_torchao(
    folder: str | Path, out: str | Path, *, variant: str | None = None, target: str = "any"
) -> Path:
    """Write a quantized or folded model for `AutoModelForCausalLM.from_pretrained` with torchao.

    Args:
        folder: a model that anyrank quantized or folded.
        out: the folder to make.
        variant: which table of offsets; None: the default one.
        target: 'any' runs everywhere and keeps the weights; 'cuda' is for the 4-bit kernel of
            tensor cores, in bfloat16.

    Returns:
        The folder.

    Raises:
        RunError: the model cannot be read, `out` exists, or the disk is full.
        GeometryError: torchao has no such format.
        ConfigError: the target is unknown.
    """
    if target not in TARGETS:
        raise ConfigError(f"target={target} is unknown; {nearest(target, TARGETS)}")
    out, planned = Path(out), plan(folder, variant)
    form = planned.model.form
    if target == "cuda":
        group = four_bit_group(planned)
        bits = max(_padded_bits(*shape, group) for shape in planned.layers.values())
        kind, config = _tile_packed_config(group), "bfloat16"
    else:
        group, config = 0, "float32"
        bits = 8 + 64 / (form.tile[0] * form.tile[1])
        kind = _intx_config(form)
    made = {**planned.model.config, "dtype": config}
    made["quantization_config"] = {
        "quant_method": "torchao",
        "quant_type": {"default": kind},
        "modules_to_not_convert": made["quantization_config"].get("modules_to_not_convert", []),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    with new_model(planned.model, out, planned.bytes(bits), f"torchao, {target}") as beside:
        header = _header(planned, group)
        write_shards(beside, "model", _tensors(planned, group), header)
        write_json(beside / "config.json", made)
    return out


def four_bit_group(planned: Plan) -> int:
    """The group of inputs in which torchao's 4-bit kernels can hold every layer."""
    form = planned.model.form
    group = group_for(form, GROUPS)
    if group is None or form.bits != 4:
        raise GeometryError(
            f"{next(iter(planned.layers))}: {form} do not fit torchao's 4-bit kernels, "
            "which hold 4 bits in groups of 32, 64, 128 or 256; quantize with --bits 4 and such a "
            "--group_size, or export with target='any'"
        )
    return group


def _header(planned: Plan, group: int) -> dict[str, str]:
    """The class of every tensor; `group` of 0: target 'any'."""
    form = planned.model.form
    header = {name: json.dumps({"_type": "Tensor"}) for name in planned.others}
    for layer, shape in planned.layers.items():
        if group:
            kind, parts = "Int4TilePackedTo4dTensor", ["qdata", "scale_and_zero"]
            data: dict[str, Any] = {"block_size": [1, group], "shape": list(shape)}
        else:
            kind, parts = "IntxUnpackedToInt8Tensor", ["qdata", "scale", "zero_point"]
            data = {
                "target_dtype": {"_type": "torch.dtype", "_data": f"int{form.bits}"},
                "block_size": list(form.tile),
                "dtype": {"_type": "torch.dtype", "_data": "float32"},
                "activation_quantization": None,
            }
        meta = {"_type": kind, "_data": data, "_tensor_data_names": parts}
        header[f"{layer}.weight"] = json.dumps(meta)
    return {**header, "tensor_names": json.dumps(list(header))}


def _tensors(planned: Plan, group: int) -> Iterator[tuple[str, Tensor]]:
    for name in planned.others:
        yield name, planned.model.tensor(name)
    for layer, weight in planned.model.weights():
        parts = tile_packed(in_groups(weight, group)) if group else intx(weight)
        for part, value in parts.items():
            yield f"{layer}._weight_{part}", value


def intx(weight: Affine) -> dict[str, Tensor]:
    """The tensors of an IntxUnpackedToInt8Tensor."""
    codes, scale, zero = code_units(weight, middle=2 ** (weight.form.bits - 1))
    return {"qdata": codes.to(torch.int8), "scale": scale, "zero_point": zero}


def tile_packed(weight: Affine) -> dict[str, Tensor]:
    """The tensors of an Int4TilePackedTo4dTensor, for a weight in groups of 1 x g."""
    codes = unpack(weight.codes, 4)
    d_out, d_in = codes.shape
    n, k, group = -(-d_out // N_TILE), -(-d_in // K_TILE) * K_TILE, weight.form.tile[1]
    padded = torch.zeros(n * N_TILE, k, dtype=torch.int32)
    padded[:d_out, :d_in] = codes
    tiles = padded.view(n, 8, k // 128, 4, 4, 4, 2)  # n, row, k, i, b, lane % 4, e
    words = torch.zeros(n, 8, k // 128, 4, 4, dtype=torch.int32)  # n, row, k, i, lane % 4
    for b in range(4):
        for e in range(2):
            words |= tiles[..., b, :, e] << (4 * b + 16 * e)
    both = torch.zeros(k // group, n * N_TILE, 2, dtype=torch.bfloat16)
    both[: d_in // group, :d_out] = scale_and_zero(weight, torch.bfloat16)
    qdata = words.permute(0, 2, 1, 4, 3).reshape(n, k // 128, 32, 4)
    return {"qdata": qdata, "scale_and_zero": both}


def scale_and_zero(weight: Affine, dtype: torch.dtype) -> Tensor:
    """(scale, offset + 8 scale), each rounded once: [d_in / g, d_out, 2]."""
    scales, offsets = weight.scales.double(), weight.offsets.double()
    return torch.stack([scales, offsets + 8 * scales], -1).transpose(0, 1).to(dtype).contiguous()


def _padded_bits(d_out: int, d_in: int, group: int) -> float:
    """Bits of one weight, padding included."""
    n, k = -(-d_out // N_TILE) * N_TILE, -(-d_in // K_TILE) * K_TILE
    return (4 + 32 / group) * n * k / (d_out * d_in)


def _tile_packed_config(group: int) -> dict[str, Any]:
    return {
        "_type": "Int4WeightOnlyConfig",
        "_version": 2,
        "_data": {
            "group_size": group,
            "set_inductor_config": True,
            "int4_packing_format": "tile_packed_to_4d",
        },
    }


def _intx_config(form: AffineFormat) -> dict[str, Any]:
    group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": form.tile[1]}}
    weight_dtype = {"_type": "torch.dtype", "_data": f"int{form.bits}"}
    return {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {"weight_dtype": weight_dtype, "granularity": group},
    }


def load_int4_cpu(
    folder: str | Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Load a quantized or folded model with torchao's 4-bit CPU kernel (Int4OpaqueTensor).

    Args:
        folder: a model that anyrank quantized or folded: the source of an export, not an export.
        variant: which table of offsets; None: the default one.
        dtype: the precision to compute in, to which scale and zero are rounded: with float32 only
            the sum offset + 8 scale is (6e-8 of it).

    Returns:
        The model of Transformers.

    Raises:
        MissingPackageError: torchao is not installed.
        RunError: the model cannot be read.
        GeometryError: the kernel has no such format.
    """
    opaque = consumer("torchao.prototype.quantization.int4.int4_opaque_tensor", "torchao")
    planned = plan(folder, variant)
    group = four_bit_group(planned)
    for layer, (d_out, _) in planned.layers.items():
        if d_out % CPU_ROWS:
            raise GeometryError(
                f"{layer}: d_out={d_out} must be a multiple of {CPU_ROWS} for torchao's CPU "
                "kernel; export with target='any'"
            )
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, variant=variant, dtype=dtype)
    for layer in planned.layers:
        old = model.get_submodule(layer)
        weight = in_groups(old.affine, group)
        codes = unpack(weight.codes, 4).int()
        shape = codes.shape
        packed = opaque.Int4OpaqueTensor(
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
            scale_and_zero(weight, dtype),
            [1, group],
            shape,
        )
        new = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(packed, requires_grad=False)
        new.bias = old.bias
        model.set_submodule(layer, new)
    return model

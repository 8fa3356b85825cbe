"""Blocks of GGUF: 32 neighbouring weights with a scale and an offset.

    W = d * code + m,        d, m of fp16: the scale and the offset of the group around the block

    Q4_1    20 bytes    d, m, 16 bytes of codes: code j in the low half of byte j, code j + 16 in
                        its high half
    Q5_1    24 bytes    d, m, 4 bytes of fifth bits (code j at bit j, little end first), 16 bytes
                        with the other four bits, as in Q4_1

A reader computes d * code + m in float32, as `Affine.weight` does, so both get the same bits.
Groups of 64 or 128 repeat d and m, and so does a tile of several rows, as long as its columns are
a multiple of 32. Codes of 2 and 3 bits are 4-bit codes whose high bits are 0.
Source: block_q4_1 and block_q5_1 in ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels import Affine, AffineFormat, unpack
from ..folder import formats_for

BLOCK = 32


class BlockType(NamedTuple):
    """A kind of block.

    Attributes:
        name: its name in GGMLQuantizationType.
        bits: bits of a code.
        bytes: bytes of a block.
    """

    name: str
    bits: int
    bytes: int


Q4_1, Q5_1 = BlockType("Q4_1", 4, 20), BlockType("Q5_1", 5, 24)


def block_type(form: AffineFormat, model: object) -> BlockType:
    """The blocks that hold codes of this format as they are.

    Args:
        form: how the weights are stored.
        model: the model, for the message.

    Raises:
        ConfigError: no block does.
    """
    if form.tile[1] % BLOCK == 0 and form.bits <= Q5_1.bits:
        return Q4_1 if form.bits <= Q4_1.bits else Q5_1
    others = " or ".join(f"--to {name}" for name in formats_for(form))
    raise ConfigError(
        f"{model}: {form} fit into no GGUF block as they are (Q4_1 holds 2, 3 and 4 bits, Q5_1 5 "
        f"bits, in groups of 32, 64 or 128); try {others}, or quantize again with --bits 4 "
        "--group_size 32"
    )


def require_fp16(weight: Affine, layer: str) -> None:
    """Raise unless scales and offsets are the same numbers in fp16.

    Raises:
        ConfigError: a block would round them.
    """
    for name, values in (("scales", weight.scales), ("offsets", weight.offsets)):
        rounded = values.to(torch.float16)
        if torch.equal(rounded.to(values.dtype), values):
            continue
        worst = (rounded.double() - values.double()).abs().max().item()
        stored = str(values.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{layer}: GGUF blocks would round its {stored} {name} to float16, by up to "
            f"{worst:.1e}; try --to mlx or --to hqq, or quantize again with "
            "--storage_dtype float16"
        )


def by_rows(weight: Affine) -> Affine:
    """The same weight with a scale and an offset for each row: tiles of 1 x columns."""
    rows, columns = weight.form.tile
    if rows == 1:
        return weight
    scales, offsets = (x.repeat_interleave(rows, dim=0) for x in (weight.scales, weight.offsets))
    form = AffineFormat(weight.form.bits, (1, columns), weight.form.dtype)
    return Affine(weight.codes, scales, offsets, form)


def to_blocks(weight: Affine, kind: BlockType) -> np.ndarray:
    """The bytes of a weight.

    Args:
        weight: of d_out x d_in, with tiles of one row, in a format that `block_type` accepts.
        kind: the blocks to write.

    Returns:
        [d_out, d_in / 32 * bytes of a block] of uint8.
    """
    codes = unpack(weight.codes, weight.form.bits).unflatten(-1, (-1, 2, BLOCK // 2))
    blocks = torch.empty(*codes.shape[:2], kind.bytes, dtype=torch.uint8)
    repeats = weight.form.tile[1] // BLOCK
    blocks[..., 0:2] = _half_bytes(weight.scales, repeats)
    blocks[..., 2:4] = _half_bytes(weight.offsets, repeats)
    if kind is Q5_1:
        blocks[..., 4:8] = _fifth_bits(codes.flatten(-2))
        codes = codes & 15
    blocks[..., -BLOCK // 2 :] = codes[..., 0, :] | codes[..., 1, :] << 4
    return blocks.flatten(-2).numpy()


def _half_bytes(values: Tensor, repeats: int) -> Tensor:
    """[d_out, groups] as the two bytes of fp16, once per block: [d_out, blocks, 2]."""
    halves = values.to(torch.float16).repeat_interleave(repeats, dim=1)
    return halves.unsqueeze(-1).view(torch.uint8)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of every code: [d_out, blocks, 32] to four bytes per block, little end first."""
    bits = (codes >> 4).unflatten(-1, (4, 8))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits * places).sum(-1, dtype=torch.uint8)

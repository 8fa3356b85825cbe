"""Codes of b bits, packed without a gap.

A row is one stream of bits, little end first: code j lies in bits [b j, b (j + 1)) of its row. No
byte is lost at 3, 5, 6 or 7 bits either: 8 codes fill b bytes. MLX packs in the same order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: [..., n] of uint8, each below 2**bits; n divisible by 8.
        bits: 1..8.

    Returns:
        [..., n * bits / 8] of uint8.
    """
    if bits == 8:
        return codes.contiguous()
    lanes, size, wide = _word(bits)
    groups = codes.unflatten(-1, (-1, lanes))
    word = torch.zeros(groups.shape[:-1], dtype=wide, device=codes.device)
    for lane in range(lanes):
        word |= groups[..., lane].to(wide) << (bits * lane)
    octets = [((word >> (8 * i)) & 255).to(torch.uint8) for i in range(size)]
    return torch.stack(octets, dim=-1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: [..., n * bits / 8] to [..., n], uint8."""
    if bits == 8:
        return packed
    lanes, size, wide = _word(bits)
    groups = packed.unflatten(-1, (-1, size))
    word = groups[..., 0].to(wide)
    for i in range(1, size):
        word |= groups[..., i].to(wide) << (8 * i)
    codes = packed.new_empty(*word.shape, lanes)
    for lane in range(lanes):
        codes[..., lane] = (word >> (bits * lane)) & (2**bits - 1)
    return codes.flatten(-2)


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Codes per word, bytes per word, and an integer that holds the word."""
    shared = math.gcd(bits, 8)
    lanes, size = 8 // shared, bits // shared
    return lanes, size, torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64

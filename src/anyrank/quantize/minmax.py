"""Codes by min-max: the smallest weight of a tile is code 0, the largest is the last code.

    offset = min,  scale = (max - min) / (2^b - 1),  code = round((w - offset) / scale)

Scale and offset are rounded to the storage precision before the codes are chosen, so the codes are
the best ones for what is stored. A tile of one value has scale 0: its offset is that value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Affine, AffineFormat, pack


def minmax(weight: Tensor, form: AffineFormat) -> Affine:
    """Quantize a float weight [d_out, d_in]."""
    scales, offsets = min_max_grid(in_tiles(weight, form), form)
    return with_codes(weight, scales, offsets, form)


def in_tiles(weight: Tensor, form: AffineFormat) -> Tensor:
    """The weight in float32, as [d_out/rows, rows, d_in/columns, columns]."""
    rows, columns = form.tile
    tiles = (weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
    return weight.float().reshape(tiles)


def min_max_grid(tiles: Tensor, form: AffineFormat) -> tuple[Tensor, Tensor]:
    """Scales and offsets [d_out/rows, d_in/columns] that span every tile of `in_tiles`."""
    low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
    return ((high - low) / form.top).to(form.dtype), low.to(form.dtype)


def nearest_codes(weight: Tensor, scales: Tensor, offsets: Tensor, form: AffineFormat) -> Tensor:
    """The nearest code of every weight, in float32; 0 where the scale is 0.

    Args:
        weight: of any shape, in float32.
        scales: float32, broadcast to the shape of the weight.
        offsets: likewise.
        form: the format.
    """
    codes = (weight - offsets).div_(scales).round_().clamp_(0, form.top)
    return codes.masked_fill_(scales == 0, 0.0)


def with_codes(weight: Tensor, scales: Tensor, offsets: Tensor, form: AffineFormat) -> Affine:
    """The weight on a given grid: scales and offsets [d_out/rows, d_in/columns]."""
    step, low = (part.float()[:, None, :, None] for part in (scales, offsets))
    codes = nearest_codes(in_tiles(weight, form), step, low, form).to(torch.uint8)
    return Affine(pack(codes.view(weight.shape), form.bits), scales, offsets, form)

"""Codes by min-max: the smallest weight of a tile is code 0, the largest is the last code.

    offset = min,  scale = (max - min) / (2^b - 1),  code = round((w - offset) / scale)

Scale and offset are rounded to the storage precision before the codes are chosen, so the codes are
the best ones for what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Affine, AffineFormat, pack


def minmax(weight: Tensor, form: AffineFormat) -> Affine:
    """Quantize a float weight [d_out, d_in]."""
    tiles = in_tiles(weight, form)
    low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
    scales = ((high - low) / form.top).to(form.dtype)
    return with_codes(weight, scales, low.to(form.dtype), form)


def in_tiles(weight: Tensor, form: AffineFormat) -> Tensor:
    """The weight in float32, as [d_out/rows, rows, d_in/columns, columns]."""
    rows, columns = form.tile
    return weight.float().view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)


def with_codes(weight: Tensor, scales: Tensor, offsets: Tensor, form: AffineFormat) -> Affine:
    """The nearest code of every weight; code 0 where the scale is 0."""
    step = scales.float()[:, None, :, None]
    codes = (in_tiles(weight, form) - offsets.float()[:, None, :, None]).div_(step)
    codes = codes.nan_to_num_(nan=0.0).round_().clamp_(0, form.top).to(torch.uint8)
    codes = torch.where(step == 0, 0, codes)
    return Affine(pack(codes.view(weight.shape), form.bits), scales, offsets, form)

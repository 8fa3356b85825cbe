"""A weight of affine codes, with the adapter inside of the offsets.

    W[i, j] = scale[t] * code[i, j] + offset[t],        t: the tile of rows x columns around (i, j)
    offset' = round(offset + s C / p),                  for an update that is constant on tiles

The rounding to the storage precision is the one that the folded file has, so what is trained is
what is deployed. Gradients pass straight through it (linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import Update
from .bits import unpack
from .triton_available import available

CPU_CHUNK = 2**20  # weights


def tile_name(tile: tuple[int, int]) -> str:
    """'groups of 32', 'tiles of 8x4'."""
    rows, columns = tile
    return f"groups of {columns}" if rows == 1 else f"tiles of {rows}x{columns}"


@dataclass(frozen=True)
class AffineFormat:
    """How a weight is stored.

    Attributes:
        bits: bits per code, 2..8.
        tile: (rows, columns) that share scale and offset: (1, group) or such as (8, 4).
        dtype: the storage precision of scales and offsets.
    """

    bits: int
    tile: tuple[int, int]
    dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        return f"{self.bits} bits in {tile_name(self.tile)}"

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def tiles(self, d_out: int, d_in: int) -> tuple[int, int]:
        """The shape of scales and of offsets."""
        return d_out // self.tile[0], d_in // self.tile[1]

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight, scale and offset included."""
        return self.bits + 16 * self.dtype.itemsize / (self.tile[0] * self.tile[1])


class Affine(NamedTuple):
    """One quantized weight of d_out x d_in.

    Attributes:
        codes: [d_out, d_in * bits / 8] of uint8, as `pack` makes them.
        scales: [d_out/rows, d_in/columns] in the storage precision.
        offsets: like scales.
        form: how to read them.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    form: AffineFormat

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [d_out, d_in]: computed in float32, then rounded to `dtype`.

        The product of an fp16 or bf16 scale and a code is exact in float32, so the sum is rounded
        once, and every reader that computes in float32 gets the same bits.
        """
        d_out, d_in = len(self.codes), self.codes.shape[1] * 8 // self.form.bits
        tall = self.form.tile[0]
        step = d_out
        if self.codes.device.type == "cpu":  # pieces that stay in its cache: 2.8 times as fast
            step = max(CPU_CHUNK // (d_in * tall), 1) * tall
        if step >= d_out:
            return self._rows(0, d_out).to(dtype)
        w = torch.empty(d_out, d_in, dtype=dtype)
        for first in range(0, d_out, step):
            w[first : first + step] = self._rows(first, first + step)
        return w

    def dense(self, dtype: torch.dtype, inside: Sequence[Update] = ()) -> Tensor:
        """W with the updates folded into its offsets one after the other."""
        if available(self.codes.device) and not torch.compiler.is_compiling():
            from .triton_affine import affine_weight

            return affine_weight(self, dtype, inside)
        offsets = self.offsets
        for update in inside:
            offsets = fold_offsets(offsets, update, self.form.tile)
        return self._replace(offsets=offsets).weight(dtype)

    def _rows(self, first: int, last: int) -> Tensor:
        """Some rows of W in float32; whole tiles of them."""
        tall, columns = self.form.tile
        w = unpack(self.codes[first:last], self.form.bits).float()
        tiles = w.view(w.shape[0] // tall, tall, w.shape[1] // columns, columns)
        part = slice(first // tall, -(-last // tall))
        tiles.mul_(self.scales[part].float()[:, None, :, None])
        tiles.add_(self.offsets[part].float()[:, None, :, None])
        return w


def fold_offsets(offsets: Tensor, update: Update, tile: tuple[int, int]) -> Tensor:
    """round(offset + s C / p): the offsets after a fold.

    Summed in float64 (float32 where a device has none), so that neither the order of a sum nor the
    device decides about the last bit of a stored offset, and autocast leaves it alone.

    Args:
        offsets: [d_out/rows, d_in/columns].
        update: constant on tiles: rows divides q, columns divides p.
        tile: (rows, columns).

    Returns:
        Like `offsets`, in its dtype.
    """
    wide = torch.float32 if offsets.device.type == "mps" else torch.float64
    core = tuple(part.detach().to(wide) for part in update.core)
    return (offsets.to(wide) + update._replace(core=core).on_tiles(*tile)).to(offsets.dtype)

"""A linear layer on affine codes, with the adapter inside of the offsets.

    W[i, j] = scale[t] * code[i, j] + offset[t],        t: the tile of rows x columns around (i, j)
    offset' = round(offset + s C / p),                  for an update that is constant on tiles
    y       = x (scale * code + offset')^T

The rounding to the storage precision is the one that the folded file has, so what is trained is
what is deployed. Backward: straight through the rounding, by pooled inputs and summed outputs,

    u = P x,  v = R^T g:     dS = s v^T u,     dA = s (v B)^T u,     dB = s v^T (u A^T)

so no gradient of the size of W is ever made, and of the input only P x is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import Update, pool
from .bits import unpack

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


def affine_linear(x: Tensor, weight: Affine, updates: Sequence[Update] = ()) -> Tensor:
    """y = x W'^T, with the updates folded into the offsets one after the other.

    Args:
        x: [..., d_in]; the product is computed in its dtype, or in that of autocast.
        weight: the frozen weight.
        updates: constant on the tiles of the weight.

    Returns:
        [..., d_out].
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    core = [part for update in updates for part in update.core]
    shapes = tuple((len(u.core), u.p, u.q, u.scale) for u in updates)
    trained = torch.is_grad_enabled() and any(part.requires_grad for part in core)
    return _AffineLinear.apply(x, weight, shapes, trained, *core)  # type: ignore[return-value]


def _updates(shapes: tuple[tuple[int, int, int, float], ...], core: Sequence[Tensor]):
    parts = iter(core)
    for count, p, q, scale in shapes:
        yield Update(tuple(next(parts) for _ in range(count)), p, q, scale)


def _folded(weight: Affine, updates: Sequence[Update], dtype: torch.dtype) -> Tensor:
    """W' [d_out, d_in]."""
    offsets = weight.offsets
    for update in updates:
        offsets = fold_offsets(offsets, update, weight.form.tile)
    return weight._replace(offsets=offsets).weight(dtype)


class _AffineLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Affine, shapes: Any, trained: bool, *core: Tensor
    ) -> Tensor:
        updates = list(_updates(shapes, core))
        ctx.weight, ctx.shapes, ctx.x_dtype = weight, shapes, x.dtype
        pools = {update.p for update in updates} if trained else set()
        pooled = {p: pool(x, p).reshape(-1, x.shape[-1] // p) for p in sorted(pools)}
        ctx.pools = tuple(pooled)
        ctx.save_for_backward(*core, *pooled.values())
        return torch.nn.functional.linear(x, _folded(weight, updates, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        saved = ctx.saved_tensors  # once: checkpointing unpacks every tensor a single time
        count = len(saved) - len(ctx.pools)
        updates = list(_updates(ctx.shapes, saved[:count]))
        pooled = dict(zip(ctx.pools, saved[count:], strict=True))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ _folded(ctx.weight, updates, ctx.x_dtype)
        wanted = iter(ctx.needs_input_grad[4:])
        g = g.reshape(-1, g.shape[-1])
        found: list[Tensor | None] = []
        for update in updates:
            needed = [next(wanted) for _ in update.core]
            if not any(needed):
                found += [None] * len(needed)
                continue
            v = g if update.q == 1 else g.unflatten(-1, (-1, update.q)).sum(-1)
            found += _core_gradients(update, pooled[update.p], v, needed)
        return dx, None, None, None, *found


def _core_gradients(
    update: Update, u: Tensor, v: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of (A, B) or (S,) from u [tokens, d_in/p] and v [tokens, d_out/q]."""
    if len(update.core) == 1:
        return [(v.T @ u * update.scale).to(update.core[0].dtype)]
    a, b = update.core
    da = (v @ b.to(v.dtype)).T @ u * update.scale if needed[0] else None
    db = v.T @ (u @ a.to(u.dtype).T) * update.scale if needed[1] else None
    return [
        None if d is None else d.to(part.dtype)
        for d, part in zip((da, db), update.core, strict=True)
    ]

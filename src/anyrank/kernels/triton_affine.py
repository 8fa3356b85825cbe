"""W of affine codes in one launch: the codes are read once, W is written once.

    W[i, j] = scale[t] * code[i, j] + offset'[t],        t: the tile of rows x columns around (i, j)
    offset' = round(offset + s C / p),                   C = B A or S, in float64

The naive reference is `Affine.dense`. Every step is rounded where the reference rounds it, so no
product and sum in float32 may be contracted. Only the order in which the products of B A are added
is another, as it is on another device; float64 has 29 bits more than the widest stored offset.

One program makes a block of W. A unit is a stretch of columns within one tile; a run is what is
read as one word of codes. Both are powers of two that divide the columns of a tile, so that neither
is cut by the end of a tile or of a row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import Update
from .affine import Affine, fold_offsets

MAX_UNIT, MAX_RUN = 256, 8  # columns
BLOCK_ROWS, BLOCK_COLUMNS = 8, 512
BLOCK_PRODUCTS = 4096  # of B and A, which a program holds at a time
UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}


def affine_weight(weight: Affine, dtype: torch.dtype, inside: Sequence[Update] = ()) -> Tensor:
    """W [d_out, d_in] with the updates folded into its offsets one after the other.

    The last update is part of the launch; `fold_offsets` folds those before it.

    Args:
        weight: the frozen weight; its tensors contiguous.
        dtype: of W, which is computed in float32 and rounded once.
        inside: the updates, constant on the tiles of the weight.

    Returns:
        W in new memory.
    """
    form = weight.form
    d_out, d_in = len(weight.codes), weight.codes.shape[1] * 8 // form.bits
    offsets = weight.offsets
    for update in inside[:-1]:
        offsets = fold_offsets(offsets, update, form.tile)
    core, p, q, scale = inside[-1] if inside else Update((), 1, 1, 0.0)
    parts = [part.detach().contiguous() for part in core]

    unit = _power_of_two(form.tile[1], MAX_UNIT)
    run = min(unit, MAX_RUN)
    step = _power_of_two(run * form.bits, 64)  # runs begin at its multiples, in bits
    piece = max(step, 8)
    word = run * form.bits + piece - step  # bits, with those before the run in its first piece
    codes = weight.codes.view(UNSIGNED[piece])
    w = torch.empty(d_out, d_in, dtype=dtype, device=codes.device)
    blocks = triton.cdiv(d_out, BLOCK_ROWS) * triton.cdiv(d_in, BLOCK_COLUMNS)
    with torch.cuda.device_of(w):
        _affine_weight[(blocks,)](
            *(w, codes, weight.scales, offsets),
            *(parts[0] if parts else None, parts[-1] if parts else None),
            *(d_out, d_in, codes.numel(), len(parts[0]) if parts else 0, _bits(scale)),
            BITS=form.bits,
            ROWS=form.tile[0],
            COLUMNS=form.tile[1],
            P=p,
            Q=q,
            CORE=len(parts),
            RUN=run,
            UNIT=unit,
            PIECE=piece,
            PIECES=triton.cdiv(word, piece),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            BLOCK_RANK=max(BLOCK_PRODUCTS * unit // (BLOCK_ROWS * BLOCK_COLUMNS), 1),
            enable_fp_fusion=False,  # type: ignore[call-arg] (of the launch)
        )
    return w


def _power_of_two(number: int, limit: int) -> int:
    """The largest power of two that divides `number`, at most `limit`."""
    return min(number & -number, limit)


def _bits(number: float) -> int:
    """The bits of a float64; as a float, an argument would reach the kernel in float32."""
    return struct.unpack("q", struct.pack("d", number))[0]


@triton.jit
def _runs(
    codes,
    size,
    row,
    run,
    row_bits,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The codes of some runs of some rows: [rows, runs, RUN]."""
    bit = run * (RUN * BITS)
    first = row.to(tl.int64)[:, None] * (row_bits // PIECE) + (bit // PIECE)[None, :]
    word = tl.load(codes + first, mask=first < size, other=0).to(tl.int64)
    for i in tl.static_range(1, PIECES):  # type: ignore[misc]
        piece = tl.load(codes + first + i, mask=first + i < size, other=0)
        word |= piece.to(tl.int64) << (PIECE * i)
    if PIECE * PIECES <= 32:
        word = word.to(tl.int32)
    shift = (bit % PIECE)[:, None] + tl.arange(0, RUN)[None, :] * BITS
    return (word[:, :, None] >> shift[None, :, :]) & (2**BITS - 1)


@triton.jit
def _low_rank(a, b, row, column, row_ok, column_ok, width, rank, BLOCK_RANK: tl.constexpr):
    """B A in float64 at some rows and columns."""
    c = tl.zeros([row.shape[0], column.shape[0]], tl.float64)
    for first in range(0, rank, BLOCK_RANK):
        k = first + tl.arange(0, BLOCK_RANK)
        a_ok, b_ok = (k < rank)[:, None] & column_ok[None, :], row_ok[:, None] & (k < rank)[None, :]
        a_k = tl.load(a + k[:, None] * width + column[None, :], mask=a_ok, other=0.0)
        b_k = tl.load(b + row[:, None] * rank + k[None, :], mask=b_ok, other=0.0)
        c += tl.sum(b_k.to(tl.float64)[:, :, None] * a_k.to(tl.float64)[None, :, :], axis=1)
    return c


@triton.jit(do_not_specialize=["rank", "scale_bits"])
def _affine_weight(
    w,
    codes,
    scales,
    offsets,
    a,  # A [rank, d_in / P], or S [d_out / Q, d_in / P]
    b,  # B [d_out / Q, rank]
    d_out,
    d_in,
    size,  # of the codes, in pieces
    rank,
    scale_bits,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    CORE: tl.constexpr,
    RUN: tl.constexpr,
    UNIT: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    row_block = tl.program_id(0) // tl.cdiv(d_in, BLOCK_COLUMNS)
    first = tl.program_id(0) % tl.cdiv(d_in, BLOCK_COLUMNS) * BLOCK_COLUMNS
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = first + tl.arange(0, BLOCK_COLUMNS)
    unit = first + tl.arange(0, BLOCK_COLUMNS // UNIT) * UNIT
    run = first // RUN + tl.arange(0, BLOCK_COLUMNS // RUN)
    row_ok, unit_ok = row < d_out, unit < d_in
    ok = row_ok[:, None] & unit_ok[None, :]

    tile = (row // ROWS)[:, None] * (d_in // COLUMNS) + (unit // COLUMNS)[None, :]
    scale = tl.load(scales + tile, mask=ok).to(tl.float32)
    offset = tl.load(offsets + tile, mask=ok)
    if CORE > 0:
        i, j, width = row // Q, unit // P, d_in // P
        if CORE == 1:
            c = tl.load(a + i[:, None] * width + j[None, :], mask=ok).to(tl.float64)
        else:
            c = _low_rank(a, b, i, j, row_ok, unit_ok, width, rank, BLOCK_RANK)
        s = scale_bits.to(tl.int64).to(tl.float64, bitcast=True)
        folded = offset.to(tl.float64) + c / P * s
        offset = folded.to(tl.float32).to(offset.dtype)  # in two steps, as Torch rounds a float64

    code = _runs(codes, size, row, run, d_in * BITS, BITS, RUN, PIECE, PIECES)
    code = tl.reshape(code, [BLOCK_ROWS, BLOCK_COLUMNS // UNIT, UNIT]).to(tl.float32)
    value = scale[:, :, None] * code + offset.to(tl.float32)[:, :, None]
    value = tl.reshape(value, [BLOCK_ROWS, BLOCK_COLUMNS]).to(w.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * d_in + column[None, :]
    tl.store(w + place, value, mask=row_ok[:, None] & (column < d_in)[None, :])

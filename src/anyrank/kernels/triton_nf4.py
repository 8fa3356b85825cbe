"""W of bitsandbytes' NF4 and FP4 codes in one launch, nested block scales included.

    W[i] = table[code[i]] * absmax[i // blocksize]                    i: along the flattened weight
    absmax[b] = table2[code2[b]] * absmax2[b // blocksize2] + offset           where they are nested

Two codes share a byte, the first one in its high half. The naive reference is
`bitsandbytes.functional.dequantize_4bit` (on CUDA: kDequantizeBlockwise in its csrc/kernels.cu). It
computes in float32 and rounds the inner product before it adds the offset, so these two may not be
contracted; the outer product is rounded to the dtype of the weight. The same bits follow, but for
the sign of a zero in FP4, on which its own backends differ.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # weights of one program
FLOATS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def nf4_weight(packed: Tensor, state: Any, dtype: torch.dtype | None = None) -> Tensor:
    """W [d_out, d_in], as dequantize_4bit(packed, state).to(dtype) computes it.

    Args:
        packed: the data of a Params4bit: [ceil(d_out * d_in / 2), 1] in uint8, or fewer rows of a
            wider storage dtype.
        state: its quant_state, a bitsandbytes.functional.QuantState.
        dtype: of the result; None: that of the weight before quantization.

    Returns:
        W in new memory.
    """
    packed, nested = packed.view(torch.uint8), state.state2
    w = torch.empty(state.shape, dtype=dtype or state.dtype, device=packed.device)
    with torch.cuda.device_of(w):
        _nf4_weight[(triton.cdiv(w.numel(), BLOCK),)](
            *(w, packed, state.code, state.absmax),
            *(nested.code, nested.absmax, state.offset) if nested else (None, None, None),
            *(w.numel(), packed.numel(), state.absmax.numel()),
            BLOCKSIZE=state.blocksize,
            NESTED=nested.blocksize if nested else 0,
            DTYPE=FLOATS[state.dtype],
            BLOCKS=max(BLOCK // state.blocksize, 1),
            enable_fp_fusion=False,  # type: ignore[call-arg] (of the launch)
        )
    return w


@triton.jit
def _nf4_weight(
    w,
    packed,
    table,
    absmax,  # float32, or the codes of nested scales
    table2,
    absmax2,
    offset,
    size,
    packed_size,
    blocks,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,  # blocksize2, or 0
    DTYPE: tl.constexpr,  # of the weight before quantization
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    ok = block < blocks
    scale = tl.load(absmax + block, mask=ok, other=0)
    if NESTED > 0:
        scale = tl.load(table2 + scale.to(tl.int32)) * tl.load(absmax2 + block // NESTED, mask=ok)
        scale += tl.load(offset)

    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    pair = tl.load(packed + byte, mask=byte < packed_size, other=0).to(tl.int32)
    code = (pair[:, :, None] >> (4 - 4 * tl.arange(0, 2))[None, None, :]) & 15
    value = tl.load(table + tl.reshape(code, [BLOCKS, BLOCKSIZE])) * scale.to(tl.float32)[:, None]
    place = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(w + place, value.to(DTYPE).to(w.dtype.element_ty), mask=place < size)

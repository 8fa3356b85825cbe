"""Packed codes against the stream of bits written out by hand."""

from __future__ import annotations

import pytest
import torch

from anyrank.kernels import pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 5, 40)])
def test_a_row_is_one_stream_of_bits_with_the_little_end_first(bits, shape):
    torch.manual_seed(bits)
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    row, stream = codes.flatten(0, -2)[0] if codes.ndim > 1 else codes, 0
    for j, code in enumerate(row.tolist()):
        stream |= code << (bits * j)
    first = packed.flatten(0, -2)[0] if codes.ndim > 1 else packed
    assert bytes(first.tolist()) == stream.to_bytes(shape[-1] * bits // 8, "little")

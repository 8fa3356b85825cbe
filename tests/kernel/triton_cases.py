"""The Triton kernels against their naive references, bit for bit.

`test_triton.py` runs this file in an interpreter of its own: on a GPU, or with TRITON_INTERPRET=1
on a CPU. New memory holds NaN, so that what a kernel leaves out is seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from anyrank.algebra import Update
from anyrank.kernels import Affine, AffineFormat, pack
from anyrank.kernels.triton_affine import affine_weight
from anyrank.kernels.triton_available import available
from anyrank.kernels.triton_nf4 import nf4_weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*shape, **options) -> torch.Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True, scope="module")
def nearest_bfloat16() -> Iterator[None]:
    """A GPU rounds float32 to the nearest bfloat16; Triton's interpreter cuts bits off."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.tensor(data).bfloat16().view(torch.uint16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", nearest)
        yield


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.device.type) == (wanted.dtype, wanted.shape, DEVICE.type)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.itemsize]
    assert torch.equal(got.view(whole), wanted.view(whole))


def test_the_kernels_are_available_here():
    assert available(DEVICE)


# NF4 and FP4


def quantized(shape, dtype=torch.bfloat16, kind="nf4", nested=True, **options):
    torch.manual_seed(0)
    w = torch.randn(shape).to(DEVICE, dtype)
    quantize = pytest.importorskip("bitsandbytes.functional").quantize_4bit
    return quantize(w, quant_type=kind, compress_statistics=nested, **options)


def nf4_reference(packed: torch.Tensor, state) -> torch.Tensor:
    size = state.shape.numel()
    octets = packed.view(torch.uint8).flatten().int()
    codes = torch.stack((octets >> 4, octets & 15), dim=1).flatten()[:size]
    absmax = state.absmax
    if state.nested:
        scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(absmax)]
        absmax = state.state2.code[absmax.int()] * scales + state.offset
    w = state.code[codes] * absmax.repeat_interleave(state.blocksize)[:size]
    return w.view(state.shape).to(state.dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 64), (130, 258), (48, 96), (3, 1001), (1, 7)])
def test_nf4_is_table_times_absmax(shape, kind, nested):
    packed, state = quantized(shape, kind=kind, nested=nested)
    assert_same_bits(nf4_weight(packed, state), nf4_reference(packed, state))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_other_block_sizes(blocksize):
    packed, state = quantized((96, 99), blocksize=blocksize)
    assert_same_bits(nf4_weight(packed, state), nf4_reference(packed, state))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nf4_is_what_bitsandbytes_computes(kind, nested, dtype):
    """Its AVX-512 code needs rows of whole blocks; d_in=258 is left to its scalar code."""
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    for shape in [(5, 192), (130, 258)]:
        packed, state = quantized(shape, dtype, kind, nested)
        got, wanted = nf4_weight(packed, state), dequantize_4bit(packed, state)
        if kind == "nf4":
            assert_same_bits(got, wanted)
        assert torch.equal(got, wanted)  # its FP4 has zeros of either sign


@pytest.mark.parametrize("stored", FLOATS)
def test_nf4_is_rounded_to_the_dtype_of_the_weight_first(stored):
    packed, state = quantized((33, 40), stored)
    for dtype in FLOATS:
        assert_same_bits(nf4_weight(packed, state, dtype), nf4_reference(packed, state).to(dtype))


def test_the_bytes_may_be_stored_as_another_dtype():
    packed, state = quantized((48, 64), quant_storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert_same_bits(nf4_weight(packed, state), nf4_reference(packed, state))


# Affine codes

GEOMETRIES = [  # d_out, d_in, tile, p, q
    (48, 96, (1, 16), 16, 1),
    (48, 96, (1, 32), 96, 3),
    (48, 96, (8, 4), 4, 8),
    (48, 96, (8, 4), 12, 16),
    (7, 1040, (1, 520), 1040, 7),
    (24, 72, (3, 12), 36, 6),
    (5, 40, (1, 5), 10, 5),
    (9, 1536, (1, 768), 768, 1),
]


def affine(d_out, d_in, tile, bits=4, dtype=torch.float16) -> Affine:
    torch.manual_seed(0)
    form = AffineFormat(bits, tile, dtype)
    codes = torch.randint(2**bits, (d_out, d_in), dtype=torch.uint8)
    scales, offsets = torch.rand(2, *form.tiles(d_out, d_in)).sub(0.5).to(DEVICE, dtype)
    return Affine(pack(codes, bits).to(DEVICE), scales, offsets, form)


def update(d_out, d_in, p, q, rank=None, dtype=torch.float32) -> Update:
    """Dense without a rank. The scale is no float32."""
    torch.manual_seed(1)
    shapes = [(rank, d_in // p), (d_out // q, rank)] if rank else [(d_out // q, d_in // p)]
    core = (torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes)
    return Update(tuple(core), p, q, 1 / 3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("d_in", "tile"), [(96, (1, 32)), (96, (8, 4)), (40, (1, 5)), (1536, (1, 768))]
)
def test_codes_of_every_width(d_in, tile, bits):
    weight = affine(16, d_in, tile, bits)
    assert_same_bits(affine_weight(weight, torch.float32), weight.dense(torch.float32))


@pytest.mark.parametrize("rank", [None, 5, 40])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_update_inside_of_the_offsets(geometry, rank):
    """Stored in float32, which shows more of the sum than a storage of 16 bits."""
    d_out, d_in, tile, p, q = geometry
    weight, change = affine(d_out, d_in, tile, dtype=torch.float32), update(d_out, d_in, p, q, rank)
    wanted = weight.dense(torch.float32, [change])
    assert_same_bits(affine_weight(weight, torch.float32, [change]), wanted)
    assert not torch.equal(wanted, weight.dense(torch.float32))


@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_every_dtype_of_weights_and_offsets(dtype, storage):
    weight, change = affine(24, 160, (1, 32), 3, storage), update(24, 160, 32, 2, 6)
    wanted = weight.dense(dtype, [change])
    assert_same_bits(affine_weight(weight, dtype, [change]), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_of_adapters(dtype):
    weight, change = affine(16, 64, (1, 16)), update(16, 64, 16, 1, 3, dtype)
    wanted = weight.dense(torch.float32, [change])
    assert_same_bits(affine_weight(weight, torch.float32, [change]), wanted)


def test_several_updates_fold_one_after_the_other():
    weight = affine(16, 64, (1, 16))
    changes = [update(16, 64, 16, 1, 3), update(16, 64, 32, 2), update(16, 64, 16, 4, 2)]
    wanted = weight.dense(torch.bfloat16, changes)
    assert_same_bits(affine_weight(weight, torch.bfloat16, changes), wanted)


def test_the_first_rows_of_an_adapter():
    weight, whole = affine(16, 64, (1, 16)), update(16, 64, 16, 1, 6)
    first = whole._replace(core=(whole.core[0][:4], whole.core[1][:, :4]))
    wanted = weight.dense(torch.float32, [first])
    assert_same_bits(affine_weight(weight, torch.float32, [first]), wanted)


@pytest.mark.parametrize("bits", [3, 4])
def test_more_than_one_program_in_both_directions(bits):
    weight, change = affine(19, 1088, (1, 64), bits), update(19, 1088, 64, 1, 9)
    wanted = weight.dense(torch.float16, [change])
    assert_same_bits(affine_weight(weight, torch.float16, [change]), wanted)

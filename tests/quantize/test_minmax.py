"""Min-max codes: the grid, its rounding, and the corners of the storage precision."""

import pytest
import torch

from anyrank.kernels import AffineFormat, unpack
from anyrank.quantize.minmax import minmax

TILES = [(1, 16), (1, 32), (8, 4), (2, 8)]


def some_weight(d_out: int = 24, d_in: int = 64, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1)) * scale


def naive(weight, form):
    """One tile after the other, in float64."""
    rows, columns = form.tile
    d_out, d_in = weight.shape
    codes = torch.empty(d_out, d_in, dtype=torch.uint8)
    scales = torch.empty(form.tiles(d_out, d_in), dtype=form.dtype)
    offsets = torch.empty_like(scales)
    for i in range(0, d_out, rows):
        for j in range(0, d_in, columns):
            tile = weight[i : i + rows, j : j + columns]
            scale = ((tile.max() - tile.min()) / (2**form.bits - 1)).to(form.dtype)
            offset = tile.min().to(form.dtype)
            scales[i // rows, j // columns], offsets[i // rows, j // columns] = scale, offset
            exact = (tile.double() - offset.double()) / scale.double()
            codes[i : i + rows, j : j + columns] = exact.round().clamp(0, form.top)
    return codes, scales, offsets


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_is_the_naive_one(bits, tile):
    weight, form = some_weight(), AffineFormat(bits, tile)
    affine = minmax(weight, form)
    codes, scales, offsets = naive(weight, form)
    assert torch.equal(unpack(affine.codes, bits), codes)
    assert torch.equal(affine.scales, scales)
    assert torch.equal(affine.offsets, offsets)
    assert affine.form == form


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_and_offset_are_in_the_storage_precision(dtype, source):
    weight = some_weight().to(source)
    affine = minmax(weight, AffineFormat(4, (1, 16), dtype))
    assert affine.scales.dtype == affine.offsets.dtype == dtype
    assert affine.codes.dtype == torch.uint8
    assert float((affine.weight() - weight.float()).norm() / weight.float().norm()) < 0.1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-4, 1e-6])
def test_the_error_is_half_a_step_and_the_rounding_of_the_grid(bits, scale):
    """Also where fp16 scales are subnormal: they lie below 6.1e-5."""
    form = AffineFormat(bits, (1, 16))
    weight = some_weight(scale=scale)
    affine = minmax(weight, form)
    low, high = (t.double() for t in weight.view(24, 4, 16).aminmax(dim=2))
    step, offset = affine.scales.double(), affine.offsets.double()
    bound = step / 2 + form.top * (step - (high - low) / form.top).abs() + (offset - low).abs()
    error = (affine.weight().double() - weight.double()).abs().view(24, 4, 16).amax(2)
    assert (error <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("tile", TILES)
def test_a_constant_tile_has_code_0_and_its_value_as_offset(tile):
    weight = torch.full((24, 64), 0.3)
    affine = minmax(weight, AffineFormat(4, tile))
    assert affine.scales.count_nonzero() == 0
    assert affine.codes.count_nonzero() == 0
    assert torch.equal(affine.weight(), torch.full((24, 64), 0.3).half().float())


def test_a_range_below_the_smallest_scale_gives_scale_0():
    weight = torch.full((1, 16), 0.25)
    weight[0, 3] += 2.0**-22
    affine = minmax(weight, AffineFormat(4, (1, 16)))
    assert float(affine.scales) == 0.0
    assert torch.equal(affine.weight(), torch.full((1, 16), 0.25))


def test_a_quantized_weight_quantizes_to_itself():
    """The codes of a tile that uses both ends of the grid come back."""
    form = AffineFormat(4, (1, 16), torch.float32)
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(2))
    codes[:, 0::16], codes[:, 1::16] = 0, 15
    weight = codes * 0.125 - 1.0
    affine = minmax(weight, form)
    assert torch.equal(unpack(affine.codes, 4).long(), codes)
    assert torch.equal(affine.weight(), weight)


def test_a_weight_that_is_not_contiguous_is_read_as_it_is():
    weight = some_weight(64, 24)
    form = AffineFormat(3, (2, 8))
    assert torch.equal(minmax(weight.T, form).codes, minmax(weight.T.contiguous(), form).codes)

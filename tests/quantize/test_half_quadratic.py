"""Half-quadratic codes: never worse than min-max, and as good as the library's."""

import math

import pytest
import torch

from anyrank.kernels import AffineFormat, unpack
from anyrank.quantize.half_quadratic import half_quadratic
from anyrank.quantize.minmax import in_tiles, minmax


def some_weight(d_out: int = 48, d_in: int = 128) -> torch.Tensor:
    """Heavier tails than a normal distribution, as real weights have."""
    generator = torch.Generator().manual_seed(6)
    normal = torch.randn(2, d_out, d_in, generator=generator)
    return normal[0] * (0.6 + 0.4 * normal[1].abs()) * 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tile", [(1, 16), (1, 64), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_tile_is_worse_than_min_max(bits, tile, dtype):
    weight, form = some_weight(), AffineFormat(bits, tile, dtype)
    errors = (weight.double() - q(weight, form).weight() for q in (half_quadratic, minmax))
    rows, columns = tile
    shape = (48 // rows, rows, 128 // columns, columns)
    ours, theirs = (error.view(shape).abs().pow(0.7).sum(dim=(1, 3)) for error in errors)
    assert (ours <= theirs * (1 + 1e-5)).all()
    if dtype == torch.float16:  # at 8 bits a bf16 offset has no neighbour within a step
        assert ours.sum() < 0.99 * theirs.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codes_are_the_nearest_of_the_stored_grid(bits):
    weight, form = some_weight(), AffineFormat(bits, (8, 4))
    affine = half_quadratic(weight, form)
    assert affine.scales.dtype == affine.offsets.dtype == torch.float16
    assert torch.equal(affine.scales, minmax(weight, form).scales)
    tiles = in_tiles(weight, form)
    step, low = (t.float()[:, None, :, None] for t in (affine.scales, affine.offsets))
    grid = torch.arange(form.top + 1.0).view(-1, 1, 1, 1, 1) * step + low
    wanted = (tiles - grid).abs().amin(0)
    got = (tiles - in_tiles(affine.weight(), form)).abs()
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-8)


def naive(tile: list[float], bits: int) -> float:
    """The best offset of one tile, number by number; nothing is rounded to a storage precision."""
    top, low = 2**bits - 1, min(tile)
    scale, offset, beta, best = (max(tile) - low) / top, low, 10.0, (math.inf, 0.0)
    for _ in range(20):
        codes = [min(max(round((w - offset) / scale), 0), top) for w in tile]
        errors = [w - (scale * c + offset) for w, c in zip(tile, codes, strict=True)]
        best = min(best, (sum(abs(x) ** 0.7 for x in errors), offset))
        kept = [max(abs(x) - abs(x) ** -0.3 / beta, 0.0) if x else 0.0 for x in errors]
        outliers = [math.copysign(k, x) for k, x in zip(kept, errors, strict=True)]
        parts = zip(tile, outliers, codes, strict=True)
        offset = sum(w - e - scale * c for w, e, c in parts) / len(tile)
        beta *= 1.01
    return best[1]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("size", [1.0, 50.0])
def test_the_offsets_are_those_of_the_equations(bits, size):
    """Size 1: E is 0 throughout. Size 50: errors reach 1, so E takes the outliers."""
    weight = some_weight(16, 32) * size
    form = AffineFormat(bits, (1, 16), torch.float32)
    offsets = half_quadratic(weight, form).offsets
    wanted = [
        [naive(tile.tolist(), bits) for tile in row] for row in weight.double().view(16, 2, 16)
    ]
    close = (offsets - torch.tensor(wanted)).abs() < 1e-5 * size
    assert close.float().mean() > 0.9  # float32 may find a last better turn that float64 does not


def test_a_constant_tile_is_kept():
    affine = half_quadratic(torch.full((8, 32), -0.5), AffineFormat(4, (1, 16)))
    assert torch.equal(affine.weight(), torch.full((8, 32), -0.5))
    assert unpack(affine.codes, 4).count_nonzero() == 0


def test_the_weight_is_left_alone():
    weight = some_weight()
    before = weight.clone()
    half_quadratic(weight, AffineFormat(3, (1, 16)))
    assert torch.equal(weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.filterwarnings("ignore")  # at the import of hqq and of what it imports
def test_as_good_as_the_hqq_package(bits):
    """slow: importing hqq takes seconds."""
    hqq = pytest.importorskip("hqq.core.quantize")
    weight = some_weight(256, 512)
    codes, meta = hqq.Quantizer.quantize(
        weight,
        nbits=bits,
        group_size=64,
        axis=1,
        optimize=True,
        bitpack=False,
        device="cpu",
        compute_dtype=torch.float32,
    )
    theirs = ((codes.float() - meta["zero"]) * meta["scale"]).view(weight.shape)
    ours = half_quadratic(weight, AffineFormat(bits, (1, 64))).weight()
    for power in (0.7, 2.0):
        ratio = (weight - ours).abs().pow(power).mean() / (weight - theirs).abs().pow(power).mean()
        assert float(ratio ** (1 / power)) < 1.01, power

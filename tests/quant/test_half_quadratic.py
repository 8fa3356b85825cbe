"""Half-quadratic codes: never worse than min-max, and as good as the library's."""

import pytest
import torch

from anyrank.kernels import AffineFormat, unpack
from anyrank.quant.half_quadratic import half_quadratic, objective
from anyrank.quant.minmax import in_tiles, minmax


def some_weight(d_out: int = 48, d_in: int = 128) -> torch.Tensor:
    """Heavier tails than a normal distribution, as real weights have."""
    generator = torch.Generator().manual_seed(6)
    normal = torch.randn(2, d_out, d_in, generator=generator)
    return normal[0] * (0.6 + 0.4 * normal[1].abs()) * 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tile", [(1, 16), (1, 64), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_tile_is_worse_than_min_max_and_the_sum_is_better(bits, tile, dtype):
    weight, form = some_weight(), AffineFormat(bits, tile, dtype)
    ours, theirs = (
        objective(in_tiles(weight - quantizer(weight, form).weight(), form))
        for quantizer in (half_quadratic, minmax)
    )
    assert (ours <= theirs).all()
    assert ours.sum() < 0.995 * theirs.sum()


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


def test_large_errors_are_outliers_that_the_offset_does_not_follow():
    """Errors above beta^(-1/(2-p)) = 0.17 are taken by E: the other weights decide the offset."""
    weight = torch.zeros(1, 16)
    weight[0, :8], weight[0, 15] = 1.0, 3.0
    weight[0, 8:12] = 1.3
    form = AffineFormat(2, (1, 16))
    ours, theirs = (q(weight, form) for q in (half_quadratic, minmax))
    assert objective(in_tiles(weight - ours.weight(), form)) <= objective(
        in_tiles(weight - theirs.weight(), form)
    )


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

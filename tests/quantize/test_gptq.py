"""GPTQ: better than rounding where inputs are correlated, the same where they are not."""

import pytest
import torch

from anyrank.errors import DataError
from anyrank.kernels import AffineFormat
from anyrank.quantize.gptq import gptq, inverse_factor
from anyrank.quantize.minmax import minmax


def correlated(d_in: int = 64, tokens: int = 512) -> torch.Tensor:
    """Inputs [d_in, tokens] that share a few directions."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(d_in, 12, generator=generator)
    return mix @ torch.randn(12, tokens, generator=generator) + 0.3 * torch.randn(
        d_in, tokens, generator=generator
    )


def some_weight(d_out: int = 48, d_in: int = 64) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(4)) * 0.02


def lost(weight, affine, x) -> float:
    """|| (W - W^) X || / || W X ||."""
    return float(((weight - affine.weight()) @ x).norm() / (weight @ x).norm())


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("tile", [(1, 16), (1, 32), (8, 4)])
def test_less_of_the_output_is_lost_than_by_rounding(bits, tile):
    weight, x, form = some_weight(), correlated(), AffineFormat(bits, tile)
    affine = gptq(weight, form, 2 * x @ x.T)
    assert lost(weight, affine, x) < 0.8 * lost(weight, minmax(weight, form), x)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("tile", [(1, 16), (1, 64), (8, 4), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_diagonal_hessian_gives_round_to_nearest_bit_for_bit(bits, tile, dtype):
    weight, form = some_weight(), AffineFormat(bits, tile, dtype)
    hessian = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.1)
    got, wanted = gptq(weight, form, hessian), minmax(weight, form)
    for name in ("codes", "scales", "offsets"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


def naive(weight, form, hessian):
    """Column by column on the whole matrix, in float64: no blocks."""
    rows, columns = form.tile
    d_in = weight.shape[1]
    h = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(d_in)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, out = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for j in range(d_in):
        if j % columns == 0:
            tiles = w[:, j : j + columns].reshape(-1, rows * columns)
            low, high = tiles.amin(1), tiles.amax(1)
            scale = ((high - low) / form.top).to(form.dtype).double().repeat_interleave(rows)
            offset = low.to(form.dtype).double().repeat_interleave(rows)
        out[:, j] = ((w[:, j] - offset) / scale).round().clamp(0, form.top) * scale + offset
        w[:, j + 1 :] -= torch.outer((w[:, j] - out[:, j]) / u[j, j], u[j, j + 1 :])
    return out


@pytest.mark.parametrize("tile", [(1, 16), (8, 4), (1, 48)])
def test_blocks_compute_what_one_column_at_a_time_does(tile, monkeypatch):
    monkeypatch.setattr("anyrank.quantize.gptq.BLOCK", 32)
    weight, x = some_weight(d_in=144), correlated(d_in=144)
    form = AffineFormat(4, tile, torch.float32)
    got = gptq(weight, form, 2 * x @ x.T).weight()
    wanted = naive(weight, form, 2 * x @ x.T).float()
    # float32 and float64 break ties apart, and one other code moves its neighbours to the right
    same = (got - wanted).abs() < 1e-5 * weight.abs().max()
    assert same.float().mean() > 0.97
    assert same[:, : tile[1]].all()


def test_an_input_that_never_moved_is_rounded_to_nearest_and_passes_no_error():
    weight, x = some_weight(), correlated()
    x[[0, 7, 40]] = 0
    form = AffineFormat(4, (1, 1), torch.float32)  # its own grid per weight: nothing is lost
    assert (gptq(weight, form, x @ x.T).weight() - weight).abs().max() < 1e-7
    factor = inverse_factor(x @ x.T)
    others = torch.ones(64, dtype=torch.bool)
    others[7] = False
    assert factor[7, others].abs().max() == 0
    assert factor[others, 7].abs().max() == 0


def test_a_layer_that_saw_nothing_is_rounded_to_nearest():
    weight, form = some_weight(), AffineFormat(4, (1, 16))
    assert torch.equal(gptq(weight, form, torch.zeros(64, 64)).codes, minmax(weight, form).codes)


def test_the_factor_is_that_of_the_damped_inverse():
    x = correlated(24)
    hessian = 2 * x @ x.T
    u = inverse_factor(hessian).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(24)
    assert torch.equal(u, u.triu())
    assert (u.T @ u @ damped - torch.eye(24)).abs().max() < 1e-4


def test_a_hessian_of_infinite_activations_is_refused():
    hessian = torch.eye(64)
    hessian[3, 3] = torch.inf
    with pytest.raises(DataError) as caught:
        gptq(some_weight(), AffineFormat(4, (1, 16)), hessian)
    assert str(caught.value) == (
        "the Hessian of the calibration rows has no Cholesky factor; the activations are not "
        "finite, so load the model in bfloat16 or float32, or use other rows"
    )


def test_the_weight_is_left_alone():
    weight, x = some_weight(), correlated()
    before = weight.clone()
    hessian = x @ x.T
    kept = hessian.clone()
    gptq(weight, AffineFormat(3, (1, 16)), hessian)
    assert torch.equal(weight, before)
    assert torch.equal(hessian, kept)

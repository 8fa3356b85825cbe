"""The SVD order of an adapter: the same product, and every prefix the best of its rank."""

from __future__ import annotations

import pytest
import torch

from anyrank.algebra import svd_order
from anyrank.algebra.rotation import ISOTROPIC


def factors(
    r: int, d_in: int, d_out: int, dtype=torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(r)
    return torch.randn(r, d_in, dtype=dtype), torch.randn(d_out, r, dtype=dtype)


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(5, 17, 23), (8, 64, 9), (12, 7, 31), (3, 40, 2)])
def test_every_prefix_is_the_best_approximation_of_its_rank(r, d_in, d_out):
    a, b = factors(r, d_in, d_out)
    a_new, b_new = svd_order(a, b)
    assert (a_new.shape, b_new.shape) == (a.shape, b.shape)
    product = b @ a
    u, sigma, v = torch.linalg.svd(product, full_matrices=False)
    for k in range(1, r + 1):
        best = (u[:, :k] * sigma[:k]) @ v[:k]
        assert torch.allclose(b_new[:, :k] @ a_new[:k], best, atol=1e-12, rtol=0)
    assert torch.allclose(b_new @ a_new, product, atol=1e-12, rtol=0)


def test_the_norms_of_a_row_are_balanced_and_its_sign_is_fixed():
    a, b = svd_order(*factors(6, 20, 30))
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))
    assert (a.norm(dim=1).diff() < 0).all()
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    again = svd_order(a, b)
    assert torch.allclose(again[0], a, atol=1e-12)
    assert torch.allclose(again[1], b, atol=1e-12)


def test_rows_beyond_the_size_of_the_layer_are_zero():
    a, b = svd_order(*factors(12, 7, 31))
    assert not a[7:].any()
    assert not b[:, 7:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays_and_the_product_up_to_one_rounding(dtype):
    a, b = factors(6, 20, 30, dtype)
    a_new, b_new = svd_order(a, b)
    assert (a_new.dtype, b_new.dtype) == (dtype, dtype)
    wanted, found = b.double() @ a.double(), b_new.double() @ a_new.double()
    assert (found - wanted).norm() / wanted.norm() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(5, 17, 23), (8, 64, 9), (12, 7, 31)])
@pytest.mark.parametrize("tokens", [2, 50])
def test_every_prefix_is_the_best_of_its_rank_on_the_inputs_that_were_seen(r, d_in, d_out, tokens):
    a, b = factors(r, d_in, d_out)
    x = torch.randn(tokens, d_in, dtype=torch.float64) * torch.logspace(-2, 1, d_in)
    z = x @ a.T
    a_new, b_new = svd_order(a, b, z.T @ z)
    product = b @ a
    assert torch.allclose(b_new @ a_new, product, atol=1e-11, rtol=0)
    # A weighted problem is a plain one on these inputs: the unit vectors and the rows seen.
    weight = a.square().sum() / (ISOTROPIC * z.square().sum())
    inputs = torch.cat((torch.eye(d_in, dtype=torch.float64), weight.sqrt() * x)).T
    sigma = torch.linalg.svdvals(product @ inputs)
    for k in range(1, min(r, d_in, d_out)):
        left_out = (product - b_new[:, :k] @ a_new[:k]) @ inputs
        assert torch.allclose(left_out.square().sum(), sigma[k:].square().sum(), rtol=1e-9)
    assert torch.allclose(a_new.norm(dim=1), b_new.norm(dim=0))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_inputs_that_say_nothing_count_alike(value):
    a, b = factors(6, 20, 30)
    for wanted, found in zip(
        svd_order(a, b), svd_order(a, b, torch.full((6, 6), value)), strict=True
    ):
        assert torch.equal(wanted, found)

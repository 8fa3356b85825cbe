"""Products with a factor, and of bf16 numbers with sums in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from anyrank.kernels.product import float32_sums, scaled_product


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-15), (torch.bfloat16, 1.8e-3)])
def test_a_scaled_product_is_rounded_once(batch, dtype, error):
    torch.manual_seed(0)
    a, b = (torch.randn(*batch, *shape).to(dtype) for shape in ((50, 70), (40, 70)))
    wanted = 0.3 * (a.double() @ b.double().mT)
    got = scaled_product(a, b.mT, 0.3)
    assert got.dtype == dtype
    assert (got - wanted).norm() < error * wanted.norm()  # 2.3e-3 in bf16 if rounded twice


@pytest.fixture(params=["none", "ieee", "bf16"])
def precision(request) -> Iterator[str]:
    """What a user has chosen for products of float32 matrices."""
    matmul: Any = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = before


def test_float32_sums_of_bf16_products_are_exact_and_leave_the_setting(precision):
    torch.manual_seed(0)
    a, b = (torch.randn(4, 64, 80).bfloat16().float() for _ in range(2))
    with float32_sums():
        made = torch.bmm(a, b.mT)
    with pytest.raises(RuntimeError), float32_sums():
        torch.bmm(a, b)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    wanted = torch.bmm(a.double(), b.double().mT)
    assert (made - wanted).abs().max() < 1e-6 * wanted.abs().max()

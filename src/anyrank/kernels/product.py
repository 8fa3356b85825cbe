"""Products of matrices as this package needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, in one pass and rounded once.

    Args:
        a, b: [n, k] and [k, m], or [batch, n, k] and [batch, k, m].
        scale: multiplies the sums before they are rounded.
    """
    nothing = a.new_zeros(()).expand(*a.shape[:-1], b.shape[-1])
    multiply = torch.addmm if a.ndim == 2 else torch.baddbmm
    return multiply(nothing, a, b, beta=0, alpha=scale)


@contextmanager
def float32_sums() -> Iterator[None]:
    """Products of float32 matrices that hold bf16 numbers on a CPU, exact up to their float32 sums.

    oneDNN multiplies them as bf16, in half the time of float32. A product of bf16 matrices would
    round its sums to bf16.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before

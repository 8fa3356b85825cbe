"""C: the core between pool and repeat, in its two forms.

    low rank   C_k = B[:, :k] A[:k, :]     A: [r, d_in/p],  B: [d_out/q, r]
    dense      C   = S                     S: [d_out/q, d_in/p]

Row i of an adapter is the pair (A[i], B[:, i]). Every prefix of rows is an adapter of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows(a: Tensor, b: Tensor, k: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """The first k rows, of which rows below `first` pass no gradient (DyLoRA's frozen mode).

    The slice of B is made contiguous: the products then run on the same memory layout as in an
    adapter that was built with rank k, and give the same bits.

    Args:
        a: [r, d_in/p].
        b: [d_out/q, r].
        k: the rank, 1 <= k <= r.
        first: the first row that is trained, 0 <= first < k.

    Returns:
        A[:k] of [k, d_in/p] and B[:, :k] of [d_out/q, k].
    """
    if k == len(a) and not first:
        return a, b
    a_k, b_k = a[:k], b[:, :k]
    if first:
        a_k = torch.cat((a_k[:first].detach(), a_k[first:]))
        b_k = torch.cat((b_k[:, :first].detach(), b_k[:, first:]), dim=1)
    return a_k, b_k.contiguous()


def low_rank_core(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C_k u = B (A u): [..., d_in/p] to [..., d_out/q]."""
    return torch.nn.functional.linear(torch.nn.functional.linear(u, a), b)


def dense_core(u: Tensor, s: Tensor) -> Tensor:
    """C u = S u: [..., d_in/p] to [..., d_out/q]."""
    return torch.nn.functional.linear(u, s)

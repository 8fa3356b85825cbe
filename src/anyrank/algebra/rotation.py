"""An exact change of basis that orders the rows of an adapter by what they matter.

    B A = Q_B R_B (Q_A R_A)^T = Q_B (U diag(sigma) V^T) Q_A^T

    A' = diag(sqrt(sigma)) (Q_A V)^T,    B' = Q_B U diag(sqrt(sigma))

with Q R of B [d_out/q, r] and of A^T [d_in/p, r], and the SVD of the small core R_B R_A^T [r, r].
B' A' = B A, and the first k rows are its best approximation of rank k in the Frobenius norm
(Eckart and Young, 1936). No matrix of d_out x d_in is made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd_order(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product B A, with rows in the order of its singular values.

    Row i of A' and column i of B' have equal norms, and the sign of the largest entry of each
    column of B' is positive, so that the result does not depend on how the SVD was computed.

    Args:
        a: A [r, d_in/p], r at most d_in/p and d_out/q or more (rows beyond are then zero).
        b: B [d_out/q, r].

    Returns:
        A' and B' in the shapes and dtypes of A and B, computed in float64 on the CPU: once per run,
        the same on every process, and also where a device has no float64.
    """
    q_a, r_a = torch.linalg.qr(a.detach().cpu().double().T)
    q_b, r_b = torch.linalg.qr(b.detach().cpu().double())
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma.sqrt()
    b_new, a_new = (q_b @ u) * root, (v @ q_a.T) * root[:, None]
    largest = b_new.abs().argmax(0, keepdim=True)
    sign = torch.where(b_new.gather(0, largest)[0] < 0, -1.0, 1.0)
    out_a, out_b = torch.zeros_like(a), torch.zeros_like(b)
    out_a[: len(sigma)] = (a_new * sign[:, None]).to(a)
    out_b[:, : len(sigma)] = (b_new * sign).to(b)
    return out_a, out_b

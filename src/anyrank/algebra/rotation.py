"""An exact change of basis that orders the rows of an adapter by what they matter.

    B A = Q_B R_B (Q_A R_A)^T = Q_B (U diag(sigma) V^T) Q_A^T

    A' = diag(sqrt(sigma)) (Q_A V)^T,    B' = Q_B U diag(sqrt(sigma))

with Q R of B [d_out/q, r] and of A^T [d_in/p, r], and the SVD of the small core R_B R_A^T [r, r].
B' A' = B A, and the first k rows are its best approximation of rank k in the Frobenius norm
(Eckart and Young, 1936). No matrix of d_out x d_in is made.

If it is known for which inputs x it should be good, from the second moments M = E[A x (A x)^T],

    [A^T; K] = [Q_A; Q_K] R_A,    K^T K = M |A|^2 / (ISOTROPIC tr M)

takes the place of Q R of A^T: what the first k rows leave out, (B A - B'_k A'_k) x, is then the
smallest in the mean square over such x and, with the weight ISOTROPIC, over x of all directions
alike, which is all there is to say of directions that were not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

ISOTROPIC = 0.1  # as measured: 0.001 to 0.1 are alike, 1 is a little worse (docs/log.md)


def svd_order(a: Tensor, b: Tensor, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same product B A, with rows in the order of its singular values.

    Row i of A' and column i of B' have equal norms, and the sign of the largest entry of each
    column of B' is positive, so that the result does not depend on how the SVD was computed.

    Args:
        a: A [r, d_in/p], r at most d_in/p and d_out/q or more (rows beyond are then zero).
        b: B [d_out/q, r].
        moments: M [r, r], up to a factor; None, zero or not finite: all inputs count alike.

    Returns:
        A' and B' in the shapes and dtypes of A and B, computed in float64 on the CPU: twice per
        run, the same on every process, and also where a device has no float64.
    """
    wide = a.detach().cpu().double().T
    seen = wide[:0]
    if moments is not None and moments.isfinite().all() and moments.trace() > 0:
        seen = _root(moments.cpu().double(), wide)
    q_a, r_a = torch.linalg.qr(torch.cat((wide, seen)))
    q_b, r_b = torch.linalg.qr(b.detach().cpu().double())
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    b_new, a_new = q_b @ u, v @ q_a[: len(wide)].T
    norm = a_new.norm(dim=1).clamp_min(torch.finfo(torch.double).tiny)  # 1 without moments
    b_new, a_new = b_new * (sigma * norm).sqrt(), a_new * (sigma / norm).sqrt()[:, None]
    largest = b_new.abs().argmax(0, keepdim=True)
    sign = torch.where(b_new.gather(0, largest)[0] < 0, -1.0, 1.0)
    out_a, out_b = torch.zeros_like(a), torch.zeros_like(b)
    out_a[: len(sigma)] = (a_new * sign[:, None]).to(a)
    out_b[:, : len(sigma)] = (b_new * sign).to(b)
    return out_a, out_b


def _root(moments: Tensor, a_t: Tensor) -> Tensor:
    """K [r, r] of moments M and A^T [d_in/p, r]."""
    values, vectors = torch.linalg.eigh(moments)
    weight = a_t.square().sum() / (ISOTROPIC * values.sum())
    return (vectors * (weight * values.clamp_min(0)).sqrt()).T

"""R: the repeat, each output written q times.

    (R v)_{iq+j} = v_i,  0 <= j < q                  R: [d_out, d_out/q]

q = 1 is the identity.
"""

from __future__ import annotations

from torch import Tensor


def repeat(v: Tensor, q: int) -> Tensor:
    """R v for activations: [..., d_out/q] to [..., d_out]; `v` itself when q = 1."""
    return v if q == 1 else v.repeat_interleave(q, dim=-1)


def repeat_rows(factor: Tensor, q: int) -> Tensor:
    """R B for a factor: [d_out/q, columns] to [d_out, columns]; `factor` itself when q = 1."""
    return factor if q == 1 else factor.repeat_interleave(q, dim=0)

"""P: the pool, the mean of p neighbouring inputs.

    (P x)_i = (x_{ip} + ... + x_{ip+p-1}) / p        P: [d_in/p, d_in]

p = 1 is the identity. The mean, not the sum: one constant for every method, so that alpha means the
same everywhere (Q-BaRA's and QA-HiRA's released code: a mean; PEFT's QA-LoRA: neither).
"""

from __future__ import annotations

from torch import Tensor


def pool(x: Tensor, p: int) -> Tensor:
    """P x for activations.

    Args:
        x: [..., d_in], p divides d_in.
        p: how many neighbouring inputs share a mean.

    Returns:
        [..., d_in/p]; `x` itself when p = 1.
    """
    return x if p == 1 else x.unflatten(-1, (-1, p)).mean(dim=-1)


def pool_columns(factor: Tensor, p: int) -> Tensor:
    """A P for a factor: the same product, without a pass over activations.

    Args:
        factor: [rows, d_in/p].
        p: as in `pool`.

    Returns:
        [rows, d_in]; `factor` itself when p = 1.
    """
    return factor if p == 1 else factor.repeat_interleave(p, dim=-1) / p

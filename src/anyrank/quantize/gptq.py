"""Codes that make up for each other's error: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

    min over the codes of  || (W - W^) X ||^2,    H = 2 X X^T [d_in, d_in],  X [d_in, tokens]
    U = upper Cholesky factor of (H + damping)^-1,    U^T U = (H + damping)^-1

Columns are rounded from left to right; what one loses, the columns to its right make up for:

    err_j = (w_j - w^_j) / U[j, j],    w_k <- w_k - err_j U[j, k]   for k > j

A tile takes its scale and offset by min-max when its first column is reached, from the weights as
they stand then. Asymmetric, with float offsets; the columns keep their order (no act-order). The
updates right of a block of about 128 columns are one matrix product at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from ..kernels import Affine, AffineFormat, pack
from .minmax import min_max_grid, nearest_codes

DAMPING, BLOCK = 0.01, 128


def gptq(weight: Tensor, form: AffineFormat, hessian: Tensor) -> Affine:
    """Quantize a float weight [d_out, d_in].

    Args:
        weight: W.
        form: the format; tiles of any rows and columns.
        hessian: X X^T [d_in, d_in] of the inputs X that the layer sees, up to a factor.

    Raises:
        DataError: the Hessian is not finite.
    """
    columns = form.tile[1]
    width = columns * max(1, BLOCK // columns)
    factor = inverse_factor(hessian.to(weight.device))
    rest = weight.float().T.contiguous()  # [d_in, d_out]: a column of W is contiguous
    parts = []
    for start in range(0, rest.shape[0], width):
        stop = min(start + width, rest.shape[0])
        block, codes, scales, offsets = _block(
            rest[start:stop], factor[start:stop, start:stop], form
        )
        rest[stop:] -= factor[start:stop, stop:].T @ block
        parts.append((codes, scales, offsets))
    codes, scales, offsets = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return Affine(pack(codes, form.bits), scales, offsets, form)


def inverse_factor(hessian: Tensor) -> Tensor:
    """U of (H + damping)^-1 = U^T U, in float32.

    Inputs that calibration never moved have no say: their columns are rounded to nearest, and no
    error is passed to or from them. Damping is 1 % of the mean diagonal, and ten times as much
    where that is too little for a Cholesky factor.

    Raises:
        DataError: no damping makes the Hessian positive definite: it is not finite.
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    unit = diagonal.sum() / (~dead).sum().clamp(min=1)
    diagonal[dead] = torch.where(unit > 0, unit, 1.0)
    damping = DAMPING * diagonal.mean()
    for _ in range(3):
        diagonal += damping
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise DataError(
        "the Hessian of the calibration rows has no Cholesky factor; the activations are not "
        "finite, so load the model in bfloat16 or float32, or use other rows"
    )


def _block(
    rest: Tensor, factor: Tensor, form: AffineFormat
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round whole tiles of columns.

    Args:
        rest: [width, d_out], the columns as they stand; changed.
        factor: U of these columns, [width, width].
        form: the format.

    Returns:
        The errors [width, d_out], codes [d_out, width], scales and offsets [d_out/rows, tiles].
    """
    rows, columns = form.tile
    errors, codes = torch.empty_like(rest), torch.empty_like(rest, dtype=torch.uint8)
    grids = []
    for j in range(rest.shape[0]):
        if j % columns == 0:
            group = rest[j : j + columns].T.reshape(-1, rows, 1, columns)
            scales, offsets = min_max_grid(group, form)
            grids.append((scales, offsets))
            step, low = (part.float().repeat_interleave(rows) for part in grids[-1])
        code = nearest_codes(rest[j], step, low, form)
        codes[j] = code.to(torch.uint8)
        errors[j] = (rest[j] - (step * code + low)) / factor[j, j]
        rest[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    scales, offsets = (torch.cat(part, dim=1) for part in zip(*grids, strict=True))
    return errors, codes.T.contiguous(), scales, offsets

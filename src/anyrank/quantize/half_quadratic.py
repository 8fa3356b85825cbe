"""Codes by half-quadratic optimisation, without data (Badri & Shaji 2023, HQQ).

    min over the offset of  sum |W - (scale code + offset)|^p,    scale from min-max, p = 0.7

is split by a helper matrix E that holds the outliers, and solved in turns:

    code   = round((W - offset) / scale)
    E      = shrink(W - (scale code + offset)),  shrink(x) = sign(x) relu(|x| - |x|^(p - 1) / beta)
    offset = mean over the tile of (W - E - scale code),    beta <- kappa beta

p, beta = 10, kappa = 1.01 and 20 turns are HQQ's. With this beta E is 0 wherever the error is below
beta^(-1 / (2 - p)) = 0.17, so for weights of usual size a turn is a least-squares offset. A tile is
done when its offset no longer moves, and keeps the best of those that it had.

Written here because the hqq package knows rows of one group size only, no tiles, and does not
choose codes for an offset that is rounded to its storage precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Affine, AffineFormat
from .minmax import in_tiles, min_max_grid, nearest_codes, with_codes

P, BETA, KAPPA, TURNS = 0.7, 10.0, 1.01, 20


def half_quadratic(weight: Tensor, form: AffineFormat) -> Affine:
    """Quantize a float weight [d_out, d_in]; no tile is worse by the sum above than min-max."""
    tiles = in_tiles(weight, form)
    scales, offsets = min_max_grid(tiles, form)
    flat = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    best = _best_offsets(flat, scales.flatten(), offsets.flatten(), form)
    return with_codes(weight, scales, best.view_as(scales), form)


def _best_offsets(tiles: Tensor, scales: Tensor, offsets: Tensor, form: AffineFormat) -> Tensor:
    """The best offset of every tile.

    Args:
        tiles: [n, weights of a tile].
        scales: [n].
        offsets: [n], where to begin.
        form: the format.
    """
    best, lowest = offsets.clone(), torch.full(offsets.shape, torch.inf, device=tiles.device)
    moving, beta = torch.arange(len(tiles), device=tiles.device), BETA
    for _ in range(TURNS):
        error = _residual(tiles, scales.float()[:, None], offsets.float()[:, None], form)
        found = error.abs().pow_(P).sum(dim=1)
        better = found < lowest[moving]
        best[moving[better]], lowest[moving[better]] = offsets[better], found[better]
        mean = error.sub_(_shrink(error, beta)).mean(dim=1)
        after = (offsets.float() + mean).to(form.dtype)
        moved = after != offsets
        if not moved.any():
            break
        tiles, scales, offsets, moving = tiles[moved], scales[moved], after[moved], moving[moved]
        beta *= KAPPA
    return best


def _residual(tiles: Tensor, scales: Tensor, offsets: Tensor, form: AffineFormat) -> Tensor:
    """W - (scale code + offset) with the nearest codes."""
    return tiles - nearest_codes(tiles, scales, offsets, form).mul_(scales).add_(offsets)


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The minimiser of |e|^p + beta/2 (e - x)^2, as HQQ approximates it."""
    size = x.abs()
    if size.max() < 0.99 * beta ** (-1 / (2 - P)):
        return size.zero_()
    return size.sub_(size.pow(P - 1).div_(beta)).clamp_min_(0.0).mul_(x.sign())

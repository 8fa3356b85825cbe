"""Dropout with one mask for all who read an input, and few random numbers.

    D x = M x / (1 - p),    M diagonal: 0 with probability p, else 1, independently

On a CPU a random number per element costs more than the rest of an adapter. For small p the gaps
between zeros are drawn instead, which follow the geometric distribution: p numbers per element, the
same law, and 4 p bytes per element to remember where. The factor 1 / (1 - p) is left to the scale
of the adapter, where it costs no pass over the input.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .shared import shared

RARE = 1e-4  # from this p on, a uniform number of 24 bits is fine enough to draw a gap
SPARSE = 0.2  # up to this p, positions take less memory than a mask of one byte per element


class Dropped(NamedTuple):
    """An input after dropout, not yet scaled.

    Attributes:
        x: M x of [tokens, d].
        at: where M is 0: flat positions as int32 [zeros], or its diagonal as bool [tokens, d].
    """

    x: Tensor
    at: Tensor


def zero_(z: Tensor, at: Tensor) -> Tensor:
    """M z in place.

    Args:
        z: [tokens, d], contiguous.
        at: as in `Dropped`.
    """
    if at.dtype == torch.bool:
        return z.mul_(at)
    z.view(-1).index_fill_(0, at.long(), 0)
    return z


def add_product_(y: Tensor, a: Tensor, b: Tensor, at: Tensor | None) -> None:
    """y += M (a b) in place, without a product of its own where positions say what to put back.

    Args:
        y: [tokens, d], contiguous.
        a, b: [tokens, k], [k, d].
        at: as in `Dropped`; None: M is the identity.
    """
    if at is not None and at.dtype == torch.bool:
        y.add_(zero_(a @ b, at))
        return
    flat = y.view(-1)
    kept = None if at is None else flat.index_select(0, at)
    y.addmm_(a, b)
    if at is not None and kept is not None:
        flat.index_copy_(0, at.long(), kept)


def zero_positions(n: int, p: float) -> Tensor:
    """Which of n elements are zeroed, each with probability p, on the CPU: sorted, int32."""
    expected = n * p
    steps = _steps(int(expected + 6 * expected**0.5) + 8, p)
    steps[0] -= 1  # the first is at 0 if its step is 1
    at = steps.cumsum(0, dtype=torch.int32)
    last = int(at[-1])
    if last < n - 1:  # once in 10^9 draws
        return torch.cat((at, zero_positions(n - last - 1, p).add_(last + 1)))
    return at[: int(torch.searchsorted(at, n))]


def _steps(count: int, p: float) -> Tensor:
    """From each zero to the next one, with probability p (1 - p)^(k - 1) for k, as int32.

    By inversion of P(step > k) = (1 - p)^k: faster than geometric_, of the same law.
    """
    u = torch.rand(count, dtype=torch.float32, device="cpu")
    return u.neg_().log1p_().mul_(1 / math.log1p(-p)).add_(1).int()


def dropped(flat: Tensor, p: float) -> Dropped:
    """Draw a mask and apply it.

    Args:
        flat: [tokens, d], contiguous.
        p: probability of a zero, 0 < p < 1.
    """
    sparse = RARE <= p <= SPARSE and flat.numel() < 2**30  # a gap is at most 17 / p
    if flat.device.type != "cpu" or not sparse or torch.compiler.is_compiling():
        at = torch.empty(flat.shape, dtype=torch.bool, device=flat.device).bernoulli_(1 - p)
    else:
        at = zero_positions(flat.numel(), p)
    return Dropped(zero_(flat.clone(), at), at)


class _Drawn(NamedTuple):
    result: Dropped
    readers: set[int]


def drop(x: Tensor, flat: Tensor, p: float, reader: int) -> Dropped:
    """M x with the mask of the readers before, or a new one for a reader who comes again.

    Args:
        x: the input as the layers share it.
        flat: the same as [tokens, d], in the dtype of the products.
        p: probability of a zero, 0 < p < 1.
        reader: which layer asks; a layer that runs twice on one input draws twice.
    """
    if torch.compiler.is_compiling():
        return dropped(flat, p)
    masks = shared(x, ("dropout", p, flat.dtype), list)
    if not masks or reader in masks[-1].readers:
        with torch.no_grad():
            masks.append(_Drawn(dropped(flat.contiguous(), p), set()))
    masks[-1].readers.add(reader)
    return masks[-1].result

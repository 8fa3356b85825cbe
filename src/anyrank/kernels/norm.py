"""Root mean square norm that keeps no float32 copy of its input for the backward pass.

Zhang and Sennrich, Root Mean Square Layer Normalization (2019), with the roundings of Transformers'
Llama, for h: [..., d] and w: [d],

    r = 1 / sqrt(mean(h^2) + eps)       in float32, one number per token
    y = w * round(h r)                  rounded to the dtype of h

and backward, with n = h r, in float32 and rounded once:

    dh = r (g w - n mean(n g w)),       dw = sum over the tokens of g n

Kept are h and r; differentiated op by op, h would be kept in float32. torch's own rms_norm keeps
that copy on a CPU too, and with its weight it rounds once less than Llama does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .shared import Recipe, can_be_remade

CPU_CHUNK = 2**18  # values of h


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * round(h / sqrt(mean(h^2) + eps)), bit for bit as Transformers' Llama computes it.

    The layers that read it next make it again in the backward pass instead of keeping it.

    Args:
        h: [..., d].
        weight: w [d]; it may be trained.
        eps: added to the mean square.

    Returns:
        [..., d] in the dtype that h and w promote to.
    """
    y, r = _RmsNorm.apply(h, weight, eps)  # type: ignore[misc]
    if h.dtype != torch.float64:  # there r is not the one that y was made with
        can_be_remade(y, Recipe((h, r, weight), _remake))
    return y


def _remake(h: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    """y from h and r."""
    y = h.new_empty(h.shape, dtype=torch.promote_types(h.dtype, weight.dtype))
    for part, r_part, y_part in _cut(_pieces(h), h, r, y):
        y_part.copy_(weight * (part.float() * r_part).to(h.dtype))
    return y


def _root(h: Tensor, eps: float) -> Tensor:
    """r [..., 1]."""
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def _pieces(h: Tensor) -> int:
    """How many pieces of rows to work in: one, or on a CPU so many that its cache holds each.

    The sum over a row that is not contiguous depends on how the rows lie, so those stay together.
    """
    if h.device.type != "cpu" or torch.compiler.is_compiling() or not h.is_contiguous():
        return 1
    rows = max(CPU_CHUNK // max(h.shape[-1], 1), 3)  # 3: no row is alone, threads would share it
    return max(-(-h.shape[:-1].numel() // rows), 1)


def _cut(pieces: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, piece by piece."""
    rows = (tensor.reshape(-1, tensor.shape[-1]).tensor_split(pieces) for tensor in tensors)
    return zip(*rows, strict=True)


def _forward(h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r for the backward pass."""
    x = h.float()
    r = _root(x, eps)
    y = weight * (x * r).to(h.dtype)
    return y, _root(h, eps) if h.dtype == torch.float64 else r


def _backward(g: Tensor, h: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dh, g and n; all in the dtype of r."""
    n = h.to(r.dtype) * r
    g = g.to(r.dtype)
    gw = g * weight.to(r.dtype)
    return gw.addcmul(n, (n * gw).mean(-1, keepdim=True), value=-1).mul_(r), g, n


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        pieces = _pieces(h)
        if pieces == 1:
            y, r = _forward(h, weight, eps)
        else:
            y = h.new_empty(h.shape, dtype=torch.promote_types(h.dtype, weight.dtype))
            wide = torch.promote_types(h.dtype, torch.float32)
            r = h.new_empty(*h.shape[:-1], 1, dtype=wide)
            for part, y_part, r_part in _cut(pieces, h, y, r):
                for whole, made in zip((y_part, r_part), _forward(part, weight, eps), strict=True):
                    whole.copy_(made)
        ctx.save_for_backward(h, weight, r)
        ctx.mark_non_differentiable(r)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        g = gradients[0]
        h, weight, r = ctx.saved_tensors  # once: checkpointing unpacks every tensor a single time
        dh = torch.empty_like(h, memory_format=torch.contiguous_format)
        dw = torch.zeros_like(weight, dtype=r.dtype) if ctx.needs_input_grad[1] else None
        for g_part, h_part, r_part, dh_part in _cut(_pieces(h), g, h, r, dh):
            found, wide, n = _backward(g_part, h_part, r_part, weight)
            dh_part.copy_(found)
            if dw is not None:
                dw += (wide * n).sum(0)
        return dh, None if dw is None else dw.to(weight.dtype), None

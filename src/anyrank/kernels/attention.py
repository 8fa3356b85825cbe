"""Causal attention over short rows on a CPU, faster there than torch's.

For queries q, keys k and values v of one head, [T, D], T tokens:

    S = scale q k^T, -inf above the diagonal,     P = softmax(S),        o = P v
    dv = P^T g,    dS = P (g v^T - sum(P g v^T)),    dq = scale dS k,    dk = scale dS^T q

S is made again in the backward pass: kept are q, k and v. It is a product of bf16 numbers whose
sums stay in float32, since scores are too large for bf16. A block of QUERIES rows is multiplied
with the keys up to its end, for CHUNK scores of many heads at a time, so most of what lies above
the diagonal is never made; heads that share keys are rows of one product. torch's kernel walks
through blocks of one head, which is better for long rows (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from .product import float32_sums, scaled_product
from .shared import shared

LONG = 2048  # tokens from which on torch's kernel is the faster one
QUERIES = 64  # of a block, and twice as many where no heads share keys
CHUNK = 2**20  # scores at a time


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, in another order of rounding where this module is faster.

    That is in bf16 on a CPU with bf16 products, for rows shorter than LONG that are causal, with or
    without a mask of padding or of packed rows. torch computes everything else.

    Args:
        query: [batch, heads, tokens, D].
        key, value: [batch, heads or fewer, tokens, D]; each for as many heads as the others.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch takes them.

    Returns:
        [batch, heads, tokens, D].
    """
    if torch.is_autocast_enabled("cpu") and query.device.type == "cpu":
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if dropout_p or not _is_short(query, key, value) or not _is_causal(query, attn_mask, is_causal):
        grouped = enable_gqa or 1 < key.shape[1] < query.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is not None and _hides_only_later(attn_mask):
        attn_mask = None
    with torch.autocast("cpu", enabled=False):
        return _ShortAttention.apply(query, key, value, attn_mask, scale)  # type: ignore[return-value]


def _is_short(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these shapes on this device are the ones for which it pays."""
    tensors = (query, key, value)
    if any(t.device.type != "cpu" or t.dtype != torch.bfloat16 or t.ndim != 4 for t in tensors):
        return False
    fits = query.shape[::2] == key.shape[::2] and value.shape[:3] == key.shape[:3]
    if not fits or not 1 < query.shape[2] < LONG or query.shape[1] % key.shape[1]:
        return False
    return multiplies_bf16()


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _is_causal(query: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether no token sees a later one and each sees some: found once per mask."""
    if mask is None:
        return is_causal
    tokens = query.shape[2]
    if mask.dtype != torch.bool or mask.shape[1:] != (1, tokens, tokens) or is_causal:
        return False
    if len(mask) not in (1, len(query)):
        return False
    if is_fake(mask):  # of a plan: that of a padded batch
        return True
    return shared(mask, "causal", lambda: bool(mask.any(-1).all() and not mask.triu(1).any()))


def _hides_only_later(mask: Tensor) -> bool:
    """Whether a causal mask says no more than `is_causal`: found once per mask."""
    if is_fake(mask):
        return False
    return shared(mask, "later", lambda: torch.equal(mask, torch.ones_like(mask).tril_()))


def _heads(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the batch and heads of the keys that go through together."""
    batch, heads, tokens, _ = key.shape
    height = _blocks(query, key)[0].stop * query.shape[1] // heads
    count = max(CHUNK // (height * tokens), 1)
    rows = max(count // heads, 1)
    for row in range(0, batch, rows):
        for head in range(0, heads, count):
            yield slice(row, row + rows), slice(head, head + count)


def _blocks(query: Tensor, key: Tensor) -> list[slice]:
    """The queries of each product; of whole tensors, or of some of their heads."""
    tokens, step = key.shape[2], QUERIES * (2 if query.numel() == key.numel() else 1)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _grouped(x: Tensor, key: Tensor, rows: slice, heads: slice) -> Tensor:
    """A view of x [batch, heads, tokens, D]: [rows, heads of the keys, sharing, tokens, D]."""
    return x.unflatten(1, (key.shape[1], -1))[rows, heads]


def _of_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some rows of the batch: one for each, or one for all."""
    return mask if mask is None or len(mask) == 1 else mask[rows]


def _matrices(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [rows, heads, ..., D] as [rows * heads, the rest, D], contiguous: views multiply slowly."""
    x = x.to(dtype or x.dtype, memory_format=torch.contiguous_format).contiguous()
    return x.flatten(2, -2).flatten(0, 1)


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, queries: slice, scale: float
) -> Tensor:
    """P [heads, queries, keys] of q [heads, queries, D] and k [heads, D, keys], all in float32.

    Args:
        mask: [rows or 1, 1, tokens, tokens], true where a key is seen; None: causal.
    """
    with float32_sums():
        s = scaled_product(q, k, scale)
    count = queries.stop - queries.start
    if mask is None:
        above = s.new_full((count, count), -torch.inf).triu_(1)
        s.unflatten(1, (-1, count))[..., queries].add_(above)
    else:
        seen = mask[..., queries, : queries.stop]
        hidden = s.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        s.view(len(mask), -1, count, queries.stop).add_(hidden)
    return torch.softmax(s, -1, out=s)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        batch, heads, tokens, _ = query.shape
        o = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        for part in _heads(query, key):
            k, v = _matrices(key[part], torch.float32).transpose(1, 2), _matrices(value[part])
            q, made = (_grouped(x, key, *part) for x in (query, o))
            seen = _of_rows(mask, part[0])
            for now in _blocks(query, key):
                these = _matrices(q[..., now, :], torch.float32)
                p = _probabilities(these, k[..., : now.stop], seen, now, scale).to(v.dtype)
                to = made[..., now, :]
                to.copy_(torch.bmm(p, v[:, : now.stop]).view(to.shape))
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, mask = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            for part in _heads(query, key):
                into = _grouped(dq, key, *part), dk[part], dv[part]
                q, g = (_grouped(x, key, *part) for x in (query, gradients[0]))
                seen = _of_rows(mask, part[0])
                _backward(into, q, g, key[part], value[part], seen, ctx.scale)
        return dq, dk, dv, None, None


def _backward(
    into: tuple[Tensor, Tensor, Tensor],
    query: Tensor,
    gradient: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> None:
    """dq, dk and dv of some heads, into views of them."""
    k, v_t = _matrices(key), _matrices(value).transpose(1, 2)
    wide = k.float().transpose(1, 2)
    sums: list[Tensor] = []  # dk / scale and dv
    for now in reversed(_blocks(query, key)):
        q, g = (_matrices(x[..., now, :]) for x in (query, gradient))
        p = _probabilities(q.float(), wide[..., : now.stop], mask, now, scale)
        dp = torch.bmm(g, v_t[..., : now.stop]).float()
        torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        p, ds = p.to(g.dtype), dp.to(q.dtype)  # ds / scale
        to = into[0][..., now, :]
        to.copy_(scaled_product(ds, k[:, : now.stop], scale).view(to.shape))
        parts = [torch.bmm(a.transpose(1, 2), b) for a, b in ((ds, q), (p, g))]
        if not sums:  # of the last block, which reads all keys
            sums = [part.float() for part in parts]
        else:
            for total, part in zip(sums, parts, strict=True):
                total[:, : now.stop] += part
    into[1].copy_(sums[0].mul_(scale).view(key.shape))
    into[2].copy_(sums[1].view(value.shape))

"""Queries, keys and values of a Falcon, split without an index and, on request, without copies.

Transformers takes keys and values out of the fused product by an index, [[-2]]: its gradient is
added to zeros number by number. A split gives the same, and its gradients lie side by side.

Where heads share keys and values, Transformers copies those for every head. An attention that
takes groups of heads needs no copies: neither their rotation nor the sum of their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SPLIT = "_split_heads"  # the method that is replaced
Split = Callable[[Any, Tensor], tuple[Tensor, ...]]


def split_heads(self: Any, fused: Tensor) -> tuple[Tensor, ...]:
    """Queries of groups of heads, each followed by the group's key and value.

    Args:
        self: an attention layer of a Falcon.
        fused: [batch, tokens, (heads + 2 groups) * D].

    Returns:
        q, k and v [batch, tokens, heads, D]; of the old architecture k and v of the groups only.
    """
    groups, sharing = self.num_kv_heads, self.num_heads // self.num_kv_heads
    parts = fused.view(*fused.shape[:2], groups, sharing + 2, self.head_dim)
    q, k, v = parts.split((sharing, 1, 1), dim=3)
    if self.new_decoder_architecture:
        k, v = k.expand_as(q), v.expand_as(q)
    return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)


def has_same_split(module: nn.Module) -> bool:
    """Whether a module splits as `split_heads` does: tried, not read from its name."""
    own: Split | None = getattr(type(module), SPLIT, None)
    if own is None or SPLIT in vars(module):
        return False
    layer: Any = module
    try:
        width = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
        fused = torch.arange(2 * 3 * width, dtype=torch.float32).view(2, 3, width)
        pairs = zip(own(layer, fused), split_heads(layer, fused), strict=True)
        return all(torch.equal(theirs, ours) for theirs, ours in pairs)
    except Exception:  # whatever a foreign method raises, it is not this one
        return False


@contextmanager
def keys_in_groups(layer: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Inside of it, a Falcon's keys and values are not copied for every head, in training.

    The layer then takes itself for one of the old architecture, where all heads share one key.

    Args:
        layer: an attention layer; if `split_heads` is its own, its attention has to take groups.
        args, kwargs: what its forward gets.
    """
    split = getattr(vars(layer).get(SPLIT), "__func__", None)
    shares = split is split_heads and layer.new_decoder_architecture
    seen = kwargs.get("layer_past") is not None or kwargs.get("output_attentions")
    if not shares or seen or len(args) > 1 or layer.config._attn_implementation != "sdpa":
        yield
        return
    layer.new_decoder_architecture = False
    try:
        yield
    finally:
        layer.new_decoder_architecture = True

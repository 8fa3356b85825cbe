"""The gated product of a decoder's MLP, which keeps its two factors and nothing else.

Shazeer, GLU Variants Improve Transformer (2020): for gate and up of [..., d],

    y = act(gate) * up
    d_up = g * act(gate),       d_gate = act'(gate) (g * up)

act(gate) is computed again in the backward pass, where op by op it would be kept. Each step rounds
as the one of autograd does, so forward and gradients equal those of the plain product bit for bit.
The whole tensor goes through at once: with one output fewer than the plain product this is the
faster one already, and pieces of it would end in values that a CPU computes outside of its vectors,
with another last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..errors import ConfigError, nearest
from .shared import Recipe, can_be_remade, shared


class Activation(NamedTuple):
    """An activation and, from (g, x), the gradient g * act'(x)."""

    of: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate=approximate),
    )


ACTIVATIONS = {
    "silu": Activation(F.silu, lambda g, x: torch.ops.aten.silu_backward(g, x)),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
}


def gated_product(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, bit for bit.

    The layer that reads it next makes it again in the backward pass instead of keeping it.

    Args:
        gate: [..., d].
        up: like gate; of any floating dtype.
        act: "silu", "gelu" (with erf) or "gelu_tanh".

    Returns:
        [..., d] in the dtype that gate and up promote to.

    Raises:
        ConfigError: the activation is unknown.
    """
    if act not in ACTIVATIONS:
        raise ConfigError(f"activation {act!r} is unknown; {nearest(act, ACTIVATIONS)}")
    y: Any = _GatedProduct.apply(gate, up, act)
    can_be_remade(y, Recipe((gate, up), lambda gate, up: _activated(gate, act) * up))
    return y


def _activated(gate: Tensor, act: str) -> Tensor:
    """act(gate), made once in the backward pass: down_proj needs it, and then the product does."""
    return shared(gate, ("activated", act), lambda: ACTIVATIONS[act].of(gate))


def _times(made: Tensor, other: Tensor) -> Tensor:
    """made * other, in the memory of `made` where the dtype allows it."""
    same = torch.promote_types(made.dtype, other.dtype) == made.dtype
    return made.mul_(other) if same else made * other


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _times(ACTIVATIONS[act].of(gate), up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        gate, up = ctx.saved_tensors
        act, d_gate, d_up = ACTIVATIONS[ctx.act], None, None
        if ctx.needs_input_grad[0]:
            d_gate = act.gradient((g * up).to(gate.dtype), gate)
        if ctx.needs_input_grad[1]:
            d_up = (_activated(gate, ctx.act) * g).to(up.dtype)
        return d_gate, d_up, None

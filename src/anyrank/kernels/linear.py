"""A frozen linear layer with its adapters: one autograd function for every weight and method.

    y = x W^T + b + sum_i s_i R C_i P D x           D: dropout on the input of an adapter

`linear_reference` writes it down as it stands. `adapted_linear` computes the same with W made once
per pass, each adapter added in place to the product of the base, and with these gradients:

    u = P D x,  v = R^T g:      dS = s v^T u,    dA = s (v B)^T u,    dB = s v^T (u A^T)
    dx = g W + D P^T s C^T v

Sums (P x and R^T g) run over activations, where they shrink what follows; copies (R and P^T) run
over the small factors, where they are almost free and the product adds in place. Of activations
only u is kept, which is x itself where nothing is pooled or dropped, and u A^T of k columns; where
x can be made again (shared.py), not even that. An update inside of W (folded into its offsets) has
the same gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import Update, adapter_output, pool_columns, repeat, repeat_rows
from .dropout import Dropped, add_product_, drop, zero_
from .product import scaled_product
from .shared import Recipe, recipe_of, shared
from .sums import group_mean, group_sum

# A pass over activations costs as much as so many columns more: measured; by bandwidth (log.md)
PASS_COLUMNS = {"cpu": 64, "cuda": 256}


class Matrix(Protocol):
    """A frozen weight W [d_out, d_in], however it is stored."""

    def dense(self, dtype: torch.dtype, inside: Sequence[Update] = ()) -> Tensor:
        """W with the updates that its storage absorbs, in `dtype`; may share memory."""
        ...


class Branch(NamedTuple):
    """One adapter of a layer in one pass.

    Attributes:
        update: s R C P.
        inside: whether W absorbs it; else it is added to the product.
        dropout: probability with which one of its inputs is zeroed.
    """

    update: Update
    inside: bool = False
    dropout: float = 0.0


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    factors: Sequence[Tensor | None] = (),
) -> Tensor:
    """The equation as it stands, for autograd to differentiate: the oracle of the tests.

    Args:
        x: [..., d_in].
        weight: W [d_out, d_in], without any update.
        bias: [d_out] or None.
        updates: the adapters.
        factors: D of each update, one number per element of x; None: nothing is dropped.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    for i, update in enumerate(updates):
        factor = factors[i] if i < len(factors) else None
        y = y + adapter_output(x if factor is None else x * factor, *update)
    return y


def adapted_linear(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None = None,
    branches: Sequence[Branch] = (),
    *,
    dtype: torch.dtype | None = None,
    reader: int = 0,
) -> Tensor:
    """y = x W^T + b + the adapters.

    Args:
        x: [..., d_in].
        weight: the frozen weight; its storage absorbs the branches that are inside.
        bias: [d_out] or None.
        branches: the adapters.
        dtype: of the products, unless autocast is on, which then says; None: that of x.
        reader: which layer this is; layers that read one tensor share its dropout mask.

    Returns:
        [..., d_out] in the dtype of x, or of autocast.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else dtype or x.dtype
    flat = shared(x, ("flat", dtype), lambda: x.detach().reshape(-1, x.shape[-1]).to(dtype))
    masks = {b.dropout: drop(x, flat, b.dropout, reader) for b in branches if b.dropout}
    tensors: list[Tensor | None] = []
    for branch in branches:
        tensors += (*branch.update.core, *_inputs(x, flat, branch, masks.get(branch.dropout)))
    specs = tuple(_Spec.of(branch) for branch in branches)
    y: Any = _AdaptedLinear.apply(x, weight, bias, specs, recipe_of(x), flat, *tensors)
    return y if autocast else y.to(x.dtype)


def _inputs(
    x: Tensor, flat: Tensor, branch: Branch, mask: Dropped | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """u = P M x, None where it is x; for a branch inside of W, P D x - P x; where M is zero."""
    p = branch.update.p
    if mask is None and p == 1:
        return None, None, None
    plain = shared(x, ("pooled", flat.dtype, p), lambda: group_mean(flat, p))
    if mask is None:
        return plain, None, None
    with torch.no_grad():
        u = group_mean(mask.x, p)
        return u, u / (1 - branch.dropout) - plain if branch.inside else None, mask.at


class _Spec(NamedTuple):
    """A branch without its tensors; keep = 1 - dropout, by which D divides."""

    cores: int
    p: int
    q: int
    scale: float
    inside: bool
    keep: float

    @classmethod
    def of(cls, branch: Branch) -> _Spec:
        core, p, q, scale = branch.update
        return cls(len(core), p, q, scale, branch.inside, 1 - branch.dropout)


def _parts(specs: Sequence[_Spec], tensors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Per branch: its spec, its core and the three tensors that follow."""
    rest = iter(tensors)
    for spec in specs:
        core = tuple(next(rest) for _ in range(spec.cores))
        yield spec, core, next(rest), next(rest), next(rest)


def _inside(specs: Sequence[_Spec], tensors: Sequence[Any]) -> list[Update]:
    parts = _parts(specs, tensors)
    return [Update(core, s.p, s.q, s.scale) for s, core, *_ in parts if s.inside]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Matrix,
        bias: Tensor | None,
        specs: tuple[_Spec, ...],
        recipe: Recipe | None,
        flat: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        w = weight.dense(flat.dtype, _inside(specs, tensors))
        y = torch.nn.functional.linear(flat, w, None if bias is None else bias.to(flat.dtype))
        kept: list[Tensor | None] = []
        for (spec, core, u, change, at), needed in zip(
            _parts(specs, tensors), _parts(specs, ctx.needs_input_grad[6:]), strict=True
        ):
            u = flat if u is None else u
            added, keep = (change, 1.0) if spec.inside else (u, spec.keep)
            t = None if added is None else _add(y, spec, core, added, keep)
            kept += (*core, *_kept(spec, u, t, needed[1], recipe), at)
        ctx.recipe = recipe and (len(recipe.tensors), recipe.make)
        ctx.save_for_backward(*kept, *(recipe.tensors if recipe else ()))
        ctx.weight, ctx.specs, ctx.dtype, ctx.x_dtype = weight, specs, flat.dtype, x.dtype
        # not .view: Falcon adds to the output of a layer in place, which autograd forbids on a view
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        shape = gradients[0].shape[:-1]
        g = gradients[0].reshape(-1, gradients[0].shape[-1]).to(ctx.dtype)
        saved = ctx.saved_tensors  # once: checkpointing unpacks every tensor a single time
        wants_x, _, wants_bias, *_ = ctx.needs_input_grad
        dx = g @ ctx.weight.dense(ctx.dtype, _inside(ctx.specs, saved)) if wants_x else None
        sums = {q: group_sum(g, q) for q in {spec.q for spec in ctx.specs}}
        found: list[Tensor | None] = []
        for (spec, core, u, t, at), needed in zip(
            _parts(ctx.specs, saved), _parts(ctx.specs, ctx.needs_input_grad[6:]), strict=True
        ):
            if u is None and ctx.recipe and _needs_u(spec, needed[1]):
                count, make = ctx.recipe
                u = _made_again(Recipe(saved[-count:], make), ctx.dtype, at)
            v, outer = sums[spec.q], core[-1].to(ctx.dtype)
            # s C^T v of a dense core, s B^T v of a low-rank one
            h = scaled_product(v, outer, spec.scale / spec.keep)
            found += _core_gradients(spec, core, needed[1], (u, t, v, h)) + [None] * 3
            if dx is not None:
                _add_input_gradient(dx, spec, core, h, at)
        dx = None if dx is None else dx.view(*shape, dx.shape[-1]).to(ctx.x_dtype)
        return dx, None, g.sum(0) if wants_bias else None, None, None, None, *found


def _add(y: Tensor, spec: _Spec, core: Sequence[Tensor], u: Tensor, keep: float) -> Tensor:
    """y += s R C u / keep in place.

    Returns:
        What the outer factor multiplies: A u of a low-rank core, u itself of a dense one.
    """
    t = u if len(core) == 1 else u @ core[0].to(u.dtype).T
    outer = core[-1].to(u.dtype)
    if _copies_factor(t, spec.q):
        y.addmm_(t, repeat_rows(outer, spec.q).T, alpha=spec.scale / keep)
    else:
        y.add_(repeat(t @ outer.T, spec.q), alpha=spec.scale / keep)
    return t


def _copies_factor(t: Tensor, n: int) -> bool:
    """Whether to copy the rows of a factor n times, rather than its product with t.

    The product then has n times the columns, and its sum needs no pass of its own.
    """
    return t.shape[1] * (n - 1) <= n * PASS_COLUMNS.get(t.device.type, 256)


def _needs_u(spec: _Spec, needed: Sequence[bool]) -> bool:
    """Whether a gradient of (A, B) or (S,) is made from u; that of B is made from A u if kept."""
    return needed[0] or (spec.inside and any(needed))


def _kept(
    spec: _Spec, u: Tensor, t: Tensor | None, needed: Sequence[bool], recipe: Recipe | None
) -> tuple[Tensor | None, Tensor | None]:
    """What of u and A u is kept for the gradients of (A, B) or (S,)."""
    again = recipe is not None and spec.p == 1
    keeps_t = len(needed) == 2 and needed[1] and not spec.inside
    return u if _needs_u(spec, needed) and not again else None, t if keeps_t else None


def _made_again(recipe: Recipe, dtype: torch.dtype, at: Tensor | None) -> Tensor:
    """u = M x [tokens, d_in], x by its recipe."""

    def change(x: Tensor) -> Tensor:
        u = x.reshape(-1, x.shape[-1]).to(dtype)
        return u if at is None else zero_(u, at)  # it is in new memory: nobody else has it

    return recipe.remade((dtype, None if at is None else at.data_ptr()), change)


def _core_gradients(
    spec: _Spec,
    core: Sequence[Tensor],
    needed: Sequence[bool],
    parts: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
) -> list[Tensor | None]:
    """The gradients of (A, B) or (S,) from u, A u, v = R^T g and h = s v B."""
    u, t, v, h = parts
    found: list[Tensor | None] = [None] * len(core)
    if len(core) == 2 and needed[0]:
        assert u is not None
        found[0] = (h.T @ u).to(core[0].dtype)
    if needed[-1]:
        if t is None:
            assert u is not None
            t = u if len(core) == 1 else u @ core[0].to(u.dtype).T
        found[-1] = scaled_product(v.T, t, spec.scale / spec.keep).to(core[-1].dtype)
    return found


def _add_input_gradient(
    dx: Tensor, spec: _Spec, core: Sequence[Tensor], h: Tensor, at: Tensor | None
) -> None:
    """dx += D P^T s C^T v in place; a branch inside of W has P^T s C^T v in dx already.

    h holds the factor 1 / keep of D.
    """
    if spec.inside and at is None:
        return
    a = core[0].to(h.dtype) if len(core) == 2 else None
    if a is not None and _copies_factor(h, spec.p):
        columns = pool_columns(a, spec.p)
        if not spec.inside:
            add_product_(dx, h, columns, at)
            return
        z = h @ columns
    else:
        z = repeat(h if a is None else h @ a, spec.p) / spec.p
    if spec.inside:
        dx.sub_(z, alpha=spec.keep)
    dx.add_(z if at is None else zero_(z, at))

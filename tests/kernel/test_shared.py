"""Inputs that are made again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from anyrank.algebra import Update
from anyrank.kernels import Branch, adapted_linear
from anyrank.kernels.gated import gated_product
from anyrank.kernels.norm import rms_norm

D, TOKENS = 48, 21


class Weight(NamedTuple):
    """A frozen weight as a plain tensor."""

    values: torch.Tensor

    def dense(self, dtype: torch.dtype, inside=()) -> torch.Tensor:
        return self.values.to(dtype)


def norm(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x * 1.0, torch.linspace(0.5, 1.5, D, dtype=x.dtype), 1e-6)


def gated(x: torch.Tensor) -> torch.Tensor:
    return gated_product(x * 1.0, x.flip(0) * 0.5, "silu")


def update(p: int, frozen_a: bool = False) -> Update:
    a, b = torch.randn(4, D // p), torch.randn(D, 4)
    return Update((a.requires_grad_(not frozen_a), b.requires_grad_()), p, 1, 0.5)


def gradients(
    made: Callable[[torch.Tensor], torch.Tensor],
    branches: list[Branch],
    dtype: torch.dtype,
    copied: bool,
) -> tuple[list[torch.Tensor], int]:
    """Gradients through two layers that read one input, and how many bytes were kept; an input
    that is copied is one of which nothing is known."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, D).to(dtype).requires_grad_()
    weight = Weight(torch.randn(D, D))
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    trained = [x, *(part for branch in branches for part in branch.update.core)]
    trained = [part for part in trained if part.requires_grad]
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = made(x)
        y = y.clone() if copied else y
        one = adapted_linear(y, weight, None, [branches[0]], reader=1)
        two = adapted_linear(y, weight, None, [branches[1]], reader=2)
        loss = (one * two).float().sum()
    return list(torch.autograd.grad(loss, trained)), sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("made", [norm, gated])
def test_an_input_that_is_made_again_gives_the_same_bits_and_is_not_kept(made, dropout, dtype):
    torch.manual_seed(2)
    branches = [Branch(update(1), False, dropout), Branch(update(1), False, dropout)]
    wanted, before = gradients(made, branches, dtype, copied=True)
    got, after = gradients(made, branches, dtype, copied=False)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert before - after == TOKENS * D * dtype.itemsize


@pytest.mark.parametrize("made", [norm, gated])
def test_it_is_made_once_for_all_who_read_it(made, monkeypatch):
    calls = []
    name = "anyrank.kernels.norm._remake" if made is norm else "anyrank.kernels.gated._activated"
    module, function = name.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[function]), function)

    def counted(*args: object) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(name, counted)
    x, weight = torch.randn(TOKENS, D, requires_grad=True), Weight(torch.randn(D, D))
    y = made(x)
    readers = [adapted_linear(y, weight, None, [Branch(update(1))], reader=i) for i in range(3)]
    sum(readers).sum().backward()
    assert len(calls) == (1 if made is norm else 2)  # once more for the gradient of up


def test_what_no_gradient_needs_is_not_made():
    """With A frozen only A x is kept; a pooled input is small and kept itself."""
    frozen = [Branch(update(1, frozen_a=True)), Branch(update(1, frozen_a=True))]
    pooled = [Branch(update(4)), Branch(update(4))]
    for branches, saved in ((frozen, 0), (pooled, 0)):
        wanted, before = gradients(norm, branches, torch.float32, copied=True)
        got, after = gradients(norm, branches, torch.float32, copied=False)
        for mine, theirs in zip(got, wanted, strict=True):
            assert torch.equal(mine, theirs)
        assert before - after <= saved


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(reentrant):
    torch.manual_seed(3)
    x = torch.randn(TOKENS, D, requires_grad=True)
    change, weight = update(1), Weight(torch.randn(D, D))

    def block(x: torch.Tensor) -> torch.Tensor:
        return adapted_linear(norm(x), weight, None, [Branch(change)])

    trained = [x, *change.core]
    wanted = torch.autograd.grad(block(x).pow(2).sum(), trained)
    checkpoint(block, x, use_reentrant=reentrant).pow(2).sum().backward()
    for mine, theirs in zip(trained, wanted, strict=True):
        assert torch.equal(mine.grad, theirs)

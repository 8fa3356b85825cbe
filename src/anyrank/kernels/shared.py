"""What several layers make of one input: made once.

q, k and v read the same tensor, and so do gate and up. Its cast, its pooled form and its dropout
mask are kept for the layers that follow, until it is gone or others have been read. If it is the
output of a norm or of a gated product, they also learn how to make it again instead of keeping
it for the backward pass.

Layers that share a dropout mask must lie in one region of gradient checkpointing, as those of a
decoder layer do: a region is computed again with the random state of its own start.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

RECENT = 4  # two inputs of a layer with parallel attention, and what is made in between
Made = TypeVar("Made")


class _Entry(NamedTuple):
    """What was made of one tensor, as long as it lives and stays as it is."""

    source: weakref.ref[Tensor]
    version: int
    made: dict[Hashable, Any]


class _Recent(threading.local):
    """The tensors that this thread read last, by their identity."""

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] = {}

    def of(self, x: Tensor) -> dict[Hashable, Any]:
        entry = self.entries.pop(id(x), None)
        if entry is None or entry.source() is not x or entry.version != x._version:
            entry = _Entry(weakref.ref(x, partial(self.entries.pop, id(x))), x._version, {})
        self.entries[id(x)] = entry  # now the last one
        if len(self.entries) > RECENT:
            del self.entries[next(iter(self.entries))]
        return entry.made


_recent = _Recent()


class Recipe(NamedTuple):
    """How to make a tensor again, from tensors that are kept for the backward pass anyway.

    Attributes:
        tensors: what it is made of; the first belongs to no other recipe.
        make: makes it, bit for bit, without gradients.
    """

    tensors: tuple[Tensor, ...]
    make: Callable[..., Tensor]

    def remade(self, form: Hashable, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The tensor after `change`, made once for all who need that form of it in a row."""
        key = ("remade", form)
        return shared(self.tensors[0], key, lambda: change(self.make(*self.tensors)))


def can_be_remade(x: Tensor, recipe: Recipe) -> None:
    """Tell the layers that read x next that they need not keep it."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _recent.of(x)["recipe"] = recipe


def recipe_of(x: Tensor) -> Recipe | None:
    """How to make x again, if that is known."""
    return None if torch.compiler.is_compiling() else _recent.of(x).get("recipe")


def shared(x: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` returns, made once for all who ask for `key` while x stays as it is.

    Without gradients attached: `make` runs under no_grad. While torch.compile traces, nothing is
    kept, since the compiler removes what is computed twice.

    Args:
        x: the input that `make` reads.
        key: what is made of it.
        make: makes it.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad():
            return make()
    made = _recent.of(x)
    if key not in made:
        with torch.no_grad():
            made[key] = make()
    return made[key]

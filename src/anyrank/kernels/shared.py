"""What several layers make of one input: made once.

q, k and v read the same tensor, and so do gate and up. Its cast, its pooled form and its dropout
mask are kept for the layers that follow, until another tensor is read or this one is gone. If it is
the output of a norm or of a gated product, they also learn how to make it again instead of keeping
it for the backward pass.

Layers that share a dropout mask must lie in one region of gradient checkpointing, as those of a
decoder layer do: a region is computed again with the random state of its own start.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class _Slot(threading.local):
    """The latest input of this thread, and what was made of it."""

    source: weakref.ref[Tensor] | None = None
    version = 0

    def __init__(self) -> None:
        self.made: dict[Hashable, Any] = {}

    def forget(self, gone: weakref.ref[Tensor] | None = None) -> None:
        if gone is None or gone is self.source:
            self.source = None
            self.made.clear()

    def of(self, x: Tensor) -> dict[Hashable, Any]:
        source = self.source
        if source is None or source() is not x or self.version != x._version:
            self.forget()
            self.source, self.version = weakref.ref(x, self.forget), x._version
        return self.made


_slot = _Slot()


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
        _slot.of(x)["recipe"] = recipe


def recipe_of(x: Tensor) -> Recipe | None:
    """How to make x again, if that is known."""
    return None if torch.compiler.is_compiling() else _slot.of(x).get("recipe")


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
    made = _slot.of(x)
    if key not in made:
        with torch.no_grad():
            made[key] = make()
    return made[key]

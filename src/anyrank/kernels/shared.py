"""What several layers make of one input: made once.

q, k and v read the same tensor, and so do gate and up. Its cast, its pooled form and its dropout
mask are kept for the layers that follow, until another tensor is read or this one is gone.

Layers that share a dropout mask must lie in one region of gradient checkpointing, as those of a
decoder layer do: a region is computed again with the random state of its own start.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

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

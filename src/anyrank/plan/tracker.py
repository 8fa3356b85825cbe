"""Live bytes of a program: every storage counts once, from its first tensor to its last.

    live(t) = sum of the sizes of all storages alive at t,      peak = max over t of live(t)

A dispatch mode sees every operator of forward, backward and optimizer step, so the bytes are those
that an allocator is asked for; on fake tensors none are. What one operator allocates and frees
within itself stays unseen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER, HOST = "other", "host"


class Tracker(TorchDispatchMode):
    """Counts the storages that operators make while it is on, and those that `mark` names.

    Attributes:
        live: bytes alive now, by kind; what an operator made is `OTHER` until it is marked.
        peaks: per phase, `live` as it was when its sum was largest, without what lies elsewhere.
        phase: the one that peaks belong to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._highest: dict[str, int] = {}
        self.phase = ""

    @property
    def total(self) -> int:
        """Bytes alive now, without those that lie elsewhere."""
        return self.live.total() - self.live[HOST]

    def begin(self, phase: str) -> None:
        """Peaks from here on belong to `phase`, together with those of its earlier times."""
        self.phase = phase
        self._look()

    def forget_peaks(self) -> None:
        """Start to look for peaks again; what is alive stays known."""
        self.peaks, self._highest = {}, {}

    def mark(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Count the storages of these tensors as `kind`, whether known already or not."""
        for tensor in tensors:
            if tensor is not None:
                self._add(tensor, kind)
        self._look()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self._look()
        return result

    def _add(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            reference, before, size = self._known[key]
            if kind is None or kind == before:
                return
            self.live[before] -= size
        else:
            reference, size = weakref.ref(storage, partial(self._gone, key)), storage.nbytes()
        self.live[kind or OTHER] += size
        self._known[key] = reference, kind or OTHER, size

    def _gone(self, key: int, _: weakref.ref[Any]) -> None:
        _, kind, size = self._known.pop(key)
        self.live[kind] -= size

    def _look(self) -> None:
        total = self.total
        if total > self._highest.get(self.phase, -1):
            self._highest[self.phase] = total
            self.peaks[self.phase] = self.live.copy()
            del self.peaks[self.phase][HOST]

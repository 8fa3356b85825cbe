"""What the inputs of an adapted layer are like: the second moments of A x."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..algebra import pool
from ..tuner import AnyRankLinear


class Watch:
    """Sums (A P x) (A P x)^T over the tokens of every input that a layer gets, until it is stopped.

    Args:
        layer: the layer.
        name: its adapter, all rows of which are watched, whatever its rank.
    """

    def __init__(self, layer: AnyRankLinear, name: str) -> None:
        self.layer, self.name = layer, name
        a = layer.anyrank_A[name]
        self.moments = torch.zeros(len(a), len(a), device=a.device)
        self._hook = layer.register_forward_pre_hook(self._see)

    @torch.no_grad()
    def _see(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        x = pool(inputs[0], self.layer.adapters[self.name].geometry.p)
        a = self.layer.anyrank_A[self.name]
        with torch.autocast(x.device.type, enabled=False):
            z = (x.flatten(0, -2) @ a.to(x.dtype).T).float()
            self.moments.addmm_(z.T, z)

    def stop(self) -> Tensor:
        """The second moments [rows, rows] that all processes saw: zero without an input."""
        self._hook.remove()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.moments)
        return self.moments

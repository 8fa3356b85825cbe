"""Float weights: nn.Linear, and the Conv1D of GPT-2, which stores W transposed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..algebra import Update
from .base import FrozenWeight


class DenseWeight(FrozenWeight):
    """W of an nn.Linear: [d_out, d_in] as it lies."""

    def __init__(self, layer) -> None:
        super().__init__(layer)
        self.d_in, self.d_out = layer.in_features, layer.out_features

    @staticmethod
    def forward() -> Callable[..., Tensor]:
        """That of nn.Linear."""
        return nn.Linear.forward

    def read(self) -> Tensor:
        """W, sharing memory with the layer."""
        return self.layer.weight.data

    def fold_obstacle(self, p: int, q: int) -> str | None:
        """A float weight takes any update."""
        return None

    def fold(self, update: Update) -> None:
        """W += update in place, in the dtype of W."""
        weight = self.read()
        weight += update.weight().to(weight.dtype)

    def unfold(self, update: Update, kept: Tensor | None) -> None:
        """W -= update in place: equal to W before up to one rounding of its dtype."""
        weight = self.read()
        weight -= update.weight().to(weight.dtype)


class TransposedWeight(DenseWeight):
    """W of a Conv1D, stored as [d_in, d_out]."""

    transposed = True

    def __init__(self, layer) -> None:
        FrozenWeight.__init__(self, layer)
        self.d_in, self.d_out = layer.weight.shape

    @staticmethod
    def forward() -> Callable[..., Tensor]:
        """That of Conv1D."""
        from transformers.pytorch_utils import Conv1D

        return Conv1D.forward

    def read(self) -> Tensor:
        """W as a transposed view that shares memory with the layer."""
        return self.layer.weight.data.T

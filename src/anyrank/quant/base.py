"""The interface of a frozen weight: all that an adapter may ask of its base layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..algebra import Update


class FrozenWeight(ABC):
    """The weight W [d_out, d_in] of one base layer, however it is stored.

    Attributes:
        layer: the module that holds the weight and computes W x.
        d_in: inputs of the layer.
        d_out: outputs of the layer.
        transposed: whether the layer stores W as [d_in, d_out].
    """

    d_in: int
    d_out: int
    transposed = False

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def prepare(self) -> None:  # noqa: B027 (most weights need nothing)
        """Make the layer ready to train an adapter beside it; called when one is attached."""

    @abstractmethod
    def read(self) -> Tensor:
        """W as a float tensor [d_out, d_in]; may share memory with the layer."""

    @abstractmethod
    def fold_obstacle(self, p: int, q: int) -> str | None:
        """Why an update that is constant on tiles of q x p cannot be folded; None: it can."""

    def absorbs(self, p: int, q: int) -> bool:
        """Whether the layer computes with such an update inside of W, as it will be deployed."""
        return False

    @abstractmethod
    def fold(self, update: Update) -> Tensor | None:
        """W += update, exactly as far as the storage allows; only after `fold_obstacle` is None.

        Returns:
            What `unfold` needs to bring the same bits back; None: it subtracts.
        """

    @abstractmethod
    def unfold(self, update: Update, kept: Tensor | None) -> None:
        """Undo the latest `fold`."""

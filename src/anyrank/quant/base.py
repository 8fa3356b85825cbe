"""The interface of a frozen weight: all that an adapter may ask of its base layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
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

    @staticmethod
    @abstractmethod
    def forward() -> Callable[..., Tensor]:
        """The forward of this kind of layer: W x + b and nothing else."""

    @property
    def bias(self) -> Tensor | None:
        """b [d_out], if the layer has one."""
        return self.layer.bias

    def computes(self, x: Tensor) -> bool:
        """Whether W x + b made from `dense` is all that the layer does with x.

        Not for a subclass with a forward of its own, for a layer with hooks (a weight that is
        offloaded, for one), or for a weight that is trained itself; nor for a single token without
        gradients, for which the layer may have a faster product.
        """
        layer = self.layer
        if not torch.is_grad_enabled() and x.numel() == self.d_in:
            return False
        hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
        plain = type(layer).forward is self.forward() and "forward" not in vars(layer)
        return plain and not hooked and not self.is_trained

    @property
    def is_trained(self) -> bool:
        """Whether the weight itself, or its bias, gets a gradient."""
        return any(parameter.requires_grad for parameter in self.layer.parameters(recurse=False))

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the layer computes W x."""
        return x.dtype

    def dense(self, dtype: torch.dtype, inside: Sequence[Update] = ()) -> Tensor:
        """W [d_out, d_in] in `dtype`, with the updates that it absorbs; may share memory."""
        assert not inside
        return self.read().to(dtype)

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

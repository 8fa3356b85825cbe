"""Attention layers whose `scaled_dot_product_attention` is ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..kernels.attention import attention


class _Ours(TorchFunctionMode):
    """Inside of it, torch's attention is that of kernels.attention."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            func = attention
        return func(*args, **(kwargs or {}))


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer: Transformers names their classes so."""
    return type(module).__name__.endswith("Attention")


def attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, whichever way it comes to torch's attention."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    with _Ours():
        return type(self).forward(self, *args, **kwargs)

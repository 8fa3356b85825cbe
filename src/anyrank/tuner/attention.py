"""Attention layers whose `scaled_dot_product_attention` is ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..kernels.attention import attention


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer: Transformers names their classes so."""
    return type(module).__name__.endswith("Attention")


def attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, during which torch's attention is that of kernels.attention.

    A TorchFunctionMode would do the same for a call of Python per operation, 3 to 5 ms of a step.
    What is put in place is not taken for the first one by a thread that comes meanwhile, so the
    last to leave always leaves torch's.
    """
    before = functional.scaled_dot_product_attention
    if torch.compiler.is_compiling() or before is attention:
        return type(self).forward(self, *args, **kwargs)
    functional.scaled_dot_product_attention = attention
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        functional.scaled_dot_product_attention = before

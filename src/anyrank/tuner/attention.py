"""Attention layers whose `scaled_dot_product_attention` is ours."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..kernels.attention import attention
from .heads import keys_in_groups


class _Ours:
    """torch's attention is that of kernels.attention while a thread is inside.

    A TorchFunctionMode would do the same for a call of Python per operation, 3 to 4 ms of a step.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = functional.scaled_dot_product_attention
                functional.scaled_dot_product_attention = attention
            self.inside += 1

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                functional.scaled_dot_product_attention = self.before


_ours = _Ours()


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer: Transformers names their classes so."""
    return type(module).__name__.endswith("Attention")


def attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, whichever way it comes to torch's attention."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    with _ours, keys_in_groups(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

"""Where a GPU's path differs from a CPU's, while tensors pretend to lie on a CPU.

torch cannot run autograd on fake CUDA tensors without a GPU, so a plan computes on fake CPU
tensors everywhere, and gives the same answer everywhere. What differs in memory is followed:

- CUDA's autocast computes layer norms in float32, a CPU's does not.
- TRL's loss makes its tiles of logits in a Triton kernel without further memory, and picks the
  tokens with a label first. On a CPU it does so op by op, with seven copies of a tile.
- Codes become weights in a Triton kernel, and norms read their input whole; a CPU does both in
  pieces. Dropout keeps a mask of one byte per number, not positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from ..algebra import Update
from ..kernels import Affine, dropout, norm

_layer_norm = nn.functional.layer_norm


@contextmanager
def gpu_paths() -> Iterator[None]:
    """Follow a GPU's paths within the block."""
    with ExitStack() as stack:

        def put(place: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(place, name, value))

        put(nn.functional, "layer_norm", _float32_layer_norm)
        put(trl_utils, "_use_triton", _yes)
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            put(chunked_logprob, name, _nothing)
        put(Affine, "dense", _dense)
        put(norm, "CPU_CHUNK", 2**62)
        put(dropout, "SPARSE", -1.0)
        yield


def _yes(_: Any) -> bool:
    return True


def _nothing(*_: Any, **__: Any) -> None:
    """A kernel that takes no memory."""


def _dense(weight: Affine, dtype: torch.dtype, inside: Sequence[Update] = ()) -> Tensor:
    """W as one launch makes it."""
    d_out, d_in = len(weight.codes), weight.codes.shape[1] * 8 // weight.form.bits
    return weight.codes.new_empty(d_out, d_in, dtype=dtype)


def _float32_layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        input = input.float()
        weight, bias = (None if part is None else part.float() for part in (weight, bias))
    return _layer_norm(input, normalized_shape, weight, bias, eps)

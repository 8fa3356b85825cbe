"""Whether the Triton kernels can run; asked before one of their modules is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def available(device: torch.device) -> bool:
    """Whether `triton_nf4` and `triton_affine` take tensors of a device.

    True for a GPU where Triton is installed, and for any device in Triton's interpreter, which is
    on when TRITON_INTERPRET=1 is set before Triton is imported.
    """
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and find_spec("triton") is not None

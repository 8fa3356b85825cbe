"""Which kind of frozen weight a layer holds."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import LayerError
from .affine import AffineLinear, AffineWeight
from .base import FrozenWeight
from .dense import DenseWeight, TransposedWeight
from .nf4 import NF4Weight


def frozen_weight(layer: nn.Module, name: str = "layer") -> FrozenWeight:
    """The frozen weight of a base layer.

    A package that is not loaded cannot have made the layer, so none is imported to look.

    Args:
        layer: a float nn.Linear, a Conv1D of Transformers, a Linear4bit of bitsandbytes, or
            an AffineLinear.
        name: the layer's name, for the message.

    Raises:
        LayerError: the layer is of another kind.
    """
    if isinstance(layer, AffineLinear):
        return AffineWeight(layer)
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear4bit):
        return NF4Weight(layer)
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    if pytorch_utils is not None and isinstance(layer, pytorch_utils.Conv1D):
        return TransposedWeight(layer)
    if isinstance(layer, nn.Linear) and layer.weight.is_floating_point():
        return DenseWeight(layer)
    kind = f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}"
    raise LayerError(
        f"{name}: no adapter fits on {kind}; supported are float torch.nn.Linear, "
        "transformers.Conv1D, 4-bit bitsandbytes.nn.Linear4bit and the layers of anyrank quantize; "
        "name other target_modules, or load the base in one of these forms"
    )

"""NF4 and FP4 weights of bitsandbytes' Linear4bit.

w = absmax_block * table[code]: there is no offset, so nothing folds into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..algebra import Update
from ..errors import MergeError
from ..kernels.triton_available import available
from .base import FrozenWeight


class NF4Weight(FrozenWeight):
    """W of a Linear4bit, blocks of 64 along the flattened weight."""

    def __init__(self, layer) -> None:
        super().__init__(layer)
        self.d_in, self.d_out = layer.in_features, layer.out_features

    def prepare(self) -> None:
        """Keep the bytes in the layout that the backward pass can read.

        On a CPU with AVX-512 bf16, bitsandbytes 0.50 repacks the weight at the first evaluation,
        and from then on the layer passes no gradient to its input, without an error.
        """
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight = self.layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                weight.data, weight.quant_state
            )
        self.layer.support_avx512bf16_for_cpu = False

    @staticmethod
    def forward() -> Callable[..., Tensor]:
        """That of Linear4bit."""
        from bitsandbytes.nn.modules import Linear4bit

        return Linear4bit.forward

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The compute dtype of the layer; that of x where none was chosen."""
        chosen = self.layer.compute_dtype if self.layer.compute_type_is_set else None
        return chosen or x.dtype

    def dense(self, dtype: torch.dtype, inside: Sequence[Update] = ()) -> Tensor:
        """W dequantized in one launch where Triton is at hand."""
        packed, state = self.layer.weight.data, self.layer.weight.quant_state
        if available(packed.device) and not torch.compiler.is_compiling():
            from ..kernels.triton_nf4 import nf4_weight

            return nf4_weight(packed, state, dtype)
        return super().dense(dtype, inside)

    def read(self) -> Tensor:
        """W dequantized, in the dtype that it had before quantization."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.layer.weight.data, self.layer.weight.quant_state)

    def fold_obstacle(self, p: int, q: int) -> str | None:
        """Always: the format has no offset to fold into."""
        return "NF4 and FP4 weights have no offset; merging would round most of the adapter away"

    def fold(self, update: Update) -> None:
        """Refuse.

        Raises:
            MergeError: always.
        """
        raise MergeError(str(self.fold_obstacle(update.p, update.q)))

    def unfold(self, update: Update, kept: Tensor | None) -> None:
        """Refuse, as `fold` does."""
        self.fold(update)

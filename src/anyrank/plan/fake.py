"""Tensors with shapes and no numbers, and what to answer where a program asks for a number.

The base and its adapter are made on the meta device and then given fake storage, so that autograd,
checkpointing and autocast run as they do on real tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LARGE = 2**30


class Answers(TorchDispatchMode):
    """Goes on where an operator would need values.

    A flag is `flag`, a number is large (so that loops which wait for a sum to grow come to an end),
    a mask selects every element. A product with 4-bit codes is taken apart into the dense weight
    and a product, as bitsandbytes computes it on long inputs: its own operator hides the weight.

    Args:
        flag: the answer to every yes-or-no question; decoders ask whether nothing is masked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flag = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return self.flag if dtype == torch.bool else 1.0 if dtype.is_floating_point else LARGE
        if func is aten.masked_select.default:
            return args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        if func is aten.index.Tensor:
            return func(args[0], _all_selected(args[1]))
        if func.namespace == "bitsandbytes" and func.__name__.startswith("gemm_4bit"):
            return _gemm_4bit(*args, **kwargs)
        return func(*args, **kwargs)


def _all_selected(indices: Any) -> list[Tensor | None]:
    """Indices with every mask replaced by the positions of all its elements."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += index.new_empty(index.ndim, index.numel(), dtype=torch.int64).unbind()
    return found


def _gemm_4bit(
    a: Tensor,
    codes: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """A W^T from 4-bit codes, by the operators that it consists of."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        flat = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = flat + absmax_offset
    dense = ops.dequantize_4bit(codes, absmax, blocksize, quant_type, shape, a.dtype)
    return nn.functional.linear(a, dense, bias)


def give_storage(model: nn.Module, dtype: torch.dtype) -> None:
    """Fake storage on the CPU for every tensor of a model on the meta device, in place.

    To be called under FakeTensorMode. 4-bit layers of bitsandbytes get codes and scales.

    Args:
        model: the model.
        dtype: of its weights before they were quantized.
    """
    made: dict[int, Any] = {}

    def new(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _empty(tensor)
        return made[id(tensor)]

    before = []  # alive until the end: an id must not come twice
    for module in model.modules():
        if _holds_4bit_codes(module):
            _quantize(module, dtype)
        places: tuple[Any, ...] = (module._parameters, module._buffers, vars(module))
        for values in places:
            for name, value in list(values.items()):
                if isinstance(value, Tensor) and value.is_meta:
                    before.append(value)
                    values[name] = new(value)


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _holds_4bit_codes(module: nn.Module) -> bool:
    return hasattr(module._parameters.get("weight"), "quant_state")


def _quantize(layer: Any, dtype: torch.dtype) -> None:
    """Give a 4-bit layer what bitsandbytes makes of its float weight.

    The codes lie in a plain parameter with a `quant_state`: Params4bit cannot wrap a fake tensor.
    """
    from bitsandbytes.functional import quantize_4bit

    old = layer.weight
    codes, state = quantize_4bit(
        torch.empty(layer.out_features, layer.in_features, dtype=dtype),
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    weight: Any = nn.Parameter(codes, requires_grad=False)
    weight.quant_state = layer.quant_state = state
    layer.weight = weight
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(layer.bias.shape, dtype=dtype), requires_grad=False)

"""Transformers learns the quantization method "anyrank": `from_pretrained` and `save_pretrained`.

Imported by itself as soon as `transformers.quantizers.auto` is, see `_plugins`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigError, RunError
from ..kernels import AffineFormat
from .affine import AffineLinear, check_format
from .checkpoint import METHOD, format_fields, read_format


@register_quantization_config(METHOD)
class AffineConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Args:
        bits: bits per code.
        tile: (rows, columns) that share scale and offset.
        storage_dtype: the precision of scales and offsets: float16, bfloat16 or float32.
        modules_to_not_convert: linear layers that stay as they are, by name or by last part.
        quantizer: how the codes were chosen; for the reader.
    """

    def __init__(
        self,
        bits: int,
        tile: Sequence[int],
        storage_dtype: str = "float16",
        modules_to_not_convert: Sequence[str] = (),
        quantizer: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.form = read_format({"bits": bits, "tile": tile, "storage_dtype": storage_dtype})
        self.modules_to_not_convert = list(modules_to_not_convert)
        self.quantizer = quantizer

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {
            "quant_method": METHOD,
            **format_fields(self.form),
            "modules_to_not_convert": self.modules_to_not_convert,
            "quantizer": self.quantizer,
        }


@register_quantizer(METHOD)
class AffineQuantizer(HfQuantizer):
    """Puts an AffineLinear in the place of every linear layer before the weights are read."""

    def __init__(self, quantization_config: AffineConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ConfigError(
                "quantization_config: from_pretrained does not quantize; "
                "run anyrank quantize MODEL OUT and load OUT"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> Any:
        config: Any = self.quantization_config
        replace_linears(model, config.form, config.modules_to_not_convert)
        if checkpoint_files:
            _check_files(model, checkpoint_files)
        return model

    def is_serializable(self, **_: Any) -> bool:
        """`save_pretrained` writes the codes as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train beside the frozen codes."""
        return True


def _check_files(model: nn.Module, files: Sequence[str]) -> None:
    """Raise if a part of a quantized weight is missing; Transformers would leave it random."""
    found: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            found.update(tensors.keys())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # of a model without its head
    found |= {name.removeprefix(prefix) for name in found} | {prefix + name for name in found}
    for layer, module in model.named_modules():
        for part in ("codes", "scales", "offsets") if isinstance(module, AffineLinear) else ():
            if f"{layer}.{part}" not in found:
                raise RunError(
                    f"{Path(files[0]).parent}: {layer}.{part} is missing; "
                    "quantize or fold the model again"
                )


def quantized_linears(model: nn.Module, keep: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer that is, or is to be, quantized.

    Args:
        model: the model, which may lie on the meta device.
        keep: names or last parts of names of layers that stay as they are.
    """
    for name, module in model.named_modules():
        if type(module) in _linear_classes() and not _named(name, keep):
            yield name, module  # type: ignore[misc]


def _linear_classes() -> set[type]:
    """The classes that compute x W^T + b and nothing else; a subclass may compute what it likes."""
    falcon = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return {nn.Linear} | ({falcon.FalconLinear} if falcon is not None else set())


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def replace_linears(model: nn.Module, form: AffineFormat, keep: Sequence[str]) -> None:
    """Put an empty AffineLinear in the place of every linear layer to be quantized.

    Raises:
        GeometryError: a layer does not fit the format; nothing is replaced then.
    """
    chosen = list(quantized_linears(model, keep))
    for name, layer in chosen:
        check_format(form, layer.in_features, layer.out_features, name)
    for name, layer in chosen:
        weight = layer.weight
        new = AffineLinear(
            layer.in_features,
            layer.out_features,
            form,
            bias=layer.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        model.set_submodule(name, new)

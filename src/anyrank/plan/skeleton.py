"""The base model without memory: built from its config alone, its layers quantized as in a run.

Decoder layers repeat, so a few of each kind stand for all of them: `layer_kinds` tells which ones
are alike, `keep_layers` drops the others. Everything here lies on the meta device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as hf_logging

from ..errors import ConfigError
from ..training.arguments import ModelArguments
from ..training.base import from_pretrained, nf4_config, plain_linears

TRAINABLE = ("anyrank", "bitsandbytes")


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries warn of while a model is built is not about the plan."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(before)


def load_config(arguments: ModelArguments, *, trust_remote_code: bool) -> Any:
    """The model's configuration, from a folder with config.json or from the Hub.

    Raises:
        ConfigError: there is none, or the model is quantized in a form that nothing trains on.
    """
    config = from_pretrained(AutoConfig, arguments, trust_remote_code)
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method")
    if method is not None and (method not in TRAINABLE or stored.get("load_in_8bit")):
        raise ConfigError(
            f"model_name_or_path={arguments.model_name_or_path}: adapters do not train on its "
            f"weights of kind {'int8' if stored.get('load_in_8bit') else method}; take them over "
            "with anyrank quantize, or name the float model"
        )
    return config


def build(
    config: Any,
    arguments: ModelArguments,
    *,
    in_4bit: bool,
    attention: str | None,
    trust_remote_code: bool,
) -> Any:
    """The model on the meta device, with the layers that loading it would make.

    Args:
        config: of the model; its copy is changed.
        arguments: say the dtype.
        in_4bit: whether linear layers become NF4.
        attention: the implementation; None: that of the model.
        trust_remote_code: whether the model may bring its code along.

    Raises:
        ConfigError: the model cannot be built from its configuration.
        MissingPackageError: NF4 without bitsandbytes.
    """
    options = {"attn_implementation": attention} if attention else {}
    dtype = base_dtype(config, arguments.dtype)
    try:
        with torch.device("meta"), plain_linears() if in_4bit else nullcontext():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model_name_or_path={arguments.model_name_or_path}: {reason}") from error
    stored = getattr(config, "quantization_config", None)
    if in_4bit or stored:
        kind: Any = nf4_config(arguments.dtype) if in_4bit else stored
        quantizer = AutoHfQuantizer.from_config(kind, pre_quantized=not in_4bit)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    model.config.use_cache = False
    return model


def base_dtype(config: Any, name: str) -> torch.dtype:
    """As stored, which config.json says; float32 where it does not."""
    if name != "auto":
        return getattr(torch, name)
    return config.dtype or config.get_text_config().dtype or torch.float32


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """Name and list of the decoder's layers; None: the model keeps them in another way."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    return None


def layer_kinds(layers: Iterable[nn.Module]) -> list[int]:
    """A number for each layer; equal ones have equal parts, shapes and settings."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_signature(layer), len(seen)) for layer in layers]


def float_share(layers: Iterable[nn.Module]) -> float:
    """The share of the weights of these layers that is not quantized."""
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim > 1]
    left = sum(p.numel() for p in matrices if not hasattr(p, "quant_state"))
    return left / max(sum(p.numel() for p in matrices), 1)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)),
            tuple((key, tuple(b.shape)) for key, b in module.named_buffers(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str) and not _is_index(key)
            ),
        )
        for name, module in layer.named_modules()
    )


def _is_index(attribute: str) -> bool:
    return attribute.endswith(("idx", "id", "index", "number"))


def keep_layers(model: Any, chosen: Sequence[int]) -> None:
    """Drop the other decoder layers; lists of the config with an entry per layer follow."""
    found = decoder_layers(model)
    assert found is not None
    name, layers = found
    config = model.config.get_text_config()
    count = len(layers)
    model.set_submodule(name, nn.ModuleList(layers[i] for i in chosen))
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            vars(config)[key] = type(value)(value[i] for i in chosen)
    config.num_hidden_layers = len(chosen)

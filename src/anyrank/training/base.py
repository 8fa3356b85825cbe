"""Load the frozen base model and its tokenizer, in the precision that the method asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, MissingPackageError
from ..methods import method
from .arguments import ModelArguments


def wants_4bit(arguments: ModelArguments, method_name: str) -> bool:
    """Whether the base is held in NF4: as asked, or as the method's published base is.

    Raises:
        ConfigError: NF4 was asked for, but the base is quantized already.
    """
    quantized = quantization_of(arguments)
    if quantized and arguments.load_in_4bit:
        raise ConfigError(
            f"load_in_4bit=True: the base is quantized already ({quantized}); leave it out"
        )
    if quantized or arguments.load_in_4bit is not None:
        return bool(arguments.load_in_4bit)
    return method(method_name).base != "any"


def quantization_of(arguments: ModelArguments) -> str | None:
    """The quantization method that the base was stored with; None: none, or no such model."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(
            arguments.model_name_or_path or "", revision=arguments.model_revision
        )
    except (OSError, ValueError, TypeError):
        return None  # loading says what is wrong
    return (config.get("quantization_config") or {}).get("quant_method")


def load_base(arguments: ModelArguments, *, in_4bit: bool, trust_remote_code: bool) -> Any:
    """The frozen model, on the GPU of this process where there is one.

    Raises:
        ConfigError: the model cannot be found or loaded.
        MissingPackageError: NF4 without bitsandbytes.
    """
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if in_4bit:
        options["quantization_config"] = nf4_config(arguments.dtype)
    if torch.cuda.is_available():
        options["device_map"] = {"": PartialState().local_process_index}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    with plain_linears() if in_4bit else nullcontext():
        return from_pretrained(AutoModelForCausalLM, arguments, trust_remote_code, **options)


@contextmanager
def plain_linears() -> Iterator[None]:
    """Build Falcon of nn.Linear, which Transformers makes NF4 of.

    Falcon's own class computes the same, but is passed over, and its weights would stay float.
    """
    from transformers.models.falcon import modeling_falcon

    own = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = nn.Linear  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = own


def load_tokenizer(arguments: ModelArguments, *, trust_remote_code: bool) -> Any:
    """The tokenizer of the base, with a token to pad with."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, arguments, trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def from_pretrained(
    kind: Any, arguments: ModelArguments, trust_remote_code: bool, **options: Any
) -> Any:
    """What an Auto class of Transformers loads, or an error in one line.

    Raises:
        ConfigError: the model cannot be found or loaded.
    """
    name = arguments.model_name_or_path
    if name is None:
        raise ConfigError("model_name_or_path is missing; name a model folder or a Hub name")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"model_name_or_path={name}: the folder has no config.json")
    if "dtype" not in options and hasattr(kind, "from_config"):
        options["dtype"] = arguments.dtype
    try:
        return kind.from_pretrained(
            name,
            revision=arguments.model_revision,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model_name_or_path={name}: {reason}") from error


def nf4_config(dtype: str) -> Any:
    """NF4 with double quantization, computing in `dtype`; "auto" is bfloat16.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "an NF4 base needs bitsandbytes; pip install 'anyrank[nf4]', "
            "or train on the float base with --load_in_4bit false"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )

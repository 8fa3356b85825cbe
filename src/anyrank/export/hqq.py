"""A block-quantized model for HQQ: the state of its own `HQQLinear`, in safetensors.

    W = (code - zero) * scale,    zero = -offset / scale,    in groups of g inputs (axis 1)

    qmodel.safetensors   <layer>.W_q      codes [d_out * d_in / g, g], packed along the first axis:
                                          row r of part i of n equal parts lies in bits
                                          b (n - 1 - i) of word r; n = 8, 4, 2, 1 codes to a byte
                                          at 1, 2, 4, 8 bits, 10 to an int32 at 3 bits (padded with
                                          zeros to a multiple of 10), a byte each at 5 and 6
                         <layer>.scale    [d_out * d_in / g, 1] of float32
                         <layer>.zero     likewise
                         <layer>.nbits, .group_size, .shape, ...: settings as tensors, text as ASCII

Scale and zero stay in float32, so storage loses nothing but the rounding of the quotient (6e-8 of
the offset). HQQ rounds them when it loads a model in float16 or bfloat16.

HQQ 0.2.8 writes this state to safetensors and its layers read it (`HQQLinear.load_state_dict`), but
its model loader, `AutoHQQHFModel.from_quantized`, opens a pickle named qmodel.pt. `load_hqq` is
that loader with its own hooks for the file. The file is not called model.safetensors, because
Transformers 5.23 opens such a folder without an error and leaves random numbers in the linear
layers. (Source: hqq/core/{quantize,bitpack,utils}.py, hqq/models/base.py.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ConfigError, GeometryError, RunError
from ..files import read_json, write_json
from ..kernels import Affine
from .folder import (
    Plan,
    code_units,
    consumer,
    group_for,
    in_groups,
    new_model,
    plan,
    write_shards,
)

STEM = "qmodel"
PARTS = {2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}
PACKING = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}


def export_hqq(folder: str | Path, out: str | Path, *, variant: str | None = None) -> Path:
    """Write a quantized or folded model for `load_hqq`.

    Args:
        folder: a model that anyrank quantized or folded.
        out: the folder to make.
        variant: which table of offsets; None: the default one.

    Returns:
        The folder.

    Raises:
        RunError: the model cannot be read, `out` exists, or the disk is full.
        GeometryError: HQQ has no such format.
    """
    out, planned = Path(out), plan(folder, variant)
    group = _checked_group(planned)
    config = dict(planned.model.config)
    config["quantization_config"] = _quantization_config(config, planned.model.form.bits, group)
    word = 32 / 10 if planned.model.form.bits == 3 else 8 / PARTS[planned.model.form.bits]
    with new_model(planned.model, out, planned.bytes(word + 64 / group), "hqq") as beside:
        write_shards(beside, STEM, _tensors(planned, group))
        write_json(beside / "config.json", config)
    return out


def _checked_group(planned: Plan) -> int:
    """The group of inputs in which HQQ can hold every layer."""
    form = planned.model.form
    group = group_for(form, [form.tile[1]] if form.tile[1] % 8 == 0 else [])
    first = next(iter(planned.layers))
    if group is None or form.bits not in PACKING:
        raise GeometryError(
            f"{first}: {form} do not fit HQQ, which holds 2, 3, 4, 5, 6 or 8 bits in "
            "groups of a multiple of 8; quantize with such a --bits and --group_size, or export to "
            "torchao, which holds any"
        )
    for layer, (d_out, d_in) in planned.layers.items():
        parts = 1 if form.bits == 3 else PARTS[form.bits]
        if (d_out * d_in // group) % parts:
            raise GeometryError(
                f"{layer}: its {d_out * d_in // group} groups of {group} are no multiple of "
                f"{parts}, which HQQ packs together at {form.bits} bits; keep the layer in its "
                f"precision with --keep {layer.rsplit('.', 1)[-1]}, or export to torchao"
            )
    return group


def _tensors(planned: Plan, group: int) -> Iterator[tuple[str, Tensor]]:
    for name in planned.others:
        yield name, planned.model.tensor(name)
    for layer, weight in planned.model.weights():
        for key, value in hqq_state(in_groups(weight, group)).items():
            yield f"{layer}.{key}", _encoded(value)


def hqq_state(weight: Affine) -> dict[str, Any]:
    """The state of an `HQQLinear`, with its values as Python has them.

    Args:
        weight: in groups of 1 x g.
    """
    codes, scale, zero = code_units(weight, middle=0)
    bits, (_, group) = weight.form.bits, weight.form.tile
    return {
        "W_q": _packed(codes.view(-1, group), bits),
        "scale": scale.view(-1, 1),
        "zero": zero.view(-1, 1),
        "shape": tuple(codes.shape),
        **_settings(bits, group),
        "packing": PACKING[bits],
        "unpack_view_dtype": "torch.int32" if bits == 3 else "torch.uint8",
        "compute_dtype": "torch.float32",
        "quant_scale": False,
        "quant_zero": False,
        "offload_meta": False,
        "stores_quant_config": True,
        "encoded_state_dict": True,
    }


def _settings(bits: int, group: int) -> dict[str, Any]:
    return {
        "nbits": bits,
        "channel_wise": True,
        "group_size": group,
        "optimize": False,
        "round_zero": False,
        "axis": 1,
        "view_as_float": False,
    }


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, g] as HQQ packs them, [ceil(rows / n), g]."""
    parts = PARTS[bits]
    word = torch.int32 if bits == 3 else torch.uint8
    rows = -(-len(codes) // parts)
    padded = codes.new_zeros(rows * parts, codes.shape[1])
    padded[: len(codes)] = codes
    packed = torch.zeros(rows, codes.shape[1], dtype=word)
    for part, values in enumerate(padded.split(rows)):
        packed |= values.to(word) << (bits * (parts - 1 - part))
    return packed


def _encoded(value: Any) -> Tensor:
    """A setting as a tensor, as `HQQLinear.state_dict` encodes it for safetensors."""
    if isinstance(value, str):
        return torch.tensor(list(value.encode("ascii")), dtype=torch.uint8)
    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _quantization_config(config: dict[str, Any], bits: int, group: int) -> dict[str, Any]:
    """As HQQ and Transformers write it; for the reader, `load_hqq` has it from the tensors."""
    return {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": _settings(bits, group),
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": config["quantization_config"].get("modules_to_not_convert", []),
    }


def load_hqq(folder: str | Path, *, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Any:
    """Load an export with HQQ's own `AutoHQQHFModel.from_quantized`.

    Args:
        folder: what `export_hqq` wrote.
        dtype: the precision to compute in; HQQ rounds scales and zeros to it.
        device: where to.

    Returns:
        The model of Transformers, with `HQQLinear` in the place of its linear layers.

    Raises:
        MissingPackageError: hqq is not installed.
        RunError: the folder is no such export.
        ConfigError: a zero does not fit `dtype`.
    """
    base = consumer("hqq.models.hf.base", "hqq")
    folder = Path(folder)
    if not any(folder.glob(f"{STEM}*.safetensors")):
        raise RunError(
            f"{folder}: holds no {STEM}.safetensors; make it with anyrank export --to hqq"
        )

    # What a model computes for itself, such as the angles of rope, is right in float32 alone: in
    # float16 they are off by a radian at 4,000 tokens. HQQ would cast them too.
    computed: dict[str, Tensor] = {}

    class FromSafetensors(base.AutoHQQHFModel):
        """HQQ's loader for models of Transformers, reading another file."""

        @classmethod
        def get_weight_file(cls, save_dir: str) -> str:
            return str(sorted(Path(save_dir).glob(f"{STEM}*.safetensors"))[0])

        @classmethod
        def load_weights(cls, save_dir: str, map_location: Any = None) -> dict[str, Any]:
            return _modules(Path(save_dir))

        @classmethod
        def setup_model(cls, model: Any) -> None:
            super().setup_model(model)
            computed.update((name, value.clone()) for name, value in model.named_buffers())

        @classmethod
        def post_module_load(cls, model: Any, weights: dict[str, Any]) -> None:
            for name, value in computed.items():
                module, _, key = name.rpartition(".")
                setattr(model.get_submodule(module), key, value.to(device))

    model = FromSafetensors.from_quantized(str(folder), compute_dtype=dtype, device=device)
    for name, module in model.named_modules():
        if hasattr(module, "W_q") and not module.meta["zero"].isfinite().all():
            raise ConfigError(
                f"{name}: a zero does not fit {str(dtype).removeprefix('torch.')}; "
                "load with dtype=torch.float32 or torch.bfloat16"
            )
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _modules(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of every module by its name; a tied head is that of the embeddings."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for path in sorted(folder.glob(f"{STEM}*.safetensors")):
        with safe_open(str(path), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping: it has keys and nothing else)
                module, _, key = name.rpartition(".")
                found[module][key] = tensors.get_tensor(name)
    if read_json(folder / "config.json").get("tie_word_embeddings"):
        for name in [name for name in found if name.endswith("embed_tokens")]:
            found.setdefault("lm_head", found[name])
    return found

"""What `quantize` will do, checked for every layer before the first byte is written."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, LayerError, RunError, nearest
from ..kernels import AffineFormat
from ..quant.affine import check_format
from ..quant.hf import quantized_linears
from .shards import Specs, affine_specs, shard_names, split
from .source import Checkpoint, LoadedModel, Source, load, skeleton
from .takeover import Foreign

QUANTIZERS = ("half_quadratic", "minmax", "gptq")  # the first is the default
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BITS, TILE = 4, (1, 32)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What the user asked for; None: as is best for the model.

    Attributes:
        bits: bits per code.
        tile: (rows, columns) that share scale and offset.
        dtype: the storage precision.
        quantizer: one of `QUANTIZERS`.
        keep: linear layers that stay as they are.
        calibrated: whether there are calibration rows.
        trust_remote_code: run code that comes with the model.
    """

    bits: int | None = None
    tile: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    quantizer: str | None = None
    keep: tuple[str, ...] = ()
    calibrated: bool = False
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise unless every option makes sense by itself.

        Raises:
            ConfigError: one does not.
        """
        if self.bits is not None and self.bits not in range(2, 9):
            raise ConfigError(f"bits={self.bits} must lie in 2..8")
        if self.tile is not None and min(self.tile) < 1:
            raise ConfigError(f"tile={self.tile[0]}x{self.tile[1]} must be at least 1x1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                f"{str(self.dtype).removeprefix('torch.')} cannot hold scales and offsets; "
                "known: float16, bfloat16, float32"
            )
        if self.quantizer is not None and self.quantizer not in QUANTIZERS:
            raise ConfigError(
                f"quantizer={self.quantizer} is unknown; {nearest(self.quantizer, QUANTIZERS)}"
            )
        if self.quantizer == "gptq" and not self.calibrated:
            raise ConfigError(
                "quantizer=gptq needs calibration rows; name a data set, or use half_quadratic, "
                "which needs none"
            )
        if self.calibrated and self.quantizer != "gptq":
            raise ConfigError(
                f"calibration rows are of no use to quantizer={self.quantizer or QUANTIZERS[0]}; "
                "use gptq, or leave them out"
            )


@dataclass(frozen=True)
class Plan:
    """A quantization that nothing but the values of the weights can stop.

    Attributes:
        source: where tensors are read.
        form: how the weights will be stored.
        layers: (d_out, d_in) of every layer to be quantized.
        others: the names of the tensors that are copied.
        keep: linear layers that stay as they are.
        quantizer: how codes are chosen; for a takeover gptq or awq.
        foreign: how the layers are stored, for a takeover.
        model: the float model, where it had to be loaded.
    """

    source: Source
    form: AffineFormat
    layers: dict[str, tuple[int, int]]
    others: list[str]
    keep: list[str]
    quantizer: str
    foreign: Foreign | None = None
    model: Any = None

    def files(self, max_shard_size: int, offsets: str) -> dict[str, Specs]:
        """Every file to be written, with its tensors; the table of offsets comes last."""
        shards: list[Specs] = [{name: self.source.specs[name]} for name in self.others]
        table: Specs = {}
        for layer, shape in self.layers.items():
            codes, grid = affine_specs(layer, *shape, self.form)
            shards.append(codes)
            table |= grid
        return {**shard_names(split(shards, max_shard_size)), offsets: table}


def plan_float(folder: Path, request: Request) -> Plan:
    """Plan the quantization of a float model.

    Raises:
        ConfigError: `keep` names no layer, or Transformers cannot build the model.
        LayerError: nothing is left to quantize.
        GeometryError: a layer does not fit the tile.
        RunError: the checkpoint cannot be read or is not complete.
    """
    bare = skeleton(folder, trust_remote_code=request.trust_remote_code)
    keep = _kept(bare, request.keep)
    layers = {
        name: (linear.out_features, linear.in_features)
        for name, linear in quantized_linears(bare, keep)
    }
    if not layers:
        raise LayerError(
            f"{folder}: {type(bare).__name__} has no torch.nn.Linear to quantize besides "
            f"{', '.join(keep) or 'none'}; other kinds of layers cannot be quantized"
        )
    form = AffineFormat(request.bits or BITS, request.tile or TILE, request.dtype or torch.float16)
    for name, (d_out, d_in) in layers.items():
        check_format(form, d_in, d_out, name)
    source, model = _source(folder, layers, request)
    others = [name for name in source.specs if name.removesuffix(".weight") not in layers]
    return Plan(source, form, layers, others, keep, request.quantizer or QUANTIZERS[0], model=model)


def _source(
    folder: Path, layers: dict[str, tuple[int, int]], request: Request
) -> tuple[Source, Any]:
    """Where to read: the files where they hold the layers by name, else the loaded model."""
    source: Source = Checkpoint(folder)
    found = {name: source.specs.get(f"{name}.weight") for name in layers}
    lost = [name for name, spec in found.items() if spec is None or spec.shape != layers[name]]
    if lost:
        _log.warning(
            "%s: no safetensors file holds %s.weight under this name; the whole model is loaded",
            folder,
            lost[0],
        )
    if not lost and request.quantizer != "gptq":
        return source, None
    model = load(folder, trust_remote_code=request.trust_remote_code)
    return LoadedModel(model) if lost else source, model


def _kept(model: Any, keep: Sequence[str]) -> list[str]:
    """Names of linear layers that stay: those asked for, the output embedding, and tied ones."""
    every = [name for name, _ in quantized_linears(model, ())]
    for pattern in keep:
        if len(list(quantized_linears(model, [pattern]))) == len(every):
            last = {part for name in every for part in (name, name.rsplit(".", 1)[-1])}
            raise ConfigError(
                f"keep={pattern}: {type(model).__name__} has no linear layer of this name; "
                f"{nearest(pattern, last)}"
            )
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    head = model.get_output_embeddings()
    tied = [
        name
        for name, linear in quantized_linears(model, keep)
        if linear is head or owners[id(linear.weight)] > 1
    ]
    return [*keep, *tied]


def plan_takeover(folder: Path, fields: dict[str, Any], request: Request) -> Plan:
    """Plan to take over a GPTQ or AWQ checkpoint.

    Args:
        folder: where it lies.
        fields: `quantization_config` of its config.json.
        request: what the user asked for.

    Raises:
        ConfigError: an option differs from what the checkpoint holds, or its groups are shuffled.
        LayerError: a layer is none that can be quantized.
        RunError: the checkpoint cannot be read or is not complete.
    """
    foreign = Foreign.from_config(fields, str(folder))
    bare = skeleton(folder, trust_remote_code=request.trust_remote_code)
    source = Checkpoint(folder)
    linears = dict(quantized_linears(bare, ()))
    packed = [n.removesuffix(".qweight") for n in source.specs if n.endswith(".qweight")]
    if not packed:
        raise RunError(f"{folder}: no safetensors file holds a qweight; nothing can be taken over")
    for name in packed:
        if name not in linears:
            raise LayerError(
                f"{name}: {type(bare).__name__} has no torch.nn.Linear of this name, so its "
                f"{foreign.kind} codes cannot be taken over; quantize the float model"
            )
    layers = {n: (linears[n].out_features, linears[n].in_features) for n in packed}
    for name, (d_out, d_in) in layers.items():
        foreign.check(source, name, d_out, d_in)
    columns = _columns(folder, foreign, [d_in for _, d_in in layers.values()], request)
    dtype = request.dtype or _exact_dtype(foreign, source, layers)
    form = AffineFormat(foreign.bits, (1, columns), dtype)
    for name, (d_out, d_in) in layers.items():
        check_format(form, d_in, d_out, name)
    keep = [name for name in linears if name not in layers]
    others = _copied(source, linears, layers)
    return Plan(source, form, layers, others, keep, foreign.kind, foreign)


def _columns(folder: Path, foreign: Foreign, d_in: Sequence[int], request: Request) -> int:
    """Inputs per group: the checkpoint's, or asked for and dividing it."""
    whole = foreign.group == -1
    columns = gcd(128, *d_in) if whole else foreign.group
    rows, asked = request.tile or (1, columns)
    unit = gcd(*d_in) if whole else foreign.group
    if request.bits not in (None, foreign.bits) or rows != 1 or unit % asked:
        groups = "rows" if whole else f"groups of {foreign.group}"
        raise ConfigError(
            f"{folder}: holds {foreign.kind} codes of {foreign.bits} bits in {groups}, which are "
            f"taken over as they are; bits={request.bits or foreign.bits} in {rows}x{asked} needs "
            "the float model"
        )
    for option, value in (("quantizer", request.quantizer), ("keep", request.keep)):
        if value:
            raise ConfigError(
                f"{folder}: holds {foreign.kind} codes, which are taken over as they are; "
                f"{option}={value if option == 'quantizer' else ','.join(value)} needs the "
                "float model"
            )
    return asked


def _exact_dtype(
    foreign: Foreign, source: Source, layers: dict[str, tuple[int, int]]
) -> torch.dtype:
    """The precision of the scales where it holds every offset exactly, else float32."""
    dtypes = {source.specs[f"{name}.scales"].dtype for name in layers}
    fits = all(foreign.offsets_fit(source, name, d_out) for name, (d_out, _) in layers.items())
    return dtypes.pop() if fits and len(dtypes) == 1 else torch.float32


def _copied(source: Source, linears: dict[str, nn.Linear], layers: dict[str, Any]) -> list[str]:
    """The tensors that stay as they are.

    Old writers gave every layer a bias of zeros, which the model has no place for.
    """
    parts = ("qweight", "qzeros", "scales", "g_idx")
    inside = {f"{layer}.{part}" for layer in layers for part in parts}
    for layer in layers:
        bias = f"{layer}.bias"
        if bias in source.specs and linears[layer].bias is None:
            if source.read(bias).any():
                raise RunError(f"{bias}: the model has no such bias, and it is not zero")
            inside.add(bias)
    return [name for name in source.specs if name not in inside]

"""What the exports of a whole model share: the plan, groups along the input, shards, side files.

A tile of rows x columns is the same as rows x columns/g groups of 1 x g that repeat its scale and
offset. Where g divides columns a format that knows only groups along the input holds the same
weights to the last bit; where it does not, no repetition helps.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import MissingPackageError
from ..files import new_folder, refuse_filled, require_disk, write_json
from ..kernels import Affine, AffineFormat, unpack
from ..quant.checkpoint import QuantizedModel, copy_companions

SHARD_BYTES = 400_000_000


@dataclass(frozen=True)
class Plan:
    """What an export is about to write, known without reading a weight.

    Attributes:
        model: the quantized model.
        layers: (d_out, d_in) of every quantized layer.
        others: the shape of every other tensor.
    """

    model: QuantizedModel
    layers: dict[str, tuple[int, int]]
    others: dict[str, tuple[int, ...]]

    def bytes(self, bits: float, other: int = 4) -> int:
        """About how much room is needed.

        Args:
            bits: bits of one quantized weight, scale and offset included.
            other: bytes of one value of the other tensors.
        """
        quantized = sum(d_out * d_in for d_out, d_in in self.layers.values())
        return int(quantized * bits / 8) + sum(map(prod, self.others.values())) * other


def plan(folder: str | Path, variant: str | None) -> Plan:
    """Open a quantized model and check that every layer is whole.

    Raises:
        RunError: the folder holds no quantized model, or a layer of it is broken.
    """
    model = QuantizedModel.open(folder, variant)
    layers, shapes = model.check_layers(), model.shapes()
    return Plan(model, layers, {name: shapes[name] for name in model.others})


def formats_for(form: AffineFormat) -> list[str]:
    """The formats that hold weights of this form as they are, the most read first."""
    whole = form.tile[1] % 32 == 0
    known = {
        "gguf": whole and form.bits <= 5,
        "mlx": whole and form.bits != 7,
        "hqq": form.tile[1] % 8 == 0 and form.bits != 7,
        "torchao": True,
    }
    return [name for name, fits in known.items() if fits]


def group_for(form: AffineFormat, allowed: Sequence[int]) -> int | None:
    """The largest allowed group that lies inside one tile; None: there is none."""
    return max((g for g in allowed if form.tile[1] % g == 0), default=None)


def in_groups(weight: Affine, group: int) -> Affine:
    """The same weight in groups of 1 x `group`, a divisor of the columns of its tile."""
    rows, columns = weight.form.tile

    def repeated(values: Tensor) -> Tensor:
        return values.repeat_interleave(rows, 0).repeat_interleave(columns // group, 1)

    form = AffineFormat(weight.form.bits, (1, group), weight.form.dtype)
    return Affine(weight.codes, repeated(weight.scales), repeated(weight.offsets), form)


@contextmanager
def new_model(model: QuantizedModel, out: Path, needed: int, exported: str) -> Iterator[Path]:
    """A folder to fill that becomes `out`, with the side files and anyrank.json in it.

    Raises:
        RunError: `out` is filled, or the disk has no room or fills up.
    """
    refuse_filled(out)
    require_disk(out, needed, "the export")
    with new_folder(out) as beside:
        copy_companions(model.folder, beside)
        write_json(beside / "anyrank.json", _provenance(model, exported))
        yield beside


def _provenance(model: QuantizedModel, exported: str) -> dict[str, Any]:
    from .. import __version__

    quantization = model.config["quantization_config"]
    kept = {key: quantization.get(key) for key in ("bits", "tile", "storage_dtype", "quantizer")}
    return {"anyrank": __version__, "exported": exported, "variant": model.variant, **kept}


def write_shards(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as they come, a file whenever `SHARD_BYTES` are full.

    Args:
        folder: where.
        stem: 'model' gives model.safetensors, or model-00001-of-00002.safetensors, ... and
            model.safetensors.index.json.
        tensors: names and values; only one shard is in memory at a time.
        metadata: for the header of every file.
    """
    held: dict[str, Tensor] = {}
    shards: list[tuple[Path, list[str]]] = []
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        path = folder / f"{stem}-{len(shards) + 1:05d}.safetensors"
        save_file(held, path, metadata={"format": "pt", **(metadata or {})})
        shards.append((path, list(held)))
        held, size = {}, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(shards[0][0], folder / f"{stem}.safetensors")
        return
    files = {}
    for number, (path, names) in enumerate(shards, 1):
        final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(path, folder / final)
        files |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def code_units(weight: Affine, middle: int) -> tuple[Tensor, Tensor, Tensor]:
    """(code, scale, zero) with W = (code - zero) * scale, for formats that count in codes.

        code = code - middle,    zero = -offset / scale - middle

    Where a scale is 0 the tile is constant and its codes say nothing: there code = 0, scale = 1 and
    zero = -offset, which is exact.

    Args:
        weight: of d_out x d_in.
        middle: what to subtract from every code; 2**(bits - 1) makes signed ones.

    Returns:
        Codes [d_out, d_in] of int16; scales and zeros like the tiles, of float32, rounded once.
    """
    rows, columns = weight.form.tile
    scales, offsets = weight.scales.double(), weight.offsets.double()
    constant = scales == 0
    step = torch.where(constant, 1.0, scales)
    zeros = torch.where(constant, -offsets, -offsets / step - middle)
    codes = unpack(weight.codes, weight.form.bits).short().sub_(middle)
    if constant.any():
        tiles = codes.view(codes.shape[0] // rows, rows, codes.shape[1] // columns, columns)
        tiles.masked_fill_(constant[:, None, :, None], 0)
    return codes, step.float(), zeros.float()


def consumer(module: str, package: str) -> Any:
    """A module of an optional package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingPackageError(
            f"{package} is not installed; pip install 'anyrank[{package}]'"
        ) from error
    return importlib.import_module(module)

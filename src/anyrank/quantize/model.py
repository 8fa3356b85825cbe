"""A float model, or one of GPTQ or AWQ, becomes a folder as `checkpoint` describes it.

Plan from the headers of the files (which layers, which tensor goes where, room on the disk), then
read, quantize and write one tensor at a time. The folder appears when it is complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, RunError
from ..files import new_folder, read_json, refuse_filled, require_disk, write_json, write_text
from ..kernels import Affine, AffineFormat
from ..quant.checkpoint import (
    COMPANIONS,
    CONFIG,
    METHOD,
    OFFSETS,
    copy_companions,
    format_fields,
    write_index,
    write_readme,
)
from ..quant.hf import AffineConfig
from .half_quadratic import half_quadratic
from .minmax import minmax
from .plan import Plan, Request, plan_float, plan_takeover
from .sequential import gptq_layers
from .shards import ShardWriter
from .source import local_folder

REPORT = "quantize.json"
GB = 10**9
CHUNK = 2**18  # weights that are quantized at once: 1 MB, so that temporaries stay in a cache

Progress = Callable[[int, int, str], None]
Quantizer = Callable[[Tensor, AffineFormat], Affine]
STREAMED: dict[str, Quantizer] = {"minmax": minmax, "half_quadratic": half_quadratic}


def quantize_model(
    model: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    tile: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    quantizer: str | None = None,
    keep: Sequence[str] = (),
    calibration: Sequence[Tensor] | None = None,
    max_shard_size: int = GB,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Quantize the linear layers of a model into a new folder.

    A GPTQ or AWQ checkpoint is taken over with its codes: bits and groups are then its own (`tile`
    may ask for smaller groups), and without `dtype` offsets are exact.

    Args:
        model: a folder, or a name on the Hub.
        out: the folder to make.
        bits: bits per code, 2..8; default 4.
        tile: (rows, columns) that share scale and offset; default (1, 32).
        dtype: the storage precision of scales and offsets; default float16.
        quantizer: half_quadratic (default), minmax, or gptq, which loads the whole model.
        keep: names or last parts of names of linear layers that stay as they are; the output
            embedding always does.
        calibration: token ids of every calibration row [tokens], for gptq.
        max_shard_size: bytes of a file of weights, at most.
        revision: of a model on the Hub.
        trust_remote_code: run code that comes with the model.
        progress: called with (tensors done, tensors in all, name) after each.

    Returns:
        The folder; quantize.json in it says what every layer lost.

    Raises:
        ConfigError: an option makes no sense, or not for this model.
        LayerError: the model has no layer that can be quantized.
        GeometryError: a layer does not fit the tile.
        RunError: the model cannot be read, `out` exists, or the disk is full.
    """
    started, out = time.monotonic(), Path(out)
    calibrated = calibration is not None
    request = Request(bits, tile, dtype, quantizer, tuple(keep), calibrated, trust_remote_code)
    request.check()
    refuse_filled(out)
    folder = local_folder(model, revision)
    config = read_json(folder / CONFIG)
    plan = _plan(folder, config, request)
    files = plan.files(max_shard_size, OFFSETS)
    needed = sum(spec.nbytes for tensors in files.values() for spec in tensors.values())
    require_disk(out, needed, "the quantized model")
    report = Report(str(model), plan)
    with new_folder(out) as beside:
        with ShardWriter(beside, files) as writer:
            _write_layers(plan, _results(plan, calibration or ()), writer, report, progress)
            _write_others(plan, writer, progress)
        write_index(beside, writer.where, needed)
        _write_companions(beside, folder, plan, config, trust_remote_code)
        write_json(beside / REPORT, report.fields(time.monotonic() - started))
    return out


def _plan(folder: Path, config: dict[str, Any], request: Request) -> Plan:
    fields = config.get("quantization_config")
    if not fields:
        return plan_float(folder, request)
    method = fields.get("quant_method")
    if method in ("gptq", "awq"):
        return plan_takeover(folder, fields, request)
    by = "anyrank" if method == METHOD else method
    raise ConfigError(f"{folder}: is quantized already, by {by}; quantize its float original")


@dataclass
class Report:
    """What was lost, layer by layer; errors are ||W - W^|| / ||W||.

    Attributes:
        model: what was quantized.
        plan: how.
        squares: (sum of squared errors, sum of squared weights) of every layer.
    """

    model: str
    plan: Plan
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def fields(self, seconds: float) -> dict[str, Any]:
        """As quantize.json holds it."""
        from .. import __version__

        plan = self.plan
        lost, whole = (sum(part) for part in zip(*self.squares.values(), strict=True))
        return {
            "anyrank": __version__,
            "model": self.model,
            "quantizer": plan.quantizer,
            "taken_over": plan.foreign is not None,
            **format_fields(plan.form),
            "bits_per_weight": plan.form.bits_per_weight,
            "weights_quantized": sum(d_out * d_in for d_out, d_in in plan.layers.values()),
            "weights_kept": sum(plan.source.specs[name].numel for name in plan.others),
            "relative_error": _ratio(lost, whole),
            "seconds": round(seconds, 2),
            "layers": {name: _ratio(*squares) for name, squares in self.squares.items()},
        }


def _ratio(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0


Result = tuple[str, Affine, Tensor]


def _results(plan: Plan, calibration: Sequence[Tensor]) -> Iterator[Result]:
    """(layer, quantized weight, exact weight), one layer after the other."""
    if plan.foreign is not None:
        yield from _taken_over(plan)
    elif plan.quantizer == "gptq":
        linears = {name: plan.model.get_submodule(name) for name in plan.layers}
        yield from gptq_layers(plan.model, linears, plan.form, calibration)
    else:
        for name in plan.layers:
            weight = plan.source.read(f"{name}.weight")
            yield name, in_chunks(STREAMED[plan.quantizer], weight, plan.form), weight


def _taken_over(plan: Plan) -> Iterator[Result]:
    assert plan.foreign is not None
    form = plan.form
    for name, (d_out, _) in plan.layers.items():
        exact = plan.foreign.read(plan.source, name, d_out, form.tile[1])
        scales, offsets = exact.scales.to(form.dtype), exact.offsets.to(form.dtype)
        yield name, Affine(exact.codes, scales, offsets, form), exact.weight()


def in_chunks(quantizer: Quantizer, weight: Tensor, form: AffineFormat) -> Affine:
    """Quantize a weight some rows of tiles at a time, which changes no bit."""
    parts = [quantizer(rows, form) for rows in weight.split(_rows(weight, form))]
    codes, scales, offsets = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("codes", "scales", "offsets")
    )
    return Affine(codes, scales, offsets, form)


def _rows(weight: Tensor, form: AffineFormat) -> int:
    """Rows per chunk: whole tiles."""
    tall = form.tile[0]
    return max(CHUNK // (weight.shape[1] * tall), 1) * tall


def _squares(weight: Tensor, affine: Affine) -> tuple[float, float]:
    """Sums of the squares of W - W^ and of W."""
    rows, tall = _rows(weight, affine.form), affine.form.tile[0]
    lost = whole = 0.0
    for chunk, codes, scales, offsets in zip(
        weight.split(rows),
        affine.codes.split(rows),
        affine.scales.split(rows // tall),
        affine.offsets.split(rows // tall),
        strict=True,
    ):
        chunk = chunk.float()
        error = chunk - Affine(codes, scales, offsets, affine.form).weight()
        lost += float(error.square_().sum(dtype=torch.float64))
        whole += float(chunk.square().sum(dtype=torch.float64))
    return lost, whole


def _check_values(name: str, affine: Affine, weight: Tensor) -> None:
    """Raise unless the weight, and what is stored of it, are finite."""
    keep = f"keep the layer as it is with --keep {name.rsplit('.', 1)[-1]}"
    if torch.isfinite(affine.scales).all() and torch.isfinite(affine.offsets).all():
        return
    if not torch.isfinite(weight).all():
        raise RunError(
            f"{name}: its weight holds NaN or infinite values; use an intact checkpoint, or {keep}"
        )
    dtype = str(affine.form.dtype).removeprefix("torch.")
    raise ConfigError(
        f"{name}: its scales or offsets exceed what {dtype} holds; store them as bfloat16 or "
        f"float32, or {keep}"
    )


def _write_layers(
    plan: Plan,
    results: Iterator[Result],
    writer: ShardWriter,
    report: Report,
    progress: Progress | None,
) -> None:
    for done, (name, affine, weight) in enumerate(results, 1):
        _check_values(name, affine, weight)
        report.squares[name] = _squares(weight, affine)
        for part in ("codes", "scales", "offsets"):
            writer.write(f"{name}.{part}", getattr(affine, part))
        if progress is not None:
            progress(done, len(plan.layers) + len(plan.others), name)


def _write_others(plan: Plan, writer: ShardWriter, progress: Progress | None) -> None:
    for done, name in enumerate(plan.others, len(plan.layers) + 1):
        writer.write(name, plan.source.read(name))
        if progress is not None:
            progress(done, len(plan.layers) + len(plan.others), name)


def _write_companions(
    beside: Path, folder: Path, plan: Plan, config: dict[str, Any], with_code: bool
) -> None:
    """config.json, and what else makes the folder a model."""
    affine_config: Any = AffineConfig
    fields = affine_config(
        **format_fields(plan.form),
        modules_to_not_convert=plan.keep,
        quantizer=plan.quantizer,
    ).to_dict()
    # not through write_json, which knows no infinity: some configurations hold one
    text = json.dumps({**config, "quantization_config": fields}, indent=2)
    write_text(beside / CONFIG, text + "\n")
    write_readme(beside, plan.form)
    copy_companions(folder, beside, (*COMPANIONS, "*.py") if with_code else COMPANIONS)

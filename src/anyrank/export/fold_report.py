"""What fold.json says: what was read back against what was trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import fold_offsets
from ..quant.checkpoint import QuantizedModel
from .table import Table


def same_codes(base: QuantizedModel, folded: QuantizedModel) -> bool:
    """Whether every code and scale that was written is the base's, read back bit for bit."""
    parts = [f"{layer}.{part}" for layer in base.layers for part in ("codes", "scales")]
    return all(torch.equal(base.tensor(name), folded.tensor(name)) for name in parts)


def report(base: QuantizedModel, table: Table, beside: Path) -> dict[str, Any]:
    """Per layer and in total: how the weight that was written differs from the one trained.

    With codes and scales equal, weights differ exactly by their offsets, so those are compared.
    `rounding` is the RMS of what the storage precision takes from the update before it is trained
    with, as a share of the RMS of the update.
    """
    written = QuantizedModel.open(beside, table.variant)
    layers = {}
    totals = Sums()
    for layer, sums in _differences(base, table, written):
        layers[layer] = sums.as_dict()
        totals = totals + sums
    return {"adapter": table.adapter.folder.name, "rank": table.rank, **totals.as_dict()} | {
        "layers": layers
    }


@dataclass(frozen=True)
class Sums:
    """Sums of squares over the offsets of one layer or more."""

    identical: bool = True
    largest: float = 0.0
    difference: float = 0.0
    rounding: float = 0.0
    update: float = 0.0
    count: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.identical and other.identical,
            math.nan
            if math.isnan(self.largest + other.largest)
            else max(self.largest, other.largest),
            self.difference + other.difference,
            self.rounding + other.rounding,
            self.update + other.update,
            self.count + other.count,
        )

    def as_dict(self) -> dict[str, float | bool]:
        """The figures of fold.json."""
        return {
            "offsets_identical": self.identical,
            "largest_difference": self.largest,
            "rms_difference": math.sqrt(self.difference / max(self.count, 1)),
            "rms_update": math.sqrt(self.update / max(self.count, 1)),
            "rounding": math.sqrt(self.rounding / self.update) if self.update else 0.0,
        }


def _differences(
    base: QuantizedModel, table: Table, written: QuantizedModel
) -> Iterator[tuple[str, Sums]]:
    def square(tensor: Tensor) -> float:
        return tensor.pow(2).sum().item()

    for layer, update in table.adapter.updates(table.rank):
        before = base.tensor(f"{layer}.offsets")
        stored = written.tensor(f"{layer}.offsets")
        folded = fold_offsets(before, update, base.form.tile)
        got, trained = stored.double(), folded.double()
        core = tuple(part.double() for part in update.core)
        exact = update._replace(core=core).on_tiles(*base.form.tile)
        sums = Sums(
            identical=torch.equal(stored, folded),
            largest=float((got - trained).abs().max()),
            difference=square(got - trained),
            rounding=square(got - before.double() - exact),
            update=square(exact),
            count=got.numel(),
        )
        yield layer, sums

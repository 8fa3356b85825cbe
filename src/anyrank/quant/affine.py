"""Block-quantized weights: W = scale * code + offset on groups of 1 x g, or on tiles.

An update that is constant on every tile moves into the offsets; codes and scales keep their bits.
With tiles of rows x columns and an update that is constant on tiles of q x p, that is the case when
rows divides q and columns divides p: then every tile lies inside one tile of the update.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..algebra import Update
from ..errors import GeometryError
from ..kernels import Affine, AffineFormat, Branch, adapted_linear, fold_offsets, tile_name
from .base import FrozenWeight


class AffineLinear(nn.Linear):
    """A frozen linear layer of d_in inputs whose weight is affine codes.

    Codes, scales and offsets are buffers: casting the model (`model.to(torch.bfloat16)`) changes
    the precision it computes in, never the precision in which the weight is stored.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        form: AffineFormat,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # a Linear for those who ask, without its float weight
        self.in_features, self.out_features, self.form = d_in, d_out, form
        shape = form.tiles(d_out, d_in)
        codes = torch.zeros(d_out, d_in * form.bits // 8, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        for name in ("scales", "offsets"):
            self.register_buffer(name, torch.zeros(shape, dtype=form.dtype, device=device))
        self.register_parameter("weight", None)
        self.bias = None  # type: ignore[assignment]
        if bias:
            values = torch.zeros(d_out, device=device, dtype=dtype)
            self.bias = nn.Parameter(values, requires_grad=False)

    @property
    def affine(self) -> Affine:
        """The weight, sharing memory with the layer."""
        return Affine(self.codes, self.scales, self.offsets, self.form)

    @property
    def qweight(self) -> Tensor:
        """The codes, by the name under which PEFT looks for the device of a quantized layer."""
        return self.codes

    def forward(self, input: Tensor, updates: Sequence[Update] = ()) -> Tensor:
        """[..., d_in] to [..., d_out], with the updates inside of the offsets."""
        branches = [Branch(update, inside=True) for update in updates]
        return adapted_linear(input, self.affine, self.bias, branches)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AffineLinear:
        stored = {name: getattr(self, name) for name in ("scales", "offsets")}
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """Shape and format."""
        rows, columns = self.form.tile
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.form.bits}, tile={rows}x{columns}"
        )


class AffineWeight(FrozenWeight):
    """W of an AffineLinear."""

    layer: AffineLinear

    def __init__(self, layer: AffineLinear) -> None:
        super().__init__(layer)
        self.d_in, self.d_out = layer.in_features, layer.out_features

    def read(self) -> Tensor:
        """W in float32."""
        return self.layer.affine.weight()

    @staticmethod
    def forward() -> Callable[..., Tensor]:
        """That of AffineLinear."""
        return AffineLinear.forward

    def dense(self, dtype: torch.dtype, inside: Sequence[Update] = ()) -> Tensor:
        """W in `dtype`, with the updates folded into its offsets."""
        return self.layer.affine.dense(dtype, inside)

    def fold_obstacle(self, p: int, q: int) -> str | None:
        """Some tile of the weight would not lie inside one tile of the update."""
        return tile_obstacle(self.layer.form.tile, p, q, self.d_in, self.d_out)

    def absorbs(self, p: int, q: int) -> bool:
        """Whenever the update can be folded."""
        return self.fold_obstacle(p, q) is None

    def fold(self, update: Update) -> Tensor:
        """Replace the offsets; codes and scales are not touched."""
        before = self.layer.offsets
        self.layer.offsets = fold_offsets(before, update, self.layer.form.tile)
        return before

    def unfold(self, update: Update, kept: Tensor | None) -> None:
        """Bring the offsets before the fold back."""
        assert kept is not None
        self.layer.offsets = kept.to(self.layer.codes.device)


def tile_obstacle(tile: tuple[int, int], p: int, q: int, d_in: int, d_out: int) -> str | None:
    """Why an update that is constant on q x p does not fold into tiles; None: it does.

    Args:
        tile: (rows, columns) that share an offset.
        p: inputs per mean.
        q: outputs per value.
        d_in: inputs of the layer.
        d_out: outputs of the layer.
    """
    rows, columns = tile
    wrong = []
    if p % columns:
        wrong.append(
            f"pool={p} is no multiple of {columns}: use pool={_multiple(p, columns, d_in)}"
        )
    if q % rows:
        wrong.append(f"repeat={q} is no multiple of {rows}: use repeat={_multiple(q, rows, d_out)}")
    if not wrong:
        return None
    return f"its {tile_name(tile)} cannot take the adapter ({'; '.join(wrong)})"


def _multiple(part: int, unit: int, whole: int) -> int:
    """The multiple of `unit` that divides `whole` and is nearest to `part`."""
    fitting = [n for n in range(unit, whole + 1, unit) if whole % n == 0]
    return min(fitting, key=lambda n: abs(n - part), default=unit)


def check_format(form: AffineFormat, d_in: int, d_out: int, layer: str) -> None:
    """Raise unless a weight of d_out x d_in can be stored so.

    Raises:
        GeometryError: the tile does not divide the weight, or a row does not fill whole bytes.
    """
    rows, columns = form.tile
    sides = (("columns", columns, "d_in", d_in), ("rows", rows, "d_out", d_out))
    for name, part, side, whole in sides:
        if whole % part:
            raise GeometryError(
                f"{layer}: groups of {part} {name} must divide {side}={whole}; choose another "
                "--group_size or --tile, or keep the layer in its precision with --keep "
                f"{layer.rsplit('.', 1)[-1]}"
            )
    if d_in % 8:
        raise GeometryError(
            f"{layer}: d_in={d_in} must be a multiple of 8, so that codes fill whole bytes; keep "
            f"the layer in its precision with --keep {layer.rsplit('.', 1)[-1]}"
        )


def fingerprint(weights: Iterable[tuple[str, Affine]]) -> str | None:
    """What tells one quantized base from another: a digest of checksums of every weight.

    Sums of the bits as integers, so that device and order do not matter; None for no weights.

    Args:
        weights: layers by name, as the model names them.
    """
    sums = {
        name: [
            part.view(torch.uint8).sum(dtype=torch.int64).item()
            for part in (affine.codes, affine.scales, affine.offsets)
        ]
        for name, affine in weights
    }
    text = json.dumps(sums, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest() if sums else None

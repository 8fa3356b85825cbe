"""The update that an adapter makes to its frozen weight, written on blocks.

    delta W = s R C P,    delta W[i, j] = s C[i // q, j // p] / p

It is constant on tiles of q x p: everything about it is known from one number per tile.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """s R C P.

    Attributes:
        core: (A [k, d_in/p], B [d_out/q, k]) or (S [d_out/q, d_in/p],).
        p: inputs per mean.
        q: outputs per value.
        scale: s.
    """

    core: tuple[Tensor, ...]
    p: int
    q: int
    scale: float

    def blocks(self) -> Tensor:
        """One number per tile of q x p: s C / p of [d_out/q, d_in/p]."""
        matrix = self.core[0] if len(self.core) == 1 else self.core[1] @ self.core[0]
        return matrix / self.p * self.scale

    def on_tiles(self, rows: int, columns: int) -> Tensor:
        """One number per smaller tile of rows x columns; rows divides q and columns divides p."""
        blocks = self.blocks()
        if self.q != rows:
            blocks = blocks.repeat_interleave(self.q // rows, dim=0)
        if self.p != columns:
            blocks = blocks.repeat_interleave(self.p // columns, dim=1)
        return blocks

    def weight(self) -> Tensor:
        """The update as a matrix [d_out, d_in]."""
        return self.on_tiles(1, 1)

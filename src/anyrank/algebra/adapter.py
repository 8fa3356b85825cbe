"""One adapter on one layer: its geometry, its output, its weight, its form as a plain LoRA.

    y = W x + s_k * R C_k P x
    A' = A P,  B' = R B          every low-rank adapter is an ordinary LoRA of the same rank

`adapter_output` is the naive reference: P and R act on activations, as the equation is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import GeometryError, RankError
from .core import dense_core, low_rank_core
from .pool import pool, pool_columns
from .repeat import repeat, repeat_rows

LOW_RANK = "low_rank"
DENSE = "dense"


@dataclass(frozen=True)
class Geometry:
    """The shape of an adapter on a layer of d_out x d_in.

    Attributes:
        d_in: inputs of the layer.
        d_out: outputs of the layer.
        p: neighbouring inputs that share a mean; divides d_in.
        q: neighbouring outputs that share a value; divides d_out.
        core: `LOW_RANK` or `DENSE`.
        rows: rows of A and columns of B; 0 for a dense core.
    """

    d_in: int
    d_out: int
    p: int = 1
    q: int = 1
    core: str = LOW_RANK
    rows: int = 0

    @property
    def core_shape(self) -> tuple[int, int]:
        """(d_out/q, d_in/p)."""
        return self.d_out // self.q, self.d_in // self.p

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The trained tensors: (A, B) of a low-rank core, (S,) of a dense one."""
        d_out, d_in = self.core_shape
        return ((d_out, d_in),) if self.core == DENSE else ((self.rows, d_in), (d_out, self.rows))

    def parameters(self, k: int | None = None) -> int:
        """How many numbers the adapter holds, or holds when cut to rank k."""
        if self.core == DENSE:
            return self.core_shape[0] * self.core_shape[1]
        return (self.rows if k is None else k) * sum(self.core_shape)

    def check(self, layer: str) -> None:
        """Raise unless p and q divide the layer and the rank fits into the core.

        Args:
            layer: the name of the layer, for the message.

        Raises:
            GeometryError: p does not divide d_in, or q does not divide d_out.
            RankError: the rank exceeds the smaller side of the core.
        """
        for name, part, whole_name, whole in (
            ("pool", self.p, "d_in", self.d_in),
            ("repeat", self.q, "d_out", self.d_out),
        ):
            if part < 1 or whole % part:
                raise GeometryError(
                    f"{layer}: {name}={part} must divide {whole_name}={whole}; "
                    f"nearest divisors: {_nearest_divisors(part, whole)}"
                )
        limit = min(self.core_shape)
        if self.core == LOW_RANK and not 1 <= self.rows <= limit:
            raise RankError(
                f"{layer}: rank {self.rows} must lie in 1..{limit}, the smaller side of its core "
                f"of {self.core_shape[0]} x {self.core_shape[1]}; lower r or exclude the layer"
            )


def _nearest_divisors(part: int, whole: int) -> str:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    below = [d for d in divisors if d < part][-1:]
    above = [d for d in divisors if d > part][:1]
    return ", ".join(str(d) for d in below + above)


def adapter_output(x: Tensor, core: Sequence[Tensor], p: int, q: int, scale: float) -> Tensor:
    """s R C P x, the naive reference of every fast path.

    Args:
        x: [..., d_in].
        core: (A [k, d_in/p], B [d_out/q, k]) or (S [d_out/q, d_in/p],).
        p: inputs per mean.
        q: outputs per value.
        scale: s_k.

    Returns:
        [..., d_out].
    """
    u = pool(x, p)
    v = dense_core(u, *core) if len(core) == 1 else low_rank_core(u, *core)
    return repeat(v, q) * scale


def lora_factors(a: Tensor, b: Tensor, p: int, q: int) -> tuple[Tensor, Tensor]:
    """The ordinary LoRA that equals a low-rank adapter, the scale left out.

    Args:
        a: [k, d_in/p].
        b: [d_out/q, k].
        p: inputs per mean.
        q: outputs per value.

    Returns:
        A' = A P of [k, d_in] and B' = R B of [d_out, k].
    """
    return pool_columns(a, p), repeat_rows(b, q)

"""GPTQ and AWQ checkpoints, taken over with their own codes and scales.

    W = scale * (code - zero),    so    offset = -scale * zero

GPTQ (AutoGPTQ, GPTQModel), groups of g inputs, no act-order:
    qweight [d_in * b / 32, d_out] int32   every column a stream of b-bit codes, little end first
    qzeros  [d_in / g, d_out * b / 32]     every row such a stream; stored is zero - 1, in
                                           b bits, but with checkpoint_format gptq_v2 zero
    scales  [d_in / g, d_out]
    g_idx   [d_in] int32                   the group of every input: i // g unless act-order

AWQ (GEMM version), b = 4:
    qweight [d_in, d_out / 8] int32        nibble n of word w is output 8 w + (0,2,4,6,1,3,5,7)[n]
    qzeros  [d_in / g, d_out / 8]          in the same order; stored is zero
    scales  [d_in / g, d_out]

A column of GPTQ's qweight holds the very bytes of a row of our codes. The offset needs the bits of
the scale and those of the zero: float32 always holds it, float16 where the zero is 0 or a power of
two, as in symmetric checkpoints. A GPTQ zero of 0 is stored as 2^b - 1; readers that add 1 without
wrapping see 2^b, which no writer means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, RunError
from ..kernels import Affine, AffineFormat, pack, unpack
from .source import Source

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}


@dataclass(frozen=True)
class Foreign:
    """How a GPTQ or AWQ checkpoint stores its layers.

    Attributes:
        kind: gptq or awq.
        bits: bits per code.
        group: inputs per group; -1: a whole row.
        zero_shift: what to add to a stored zero.
        desc_act: whether the checkpoint says that its groups are shuffled.
    """

    kind: str
    bits: int
    group: int
    zero_shift: int = 0
    desc_act: bool = False

    @classmethod
    def from_config(cls, fields: Mapping[str, Any], model: str) -> Foreign:
        """Read `quantization_config` of config.json.

        Raises:
            ConfigError: bits or layout are none of those above.
        """
        kind = fields["quant_method"]
        bits = fields.get("bits", fields.get("w_bit"))
        if bits not in _BITS[kind]:
            raise ConfigError(
                f"{model}: {kind} codes of {bits} bits; those of "
                f"{' or '.join(map(str, _BITS[kind]))} bits can be taken over"
            )
        default = "gptq" if kind == "gptq" else "gemm"
        stated = fields.get("checkpoint_format") or fields.get("version") or default
        layout = str(stated).lower()
        if layout not in _LAYOUTS[kind]:
            raise ConfigError(
                f"{model}: {kind} weights in the layout {layout}; "
                f"{' or '.join(_LAYOUTS[kind])} can be taken over"
            )
        group = fields.get("group_size", fields.get("q_group_size", 128))
        desc_act = bool(fields.get("desc_act", False))
        return cls(kind, bits, group, int(layout == "gptq"), desc_act)

    def read(self, source: Source, layer: str, d_out: int, columns: int) -> Affine:
        """One layer in groups of `columns`, which divide its own, with exact float32 offsets."""
        codes = self._codes(source.read(f"{layer}.qweight"))
        scales = source.read(f"{layer}.scales").T.float()
        zeros = self._zeros(source.read(f"{layer}.qzeros"), d_out).T.float()
        repeats = codes.shape[1] * 8 // self.bits // scales.shape[1] // columns
        scales, offsets = (t.repeat_interleave(repeats, 1) for t in (scales, -scales * zeros))
        form = AffineFormat(self.bits, (1, columns), torch.float32)
        return Affine(codes, scales.contiguous(), offsets.contiguous(), form)

    def offsets_fit(self, source: Source, layer: str, d_out: int) -> bool:
        """Whether the precision of the scales holds every offset exactly."""
        scales = source.read(f"{layer}.scales")
        exact = scales.double() * self._zeros(source.read(f"{layer}.qzeros"), d_out).double()
        return torch.equal(exact.to(scales.dtype).double(), exact)

    def check(self, source: Source, layer: str, d_out: int, d_in: int) -> None:
        """Raise unless the tensors of the layer have the shapes above, in the order of inputs.

        Raises:
            RunError: a tensor is missing or of another shape.
            ConfigError: the groups are shuffled.
        """
        for name, shape in self._shapes(d_out, d_in).items():
            found = source.specs.get(f"{layer}.{name}")
            if found is None or found.shape != shape:
                got = "is missing" if found is None else f"is {list(found.shape)}"
                raise RunError(
                    f"{layer}.{name} {got}; {self.kind} with {self.bits} bits and "
                    f"group_size={self.group} has {list(shape)}"
                )
        name = f"{layer}.g_idx"
        if name in source.specs:
            group = d_in if self.group == -1 else self.group
            shuffled = not torch.equal(source.read(name).long(), torch.arange(d_in) // group)
        else:
            shuffled = self.desc_act
        if shuffled:
            raise ConfigError(
                f"{layer}: its groups are shuffled by act-order (desc_act), which no tile can "
                "hold; take a checkpoint without act-order, or quantize the float model"
            )

    def _shapes(self, d_out: int, d_in: int) -> dict[str, tuple[int, int]]:
        groups = 1 if self.group == -1 else d_in // self.group

        def words(n: int) -> int:
            return -(-n * self.bits // 32)

        rows = (words(d_in), d_out) if self.kind == "gptq" else (d_in, words(d_out))
        return {"qweight": rows, "qzeros": (groups, words(d_out)), "scales": (groups, d_out)}

    def _zeros(self, words: Tensor, d_out: int) -> Tensor:
        """[groups, d_out] of uint8."""
        stored = _fields(words, self.bits, d_out)
        if self.kind == "awq":
            return _outputs(stored)
        return (stored + self.zero_shift) & (2**self.bits - 1)

    def _codes(self, words: Tensor) -> Tensor:
        """[d_out, d_in * bits / 8] as `pack` makes them."""
        if self.kind == "awq":
            return pack(_outputs(_fields(words, 4, 8 * words.shape[1])).T.contiguous(), 4)
        return _octets(words.T, self.bits, 32 * words.shape[0] // self.bits)


def _octets(words: Tensor, bits: int, count: int) -> Tensor:
    """The bytes of the first `count` fields of every row of int32 words."""
    return words.contiguous().view(torch.uint8)[:, : count * bits // 8].contiguous()


def _fields(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` fields of `bits` bits of every row of int32 words."""
    return unpack(_octets(words, bits, count), bits)


def _outputs(nibbles: Tensor) -> Tensor:
    """Nibbles in the order of AWQ's words to the order of the outputs."""
    places = torch.tensor(AWQ_ORDER).argsort()
    return nibbles.unflatten(-1, (-1, 8))[..., places].flatten(-2)

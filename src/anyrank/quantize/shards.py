"""safetensors files written tensor by tensor, in any order, with one tensor in memory.

8 bytes      length of the header, little end first
header       JSON: {name: {"dtype": "F16", "shape": [..], "data_offsets": [start, end]}, ..}
data         the tensors without a gap, the widest type first, so that every one is aligned

(https://huggingface.co/docs/safetensors). All sizes are known before the first byte is written, so
each tensor goes straight to its place; the `safetensors` package would want a whole file at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RunError
from ..kernels import AffineFormat

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Spec(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize


Specs = dict[str, Spec]


def split(groups: Iterable[Specs], limit: int) -> list[Specs]:
    """Pack groups of tensors that stay together into files of at most `limit` bytes of data.

    A group that alone is larger has a file of its own.
    """
    files: list[Specs] = []
    room = -1
    for group in groups:
        size = sum(spec.nbytes for spec in group.values())
        if size > room:
            files.append({})
            room = limit
        files[-1].update(group)
        room -= size
    return files


def shard_names(files: list[Specs]) -> dict[str, Specs]:
    """model-00001-of-0000n.safetensors, ..., as Transformers names shards."""
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": f for i, f in enumerate(files, 1)}


def layout(tensors: Specs) -> tuple[bytes, dict[str, int]]:
    """The head of a file (length and header), and where in the file every tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, spec in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        starts[name], end = end, end + spec.nbytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


class ShardWriter:
    """The files of one model; a context that is left well has written every tensor once.

    Args:
        folder: where the files are made.
        files: by file name, the tensors in it.
    """

    def __init__(self, folder: Path, files: Mapping[str, Specs]) -> None:
        self.folder, self.files = folder, files
        self.where = {name: file for file, tensors in files.items() for name in tensors}
        self._starts: dict[str, int] = {}
        self._missing = set(self.where)

    def __enter__(self) -> ShardWriter:
        for file, tensors in self.files.items():
            head, starts = layout(tensors)
            self._starts |= starts
            self._put(file, 0, head, "xb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | object) -> None:
        if kind is None and self._missing:
            raise RunError(f"{self.folder}: {min(self._missing)} was planned, but never written")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place.

        Raises:
            ValueError: the tensor is not what was planned.
        """
        spec = self.files[self.where[name]][name]
        if (tensor.dtype, tuple(tensor.shape)) != spec:
            raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, planned {spec}")
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._put(self.where[name], self._starts[name], data, "r+b")
        self._missing.discard(name)

    def _put(self, file: str, start: int, data: Any, mode: str) -> None:
        with open(self.folder / file, mode) as stream:
            stream.seek(start)
            stream.write(data)


def affine_specs(layer: str, d_out: int, d_in: int, form: AffineFormat) -> tuple[Specs, Specs]:
    """What one quantized layer stores: (codes and scales), (offsets)."""
    grid = Spec(form.dtype, form.tiles(d_out, d_in))
    codes = Spec(torch.uint8, (d_out, d_in * form.bits // 8))
    return {f"{layer}.codes": codes, f"{layer}.scales": grid}, {f"{layer}.offsets": grid}

"""Writes a GGUF file one piece of a tensor at a time, so that the file is never in memory.

A GGUF file is: a header, the metadata, a table of the tensors (name, shape, type, place), then
their bytes, each tensor at a multiple of 32. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingPackageError
from ...files import new_file, new_folder, require_disk

MODEL, SUFFIX = "model.gguf", ".gguf"


@dataclass(frozen=True)
class Planned:
    """A tensor to be written.

    Attributes:
        name: its name in llama.cpp.
        type: a name in GGMLQuantizationType.
        shape: of its numbers, or [rows, bytes of a row] of a quantized type.
        pieces: makes its bytes when they are due, in order.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def dtype(self) -> np.dtype:
        """Of its pieces."""
        return np.dtype({"F32": np.float32, "F16": np.float16}.get(self.type, np.uint8))

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def new_writer(architecture: str) -> Any:
    """A GGUFWriter without a file.

    Raises:
        MissingPackageError: the `gguf` package is missing.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise MissingPackageError(
            "GGUF files need the gguf package; pip install 'anyrank[gguf]'"
        ) from error
    return GGUFWriter(None, architecture)


def write_gguf(out: Path, writer: Any, tensors: list[Planned]) -> Path:
    """Write metadata and tensors; the file appears when it is complete.

    Args:
        out: a new file that ends in .gguf, or a new folder that will hold model.gguf.
        writer: a GGUFWriter with all metadata.
        tensors: what to write.

    Returns:
        The file.

    Raises:
        RunError: `out` exists, or the disk is full.
    """
    require_disk(out, sum(t.size for t in tensors) + _metadata_size(writer), "the export")
    with destination(out) as path:
        _write(path, writer, tensors)
    return out if out.suffix == SUFFIX else out / MODEL


@contextmanager
def destination(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` when the block ends well."""
    if out.suffix == SUFFIX:
        with new_file(out) as path:
            yield path
    else:
        with new_folder(out) as folder:
            yield folder / MODEL


def _write(path: Path, writer: Any, tensors: list[Planned]) -> None:
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.size, kind)
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, tensors)


def _write_tensors(writer: Any, tensors: list[Planned]) -> None:
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for tensor in tensors:
        for piece in tensor.pieces():
            # not tofile, whose error does not say that the disk is full
            file.write(np.ascontiguousarray(piece, tensor.dtype).data)
        writer.write_padding(file, tensor.size)


def _metadata_size(writer: Any) -> int:
    """About as many bytes as the metadata takes."""
    values = (value.value for data in writer.kv_data for value in data.values())
    return sum(sum(len(str(v)) + 16 for v in x) if isinstance(x, list) else 64 for x in values)

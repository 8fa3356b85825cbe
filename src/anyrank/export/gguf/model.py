"""A quantized model as one GGUF file: its own codes, scales and offsets, never quantized again.

    quantized layers        Q4_1 (2, 3 and 4 bits) or Q5_1 (5 bits), see blocks.py
    embeddings and output   F16, or Q8_0
    other linear layers     F16
    norms and biases        F32

The tensors, dequantized by any reader that computes in float32, equal `Affine.weight()` bit for
bit, with the rows of q and k in the order of architecture.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, RunError, nearest
from ...files import refuse_file, refuse_filled
from ...quant.checkpoint import QuantizedModel
from .architecture import Architecture, read_config
from .blocks import BLOCK, BlockType, block_type, by_rows, require_fp16, to_blocks
from .metadata import ROPE_FREQS, add_metadata, check_config, rope_factors
from .tokenizer import read_vocabulary
from .write import SUFFIX, Planned, new_writer, write_gguf

EMBEDDINGS = ("F16", "Q8_0")
Q8_0_BYTES = 34  # of a block of 32: an fp16 scale and a byte per number
_LARGEST_HALF = 65504.0
_CHUNK = 2**22  # numbers of a float tensor that are in memory at once
_BUFFERS = ("rotary_emb.inv_freq",)  # in old checkpoints; computed by every reader


def export_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    embeddings: str = "F16",
    tokenizer_pre: str | None = None,
) -> Path:
    """Write a quantized or folded model for llama.cpp.

    Args:
        folder: the model, with its tokenizer.
        out: a new file that ends in .gguf, or a new folder that will hold model.gguf.
        variant: the table of offsets; None: the one that loads by default.
        embeddings: how embeddings and output are written: F16 or Q8_0.
        tokenizer_pre: the pre-tokenizer, by its name in llama.cpp; None: recognise it.

    Returns:
        The file.

    Raises:
        RunError: the model cannot be read, `out` exists, or the disk is full.
        ConfigError: GGUF or llama.cpp has no place for something in the model.
        MissingPackageError: the `gguf` package is missing.
    """
    folder, out = Path(folder), Path(out)
    if embeddings not in EMBEDDINGS:
        raise ConfigError(
            f"embeddings={embeddings!r} is unknown; {nearest(embeddings, EMBEDDINGS)}"
        )
    refuse_file(out) if out.suffix == SUFFIX else refuse_filled(out)
    new_writer("")  # missing packages are told first
    source = QuantizedModel.open(folder, variant)
    kind = block_type(source.form, folder)
    arch, config = read_config(folder)
    check_config(arch, config, folder)
    _require_tensors(source, arch, config)
    tensors = _plan(source, arch, config, kind, embeddings)
    rows = next(t.shape[0] for t in tensors if t.name == "token_embd.weight")
    vocabulary = read_vocabulary(folder, rows, config, tokenizer_pre)

    writer = new_writer(arch.name)
    _add_general(writer, folder.resolve().name, variant, kind)
    add_metadata(writer, config, rows)
    vocabulary.add_to(writer)
    return write_gguf(out, writer, tensors)


def _add_general(writer: Any, name: str, variant: str | None, kind: BlockType) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_name(name if variant is None else f"{name} {variant}")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _require_tensors(source: QuantizedModel, arch: Architecture, config: Any) -> None:
    """Raise unless every tensor that llama.cpp reads is there.

    Raises:
        RunError: naming the first that is missing.
    """
    there = {f"{layer}.weight" for layer in source.layers} | set(source.others)
    required = arch.required(config.num_hidden_layers)
    if not config.tie_word_embeddings:
        required.append("lm_head.weight")
    missing = next((name for name in required if name not in there), None)
    if missing is not None:
        raise RunError(f"{source.folder}: {missing} is missing; quantize or fold the model again")


def _plan(
    source: QuantizedModel, arch: Architecture, config: Any, kind: BlockType, embeddings: str
) -> list[Planned]:
    """Every tensor of the file, checked.

    Raises:
        ConfigError: a tensor has no place in the file, or does not fit its type.
    """
    planned = []
    for name in source.others:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if not tied and not name.endswith(_BUFFERS):
            planned.append(_plan_float(source, arch, config, name, embeddings))
    for layer in source.layers:
        planned.append(_plan_blocks(source, arch, config, layer, kind))
    factors = rope_factors(config)
    if factors is not None:
        planned.append(Planned(ROPE_FREQS, "F32", factors.shape, lambda: [factors]))
    return planned


def _plan_blocks(
    source: QuantizedModel, arch: Architecture, config: Any, layer: str, kind: BlockType
) -> Planned:
    weight = source.affine(layer)
    require_fp16(weight, layer)
    blocks = weight.scales.shape[1] * weight.form.tile[1] // BLOCK
    order = arch.row_order(layer, config)
    name = _gguf_name(source, arch, f"{layer}.weight")
    shape = (weight.codes.shape[0], blocks * kind.bytes)
    return Planned(name, kind.name, shape, partial(_blocks, source, layer, order, kind))


def _blocks(
    source: QuantizedModel, layer: str, order: Tensor | None, kind: BlockType
) -> Iterator[np.ndarray]:
    weight = by_rows(source.affine(layer))
    if order is not None:
        weight = weight._replace(
            codes=weight.codes[order], scales=weight.scales[order], offsets=weight.offsets[order]
        )
    yield to_blocks(weight, kind)


def _plan_float(
    source: QuantizedModel, arch: Architecture, config: Any, name: str, embeddings: str
) -> Planned:
    gguf_name = _gguf_name(source, arch, name)
    tensor = source.tensor(name)
    outside = gguf_name in ("token_embd.weight", "output.weight")
    kind = "F32" if tensor.dim() == 1 else embeddings if outside else "F16"
    _require_range(tensor, kind, name, outside)
    shape = tuple(tensor.shape)
    if kind == "Q8_0":
        shape = (shape[0], shape[1] // BLOCK * Q8_0_BYTES)
    order = arch.row_order(name, config)
    return Planned(gguf_name, kind, shape, partial(_floats, source, name, order, kind))


def _require_range(tensor: Tensor, kind: str, name: str, outside: bool) -> None:
    """Raise when a number is too large for fp16.

    Raises:
        ConfigError: with the largest.
    """
    largest = max(abs(edge.item()) for edge in tensor.aminmax())
    if kind == "F16" and not largest <= _LARGEST_HALF:
        way = 'embeddings="Q8_0"' if outside else "a model that is quantized without --keep"
        raise ConfigError(
            f"{name}: F16 holds numbers up to 65504, it reaches {largest:.6g}; export with {way}"
        )


def _floats(
    source: QuantizedModel, name: str, order: Tensor | None, kind: str
) -> Iterator[np.ndarray]:
    """The numbers of a float tensor, some rows at a time."""
    tensor = source.tensor(name)
    if order is not None:
        tensor = tensor[order]
    rows = max(1, _CHUNK * len(tensor) // tensor.numel())
    for part in tensor.split(rows):
        if kind == "F16":
            yield part.to(torch.float16).numpy()
        elif kind == "F32":
            yield part.float().numpy()
        else:
            yield _q8_0(part.float().numpy())


def _q8_0(values: np.ndarray) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(values, GGMLQuantizationType.Q8_0)


def _gguf_name(source: QuantizedModel, arch: Architecture, name: str) -> str:
    found = arch.gguf_name(name)
    if found is None:
        raise ConfigError(
            f"{source.folder}: llama.cpp reads no {name} in {arch.name} models; try "
            "--to mlx or --to hqq"
        )
    return found

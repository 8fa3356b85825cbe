"""Fold an adapter into the offsets of its base: a quantized model with no adapter left.

    offset' = round(offset + s C / p)           codes and scales keep their bits

Plan every layer of every table, write beside, read back, rename. The codes are written once; every
rank and every task is one table of offsets beside them, chosen by `from_pretrained(variant=...)`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..algebra import Update
from ..errors import MergeError, RunError
from ..files import new_folder, require_disk, write_json
from ..kernels import fold_offsets
from ..quant.affine import tile_obstacle
from ..quant.checkpoint import (
    COMPANIONS,
    CONFIG,
    OFFSETS,
    QuantizedModel,
    copy_companions,
    with_variant,
    write_index,
    write_readme,
)
from .fold_report import report, same_codes
from .table import Table

REPORT = "fold.json"
Check = Callable[[Path, Sequence[Table]], dict[str | None, float | None]]


def fold(
    base: QuantizedModel, tables: Sequence[Table], out: Path, check: Check | None = None
) -> dict[str, Any]:
    """Write the folded model.

    Args:
        base: the quantized model that the adapters were trained on.
        tables: what to write; the last one is what loads without `variant`.
        out: the new folder.
        check: called with the finished files before they get their name; returns a divergence of
            the logits per variant, in nats per token.

    Returns:
        What fold.json holds.

    Raises:
        MergeError: a layer cannot take the update; nothing is written then.
        RunError: `out` exists, the disk is full, or what was read back is not what was written.
    """
    base.check_layers()
    for table in tables:
        _check_table(base, table)
    moved = _moved(base, tables)
    require_disk(out, _size(base, tables, moved), "the folded model")
    with new_folder(out) as beside:
        _copy_others(base, tables[-1].adapter.folder, beside)
        kept = _write_codes(base, beside, moved)
        for table in tables:
            _write_table(base, table, beside, moved, kept, default=table is tables[-1])
        identical = same_codes(base, QuantizedModel.open(beside))
        found = {str(table.variant or "default"): report(base, table, beside) for table in tables}
        divergence = check(beside, tables) if check else {}
        for table in tables:
            found[str(table.variant or "default")]["kl"] = divergence.get(table.variant)
        result = {"base": str(base.folder), "codes_identical": identical, "tables": found}
        if not identical or not all(entry["offsets_identical"] for entry in found.values()):
            raise RunError(f"{out}: what was read back differs from what was folded; try again")
        write_readme(beside, base.form, [t.variant for t in tables if t.variant is not None])
        write_json(beside / REPORT, result)
    return result


def _check_table(base: QuantizedModel, table: Table) -> None:
    """Raise unless every update of a table is finite and folds into its layer."""
    layers = set(base.layers)
    for layer, update in table.adapter.updates(table.rank):
        if layer not in layers:
            raise MergeError(
                f"{layer}: is not quantized in {base.folder}, so {table.name} cannot fold into it; "
                "train with --lora_exclude_modules, or fold into the base it was trained on"
            )
        d_out, d_in = _shape(update)
        tiles = base.form.tiles(d_out, d_in)
        shape = tuple(base.tensor(f"{layer}.offsets").shape)
        if tiles != shape:
            raise MergeError(
                f"{layer}: {table.name} fits a weight with {tiles[0]} x {tiles[1]} offsets, but "
                f"{base.folder} holds {shape[0]} x {shape[1]}; fold into the base it was trained on"
            )
        if obstacle := tile_obstacle(base.form.tile, update.p, update.q, d_in, d_out):
            raise MergeError(
                f"{layer}: {obstacle}; train again with a geometry that fits (--foldable checks it "
                "before the training), or keep the adapter beside its base (anyrank export)"
            )
        if not all(bool(torch.isfinite(part).all()) for part in update.core):
            raise MergeError(f"{layer}: {table.name} holds NaN or infinity; its run diverged")
        offsets = fold_offsets(base.tensor(f"{layer}.offsets"), update, base.form.tile)
        if not torch.isfinite(offsets).all():
            stored = str(base.form.dtype).removeprefix("torch.")
            raise MergeError(
                f"{layer}: {table.name} exceeds what {stored} holds; quantize the base with "
                "--storage_dtype float32 and train on it"
            )
    _check_full_tensors(base, table)


def _check_full_tensors(base: QuantizedModel, table: Table) -> None:
    """Raise unless every module that was trained in full has a place of its own in the base."""
    tied = base.config.get("tie_word_embeddings", False)
    words = base.config.get("vocab_size")
    for name, tensor in table.adapter.full_tensors.items():
        if tied and tensor.shape[0] == words:
            raise MergeError(
                f"{name}: was trained in full, but input and output embeddings are tied in "
                f"{base.folder}; the fold would change both; train without it in "
                "--lora_modules_to_save"
            )
        if name not in base.files:
            raise MergeError(
                f"{name}: was trained in full, but {base.folder} holds no such tensor; train "
                "without it in --lora_modules_to_save"
            )


def _shape(update: Update) -> tuple[int, int]:
    """(d_out, d_in)."""
    rows, columns = update.core[-1].shape[0], update.core[0].shape[1]
    return rows * update.q, columns * update.p


def _moved(base: QuantizedModel, tables: Sequence[Table]) -> list[str]:
    """The tensors that differ between tables, and so lie in each of them."""
    full = {name for table in tables for name in table.adapter.full_tensors}
    return [name for name in base.files if name in full or name.endswith(".offsets")]


def _size(base: QuantizedModel, tables: Sequence[Table], moved: Sequence[str]) -> int:
    """Bytes of the files to write."""
    shards = {base.folder / file for file in base.files.values()}
    table = sum(base.tensor(name).nbytes for name in moved)
    codes = sum(path.stat().st_size for path in shards) - table
    others = [path for path in base.folder.iterdir() if path.is_file() and path not in shards]
    return codes + len(tables) * table + sum(path.stat().st_size for path in others)


def _copy_others(base: QuantizedModel, run: Path, beside: Path) -> None:
    """The configuration, the tokenizer that the run trained with, and what else the base has."""
    shutil.copyfile(base.folder / CONFIG, beside / CONFIG)
    copy_companions(run, beside)
    copy_companions(base.folder, beside, (*COMPANIONS, "*.py"))


def _write_codes(base: QuantizedModel, beside: Path, moved: Sequence[str]) -> dict[str, str]:
    """Copy the shards without what the tables hold; return the file of every tensor in them."""
    inside: dict[str, list[str]] = {}
    for name, file in base.files.items():
        inside.setdefault(file, []).append(name)
    kept: dict[str, str] = {}
    for file, names in inside.items():
        staying = [name for name in names if name not in set(moved)]
        if not staying:
            continue
        target = f"model-{len(set(kept.values())) + 1:05d}.safetensors"
        if staying == names:
            shutil.copyfile(base.folder / file, beside / target)
        else:
            save_file({n: base.tensor(n) for n in staying}, beside / target, {"format": "pt"})
        kept |= dict.fromkeys(staying, target)
    return kept


def _write_table(
    base: QuantizedModel,
    table: Table,
    beside: Path,
    moved: Sequence[str],
    kept: dict[str, str],
    *,
    default: bool,
) -> None:
    """Write the tensors of a table, and the index that joins them with the codes."""
    tensors = {name: base.tensor(name) for name in moved} | table.adapter.full_tensors
    for layer, update in table.adapter.updates(table.rank):
        name = f"{layer}.offsets"
        tensors[name] = fold_offsets(tensors[name], update, base.form.tile)
    file = with_variant(OFFSETS, table.variant)
    save_file({n: t.contiguous() for n, t in tensors.items()}, beside / file, {"format": "pt"})
    files = kept | dict.fromkeys(tensors, file)
    size = sum(path.stat().st_size for path in {beside / file for file in files.values()})
    write_index(beside, files, size, table.variant)
    if default and table.variant is not None:
        write_index(beside, files, size)

"""How far a folded model is from the one that was trained: KL of their logits on real rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..export.table import Table
from ..quant.checkpoint import QuantizedModel
from .evaluate import Rows, batches, evaluation

ROWS, TOKENS = 8, 128  # of a forward pass: every pass unpacks every weight once


def divergence(
    model: Any, folder: Path, tables: Sequence[Table], rows: Sequence[Rows]
) -> dict[str | None, float | None]:
    """Mean over all tokens of KL(trained || folded), in nats, for every table.

    One model serves both sides: its adapter at the rank of the table, and then its base with the
    tensors of the table in place of its own.

    Args:
        model: a PEFT model with every adapter of the tables, named by `adapter_name`.
        folder: the folded model.
        tables: the tables in it.
        rows: token ids and labels, one list per table; the first `TOKENS` of each row count.
    """
    found: dict[str | None, float | None] = {}
    with evaluation(model):
        for table, part in zip(tables, rows, strict=True):
            model.set_adapter(adapter_name(table, tables))
            if table.rank is not None:
                model.set_rank(table.rank)
            written = _table_tensors(QuantizedModel.open(folder, table.variant), table, model)
            nats, tokens = 0.0, 0
            cut = [{key: ids[:TOKENS] for key, ids in row.items()} for row in part]
            for batch in batches(cut, ROWS, model.device):
                kept = batch.pop("attention_mask").bool()
                trained = model(input_ids=batch["input_ids"], use_cache=False).logits[kept]
                with model.disable_adapter(), _swapped(model, written):
                    folded = model(input_ids=batch["input_ids"], use_cache=False).logits[kept]
                nats += _kl(trained, folded)
                tokens += len(trained)
            found[table.variant] = nats / tokens if tokens else None
    return found


def adapter_name(table: Table, tables: Sequence[Table]) -> str:
    """The name of a table's adapter in the model; PEFT calls the first one default."""
    folders = list(dict.fromkeys(other.adapter.folder for other in tables))
    place = folders.index(table.adapter.folder)
    return f"adapter{place}" if place else "default"


def _kl(trained: Tensor, folded: Tensor) -> float:
    """Sum over tokens of KL, from logits [tokens, vocabulary], some tokens at a time."""
    nats = 0.0
    for parts in zip(trained.split(64), folded.split(64), strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in parts)
        nats += (p.exp() * (p - q)).sum().item()
    return nats


def _table_tensors(written: QuantizedModel, table: Table, model: Any) -> dict[str, Tensor]:
    """The tensors of a table under the names they have in the model that holds the adapter."""
    adapted = {layer for layer, _ in table.adapter.updates(table.rank)}
    names = {f"{layer}.offsets": f"{layer}.base_layer.offsets" for layer in adapted}
    for name in table.adapter.full_tensors:
        module, _, part = name.rpartition(".")
        names[name] = f"{module}.original_module.{part}"
    return {theirs: written.tensor(ours).to(model.device) for ours, theirs in names.items()}


@contextmanager
def _swapped(model: Any, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The base with other tensors, for the length of a block."""
    base, before = model.get_base_model(), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        held = getattr(base.get_submodule(module), part)
        before[name] = held.data
        held.data = tensor.to(held.dtype)
    try:
        yield
    finally:
        for name, tensor in before.items():
            module, _, part = name.rpartition(".")
            getattr(base.get_submodule(module), part).data = tensor

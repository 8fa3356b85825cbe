"""`anyrank export`: one rank or several, checked before the first file is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import ConfigError, nearest
from ..files import refuse_filled
from .lora import SavedAdapter, export_lora, vllm_rank

FORMATS = ("lora",)


def export_ranks(
    folder: Path, out: Path, ranks: Sequence[int], form: str, *, several: bool
) -> Iterator[str]:
    """Write the ranks and yield what to tell the user, a line each.

    Args:
        folder: a run, or a folder with an anyrank adapter.
        out: the new folder; with `several`, the parent of one folder per rank.
        ranks: the ranks to write.
        form: one of `FORMATS`.
        several: whether `out` holds one folder per rank.

    Raises:
        AnyRankError: a rank, the format or a folder is not as needed; nothing is written then.
    """
    if form not in FORMATS:
        raise ConfigError(f"--to {form} is unknown; {nearest(form, FORMATS)}")
    adapter = SavedAdapter.read(folder)
    targets = {rank: out / f"rank{rank}" if several else out for rank in ranks}
    for rank, target in targets.items():
        adapter.check_rank(rank)
        refuse_filled(target)
    if not adapter.config.nested and any(rank != adapter.config.rows for rank in ranks):
        yield (
            f"warning: {adapter.config.method} was trained at rank {adapter.config.rows} alone; "
            "a smaller prefix of it was never trained to stand by itself (see --nested true)"
        )
    for rank, target in targets.items():
        export_lora(adapter, target, rank)
        yield f"rank {rank}: {target}"
    base = adapter.config.base_model_name_or_path or "BASE"
    names = " ".join(f"r{rank}={target}" for rank, target in targets.items())
    yield (
        f"Serve: vllm serve {base} --enable-lora --max-lora-rank {vllm_rank(max(ranks))} "
        f"--lora-modules {names}"
    )

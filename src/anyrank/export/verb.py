"""`anyrank export`: one rank or several, checked before the first file is written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, nearest
from ..files import refuse_filled, require_disk
from .lora import VLLM_RANKS, SavedAdapter, export_lora, lora_size, vllm_rank

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
            "a smaller prefix of it never learned to stand by itself (see --nested true)"
        )
    require_disk(out, sum(lora_size(adapter, rank) for rank in ranks), "the export")
    for rank, target in targets.items():
        export_lora(adapter, target, rank)
        yield f"rank {rank}: {target}"
    yield _serve(adapter, targets)


def _serve(adapter: SavedAdapter, targets: Mapping[int, Path]) -> str:
    """The line that serves the exports with vLLM, or why it cannot."""
    needed = vllm_rank(max(targets))
    if needed is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}; use PEFT for this one"
    if adapter.config.modules_to_save:
        modules = ", ".join(adapter.config.modules_to_save)
        return f"vLLM serves no adapter with fully trained modules ({modules}); use PEFT"
    words = ["vllm", "serve", adapter.config.base_model_name_or_path or "BASE", "--enable-lora"]
    words += ["--max-lora-rank", str(needed), "--lora-modules"]
    return f"Serve: {shlex.join([*words, *(f'r{rank}={path}' for rank, path in targets.items())])}"

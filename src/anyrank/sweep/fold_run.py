"""`anyrank fold`: runs of one quantized base, folded into it and compared with what was trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from peft import PeftModel
from transformers import AutoTokenizer

from ..errors import AnyRankError, ConfigError, RunError
from ..export.adapter import SavedAdapter
from ..export.fold import fold
from ..export.table import Table, plan_tables
from ..files import read_json, refuse_filled
from ..quant.affine import fingerprint
from ..quant.checkpoint import QuantizedModel
from ..training.arguments import ModelArguments
from ..training.base import load_base
from ..training.run import Run
from .divergence import adapter_name, divergence
from .evaluate import Rows
from .sweep_run import SweepOptions, token_rows, training_rows

logger = logging.getLogger("anyrank")


def fold_run(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    ranks: Sequence[int] | None = None,
    base: str | Path | None = None,
    dataset: str | None = None,
    limit: int = 8,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Fold a run, or several of one base, and compare the result with what was trained.

    Args:
        folders: runs or adapter folders.
        out: the folder to make; `from_pretrained` loads it, with `variant` for one of several.
        ranks: the ranks to write; None: the one that a sweep chose, or the only one trained.
        base: the quantized base, if it lies elsewhere than when it was trained on.
        dataset: rows to compare on; None: validation or training rows of the run.
        limit: how many rows; 0: no comparison.
        trust_remote_code: run code that the model brings along.

    Returns:
        What fold.json holds.

    Raises:
        AnyRankError: a run, a rank, the base or `out` is not as needed; nothing is written then.
    """
    out = Path(out)
    refuse_filled(out)
    disable_progress_bars()
    paths = [folders] if isinstance(folders, str | Path) else folders
    adapters = [SavedAdapter.read(folder) for folder in paths]
    model = QuantizedModel.open(base_folder(adapters, base))
    _check_base(model, adapters)
    tables = plan_tables([(a, ranks or chosen_ranks(a)) for a in adapters])
    for table in tables:
        config = table.adapter.config
        if table.rank not in (None, config.rows) and not config.nested:
            logger.warning(
                "%s: was trained at rank %d alone; a smaller prefix of it never learned to stand "
                "by itself",
                table.adapter.folder,
                config.rows,
            )
    of_folder = {a.folder: _rows(a.folder, dataset, limit) for a in adapters}
    rows = [of_folder[table.adapter.folder] for table in tables]

    def check(folder: Path, tables: Sequence[Table]) -> dict[str | None, float | None]:
        if not any(rows):
            return {}
        tuned = _with_adapters(model.folder, tables, trust_remote_code)
        return divergence(tuned, folder, tables, rows)

    return fold(model, tables, out, check)


def _with_adapters(base: Path, tables: Sequence[Table], trust_remote_code: bool) -> Any:
    """The base with every adapter, each under the name that `adapter_name` gives it."""
    arguments = ModelArguments(model_name_or_path=str(base))
    model: Any = load_base(arguments, in_4bit=False, trust_remote_code=trust_remote_code)
    for name, folder in {adapter_name(t, tables): str(t.adapter.folder) for t in tables}.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    return model


def base_folder(adapters: Sequence[SavedAdapter], asked: str | Path | None) -> Path:
    """The folder of the base that all adapters share.

    Raises:
        ConfigError: they were trained on different bases.
        RunError: it is not there.
    """
    names = {adapter.config.base_model_name_or_path for adapter in adapters}
    if asked is None and len(names) > 1:
        raise ConfigError(
            f"the adapters were trained on different bases ({', '.join(sorted(names))}); fold each "
            "by itself, or name the one base with --base if it was moved"
        )
    folder = Path(asked or names.pop() or "")
    if not folder.is_dir():
        raise RunError(f"{folder}: the base is not there; name its folder with --base")
    return folder


def _check_base(base: QuantizedModel, adapters: Sequence[SavedAdapter]) -> None:
    """Raise unless the base is the one that every adapter was trained on."""
    for adapter in adapters:
        names = [layer for layer, _ in adapter.updates(adapter.config.rows or None)]
        known = set(base.layers)
        found = fingerprint((name, base.affine(name)) for name in names if name in known)
        wanted = adapter.config.base_fingerprint
        if wanted is None:
            logger.warning("%s: does not say which base it was trained on", adapter.folder)
        elif found not in (None, wanted):
            raise RunError(
                f"{base.folder}: is not the base that {adapter.folder} was trained on (codes, "
                "scales or offsets differ); name that one with --base, or train on this one"
            )


def chosen_ranks(adapter: SavedAdapter) -> Sequence[int]:
    """The rank that `anyrank sweep` chose, or the only one that was trained; none for no ranks.

    Raises:
        ConfigError: every rank was trained and none was chosen.
    """
    if not adapter.config.low_rank:
        return []
    if not adapter.config.nested:
        return [adapter.config.rows]
    sweep = adapter.folder / "sweep.json"
    rank = read_json(sweep).get("chosen_rank") if sweep.is_file() else None
    if rank is None:
        raise ConfigError(
            f"{adapter.folder}: holds ranks 1..{adapter.config.rows}; name one with --rank 8 or "
            f"several with --ranks 4,8 (anyrank sweep {adapter.folder} compares them)"
        )
    return [rank]


def _rows(folder: Path, dataset: str | None, limit: int) -> Rows:
    """Rows to compare on; none where the run does not know any that are still there."""
    if not limit:
        return []
    try:
        run = Run.open(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if dataset or run.config.get("eval_dataset") or run.config.get("eval_size"):
            return token_rows(run, SweepOptions(dataset=dataset, limit=limit), tokenizer)[1]
        return training_rows(run, limit, tokenizer)
    except (AnyRankError, OSError) as error:
        if dataset:
            raise
        logger.warning("not compared on real rows: %s", error)
        return []

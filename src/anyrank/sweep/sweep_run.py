"""`anyrank sweep`: a finished run, evaluated at every rank on validation rows or tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from peft import PeftModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import AutoTokenizer

from ..errors import ConfigError
from ..export.adapter import SavedAdapter
from ..export.lora import lora_size
from ..training.arguments import DataArguments, ModelArguments
from ..training.base import load_base
from ..training.data import DataSource, load_rows, split_rows
from ..training.run import Run
from ..training.tokens import tokenize_rows
from .choose import choose_rank, choose_within_error, differences
from .evaluate import Rows, Score, completion_tokens, evaluate_ranks, exact_match
from .report import write_report
from .tasks import Measured, task_scores


@dataclass(frozen=True)
class SweepOptions:
    """What to evaluate; None follows the run."""

    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "test"
    prompt_column: str | None = None
    completion_column: str | None = None
    ranks: list[int] | None = None
    limit: int | None = None
    batch_size: int = 8
    tolerance: float | None = None
    exact_match: bool = False
    answer_pattern: str | None = None
    max_new_tokens: int = 128
    tasks: Sequence[str] | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    out: Path | None = None
    trust_remote_code: bool = False


def sweep_run(folder: str | Path, options: SweepOptions) -> dict[str, Any]:
    """Evaluate every rank of a run; write sweep.json and sweep.png; return what sweep.json holds.

    Raises:
        AnyRankError: the run, the data or a rank is not as needed.
    """
    run = Run.open(folder)
    disable_progress_bars()
    adapter = SavedAdapter.read(run.folder)
    ranks = ranks_to_sweep(adapter, options.ranks)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    parts = [task_scores(options, tokenizer, ranks)] if options.tasks else []
    if not options.tasks or options.dataset is not None:
        parts.insert(0, _losses(run, options, tokenizer, ranks))
    model = load_model(run, options)
    base: dict[str, Any] = {}
    scores: dict[int, dict[str, Any]] = {rank: {} for rank in ranks or [0]}
    about: dict[str, Any] = {}
    for part in parts:
        of_base, of_ranks, of_all = part(model)
        base, about = base | of_base, about | of_all
        scores = {rank: row | of_ranks[rank] for rank, row in scores.items()}
    found = {
        "base": base,
        "ranks": [
            {"rank": rank or None, **row, **_size(adapter, rank)} for rank, row in scores.items()
        ],
        **about,
        "method": run.config["method"],
        "nested": adapter.config.nested,
    }
    write_report(options.out or run.folder, found)
    return found


def _losses(
    run: Run, options: SweepOptions, tokenizer: Any, ranks: Sequence[int]
) -> Callable[[Any], Measured]:
    """Load the validation rows, for a measurement of the loss at every rank."""
    source, rows = token_rows(run, options, tokenizer)
    answers = None
    if options.exact_match:
        answers = exact_match(
            tokenizer,
            rows,
            max_new_tokens=options.max_new_tokens,
            pattern=options.answer_pattern,
            batch_size=options.batch_size,
        )

    def of(model: Any) -> Measured:
        bar = stderr_progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with bar:
            task = bar.add_task("sweep", total=max(len(ranks), 1) + 1)

            def progress(what: str) -> None:
                bar.update(task, description=what, advance=0 if what == "base" else 1)

            size = options.batch_size
            base, scores = evaluate_ranks(
                model, rows, ranks, batch_size=size, answers=answers, progress=progress
            )
            bar.update(task, advance=1, description="done")
        tokens = completion_tokens(rows)
        figures, chosen = _beside_best(scores, tokens, options.tolerance)
        about = {
            "chosen_rank": chosen or None,
            "tolerance": options.tolerance,
            "dataset": source,
            "rows": len(rows),
            "tokens": sum(tokens),
        }
        return base.as_dict(), figures, about

    return of


def _beside_best(
    scores: Mapping[int, Score], tokens: Sequence[int], tolerance: float | None
) -> tuple[dict[int, dict[str, Any]], int | None]:
    """The figures of every rank, with how far it is above the best; and the rank to choose."""
    above = differences({rank: score.nats for rank, score in scores.items()}, tokens)
    if tolerance is None:
        chosen = choose_within_error(above)
    else:
        chosen = choose_rank({rank: score.loss for rank, score in scores.items()}, tolerance)
    figures = {
        rank: score.as_dict() | {"above_best": above[rank].mean, "above_best_se": above[rank].se}
        for rank, score in scores.items()
    }
    return figures, chosen


def token_rows(run: Run, options: SweepOptions, tokenizer: Any) -> tuple[str, Rows]:
    """The name of the validation data, and its rows as token ids and labels."""
    source, rows = validation_rows(run, options)
    return source, _tokens(run, rows, tokenizer)


def training_rows(run: Run, limit: int, tokenizer: Any) -> Rows:
    """The first rows that the run was trained on, as token ids and labels."""
    source = _chosen(DataArguments, run.config).source(run.config.get("dataset_text_field", "text"))
    return _tokens(run, load_rows(replace(source, limit=limit)), tokenizer)


def _tokens(run: Run, rows: Any, tokenizer: Any) -> Rows:
    tokens, _ = tokenize_rows(
        rows,
        tokenizer,
        max_length=run.config.get("max_length"),
        completion_only=run.config.get("completion_only_loss") is not False,
    )
    return tokens.to_list()


def load_model(run: Run, options: SweepOptions) -> Any:
    """The base in the precision of the run, with the adapter."""
    base = load_base(
        _chosen(ModelArguments, run.config),
        in_4bit=run.config["load_in_4bit"],
        trust_remote_code=options.trust_remote_code,
    )
    return PeftModel.from_pretrained(base, str(run.folder))


def ranks_to_sweep(adapter: SavedAdapter, asked: Sequence[int] | None) -> list[int]:
    """The ranks asked for, those that were trained, or a doubling series up to the largest.

    An adapter that was not nested has one rank; its prefixes were never trained by themselves.

    Raises:
        RankError: a rank that the adapter does not have.
    """
    config = adapter.config
    if asked is not None:
        for rank in asked:
            adapter.check_rank(rank)
        return sorted(set(asked))
    if not config.low_rank:
        return []
    if not config.nested:
        return [config.rows]
    if config.ranks is not None:
        return sorted(set(config.ranks))
    doublings = range(int(math.log2(config.rows / config.rank_unit)) + 1)
    return sorted({config.rank_unit * 2**i for i in doublings} | {config.rows})


def validation_rows(run: Run, options: SweepOptions) -> tuple[str, Any]:
    """The name and the rows to evaluate on: as asked, or the validation rows of the run.

    Raises:
        ConfigError: neither the call nor the run names any.
    """
    data = _chosen(DataArguments, run.config)
    text = run.config.get("dataset_text_field", "text")
    if options.dataset is not None:
        source = DataSource(
            options.dataset,
            name=options.dataset_config,
            split=options.split,
            prompt_column=options.prompt_column or data.prompt_column,
            completion_column=options.completion_column or data.completion_column,
            text_column=text,
            limit=options.limit,
        )
        return options.dataset, load_rows(source)
    if (held := data.eval_source(text)) is not None:
        rows = load_rows(held)
    elif data.eval_size:
        rows = split_rows(load_rows(data.source(text)), data.eval_size, run.config["seed"])[1]
    else:
        raise ConfigError(f"{run.folder}: the run had no validation rows; name some with --dataset")
    limit = len(rows) if options.limit is None else min(options.limit, len(rows))
    return data.eval_dataset or f"{data.eval_size:g} of {data.dataset}", rows.select(range(limit))


def _chosen(kind: Any, config: dict[str, Any]) -> Any:
    """The options of one kind out of a resolved configuration."""
    return kind(**{f.name: config[f.name] for f in fields(kind) if f.name in config})


def _size(adapter: SavedAdapter, rank: int) -> dict[str, int]:
    """Numbers that were trained, and bytes of the weights file that an export writes."""
    if rank == 0:
        tensors = adapter.tensors.values()
        return {
            "parameters": sum(t.numel() for t in tensors),
            "bytes": (adapter.folder / "adapter_model.safetensors").stat().st_size,
        }
    frozen_a = adapter.config.preset.frozen_a
    trained = sum(
        b[:, :rank].numel() + (0 if frozen_a else a[:rank].numel()) for _, a, b in adapter.layers()
    )
    return {"parameters": trained, "bytes": lora_size(adapter, rank)}


def stderr_progress(*columns: ProgressColumn) -> Progress:
    """These columns and the time so far, beside what goes to stdout."""
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))

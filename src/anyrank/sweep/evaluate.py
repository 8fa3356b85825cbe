"""The loss of one model at many ranks, on the same rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import DataError

IGNORED = -100
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """How well one rank does.

    Attributes:
        loss: nats per completion token.
        perplexity: exp(loss).
        exact_match: share of rows answered exactly, if it was asked for.
        nats: of every row, summed over its completion tokens, in the order of the rows.
    """

    loss: float
    perplexity: float
    exact_match: float | None = None
    nats: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, float]:
        """The figures over all rows that were measured."""
        found = {"loss": self.loss, "perplexity": self.perplexity, "exact_match": self.exact_match}
        return {key: value for key, value in found.items() if value is not None}


Rows = Sequence[dict[str, list[int]]]
Answers = Callable[[Any], float]


def evaluate_ranks(
    model: Any,
    rows: Rows,
    ranks: Sequence[int],
    *,
    batch_size: int = 8,
    answers: Answers | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[Score, dict[int, Score]]:
    """Evaluate the base without adapter, then every rank, on the same rows.

    Args:
        model: a PEFT model with an any-rank adapter.
        rows: token ids `input_ids` and `labels` (-100 where no loss), each [tokens].
        ranks: the ranks; empty for an adapter without ranks, which is evaluated as 0.
        batch_size: rows per forward pass.
        answers: also measure exact match with this function of the model.
        progress: called with what is being evaluated.

    Returns:
        The score of the base, and of each rank.
    """
    return each_rank(model, ranks, lambda: score(model, rows, batch_size, answers), progress)


def each_rank(
    model: Any, ranks: Sequence[int], measure: Callable[[], T], progress: Callable[[str], None]
) -> tuple[T, dict[int, T]]:
    """Measure the base without adapter, then every rank; without ranks the whole adapter, as 0."""
    with evaluation(model):
        progress("base")
        with model.disable_adapter():
            base = measure()
        found = {}
        for rank in ranks:
            progress(f"rank {rank}")
            with model.set_rank(rank):
                found[rank] = measure()
        if not ranks:
            progress("adapter")
            found[0] = measure()
    return base, found


def score(model: Any, rows: Rows, batch_size: int, answers: Answers | None = None) -> Score:
    """The mean loss over all completion tokens of `rows`, at the model's current rank."""
    nats = row_nats(model, rows, batch_size)
    loss = sum(nats) / sum(completion_tokens(rows))
    perplexity = math.exp(min(loss, 700))
    return Score(loss, perplexity, answers(model) if answers else None, tuple(nats))


def row_nats(model: Any, rows: Rows, batch_size: int) -> list[float]:
    """The nats of every row, summed over its completion tokens: [rows], in their order."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    places = torch.tensor(by_length(rows)).split(batch_size)
    for place, batch in zip(places, batches(rows, batch_size, model.device), strict=True):
        labels = batch.pop("labels")[:, 1:]
        kept = labels != IGNORED
        logits = model(**batch, use_cache=False).logits[:, :-1][kept].float()
        each = torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none")
        found.index_add_(0, place[kept.nonzero()[:, 0].cpu()], each.double().cpu())
    return found.tolist()


def completion_tokens(rows: Rows) -> list[int]:
    """How many tokens of every row are predicted and count: [rows]."""
    return [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]


def by_length(rows: Rows) -> list[int]:
    """The places of the rows, shortest first."""
    return sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))


def batches(rows: Rows, size: int, device: Any) -> Iterator[dict[str, Tensor]]:
    """Rows of similar length together, padded on the right."""
    order = by_length(rows)
    for start in range(0, len(order), size):
        chosen = [rows[i] for i in order[start : start + size]]
        longest = max(len(row["input_ids"]) for row in chosen)

        def pad(key: str, filler: int, chosen=chosen, longest=longest) -> Tensor:
            values = [row[key] + [filler] * (longest - len(row[key])) for row in chosen]
            return torch.tensor(values, device=device)

        lengths = torch.tensor([len(row["input_ids"]) for row in chosen], device=device)
        mask = torch.arange(longest, device=device)[None] < lengths[:, None]
        yield {
            "input_ids": pad("input_ids", 0),
            "labels": pad("labels", IGNORED),
            "attention_mask": mask.long(),
        }


def exact_match(
    tokenizer: Any, rows: Rows, *, max_new_tokens: int, pattern: str | None, batch_size: int
) -> Answers:
    """A function that answers every prompt greedily and counts the exact answers.

    Args:
        tokenizer: decodes, and pads on the left.
        rows: as in `evaluate_ranks`; the prompt is what lies before the first label.
        max_new_tokens: longest answer in tokens.
        pattern: compare only the last match of this expression (its first group, if it has one).
        batch_size: prompts per generation.

    Raises:
        DataError: a row has no prompt to answer.
    """

    def answer(text: str) -> str:
        if pattern is None:
            return text.strip()
        found = re.findall(pattern, text)
        last = found[-1] if found else ""
        return (last[0] if isinstance(last, tuple) else last).strip()

    prompts, wanted = [], []
    for row in rows:
        first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        if not first:
            raise DataError("exact_match: a row has no prompt; it needs prompt and completion rows")
        prompts.append(row["input_ids"][:first])
        completion = [label for label in row["labels"] if label != IGNORED]
        wanted.append(answer(tokenizer.decode(completion, skip_special_tokens=True)))

    def measure(model: Any) -> float:
        right = 0
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens)
            right += sum(answer(t) == wanted[i] for t, i in zip(texts, chosen, strict=True))
        return right / len(prompts)

    return measure


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], longest: int) -> list[str]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask.to(model.device),
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=pad,
    )
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


@contextmanager
def evaluation(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

"""Checked rows -> token ids and labels.

With x [T] the tokens of a row, a label is x[t] where the row teaches token t, and -100 where not:

    text                every t
    prompt, completion  t >= p, p the longest common prefix of tokens(prompt) and
                        tokens(prompt + completion): a token that straddles both is taught
    messages            every assistant turn with its end-of-turn token, not its header

EOS follows text and completions; a chat template ends its turns itself. BOS is there when the
tokenizer (or the template) adds it, and once.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy leaves out
_BATCH = 1_000  # rows that are tokenized in one call

Ids = list[int]
Encoded = tuple[Ids, list[bool]]  # tokens [T] of a row, and which of them are taught [T]
Encode = Callable[[dict[str, list[Any]], int], list[Encoded]]  # batch, row number of its first


@dataclass(frozen=True)
class TokenReport:
    """What became of the rows.

    rows = kept + dropped. truncated: kept rows that were cut. dropped: rows without a label left.
    tokens, trained_tokens: of the kept rows as cut, all and those with a label. longest: tokens of
    the longest row before it was cut.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    trained_tokens: int
    longest: int

    def sentence(self, max_length: int | None) -> str:
        """One plain line; a second one if max_length cut or dropped rows."""
        line = (
            f"{_count(self.kept, 'row')}, {_count(self.tokens, 'token')}, of which "
            f"{self.trained_tokens:,} are trained on; the longest row has "
            f"{_count(self.longest, 'token')}."
        )
        lost = []
        if self.truncated:
            lost.append(f"{_count(self.truncated, 'row')} cut at {max_length:,} tokens")
        if self.dropped:
            lost.append(f"{_count(self.dropped, 'row')} dropped, with nothing left to learn from")
        if not lost:
            return line
        way_out = "" if max_length is None else f"; --max_length {self.longest} keeps all of them"
        return f"{line}\n{' and '.join(lost)}{way_out}."


def tokenize_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    completion_only: bool = True,
) -> tuple[datasets.Dataset, TokenReport]:
    """Rows of `load_rows` -> columns input_ids and labels, each list[int] of a row's length.

    max_length: tokens kept of a row, from its start (None: all). A row without a label left would
    teach nothing and is dropped. completion_only=False: every token is a label.

    Raises ConfigError (max_length < 2) or DataError (columns, chat template, no row left).
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(f"--max_length {max_length}: needs 2 tokens or more, to predict one")
    if not len(rows):
        raise DataError("no rows to tokenize; needs at least one")
    encode = _encoder(rows.column_names, tokenizer, completion_only)
    tally = _Tally(max_length)
    tokenized = rows.map(
        lambda batch, indices: tally.cut(encode(batch, indices[0] + 1)),
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_features(),
        load_from_cache_file=False,  # the tally counts while the rows pass
        keep_in_memory=True,  # no file in the user's cache
        new_fingerprint=uuid.uuid4().hex,  # instead of a hash of the tokenizer
    )
    if not len(tokenized):
        raise DataError(tally.nothing_left(len(rows)))
    return tokenized, tally.report(len(rows), len(tokenized))


class _Tally:
    """Cuts encoded rows at max_length, drops those without a label, and counts."""

    def __init__(self, max_length: int | None) -> None:
        self.max_length = max_length
        self.truncated = self.tokens = self.trained = self.longest = self.longest_prompt = 0

    def cut(self, encoded: list[Encoded]) -> dict[str, list[Ids]]:
        kept: dict[str, list[Ids]] = {"input_ids": [], "labels": []}
        for tokens, taught in encoded:
            self.longest = max(self.longest, len(tokens))
            prompt = next(itertools.compress(itertools.count(), taught), len(tokens))
            self.longest_prompt = max(self.longest_prompt, prompt)
            ids = tokens[: self.max_length]
            labels = [x if t else IGNORED for x, t in zip(ids, taught, strict=False)]
            if all(label == IGNORED for label in labels[1:]):  # nothing precedes the first token
                continue
            kept["input_ids"].append(ids)
            kept["labels"].append(labels)
            self.truncated += len(ids) < len(tokens)
            self.tokens += len(ids)
            self.trained += len(labels) - labels.count(IGNORED)
        return kept

    def report(self, rows: int, kept: int) -> TokenReport:
        lost, sums = rows - kept, (self.tokens, self.trained, self.longest)
        return TokenReport(rows, kept, self.truncated, lost, *sums)

    def nothing_left(self, rows: int) -> str:
        text = f"no completion tokens left: all rows ({rows:,}) "
        if self.max_length is None or self.longest_prompt < self.max_length:
            return text + "end where the prompt ends; needs rows with a completion"
        return text + (
            f"were cut at {self.max_length} tokens inside of the prompt; longest prompt "
            f"{self.longest_prompt} tokens; raise --max_length above {self.longest_prompt}"
        )


def _encoder(
    columns: list[str], tokenizer: PreTrainedTokenizerBase, completion_only: bool
) -> Encode:
    if "messages" in columns:
        if not tokenizer.chat_template:
            raise DataError(
                "rows hold messages, but the tokenizer has no chat template; give one with "
                "--chat_template_path, or rows of prompt and completion"
            )
        return _Chat(tokenizer, _training_template(tokenizer), completion_only).encode
    if {"prompt", "completion"} <= set(columns):
        return partial(_encode_pairs, _Plain(tokenizer), completion_only)
    if "text" in columns:
        return partial(_encode_text, _Plain(tokenizer))
    raise DataError(
        f"found columns {', '.join(columns)}; needs prompt + completion, messages or text, as "
        "load_rows gives them"
    )


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's variant of a known template (Qwen3 and others) that renders a prefix as it stands."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # a template that TRL does not know; None: it is fit as it is
        return None


class _Plain:
    """Plain text -> tokens, with the special tokens that the tokenizer adds by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id  # type: ignore[assignment]
        bos = tokenizer.bos_token_id
        self.added_bos = bos if bos is not None and self("a")[0][:1] == [bos] else None

    def __call__(self, *texts: str) -> list[Ids]:
        return self.tokenizer(list(texts), verbose=False)["input_ids"]  # type: ignore[return-value]

    def once(self, ids: Ids) -> Ids:
        """Without the second BOS of a text that brought its own."""
        doubled = self.added_bos is not None and ids[:2] == [self.added_bos] * 2
        return ids[1:] if doubled else ids

    def ended(self, ids: Ids) -> Ids:
        return ids if self.eos is None or ids[-1:] == [self.eos] else [*ids, self.eos]


def _encode_text(plain: _Plain, batch: dict[str, list[Any]], first: int) -> list[Encoded]:
    rows = [plain.ended(plain.once(ids)) for ids in plain(*batch["text"])]
    return [(ids, [True] * len(ids)) for ids in rows]


def _encode_pairs(
    plain: _Plain, completion_only: bool, batch: dict[str, list[Any]], first: int
) -> list[Encoded]:
    pairs = zip(batch["prompt"], batch["completion"], strict=True)
    joint = [plain.once(ids) for ids in plain(*(p + c for p, c in pairs))]
    prompts = [plain.once(ids) for ids in plain(*batch["prompt"])]
    encoded = []
    for prompt, whole in zip(prompts, joint, strict=True):
        start = _common_prefix(prompt, whole) if completion_only else 0
        ids = plain.ended(whole)
        encoded.append((ids, [t >= start for t in range(len(ids))]))
    return encoded


class _Chat:
    """Messages -> tokens by a chat template; taught are the tokens of assistant turns."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None, completion_only: bool
    ) -> None:
        self.tokenizer, self.template, self.completion_only = tokenizer, template, completion_only

    def encode(self, batch: dict[str, list[Any]], first: int) -> list[Encoded]:
        """Renders, tokenizes every text once, and marks the spans of the assistant."""
        spans = [self._spans(m, row) for row, m in enumerate(batch["messages"], first)]
        texts = list(dict.fromkeys(text for whole, s in spans for text in (whole, *sum(s, ()))))
        tokens = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids: dict[str, Ids] = dict(zip(texts, tokens, strict=True))  # type: ignore[arg-type]
        encoded = []
        for whole, turns in spans:
            taught = [not self.completion_only] * len(ids[whole])
            for before, after in turns:
                start = _common_prefix(ids[before], ids[whole])
                end = _common_prefix(ids[after], ids[whole])
                end += end < len(ids[after])  # a token that straddles the end is taught too
                taught[start:end] = [True] * (end - start)
            encoded.append((ids[whole], taught))
        return encoded

    def _spans(self, messages: list[Any], row: int) -> tuple[str, list[tuple[str, str]]]:
        """The whole text, and per assistant turn the text before it and up to its end."""
        whole = self._render(messages, row)
        turns = []
        for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            if messages[i]["content"].rstrip().rpartition("\n")[2].strip() not in whole:
                raise self._refusal("leaves out the text of", i, row)
            if self.completion_only:
                before = self._render(messages[:i], row, add_generation_prompt=True) if i else ""
                after = self._render(messages[: i + 1], row)
                if not whole.startswith(after):
                    raise self._refusal("renders differently, once more messages follow,", i, row)
                if not after.startswith(before):
                    raise self._refusal("has a generation prompt that does not begin", i, row)
                turns.append((before, after))
        return whole, turns

    def _refusal(self, problem: str, i: int, row: int) -> DataError:
        return DataError(
            f"chat template of {self._name()}: it {problem} message {i + 1} of row {row}, so the "
            "assistant's tokens cannot be told; give another --chat_template_path, or rows of "
            "prompt and completion"
        )

    def _render(self, messages: list[Any], row: int, add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise DataError(
                f"chat template of {self._name()}: it refuses row {row} ({error}); correct the "
                "row, or give another --chat_template_path"
            ) from None

    def _name(self) -> str:
        return str(self.tokenizer.name_or_path or "the tokenizer")


def _common_prefix(a: Ids, b: Ids) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _features() -> datasets.Features:
    import datasets

    ids = datasets.List(datasets.Value("int32"))
    return datasets.Features({"input_ids": ids, "labels": ids})

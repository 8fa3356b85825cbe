"""The formats of the field -> rows in one of three layouts, each row checked.

alpaca      {instruction, input (optional), output}    -> {prompt, completion}
pairs       {prompt, completion} or two named columns  -> {prompt, completion}
            the same with two lists of messages        -> {messages}
messages    {messages: [{role, content}]}              -> {messages}
sharegpt    {conversations: [{from, value}]}           -> {messages}
text        {text}                                     -> {text}
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import DataError, nearest

ROLES = {"human": "user", "gpt": "assistant"} | {
    r: r for r in ("system", "user", "assistant", "tool")
}
NEWLINE = (
    "A newline ends the prompt where neither column has whitespace: end yours with it to generate."
)
ALPACA = "### Instruction:\n{instruction}\n\n{context}### Response:\n"
_PROMPT_LIKE = ("question", "query", "problem", "instruction", "input", "prompt")
_COMPLETION_LIKE = ("answer", "response", "output", "solution", "target", "completion")

Row = dict[str, Any]
Convert = Callable[[Row], Row]


@dataclass(frozen=True)
class DataSource:
    """Where rows come from, and which columns matter.

    dataset: a .jsonl, .json, .csv or .parquet file, a folder of such files, or a Hub name.
    name: configuration of a Hub data set.
    split: of a Hub data set or a folder (a file belongs to the split that its name contains; files
        that name none are "train"); a single file is one split, whatever it is called.
    prompt_column, completion_column: read these two; one alone pairs with "completion" / "prompt".
    text_column: column of plain text.
    limit: read the first N rows only.
    """

    dataset: str
    name: str | None = None
    split: str = "train"
    prompt_column: str | None = None
    completion_column: str | None = None
    text_column: str = "text"
    limit: int | None = None

    @property
    def adds_newline(self) -> bool:
        """Whether a newline ends prompts where neither side has whitespace: two words meet there.

        Columns that are called prompt and completion are glued as they stand, as everywhere.
        """
        pair = (self.prompt_column or "prompt", self.completion_column or "completion")
        return pair != ("prompt", "completion")


class BadRow(Exception):
    """What is wrong with one row, and what it needs."""


def converter(columns: list[str], origin: str, source: DataSource) -> Convert:
    """The function that turns a row with these columns into its layout."""
    prompt, completion, text = source.prompt_column, source.completion_column, source.text_column
    if prompt or completion:
        prompt, completion = prompt or "prompt", completion or "completion"
        _need_column(prompt, columns, origin, "--prompt_column", taken=source.completion_column)
        _need_column(completion, columns, origin, "--completion_column", taken=prompt)
        return partial(_pair, prompt=prompt, completion=completion, newline=source.adds_newline)
    if text != "text":
        _need_column(text, columns, origin, "--dataset_text_field")
    elif {"instruction", "output"} <= set(columns):
        return _alpaca
    elif {"prompt", "completion"} <= set(columns):
        return partial(_pair, prompt="prompt", completion="completion", newline=False)
    elif "messages" in columns or "conversations" in columns:
        name = "messages" if "messages" in columns else "conversations"
        return lambda row: {"messages": _answered(_turns(row, name), name)}
    elif "text" not in columns:
        raise DataError(
            f"{origin}: found columns {', '.join(columns)}; needs instruction + output, prompt + "
            "completion, messages, conversations or text; name yours with --prompt_column "
            f"{_guess(columns, _PROMPT_LIKE)} --completion_column "
            f"{_guess(columns, _COMPLETION_LIKE)} (or --dataset_text_field NAME)"
        )
    return lambda row: {"text": _filled(row, text, "row has no text to learn from")}


def _need_column(
    column: str, columns: list[str], origin: str, option: str, taken: str | None = None
) -> None:
    if column not in columns:
        free = [name for name in columns if name != taken]
        raise DataError(
            f"{origin}: found columns {', '.join(columns)}, but none is called {column!r}; set "
            f"{option} to one of them: {nearest(column, free)}"
        )


def _guess(columns: list[str], wanted: tuple[str, ...]) -> str:
    """The column that looks most like one of the wanted names, or a placeholder."""
    likeness = {
        column: max(difflib.SequenceMatcher(None, column.lower(), w).ratio() for w in wanted)
        for column in columns
    }
    best = max(likeness, key=likeness.__getitem__, default="NAME")
    return best if likeness.get(best, 0) > 0.7 else "NAME"


def _pair(row: Row, prompt: str, completion: str, newline: bool) -> Row:
    if isinstance(row.get(prompt), list) and isinstance(row.get(completion), list):
        answer = _answered(_turns(row, completion), completion)
        return {"messages": [*_turns(row, prompt), *answer]}
    before = _string(row, prompt)
    after = _filled(row, completion, "row has no completion to learn from")
    if newline and before and not (before[-1].isspace() or after[0].isspace()):
        before += "\n"
    return {"prompt": before, "completion": after}


def _alpaca(row: Row) -> Row:
    context = "" if row.get("input") is None else _string(row, "input")
    prompt = ALPACA.format(
        instruction=_string(row, "instruction"),
        context=f"### Input:\n{context}\n\n" if context.strip() else "",
    )
    completion = _filled(row, "output", "row has no completion to learn from")
    return {"prompt": prompt, "completion": completion}


def _turns(row: Row, name: str) -> list[Row]:
    """Messages, in the keys of either convention -> [{role, content}]."""
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{name!r} is {shown(turns)}; needs a list of messages")
    messages = []
    for i, turn in enumerate(turns):
        where = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise BadRow(f"{where} is {shown(turn)}; needs an object with role and content")
        if turn.get("tool_calls"):
            raise BadRow(f"{where} has tool_calls, which are not read; needs the call as content")
        sharegpt = turn.get("role") is None and "from" in turn
        role = str(turn.get("from" if sharegpt else "role"))
        if role not in ROLES:
            raise BadRow(f"{where} has the unknown role {role!r}; needs one of {', '.join(ROLES)}")
        content = _string(turn, "value" if sharegpt else "content", f"{where} ")
        if not content.strip() and role != "system":
            raise BadRow(f"{where} ({role}) is empty; needs text")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _answered(messages: list[Row], name: str) -> list[Row]:
    if any(message["role"] == "assistant" for message in messages):
        return messages
    raise BadRow(f"row has no completion to learn from ({name!r} has no assistant turn)")


def _filled(row: Row, key: str, otherwise: str) -> str:
    text = _string(row, key)
    if not text.strip():
        raise BadRow(f"{otherwise} ({key!r} is empty)")
    return text


def _string(row: Row, key: str, where: str = "") -> str:
    if key not in row:
        raise BadRow(f"{where}has no {key!r}, only {', '.join(map(str, row))}; needs it as text")
    if not isinstance(row[key], str):
        raise BadRow(f"{where}{key!r} is {shown(row[key])}; needs text (a string)")
    try:
        row[key].encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}{key!r} is no valid Unicode ({error.reason})") from None
    return row[key]


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"

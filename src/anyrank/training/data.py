"""Data files -> checked rows.

A bad row is never trained on silently: it stops the run, named by file and line.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError, DataError, nearest
from .formats import BadRow, DataSource, Row, converter, shown

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SPLIT_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")
_CHUNK = 10_000  # rows that are held as Python objects at a time


Record = tuple[str, str, Row | BadRow]  # origin (file or Hub name), place in it, content


def load_rows(source: DataSource) -> datasets.Dataset:
    r"""Rows in one layout: {prompt, completion}, {messages: [{role, content}]} or {text}.

    Columns named by an option come first, then alpaca, prompt/completion, messages, sharegpt and
    text; further columns are dropped. Prompt and completion are glued as they stand, as everywhere;
    only between two columns of other names (question, answer) a newline ends the prompt where
    neither side has whitespace, since gluing would merge two words.

    Raises ConfigError (options that make no sense) or DataError (no such data or column, no rows,
    or bad rows: the first is named with its line, the others are counted).
    """
    _check_options(source)
    path = Path(source.dataset).expanduser()
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source.dataset) is not None
    if path.exists() or path.suffix in SUFFIXES or not is_hub_name:
        records = itertools.chain.from_iterable(map(_read, _files(path, source)))
    else:
        records = _read_hub(source)
    return _collect(_checked(itertools.islice(records, source.limit), source), source.dataset)


def split_rows(
    rows: datasets.Dataset, fraction_or_count: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, validation): 0 < x < 1 is the fraction held out, x >= 1 the count of rows.

    The same seed holds out the same rows; both sides keep the order of `rows`. Raises ConfigError
    for any other x, DataError where a side would be empty.
    """
    x = fraction_or_count
    if not (0 < x < 1 or (x >= 1 and x % 1 == 0)):
        raise ConfigError(
            f"validation rows: got {x}; needs a fraction between 0 and 1 (0.1) or a count (100)"
        )
    count = round(x * len(rows)) if x < 1 else int(x)
    if not 0 < count < len(rows):
        raise DataError(
            f"validation rows: {x} holds out {count} of {len(rows)} rows and leaves nothing to "
            f"{'validate' if count == 0 else 'train'} on; give a count from 1 to {len(rows) - 1}"
            if len(rows) > 1
            else f"validation rows: {len(rows)} row(s) cannot be split in two; needs 2 or more rows"
        )
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    train = [i for i in range(len(rows)) if i not in held_out]
    return rows.select(train), rows.select(sorted(held_out))


def _check_options(source: DataSource) -> None:
    if source.limit is not None and source.limit < 1:
        raise ConfigError(
            f"--dataset_limit {source.limit}: needs 1 or more rows; leave it out to read all"
        )
    if source.text_column != "text" and (source.prompt_column or source.completion_column):
        raise ConfigError(
            f"--dataset_text_field {source.text_column}: contradicts --prompt_column and "
            "--completion_column; give the one column or the two"
        )


# --- files -----------------------------------------------------------------------------------


def _files(path: Path, source: DataSource) -> list[Path]:
    """The files of a local data set, in the order of their names."""
    if source.name is not None or "[" in source.split:
        option = (
            f"--dataset_config {source.name}"
            if source.name is not None
            else f"--dataset_split {source.split}"
        )
        raise ConfigError(f"{option}: is for Hub data sets, and {path} is local; leave it out")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path}: extension {path.suffix!r} is not read; needs {', '.join(SUFFIXES)}; "
                "convert it, or rename it to what it holds"
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file; {_neighbours(path)}")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    words = {file: set(re.split(r"[-_.]", file.stem)) for file in files}
    chosen = [file for file in files if source.split in words[file]]
    if not chosen and source.split == "train":
        chosen = [file for file in files if words[file].isdisjoint(_SPLIT_WORDS)]
    if not chosen:
        names = ", ".join(file.name for file in files) or f"no {', '.join(SUFFIXES)} file"
        raise DataError(
            f"{path}: no file of split {source.split!r}; the folder holds {names}; "
            "name a split that a file name contains, or give one file as --dataset"
        )
    return chosen


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either; give an existing path"
    names = [file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES]
    if not names:
        return f"the folder {path.parent} holds no {', '.join(SUFFIXES)} file; give another path"
    return nearest(path.name, names)


def _read(file: Path) -> Iterator[Record]:
    """The rows of one local file."""
    if file.suffix == ".csv":
        return _read_csv(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    with file.open("rb") as stream:
        is_array = (
            file.suffix == ".json" and stream.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
        )
    return _read_array(file) if is_array else _read_lines(file)


def _read_lines(file: Path) -> Iterator[Record]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield str(file), f"{file}:{number}", _parse(line)


def _parse(line: bytes) -> Row | BadRow:
    try:
        return _object(json.loads(line.decode("utf-8-sig").rstrip()))
    except json.JSONDecodeError as error:
        return BadRow(
            f"broken JSON ({error.msg} at column {error.colno}); needs one whole object per line "
            "(or, in a .json file, one array of objects)"
        )
    except (ValueError, RecursionError) as error:
        return BadRow(f"cannot be read ({error}); needs JSON in UTF-8")


def _object(value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(f"found {shown(value)}; needs a JSON object of columns, such as {{...}}")


def _read_array(file: Path) -> Iterator[Record]:
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}); needs one "
            "array of objects; correct the file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: cannot be read ({error}); save it as UTF-8") from None
    for number, value in enumerate(values, 1):
        yield str(file), f"{file} row {number}", _object(value)


def _read_csv(file: Path) -> Iterator[Record]:
    """By the csv module: `datasets` would turn an answer 42 into 42.0, and "NA" into null."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 kB
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, strict=True)
        start = 1
        try:
            header = next(lines, [])
            start = lines.line_num + 1
            for cells in lines:
                place, start = f"{file}:{start}", lines.line_num + 1
                if len(cells) == len(header):
                    yield str(file), place, dict(zip(header, cells, strict=True))
                elif cells:
                    problem = f"number of cells is {len(cells)}; needs {len(header)}, as the header"
                    yield str(file), place, BadRow(problem)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{file}:{start}: broken CSV ({error}); needs quoted cells in UTF-8; correct it"
            ) from None


def _read_parquet(file: Path) -> Iterator[Record]:
    import datasets

    try:  # streamed: nothing is copied into the cache
        path = glob.escape(str(file.resolve()))
        rows: Any = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield str(file), f"{file} row {number}", row
    except (ValueError, OSError) as error:
        raise DataError(
            f"{file}: not read as Parquet ({_first_line(error)}); write it anew"
        ) from None


def _read_hub(source: DataSource) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split)
    except Exception as error:  # network, authentication, configuration, split: many types
        raise DataError(
            f"{source.dataset}: no local file or folder, and split {source.split!r} did not come "
            f"from the Hub ({type(error).__name__}: {_first_line(error)}); check name, split and "
            f"connection, or give the path of a local {', '.join(SUFFIXES)} file"
        ) from error
    for number, row in enumerate(rows, 1):
        yield source.dataset, f"{source.dataset} row {number}", cast(Row, row)


# --- rows ------------------------------------------------------------------------------------


def _checked(records: Iterable[Record], source: DataSource) -> Iterator[Row]:
    """The good rows; after the last, DataError if any was bad."""
    convert, layout, first, bad = None, None, "", 0
    for origin, place, content in records:
        try:
            if isinstance(content, BadRow):
                raise content
            convert = convert or converter(list(content), origin, source)
            row = convert(content)
            layout = layout or row.keys()
            if row.keys() != layout:
                raise BadRow(f"is {' + '.join(row)}; needs {' + '.join(layout)} as the rows before")
            yield row
        except BadRow as problem:
            first, bad = first or f"{place}: {problem}; correct or remove the row", bad + 1
    if bad:
        more = {1: "", 2: " (1 more row is bad)"}.get(bad, f" ({bad - 1} more rows are bad)")
        raise DataError(first + more)


def _collect(rows: Iterator[Row], name: str) -> datasets.Dataset:
    import datasets

    text = datasets.Value("string")
    parts = []
    while chunk := list(itertools.islice(rows, _CHUNK)):
        kinds: dict[str, Any] = dict.fromkeys(chunk[0], text)
        if "messages" in kinds:
            kinds["messages"] = datasets.List({"role": text, "content": text})
        parts.append(datasets.Dataset.from_list(chunk, features=datasets.Features(kinds)))
    if not parts:
        raise DataError(f"{name}: no rows; needs at least one, such as {{'text': '...'}}")
    return datasets.concatenate_datasets(parts)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")

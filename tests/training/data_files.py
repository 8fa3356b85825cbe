"""Real files of rows, and what reading them gives or says."""

import json

import pytest

from anyrank.errors import DataError
from anyrank.training.data import DataSource, load_rows

PAIR = {"prompt": "2+2=", "completion": "4"}


def write(path, *rows):
    """Rows as JSON lines; a str goes in as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def load(dataset, **options):
    return load_rows(DataSource(str(dataset), **options)).to_list()


def refusal(dataset, kind=DataError, **options):
    """The text of the error, which is one line."""
    with pytest.raises(kind) as caught:
        load(dataset, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text

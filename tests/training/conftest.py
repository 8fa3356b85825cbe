"""A file of JSON lines; the Hub is offline and the cache new."""

import datasets
import pytest
from data_files import write


@pytest.fixture
def jsonl(tmp_path):
    return lambda *rows: write(tmp_path / "rows.jsonl", *rows)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)

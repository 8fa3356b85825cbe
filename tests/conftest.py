"""Small and quiet: one thread, no progress bars, no network; and what several tests read."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer, on disk."""
    from tiny import llama
    from tiny_tokenizers import tiny_tokenizer

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    llama(vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of prompt and completion."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"How many? {i}", "completion": f" {i} apples."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""A folder that several tests quantize."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A bfloat16 Llama in several files."""
    from model_folders import saved
    from tiny import llama

    folder = tmp_path_factory.mktemp("base") / "llama"
    saved(folder, llama(torch.bfloat16), max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "README.md").write_text("of the base")
    return folder

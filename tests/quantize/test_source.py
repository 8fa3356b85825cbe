"""Where a model is read: the Hub, and checkpoints that only Transformers understands."""

import json
import logging

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from model_folders import loaded, saved, tensors
from safetensors.torch import save_file
from tiny import llama

from anyrank.errors import RunError
from anyrank.quantize.model import REPORT, quantize_model


def test_a_name_on_the_hub_is_downloaded_without_pickles(base, tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    quantize_model("some/llama", tmp_path / "out", tile=(1, 16), revision="v2")
    assert (asked["name"], asked["revision"]) == ("some/llama", "v2")
    wanted = list(filter_repo_objects(
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
         "pytorch_model.bin", "original/model.safetensors", "tokenizer.json", "README.md",
         "tokenizer.model", "training_args.bin", "generation_config.json"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    ))  # fmt: skip
    assert wanted == [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "generation_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / REPORT).read_text())["model"] == "some/llama"


def test_a_checkpoint_of_other_files_is_loaded_by_transformers(tmp_path, caplog):
    base = saved(tmp_path / "base", llama())
    wanted = quantize_model(base, tmp_path / "wanted", tile=(1, 16))
    torch.save(tensors(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, logger="anyrank"):
        out = quantize_model(base, tmp_path / "out", tile=(1, 16))
    assert "the whole model is loaded" in caplog.messages[0]
    assert all(torch.equal(tensors(out)[k], v) for k, v in tensors(wanted).items())
    loaded(out)


def test_names_that_transformers_changes_are_read_through_it(tmp_path, caplog):
    """A checkpoint of the bare decoder names its tensors without `model.`."""
    base = saved(tmp_path / "base", llama(tie_word_embeddings=True))
    plain = quantize_model(base, tmp_path / "plain", tile=(1, 16))
    renamed = {k.removeprefix("model."): v for k, v in tensors(base).items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="anyrank"):
        out = quantize_model(base, tmp_path / "out", tile=(1, 16))
    assert caplog.messages == [
        f"{base}: no safetensors file holds model.layers.0.self_attn.q_proj.weight under this "
        "name; the whole model is loaded"
    ]
    got, wanted = tensors(out), tensors(plain)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    loaded(out)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    base = saved(tmp_path / "base", llama())
    kept = {k: v for k, v in tensors(base).items() if "layers.1.mlp.up_proj" not in k}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError) as caught:
        quantize_model(base, tmp_path / "out", tile=(1, 16))
    assert str(caught.value) == (
        f"{base}: model.layers.1.mlp.up_proj.weight is not in the checkpoint; "
        "use a complete checkpoint of a causal language model"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]

"""What GGUF cannot hold, or llama.cpp does not compute, is refused before a byte is written."""

from __future__ import annotations

import errno
import shutil
import sys
from typing import Any

import pytest
from gguf_models import change, dequantized, model, read, rewrite, save, small
from safetensors.torch import load_file

from anyrank.errors import ConfigError, MissingPackageError, RunError
from anyrank.export.gguf import export_gguf
from anyrank.export.gguf import model as gguf_model
from anyrank.kernels import AffineFormat


@pytest.mark.parametrize(
    ("bits", "tile", "kind", "others"),
    [
        (8, (1, 32), "8 bits in groups of 32", "--to mlx or --to hqq or --to torchao"),
        (4, (1, 16), "4 bits in groups of 16", "--to hqq or --to torchao"),
        (4, (8, 4), "4 bits in tiles of 8x4", "--to torchao"),
    ],
)
def test_a_format_without_a_block_is_refused(bits, tile, kind, others, tmp_path):
    saved = tmp_path / "model"
    save(saved, model("llama", num_hidden_layers=1), form=AffineFormat(bits, tile))
    with pytest.raises(ConfigError) as error:
        export_gguf(saved, tmp_path / "out")
    assert str(error.value) == (
        f"{saved}: {kind} fit into no GGUF block as they are (Q4_1 holds 2, 3 and 4 bits, Q5_1 "
        f"5 bits, in groups of 32, 64 or 128); try {others}, or quantize again with --bits 4 "
        "--group_size 32"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA_3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OF_ROPE = (
    "rope_parameters has {}, which llama.cpp does not compute in {} models (it knows {}); try "
    "--to mlx or --to hqq"
)
PLAIN = "default, linear, yarn"


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (
            "llama",
            {"model_type": "gemma"},
            "a GGUF file is written for llama, mistral, qwen2, qwen3, not for model_type 'gemma'; "
            "try --to mlx or --to hqq",
        ),
        (
            "llama",
            {"hidden_act": "gelu"},
            "hidden_act='gelu', but llama.cpp computes silu in llama models; try --to mlx "
            "or --to hqq",
        ),
        (
            "qwen3",
            {"rope_parameters": LLAMA_3},
            OF_ROPE.format("rope_type='llama3'", "qwen3", PLAIN),
        ),
        (
            "llama",
            {"rope_parameters": YARN | {"rope_type": "dynamic"}},
            OF_ROPE.format("rope_type='dynamic'", "llama", f"{PLAIN}, llama3"),
        ),
        (
            "qwen2",
            {"rope_parameters": YARN | {"beta_fast": 8.0}},
            OF_ROPE.format("beta_fast=8.0", "qwen2", PLAIN),
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            OF_ROPE.format("partial_rotary_factor=0.5", "llama", f"{PLAIN}, llama3"),
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(kind, changes, text, tmp_path):
    saved = small(tmp_path, kind)
    change(saved / "config.json", **changes)
    with pytest.raises(ConfigError) as error:
        export_gguf(saved, tmp_path / "out.gguf")
    assert str(error.value) == f"{saved}: {text}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_without_a_place_is_refused(tmp_path):
    saved = tmp_path / "model"
    save(saved, model("qwen3", num_hidden_layers=1, attention_bias=True))
    with pytest.raises(ConfigError) as error:
        export_gguf(saved, tmp_path / "out.gguf")
    assert str(error.value) == (
        f"{saved}: llama.cpp reads no model.layers.0.self_attn.k_proj.bias in qwen3 models; try "
        "--to mlx or --to hqq"
    )


def test_a_missing_tensor_is_named(tmp_path):
    saved = small(tmp_path, "qwen2")
    rewrite(saved, model__layers__0__self_attn__k_proj__bias=None)
    with pytest.raises(RunError) as error:
        export_gguf(saved, tmp_path / "out.gguf")
    assert str(error.value) == (
        f"{saved}: model.layers.0.self_attn.k_proj.bias is missing; quantize or fold the model "
        "again"
    )
    saved = small(tmp_path / "other")
    rewrite(saved, lm_head__weight=None)
    with pytest.raises(RunError, match=r"lm_head\.weight is missing"):
        export_gguf(saved, tmp_path / "out.gguf")


def test_numbers_that_f16_cannot_hold_are_refused(tmp_path):
    saved = small(tmp_path)
    values = load_file(saved / "model.safetensors")["model.embed_tokens.weight"]
    values[5, 7] = -70000.0
    rewrite(saved, model__embed_tokens__weight=values)
    with pytest.raises(ConfigError) as error:
        export_gguf(saved, tmp_path / "out.gguf")
    assert str(error.value) == (
        "model.embed_tokens.weight: F16 holds numbers up to 65504, it reaches 70000; export with "
        'embeddings="Q8_0"'
    )
    _, tensors = read(export_gguf(saved, tmp_path / "out.gguf", embeddings="Q8_0"))
    found = dequantized(tensors["token_embd.weight"])[5, 7].item()
    assert found == pytest.approx(-70000.0, rel=1e-3)


def test_an_unknown_kind_of_embeddings(tmp_path):
    with pytest.raises(ConfigError) as error:
        export_gguf(tmp_path, tmp_path / "out.gguf", embeddings="Q8")
    assert str(error.value) == "embeddings='Q8' is unknown; did you mean Q8_0?"


def test_out_is_a_file_or_a_new_folder_and_nothing_is_overwritten(tmp_path):
    saved, out = small(tmp_path), tmp_path / "deep" / "out"
    assert export_gguf(saved, out) == out / "model.gguf"
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    file = export_gguf(saved, tmp_path / "deep" / "out.gguf")
    assert file.read_bytes() == (out / "model.gguf").read_bytes()  # the same bytes every time
    for taken, what in ((out, "folder"), (file, "file")):
        with pytest.raises(RunError) as error:
            export_gguf(saved, taken)
        assert str(error.value) == (
            f"{taken} exists already; name another {what}, or remove it first"
        )


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_an_export_that_fails_leaves_nothing(name, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_model, "to_blocks", fail)
    with pytest.raises(RunError) as error:
        export_gguf(small(tmp_path), tmp_path / name)
    assert str(error.value) == (
        f"{tmp_path / name}: the disk is full, nothing was written; free some room, or name a "
        "folder on another disk"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_gguf_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError) as error:
        export_gguf(small(tmp_path), tmp_path / "out.gguf")
    assert str(error.value) == "GGUF files need the gguf package; pip install 'anyrank[gguf]'"


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    saved, usage = small(tmp_path), shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"out\.gguf: the export needs 0\.[45] MB, but 0\.0 MB are"):
        export_gguf(saved, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

"""Exports with a rank per layer: stock PEFT reads them, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_lora import CASES, READER, adapted, built, logits
from test_lora import TOKENS as TOKENS

from anyrank import export_lora
from anyrank.cli import run
from anyrank.errors import ConfigError, RankError
from anyrank.export.adapter import SavedAdapter
from anyrank.export.lora import lora_size
from anyrank.tuner import adapter_layers

# every scale, pooled and repeated factors, transposed weights, layers left out of the adapter
NAMES = ["qdylora", "lora", "rank-stabilised", "any-rank qbara", "any-rank qablora", "gpt2",
         "falcon", "without down_proj", "one decoder layer", "with a trained head"]  # fmt: skip
FIRST = "model.layers.0.mlp.down_proj"


def pattern_of(model: Any) -> dict[str, int]:
    """0, 1, ... 4 in turn."""
    names = [name for name, _ in adapter_layers(model.get_base_model())]
    return {name: i % 5 for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    for base in {CASES[case][0] for case in NAMES}:
        built(base).save_pretrained(root / f"base {base}")
    for case in NAMES:
        model, folder = adapted(case), root / case
        model.save_pretrained(folder / "adapter")
        pattern = pattern_of(model)
        with model.set_rank(pattern):
            expected = {"tokens": TOKENS, " per layer": logits(model)}
        export_lora(folder / "adapter", folder / "rank per layer", pattern)
        safetensors.torch.save_file(expected, folder / "expected")
        (folder / "base").write_text(str(root / f"base {CASES[case][0]}"))
    return root


@pytest.fixture(scope="module")
def read_by_stock_peft(exported) -> dict[str, Any]:
    """What an interpreter without anyrank finds in all of these folders."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(exported)],
        cwd=exported,
        env={**variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", NAMES)
def test_stock_peft_gives_the_same_logits(case, exported, read_by_stock_peft):
    found = read_by_stock_peft[f"{case}  per layer"]
    assert (found["type"], found["rank"], found["warnings"]) == ("LORA", 4, [])
    assert found["difference"] <= 1e-5
    expected = safetensors.torch.load_file(exported / case / "expected")[" per layer"]
    assert (expected - logits(built(CASES[case][0]))).abs().max() > 1e-2
    assert (expected - logits(adapted(case))).abs().max() > 1e-2


@pytest.mark.parametrize("case", NAMES)
def test_the_configuration_gives_every_layer_a_scale_of_one(case, exported):
    folder = exported / case / "rank per layer"
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted = {name: k for name, k in pattern_of(adapted(case)).items() if k}
    assert config["rank_pattern"] == config["alpha_pattern"] == wanted
    assert config["target_modules"] == sorted(wanted)
    assert config["r"] == config["lora_alpha"] == max(wanted.values())
    assert not {"exclude_modules", "layers_to_transform", "use_rslora"} & set(config)
    facts = json.loads((folder / "anyrank.json").read_text())
    assert facts["rank"] == pattern_of(adapted(case))
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    held = {key: t.shape[0] for key, t in tensors.items() if key.endswith("lora_A.weight")}
    assert held == {f"base_model.model.{n}.lora_A.weight": k for n, k in wanted.items()}


def test_a_longer_name_stands_before_one_that_it_ends_with(exported):
    config = json.loads((exported / "qdylora/rank per layer/adapter_config.json").read_text())
    lengths = [len(name) for name in config["rank_pattern"]]
    assert lengths == sorted(lengths, reverse=True)


def test_the_size_is_known_before_the_file_is_written(exported):
    adapter = SavedAdapter.read(exported / "qdylora" / "adapter")
    file = exported / "qdylora" / "rank per layer" / "adapter_model.safetensors"
    assert lora_size(adapter, pattern_of(adapted("qdylora"))) == file.stat().st_size


def test_the_command_reads_a_pattern_by_hand_or_a_budget(exported, tmp_path, capsys):
    pattern = pattern_of(adapted("qdylora"))
    adapter = exported / "qdylora" / "adapter"
    for name, held in (("hand", pattern), ("budget", {"budget": 1, "layers": pattern})):
        file, out = tmp_path / f"{name}.json", tmp_path / name
        file.write_text(json.dumps(held))
        assert run(["export", str(adapter), str(out), "--rank_pattern", str(file)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"14 layers, ranks 0 to 4: {out}",
            f"Load: PeftModel.from_pretrained(base, '{out}'); vLLM wants one rank for all layers: "
            "export one with --rank",
        ]
        written = out / "adapter_model.safetensors"
        wanted = exported / "qdylora" / "rank per layer" / "adapter_model.safetensors"
        assert written.read_bytes() == wanted.read_bytes()


def test_prefixes_of_a_run_that_was_not_nested_are_warned_of(exported, tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps(pattern_of(adapted("lora"))))
    words = [exported / "lora/adapter", tmp_path / "out", "--rank_pattern", tmp_path / "p.json"]
    assert run(["export", *map(str, words)]) == 0
    assert capsys.readouterr().out.startswith("warning: lora was trained at rank 4 alone; ")


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({FIRST: 5}, RankError, f"rank pattern: {FIRST}: rank 5 must lie in 0..4"),
        ({FIRST: -1}, RankError, f"rank pattern: {FIRST}: rank -1 must lie in 0..4"),
        (
            {FIRST: None},
            RankError,
            f"rank pattern: {FIRST} has no rank; name every layer (0 leaves it out)",
        ),
        (
            {"lm_head": 1},
            ConfigError,
            "rank pattern: layer 'lm_head' is unknown; known: ",
        ),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(change, kind, text, exported, tmp_path):
    pattern = pattern_of(adapted("qdylora")) | change
    pattern = {name: k for name, k in pattern.items() if k is not None}
    adapter = exported / "qdylora" / "adapter"
    with pytest.raises(kind) as error:
        export_lora(adapter, tmp_path / "out", pattern)
    assert str(error.value).startswith(f"{adapter}: {text}")
    assert list(tmp_path.iterdir()) == []


def test_leaving_every_layer_out_is_refused(exported, tmp_path):
    adapter = exported / "qdylora" / "adapter"
    with pytest.raises(RankError) as error:
        export_lora(adapter, tmp_path / "out", dict.fromkeys(pattern_of(adapted("qdylora")), 0))
    assert str(error.value) == (
        f"{adapter}: rank pattern: every layer is left out; give one a rank above 0"
    )


@pytest.mark.parametrize(
    ("held", "words", "text"),
    [
        (None, [], "TMP/p.json: no such file"),
        ("{", [], "TMP/p.json: not valid JSON (Expecting property name enclosed in double quotes"),
        (
            "[8]",
            [],
            "TMP/p.json: holds no ranks of layers; name a budget.json that anyrank sweep --budget "
            'wrote, or write {"model.layers.0.self_attn.q_proj": 8, ...}',
        ),
        (
            '{"a": "8"}',
            [],
            "TMP/p.json: a: rank '8' must be a whole number from 0 (0 leaves the layer out)",
        ),
        (
            '{"a": 8}',
            ["--rank", "2"],
            "--rank_pattern gives every layer a rank of its own; leave --rank (and --ranks) out",
        ),
        (
            '{"a": 8}',
            ["--to", "gguf"],
            "--rank_pattern is for a run --to lora alone; leave it out",
        ),
    ],
)
def test_what_is_no_pattern_is_named(held, words, text, exported, tmp_path, capsys):
    file = tmp_path / "p.json"
    if held is not None:
        file.write_text(held)
    adapter = exported / "qdylora" / "adapter"
    words = ["export", adapter, tmp_path / "out", "--rank_pattern", file, *words]
    assert run(list(map(str, words))) == 2
    line = capsys.readouterr().err.splitlines()[-1].replace(str(tmp_path), "TMP")
    assert line.startswith(f"anyrank: {text}")
    assert not (tmp_path / "out").exists()


def test_dtypes_are_kept(exported, tmp_path):
    read = SavedAdapter.read(exported / "qdylora" / "adapter")
    half = {key: tensor.bfloat16() for key, tensor in read.tensors.items()}
    out = export_lora(
        SavedAdapter(read.folder, read.config, half),
        tmp_path / "out",
        pattern_of(adapted("qdylora")),
    )
    written = safetensors.torch.load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}

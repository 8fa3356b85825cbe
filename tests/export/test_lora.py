"""Exports as an ordinary LoRA: stock PEFT reads them, and a refusal leaves no file behind."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from anyrank import AnyRankConfig, export_lora
from anyrank.errors import ConfigError, RankError, RunError
from anyrank.export.adapter import SavedAdapter
from anyrank.export.lora import lora_size

SMALL = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
BASES = {
    "llama": tiny.llama,
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, n_embd=64, n_layer=2, n_head=4)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**SMALL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    ),
}
# Name of a case -> (base, options of AnyRankConfig). Every low-rank method, then any-rank forms.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("llama", {"method": name}) for name in ("lora", "qlora", "dylora", "qdylora")},
    "qalora": ("llama", {"method": "qalora", "pool": 16}),
    "qbara": ("llama", {"method": "qbara"}),
    "qablora": ("llama", {"method": "qablora", "pool": 16, "repeat": 2}),
    "lora_fa": ("llama", {"method": "lora_fa"}),
    "any-rank lora": ("llama", {"method": "lora", "nested": True}),
    "any-rank qalora": ("llama", {"method": "qalora", "pool": 16, "nested": True}),
    "any-rank qbara": ("llama", {"method": "qbara", "nested": True}),
    "any-rank qablora": ("llama", {"method": "qablora", "pool": 16, "repeat": 2, "nested": True}),
    "any-rank lora_fa": ("llama", {"method": "lora_fa", "nested": True}),
    "rank-stabilised": ("llama", {"method": "qdylora", "scale": "alpha/sqrt(k)"}),
    "one decoder layer": ("llama", {"method": "qdylora", "layers_to_transform": [1]}),
    "without down_proj": ("llama", {"method": "qdylora", "exclude_modules": ["down_proj"]}),
    "with a trained head": ("llama", {"method": "qdylora", "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"method": "qdylora"}),
    "falcon": ("falcon", {"method": "qdylora"}),
}
TOKENS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))

# What a user without anyrank runs: argument 1 is the folder that `exported` fills.
READER = """
import copy, functools, json, sys, warnings
from pathlib import Path

class NoAnyRank:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "anyrank":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoAnyRank())
try:
    import anyrank
except ModuleNotFoundError:
    pass
else:
    sys.exit("anyrank can be imported here")

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

@functools.cache
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()

root, found = Path(sys.argv[1]), {}
for case in sorted(path for path in root.iterdir() if (path / "expected").exists()):
    expected = load_file(case / "expected")
    tokens = expected.pop("tokens")
    for rank, wanted in expected.items():
        base = copy.deepcopy(load((case / "base").read_text()))
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
            model = PeftModel.from_pretrained(base, case / f"rank{rank}")
            got = model(tokens, use_cache=False).logits
        config = model.peft_config["default"]
        found[f"{case.name} {rank}"] = {
            "difference": (got - wanted).abs().max().item(),
            "type": config.peft_type.value,
            "rank": config.r,
            "warnings": [str(warning.message) for warning in caught],
        }
assert not [name for name in sys.modules if name.split(".")[0] == "anyrank"]
print(json.dumps(found))
"""


@cache
def built(name: str) -> Any:
    torch.manual_seed(0)
    return BASES[name]().eval()


def adapted(case: str, r: int = 4) -> Any:
    """A model whose adapters, and modules trained in full, hold random values."""
    name, options = CASES[case]
    model = get_peft_model(copy.deepcopy(built(name)), AnyRankConfig(r=r, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "anyrank_" in key or "modules_to_save" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def rows(case: str) -> int:
    return 8 if CASES[case][1]["method"] == "qbara" else 4


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder per case: the adapter, its export at every rank, and anyrank's own logits."""
    root = tmp_path_factory.mktemp("exported")
    for name in BASES:
        built(name).save_pretrained(root / f"base {name}")
    for case, (name, _) in CASES.items():
        model, folder = adapted(case), root / case
        model.save_pretrained(folder / "adapter")
        expected = {"tokens": TOKENS}
        for rank in range(1, rows(case) + 1):
            with model.set_rank(rank):
                expected[str(rank)] = logits(model)
            export_lora(folder / "adapter", folder / f"rank{rank}", rank)
        safetensors.torch.save_file(expected, folder / "expected")
        (folder / "base").write_text(str(root / f"base {name}"))
    return root


@pytest.fixture(scope="module")
def read_by_stock_peft(exported) -> dict[str, Any]:
    """What one interpreter without anyrank finds in all of these folders."""
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


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_gives_the_same_logits_at_every_rank(case, read_by_stock_peft):
    for rank in range(1, rows(case) + 1):
        found = read_by_stock_peft[f"{case} {rank}"]
        assert (found["type"], found["rank"]) == ("LORA", rank)
        assert found["difference"] <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_warns_of_nothing_in_an_export(case, read_by_stock_peft):
    for rank in range(1, rows(case) + 1):
        assert read_by_stock_peft[f"{case} {rank}"]["warnings"] == []


@pytest.mark.parametrize("case", CASES)
def test_the_logits_to_compare_with_differ_from_rank_to_rank(case, exported):
    expected = safetensors.torch.load_file(exported / case / "expected")
    found = [logits(built(CASES[case][0])), *(expected[str(k + 1)] for k in range(rows(case)))]
    for before, after in itertools.pairwise(found):
        assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_one_that_every_peft_knows(case, exported):
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for rank in range(1, rows(case) + 1):
        config = json.loads((exported / case / f"rank{rank}" / "adapter_config.json").read_text())
        assert set(config) <= known
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, rank)
        assert config["bias"] == "none"
        assert not {"use_rslora", "rank_pattern", "alpha_pattern", "use_dora"} & set(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["qdylora", "qbara", "with a trained head"])
def test_the_size_is_known_before_the_file_is_written(case, dtype, exported, tmp_path):
    read = SavedAdapter.read(exported / case / "adapter")
    tensors = {key: tensor.to(dtype) for key, tensor in read.tensors.items()}
    adapter = dataclasses.replace(read, tensors=tensors)
    for rank in (1, 2, 4):
        out = export_lora(adapter, tmp_path / str(rank), rank)
        assert lora_size(adapter, rank) == (out / "adapter_model.safetensors").stat().st_size
    written = safetensors.torch.load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}


def test_an_export_has_the_mode_of_an_ordinary_folder_and_says_where_it_comes_from(exported):
    out = exported / "any-rank qbara" / "rank3"
    facts = json.loads((out / "anyrank.json").read_text())
    assert (facts["rank"], facts["largest_rank"], facts["method"]) == (3, 8, "qbara")
    assert out.stat().st_mode & 0o777 == 0o755


def test_a_dense_block_is_refused(tmp_path):
    tiny.adapted(tiny.llama(), "qahira").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError) as caught:
        export_lora(tmp_path / "adapter", tmp_path / "out", 4)
    assert str(caught.value) == (
        f"{tmp_path / 'adapter'}: qahira holds dense blocks, which are no LoRA of any rank; "
        "keep the adapter beside its base, or train a low-rank method"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [-1, 0, 9])
def test_a_rank_that_the_adapter_does_not_have_is_refused(rank, exported, tmp_path):
    adapter = exported / "qbara" / "adapter"
    with pytest.raises(RankError) as caught:
        export_lora(adapter, tmp_path / "out", rank)
    assert str(caught.value) == f"{adapter}: rank {rank} must lie in 1..8"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("occupied", ["out", "out/notes.txt"])
def test_an_occupied_out_is_refused_and_left_as_it_was(occupied, exported, tmp_path):
    out, file = tmp_path / "out", tmp_path / occupied
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(RunError) as caught:
        export_lora(exported / "qdylora" / "adapter", out, 2)
    assert str(caught.value) == f"{out} exists already; name another folder, or remove it first"
    assert file.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_an_export_that_fails_midway_leaves_no_file_behind(exported, tmp_path, monkeypatch):
    def fail(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise OSError("the disk went away")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="the disk went away"):
        export_lora(exported / "qdylora" / "adapter", tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_the_first_byte(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"the export needs .* MB, but 0.0 MB are free"):
        export_lora(exported / "qdylora" / "adapter", tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["missing", "cut short", "no safetensors"])
def test_broken_weights_are_named(broken, tmp_path):
    adapted("qdylora").save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = {"cut short": weights.read_bytes()[:-100], "no safetensors": b"PK\x03\x04"}
    weights.unlink()
    if broken in content:
        weights.write_bytes(content[broken])
    with pytest.raises(RunError) as caught:
        export_lora(tmp_path / "adapter", tmp_path / "out", 2)
    assert str(caught.value).startswith(f"{weights}: cannot be read (")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(RunError) as caught:
        export_lora(tmp_path, tmp_path / "out", 2)
    assert str(caught.value) == f"{tmp_path}: holds no adapter (adapter_config.json is missing)"


def test_a_plain_lora_adapter_is_refused_by_name(exported, tmp_path):
    plain = exported / "qdylora" / "rank2"
    with pytest.raises(RunError) as caught:
        export_lora(plain, tmp_path / "out", 2)
    assert str(caught.value) == f"{plain}: holds a LORA adapter; export needs one made by anyrank"
    assert list(tmp_path.iterdir()) == []

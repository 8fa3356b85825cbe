"""A folded model: the base's codes, other offsets, and nothing of the adapter."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import IDS, adapted, layers, llama, quantized
from transformers import AutoModelForCausalLM

from anyrank.errors import ConfigError, MergeError, RankError, RunError
from anyrank.export.adapter import SavedAdapter
from anyrank.export.fold import fold
from anyrank.export.fold_report import Sums
from anyrank.export.table import plan_tables
from anyrank.quant.checkpoint import QuantizedModel, variants

METHODS = [  # method, options, tile
    ("qalora", {"pool": 16, "nested": True}, (1, 16)),
    ("qalora", {"pool": 32, "nested": False, "r": 2}, (1, 16)),
    ("qablora", {"pool": 16, "repeat": 4, "nested": True}, (1, 16)),
    ("qahira", {}, (8, 4)),
    ("qahira", {"pool": 32, "repeat": 8}, (1, 32)),
    ("qahira", {"pool": 32, "repeat": 1}, (1, 32)),
    ("dylora", {"pool": 16, "repeat": 2}, (1, 16)),
]


def trained(folder: Path, method="qalora", bits=4, tile=(1, 16), shard=None, **options):
    """A quantized base and an adapter on disk; returns the model with the adapter."""
    base = quantized(llama(), bits, tile)
    base.save_pretrained(folder / "base", **({"max_shard_size": shard} if shard else {}))
    model = adapted(base, method, **options)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


def folded(folder: Path, ranks=None, adapters=("adapter",), out="out"):
    base = QuantizedModel.open(folder / "base")
    found = [SavedAdapter.read(folder / name) for name in adapters]
    tables = plan_tables([(a, ranks or ([a.config.rows] if a.config.rows else [])) for a in found])
    return fold(base, tables, folder / out)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("method", "options", "tile"), METHODS)
def test_codes_and_scales_stay_and_weights_and_logits_are_the_trained_ones(
    method, options, tile, bits, tmp_path
):
    model = trained(tmp_path, method, bits, tile, **options)
    rows = model.peft_config["default"].rows
    ranks = list(range(1, rows + 1)) if model.peft_config["default"].nested else None
    report = folded(tmp_path, ranks)
    assert report["codes_identical"] is True
    base = QuantizedModel.open(tmp_path / "base")
    for rank in ranks or [None]:
        variant = None if ranks is None or len(ranks) == 1 else f"rank{rank}"
        if rank is not None:
            model.set_rank(rank)
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant=variant)
        assert torch.equal(result(IDS).logits, model(IDS).logits)
        names = [name for name, _ in result.named_modules()]
        for layer in layers(model):
            name = layer.layer_name
            got, was = result.get_submodule(name), base.affine(name)
            assert torch.equal(got.codes, was.codes)
            assert torch.equal(got.scales, was.scales)
            assert not torch.equal(got.offsets, was.offsets)
            # the weight that the adapted layer computes with: its answer to the unit vectors
            unit = torch.eye(layer.in_features)
            assert torch.equal(got.affine.weight().T, layer(unit))
        assert not [name for name in names if "anyrank" in name]
        table = report["tables"][variant or "default"]
        assert (table["largest_difference"], table["rms_difference"]) == (0.0, 0.0)
        assert 0 < table["rounding"] < 0.05
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits,
                       result(IDS).logits)  # fmt: skip


def test_the_files_hold_the_codes_once_and_a_table_per_rank(tmp_path):
    trained(tmp_path, nested=True, shard="40KB")
    folded(tmp_path, [1, 4])
    out = tmp_path / "out"
    assert variants(out) == ["rank1", "rank4"]
    files = {path.name for path in out.iterdir()}
    shards = {name for name in files if name.startswith("model-")}
    assert len(shards) > 1
    assert files - shards == {
        "README.md", "config.json", "generation_config.json", "fold.json",
        "model.safetensors.index.json",
        "model.safetensors.index.rank1.json", "model.safetensors.index.rank4.json",
        "offsets.rank1.safetensors", "offsets.rank4.safetensors",
    }  # fmt: skip
    assert all(name.endswith(".offsets") for name in load_file(out / "offsets.rank1.safetensors"))
    for shard in shards:
        assert not [name for name in load_file(out / shard) if name.endswith(".offsets")]
    mask = os.umask(0o022)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~mask}
    one, four = (QuantizedModel.open(out, name) for name in ("rank1", "rank4"))
    assert {n for n in one.files if one.files[n] != four.files[n]} == {
        f"{layer}.offsets" for layer in one.layers
    }
    assert QuantizedModel.open(out).files == four.files
    report = json.loads((out / "fold.json").read_text())
    assert set(report["tables"]) == {"rank1", "rank4"}
    assert set(report["tables"]["rank1"]["layers"]) == set(one.layers)


def test_a_folded_model_can_be_trained_and_folded_again(tmp_path):
    trained(tmp_path, nested=True)
    folded(tmp_path, [2])
    (tmp_path / "base").rename(tmp_path / "first")
    (tmp_path / "out").rename(tmp_path / "base")
    folded(tmp_path, [4])
    again = QuantizedModel.open(tmp_path / "out")
    first = QuantizedModel.open(tmp_path / "first")
    for layer in first.layers:
        assert torch.equal(again.tensor(f"{layer}.codes"), first.tensor(f"{layer}.codes"))


def test_several_adapters_of_one_base_become_tables_of_one_model(tmp_path):
    first = trained(tmp_path, nested=True)
    (tmp_path / "adapter").rename(tmp_path / "maths")
    second = trained(tmp_path, "qahira", pool=16, repeat=1)
    (tmp_path / "adapter").rename(tmp_path / "code.v1")
    report = folded(tmp_path, adapters=("maths", "code.v1"))
    assert list(report["tables"]) == ["maths", "code_v1"]
    for variant, model in (("maths", first), ("code_v1", second), (None, second)):
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant=variant)
        assert torch.equal(result(IDS).logits, model(IDS).logits)


def test_modules_trained_in_full_lie_in_the_table(tmp_path):
    model = trained(tmp_path, nested=True, modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.5
    model.save_pretrained(tmp_path / "adapter")
    folded(tmp_path, [1, 4])
    out = tmp_path / "out"
    assert "lm_head.weight" in load_file(out / "offsets.rank1.safetensors")
    result = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(result(IDS).logits, model(IDS).logits)


def test_a_layer_that_was_not_adapted_keeps_its_offsets(tmp_path):
    trained(tmp_path, target_modules=["q_proj"])
    folded(tmp_path)
    out, base = (QuantizedModel.open(tmp_path / name) for name in ("out", "base"))
    changed = {n for n in base.files if not torch.equal(base.tensor(n), out.tensor(n))}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.offsets" for i in range(2)}


def corrupt(folder: Path, part: str, value: float) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if part in key)
    tensors[key].view(-1)[0] = value
    save_file(tensors, path)


def test_what_cannot_fold_is_refused_by_layer_and_nothing_is_written(tmp_path):
    trained(tmp_path, "lora")
    with pytest.raises(MergeError) as caught:
        folded(tmp_path)
    assert str(caught.value) == (
        "model.layers.0.mlp.down_proj: its groups of 16 cannot take the adapter (pool=1 is no "
        "multiple of 16: use pool=16); train again with a geometry that fits (--foldable checks "
        "it before the training), or keep the adapter beside its base (anyrank export)"
    )
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_diverged_adapter_is_refused(tmp_path):
    trained(tmp_path, nested=True)
    corrupt(tmp_path, "anyrank_A", float("nan"))
    with pytest.raises(MergeError, match="at rank 4 holds NaN or infinity; its run diverged"):
        folded(tmp_path, [4])
    assert not (tmp_path / "out").exists()


def test_an_update_beyond_the_storage_precision_is_refused(tmp_path):
    trained(tmp_path, nested=True)
    corrupt(tmp_path, "anyrank_B", 3e7)
    with pytest.raises(MergeError) as caught:
        folded(tmp_path, [4])
    assert str(caught.value) == (
        f"model.layers.0.mlp.down_proj: {tmp_path}/adapter at rank 4 exceeds what float16 holds; "
        "quantize the base with --storage_dtype float32 and train on it"
    )
    assert not (tmp_path / "out").exists()


def test_a_report_that_is_not_a_number_is_not_a_zero():
    broken = Sums(identical=False, largest=float("nan"), update=1.0, count=1)
    whole = Sums(update=1.0, count=1)
    assert not (whole + broken).identical
    assert math.isnan((whole + broken).largest)
    assert math.isnan((broken + whole).largest)


@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter.*:UserWarning")
def test_a_tied_embedding_that_was_trained_in_full_is_refused(tmp_path):
    base = quantized(llama(tie_word_embeddings=True), 4, (1, 16))
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match=r"^model.embed_tokens: not foldable: it is tied to lm_"):
        adapted(base, "qalora", modules_to_save=["embed_tokens"], foldable=True)
    model = adapted(base, "qalora", modules_to_save=["embed_tokens"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError) as caught:
        folded(tmp_path)
    assert str(caught.value) == (
        "model.embed_tokens.weight: was trained in full, but input and output embeddings are tied "
        f"in {tmp_path}/base; the fold would change both; train without it in "
        "--lora_modules_to_save"
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": "4"}, "bits='4', tile=[1, 16], storage_dtype='float16' must be"),
        ({"storage_dtype": "nn"}, "bits=4, tile=[1, 16], storage_dtype='nn' must be"),
        ({"bits": 3}, "down_proj.scales is (64, 6), but its codes need (64, 8)"),
    ],
)
def test_a_base_whose_parts_do_not_belong_together_is_refused(change, text, tmp_path):
    trained(tmp_path, nested=True)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(RunError, match=re.escape(text)):
        folded(tmp_path, [4])


def test_the_wrong_base_is_refused(tmp_path):
    trained(tmp_path, nested=True)
    quantized(llama(intermediate_size=128), 4, (1, 16)).save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError) as caught:
        folded(tmp_path, [4])
    assert "fits a weight with 64 x 6 offsets, but" in str(caught.value)


def test_a_layer_that_is_not_quantized_is_refused(tmp_path):
    trained(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "q_proj.codes" not in n}, path)
    with pytest.raises(MergeError) as caught:
        folded(tmp_path)
    assert str(caught.value) == (
        f"model.layers.0.self_attn.q_proj: is not quantized in {tmp_path}/base, so "
        f"{tmp_path}/adapter at rank 4 cannot fold into it; train with --lora_exclude_modules, or "
        "fold into the base it was trained on"
    )


def test_a_base_that_is_not_quantized_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(RunError) as caught:
        QuantizedModel.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: its weights are not quantized; make a block-quantized model with anyrank "
        "quantize"
    )


def test_ranks_and_variants_that_are_not_there_are_refused(tmp_path):
    trained(tmp_path, nested=True)
    with pytest.raises(RankError, match=r"rank 9 must lie in 1\.\.4"):
        folded(tmp_path, [4, 9])
    with pytest.raises(ConfigError, match="two tables would be named alike"):
        folded(tmp_path, [4, 4])
    folded(tmp_path, [1, 4])
    with pytest.raises(RunError, match=r"no variant 'rank5'; did you mean rank(4|1)"):
        QuantizedModel.open(tmp_path / "out", "rank5")
    with pytest.raises(RunError, match="exists already"):
        folded(tmp_path, [1])

"""Quantized in, quantized out: train on codes, fold, load; as commands on real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from test_cli import anyrank
from tiny import IDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyrank.cli import run

FAST = "--learning_rate 0.03 --per_device_train_batch_size 4 --logging_steps 1 --disable_tqdm true"


@pytest.fixture(scope="module")
def quantized_base(base_folder, tmp_path_factory) -> Path:
    """The tiny Llama in 4 bits, with its tokenizer."""
    out = tmp_path_factory.mktemp("quantized") / "q4"
    assert run(["quantize", str(base_folder), str(out), "--bits", "4", "--group_size", "16"]) == 0
    return out


def train(base: Path, rows: Path, out: Path, *more: str) -> list[str]:
    words = ["train", "--model_name_or_path", base, "--dataset", rows, "--output_dir", out]
    words += [*FAST.split(), "--lora_r", "4", "--max_steps", "6", *more]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def nested_run(quantized_base, rows_file, tmp_path_factory) -> Path:
    """Ranks 1..4 of QA-LoRA, trained with validation rows."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = train(
        quantized_base, rows_file, folder, "--method", "qalora", "--pool", "16", "--nested", "true",
        "--foldable", "true", "--eval_size", "8",
    )  # fmt: skip
    assert run(words) == 0
    return folder


def test_train_fold_and_load_as_commands(nested_run, quantized_base, tmp_path):
    options = yaml.safe_load((nested_run / "config.yaml").read_text())
    assert (options["load_in_4bit"], options["foldable"]) == (False, True)
    done = anyrank("fold", nested_run, "out", "--ranks", "1,4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "rank1: run rank 1; codes and scales identical, largest difference to the trained weight "
        "0; KL 0.0e+00 nats per token",
        "rank4: run rank 4; codes and scales identical, largest difference to the trained weight "
        "0; KL 0.0e+00 nats per token",
        "Load: AutoModelForCausalLM.from_pretrained('out', variant='rank4')",
        "Next: anyrank export out OUT --to hqq --variant rank4",
    ]
    out = tmp_path / "out"
    base = AutoModelForCausalLM.from_pretrained(quantized_base)
    model = PeftModel.from_pretrained(base, nested_run)
    assert json.loads((out / "fold.json").read_text())["tables"]["rank4"]["kl"] == 0.0
    for rank in (1, 4):
        folded = AutoModelForCausalLM.from_pretrained(out, variant=f"rank{rank}")
        with torch.no_grad(), model.set_rank(rank):
            assert torch.equal(folded(IDS).logits, model(IDS).logits)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(folded(IDS).logits, model(IDS).logits)
    assert AutoTokenizer.from_pretrained(out)("How many?").input_ids


def test_a_fold_takes_the_rank_that_a_sweep_chose(nested_run, tmp_path, capsys):
    assert run(["fold", str(nested_run), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"anyrank: {nested_run}: holds ranks 1..4; name one with --rank 8 or several with "
        f"--ranks 4,8 (anyrank sweep {nested_run} compares them)"
    )
    assert run(["sweep", str(nested_run), "--ranks", "2"]) == 0
    assert run(["fold", str(nested_run), str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "fold.json").read_text())
    assert report["tables"]["default"]["rank"] == 2
    (nested_run / "sweep.json").unlink()


def test_a_dense_run_without_validation_rows_is_compared_on_training_rows(
    quantized_base, rows_file, tmp_path
):
    folder = tmp_path / "run"
    words = ["--method", "qahira", "--pool", "16", "--repeat", "8", "--foldable", "true"]
    assert run(train(quantized_base, rows_file, folder, *words)) == 0
    assert run(["fold", str(folder), str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "fold.json").read_text())
    assert report["tables"]["default"]["kl"] == 0.0
    assert run(["fold", str(folder), str(tmp_path / "again"), "--limit", "0"]) == 0
    report = json.loads((tmp_path / "again" / "fold.json").read_text())
    assert report["tables"]["default"]["kl"] is None


def test_a_run_that_could_not_fold_is_refused_before_it_starts(
    quantized_base, base_folder, rows_file, tmp_path, capsys
):
    folder = tmp_path / "run"
    words = train(quantized_base, rows_file, folder, "--method", "qahira", "--foldable", "true")
    assert run(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "anyrank: model.layers.0.self_attn.q_proj: not foldable: its groups of 16 cannot take the "
        "adapter (pool=4 is no multiple of 16: use pool=16); train on the output of anyrank "
        "quantize with a geometry that fits its groups, or leave foldable out"
    )
    words = train(
        base_folder, rows_file, folder, "--method", "qalora", "--pool", "16", "--foldable", "true"
    )
    assert run(words) == 2
    assert "not foldable: NF4 and FP4 weights have no offset" in capsys.readouterr().err
    words = train(quantized_base, rows_file, folder, "--load_in_4bit", "true")
    assert run(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "anyrank: load_in_4bit=True: the base is quantized already (anyrank); leave it out"
    )
    assert not folder.exists()


def test_an_interrupted_run_on_codes_resumes_bit_for_bit(quantized_base, rows_file, tmp_path):
    words = ["--method", "qablora", "--pool", "16", "--nested", "true", "--save_steps", "3"]
    assert run(train(quantized_base, rows_file, tmp_path / "whole", *words)) == 0
    assert run(train(quantized_base, rows_file, tmp_path / "cut", *words)) == 0
    for name in ("result.json", "adapter_model.safetensors", "anyrank.json"):
        (tmp_path / "cut" / name).unlink()
    (tmp_path / "cut" / "checkpoint-6" / "adapter_model.safetensors").unlink()
    again = [*words, "--resume_from_checkpoint", "true"]
    assert run(train(quantized_base, rows_file, tmp_path / "cut", *again)) == 0
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert first == second


def test_the_base_may_have_moved(nested_run, quantized_base, tmp_path, capsys):
    moved, adapter = tmp_path / "moved", tmp_path / "adapter"
    shutil.copytree(quantized_base, moved)
    shutil.copytree(nested_run, adapter)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(quantized_base), "/nowhere/q4"))
    assert run(["fold", str(adapter), str(tmp_path / "out"), "--rank", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "anyrank: /nowhere/q4: the base is not there; name its folder with --base"
    )
    words = ["fold", str(adapter), str(tmp_path / "out"), "--rank", "1", "--base", str(moved)]
    assert run(words) == 0


def test_another_base_in_the_place_of_the_one_trained_on_is_refused(
    nested_run, base_folder, tmp_path, capsys
):
    words = ["quantize", base_folder, tmp_path / "other", "--group_size", "16", "--quantizer"]
    assert run([*map(str, words), "minmax"]) == 0
    words = ["fold", nested_run, tmp_path / "out", "--rank", "1", "--base", tmp_path / "other"]
    assert run([str(word) for word in words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"anyrank: {tmp_path}/other: is not the base that {nested_run} was trained on "
        "(codes, scales or offsets differ); name that one with --base, or train on this one"
    )
    assert not (tmp_path / "out").exists()


def test_a_resume_on_another_base_is_refused(
    quantized_base, base_folder, rows_file, tmp_path, capsys
):
    base = tmp_path / "base"
    shutil.copytree(quantized_base, base)
    words = train(base, rows_file, tmp_path / "run", "--method", "qalora", "--pool", "16")
    assert run([*words, "--save_steps", "3"]) == 0
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(base)
    words = ["quantize", base_folder, base, "--group_size", "16", "--quantizer", "minmax"]
    assert run([str(word) for word in words]) == 0
    config = str(tmp_path / "run" / "config.yaml")
    assert run(["train", "--config", config, "--resume_from_checkpoint", "true"]) == 2
    assert "was trained on another quantized base" in capsys.readouterr().err.splitlines()[-1]


def test_several_runs_fold_at_the_rank_that_each_sweep_chose(nested_run, tmp_path, capsys):
    runs = []
    for name, rank in (("first run", "1"), ("second", "2")):
        runs.append(tmp_path / name)
        shutil.copytree(nested_run, runs[-1])
        assert run(["sweep", str(runs[-1]), "--ranks", rank]) == 0
    words = ["fold", *runs, "--limit", "0", tmp_path / "out"]
    assert run([str(word) for word in words]) == 0
    tables = json.loads((tmp_path / "out" / "fold.json").read_text())["tables"]
    assert {name: table["rank"] for name, table in tables.items()} == {"first run": 1, "second": 2}
    assert run(["export", str(tmp_path / "out"), str(tmp_path / "hqq"), "--to", "hqq"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"anyrank: {tmp_path}/out: holds several tables; name one with --variant: first run, second"
    )
    words = ["export", str(tmp_path / "out"), str(tmp_path / "hqq"), "--to", "hqq"]
    assert run([*words, "--variant", "second"]) == 0


@pytest.mark.parametrize("out", ["lora", "lora.gguf"])
def test_the_line_that_runs_a_lora_names_its_file(nested_run, tmp_path, capsys, out):
    words = ["export", nested_run, tmp_path / out, "--rank", "1", "--to", "gguf"]
    assert run([str(word) for word in words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("Run: llama-cli -m BASE.gguf --lora ")
    assert Path(line.rsplit(" ", 1)[-1]).read_bytes()[:4] == b"GGUF"

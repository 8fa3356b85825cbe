"""A user's path: train, sweep, export, each as a command on real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_tokenizers import CHAT, tiny_tokenizer

from anyrank.cli import run
from anyrank.training.formats import NEWLINE
from anyrank.training.run import Run

FAST = "--learning_rate 0.01 --per_device_train_batch_size 4 --logging_steps 1 --disable_tqdm true"


def anyrank(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anyrank", *map(str, words)],
        cwd=cwd, text=True, capture_output=True, check=False, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip


def train(base: Path, rows: Path, out: Path, *more: str) -> int:
    words = ["train", "--model_name_or_path", base, "--dataset", rows, "--output_dir", out]
    words += [*FAST.split(), "--method", "dylora", "--lora_r", "8", *more]
    return run([str(word) for word in words])


def test_train_sweep_and_export_as_commands(base_folder, rows_file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {base_folder}\ndataset: {rows_file}\nmethod: qdylora\nlora_r: 8\n"
        "learning_rate: 1e-2\nmax_steps: 99\neval_size: 8\nlogging_steps: 1\n"
    )
    done = anyrank(
        "train", "--config", config, "--max_steps", "6", "--output_dir", "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "training: 32 rows, " in done.stderr
    assert done.stdout.splitlines()[-1] == "Next: anyrank sweep run"
    folder = tmp_path / "run"
    held = {p.name for p in folder.iterdir() if p.is_file()}
    assert held == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "anyrank.json",
        "config.yaml", "metrics.jsonl", "result.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    options = yaml.safe_load((folder / "config.yaml").read_text())
    assert (options["max_steps"], options["learning_rate"]) == (6, 0.01)
    assert (options["scale"], options["nested"], options["load_in_4bit"]) == ("alpha/k", True, True)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 5, 6]
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 6
    assert result["eval_loss"] > 0

    done = anyrank("sweep", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Next: anyrank export run --rank" in done.stdout
    found = json.loads((folder / "sweep.json").read_text())
    assert [row["rank"] for row in found["ranks"]] == [1, 2, 4, 8]
    assert set(found["ranks"][0]) == {
        "rank", "loss", "above_best", "above_best_se", "perplexity", "parameters", "bytes"
    }  # fmt: skip
    assert found["tolerance"] is None
    chosen = next(row for row in found["ranks"] if row["rank"] == found["chosen_rank"])
    assert chosen["above_best"] <= max(chosen["above_best_se"], 0.002)
    assert found["rows"] == 8
    assert found["ranks"][-1]["parameters"] == result["trainable_parameters"]
    assert abs(found["ranks"][-1]["loss"] - result["eval_loss"]) < 0.02  # other batches, bf16
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"

    done = anyrank("export", "run", "--ranks", "1,4", "--to", "lora", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "rank 1: out/rank1",
        "rank 4: out/rank4",
        f"Serve: vllm serve {base_folder} --enable-lora --max-lora-rank 8 "
        "--lora-modules r1=out/rank1 r4=out/rank4",
    ]
    for row in found["ranks"]:
        if row["rank"] in (1, 4):
            written = tmp_path / "out" / f"rank{row['rank']}" / "adapter_model.safetensors"
            assert written.stat().st_size == row["bytes"]


@pytest.mark.parametrize("cut", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_an_interrupted_run_resumes_bit_for_bit(base_folder, rows_file, tmp_path, cut):
    steps = ["--save_steps", "3", "--max_steps", "6"]
    assert train(base_folder, rows_file, tmp_path / "whole", *steps) == 0
    out = tmp_path / "cut"
    assert train(base_folder, rows_file, out, *steps) == 0
    for name in ("result.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    newest = out / "checkpoint-6" / cut  # as if the machine had died while writing it
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with open(out / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 6, "lo')

    assert train(base_folder, rows_file, out, *steps, "--resume_from_checkpoint", "true") == 0
    resumed = load_file(out / "adapter_model.safetensors")
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all((resumed[key] == whole[key]).all() for key in whole)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_run_repeats_from_its_own_config(base_folder, rows_file, tmp_path):
    assert train(base_folder, rows_file, tmp_path / "one", "--max_steps", "2") == 0
    config = str(tmp_path / "one" / "config.yaml")
    assert run(["train", "--config", config, "--output_dir", str(tmp_path / "two")]) == 0
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all((one[key] == two[key]).all() for key in one)
    options = [Run.open(tmp_path / name).config for name in ("one", "two")]
    assert {k for k in options[0] if options[0][k] != options[1].get(k)} == {"output_dir"}


def test_packing_and_a_method_without_ranks(base_folder, rows_file, tmp_path, capsys):
    more = ["--method", "qahira", "--max_steps", "2", "--packing", "true", "--max_length", "64"]
    assert train(base_folder, rows_file, tmp_path / "run", *more) == 0
    capsys.readouterr()
    assert run(["sweep", str(tmp_path / "run"), "--dataset", str(rows_file), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert [row["rank"] for row in found["ranks"]] == [None]
    assert found["chosen_rank"] is None


def test_exact_match_answers_by_generation(base_folder, rows_file, tmp_path):
    assert train(base_folder, rows_file, tmp_path / "run", "--max_steps", "1") == 0
    words = f"--dataset {rows_file} --ranks 8 --limit 4 --exact_match --max_new_tokens 4"
    assert run(["sweep", str(tmp_path / "run"), *words.split()]) == 0
    found = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert found["base"]["exact_match"] == found["ranks"][0]["exact_match"] == 0.0


def test_a_chat_template_goes_with_the_run(base_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    rows.write_text((json.dumps({"messages": talk}) + "\n") * 12)
    (tmp_path / "chat.jinja").write_text(CHAT)
    more = ["--chat_template_path", str(tmp_path / "chat.jinja"), "--eval_size", "4"]
    assert train(base_folder, rows, tmp_path / "one", "--max_steps", "1", *more) == 0
    assert run(["sweep", str(tmp_path / "one")]) == 0
    found = json.loads((tmp_path / "one" / "sweep.json").read_text())
    turn = tiny_tokenizer()("Yes.<end>\n").input_ids
    assert (found["rows"], found["tokens"]) == (4, 4 * len(turn))
    config = str(tmp_path / "one" / "config.yaml")
    assert run(["train", "--config", config, "--output_dir", str(tmp_path / "two")]) == 0


def test_a_sweep_of_other_data_may_name_its_columns(base_folder, rows_file, tmp_path):
    assert train(base_folder, rows_file, tmp_path / "run", "--max_steps", "1") == 0
    (tmp_path / "qa.csv").write_text("question,answer\nHow many?,Two apples.\n")
    words = f"--dataset {tmp_path / 'qa.csv'} --prompt_column question --completion_column answer"
    assert run(["sweep", str(tmp_path / "run"), *words.split()]) == 0
    assert json.loads((tmp_path / "run" / "sweep.json").read_text())["rows"] == 1


def test_how_prompts_of_other_columns_end_is_said(base_folder, rows_file, tmp_path, caplog):
    (tmp_path / "qa.csv").write_text("question,answer\nHow many?,Two apples.\n")
    words = ["--prompt_column", "question", "--completion_column", "answer", "--max_steps", "1"]
    with caplog.at_level("INFO", logger="anyrank"):
        assert train(base_folder, tmp_path / "qa.csv", tmp_path / "qa", *words) == 0
    assert NEWLINE in caplog.messages
    assert NEWLINE in (tmp_path / "qa" / "README.md").read_text()

    assert train(base_folder, rows_file, tmp_path / "pairs", "--max_steps", "1") == 0
    assert NEWLINE not in (tmp_path / "pairs" / "README.md").read_text()


def test_ranks_may_be_a_yaml_list_and_are_the_ones_that_are_swept(base_folder, rows_file, tmp_path):
    (tmp_path / "c.yaml").write_text("ranks: [8, 3]\nlora_target_modules: q_proj\n")
    more = ["--config", str(tmp_path / "c.yaml"), "--max_steps", "1", "--eval_size", "4"]
    assert train(base_folder, rows_file, tmp_path / "run", *more) == 0
    assert Run.open(tmp_path / "run").config["ranks"] == "3,8"
    assert run(["sweep", str(tmp_path / "run"), "--tolerance", "0"]) == 0
    found = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [row["rank"] for row in found["ranks"]] == [3, 8]
    assert found["tolerance"] == 0
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in tensors} == {"q_proj"}


def test_a_diverged_run_chooses_no_rank(base_folder, rows_file, tmp_path, capsys):
    more = ["--max_steps", "3", "--learning_rate", "1e30", "--eval_size", "4"]
    assert train(base_folder, rows_file, tmp_path / "run", *more) == 0
    assert run(["sweep", str(tmp_path / "run")]) == 0
    assert "No rank has a finite loss: the run diverged" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert found["chosen_rank"] is None
    assert found["ranks"][-1]["loss"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("verb", ["train", "sweep", "export"])
def test_debug_shows_the_traceback_and_nothing_else_does(verb, tmp_path):
    words = {"train": [], "sweep": ["no-run"], "export": ["no-run", "out", "--rank", "1"]}[verb]
    done = anyrank(verb, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("anyrank: ")
    assert "Traceback" in anyrank(verb, *words, "--debug", cwd=tmp_path).stderr

"""`anyrank sweep --budget` and its export as commands, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyrank.cli import run
from anyrank.cli.words import numbers


@pytest.fixture(scope="module")
def trained(base_folder, rows_file, tmp_path_factory) -> Path:
    """A short run of each kind: all ranks, given ranks, one rank, dense."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {
        "nested": ["--method", "dylora", "--lora_r", "8"],
        "ranks": ["--method", "dylora", "--lora_r", "8", "--ranks", "2,8"],
        "lora": ["--method", "lora", "--lora_r", "8"],
        "dense": ["--method", "qahira", "--load_in_4bit", "false"],
    }
    for name, more in kinds.items():
        words = ["train", "--model_name_or_path", base_folder, "--dataset", rows_file, *more]
        words += ["--output_dir", root / name, "--max_steps", "4", "--learning_rate", "0.02"]
        words += ["--eval_size", "8", "--disable_tqdm", "true", "--save_strategy", "no"]
        assert run(list(map(str, words))) == 0
    return root


def sweep(*words: object) -> int:
    return run(["sweep", *map(str, words)])


@pytest.mark.parametrize("name", ["nested", "ranks", "lora"])
def test_a_budget_gives_ranks_a_report_and_an_export(name, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep(trained / name, "--budget", "9k", "--out", out) == 0
    shown = capsys.readouterr().out
    assert [p.name for p in out.iterdir()] == ["budget.json"]
    found = json.loads((out / "budget.json").read_text())
    allowed = {0, 2, 8} if name == "ranks" else {0, 1, 2, 3, 4, 6, 8}
    assert set(found["layers"].values()) <= allowed
    assert len(found["layers"]) == 14
    assert found["parameters"] <= found["budget"] == 9000
    assert found["uniform"]["rank"] == (2 if name == "ranks" else 4)
    assert found["uniform"]["parameters"] == found["uniform"]["rank"] * 1856
    chosen, held = found["chosen_on"], found["held_out"]
    assert (chosen["rows"], held["rows"]) == (4, 4)
    assert chosen["above_uniform"] <= 0
    assert held["above_uniform"] == pytest.approx(held["loss"] - held["uniform_loss"], abs=1e-9)
    assert held["above_uniform_se"] >= 0
    assert "On 4 rows that took no part: " in shown
    assert "model.layers.1" in shown
    words = shown.split("Next: anyrank ")[1].replace("OUT", str(tmp_path / "lora")).split()
    assert ("--rank_pattern" in words) == (held["above_uniform"] < -held["above_uniform_se"])
    pattern = ["--rank_pattern", str(out / "budget.json")]
    assert run(["export", str(trained / name), str(tmp_path / "lora"), *pattern]) == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {n: k for n, k in found["layers"].items() if k}


def test_json_prints_the_file_and_the_ranks_may_be_named(trained, tmp_path, capsys):
    words = ["--budget", "5k", "--ranks", "1,4", "--out", tmp_path, "--json"]
    assert sweep(trained / "nested", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["layers"].values()) <= {0, 1, 4}
    assert found == json.loads((tmp_path / "budget.json").read_text())


@pytest.mark.parametrize(
    ("text", "count"),
    [("59136", 59136), ("2M", 2_000_000), ("1.5m", 1_500_000), ("500k", 500_000), ("1G", 10**9)],
)
def test_counts_of_parameters(text, count):
    assert numbers(text) == count


@pytest.mark.parametrize(
    ("name", "words", "text"),
    [
        (
            "nested",
            ["--budget", "2MB"],
            "argument --budget: '2MB' must be a count above 0 such as 2M or 500k; see anyrank "
            "sweep --help",
        ),
        (
            "nested",
            ["--budget", "0"],
            "argument --budget: '0' must be a count above 0 such as 2M or 500k; see anyrank sweep "
            "--help",
        ),
        (
            "nested",
            ["--budget", "9k", "--tasks", "mmlu", "--tolerance", "0.1"],
            "--tasks does nothing with --budget, which compares losses alone; leave one of them "
            "out",
        ),
        (
            "nested",
            ["--budget", "9k", "--tolerance", "0.1"],
            "--tolerance does nothing with --budget, which compares losses alone; leave one of "
            "them out",
        ),
        (
            "nested",
            ["--budget", "9k", "--exact_match"],
            "--exact_match does nothing with --budget, which compares losses alone; leave one of "
            "them out",
        ),
        (
            "nested",
            ["--budget", "1k"],
            "budget=1,000: rank 1 of all layers holds 1,856 parameters; name at least that",
        ),
        (
            "nested",
            ["--budget", "2M"],
            "budget=2,000,000: rank 8 of all layers holds 14,848 parameters; name less, or leave "
            "--budget out",
        ),
        (
            "nested",
            ["--budget", "9k", "--ranks", "4,16"],
            "TMP/nested: rank 16 must lie in 1..8",
        ),
        (
            "nested",
            ["--budget", "9k", "--limit", "3"],
            "--budget chooses on one half of the rows and reports on the other, but there are 3; "
            "name 4 or more with --dataset or --limit",
        ),
        (
            "dense",
            ["--budget", "9k"],
            "TMP/dense: qahira holds dense blocks, which are no LoRA of any rank; keep the adapter "
            "beside its base, or train a low-rank method",
        ),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(name, words, text, trained, capsys):
    assert sweep(trained / name, *words) == 2
    line = capsys.readouterr().err.splitlines()[-1].replace(str(trained), "TMP")
    assert line == f"anyrank: {text}"
    assert not (trained / name / "budget.json").exists()

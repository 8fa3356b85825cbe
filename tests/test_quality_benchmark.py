"""The arithmetic of benchmarks/quality.py and quality_runs.py, and the cuts of a run."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("quality")


@pytest.fixture
def runs(quality):
    return importlib.import_module("quality_runs")


def test_the_merit_is_the_mean_gap_over_log2_of_the_rank(quality):
    alone = {rank: 3.0 - i / 10 for i, rank in enumerate(quality.RANKS)}
    assert quality.merit(alone, alone) == 0
    worse = alone | {1: alone[1] + 0.7}
    assert quality.merit(worse, alone) == pytest.approx(0.1)


def test_the_best_rate_is_that_of_the_lowest_mean_and_never_one_that_diverged(quality, runs):
    found = {
        runs.Run("m", rate, 1): {"": dict.fromkeys(quality.RANKS, loss)}
        for rate, loss in (("1", 3.0), ("2", 2.9), ("3", math.nan))
    }
    found[runs.Run("m", "3", 2)] = {"": dict.fromkeys(quality.RANKS, 0.0)}  # another seed
    assert runs.best_rate(found, "m", "", 1) == "2"


def test_lora_of_each_rank_becomes_one_row(quality):
    rates = dict.fromkeys(quality.LORA, "1e-2") | {"other": "1"}
    by_seed = {
        name: [{rank: float(rank)}, {rank: rank + 1.0}]
        for name, rank in zip(quality.LORA, quality.RANKS, strict=True)
    } | {"other": [{rank: rank + 0.5 for rank in quality.RANKS}] * 2}
    quality.join_lora(rates, by_seed)
    assert set(by_seed) == {"other", "LoRA of each rank"}
    found = quality.summary(rates, by_seed)
    assert list(found) == ["LoRA of each rank", "other"]
    assert found["LoRA of each rank"]["mean"][8] == 8.5
    assert found["other"]["merit"] == pytest.approx(0.0)
    assert found["other"]["merit_sd"] == pytest.approx(0.5**0.5)


def test_a_cut_keeps_the_product_and_orders_its_rows(runs, tmp_path):
    torch.manual_seed(0)
    run, out = tmp_path / "run", tmp_path / "cut"
    run.mkdir()
    a, b = torch.randn(4, 9), torch.randn(7, 4)
    save_file({"q.anyrank_A": a, "q.anyrank_B": b}, run / "adapter_model.safetensors")
    for name in ("config.yaml", "result.json", "sweep.json"):
        (run / name).write_text("{}")
    for how in ("prefix", "svd"):
        runs.write_cut(run, out, how)
        assert sorted(p.name for p in out.iterdir()) == [
            "adapter_model.safetensors", "config.yaml", "result.json",
        ]  # fmt: skip
        tensors = load_file(out / "adapter_model.safetensors")
        a_cut, b_cut = tensors["q.anyrank_A"], tensors["q.anyrank_B"]
        assert torch.allclose(b_cut @ a_cut, b @ a, atol=1e-5)
        assert torch.equal(a_cut, a) == (how == "prefix")
    sigma = torch.linalg.svdvals(b @ a)[:4]
    assert torch.allclose(a_cut.norm(dim=1) * b_cut.norm(dim=0), sigma, atol=1e-5)

"""The arithmetic of benchmarks/quality.py and quality_runs.py, and the cuts of a run."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from itertools import pairwise
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


def test_runs_of_each_rank_become_one_row_and_the_last_of_them_is_the_measure(quality):
    by_seed = {"other": [{rank: rank + 0.5 for rank in quality.RANKS}] * 2}
    for more, names in zip((9.0, 0.0), quality.ALONE.values(), strict=True):
        for name, rank in zip(names, quality.RANKS, strict=True):
            by_seed[name] = [{rank: rank + more}, {rank: rank + more + 1.0}]
    rates = dict.fromkeys(by_seed, "1e-2")
    for row in quality.ALONE:
        quality.join(rates, by_seed, row)
    assert set(by_seed) == set(rates) == {"other", *quality.ALONE}
    found = quality.summary(rates, by_seed)
    assert list(found) == [*quality.ALONE, "other"]
    first, last = quality.ALONE
    assert found[last]["mean"][8] == 8.5
    assert found[last]["merit"] == 0
    assert found[first]["merit"] == pytest.approx(9.0)
    assert found["other"]["merit"] == pytest.approx(0.0)
    assert found["other"]["merit_sd"] == pytest.approx(0.5**0.5)


def test_every_plan_sees_as_many_rows(quality, runs, monkeypatch, tmp_path):
    taken = {}

    def anyrank(self, *words):
        options = dict(pairwise(words))
        batch = options["--per_device_train_batch_size"] * options["--gradient_accumulation_steps"]
        taken[options["--output_dir"]] = batch * options["--max_steps"]

    monkeypatch.setattr(runs.Bench, "anyrank", anyrank)
    chosen = argparse.Namespace(out=tmp_path, steps=250, model="m", data=tmp_path, limit=1, jobs=1)
    bench = runs.Bench(chosen, quality.PLANS)
    for name, plan in quality.PLANS.items():
        if not (plan.cut or plan.layer):
            bench.train(runs.Run(name, "1", 1), name)
            assert taken[name] == pytest.approx(2000 * plan.compute, abs=plan.rows)


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

"""The layers of other papers in benchmarks/claims.py, against their equations; its plans."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyrank.kernels import AffineFormat
from anyrank.quant.affine import AffineLinear
from anyrank.quantize.minmax import minmax
from anyrank.training.parse import parse_train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module


def base(tile: tuple[int, int]) -> AffineLinear:
    torch.manual_seed(0)
    form = AffineFormat(4, tile)
    layer = AffineLinear(64, 48, form)
    layer.codes, layer.scales, layer.offsets, _ = minmax(torch.randn(48, 64), form)
    return layer


@pytest.mark.parametrize("tile", [(1, 32), (8, 4)])
def test_scales_move_weights_about_their_zero_points(tile, script):
    layer = base(tile)
    trained = script("other_layers").Scales(layer, argparse.Namespace())
    x = torch.randn(3, 64)
    torch.testing.assert_close(trained(x), layer(x))
    with torch.no_grad():
        trained.change.normal_()
    zero = -layer.offsets.float() / layer.scales.float()
    scales = layer.scales.float() * (1 + trained.change)

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)

    codes = (layer.affine.weight() - spread(layer.offsets.float())) / spread(layer.scales.float())
    wanted = x @ (spread(scales) * (codes - spread(zero))).T
    torch.testing.assert_close(trained(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooled", [1, 32])
def test_skips_start_as_the_base_and_add_means_and_copies(pooled, script):
    layer = base((1, 32))
    chosen = argparse.Namespace(rank=8, alpha=16, pool=pooled)
    trained = script("other_layers").Skips(layer, chosen)
    x = torch.randn(3, 64)
    torch.testing.assert_close(trained(x), layer(x))
    with torch.no_grad():
        trained.b.normal_()
        trained.skips.copy_(torch.tensor([0.5, 0.25]))
    z = x.unflatten(-1, (-1, pooled)).mean(-1)
    means = z.unflatten(-1, (8, -1)).mean(-1) if pooled == 1 else z.repeat_interleave(4, -1)
    u = z @ trained.a.T + 0.5 * means
    wanted = layer(x) + 2 * (u @ trained.b.T + 0.25 * u.repeat_interleave(6, -1))
    torch.testing.assert_close(trained(x), wanted)


def test_a_matryoshka_row_counts_the_ranks_that_it_is_part_of(script):
    layer = torch.nn.Linear(6, 5)
    chosen = argparse.Namespace(rank=4, ranks=[1, 2, 4])
    trained = script("other_layers").Matryoshka(layer, chosen)
    x = torch.randn(3, 6)
    assert torch.equal(trained(x), layer(x))
    with torch.no_grad():
        trained.b.normal_()
    each = {}
    for trained.rank in (1, 2, 4):
        a, b = trained.a[: trained.rank], trained.b[:, : trained.rank]
        each[trained.rank] = trained(x) - layer(x)
        torch.testing.assert_close(each[trained.rank], trained.rank**-0.5 * x @ a.T @ b.T)
    trained.rank = 0
    torch.testing.assert_close(trained(x) - layer(x), sum(each.values()))


def test_every_plan_is_a_run_that_parses(script):
    claims, runs = script("claims"), script("quality_runs")
    plans = {name: plan for group in claims.GROUPS.values() for name, plan in group.items()}
    assert len({runs.Run(name, "1", 1).folder for name in plans}) == len(plans)
    for plan in plans.values():
        if not plan.cut and not plan.layer:
            words = ["--output_dir", "x", "--gradient_accumulation_steps", str(plan.parts)]
            _, adapter, _, _ = parse_train([*plan.options.split(), *words])
            assert adapter.config().method in ("lora", "qbara", "qalora", "qablora", "qahira")

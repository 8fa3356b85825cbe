"""benchmarks/falcon40b.py: the sum that chooses how gradients are held, and both ways to do it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GIB = 2**30


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import falcon40b

    yield falcon40b
    del sys.modules["falcon40b"], sys.modules["step_worker"]


def test_budget_of_falcon_40b(benchmark: Any) -> None:
    parts = benchmark.budget(benchmark.falcon(1))
    weights = 60 * 8192 * (9216 + 8192 + 32768 + 32768)
    assert parts["codes"] == pytest.approx(weights * (0.5 + 1 / 64 + 4 / 64 / 256))
    assert parts["floats"] == 2 * (65024 * 8192 + 60 * 4 * 8192 + 2 * 8192)
    assert parts["adapter"] == 4 * 444_334_080
    on_card = sum(parts.values()) - parts["moments"]
    assert 24 * GIB < on_card < 32 * GIB
    assert on_card - parts["gradients"] - parts["copies"] < 22.5 * GIB


def test_freeing_gradients_by_layer_makes_the_same_steps(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "CLIP", 1e9)  # layer by layer nothing can be clipped
    config = benchmark.falcon(64)
    ids = torch.randint(config.vocab_size, (2, 24))
    kept, freed = (benchmark.Training(config, "cpu", frees=frees) for frees in (False, True))
    for number in range(3):
        assert torch.equal(kept.step(number, ids), freed.step(number, ids))
    for ours, theirs in zip(freed.trained, kept.trained, strict=True):
        assert torch.equal(ours, theirs)


def test_counted_steps_hold_the_draw_that_copies_most(benchmark: Any) -> None:
    from anyrank import Schedule

    draws = [Schedule(64)(i, benchmark.STEPS, benchmark.SEED) for i in range(benchmark.STEPS)]
    assert (1,) in [draw.ranks for draw in draws[benchmark.WARM :]]

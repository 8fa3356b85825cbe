"""Dropout by gaps: the law of independent zeros, one mask per input, and its transpose."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from anyrank.kernels import dropout
from anyrank.kernels.shared import _recent, shared


def draw(x: torch.Tensor, p: float, reader: int) -> torch.Tensor:
    return dropout.drop(x, x.detach(), p, reader).x


@pytest.mark.parametrize("p", [0.001, 0.05, 0.2])
def test_zeros_come_at_the_rate_p_each_place_alike_and_independent_of_the_one_before(p):
    torch.manual_seed(0)
    n, draws = 1000, 2000
    zeros = torch.zeros(draws, n)
    for row in zeros:
        at = dropout.zero_positions(n, p)
        assert at.dtype == torch.int32
        row[at.long()] = 1
    error = (p * (1 - p) / (n * draws)) ** 0.5
    assert abs(zeros.mean() - p) < 4 * error
    places = zeros.mean(0)
    assert (places - p).abs().max() < 7 * (p * (1 - p) / draws) ** 0.5
    assert abs(places[0] - p) < 4 * (p * (1 - p) / draws) ** 0.5
    assert abs(places[-1] - p) < 4 * (p * (1 - p) / draws) ** 0.5
    pairs = (zeros[:, 1:] * zeros[:, :-1]).mean()
    assert abs(pairs - p * p) < 5 * (p * p / (n * draws)) ** 0.5


def test_a_draw_that_falls_short_goes_on(monkeypatch):
    torch.manual_seed(0)
    whole = dropout.zero_positions(5000, 0.1)
    real, sizes = dropout._steps, []

    def few(count: int, p: float) -> torch.Tensor:
        sizes.append(count)
        return real(3, p)

    monkeypatch.setattr(dropout, "_steps", few)
    at = dropout.zero_positions(5000, 0.1)
    assert len(sizes) > 100
    assert (at.diff() > 0).all()
    assert at.min() >= 0
    assert at.max() < 5000
    assert abs(len(at) - len(whole)) < 150


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def default_dtype(request) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
def test_steps_follow_the_geometric_law():
    torch.manual_seed(0)
    p, n = 0.05, 1_000_000
    steps = dropout._steps(n, p).double()
    assert steps.min() == 1
    for k in (1, 2, 3, 10, 50):
        share = p * (1 - p) ** (k - 1)
        assert abs((steps == k).double().mean() - share) < 4 * (share / n) ** 0.5
    assert abs(steps.mean() - 1 / p) < 4 / p / n**0.5


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5])
def test_zeros_are_where_they_are_said_to_be(p):
    torch.manual_seed(0)
    x = torch.randn(40, 30, dtype=torch.float64)
    result = dropout.dropped(x, p)
    factor = result.x / x
    assert set(factor.unique().tolist()) == ({1.0} if p < 1e-6 else {0.0, 1.0})
    z = torch.randn_like(x)
    assert torch.equal(dropout.zero_(z.clone(), result.at), z * factor)
    assert result.at.dtype == (torch.int32 if p == 0.05 else torch.bool)
    assert result.at.nbytes < x.numel() * 1.01


def test_readers_of_one_input_share_its_mask_and_a_reader_who_comes_again_gets_another():
    torch.manual_seed(0)
    x = torch.randn(20, 30)
    first = draw(x, 0.1, 1)
    assert torch.equal(draw(x, 0.1, 2), first)
    second = draw(x, 0.1, 1)
    assert not torch.equal(second, first)
    assert torch.equal(draw(x, 0.1, 2), second)
    assert not torch.equal(draw(x.clone(), 0.1, 3), second)


def test_one_seed_is_one_mask():
    x = torch.randn(20, 30)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(draw(x.clone(), 0.1, 1))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_what_is_shared_goes_with_its_input_and_with_a_change_of_it():
    x = torch.ones(3)
    first, second = torch.full((3,), 2.0), torch.full((3,), 4.0)
    assert shared(x, "twice", lambda: first) is first
    assert shared(x, "twice", lambda: second) is first
    x.add_(1)
    assert shared(x, "twice", lambda: second) is second
    del x
    gc.collect()
    assert not _recent.entries


def test_only_the_latest_inputs_are_remembered():
    inputs = [torch.ones(3) for _ in range(6)]
    made = [shared(x, "twice", lambda x=x: x * 2) for x in inputs]
    again = [shared(x, "twice", lambda x=x: x * 2) for x in reversed(inputs)]
    same = [a is b for a, b in zip(made, reversed(again), strict=True)]
    assert same == [False, False, True, True, True, True]


def test_nothing_shared_carries_a_gradient():
    x = torch.ones(3, requires_grad=True)
    assert not shared(x, "twice", lambda: x * 2).requires_grad

"""The rule that chooses a rank: by hand, in simulations, and at its edges."""

from __future__ import annotations

import math
import random
from statistics import mean

import pytest

from anyrank.sweep.choose import (
    NEGLIGIBLE,
    Difference,
    choose_within_error,
    differences,
    paired_difference,
)

NAN = math.nan


def test_the_difference_and_its_error_by_hand():
    # differences 1, 0, 2, 1 over 1, 2, 3, 4 tokens: D = 4 / 10; residuals 0.6, -0.8, 0.8, -0.6
    found = paired_difference([3.0, 5.0, 8.0, 9.0], [2.0, 5.0, 6.0, 8.0], [1, 2, 3, 4])
    assert found.mean == pytest.approx(0.4)
    assert found.se == pytest.approx(math.sqrt(4 / 3 * (0.36 + 0.64 + 0.64 + 0.36)) / 10)


def test_with_equal_lengths_it_is_the_standard_error_of_a_mean():
    found = paired_difference([1.0, 4.0, 7.0], [0.0, 0.0, 0.0], [1, 1, 1])
    assert found == pytest.approx((4.0, 3 / math.sqrt(3)))  # deviation 3 over sqrt(3 rows)


def test_a_longer_row_weighs_more_and_a_hard_one_does_not():
    nats, best, tokens = [10.0, 1000.0], [8.0, 1000.0], [2, 8]
    assert paired_difference(nats, best, tokens).mean == pytest.approx(0.2)
    harder = paired_difference([10.0, 9000.0], [8.0, 9000.0], tokens)
    assert harder == pytest.approx(paired_difference(nats, best, tokens))


def test_the_jackknife_over_rows_agrees():
    rng = random.Random(0)
    tokens = [rng.randint(40, 160) for _ in range(200)]
    best = [t * rng.gauss(3, 0.5) for t in tokens]
    nats = [b + t * rng.gauss(0.01, 0.05) for b, t in zip(best, tokens, strict=True)]
    d, t = [a - b for a, b in zip(nats, best, strict=True)], sum(tokens)
    without = [(sum(d) - d[i]) / (t - tokens[i]) for i in range(200)]
    jackknife = math.sqrt(199 / 200 * sum((x - mean(without)) ** 2 for x in without))
    assert paired_difference(nats, best, tokens).se == pytest.approx(jackknife, rel=0.02)


def simulated(seed: int, above: float, rows: int = 100) -> dict[int, list[float]]:
    """Nats of rank 8, and of rank 64 which is truly better by `above` standard errors."""
    rng = random.Random(seed)
    tokens = [rng.randint(40, 160) for _ in range(rows)]
    hard = [t * rng.gauss(3.0, 0.5) for t in tokens]
    noise = 2.0  # nats per row, around a difference of `above` times noise / sqrt(rows) per row
    shift = above * noise / math.sqrt(rows) / mean(tokens)
    small = [h + rng.gauss(0, noise) + shift * t for h, t in zip(hard, tokens, strict=True)]
    return {8: small, 64: hard, 0: tokens}


@pytest.mark.parametrize(("above", "share"), [(0.0, 0.841), (1.0, 0.5), (2.0, 0.159), (4, 0.001)])
def test_the_smaller_rank_is_kept_as_often_as_the_normal_law_says(above, share):
    kept = 0
    for seed in range(2000):
        rows = simulated(seed, above)
        found = paired_difference(rows[8], rows[64], rows[0])
        kept += found.mean <= found.se
    assert abs(kept / 2000 - share) < 0.025  # two and a half binomial standard errors, at most


def test_the_interval_of_two_standard_errors_covers_the_truth():
    inside = 0
    for seed in range(2000):
        rows = simulated(seed, above=1.0)
        truth = 2.0 / 10 / mean(rows[0])
        found = paired_difference(rows[8], rows[64], rows[0])
        inside += abs(found.mean - truth) <= 1.96 * found.se
    assert 0.93 <= inside / 2000 <= 0.965


def test_the_whole_rule_keeps_the_smaller_of_equal_ranks():
    # the best of the two is known from the same rows: where rank 8 is the best itself it is chosen
    chosen = []
    for seed in range(500):
        rows = simulated(seed, above=0.0)
        chosen.append(choose_within_error(differences({8: rows[8], 64: rows[64]}, rows[0]), 0.0))
    assert 0.8 < chosen.count(8) / 500 < 0.88


@pytest.mark.parametrize(
    ("nats", "chosen"),
    [
        ({1: [5.0, 9.0, 7.5], 8: [4.0, 8.0, 6.0], 64: [4.0, 8.0, 6.0]}, 8),  # identical losses
        ({1: [4.0, 9.0, 6.0], 8: [4.0, 8.0, 6.0], 64: [4.0, 8.0, 6.0]}, 1),  # D = 1/6, se = 0.204
        ({1: [NAN, 1.0, 1.0], 8: [4.0, 8.0, 6.0], 64: [3.0, 7.0, 5.0]}, 64),
        ({1: [math.inf, 1.0, 1.0], 8: [4.0, 8.0, 6.0]}, 8),
        ({8: [NAN, NAN, NAN], 64: [NAN, 1.0, 1.0]}, None),
        ({64: [1.0, 1.0, 1.0]}, 64),
        ({}, None),
    ],
)
def test_the_smallest_rank_within_one_standard_error_is_chosen(nats, chosen):
    assert choose_within_error(differences(nats, [2, 2, 2])) == chosen


def test_one_row_has_no_standard_error_and_the_best_is_chosen():
    found = differences({1: [5.0], 8: [4.0], 64: [4.5]}, [10])
    assert [d.mean for d in found.values()] == pytest.approx([0.1, 0.0, 0.05])
    assert all(math.isnan(d.se) for d in found.values())
    assert choose_within_error(found) == 8


def test_what_many_rows_make_certain_may_still_be_negligible():
    found = {1: Difference(0.0019, 1e-5), 8: Difference(0.0002, 1e-6), 64: Difference(0.0, 0.0)}
    assert choose_within_error(found) == 1
    assert choose_within_error(found, negligible=0.0) == 64
    assert choose_within_error({1: Difference(0.03, 0.04), 64: Difference(0, 0)}) == 1
    assert NEGLIGIBLE < 0.02

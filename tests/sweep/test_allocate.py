"""The knapsack over layers: against every choice there is, and the ladder it chooses from."""

from __future__ import annotations

import itertools
import random

import pytest

from anyrank.sweep.allocate import allocate, ladder, nearby, size


def test_the_ladder_doubles_with_a_step_between():
    assert ladder(8) == [0, 1, 2, 3, 4, 6, 8]
    assert ladder(10) == [0, 1, 2, 3, 4, 6, 8, 10]
    assert ladder(64)[-5:] == [16, 24, 32, 48, 64]
    assert ladder(16, unit=4) == [0, 4, 8, 12, 16]
    assert ladder(1) == [0, 1]


@pytest.mark.parametrize(
    ("rank", "near"), [(0, [0, 1, 2]), (4, [2, 3, 4, 6, 8]), (8, [4, 6, 8]), (5, [3, 4, 5, 6, 8])]
)
def test_a_layer_moves_a_few_steps(rank, near):
    assert nearby([0, 1, 2, 3, 4, 6, 8], rank, 2) == near


def test_the_dearer_layer_gets_a_row_only_if_it_gains_more():
    values = {"cheap": {0: 0.0, 1: -1.0, 2: -1.5}, "dear": {0: 0.0, 1: -1.8, 2: -2.0}}
    costs = {"cheap": 10, "dear": 20}
    assert allocate(values, costs, 20) == {"cheap": 2, "dear": 0}  # 1.5 for 20, not 1.8 + 0 left
    assert allocate(values, costs, 30) == {"cheap": 1, "dear": 1}
    assert allocate(values, costs, 60) == {"cheap": 2, "dear": 2}
    assert allocate(values, costs, 0) == {"cheap": 0, "dear": 0}


def test_parameters_that_gain_nothing_are_not_spent():
    values = {"a": {0: 0.0, 4: 0.1}, "b": {0: 0.0, 4: -0.1, 8: -0.1}}
    assert allocate(values, {"a": 3, "b": 5}, 1000) == {"a": 0, "b": 4}


@pytest.mark.parametrize("seed", range(20))
def test_it_is_near_the_best_of_all_choices_and_keeps_the_budget(seed):
    rng = random.Random(seed)
    steps, layers = [0, 1, 2, 4, 8], [f"layer{i}" for i in range(5)]
    costs = {layer: rng.choice([5, 8, 13]) for layer in layers}
    worth = {layer: rng.uniform(0.1, 3) for layer in layers}
    values = {n: {k: worth[n] * 0.7**k for k in steps} for n in layers}  # each row gains less
    budget = rng.randint(40, 200)

    def total(ranks):
        return sum(values[n][k] for n, k in ranks.items())

    every = (dict(zip(layers, ks, strict=True)) for ks in itertools.product(steps, repeat=5))
    best = min(total(ranks) for ranks in every if size(ranks, costs) <= budget)
    found = allocate(values, costs, budget)
    nothing = total(dict.fromkeys(layers, 0))
    assert size(found, costs) <= budget
    assert nothing - total(found) >= 0.9 * (nothing - best)

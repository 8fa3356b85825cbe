"""The search for a rank per layer: what it finds where the answer is known, and where it stops."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import adapted, llama

from anyrank.errors import ConfigError, RankError, RunError
from anyrank.sweep.budget import Search, halves, layer_costs, uniform_rank
from anyrank.sweep.evaluate import evaluation
from anyrank.sweep.gates import gated_layers

USEFUL = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]


def rows(model, count=8, tokens=12):
    """Rows whose next tokens are what the model says itself, so its adapter is what they need."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 128, (1, 1), generator=generator)
        with torch.no_grad():
            for _ in range(tokens):
                ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        found.append({"input_ids": ids[0].tolist(), "labels": [-100, *ids[0].tolist()[1:]]})
    return found


@pytest.fixture(scope="module")
def planted():
    """A model in which two layers alone change anything."""
    model = adapted(llama(), scale="alpha/r", lora_alpha=4).eval()
    for name, layer in gated_layers(model).items():
        layer.anyrank_B["default"].data *= 20 if name in USEFUL else 1e-3
    return model


def test_the_layers_that_matter_get_the_parameters(planted):
    data, costs = rows(planted), layer_costs(planted)
    budget = sum(costs.values())
    start = dict.fromkeys(costs, uniform_rank([0, 1, 2, 4], costs, budget))
    assert set(start.values()) == {1}
    search = Search(planted, data, [0, 1, 2, 3, 4], costs, budget)
    found = search.run(start)
    assert [found[name] for name in USEFUL] == [4, 4]
    assert sum(costs[n] * k for n, k in found.items()) <= budget
    with evaluation(planted):
        assert search.above(search.measure(found), search.measure(start)).mean < -0.1
    assert {layer.adapters["default"].rank for layer in gated_layers(planted).values()} == {4}
    assert search.measured < 60


def test_nothing_that_does_not_lower_the_measured_loss_is_kept(planted, monkeypatch):
    data, costs = rows(planted, 4), layer_costs(planted)

    def wrong(model, rows, ranks, choices):  # praises what is worst
        return {n: {k: -float(4 - k) if n in USEFUL else -k for k in choices[n]} for n in ranks}

    monkeypatch.setattr("anyrank.sweep.budget.estimate", wrong)
    start = dict.fromkeys(costs, 2)
    search = Search(planted, data, [0, 1, 2, 3, 4], costs, 2 * sum(costs.values()))
    found = search.run(start)
    with evaluation(planted):
        assert search.above(search.measure(found), search.measure(start)).mean <= 0
    assert [found[name] for name in USEFUL] != [0, 0]


def test_a_diverged_run_is_named(planted, monkeypatch):
    monkeypatch.setattr("anyrank.sweep.budget.row_nats", lambda *_: [math.nan] * 4)
    costs = layer_costs(planted)
    with pytest.raises(RunError, match="is not finite: the run diverged; train with a lower"):
        Search(planted, rows(planted, 4), [0, 1, 2], costs, 99).run(dict.fromkeys(costs, 1))


@pytest.mark.parametrize(("method", "per_row"), [("qdylora", 128), ("qbara", 64), ("lora_fa", 128)])
def test_a_row_costs_what_its_factors_hold(method, per_row):
    assert layer_costs(adapted(llama(), method))["model.layers.0.self_attn.q_proj"] == per_row


@pytest.mark.parametrize(("budget", "rank"), [(10, 1), (39, 2), (40, 4), (79, 4)])
def test_the_uniform_rank_is_the_largest_that_fits(budget, rank):
    assert uniform_rank([0, 1, 2, 4, 8], {"a": 4, "b": 6}, budget) == rank


@pytest.mark.parametrize(
    ("budget", "kind", "text"),
    [
        (
            9,
            RankError,
            "budget=9: rank 1 of all layers holds 10 parameters; name at least that",
        ),
        (
            8000,
            ConfigError,
            "budget=8,000: rank 800 of all layers holds 8,000 parameters; name less, or leave "
            "--budget out",
        ),
    ],
)
def test_a_budget_that_leaves_nothing_to_choose_is_refused(budget, kind, text):
    with pytest.raises(kind) as error:
        uniform_rank([0, 1, 2, 800], {"a": 4, "b": 6}, budget)
    assert str(error.value) == text


def test_the_halves_share_no_row_and_need_two_rows_each():
    assert halves([{"a": [i]} for i in range(5)]) == (
        [{"a": [0]}, {"a": [2]}, {"a": [4]}], [{"a": [1]}, {"a": [3]}],
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        halves([{}, {}, {}])
    assert str(error.value) == (
        "--budget chooses on one half of the rows and reports on the other, but there are 3; name "
        "4 or more with --dataset or --limit"
    )

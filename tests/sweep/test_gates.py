"""Gate gradients against finite differences, and the loss that a gate stands for."""

from __future__ import annotations

import pytest
import torch
from tiny import adapted, llama, quantized

from anyrank.sweep.evaluate import completion_tokens, evaluation, row_nats
from anyrank.sweep.gates import estimate, gate_gradients, gated_layers, gates

ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
    {"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [-100, 6, 7, 8, 9, 10, 11]},
    {"input_ids": [12, 13], "labels": [-100, 13]},
]
SCALES = ["alpha/r", "alpha/k", "alpha/sqrt(k)"]


def state(model):
    return {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("base", [llama, lambda d: quantized(llama(d), 4, (1, 16))])
def test_gate_gradients_are_those_of_finite_differences(base, scale):
    model = adapted(base(torch.float64), scale=scale, lora_alpha=4).double().eval()
    layers = gated_layers(model)
    ranks = {name: i % 5 for i, name in enumerate(layers)}  # 0, some, or all of the four rows
    config, before = model.peft_config["default"], state(model)
    found = gate_gradients(model, ROWS, ranks)
    after = state(model)
    assert all(torch.equal(before[n][0], p) and before[n][1] == on for n, (p, on) in after.items())
    assert {layer.adapters["default"].rank for layer in layers.values()} == {4}
    whole = {n: layer.anyrank_B["default"].data.clone() for n, layer in layers.items()}
    for n, layer in layers.items():
        layer.anyrank_B["default"].data = whole[n] * gates(config, ranks[n])
    for name in list(layers)[::4]:
        b = layers[name].anyrank_B["default"]
        for i in range(4):
            nats = []
            for step in (1e-2, -1e-2):  # logits pass through float32
                kept = b.data
                b.data = kept.clone()
                b.data[:, i] += step * whole[name][:, i]
                with evaluation(model):
                    nats.append(torch.tensor(row_nats(model, ROWS, 8), dtype=torch.float64))
                b.data = kept
            wanted = (nats[0] - nats[1]) / 2e-2
            assert (found[name][:, i] - wanted).abs().max() < 1e-2 * wanted.abs().max() + 1e-3


@pytest.mark.parametrize("scale", SCALES)
def test_the_estimate_of_a_small_change_is_the_measured_one(scale):
    model = adapted(llama(), scale=scale).eval()
    for layer in gated_layers(model).values():
        layer.anyrank_B["default"].data *= 0.05  # so small that the loss is linear in it
    ranks = dict.fromkeys(gated_layers(model), 2)
    name = "model.layers.1.mlp.down_proj"
    choices = {layer: [0, 1, 2, 3, 4] for layer in ranks}
    found = estimate(model, ROWS, ranks, choices)
    tokens = sum(completion_tokens(ROWS))
    with evaluation(model):
        with model.set_rank(ranks):
            start = sum(row_nats(model, ROWS, 8))
        for k in choices[name]:
            with model.set_rank(ranks | {name: k}):
                true = (sum(row_nats(model, ROWS, 8)) - start) / tokens
            assert found[name][k] == pytest.approx(true, rel=0.1, abs=2e-6)
    assert found[name][2] == 0.0


def test_shrinking_counts_the_curvature_and_growing_does_not():
    model = adapted(llama()).eval()
    ranks = dict.fromkeys(gated_layers(model), 2)
    g = gate_gradients(model, ROWS, ranks)["model.layers.0.self_attn.q_proj"]
    found = estimate(model, ROWS, ranks, {layer: [1, 4] for layer in ranks})
    found, config = found["model.layers.0.self_attn.q_proj"], model.peft_config["default"]
    less, more = (g @ (gates(config, k) - gates(config, 2)) for k in (1, 4))
    assert found[1] == pytest.approx((less.sum() + less.square().sum() / 2).item() / 9)
    assert found[4] == pytest.approx(more.sum().item() / 9)

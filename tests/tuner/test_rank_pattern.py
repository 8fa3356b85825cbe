"""A rank for every layer of a model in use."""

from __future__ import annotations

import pytest
import torch
from tiny import IDS, adapted, layers, llama

from anyrank.errors import ConfigError, RankError
from anyrank.tuner import adapter_layers

NAME = "model.layers.0.mlp.up_proj"


def names(model) -> list[str]:
    return [name for name, _ in adapter_layers(model.get_base_model())]


@pytest.mark.parametrize("method", ["qdylora", "qbara", "lora"])
def test_every_layer_is_cut_to_its_own_rank(method):
    model, cut = adapted(llama(), method), adapted(llama(), method)
    pattern = {name: i % 5 for i, name in enumerate(names(model))}
    for layer, k in zip(layers(cut), pattern.values(), strict=True):
        a = layer.adapters["default"]
        if k:
            layer.anyrank_B["default"].data[:, k:] = 0
            layer.anyrank_B["default"].data *= a.config.scale_of(k) / a.scale
        else:
            layer.anyrank_B["default"].data.zero_()
    whole, wanted = model(IDS).logits, cut(IDS).logits
    with model.set_rank(pattern):
        assert [layer.adapters["default"].rank for layer in layers(model)] == [*pattern.values()]
        assert (model(IDS).logits - wanted).abs().max() < 1e-5
        with model.set_rank(2):
            assert {layer.adapters["default"].rank for layer in layers(model)} == {2}
        assert (model(IDS).logits - wanted).abs().max() < 1e-5
    assert torch.equal(model(IDS).logits, whole)


def test_one_rank_for_all_layers_is_that_rank_to_the_last_bit():
    model = adapted(llama())
    with model.set_rank(3):
        wanted = model(IDS).logits
    with model.set_rank(dict.fromkeys(names(model), 3)):
        assert torch.equal(model(IDS).logits, wanted)


def test_layers_that_are_left_out_give_what_their_base_gives():
    model = adapted(llama())
    model.set_rank(dict.fromkeys(names(model), 0))
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    assert "rank 0/4" in repr(layers(model)[0])
    assert layers(model)[0].get_delta_weight("default").abs().max() == 0
    model.merge_adapter()
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({NAME: 5}, RankError, "adapter 'default': rank 5 must be a whole number in 1..4"),
        ({NAME: -1}, RankError, f"rank pattern: {NAME}: rank -1 must be a whole number from 0"),
        ({NAME: 1.5}, RankError, f"rank pattern: {NAME}: rank 1.5 must be a whole number from 0"),
        (
            {NAME: None},
            RankError,
            f"rank pattern: {NAME} has no rank; name every layer (0 leaves it out)",
        ),
        (
            {"model.layers.0.mlp.up_prj": 1},
            ConfigError,
            "rank pattern: layer 'model.layers.0.mlp.up_prj' is unknown; did you mean "
            "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj or "
            "model.layers.0.self_attn.q_proj?",
        ),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_and_nothing_changes(change, kind, text):
    model = adapted(llama())
    pattern = dict.fromkeys(names(model), 2) | change
    pattern = {name: rank for name, rank in pattern.items() if rank is not None}
    with pytest.raises(kind) as error:
        model.set_rank(pattern)
    found = str(error.value)
    assert found.split("; did you")[0] == text.split("; did you")[0]
    assert {layer.adapters["default"].rank for layer in layers(model)} == {4}


def test_a_dense_core_cannot_be_left_out():
    model = adapted(llama(), "qahira")
    with pytest.raises(RankError, match="its core is one dense matrix without ranks"):
        model.set_rank(dict.fromkeys(names(model), 0))

"""A few layers stand for all: every phase of a whole model, from two or three layers of a kind."""

from __future__ import annotations

import pytest
from runs import CONFIGS, planner, words_of, write_base
from torch import nn

from anyrank.plan import skeleton

LORA = "--method lora --lora_r 8 --gradient_checkpointing"


def config_only(name: str, folder):
    """A folder with nothing but config.json."""
    CONFIGS[name]().save_pretrained(folder)
    return folder


def measured(tmp_path, name: str, checkpointing: str):
    """One step of a model, from a few layers and from all of them."""
    words = words_of(config_only(name, tmp_path), 2, 64, f"{LORA} {checkpointing}")
    part, whole = planner(words), planner(words)
    whole.samples = [list(range(len(whole.kinds)))]
    assert len(part.samples) > 1
    return part.measure(2, 64), whole.measure(2, 64)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_every_phase_of_layers_that_are_alike(tmp_path, checkpointing):
    found, wanted = measured(tmp_path, "llama", checkpointing)
    del wanted.peaks["backward: kind 0, inner"]  # between its neighbours, so never the peak
    assert found.peaks == wanted.peaks
    assert found.kept == wanted.kept


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("gemma3", "false"),
        pytest.param("gemma3", "true", marks=pytest.mark.slow),  # these take seconds each
        pytest.param("moe", "false", marks=pytest.mark.slow),
        pytest.param("moe", "true", marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_layers_of_two_kinds(tmp_path, name, checkpointing):
    found, wanted = (
        max(step.peaks.items(), key=lambda peak: peak[1].total())
        for step in measured(tmp_path, name, checkpointing)
    )
    assert found[0] == wanted[0]
    assert found[1].total() == pytest.approx(wanted[1].total(), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kinds", "samples"),
    [
        ("llama", [0] * 5, [[0, 4], [0, 1, 4]]),
        ("gemma3", [0, 0, 0, 0, 0, 1] * 2, [[0, 5, 10, 11], [0, 1, 5, 10, 11]]),
        ("moe", [0, 1] * 4, [[0, 1, 6, 7], [0, 1, 2, 6, 7], [0, 1, 3, 6, 7]]),
    ],
)
def test_layers_of_a_kind_are_found(tmp_path, name, kinds, samples):
    plan = planner(words_of(config_only(name, tmp_path), 1, 64, f"{LORA} true"))
    assert (plan.kinds, plan.samples) == (kinds, samples)


def test_an_option_that_names_layers_runs_all_of_them(tmp_path):
    more = f"{LORA} true --lora_target_modules .*layers\\.(1|3)\\..*_proj"
    plan = planner(words_of(config_only("llama", tmp_path), 1, 64, more))
    assert plan.samples == [[0, 1, 2, 3, 4]]
    every = planner(words_of(tmp_path, 1, 64, f"{LORA} true"))
    share = plan.estimate(1, 64).parts["adapter"] / every.estimate(1, 64).parts["adapter"]
    assert share == 2 / 5


def test_reentrant_checkpointing_runs_all_layers(tmp_path):
    more = '--gradient_checkpointing_kwargs {"use_reentrant":true}'
    words = words_of(config_only("llama", tmp_path), 1, 64, f"{LORA} true {more}")
    assert planner(words).samples == [[0, 1, 2, 3, 4]]


def test_dropped_layers_leave_their_entries_of_the_config():
    config = CONFIGS["gemma3"]()
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(1, i + 1) for i in range(12))
    model.config = config
    skeleton.keep_layers(model, [0, 5, 11])
    assert [layer.out_features for layer in model.layers] == [1, 6, 12]
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]


def test_the_base_has_the_bytes_that_its_layers_have(tmp_path):
    """Counted by hand: 4-bit codes and two scales per 32 weights, and the rest in bfloat16."""
    base = write_base("llama", tmp_path, codes=True)
    more = "--method qalora --lora_r 4 --gradient_checkpointing true"
    parts = planner(words_of(base, 1, 32, more)).estimate(1, 32).parts
    linear = 5 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128)
    assert parts["base codes"] == linear // 2
    assert parts["base scales"] == linear // 32 * 2 * 2
    rotary = 2 * 16 * 4
    assert parts["base float"] == 2 * (2 * 512 * 128 + 11 * 128) + rotary
    adapter = 4 * 4 * 5 * (2 * (4 + 128) + 2 * (4 + 64) + 2 * (4 + 352) + (11 + 128))
    assert (parts["adapter"], parts["optimizer"]) == (adapter, 2 * adapter + 5 * 7 * 2 * 4)

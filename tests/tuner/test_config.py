"""The configuration: what follows from the method, what is refused, what is saved."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig

from anyrank import AnyRankConfig, Schedule
from anyrank.errors import ConfigError, RankError
from anyrank.tuner import PEFT_TYPE

UNKNOWN = "{} is unknown; did you mean {}?"
DORA = UNKNOWN.format("method='dora'", "dylora, lora or qdylora")
SANDWHICH = UNKNOWN.format("schedule='sandwhich'", "sandwich")
SCALE = UNKNOWN.format("scale='alpha'", "alpha/r, alpha/k or alpha/sqrt(k)")


def test_none_follows_the_method():
    config = AnyRankConfig(method="qbara", r=8)
    assert (config.pool, config.repeat, config.nested, config.scale) == (2, 2, False, "alpha/r")
    assert config.rows == 16
    assert config.rank_schedule() == Schedule(16, kind="full")


def test_nested_takes_the_scale_of_the_rank_in_use_unless_told_otherwise():
    assert AnyRankConfig(method="qdylora").scale == "alpha/k"
    assert AnyRankConfig(method="qbara", nested=True).scale == "alpha/k"
    assert AnyRankConfig(method="qdylora", scale="alpha/r").scale == "alpha/r"


def test_the_schedule_is_part_of_the_configuration():
    config = AnyRankConfig(method="qdylora", r=8, ranks=[2, 4, 8], rank_unit=2, ranks_per_step=2)
    assert config.rank_schedule() == Schedule(8, ranks=(2, 4, 8), unit=2, per_step=2)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"method": "dora"}, ConfigError, DORA),
        ({"r": 0}, RankError, "r=0 must be a whole number, at least 1"),
        ({"r": 8.5}, RankError, "r=8.5 must be a whole number, at least 1"),
        ({"nested": "false"}, ConfigError, "nested='false' must be True, False or None"),
        (
            {"method": "qlora", "ranks": [1, 2]},
            ConfigError,
            "ranks=[1, 2] chooses among nested ranks, but method='qlora' trains its largest rank "
            "alone; add nested=True, or leave ranks out",
        ),
        (
            {"r": 8, "ranks": [1, 4]},
            RankError,
            "ranks=[1, 4] must hold the largest rank, 8, or its last rows would never be trained; "
            "add it, or lower r",
        ),
        ({"lora_alpha": 0}, ConfigError, "lora_alpha=0 must be positive"),
        ({"lora_dropout": 1.0}, ConfigError, "lora_dropout=1.0 must lie in [0, 1)"),
        ({"scale": "alpha"}, ConfigError, SCALE),
        ({"schedule": "sandwhich"}, ConfigError, SANDWHICH),
        (
            {"method": "qahira", "nested": True},
            ConfigError,
            "method='qahira' holds one dense matrix, which has no ranks to nest; use a low-rank "
            "method such as qablora for foldable ranks",
        ),
        (
            {"r": 8, "ranks": [1, 16]},
            RankError,
            "schedule rank 16 must be a multiple of rank_unit=1 in 1..8, the largest rank",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_refused(options, kind, text):
    with pytest.raises(kind) as error:
        AnyRankConfig(**options)
    assert str(error.value) == text


def test_a_saved_configuration_reads_back_equal_with_its_facts_beside_it(tmp_path):
    config = AnyRankConfig(method="qbara", r=8, nested=True, ranks=[4, 16], target_modules=["q"])
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, AnyRankConfig)
    assert again.peft_type == PEFT_TYPE
    assert again.to_dict() == config.to_dict()
    facts = json.loads((tmp_path / "anyrank.json").read_text())
    assert facts.pop("anyrank")
    assert facts == {
        "method": "qbara",
        "largest_rank": 16,
        "nested": True,
        "scale": "alpha/k",
        "alpha": 16.0,
        "pool": 2,
        "repeat": 2,
    }


@pytest.mark.parametrize(
    ("options", "schedule", "scale"),
    [
        ({"method": "anyrank"}, "settle", "alpha/r"),
        ({"method": "anyrank", "nested": True}, "settle", "alpha/r"),
        ({"method": "qdylora"}, "uniform", "alpha/k"),
        ({"method": "qdylora", "schedule": "settle"}, "settle", "alpha/r"),
        ({"method": "qalora", "nested": True}, "uniform", "alpha/k"),
        ({"method": "qalora", "nested": True, "schedule": "settle"}, "settle", "alpha/r"),
        ({"method": "anyrank", "nested": False}, None, "alpha/r"),
        ({"method": "qlora"}, None, "alpha/r"),
    ],
)
def test_schedule_and_scale_follow_the_method(options, schedule, scale):
    config = AnyRankConfig(**options)
    assert (config.schedule, config.scale) == (schedule, scale)


def test_settling_needs_one_scale_for_all_ranks():
    with pytest.raises(ConfigError) as error:
        AnyRankConfig(scale="alpha/k")
    assert str(error.value) == (
        "schedule='settle' cuts low ranks from the largest one, which needs one scale for all of "
        "them: scale='alpha/r', got 'alpha/k'; leave scale out, or use schedule='uniform'"
    )

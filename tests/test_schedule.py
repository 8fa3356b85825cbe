"""Schedules: pure functions of (step, total, seed)."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from anyrank.errors import ConfigError, RankError
from anyrank.schedule import SLOWLY, Draw, Schedule

PINNED = [8, 36, 30, 3, 2, 39, 31, 48]
SANDWHICH = "schedule='sandwhich' is unknown; did you mean sandwich?"


def draws(schedule: Schedule, steps: int = 4000, seed: int = 0) -> list[Draw]:
    return [schedule(step, steps, seed) for step in range(steps)]


def test_uniform_draws_every_rank_about_equally_often():
    counts = Counter(draw.ranks[0] for draw in draws(Schedule(8)))
    assert set(counts) == set(range(1, 9))
    assert all(430 < count < 570 for count in counts.values())


def test_a_list_and_a_unit_restrict_the_ranks():
    assert {d.ranks[0] for d in draws(Schedule(64, ranks=(1, 2, 64)), 200)} == {1, 2, 64}
    assert {d.ranks[0] for d in draws(Schedule(12, unit=4), 200)} == {4, 8, 12}


def test_frozen_trains_only_the_last_unit_of_the_prefix():
    for draw in draws(Schedule(12, unit=4, frozen=True), 50):
        assert draw.first == draw.ranks[0] - 4
        assert draw.trained == range(draw.ranks[0] - 4, draw.ranks[0])


def test_several_ranks_per_step_are_distinct_and_train_up_to_the_largest():
    schedule = Schedule(16, per_step=3)
    assert schedule.draws == 3
    for draw in draws(schedule, 50):
        assert len(set(draw.ranks)) == 3
        assert draw.trained == range(max(draw.ranks))


def test_sandwich_is_the_largest_the_smallest_and_one_between():
    schedule = Schedule(16, kind="sandwich")
    assert schedule.draws == 3
    found = [draw.ranks for draw in draws(schedule, 300)]
    assert {ranks[:2] for ranks in found} == {(16, 1)}
    assert {ranks[2] for ranks in found} == set(range(2, 16))


@pytest.mark.parametrize(("ranks", "wanted"), [((4,), (4,)), ((2, 4), (4, 2))])
def test_a_short_sandwich_repeats_no_rank(ranks, wanted):
    schedule = Schedule(4, kind="sandwich", ranks=ranks)
    assert schedule(0, 1, 0).ranks == wanted
    assert schedule.draws == len(wanted)


def test_full_is_always_the_largest():
    assert {draw.ranks for draw in draws(Schedule(8, kind="full"), 20)} == {(8,)}


def test_draws_follow_seed_and_step_and_leave_the_global_state_alone():
    random.seed(7)
    before = random.getstate()
    first = draws(Schedule(64), 30, seed=1)
    assert random.getstate() == before
    random.seed(8)
    assert draws(Schedule(64), 30, seed=1) == first
    assert draws(Schedule(64), 30, seed=2) != first


def test_a_draw_is_the_same_on_every_machine():
    ranks = [Schedule(64)(step, 100, 42).ranks[0] for step in range(8)]
    assert ranks == PINNED


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"kind": "sandwhich"}, ConfigError, SANDWHICH),
        ({"unit": 3}, ConfigError, "rank_unit=3 must divide the rank 8"),
        (
            {"ranks": (4, 16)},
            RankError,
            "schedule rank 16 must be a multiple of rank_unit=1 in 1..8, the largest rank",
        ),
        (
            {"ranks": (1, 2), "per_step": 3},
            ConfigError,
            "ranks_per_step=3 must lie in 1..2, the number of ranks to choose from",
        ),
        (
            {"kind": "settle", "per_step": 2},
            ConfigError,
            "ranks_per_step=2 draws several ranks at random, which schedule='settle' does not; use "
            "schedule='uniform', or leave it out",
        ),
        (
            {"frozen": True, "kind": "sandwich"},
            ConfigError,
            "frozen_rows trains one prefix per step: it needs schedule='uniform' and "
            "ranks_per_step=1, got 'sandwich' and 1",
        ),
    ],
)  # fmt: skip
def test_a_schedule_that_makes_no_sense_is_refused(options, kind, text):
    with pytest.raises(kind) as error:
        Schedule(8, **options)
    assert str(error.value) == text


def test_settle_trains_the_largest_rank_and_then_all_in_turn():
    schedule = Schedule(64, kind="settle")
    found = draws(schedule, 10)
    assert found[:7] == [Draw((64,), apart=True)] * 6 + [Draw((64,), order=0, apart=True)]
    assert [draw.ranks for draw in found[7:]] == [
        (1, 2, 64, 1, 4, 64),
        (2, 64, 1, 4, 64, 1),
        (64, 1, 4, 64, 1, 2),
    ]
    assert [draw.order for draw in found[7:]] == [None, None, 4]
    assert all(draw.apart for draw in found)
    speeds = found[7].speeds
    assert [speeds[rank] for rank in (1, 2, 4)] == [8.0, 32**0.5, 4.0]
    assert speeds[64] == SLOWLY
    assert (schedule.draws, schedule.parts) == (1, 4)


@pytest.mark.parametrize(
    ("options", "turns", "order"),
    [
        ({"rows": 3}, (1, 2, 3), 2),
        ({"rows": 2}, (1, 2), 1),
        ({"rows": 1}, (1,), None),
        ({"rows": 16, "unit": 4}, (4, 8, 16), 8),
        ({"rows": 32, "ranks": (2, 8, 16, 24, 32)}, (2, 8, 32, 2, 16, 32), 16),
    ],
)
def test_settle_takes_the_lowest_ranks_that_there_are_and_orders_the_others(options, turns, order):
    schedule = Schedule(kind="settle", **options)
    assert schedule(70, 100, 0).ranks == turns
    assert [schedule(step, 100, 0).order for step in (69, 70, 98, 99)] == [0, None, None, order]
    assert schedule.parts == 4


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 5])
def test_settle_gives_every_turn_the_same_share_however_many_a_step_takes(micro_batches):
    found = draws(Schedule(64, kind="settle"), 20)[14:]
    counts = Counter(rank for draw in found for rank in draw.ranks[:micro_batches])
    assert [counts[rank] / micro_batches for rank in (1, 2, 4, 64)] == [2, 1, 1, 2]


def test_settle_never_orders_an_adapter_that_was_not_trained():
    assert [draw.order for draw in draws(Schedule(8, kind="settle"), 1)] == [0]
    assert [draw.order for draw in draws(Schedule(8, kind="settle"), 2)] == [0, 4]

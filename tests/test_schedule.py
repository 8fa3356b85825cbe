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


def test_settle_turns_earlier_in_a_long_run_and_takes_one_rank_more():
    found = draws(Schedule(64, kind="settle"), 1000)
    assert found[:400] == [Draw((64,), apart=True)] * 399 + [Draw((64,), order=0, apart=True)]
    assert [draw.ranks for draw in found[400:402]] == [
        (1, 64, 2, 64, 4, 64, 8, 64),
        (64, 2, 64, 4, 64, 8, 64, 1),
    ]
    assert found[400].speeds == {1: 8.0, 2: 32**0.5, 4: 4.0, 8: 8**0.5}  # 64 at its usual one
    assert [draw.order for draw in found[-2:]] == [None, 8]


@pytest.mark.parametrize(("total", "start"), [(10, 7), (750, 525), (751, 300), (10000, 4000)])
def test_a_run_is_long_from_751_steps_on(total, start):
    schedule = Schedule(64, kind="settle")
    assert [schedule(step, total, 0).order for step in (start - 2, start - 1)] == [None, 0]
    assert schedule(start, total, 0).ranks[0] == 1


@pytest.mark.parametrize(
    ("options", "short", "long"),
    [
        ({"rows": 3}, (1, 2, 3), (1, 3, 2, 3)),
        ({"rows": 2}, (1, 2), (1, 2)),
        ({"rows": 1}, (1,), (1,)),
        ({"rows": 16, "unit": 4}, (4, 8, 16), (4, 16, 8, 16)),
        (
            {"rows": 32, "ranks": (2, 8, 16, 24, 32)},
            (2, 8, 32, 2, 16, 32),
            (2, 32, 8, 32, 16, 32, 24, 32),
        ),
    ],
)
def test_settle_takes_the_lowest_ranks_that_there_are_and_orders_the_others(options, short, long):
    schedule = Schedule(kind="settle", **options)
    assert schedule.parts == 4
    for turns, total, start in ((short, 100, 70), (long, 1000, 400)):
        assert schedule(start, total, 0).ranks == turns
        last = max((rank for rank in turns if rank < schedule.rows), default=None)
        orders = [schedule(step, total, 0).order for step in (start - 1, start, total - 2)]
        assert orders == [0, None, None]
        assert schedule(total - 1, total, 0).order == last


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 5])
def test_settle_gives_every_turn_the_same_share_however_many_a_step_takes(micro_batches):
    def shares(draws):
        counts = Counter(rank for draw in draws for rank in draw.ranks[:micro_batches])
        return {rank: count / micro_batches for rank, count in counts.items()}

    schedule = Schedule(64, kind="settle")
    assert shares(draws(schedule, 20)[14:]) == {1: 2, 2: 1, 4: 1, 64: 2}
    assert shares(draws(schedule, 1000)[400:408]) == {1: 1, 2: 1, 4: 1, 8: 1, 64: 4}


def test_settle_never_orders_an_adapter_that_was_not_trained():
    assert [draw.order for draw in draws(Schedule(8, kind="settle"), 1)] == [0]
    assert [draw.order for draw in draws(Schedule(8, kind="settle"), 2)] == [0, 4]

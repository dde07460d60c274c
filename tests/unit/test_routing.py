"""Which replica gets work: soonest done, away from heat, to what it wants, by chance else."""

import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load_board import LoadBoard
from cluster.routing import PoolLoad, ReplicaLoad, RoutedWork, RoutingSettings, choose_pool

SETTINGS = RoutingSettings()
EXACT = RoutingSettings(blur=0.0, tie=0.0)
WORK = RoutedWork(2.0)
SEEDS = st.integers(0, 2**32).map(Random)


def load(name: str, backlog_s: float = 0.0, **told: object) -> ReplicaLoad:
    return ReplicaLoad(name, backlog_s, **({"age_s": 0.1} | told))  # type: ignore[arg-type]


def rank(
    loads: list[ReplicaLoad], work: RoutedWork, seed: int, settings: RoutingSettings
) -> list[str]:
    board = LoadBoard(settings, seed)
    board.keep([each.id for each in loads])
    for each in loads:
        board.report(each, 1000.0)
    return board.ranked(work, 1000.0)


def ranked(*loads: ReplicaLoad, work: RoutedWork = WORK) -> list[str]:
    return rank(list(loads), work, 0, EXACT)


def test_the_shorter_backlog_over_speed_comes_first() -> None:
    assert ranked(load("a", 9.0), load("b", 4.0), load("c", 30.0)) == ["b", "a", "c"]
    assert ranked(load("slow", 4.0, speed=0.25), load("fast", 9.0)) == ["fast", "slow"]


def test_a_card_near_its_limit_is_used_only_when_all_else_is_far_more_loaded() -> None:
    hot = load("hot", margin_c=2.0)
    assert ranked(hot, load("cool", 5.0, margin_c=20.0)) == ["cool", "hot"]
    assert ranked(hot, load("cool", 60.0, margin_c=20.0)) == ["hot", "cool"]


def test_a_throttled_card_counts_as_one_at_its_limit() -> None:
    assert ranked(load("a", throttled=True), load("b", 5.0)) == ["b", "a"]
    blind = replace(EXACT, heat=False)
    assert rank([load("a", throttled=True), load("b", 5.0)], WORK, 0, blind)[0] == "a"


def test_when_all_are_hot_the_load_decides_again() -> None:
    hot = [load(name, backlog, margin_c=0.0) for name, backlog in (("a", 3.0), ("b", 1.0))]
    assert ranked(*hot) == ["b", "a"]


def test_where_the_governor_holds_a_card_it_is_hardly_avoided() -> None:
    assert ranked(load("held", margin_c=5.0), load("cool", 1.5, margin_c=30.0)) == ["held", "cool"]


def test_what_is_wanted_is_preferred_while_that_is_cheaper_than_waiting() -> None:
    wants = RoutedWork(2.0, {"lora:cats": 0.7, "lora:dogs": 0.4})
    has = load("has", 1.0, holds=frozenset({"lora:cats", "lora:dogs"}))
    one = load("one", 0.7, holds=frozenset({"lora:cats"}))
    assert ranked(load("lacks"), one, has, work=wants) == ["has", "one", "lacks"]
    assert ranked(load("lacks"), replace(has, backlog_s=1.5), work=wants) == ["lacks", "has"]


def test_work_joins_its_like_where_that_is_about_as_soon() -> None:
    joins = RoutedWork(2.0, joins={"size 512x512": 0.2})
    like = load("like", 3.1, holds=frozenset({"size 512x512"}))
    unlike = load("unlike", 3.0, holds=frozenset({"size 1024x1024"}))
    assert ranked(unlike, like, work=joins) == ["like", "unlike"]
    assert ranked(unlike, replace(like, backlog_s=3.3), work=joins) == ["unlike", "like"]
    # There is nothing to join where all is done: who is idle is no further away.
    assert ranked(load("idle"), replace(like, backlog_s=0.1), work=joins) == ["idle", "like"]


def test_without_any_word_the_less_laden_of_two_drawn_ones_comes_first() -> None:
    def first(seed: int) -> str:
        board = LoadBoard(SETTINGS, seed)
        board.keep([f"{number}" for number in range(10)])
        for number in range(10):
            for _ in range(number):
                board.sent(f"{number}", WORK, 0.0)
        return board.ranked(WORK, 0.0)[0]

    found = Counter(first(seed) for seed in range(1000))
    # Power of two choices: the k-th of ten comes first in (9 - k) of 45 pairs, the last never.
    assert found["0"] == pytest.approx(1000 * 9 / 45, rel=0.3)
    assert found["8"] == pytest.approx(1000 * 1 / 45, rel=0.7)
    assert found["9"] == 0


def test_equals_share_and_do_not_all_get_the_same_choice() -> None:
    loads = [load(f"{number}", 3.0) for number in range(8)]
    first = Counter(rank(loads, WORK, seed, SETTINGS)[0] for seed in range(800))
    assert set(first) == {each.id for each in loads}
    assert max(first.values()) < 200


def test_who_has_long_been_silent_is_neither_shunned_nor_stormed() -> None:
    loads = [load(f"{number}", 6.0) for number in range(7)]
    silent = load("silent", 0.0, age_s=60.0)
    first = Counter(rank([*loads, silent], WORK, seed, SETTINGS)[0] for seed in range(500))
    assert 50 < first["silent"] < 450


def test_old_heat_is_forgotten() -> None:
    def first(age_s: float) -> int:
        loads = [load("hot", margin_c=0.0, age_s=age_s), load("other", 1.0, age_s=age_s)]
        return sum(rank(loads, WORK, seed, EXACT)[0] == "hot" for seed in range(50))

    assert first(15.0) == 0
    assert first(300.0) == 50


def test_the_pool_that_will_be_done_first_is_chosen() -> None:
    quick = PoolLoad("h100", soonest_s=8.0, queued_s=30.0, speed=2.0)
    slow = PoolLoad("l4", soonest_s=20.0, kind_speed=0.1, speed=5.0)
    assert choose_pool([quick, slow], WORK, Random(0), EXACT) == "l4"
    assert choose_pool([replace(quick, queued_s=10.0), slow], WORK, Random(0), EXACT) == "h100"


def test_a_pool_without_replicas_is_as_far_as_its_start() -> None:
    empty = PoolLoad("empty", soonest_s=None, start_s=30.0)
    busy = PoolLoad("busy", soonest_s=50.0)
    assert choose_pool([empty, busy], WORK, Random(0), EXACT) == "empty"
    assert choose_pool([empty, replace(busy, soonest_s=20.0)], WORK, Random(0), EXACT) == "busy"
    with pytest.raises(ValueError, match="no pool"):
        choose_pool([], WORK, Random(0), EXACT)


def _some(random: Random) -> list[ReplicaLoad]:
    return [
        ReplicaLoad(
            f"{number}",
            random.choice([0.0, random.uniform(0, 30)]),
            random.uniform(0.1, 1),
            random.choice([None, random.uniform(-5, 30)]),
            random.random() < 0.2,
            random.choice([0.0, 1.0, 7.0, 60.0]),
            frozenset(random.sample(["x", "y"], random.randrange(3))),
        )
        for number in range(random.randrange(1, 12))
    ]


@given(SEEDS)
@settings(deadline=None)
def test_everybody_is_ranked_once(random: Random) -> None:
    loads = _some(random)
    work = RoutedWork(wants={"x": 0.5}, joins={"y": 0.5})
    found = rank(loads, work, random.randrange(2**32), SETTINGS)
    assert sorted(found) == sorted(each.id for each in loads)


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_more_heat_never_ranks_a_replica_higher(random: Random) -> None:
    loads = _some(random)
    at = random.randrange(len(loads))
    margin = loads[at].margin_c
    hotter = replace(
        loads[at],
        margin_c=random.uniform(-5, 30) if margin is None else margin - random.uniform(0, 20),
        throttled=loads[at].throttled or random.random() < 0.5,
        speed=loads[at].speed * random.uniform(0.2, 1),
    )
    chance = random.randrange(2**32)
    after = [*loads[:at], hotter, *loads[at + 1 :]]
    places = (
        rank(each, WORK, chance, replace(SETTINGS, stale_after_s=1000.0)).index(hotter.id)
        for each in (loads, after)
    )
    assert next(places) <= next(places)


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_what_cannot_be_true_is_borne(random: Random) -> None:
    wrong = [math.nan, math.inf, -math.inf, -1.0, 1e300]
    loads = [
        replace(each, **{random.choice(["backlog_s", "speed", "margin_c", "age_s"]): bad})  # type: ignore[arg-type]
        for each in _some(random)
        for bad in [random.choice(wrong)]
    ]
    work = RoutedWork(random.choice(wrong))
    assert len(rank(loads, work, random.randrange(2**32), SETTINGS)) == len(loads)
    pools = [PoolLoad(each.id, each.backlog_s, each.speed, each.speed) for each in loads]
    assert choose_pool(pools, work, random, SETTINGS) in {each.id for each in loads}

"""What holds for every plan: bounds, more for more queue or heat, and it never raises.

States are drawn from seeds: drawing each of their numbers by itself takes a hundred times as long
as the plan. In a group of one pool more heat never means fewer replicas; between kinds of card it
moves growth elsewhere, so there it never means fewer of the others.
"""

import math
from dataclasses import fields, replace
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling import PlanMemory, PlanSettings, derating, plan
from cluster.pool_state import PoolState, ReplicaState, Stage

SETTINGS = PlanSettings()
SEEDS = st.integers(0, 2**32).map(Random)
STAGES: tuple[Stage, ...] = ("text", "denoise", "denoise", "decode")


def a_replica(random: Random, name: str) -> ReplicaState:
    return ReplicaState(
        id=name,
        waiting_s=random.choice([0.0, random.expovariate(0.1)]),
        running_s=random.expovariate(0.5),
        requests=random.randrange(20),
        accepted=10,
        accepted_s=random.expovariate(0.01),
        slowdown=random.choice([None, random.uniform(0.9, 1.5), random.uniform(1, 10)]),
        duty=random.choice([1.0, random.uniform(0.1, 1)]),
        margin_c=random.choice([None, random.uniform(-10, 12), random.uniform(5, 50)]),
        throttled=random.random() < 0.2,
        reading_age_s=random.choice([None, 0.5, 0.5, 0.5, 30.0]),
        age_s=random.choice([0.0, 0.0, 1.0, 60.0]),
    )


def a_pool(random: Random, name: str = "pool", stage: Stage = "denoise") -> PoolState:
    count, minimum = random.randrange(7), random.randrange(4)
    return PoolState(
        name=name,
        stage=stage,
        model="large",
        kind=random.choice(["H100", "L4"]),
        replicas=tuple(a_replica(random, f"{name}-{number}") for number in range(count)),
        target=count + random.choice([0, 0, 1, 3]),
        minimum=minimum,
        maximum=minimum + random.choice([0, 3, 20, 200]),
        queued=random.choice([0, 0, random.randrange(100)]),
        request_s=random.choice([None, random.uniform(0.01, 30)]),
        kind_speed=random.choice([1.0, 0.1]),
        cost_per_hour=random.uniform(0.1, 10),
        start_s=random.uniform(0, 200),
    )


def a_cluster(random: Random) -> list[PoolState]:
    return [a_pool(random, f"{number}", stage) for number, stage in enumerate(STAGES)]


def a_memory(random: Random, state: list[PoolState]) -> tuple[PlanMemory, float]:
    """What remains of some time under the same pools with other loads."""
    memory, now = PlanMemory(), 0.0
    for _ in range(random.randrange(5)):
        now += random.choice([0.1, 1.0, 30.0, 130.0])
        before = [
            replace(
                pool,
                queued=random.choice([0, random.randrange(50)]),
                replicas=tuple(
                    replace(each, accepted_s=each.accepted_s * random.random())
                    for each in pool.replicas
                ),
            )
            for pool in state
        ]
        _, memory = plan(before, memory, now, SETTINGS)
    return memory, now + random.choice([0.0, 1.0, 40.0])


def hotter(random: Random, pool: PoolState) -> PoolState:
    def one(each: ReplicaState) -> ReplicaState:
        return replace(
            each,
            slowdown=each.slowdown and each.slowdown * random.uniform(1, 5),
            duty=each.duty * random.uniform(0.2, 1),
            margin_c=None if each.margin_c is None else each.margin_c - random.uniform(0, 30),
            throttled=each.throttled or random.random() < 0.3,
        )

    return replace(pool, replicas=tuple(one(each) for each in pool.replicas))


@given(SEEDS)
@settings(deadline=None)
def test_never_beyond_bounds_and_each_pool_is_told_why(random: Random) -> None:
    state = a_cluster(random)
    memory = PlanMemory()
    for now in (0.0, 1.0, 200.0, 400.0):
        made, memory = plan(state, memory, now, SETTINGS)
        assert set(made.replicas) == {each.name for each in state}
        for each in state:
            assert each.minimum <= made.replicas[each.name] <= each.maximum
        assert all(each.reason.startswith(each.pool) for each in made.decisions)
        assert all(math.isfinite(each.waiting_s + each.capacity) for each in made.decisions)


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_more_queue_never_means_fewer(random: Random) -> None:
    state = a_pool(random)
    memory, now = a_memory(random, [state])
    longer = replace(
        state,
        queued=state.queued + random.choice([0, 1, 50]),
        replicas=tuple(
            replace(
                each,
                waiting_s=each.waiting_s + random.uniform(0, 50),
                requests=each.requests + random.randrange(5),
            )
            for each in state.replicas
        ),
    )
    short, long = (plan([each], memory, now, SETTINGS)[0] for each in (state, longer))
    assert long.replicas["pool"] >= short.replicas["pool"]


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_more_heat_never_means_fewer(random: Random) -> None:
    state = a_pool(random)
    memory, now = a_memory(random, [state])
    cool, hot = (plan([each], memory, now, SETTINGS)[0] for each in (state, hotter(random, state)))
    assert hot.replicas["pool"] >= cool.replicas["pool"]


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_heat_in_one_pool_never_means_fewer_of_the_others(random: Random) -> None:
    state = a_cluster(random)
    memory, now = a_memory(random, state)
    heated = random.choice(state)
    after = [hotter(random, pool) if pool is heated else pool for pool in state]
    cool, hot = (plan(each, memory, now, SETTINGS)[0].replicas for each in (state, after))
    # Denoisers' text encoders see nothing of it; their decoders and their neighbours may.
    assert all(hot[name] >= cool[name] for name in cool if name != heated.name)


@given(SEEDS)
@settings(deadline=None)
def test_derating_is_monotone_in_margin_and_throttling(random: Random) -> None:
    each = a_replica(random, "a")
    assert 0 < derating(each, SETTINGS) <= 1
    if each.margin_c is not None:
        closer = replace(each, margin_c=each.margin_c - random.uniform(0, 30))
        assert derating(closer, SETTINGS) <= derating(each, SETTINGS)
    assert derating(replace(each, throttled=True), SETTINGS) <= derating(each, SETTINGS)


@given(SEEDS)
@settings(deadline=None)
def test_stale_heat_decides_as_queues_alone_do_and_is_said(random: Random) -> None:
    stale = [
        replace(
            pool,
            replicas=tuple(
                replace(each, reading_age_s=99.0, slowdown=None, duty=1.0) for each in pool.replicas
            ),
        )
        for pool in a_cluster(random)
    ]
    made, _ = plan(stale, PlanMemory(), 0.0, SETTINGS)
    blind, _ = plan(stale, PlanMemory(), 0.0, replace(SETTINGS, heat=False))
    assert made.replicas == blind.replicas
    for pool in stale:
        if pool.replicas and pool.stage == "denoise":
            assert any(each.startswith(f"{pool.name}: ") for each in made.warnings)


@given(SEEDS)
@settings(deadline=None)
def test_order_of_pools_and_replicas_does_not_matter(random: Random) -> None:
    state = a_cluster(random)
    shuffled = [
        replace(pool, replicas=tuple(random.sample(pool.replicas, len(pool.replicas))))
        for pool in random.sample(state, len(state))
    ]
    memory, memory_too = PlanMemory(), PlanMemory()
    for now in (0.0, 5.0, 200.0):
        made, memory = plan(state, memory, now, SETTINGS)
        made_too, memory_too = plan(shuffled, memory_too, now, SETTINGS)
        assert made.replicas == made_too.replicas


GARBAGE = (math.nan, math.inf, -math.inf, -1.0, 1e300, None, "many", "", True, 10**400, (), [1])


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_garbage_never_raises_and_never_leaves_the_bounds(random: Random) -> None:
    spoilt = [_spoilt(random, pool) for pool in a_cluster(random)]
    if random.random() < 0.2:
        spoilt.append(spoilt[0])
    memory = PlanMemory()
    for now in (0.0, random.choice([math.nan, -5.0, math.inf, 3.0]), 300.0):
        made, memory = plan(spoilt, memory, now, SETTINGS)
        assert not any("the plan failed" in each for each in made.warnings)
        for each in spoilt:
            after = made.replicas[str(each.name)]
            assert isinstance(after, int)
            assert after >= 0
            if (
                each.maximum in range(10**6)
                and [str(one.name) for one in spoilt].count(each.name) == 1
            ):
                assert after <= each.maximum


def _spoilt(random: Random, pool: PoolState) -> PoolState:
    def one(thing: Any) -> Any:
        names = [each.name for each in fields(thing)]
        chosen = random.sample(names, random.randrange(4))
        return replace(thing, **{name: random.choice(GARBAGE) for name in chosen})

    spoilt = replace(pool, replicas=tuple(one(each) for each in pool.replicas))
    return one(spoilt) if random.random() < 0.5 else spoilt

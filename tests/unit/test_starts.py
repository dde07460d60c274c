"""Replicas that never start: they are no capacity, nothing goes for them, and it is told."""

from __future__ import annotations

from dataclasses import replace

from cluster.autoscaling import Plan, PlanMemory, PlanSettings, plan
from cluster.pool_state import PoolState, ReplicaState
from cluster.starts import Starts, follow

SETTINGS = PlanSettings()
START_S = 60.0


def cards(name: str, count: int, accepted_s: float = 0.0) -> tuple[ReplicaState, ...]:
    return tuple(
        ReplicaState(f"{name}{at}", accepted_s=accepted_s, reading_age_s=0.5, margin_c=30.0)
        for at in range(count)
    )


def pool(name: str, running: int, **told: object) -> PoolState:
    fields: dict[str, object] = {
        "stage": "denoise",
        "model": "large",
        "kind": "H100" if name == "h100" else "L4",
        "target": running,
        "minimum": 0,
        "maximum": 10,
        "request_s": 2.0 if name == "h100" else 16.0,
        "kind_speed": 1.0 if name == "h100" else 0.125,
        "cost_per_hour": 7.0 if name == "h100" else 0.8,
        "start_s": START_S,
    }
    return PoolState(name, replicas=cards(name, running), **(fields | told))  # type: ignore[arg-type]


class Cluster:
    """Pools under a constant load, of which some never start anything."""

    def __init__(self, rate: float, never: set[str], *pools: PoolState) -> None:
        self.rate, self.never = rate, never
        self.pools = {each.name: each for each in pools}
        self.memory = PlanMemory()
        self.now = 0.0
        self.accepted = 0.0
        self.made = Plan(())
        self.fewest_running = {each.name: each.target for each in pools}

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += 1.0
            running = sum(len(each.replicas) * each.kind_speed for each in self.pools.values())
            self.accepted += self.rate / running if running else 0.0
            self.pools = {
                name: replace(each, replicas=cards(name, len(each.replicas), self.accepted))
                for name, each in self.pools.items()
            }
            self.made, self.memory = plan(
                list(self.pools.values()), self.memory, self.now, SETTINGS
            )
            for name, target in self.made.replicas.items():
                each = self.pools[name]
                here = len(each.replicas) if name in self.never else target
                self.pools[name] = replace(
                    each, target=target, replicas=cards(name, min(here, target), self.accepted)
                )
                self.fewest_running[name] = min(self.fewest_running[name], min(here, target))

    def reason(self, name: str) -> str:
        return next(each.reason for each in self.made.decisions if each.pool == name)


def test_what_never_starts_is_asked_for_elsewhere_after_twice_the_time() -> None:
    # L4s are the cheaper, and none can be had.
    short = Cluster(1.0, {"l4"}, pool("h100", 1), pool("l4", 0, maximum=30))
    short.run(100.0)
    asked = short.pools["l4"].target
    assert asked > 0
    assert short.pools["h100"].target == 1
    short.run(60.0)
    assert short.pools["h100"].target == 2
    assert "that should have started are not counted on: asked for" in short.reason("l4")
    assert "ago, a start takes 60" in short.reason("l4")
    # What is asked for already is not asked for again, however long it takes.
    short.run(600.0)
    assert short.pools["l4"].target <= asked


def test_a_single_pool_does_not_ask_for_ever_more() -> None:
    alone = Cluster(2.0, {"h100"}, pool("h100", 1))
    alone.run(100.0)
    asked = alone.pools["h100"].target
    assert 1 < asked < 10
    alone.run(900.0)
    assert alone.pools["h100"].target == asked
    assert "needed, the rest does not start; " in alone.reason("h100")


def test_nothing_that_runs_goes_for_what_only_starts() -> None:
    # Two H100s bear the load. Eight L4s that never came would bear it for less money.
    held = Cluster(1.3, {"l4"}, pool("h100", 2), pool("l4", 0, target=10))
    held.run(900.0)
    assert held.fewest_running["h100"] == 2
    assert held.pools["l4"].target == 0, held.reason("l4")


def test_a_pool_whose_starts_failed_is_asked_last_until_one_comes() -> None:
    def asked_first(never: set[str]) -> str:
        memory = PlanMemory(starts={"l4": Starts(0, (), 0.0)} if never else {})
        states = [pool("h100", 1, queued=25.0), pool("l4", 0, maximum=30, start_s=20.0)]
        made, _ = plan(states, memory, 100.0, SETTINGS)
        grown = [each.name for each in states if made.replicas[each.name] > each.target]
        return grown[0] if len(grown) == 1 else str(made.replicas)

    assert asked_first(set()) == "l4"
    assert asked_first({"l4"}) == "h100"


def test_who_was_asked_for_first_comes_first() -> None:
    def step(before: Starts | None, present: int, target: int, now: float) -> Starts:
        return follow(before, present, target, START_S, now, SETTINGS)

    starts = step(None, 2, 2, 0.0)
    starts = step(starts, 2, 4, 10.0)
    starts = step(starts, 2, 7, 50.0)
    assert starts.asked == ((10.0, 2), (50.0, 3))
    starts = step(starts, 5, 7, 70.0)
    assert starts.asked == ((50.0, 2),)
    starts = step(starts, 5, 6, 80.0)
    assert starts.asked == ((50.0, 1),)
    assert starts.late(START_S, 170.0, SETTINGS) == (0, 0.0)
    starts = step(starts, 5, 6, 171.0)
    assert starts.late(START_S, 171.0, SETTINGS) == (1, 121.0)
    assert starts.failed_at == 171.0
    # One that died is asked for anew; one that comes after all makes good for the pool.
    starts = step(starts, 4, 6, 172.0)
    assert starts.asked == ((50.0, 1), (172.0, 1))
    assert step(starts, 5, 6, 180.0) == Starts(5, ((172.0, 1),), None)

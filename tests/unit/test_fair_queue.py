"""Fair queueing and the rate limit, for all arrivals: what each promises holds."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from cluster.fair_queue import FairQueue
from serve.token_bucket import TokenBucket

FLOWS = ("a", "b", "c")
WEIGHTS = st.fixed_dictionaries({flow: st.just(1.0) | st.floats(0.1, 10) for flow in FLOWS})
COSTS = st.sampled_from([1.0, 2.0]) | st.floats(0.01, 100)
# Either an arrival (flow, cost) or a departure (None); several of a kind one after the other.
EVENTS = st.lists(
    st.tuples(st.none() | st.tuples(st.sampled_from(FLOWS), COSTS), st.integers(1, 12)), max_size=30
).map(lambda runs: [event for event, times in runs for _ in range(times)])


@given(EVENTS, WEIGHTS)
def test_backlogged_flows_get_work_by_weight(
    events: list[tuple[str, float] | None], weights: dict[str, float]
) -> None:
    queue: FairQueue[tuple[str, float]] = FairQueue()
    waiting: dict[str, int] = defaultdict(int)
    largest: dict[str, float] = defaultdict(float)
    # Of each pair: work got since both have had something waiting.
    got: dict[tuple[str, str], dict[str, float]] = {}
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    for event in events:
        if event is not None:
            flow, cost = event
            queue.push(flow, event, cost, weights[flow])
            waiting[flow] += 1
            largest[flow] = max(largest[flow], cost)
        else:
            item = queue.pop()
            assert (item is None) == (sum(waiting.values()) == 0)
            if item is None:
                continue
            flow, cost = item
            for pair in pairs:
                if flow in pair and pair in got:
                    got[pair][flow] += cost / weights[flow]
            waiting[flow] -= 1
        for one, other in pairs:
            if not (waiting[one] and waiting[other]):
                got.pop((one, other), None)
                continue
            served = got.setdefault((one, other), {one: 0.0, other: 0.0})
            bound = largest[one] / weights[one] + largest[other] / weights[other]
            assert abs(served[one] - served[other]) <= bound * (1 + 1e-9) + 1e-9


@given(st.lists(st.tuples(st.sampled_from(FLOWS), COSTS, st.integers(-10, 10)), max_size=60))
def test_everything_comes_out_once_and_a_flow_goes_by_priority_and_arrival(
    arrivals: list[tuple[str, float, int]],
) -> None:
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    for number, (flow, cost, priority) in enumerate(arrivals):
        queue.push(flow, (flow, -priority, number), cost, priority=priority)
    assert len(queue) == len(arrivals)
    came = [item for _ in arrivals if (item := queue.pop()) is not None]
    assert queue.pop() is None
    assert len(set(came)) == len(arrivals)
    for flow in FLOWS:
        own = [item for item in came if item[0] == flow]
        assert own == sorted(own)


def test_who_was_idle_has_saved_nothing_up_and_waits_for_one_piece_at_most() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push("flood", f"flood{number}", 1.0)
    for _ in range(50):
        queue.pop()
    for number in range(3):
        queue.push("late", f"late{number}", 1.0)
    came = [str(queue.pop()) for _ in range(6)]
    assert "late0" in came[:2]
    assert sum(item.startswith("late") for item in came[:4]) == 2
    assert sum(item.startswith("late") for item in came) == 3


@given(EVENTS, st.data())
def test_what_is_discarded_does_not_come_out(
    events: list[tuple[str, float] | None], data: st.DataObject
) -> None:
    queue: FairQueue[object] = FairQueue()
    waiting: list[tuple[str, object]] = []
    for event in events:
        if event is not None:
            item = object()
            queue.push(event[0], item, event[1])
            waiting.append((event[0], item))
        elif waiting:
            gone = data.draw(st.sampled_from(waiting))
            assert queue.discard(*gone)
            assert not queue.discard(*gone)
            waiting.remove(gone)
    assert len(queue) == len(waiting)
    left = {id(queue.pop()) for _ in range(len(waiting))}
    assert left == {id(item) for _, item in waiting}
    assert not queue.discard("nobody", object())


@given(
    st.floats(0.01, 100),
    st.floats(1, 100),
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 1)), max_size=60),
)
def test_a_bucket_never_gives_more_than_its_rate_and_says_truthfully_when(
    rate: float, capacity: float, tries: list[tuple[float, float]]
) -> None:
    now = 1000.0
    bucket = TokenBucket(rate, capacity, now)
    taken: list[tuple[float, float]] = []
    for pause_s, share in tries:
        now += pause_s
        tokens = share * capacity
        wait_s = bucket.take(tokens, now)
        if wait_s is not None:
            assert wait_s > 0
            assert bucket.take(tokens, now + wait_s * 0.99) is not None
            now += wait_s
            assert bucket.take(tokens, now) is None
        taken.append((now, tokens))
    for place, (begin, _) in enumerate(taken):
        for end in range(place, len(taken)):
            got = sum(tokens for _, tokens in taken[place : end + 1])
            assert got <= (capacity + rate * (taken[end][0] - begin)) * (1 + 1e-5) + 1e-5


def test_what_is_given_back_can_be_taken_again() -> None:
    bucket = TokenBucket(1.0, 10.0, 0.0)
    assert bucket.take(10, 0.0) is None
    assert bucket.take(4, 0.0) == 4.0
    bucket.give_back(4)
    assert bucket.take(4, 0.0) is None
    bucket.give_back(1000)
    assert bucket.take(11, 0.0) is not None

"""The policy's promises, whatever waits: to one request, between requests, and under overload."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.schedule import MAX_ROWS, Work, choose
from deployments.step_costs import StepCosts, TokenShape

SMALL, LARGE = TokenShape(64, 64, 333), TokenShape(128, 128, 333)


def h100() -> StepCosts:
    """Weak gain at 1024x1024, strong gain at 512x512."""
    costs = StepCosts()
    for shape, by_rows in (
        (SMALL, {1: 0.026, 2: 0.028, 8: 0.037, 32: 0.137}),
        (LARGE, {1: 0.054, 2: 0.107, 4: 0.198, 8: 0.394}),
    ):
        for rows, seconds in by_rows.items():
            costs.observe(shape, rows, seconds)
    return costs


H100 = h100()


def work(key: int, at: float = 0.0, shape: TokenShape = LARGE, left: int = 20, **more) -> Work:
    rows = more.pop("rows", 2)
    return Work(key, shape, rows, rows * left, left, at, **more)


@st.composite
def live_sets(draw: st.DrawFn) -> list[Work]:
    number = draw(st.integers(1, 24))
    made = []
    for key in range(number):
        left = draw(st.integers(1, 50))
        rows = draw(st.integers(1, 2))
        made.append(
            Work(
                key=key,
                shape=draw(st.sampled_from([SMALL, LARGE, TokenShape(96, 96, 333)])),
                rows=rows,
                rows_left=draw(st.integers(left + rows - 1, 2 * left - 2 + rows)),
                steps_left=left,
                submitted_at=draw(st.floats(0, 100)),
                deadline=draw(st.none() | st.floats(90, 200)),
                priority=draw(st.integers(-1, 2)),
                steps_done=draw(st.integers(0, 20)),
            )
        )
    return made


@given(live_sets(), st.floats(100, 400), st.integers(0, 40), st.randoms(use_true_random=False))
def test_what_any_forward_is(works, now, limit, random) -> None:
    chosen = choose(works, H100, now, lambda shape: limit)
    by_key = {each.key: each for each in works}
    assert chosen
    assert len(set(chosen)) == len(chosen)
    assert len({by_key[key].shape for key in chosen}) == 1
    rows = sum(by_key[key].rows for key in chosen)
    assert rows <= min(limit, MAX_ROWS) or len(chosen) == 1
    shuffled = list(works)
    random.shuffle(shuffled)
    assert choose(shuffled, H100, now, lambda shape: limit) == chosen


@given(live_sets(), st.floats(100, 400))
def test_nothing_measured_is_no_obstacle(works, now) -> None:
    assert choose(works, StepCosts(), now)


def test_nothing_to_do() -> None:
    assert choose([], H100, 0.0) == ()


def test_a_newcomer_waits_where_sharing_gains_little() -> None:
    assert choose([work(1, 0.0), work(2, 1.0)], H100, 1.0) == (1,)


def test_those_who_came_together_share_where_it_gains_anything() -> None:
    assert set(choose([work(1, 0.0), work(2, 0.0)], H100, 0.0)) == {1, 2}


def test_a_newcomer_joins_at_once_where_it_is_nearly_free() -> None:
    running = work(1, 0.0, SMALL, left=10, steps_done=10)
    assert set(choose([running, work(2, 0.3, SMALL)], H100, 0.3)) == {1, 2}


def test_a_queue_is_worked_off_in_batches_of_the_oldest() -> None:
    queue = [work(key, float(key)) for key in range(12)]
    assert set(choose(queue, H100, 12.0)) == {0, 1}


def test_batches_end_at_the_knee() -> None:
    crowd = [work(key, 0.0, SMALL) for key in range(64)]
    rows = 2 * len(choose(crowd, H100, 0.0))
    assert rows <= MAX_ROWS
    steep = StepCosts()
    for count in range(1, 33):  # a row costs the same from four rows on
        steep.observe(SMALL, count, 0.01 * max(count, 4))
    assert len(choose(crowd, steep, 0.0)) == 2


def test_short_requests_pass_long_ones_once_they_have_waited_their_own_time() -> None:
    long, short = work(1, 0.0, left=50), work(2, 0.5, LARGE, left=2)
    assert choose([long, short], H100, 0.5)[0] == 1
    assert choose([long, short], H100, 0.8)[0] == 2
    small = work(3, 0.5, SMALL, left=8)
    assert choose([long, small], H100, 1.5) == (3,)


def test_the_longest_waiting_comes_before_any_short_newcomer() -> None:
    long, short = work(1, 0.0, left=50), work(2, 500.0, SMALL, left=8)
    assert choose([long, short], H100, 500.0) == (1,)


def test_higher_priority_goes_first_and_lower_only_takes_what_is_free() -> None:
    old, new = work(1, 0.0), work(2, 5.0, priority=1)
    assert choose([old, new], H100, 5.0) == (2,)
    near, important = work(1, 0.0, SMALL), work(2, 5.0, SMALL, priority=1)
    assert choose([near, important], H100, 5.0)[0] == 2


def test_a_deadline_far_away_moves_nobody() -> None:
    first, later = work(1, 0.0), work(2, 1.0, deadline=1000.0)
    assert choose([first, later], H100, 1.0) == (1,)


def test_a_tight_deadline_goes_first_even_before_priority() -> None:
    urgent, important = work(1, 1.0, deadline=4.0), work(2, 0.0, priority=3)
    assert choose([urgent, important], H100, 1.0) == (1,)


def test_a_deadline_that_cannot_be_met_goes_first_no_more() -> None:
    hopeless, other = work(1, 1.0, deadline=2.0), work(2, 0.0)
    assert choose([hopeless, other], H100, 1.0) == (2,)


@given(
    st.lists(
        st.tuples(st.sampled_from([SMALL, LARGE]), st.integers(1, 40), st.floats(0, 12)),
        min_size=1,
        max_size=12,
    )
)
def test_the_earliest_urgent_deadline_is_in_the_forward(asked) -> None:
    works = []
    for key, (shape, left, slack) in enumerate(asked):
        alone = left * H100.seconds(shape, 2)
        works.append(work(key, 0.0, shape, left, deadline=alone * (1 + slack)))
    chosen = choose(works, H100, 0.0)
    tight = [each for each, (_, _, slack) in zip(works, asked, strict=True) if slack <= 0.9]
    if tight:
        first = min(works, key=lambda each: each.deadline or 0.0)
        assert first.key in chosen
        # Whoever shares its forward leaves it time enough.
        rows = sum(works[key].rows for key in chosen)
        if len(chosen) > 1:
            took = first.steps_left * H100.seconds(first.shape, rows)
            assert took <= (first.deadline or 0.0)


def run_until_done(patient: Work, newcomer, every_s: float, limit_s: float) -> float:
    """Serve one request against newcomers that never cease; return when it finished."""
    works, now, next_at, key = {patient.key: patient}, 0.0, 0.0, 1000
    while now < limit_s:
        while next_at <= now:
            works[key] = newcomer(key, next_at)
            key, next_at = key + 1, next_at + every_s
        # As an engine does, it holds no more than so many.
        held = [patient.key] + [each for each in works if each != patient.key][:40]
        chosen = choose([works[each] for each in held if each in works], H100, now)
        now += H100.seconds(works[chosen[0]].shape, sum(works[each].rows for each in chosen))
        for each in chosen:
            one = works[each]
            if one.steps_left == 1:
                del works[each]
                if each == patient.key:
                    return now
            else:
                works[each] = replace(
                    one,
                    steps_left=one.steps_left - 1,
                    rows_left=one.rows_left - one.rows,
                    steps_done=one.steps_done + 1,
                )
    raise AssertionError(f"not finished after {limit_s} s")


@settings(deadline=None, max_examples=8)
@given(left=st.integers(1, 50), phase=st.floats(0, 1))
def test_nothing_starves_under_a_flood_of_short_requests(left: int, phase: float) -> None:
    patient = work(1, -phase, LARGE, left)
    alone = left * H100.seconds(LARGE, 2)
    # Twice what the card can do.
    finished = run_until_done(
        patient, lambda key, at: work(key, at, SMALL, 8), 0.035, 60 + 60 * alone
    )
    assert finished >= alone * 0.999


@settings(deadline=None, max_examples=8)
@given(left=st.integers(1, 30), phase=st.floats(0, 1))
def test_nothing_starves_under_a_flood_of_higher_priority(left: int, phase: float) -> None:
    patient = work(1, -phase, LARGE, left)
    alone = left * H100.seconds(LARGE, 2)
    # Of another shape, so that no room is ever left over in a forward.
    run_until_done(
        patient, lambda key, at: work(key, at, SMALL, 8, priority=9), 0.035, 60 + 60 * alone
    )


@settings(deadline=None, max_examples=8)
@given(left=st.integers(1, 30), phase=st.floats(0, 1))
def test_nothing_starves_under_a_flood_of_deadlines(left: int, phase: float) -> None:
    patient = work(1, -phase, LARGE, left)
    alone = left * H100.seconds(LARGE, 2)
    run_until_done(
        patient, lambda key, at: work(key, at, SMALL, 8, deadline=at + 0.5), 0.1, 60 + 60 * alone
    )


@pytest.mark.parametrize("limit", [0, 1])
def test_one_request_alone_is_never_held_back(limit: int) -> None:
    assert len(choose([work(1), work(2)], H100, 0.0, lambda shape: limit)) == 1

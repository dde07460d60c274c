"""Which rows go into the next forward: a pure function of the live set, the costs and the time.

Whom the forward is made for, in this order:

1. Whoever has waited far too long, in one turn of ten: its share of the card under any flood of
   deadlines and priorities.
2. The earliest deadline, once deadlines leave no more slack than a request's own time. One that
   cannot be met any more counts no longer: it would only take others' time.
3. The highest priority.
4. The highest response ratio, (waited + own time) / own time: how many times longer than alone it
   will have taken. Short requests pass long ones, and none starves, because a ratio grows with
   waiting and the faster the shorter the request. The whole of its own time counts, not what is
   left: of equal requests the oldest stays first, so they finish one by one and not all late.

How many share the forward. Rows of the best ratio come first, and as many are taken as bring the
most progress a second, a row's progress being its ratio times its share of the card. With few
requests that is a strict test: a second picture at 1024x1024 makes a forward 1.9 times as long, so
it delays the older request and is let in only if it has waited nearly as long, and for a gain of
3 % at least. Where a forward is bound by anything but arithmetic, it is let in at once. With a
queue another thing counts: each second saved is saved for all who wait and all who will come, and
near saturation one per cent more throughput shortens the queue by ten. So a term grows with the
square of the number of requests beyond two, until only throughput counts. Batches end at the knee
of the measured curve all the same: the last 0.75 % of price are never bought, they delay many for
nearly nothing. And throughput alone takes no more than 4 of 7 requests, or all but four, into one
forward, so that somebody finishes early.

Sizes share the card by the same figure: the shape goes next whose best batch makes most progress.

The constants were chosen on Poisson arrivals at 50, 70 and 90 % of saturation under cost curves
with weak and strong gains from batching, and checked on other arrivals (`loadtest.engine_bench`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deployments.step_costs import StepCosts, TokenShape

__all__ = ["MAX_ROWS", "RowLimit", "TokenShape", "Work", "choose"]

RowLimit = Callable[[TokenShape], int]

MAX_ROWS = 32

_UNBOUGHT = 0.0075  # of the best price a row: what lies beyond the knee
_NO_CROWD = 2  # requests; each beyond them makes throughput count for more
_SHARE_TAKEN = 4 / 7  # of the requests, that throughput alone may put into one forward, or else
_LEFT_OUT = 4  # all but so many of them
_WORTH_DELAYING = 1.03  # by what progress must grow for a request more where nothing else counts
_SAVED_FOR_OTHERS = 0.1  # the same between shapes, where it is a tie-breaker only
_OF_LOWER_PRIORITY = 0.05  # what progress of lower priorities is worth: they take what is free
_OVERDUE_S = 30.0  # both this long and
_OVERDUE_RATIO = 20.0  # this many times its own time: far too long
_TURNS_AN_OVERDUE_TURN = 10
_SURELY = 1 + 1e-9  # rounding is no gain


@dataclass(frozen=True, slots=True)
class Work:
    """One request between two of its steps, as the policy sees it."""

    key: int
    shape: TokenShape
    rows: int  # of its next step: 1 without guidance, 2 with
    rows_left: int  # of all its remaining steps together, the next included
    steps_left: int
    submitted_at: float  # seconds, by the clock of `now`
    deadline: float | None = None  # by the same clock
    priority: int = 0  # higher first
    steps_done: int = 0  # 0: never stepped


class _Rated(NamedTuple):
    """A request as it competes; sorts by who comes first into a forward."""

    rank: float  # minus its ratio
    submitted_at: float
    key: int
    rows: int
    own_s: float  # all its steps alone
    left_s: float  # its remaining steps alone
    work: Work

    @property
    def ratio(self) -> float:
        """(Waited + own time) / own time."""
        return -self.rank


def choose(
    works: Sequence[Work],
    costs: StepCosts,
    now: float,
    row_limit: RowLimit | None = None,
) -> tuple[int, ...]:
    """Return the keys of those whose rows share the next forward.

    Args:
        works: Everything that could be stepped, in any order; keys are unique.
        costs: Seconds of a forward.
        now: Seconds, by the clock of the works.
        row_limit: Most rows that memory allows in a forward of a shape; `MAX_ROWS` holds as well.
            One request alone is never held back by it.

    Returns:
        Keys of one TokenShape; empty only if `works` is. The same arguments, with works in any
        order, give the same answer.
    """
    if len(works) <= 1:
        return tuple(work.key for work in works)
    rated = [_rate(work, costs, now) for work in works]
    leader = _overdue(rated, now)
    if leader is None:
        leader = _urgent(rated, now)
        if leader is not None:
            return _with_company(leader, rated, costs, now, row_limit)
    if leader is not None:
        rated = [each for each in rated if each.work.shape == leader.work.shape]
    return _most_progress(rated, leader, costs, row_limit)


def _rate(work: Work, costs: StepCosts, now: float) -> _Rated:
    alone = costs.seconds(work.shape, 1)
    if work.rows_left > work.steps_left:  # some steps take two rows
        second = costs.seconds(work.shape, 2) - alone
        alone += second * (work.rows_left - work.steps_left) / work.steps_left
    own_s = alone * (work.steps_done + work.steps_left)
    ratio = (now - work.submitted_at + own_s) / own_s
    return _Rated(
        -ratio, work.submitted_at, work.key, work.rows, own_s, alone * work.steps_left, work
    )


def _overdue(rated: list[_Rated], now: float) -> _Rated | None:
    """Return the oldest of those who waited far too long, if this turn is theirs."""
    # Digits of the time far below a forward's length: as good as drawn, yet given by the arguments.
    if int(now * 1e6) * 2654435761 % 2**32 * _TURNS_AN_OVERDUE_TURN >= 2**32:
        return None
    overdue = [
        each
        for each in rated
        if each.ratio > _OVERDUE_RATIO and now - each.submitted_at > _OVERDUE_S
    ]
    return min(overdue, key=lambda each: (each.submitted_at, each.key), default=None)


def _urgent(rated: list[_Rated], now: float) -> _Rated | None:
    """Return the earliest deadline if any, served in their order, is left too little slack."""
    due = [
        (each.work.deadline, each)
        for each in rated
        if each.work.deadline is not None and now + each.left_s <= each.work.deadline
    ]
    due.sort()
    wanted_s = 0.0
    for deadline, each in due:
        wanted_s += each.left_s
        # Slack does not change while it runs, so what has become urgent stays so to its end.
        if deadline - now <= wanted_s + each.own_s:
            return due[0][1]
    return None


def _with_company(
    leader: _Rated,
    rated: list[_Rated],
    costs: StepCosts,
    now: float,
    row_limit: RowLimit | None,
) -> tuple[int, ...]:
    """Add to the most urgent request what leaves it half of its slack."""
    shape, deadline = leader.work.shape, leader.work.deadline or now
    slowest = (deadline - now + leader.left_s) / (2 * leader.work.steps_left)
    most = _most_rows(shape, row_limit)
    chosen, rows = [leader.key], leader.rows
    others = [each for each in rated if each.work.shape == shape and each.key != leader.key]
    others.sort(key=lambda each: (each.work.deadline or float("inf"), each))
    for each in others:
        more = rows + each.rows
        if more <= most and costs.seconds(shape, more) <= slowest:
            chosen.append(each.key)
            rows = more
    return tuple(chosen)


def _most_progress(
    rated: list[_Rated], leader: _Rated | None, costs: StepCosts, row_limit: RowLimit | None
) -> tuple[int, ...]:
    """Return the batch of the highest priority, or of the leader, that makes most progress."""
    highest = None if leader else max(each.work.priority for each in rated)
    queues: dict[TokenShape, list[_Rated]] = {}
    lower: dict[TokenShape, list[_Rated]] = {}
    for each in rated:
        competes = highest is None or each.work.priority == highest
        (queues if competes else lower).setdefault(each.work.shape, []).append(each)
    crowd = sum(map(len, queues.values()))
    ratios = sum(each.ratio for queue in queues.values() for each in queue)
    best: tuple[float, _Rated] | None = None
    members: list[_Rated] = []
    for shape, queue in queues.items():
        queue.sort()
        if leader is not None:
            queue.remove(leader)
            queue.insert(0, leader)
        prices = costs.prices(shape, max(_most_rows(shape, row_limit), queue[0].rows))
        number, worth = _fill(queue, prices, crowd, ratios)
        # Between equals by the request, never by the order in which works were given.
        if best is None or (-worth, queue[0]) < best:
            best = (-worth, queue[0])
            members = _with_what_is_free(queue[:number], sorted(lower.get(shape, ())), prices)
    return tuple(each.key for each in members)


def _fill(
    queue: list[_Rated], prices: Sequence[float], crowd: int, ratios: float
) -> tuple[int, float]:
    """Find how many of a queue, in its order, make most progress a second.

    Args:
        queue: Of one shape; its first always goes. Whoever does not fit ends the batch.
        prices: Seconds a row of 1, 2, ... rows.
        crowd: Number of requests that compete, of all shapes.
        ratios: Sum of theirs.

    Returns:
        The number, and the most progress a second, to compare with other shapes.
    """
    best_price = min(prices)
    knee = best_price * (1 + _UNBOUGHT)
    throughput_counts = max(crowd - _NO_CROWD, 0) ** 2 * ratios / crowd
    most_for_throughput = max(_SHARE_TAKEN * crowd, crowd - _LEFT_OUT)
    others_count = _SAVED_FOR_OTHERS * ratios
    number, rows, progress = 0, 0, 0.0
    best_alone = best_crowded = worth = 0.0
    for index, each in enumerate(queue, 1):
        rows += each.rows
        if rows > len(prices):
            break
        progress += each.ratio * each.rows
        # Of the card at its best price; below the knee a better price counts for nothing.
        share = best_price / max(prices[rows - 1], knee)
        alone = progress / rows * share
        worth = max(worth, alone + others_count * share)
        if alone > best_alone * _WORTH_DELAYING:
            best_alone, number = alone, index
        crowded = alone + throughput_counts * share
        if index <= most_for_throughput and crowded > best_crowded * _SURELY:
            best_crowded, number = crowded, index
    return number, worth


def _with_what_is_free(
    members: list[_Rated], lower: list[_Rated], prices: Sequence[float]
) -> list[_Rated]:
    """Add those of lower priority that hardly delay the members."""
    rows = sum(each.rows for each in members)
    progress = sum(each.ratio * each.rows for each in members)
    for each in lower:
        more = rows + each.rows
        worth = progress + _OF_LOWER_PRIORITY * each.ratio * each.rows
        if more > len(prices) or worth * rows * prices[rows - 1] <= (
            progress * more * prices[more - 1]
        ):
            break
        members, rows, progress = [*members, each], more, worth
    return members


def _most_rows(shape: TokenShape, row_limit: RowLimit | None) -> int:
    return MAX_ROWS if row_limit is None else min(MAX_ROWS, row_limit(shape))

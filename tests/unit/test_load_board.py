"""What one process knows of replicas: own work counts at once, reports replace it, no herds."""

import heapq
import threading
from collections import Counter
from random import Random

import pytest

from cluster.load_board import LoadBoard
from cluster.routing import ReplicaLoad, RoutedWork, RoutingSettings

EXACT = RoutingSettings(blur=0.0, tie=0.0)
WORK = RoutedWork(2.0)


def board(*names: str, settings: RoutingSettings = EXACT) -> LoadBoard:
    made = LoadBoard(settings, seed=1)
    made.keep(names)
    return made


@pytest.mark.parametrize("most", [1, 4, 49, 50, 51, None])
def test_the_first_of_a_ranking_are_those_of_all(most: int | None) -> None:
    random = Random(3)
    names = [f"r{number}" for number in range(50)]
    backlogs = {name: random.uniform(0.0, 30.0) for name in names}
    made = board(*names)
    for name in names:
        made.report(ReplicaLoad(name, backlogs[name]), 0.0)
    assert made.ranked(WORK, 0.0, most) == sorted(names, key=backlogs.__getitem__)[:most]


def test_own_work_counts_at_once_and_is_worked_off_as_time_passes() -> None:
    made = board("a", "b")
    for name in "ab":
        made.report(ReplicaLoad(name, 0.0), 0.0)
    made.sent("a", WORK, 0.0)
    assert made.choose(WORK, 0.1) == "b"
    assert made.soonest(WORK, 0.1) == pytest.approx(2.0)
    made.sent("b", RoutedWork(9.0), 0.1)
    assert made.choose(WORK, 1.0) == "a"
    assert made.soonest(WORK, 1.0) == pytest.approx(3.0)
    assert made.soonest(WORK, 4.0) == pytest.approx(2.0)


def test_a_report_replaces_what_was_sent_before_it_but_not_what_is_on_its_way() -> None:
    made = board("a")
    made.sent("a", RoutedWork(5.0), 0.0)
    made.report(ReplicaLoad("a", 1.0), 2.0)
    assert made.soonest(WORK, 2.0) == pytest.approx(3.0)
    made.sent("a", RoutedWork(5.0), 3.0)
    made.report(ReplicaLoad("a", 1.0), 3.05)
    assert made.soonest(WORK, 3.05) == pytest.approx(8.0)


def test_a_late_report_does_not_undo_a_newer_one() -> None:
    made = board("a")
    made.report(ReplicaLoad("a", 7.0, age_s=0.0), 10.0)
    made.report(ReplicaLoad("a", 1.0, age_s=3.0), 10.1)
    assert made.soonest(WORK, 10.1) == pytest.approx(8.9)


def test_a_reports_age_is_taken_off_its_backlog() -> None:
    made = board("a")
    made.report(ReplicaLoad("a", 3.0, age_s=2.0), 10.0)
    assert made.soonest(WORK, 10.0) == pytest.approx(3.0)


def test_the_hot_one_is_avoided_and_what_is_held_is_preferred() -> None:
    made = board("hot", "plain", "has")
    made.report(ReplicaLoad("hot", 0.0, margin_c=1.0), 0.0)
    made.report(ReplicaLoad("plain", 0.1), 0.0)
    made.report(ReplicaLoad("has", 0.3, holds=frozenset({"lora"})), 0.0)
    assert made.ranked(WORK, 0.0) == ["plain", "has", "hot"]
    assert made.ranked(RoutedWork(2.0, {"lora": 0.5}), 0.0, most=1) == ["has"]
    made.report(ReplicaLoad("has", 0.3), 0.1)
    assert made.choose(RoutedWork(2.0, {"lora": 0.5}), 0.1) == "plain"


def test_replicas_come_and_go_and_what_is_known_stays() -> None:
    made = board("a", "b")
    made.report(ReplicaLoad("a", 9.0, holds=frozenset({"x"})), 0.0)
    made.report(ReplicaLoad("b", 1.0), 0.0)
    made.keep(["c", "a"])
    assert len(made) == 2
    made.report(ReplicaLoad("c", 99.0), 0.0)
    assert made.choose(WORK, 0.0) == "a"
    assert made.soonest(RoutedWork(2.0, {"x": 0.5}), 0.0) == pytest.approx(11.0)
    made.keep([])
    assert made.choose(WORK, 0.0) is None
    assert made.assign(WORK, 0.0) is None
    assert made.ranked(WORK, 0.0) == []
    assert made.soonest(WORK, 0.0) is None


def test_without_any_report_two_are_drawn_and_the_less_laden_is_taken() -> None:
    made = board(*(f"{number}" for number in range(10)))
    taken = Counter(made.assign(WORK, 0.0) for _ in range(100))
    assert max(taken.values()) - min(taken.values()) <= 4
    made = board("a", "b")
    made.sent("a", WORK, 0.0)
    assert {made.choose(WORK, 0.0) for _ in range(20)} == {"b"}
    made.finished("a")
    assert {made.choose(WORK, 0.0) for _ in range(50)} == {"a", "b"}
    assert sorted(made.ranked(WORK, 0.0)) == ["a", "b"]


def test_work_of_unknown_size_counts_as_the_usual() -> None:
    made = board("a")
    made.report(ReplicaLoad("a", 0.0), 0.0)
    for _ in range(200):
        made.sent("a", RoutedWork(6.0), 0.0)
    made.report(ReplicaLoad("a", 0.0), 1.0)
    assert made.soonest(RoutedWork(), 1.0) == pytest.approx(6.0, rel=0.01)


def test_all_are_full_only_while_none_has_room_for_another() -> None:
    made = board("a", "b")
    assert not made.is_full(WORK, 0.0)  # nobody has told anything
    made.report(ReplicaLoad("a", 12.0), 0.0)
    made.report(ReplicaLoad("b", 9.0), 0.0)
    assert not made.is_full(WORK, 0.0)
    made.sent("b", WORK, 0.0)
    assert made.is_full(WORK, 0.0)
    assert not made.is_full(RoutedWork(6.0), 0.0)  # four of these may be held
    assert not made.is_full(WORK, 2.0)
    made.report(ReplicaLoad("c", 0.0), 0.0)
    assert not made.is_full(WORK, 0.0)


def test_threads_lose_nothing() -> None:
    made = board("a", "b", "c")
    for name in "abc":
        made.report(ReplicaLoad(name, 0.0), 0.0)

    def send() -> None:
        for _ in range(200):
            made.assign(RoutedWork(1.0), 0.0)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    # 800 s of work on three replicas, evenly: the least laden has 266.
    assert made.soonest(RoutedWork(1.0), 0.0) == pytest.approx(267, abs=1)


class Pool:
    """First-come-first-served replicas, Pipelines that hear of them late; a virtual clock."""

    def __init__(self, policy: str, load: float, hot: bool = False, seed: int = 5) -> None:
        self.random, self.policy, self.load, self.hot = Random(seed), policy, load, hot
        self.names = [f"{number}" for number in range(12)]
        self.free_at = dict.fromkeys(self.names, 0.0)
        self.boards = [LoadBoard(RoutingSettings(), seed=number) for number in range(6)]
        self.heard = [dict.fromkeys(self.names, 0.0) for _ in self.boards]
        self.waits: list[float] = []
        self.taken: Counter[str] = Counter()
        for each in self.boards:
            each.keep(self.names)

    def run(self, seconds: float, report_every: float = 1.0, delay: float = 0.2) -> None:
        events: list[tuple[float, int, str, float]] = []
        for number, name in enumerate(self.names):
            heapq.heappush(events, (report_every * number / len(self.names), number, name, 0.0))
        arrival, count = 0.0, len(self.names)
        while arrival < seconds:
            while events and events[0][0] <= arrival:
                at, _, what, backlog = heapq.heappop(events)
                name, is_word, _ = what.partition("!")
                if is_word:
                    self._hear(name, backlog, at, delay)
                else:
                    told = max(self.free_at[name] - at, 0.0)
                    count += 2
                    heapq.heappush(events, (at + delay, count, name + "!", told))
                    heapq.heappush(events, (at + report_every, count + 1, name, 0.0))
            self._send(arrival)
            arrival += self.random.expovariate(self.load * len(self.names))

    def _hear(self, name: str, backlog: float, at: float, delay: float) -> None:
        margin = 2.0 if self.hot and name == "0" else 25.0
        for known, heard in zip(self.boards, self.heard, strict=True):
            known.report(ReplicaLoad(name, backlog, margin_c=margin, age_s=delay), at)
            heard[name] = backlog

    def _send(self, now: float) -> None:
        pipeline = self.random.randrange(len(self.boards))
        work = self.random.expovariate(1.0)
        if self.policy == "naive":
            chosen = min(self.names, key=self.heard[pipeline].__getitem__)
        elif self.policy == "two choices":
            pair = self.random.sample(self.names, 2)
            chosen = min(pair, key=self.heard[pipeline].__getitem__)
        else:
            chosen = self.boards[pipeline].assign(RoutedWork(work), now) or ""
        self.taken[chosen] += 1
        self.waits.append(max(self.free_at[chosen] - now, 0.0))
        self.free_at[chosen] = max(self.free_at[chosen], now) + work

    @property
    def mean_wait(self) -> float:
        return sum(self.waits) / len(self.waits)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_six_pipelines_with_late_news_make_no_herd(load: float) -> None:
    runs = {policy: Pool(policy, load) for policy in ("board", "naive", "two choices")}
    for each in runs.values():
        each.run(250.0)
    assert runs["board"].mean_wait < runs["two choices"].mean_wait
    assert runs["board"].mean_wait < runs["naive"].mean_wait / 3
    taken = runs["board"].taken
    assert max(taken.values()) < 1.35 * sum(taken.values()) / len(taken)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_two_degrees_under_its_limit_a_card_gets_less_than_half_its_share(load: float) -> None:
    pool = Pool("board", load, hot=True)
    pool.run(120.0)
    assert pool.taken["0"] < 0.5 * sum(pool.taken.values()) / len(pool.names)

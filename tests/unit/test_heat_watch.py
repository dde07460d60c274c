"""The watch goes on whatever its source does, and its newest reading tells its age."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from cluster.heat_reading import Reading
from deployments.heat_watch import HeatWatch
from tests.unit.fake_nvml import Clock

WAIT_S = 30.0


class Source:
    """Gives what a test puts in, and blocks until there is something."""

    description = "a source"
    problem: str | None = "the driver is away"

    def __init__(self, *answers: Reading | None | Exception) -> None:
        self.answers: queue.Queue[Reading | None | Exception] = queue.Queue()
        self.asked = threading.Semaphore(0)
        for answer in answers:
            self.answers.put(answer)

    def read(self) -> Reading | None:
        self.asked.release()
        answer = self.answers.get(timeout=WAIT_S)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait_asked(self, times: int) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=WAIT_S)


@pytest.fixture
def watches() -> Iterator[list[HeatWatch]]:
    made: list[HeatWatch] = []
    yield made
    for watch in made:
        watch.close(timeout_s=0)


def watch(
    watches: list[HeatWatch], source: Source, clock: Clock, first_s: float = WAIT_S
) -> HeatWatch:
    watches.append(HeatWatch(source, 0.001, first_s=first_s, clock=clock))
    return watches[-1]


def test_the_first_reading_is_there_at_once(watches: list[HeatWatch]) -> None:
    clock = Clock()
    made = watch(watches, Source(Reading(at=clock.now, temperature_c=50.0)), clock)
    assert made.newest is not None
    assert made.newest.temperature_c == 50.0
    assert made.age_s == 0.0
    assert made.problem is None


def test_a_slow_first_reading_is_waited_for(watches: list[HeatWatch]) -> None:
    clock, source = Clock(), Source()
    reading = Reading(at=clock.now, temperature_c=50.0)
    threading.Timer(0.1, source.answers.put, [reading]).start()
    assert watch(watches, source, clock).newest is reading


def test_nothing_was_ever_read(watches: list[HeatWatch]) -> None:
    made = watch(watches, Source(None), Clock())
    assert made.newest is None
    assert made.age_s is None
    assert made.problem == "the driver is away"


def test_a_reading_ages_while_nothing_comes(watches: list[HeatWatch]) -> None:
    clock = Clock()
    source = Source(Reading(at=clock.now, temperature_c=50.0))
    made = watch(watches, source, clock)
    source.answers.put(None)
    source.wait_asked(3)  # the second answer was taken
    clock.now += 12
    assert made.newest is not None
    assert made.newest.temperature_c == 50.0
    assert made.age_s == 12.0
    assert made.problem == "the driver is away"
    source.answers.put(Reading(at=clock.now, temperature_c=40.0))
    source.wait_asked(1)
    assert made.newest.temperature_c == 40.0
    assert made.age_s == 0.0
    assert made.problem is None


def test_a_source_that_raises_does_not_end_it(watches: list[HeatWatch]) -> None:
    clock = Clock()
    source = Source(RuntimeError("broken"))
    made = watch(watches, source, clock)
    assert made.problem == "RuntimeError: broken"
    source.answers.put(Reading(at=clock.now))
    source.wait_asked(3)
    assert made.newest is not None
    assert made.problem is None


def test_a_source_that_blocks_holds_nobody_up(watches: list[HeatWatch]) -> None:
    source = Source()
    made = watch(watches, source, Clock(), first_s=0.0)
    source.wait_asked(1)
    assert made.newest is None
    assert made.problem == "not read yet"
    made.close(timeout_s=0.0)  # does not wait for it


class Ready:
    """Answers at once."""

    description = "a ready source"
    problem = None

    def read(self) -> Reading | None:
        return Reading(at=0.0)


def test_close_ends_the_thread() -> None:
    before = set(threading.enumerate())
    made = HeatWatch(Ready(), 0.001)
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    made.close(timeout_s=WAIT_S)
    assert not thread.is_alive()
    assert made.newest == Reading(at=0.0)

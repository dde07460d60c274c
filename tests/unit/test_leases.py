"""Leases under a virtual clock: who holds one is never taken for dead, who is dead soon is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import custody as custody_module
from serve.custody import Custody
from serve.errors import StorageUnavailable
from serve.lease_store import LeaseStore
from serve.leases import LeaseWatch, Tenure
from serve.record_store import MemoryStore

LEASE_S = 10.0
# Mostly what happens: calls that take no time at all, and some that take ages.
_DELAYS = st.one_of(st.just(0.0), st.floats(0.0, 2.0), st.floats(0.0, 15.0))


@dataclass(frozen=True)
class Call:
    """One call to a store that may be slow: waited before it, on the way there, on the way back."""

    before_s: float
    there_s: float
    back_s: float
    is_answered: bool = True


CALLS = st.lists(
    st.builds(Call, st.floats(0.0, 12.0), _DELAYS, _DELAYS, st.booleans()), max_size=12
)
LOOKS = st.lists(st.builds(Call, st.floats(0.0, 4.0), _DELAYS, _DELAYS), max_size=25)


@dataclass
class World:
    """A store with one lease object, its owner and those who watch it."""

    etag: str | None = "0"
    now: float = 0.0
    tenure: Tenure = field(default_factory=lambda: Tenure(LEASE_S))
    takers: int = 0
    _timeline: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._timeline.append((when, len(self._timeline), what))

    def run(self) -> None:
        while self._timeline:
            self._timeline.sort(key=lambda item: item[:2])
            self.now, _, what = self._timeline.pop(0)
            what()

    def owner(self, calls: list[Call]) -> None:
        """Renew once after the other; a call that is not answered is given up at its end."""
        self.tenure.renewed(0.0)
        sent = 0.0
        for number, call in enumerate(calls, start=1):
            sent += call.before_s
            self._renewal(sent, call, f"{number}")
            sent += call.there_s + call.back_s

    def _renewal(self, sent: float, call: Call, etag: str) -> None:
        reached = sent + call.there_s
        arrived: list[bool] = []

        def arrives() -> None:
            arrived.append(self.etag is not None)
            self.etag = self.etag and etag

        def answered() -> None:
            if arrived[0]:
                self.tenure.renewed(sent)
            else:
                self.tenure.lost()

        self.at(reached, arrives)
        if call.is_answered:
            self.at(reached + call.back_s, answered)

    def reader(self, calls: list[Call]) -> None:
        watch = LeaseWatch(LEASE_S)
        asked = 0.0
        for call in calls:
            asked += call.before_s
            if call.is_answered:
                self._look(watch, asked, call)
            asked += call.there_s + call.back_s

    def _look(self, watch: LeaseWatch, asked: float, call: Call) -> None:
        seen: dict[str, str] = {}

        def lists() -> None:
            if self.etag is not None:
                seen["owner"] = self.etag

        def answered() -> None:
            stale = watch.observe(seen, asked, self.now)
            if stale and stale["owner"] == self.etag:
                # The conditional put that ends it.
                self.takers += 1
                self.etag = None
                assert not self.tenure.is_held(self.now), "taken from one who may still publish"

        self.at(asked + call.there_s, lists)
        self.at(asked + call.there_s + call.back_s, answered)


@given(CALLS, LOOKS, LOOKS)
@settings(max_examples=400)
def test_nobody_takes_from_one_who_may_still_publish(
    renewals: list[Call], first: list[Call], second: list[Call]
):
    world = World()
    world.owner(renewals)
    world.reader(first)
    world.reader(second)
    world.run()
    assert world.takers <= 1


@given(CALLS, st.floats(0.1, 2.0), st.floats(0.0, 1.0))
def test_who_is_dead_is_found_out(renewals: list[Call], every_s: float, delay_s: float):
    world = World()
    world.owner(renewals)
    dead = sum(call.before_s + call.there_s + call.back_s for call in renewals)
    looks = int((dead + 2.5 * LEASE_S) / (every_s + 2 * delay_s)) + 2
    world.reader([Call(every_s, delay_s, delay_s)] * looks)
    world.run()
    assert world.takers == 1


def test_who_could_not_look_has_seen_nothing():
    watch = LeaseWatch(LEASE_S)
    assert not watch.observe({"a": "1"}, 0.0, 0.1)
    # The store was gone for an hour; nobody could renew, and nobody is dead.
    assert not watch.observe({"a": "1"}, 3600.0, 3600.1)
    for now in (3604.0, 3608.0):
        assert not watch.observe({"a": "1"}, now, now)
    assert watch.observe({"a": "1"}, 3611.0, 3611.0) == {"a": "1"}
    assert not watch.observe({"a": "2"}, 3612.0, 3612.0)


def test_a_lease_is_believed_from_when_its_renewal_was_sent():
    tenure = Tenure(LEASE_S)
    assert not tenure.is_held(0.0)
    tenure.renewed(5.0)
    assert tenure.is_held(14.9)
    assert not tenure.is_held(15.0)
    # An answer that comes late says nothing new.
    tenure.renewed(3.0)
    assert tenure.is_held(14.9)
    tenure.lost()
    assert not tenure.is_held(5.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowStore(MemoryStore):
    """Takes some time of a clock for each write of a lease."""

    def __init__(self, clock: Clock, takes_s: float) -> None:
        super().__init__()
        self._clock = clock
        self._takes_s = takes_s

    async def swap(self, key: str, data: bytes, content_type: str, etag: str | None) -> str | None:
        self._clock.now += self._takes_s
        return await super().swap(key, data, content_type, etag)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(custody_module, "monotonic", clock)
    return clock


async def began_anew(before: str, name: str) -> None:
    raise AssertionError(f"{before} was not lost")


async def test_an_owner_counts_from_when_a_renewal_was_sent(clock: Clock):
    custody = Custody(LeaseStore(SlowStore(clock, 0.1 * LEASE_S)), LEASE_S, {}, began_anew)
    for _ in range(2):
        sent = clock.now
        await custody.keep()
        clock.now = sent + 0.99 * LEASE_S
        assert custody.is_held
        clock.now = sent + LEASE_S
        assert not custody.is_held


async def test_a_lease_that_takes_longer_to_be_had_than_it_lasts_is_none(clock: Clock):
    custody = Custody(LeaseStore(SlowStore(clock, 1.5 * LEASE_S)), LEASE_S, {}, began_anew)
    with pytest.raises(StorageUnavailable, match="cannot renew its lease"):
        await custody.holding()


async def test_who_has_renewed_cannot_be_ended_and_who_was_ended_cannot_renew():
    leases = LeaseStore(MemoryStore())
    seen = await leases.take("a", 1, {})
    renewed = await leases.renew(seen, {})
    assert renewed is not None
    assert not await leases.end(seen.name, seen.etag)
    assert (await leases.etags()) == {seen.name: renewed.etag}
    assert await leases.end(seen.name, renewed.etag)
    assert await leases.renew(renewed, {}) is None

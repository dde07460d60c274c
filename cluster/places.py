"""Places in a line outside: whoever is told to come again finds room when they do.

Under overload room that becomes free is taken at once by whoever comes next, so "come again in a
second" is true for one in ten. Here each one who is refused gets a time: the first second for which
not so many are expected already as can be served in it. Who comes back when told may use the last
part of the room, which is closed to others, as far as somebody is expected about now ("trunk
reservation" of telephony: Akinpelu, AT&T Bell Laboratories Technical Journal 63, 1984). The service
stays busy all the same. Whoever asks for little is not told to wait for all that another asks for:
no longer than if each one in the line had asked for as much.

Many never come back. How many do is learnt, and only those are expected.

Pure: whoever calls says what time it is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

RESERVED = 0.25  # of a deadline at most, for those who were told to come about now
_ABOUT_S = 5.0
LONGEST_S = 300.0  # that anybody is told
_MOST = 10_000
_BUSY = 0.8  # of a second, with those who are expected in it
_GRACE_S = 5.0  # that one may come later, and a tenth of what they were told to wait
_GRACE_SHARE = 0.1
_EARLY_S = 0.05  # clocks and roundings
_MEAN_OF = 50
_BELIEVED = 10  # so many who come are believed in to begin with
_LEAST_SHARE = 0.02


def room_beside(whole: float, expected_s: float) -> float:
    """Return how much of some room is open to who was not told to come now.

    Args:
        whole: Seconds of work.
        expected_s: That those bring who were.
    """
    return whole - min(RESERVED * whole, expected_s)


@dataclass(frozen=True, slots=True)
class _Place:
    whose: bytes
    due: float
    gone_at: float
    work_s: float
    a_second_s: float  # of the work in each second from then on


@dataclass(slots=True)
class _Taken:
    keys: dict[bytes, None] = field(default_factory=dict)  # the first one first
    work_s: float = 0.0


class Places:
    """Of one process; not thread-safe."""

    def __init__(self) -> None:
        self._places: OrderedDict[bytes, _Place] = OrderedDict()
        self._work_s: dict[int, float] = {}  # by the second in which it is done
        self._taken: dict[bytes, _Taken] = {}  # by whose they are
        self._share = 1.0
        self._learnt_of = _BELIEVED

    def __len__(self) -> int:
        return len(self._places)

    @property
    def share_who_come(self) -> float:
        """Of those who were told to come again."""
        return self._share

    def is_turn(self, key: bytes, now: float) -> bool:
        """Whether somebody is here who was told to come now."""
        self._forget(now)
        place = self._places.get(key)
        return place is not None and place.due - _EARLY_S <= now <= place.gone_at

    def room(self, whole: float, key: bytes, now: float) -> float:
        """Return how much of some room is open to somebody."""
        if self.is_turn(key, now):
            return whole
        return room_beside(whole, self.expected_s(now))

    def expected_s(self, now: float) -> float:
        """Return how much work those bring who were told to come about now, as many as come."""
        if not self._places:
            return 0.0
        about_now = range(int(now - _ABOUT_S), int(now + _ABOUT_S) + 1)
        return self._share * sum(self._work_s.get(second, 0.0) for second in about_now)

    def came(self, key: bytes) -> None:
        """Note that somebody found room; it does no harm if they had no place."""
        if key in self._places:
            self._drop(key)
            self._learn(1.0)

    def promise(
        self,
        key: bytes,
        wait_s: float,
        work_s: float,
        now: float,
        *,
        whose: bytes = b"",
        is_first: bool = False,
    ) -> float:
        """Give somebody a place and return the seconds until it is their turn.

        Whoever has one keeps it; whoever came in their turn and found no room after all is first.

        Args:
            key: What is asked for, and by whom.
            wait_s: Until there is room, were nobody else expected.
            work_s: What they will keep the service busy with.
            now: Seconds.
            whose: Of those who share the line in equal parts.
            is_first: They came in their turn, and it was noted that they did.
        """
        self._forget(now)
        self._forget_own(whose, now)
        wait_s = min(max(wait_s, 1.0), LONGEST_S)
        place = self._places.get(key)
        if place is not None and place.due - _EARLY_S > now:
            return place.due - now
        if place is not None:
            self._drop(key)
        due, latest = now + wait_s, now + LONGEST_S
        if place is None and not is_first:
            latest = min(latest, due + self._fair_s(whose, work_s))
            due = self._first_free(due, latest, work_s)
        taken = self._taken.get(whose) or _Taken()
        # Nobody takes up more than they leave free.
        if len(taken.keys) + len(self._places) < _MOST:
            gone_at = due + _GRACE_S + _GRACE_SHARE * (due - now)
            place = _Place(whose, due, gone_at, min(work_s, LONGEST_S), _BUSY / self._share)
            self._places[key] = place
            self._taken[whose] = taken
            taken.keys[key] = None
            taken.work_s += place.work_s
            self._count(place, 1.0)
        return due - now

    def _fair_s(self, whose: bytes, work_s: float) -> float:
        """Return how long somebody waits for others at most who get as much done as they do."""
        own = self._taken.get(whose)
        others = len(self._taken) - (own is not None)
        if not others:
            return math.inf
        own_s = 0.0 if own is None else own.work_s
        return self._share * (own_s + others * (own_s + work_s)) / _BUSY

    def _first_free(self, earliest: float, latest: float, work_s: float) -> float:
        # What takes longer than a second goes on in the next ones.
        needed_s = min(work_s * self._share, _BUSY)
        for second in range(int(earliest), int(latest)):
            expected_s = self._work_s.get(second, 0.0) * self._share
            if not expected_s or expected_s + needed_s <= _BUSY:
                # One after the other within the second as well.
                return min(latest, max(earliest, second + expected_s / _BUSY))
        return latest

    def _forget(self, now: float) -> None:
        while self._places:
            key, place = next(iter(self._places.items()))
            if place.gone_at >= now:
                return
            self._drop(key)
            self._learn(0.0)

    def _forget_own(self, whose: bytes, now: float) -> None:
        # Others' before them may be for later, and what did not come counts no more.
        while (taken := self._taken.get(whose)) is not None:
            key = next(iter(taken.keys))
            if self._places[key].gone_at >= now:
                return
            self._drop(key)
            self._learn(0.0)

    def _drop(self, key: bytes) -> None:
        place = self._places.pop(key)
        self._count(place, -1.0)
        taken = self._taken[place.whose]
        del taken.keys[key]
        taken.work_s -= place.work_s
        if not taken.keys:
            del self._taken[place.whose]

    def _count(self, place: _Place, sign: float) -> None:
        second, left_s = int(place.due), place.work_s
        while left_s > 0:
            part_s = min(left_s, place.a_second_s)
            work_s = self._work_s.pop(second, 0.0) + sign * part_s
            if work_s > 1e-9:
                self._work_s[second] = work_s
            second, left_s = second + 1, left_s - part_s

    def _learn(self, came: float) -> None:
        self._learnt_of = min(self._learnt_of + 1, _MEAN_OF)
        self._share = max(self._share + (came - self._share) / self._learnt_of, _LEAST_SHARE)

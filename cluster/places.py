"""Places in a line outside: whoever is told to come again finds room when they do.

Under overload room that becomes free is taken at once by whoever comes next, so "come again in a
second" is true for one in ten. Here each one who is refused gets a time: the first second for which
not so many are expected already as can be served in it. Who comes back when told may use the last
part of the room, which is closed to others, as far as somebody is expected about now ("trunk
reservation" of telephony: Akinpelu, AT&T Bell Laboratories Technical Journal 63, 1984). The service
stays busy all the same.

Many never come back. How many do is learnt, and only those are expected.

Pure: whoever calls says what time it is.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

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
    due: float
    gone_at: float
    work_s: float


class Places:
    """Of one process; not thread-safe."""

    def __init__(self) -> None:
        self._places: OrderedDict[bytes, _Place] = OrderedDict()
        self._work_s: dict[int, float] = {}  # by the second in which it is due
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
        self, key: bytes, wait_s: float, work_s: float, now: float, *, is_first: bool = False
    ) -> float:
        """Give somebody a place and return the seconds until it is their turn.

        Whoever has one keeps it; whoever came in their turn and found no room after all is first.

        Args:
            key: Who, or what they ask for.
            wait_s: Until there is room, were nobody else expected.
            work_s: What they will keep the service busy with.
            now: Seconds.
            is_first: They came in their turn, and it was noted that they did.
        """
        self._forget(now)
        wait_s = min(max(wait_s, 1.0), LONGEST_S)
        place = self._places.get(key)
        if place is not None and place.due - _EARLY_S > now:
            return place.due - now
        if place is not None:
            self._drop(key)
        if place is None and not is_first:
            due = self._first_free(now + wait_s, now + LONGEST_S, work_s)
        else:
            due = now + wait_s
        if len(self._places) < _MOST:
            gone_at = due + _GRACE_S + _GRACE_SHARE * (due - now)
            self._places[key] = _Place(due, gone_at, work_s)
            self._work_s[int(due)] = self._work_s.get(int(due), 0.0) + work_s
        return due - now

    def _first_free(self, earliest: float, latest: float, work_s: float) -> float:
        for second in range(int(earliest), int(latest)):
            expected_s = self._work_s.get(second, 0.0) * self._share
            if not expected_s or expected_s + work_s * self._share <= _BUSY:
                # One after the other within the second as well.
                return max(earliest, second + expected_s / _BUSY)
        return latest

    def _forget(self, now: float) -> None:
        while self._places:
            key, place = next(iter(self._places.items()))
            if place.gone_at >= now:
                return
            self._drop(key)
            self._learn(0.0)

    def _drop(self, key: bytes) -> None:
        place = self._places.pop(key)
        second = int(place.due)
        left_s = self._work_s.pop(second, 0.0) - place.work_s
        if left_s > 1e-9:
            self._work_s[second] = left_s

    def _learn(self, came: float) -> None:
        self._learnt_of = min(self._learnt_of + 1, _MEAN_OF)
        self._share = max(self._share + (came - self._share) / self._learnt_of, _LEAST_SHARE)

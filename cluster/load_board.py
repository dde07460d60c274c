"""What one process knows of the replicas of a pool, kept so that a decision takes microseconds.

Replicas tell of themselves on the stream of each request's progress; in between, this process adds
what it sent there itself and takes off what a replica does in the time that has passed. A newer
report replaces that, except for what was sent so lately that the replica cannot have counted it.

Everything is kept in arrays, one place a replica, so choosing among a thousand is a handful of
vector operations. Used from any thread. It has no clock: whoever calls says what time it is, so it
works under a virtual one too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from cluster.derating import Floats
from cluster.routing import (
    ReplicaLoad,
    RoutedWork,
    RoutingSettings,
    avoidance,
    blur_widths,
    doubt,
    seconds_of,
    slowness,
    staleness,
    told_seconds,
    told_speed,
)

_NEVER = -1e9
# What was sent less long ago than this before a report was made may not be in it yet.
_TRANSIT_S = 0.1
# How often it is worked out anew whose reports have become old: nothing hurries there.
_REFRESH_S = 0.1
_MEAN_OF = 20.0


class LoadBoard:
    """The loads of one pool's replicas as one process knows them.

    Args:
        settings: How to weigh.
        seed: Of chance; None takes one of the system's.
    """

    def __init__(self, settings: RoutingSettings, seed: int | None = None) -> None:
        self._settings = settings
        self._random = np.random.default_rng(seed)
        self._guard = threading.Lock()
        self._place: dict[str, int] = {}
        self._ids: list[str] = []
        self._sent: list[deque[tuple[float, float]]] = []
        self._holds: dict[str, Floats] = {}  # 1 where a replica lacks the key
        self._usual_s = settings.usual_s
        self._told = 0
        self._refreshed_at = _NEVER
        self._resize(0)

    def _resize(self, size: int) -> None:
        self._pending = np.zeros(size)
        self._as_of = np.full(size, _NEVER)
        self._told_at = np.full(size, _NEVER)
        self._speed = np.ones(size)
        self._margin = np.full(size, np.nan)
        self._throttled = np.zeros(size, dtype=np.bool_)
        self._in_flight = np.zeros(size, dtype=np.int64)
        # Worked out from the above by `_refresh`.
        self._per_s = np.ones(size)
        self._extra = np.zeros(size)
        self._width = np.zeros(size)

    def __len__(self) -> int:
        return len(self._ids)

    def keep(self, ids: Sequence[str]) -> None:
        """Have exactly these replicas to choose from; what is known of them stays known."""
        with self._guard:
            if ids != self._ids:
                self._keep(list(dict.fromkeys(ids)))

    def _keep(self, ids: list[str]) -> None:
        old = {name: self._place[name] for name in ids if name in self._place}
        kept = [(at, old[name]) for at, name in enumerate(ids) if name in old]
        to = np.array([at for at, _ in kept], dtype=np.int64)
        source = np.array([at for _, at in kept], dtype=np.int64)
        names = ("_pending", "_as_of", "_told_at", "_speed", "_margin", "_throttled", "_in_flight")
        before = {name: getattr(self, name) for name in names}
        sent = self._sent
        self._resize(len(ids))
        for name, values in before.items():
            getattr(self, name)[to] = values[source]
        self._sent = [sent[old[name]] if name in old else deque() for name in ids]
        for key, lacks in self._holds.items():
            self._holds[key] = np.ones(len(ids))
            self._holds[key][to] = lacks[source]
        self._ids = ids
        self._place = {name: at for at, name in enumerate(ids)}
        self._told = int((self._told_at > _NEVER).sum())
        self._refreshed_at = _NEVER

    def report(self, load: ReplicaLoad, now: float) -> None:
        """Note what a replica told; it becomes one to choose from.

        Args:
            load: As told; `age_s` is how long ago, None being just now.
            now: Seconds.
        """
        made_at = now - told_seconds(load.age_s or 0.0)
        with self._guard:
            if load.id not in self._place:
                self._keep([*self._ids, load.id])
            at = self._place[load.id]
            if made_at < self._told_at[at]:
                return
            self._told += self._told_at[at] == _NEVER
            sent = self._sent[at]
            while sent and sent[0][0] < made_at - _TRANSIT_S:
                sent.popleft()
            self._pending[at] = told_seconds(load.backlog_s) + sum(work for _, work in sent)
            self._as_of[at] = self._told_at[at] = made_at
            self._speed[at] = told_speed(load.speed)
            self._margin[at] = np.nan if load.margin_c is None else load.margin_c
            self._throttled[at] = load.throttled
            self._note_holds(at, load.holds)
            self._renew(slice(at, at + 1), now)

    def sent(self, replica: str, work: RoutedWork, now: float) -> None:
        """Note that this process sends work to a replica now."""
        with self._guard:
            at = self._place.get(replica)
            if at is not None:
                self._send(at, work, now)

    def _send(self, at: int, work: RoutedWork, now: float) -> None:
        own = seconds_of(work, self._usual_s)
        if work.cool_s is not None:
            self._usual_s += (own - self._usual_s) / _MEAN_OF
        done = self._speed[at] * max(now - self._as_of[at], 0.0)
        self._pending[at] = max(self._pending[at] - done, 0.0) + own
        self._as_of[at] = max(now, self._as_of[at])
        self._in_flight[at] += 1
        self._sent[at].append((now, own))

    def finished(self, replica: str) -> None:
        """Note that something which this process had sent there is done, or failed."""
        with self._guard:
            at = self._place.get(replica)
            if at is not None and self._in_flight[at] > 0:
                self._in_flight[at] -= 1

    def choose(self, work: RoutedWork, now: float) -> str | None:
        """Return where the work is best sent; None: no replica is known."""
        with self._guard:
            if not self._ids:
                return None
            return self._ids[self._best(work, now)]

    def assign(self, work: RoutedWork, now: float) -> str | None:
        """Choose and note as sent, in one: between two threads nothing is chosen twice."""
        with self._guard:
            if not self._ids:
                return None
            at = self._best(work, now)
            self._send(at, work, now)
            return self._ids[at]

    def ranked(self, work: RoutedWork, now: float, most: int | None = None) -> list[str]:
        """Return replicas, the best first.

        Args:
            work: To be sent.
            now: Seconds.
            most: How many at most; None: all.
        """
        with self._guard:
            if not self._ids:
                return []
            if not self._told:
                first = self._best(work, now)
                order = self._random.permutation(len(self._ids))
                order = np.concatenate(([first], order[order != first]))
            else:
                order = np.argsort(self._blurred(work, now), kind="stable")
            return [self._ids[at] for at in order[:most]]

    def soonest(self, work: RoutedWork, now: float) -> float | None:
        """Return seconds in which the best replica would have done the work; None without any."""
        with self._guard:
            return float(self._finish(work, now).min()) if self._ids else None

    def is_full(self, work: RoutedWork, now: float) -> bool:
        """Whether every replica has enough to do, so that the work better waits outside of them.

        What waits outside goes to whoever is free first, also to a replica that only then starts;
        what was once sent stays. A replica is full with `full_s` seconds of work or `full_requests`
        requests like this one, whichever is more: batches still fill. False without replicas.
        """
        with self._guard:
            if not self._ids or not self._told:
                return False
            own = seconds_of(work, self._usual_s)
            held = (self._pending - self._speed * (now - self._as_of)) / self._speed
            limit = max(self._settings.full_s, self._settings.full_requests * own)
            return float(held.min()) >= limit

    @property
    def speed(self) -> float:
        """Cool seconds that all replicas together do a second."""
        with self._guard:
            return float(self._speed.sum())

    def _best(self, work: RoutedWork, now: float) -> int:
        if self._told:
            return int(self._blurred(work, now).argmin())
        count = len(self._ids)
        one, other = (int(at) for at in self._random.integers(count, size=2))
        if one == other:
            other = (one + 1) % count
        return other if self._in_flight[other] < self._in_flight[one] else one

    def _blurred(self, work: RoutedWork, now: float) -> Floats:
        times = self._finish(work, now)
        tie = self._settings.tie * seconds_of(work, self._usual_s)
        times += (self._width + tie) * self._random.random(len(times))
        return times

    def _finish(self, work: RoutedWork, now: float) -> Floats:
        if now - self._refreshed_at > _REFRESH_S or now < self._refreshed_at:
            self._refresh(now)
        # In place, one array: memory traffic is most of what this costs.
        times: Floats = now - self._as_of
        times *= self._speed
        np.subtract(self._pending, times, out=times)
        np.maximum(times, 0.0, out=times)
        times += seconds_of(work, self._usual_s)
        times *= self._per_s
        times += self._extra
        for key in work.wants:
            lacks = self._holds.get(key)
            times += self._settings.missing_s * (1.0 if lacks is None else lacks)
        return times

    def _refresh(self, now: float) -> None:
        """Work out anew what changes as reports grow old."""
        self._refreshed_at = now
        held = np.maximum(self._pending - self._speed * (now - self._as_of), 0.0)
        self._renew(slice(None), now)
        stale = staleness(now - self._told_at, self._settings.stale_after_s)
        self._width += doubt(held, stale)

    def _renew(self, places: slice, now: float) -> None:
        """Work out what follows from the newest reports of some replicas."""
        settings = self._settings
        age = np.maximum(now - self._told_at[places], 0.0)
        avoided = avoidance(self._margin[places], self._throttled[places], settings)
        avoided = avoided * (1.0 - staleness(age, settings.heat_stale_after_s))
        self._per_s[places] = slowness(self._speed[places], avoided, settings)
        self._extra[places] = settings.hot_wait_s * avoided
        self._width[places] = blur_widths(age, settings)

    def _note_holds(self, at: int, holds: frozenset[str]) -> None:
        for key in holds - self._holds.keys():
            self._holds[key] = np.ones(len(self._ids))
        for key, lacks in self._holds.items():
            lacks[at] = key not in holds

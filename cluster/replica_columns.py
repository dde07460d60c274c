"""Replicas' loads in arrays, one place a replica, and when each would have done a piece of work.

Choosing among a thousand is a handful of vector operations. What follows from reports is worked out
when somebody asks, for all that have reported since in one go: a busy Pipeline hears far more often
than it chooses. Not thread-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from cluster.derating import Floats
from cluster.routing import ReplicaLoad, RoutedWork, RoutingSettings, told_seconds, told_speed
from cluster.routing_weights import avoidance, blur_widths, doubt, slowness, staleness

NEVER = -1e9
# What was sent less long ago than this before a report was made may not be in it yet.
_TRANSIT_S = 0.1
# How often it is worked out anew whose reports have become old: nothing hurries there.
_REFRESH_S = 0.1
_KEPT = ("pending", "as_of", "told_at", "speed", "_margin", "_throttled", "in_flight")


class ReplicaColumns:
    """The loads of some replicas.

    Args:
        settings: How to weigh.

    Attributes:
        ids: Of the replicas, by place.
        place: Of each id.
        pending: Cool seconds that each held at `as_of`.
        as_of: When that was.
        told_at: When each last told of itself; `NEVER` if it did not.
        speed: Cool seconds a second.
        in_flight: Requests that this process sent there and that have not ended.
        width: Seconds by which each estimate may be off.
        told: Replicas that ever told.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self._settings = settings
        self.ids: list[str] = []
        self.place: dict[str, int] = {}
        self.told = 0
        self._sent: list[deque[tuple[float, float]]] = []
        self._holds: dict[str, Floats] = {}  # 1 where a replica holds the key
        self._changed: set[int] = set()
        self._refreshed_at = NEVER
        self._resize(0)

    def _resize(self, size: int) -> None:
        self.pending = np.zeros(size)
        self.as_of = np.full(size, NEVER)
        self.told_at = np.full(size, NEVER)
        self.speed = np.ones(size)
        self._margin = np.full(size, np.nan)
        self._throttled = np.zeros(size, dtype=np.bool_)
        self.in_flight = np.zeros(size, dtype=np.int64)
        # Worked out from the above by `_renew`.
        self._per_s = np.ones(size)
        self._extra = np.zeros(size)
        self.width = np.zeros(size)

    def keep(self, ids: Sequence[str]) -> None:
        """Have exactly these replicas; what is known of them stays known."""
        unique = list(dict.fromkeys(ids))
        if unique == self.ids:
            return
        old = {name: self.place[name] for name in unique if name in self.place}
        kept = [(at, old[name]) for at, name in enumerate(unique) if name in old]
        to = np.array([at for at, _ in kept], dtype=np.int64)
        source = np.array([at for _, at in kept], dtype=np.int64)
        before = {name: getattr(self, name) for name in _KEPT}
        self._resize(len(unique))
        for name, values in before.items():
            getattr(self, name)[to] = values[source]
        self._sent = [self._sent[old[name]] if name in old else deque() for name in unique]
        for key, has in self._holds.items():
            self._holds[key] = np.zeros(len(unique))
            self._holds[key][to] = has[source]
        self.ids = unique
        self.place = {name: at for at, name in enumerate(unique)}
        self.told = int((self.told_at > NEVER).sum())
        self._changed.clear()
        self._refreshed_at = NEVER

    def report(self, load: ReplicaLoad, now: float) -> None:
        """Note what a replica told, unless something newer is known."""
        made_at = now - told_seconds(load.age_s or 0.0)
        at = self.place[load.id]
        if made_at < self.told_at[at]:
            return
        self.told += bool(self.told_at[at] == NEVER)
        sent = self._sent[at]
        while sent and sent[0][0] < made_at - _TRANSIT_S:
            sent.popleft()
        self.pending[at] = told_seconds(load.backlog_s) + sum(work for _, work in sent)
        self.as_of[at] = self.told_at[at] = made_at
        self.speed[at] = told_speed(load.speed)
        self._margin[at] = np.nan if load.margin_c is None else load.margin_c
        self._throttled[at] = load.throttled
        if load.holds or self._holds:
            self._note_holds(at, load.holds)
        self._changed.add(at)

    def send(self, at: int, own_s: float, now: float) -> None:
        """Note that so much work is sent to a place."""
        done = self.speed[at] * max(now - self.as_of[at], 0.0)
        self.pending[at] = max(self.pending[at] - done, 0.0) + own_s
        self.as_of[at] = max(now, self.as_of[at])
        self.in_flight[at] += 1
        self._sent[at].append((now, own_s))

    def held_s(self, now: float) -> Floats:
        """Return the cool seconds that each holds by now."""
        # In place, one array: memory traffic is most of what this costs.
        held: Floats = now - self.as_of
        held *= self.speed
        np.subtract(self.pending, held, out=held)
        np.maximum(held, 0.0, out=held)
        return held

    def finish_s(self, work: RoutedWork, own_s: float, now: float) -> Floats:
        """Return in how many seconds each would have done the work.

        Args:
            work: What it wants and joins.
            own_s: Cool seconds of it.
            now: Seconds.
        """
        if now - self._refreshed_at > _REFRESH_S or now < self._refreshed_at:
            self._refresh(now)
        elif self._changed:
            changed = np.fromiter(self._changed, np.int64, len(self._changed))
            self._changed.clear()
            self._renew(changed, now)
        times = self.held_s(now)
        for key, gained_s in work.joins.items():
            has = self._holds.get(key)
            if has is not None:
                times -= has * np.minimum(times, gained_s)
        times += own_s
        times *= self._per_s
        times += self._extra
        for key, fetched_s in work.wants.items():
            has = self._holds.get(key)
            times += fetched_s if has is None else fetched_s * (1.0 - has)
        return times

    def _refresh(self, now: float) -> None:
        """Work out anew what changes as reports grow old."""
        self._refreshed_at = now
        self._changed.clear()
        self._renew(slice(None), now)
        stale = staleness(now - self.told_at, self._settings.stale_after_s)
        if stale.any():
            self.width += doubt(self.held_s(now), stale)

    def _renew(
        self, places: slice | np.ndarray[tuple[int], np.dtype[np.int64]], now: float
    ) -> None:
        """Work out what follows from the newest reports of some replicas."""
        settings = self._settings
        age = np.maximum(now - self.told_at[places], 0.0)
        avoided = avoidance(self._margin[places], self._throttled[places], settings)
        avoided = avoided * (1.0 - staleness(age, settings.heat_stale_after_s))
        self._per_s[places] = slowness(self.speed[places], avoided, settings)
        self._extra[places] = settings.hot_wait_s * avoided
        self.width[places] = blur_widths(age, settings)

    def _note_holds(self, at: int, holds: frozenset[str]) -> None:
        for key in holds - self._holds.keys():
            self._holds[key] = np.zeros(len(self.ids))
        for key in [key for key, has in self._holds.items() if key not in holds and has[at]]:
            self._holds[key][at] = 0.0
            if not self._holds[key].any():
                del self._holds[key]  # sizes and LoRAs come and go, without bound
        for key in holds:
            self._holds[key][at] = 1.0

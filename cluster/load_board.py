"""What one process knows of the replicas of a pool, kept so that a decision takes microseconds.

Replicas tell of themselves on the stream of each request's progress; in between, this process adds
what it sent there itself and takes off what a replica does in the time that has passed. A newer
report replaces that, except for what was sent so lately that the replica cannot have counted it.

Used from any thread. It has no clock: whoever calls says what time it is, so it works under a
virtual one too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from cluster.derating import Floats
from cluster.replica_columns import ReplicaColumns
from cluster.routing import ReplicaLoad, RoutedWork, RoutingSettings, seconds_of

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
        self._columns = ReplicaColumns(settings)
        self._usual_s = settings.usual_s

    def __len__(self) -> int:
        return len(self._columns.ids)

    def keep(self, ids: Sequence[str]) -> None:
        """Have exactly these replicas to choose from; what is known of them stays known."""
        with self._guard:
            self._columns.keep(ids)

    def report(self, load: ReplicaLoad, now: float) -> None:
        """Note what a replica told; it becomes one to choose from.

        Args:
            load: As told; `age_s` is how long ago, None being just now.
            now: Seconds.
        """
        with self._guard:
            columns = self._columns
            if load.id not in columns.place:
                columns.keep([*columns.ids, load.id])
            columns.report(load, now)

    def sent(self, replica: str, work: RoutedWork, now: float) -> None:
        """Note that this process sends work to a replica now."""
        with self._guard:
            at = self._columns.place.get(replica)
            if at is not None:
                self._send(at, work, now)

    def _send(self, at: int, work: RoutedWork, now: float) -> None:
        own = seconds_of(work, self._usual_s)
        if work.cool_s is not None:
            self._usual_s += (own - self._usual_s) / _MEAN_OF
        self._columns.send(at, own, now)

    def finished(self, replica: str) -> None:
        """Note that something which this process had sent there is done, or failed."""
        with self._guard:
            at = self._columns.place.get(replica)
            if at is not None and self._columns.in_flight[at] > 0:
                self._columns.in_flight[at] -= 1

    def in_flight(self, replica: str) -> int:
        """Return how many requests this process has sent there that have not ended."""
        with self._guard:
            at = self._columns.place.get(replica)
            return 0 if at is None else int(self._columns.in_flight[at])

    def choose(self, work: RoutedWork, now: float) -> str | None:
        """Return where the work is best sent; None: no replica is known."""
        with self._guard:
            if not self._columns.ids:
                return None
            return self._columns.ids[self._best(work, now)]

    def assign(self, work: RoutedWork, now: float) -> str | None:
        """Choose and note as sent, in one: between two threads nothing is chosen twice."""
        with self._guard:
            if not self._columns.ids:
                return None
            at = self._best(work, now)
            self._send(at, work, now)
            return self._columns.ids[at]

    def ranked(self, work: RoutedWork, now: float, most: int | None = None) -> list[str]:
        """Return replicas, the best first.

        Args:
            work: To be sent.
            now: Seconds.
            most: How many at most; None: all.
        """
        with self._guard:
            ids = self._columns.ids
            if not ids:
                return []
            if not self._columns.told:
                first = self._best(work, now)
                order = self._random.permutation(len(ids))
                order = np.concatenate(([first], order[order != first]))
            else:
                times = self._blurred(work, now)
                if most is not None and most < len(ids):  # to sort them all takes far longer
                    first_ones = np.argpartition(times, most)[:most]
                    order = first_ones[np.argsort(times[first_ones], kind="stable")]
                else:
                    order = np.argsort(times, kind="stable")
            return [ids[at] for at in order[:most]]

    def soonest(self, work: RoutedWork, now: float) -> float | None:
        """Return seconds in which the best replica would have done the work; None without any."""
        with self._guard:
            return float(self._finish(work, now).min()) if self._columns.ids else None

    def is_full(self, work: RoutedWork, now: float) -> bool:
        """Whether every replica has enough to do, so that the work better waits outside of them.

        What waits outside goes to whoever is free first, also to a replica that only then starts;
        what was once sent stays. A replica is full with `full_s` seconds of work or `full_requests`
        requests like this one, whichever is more: batches still fill. False without replicas.
        """
        with self._guard:
            columns = self._columns
            if not columns.told:
                return False
            limit_s = self._settings.full_requests * seconds_of(work, self._usual_s)
            waits_s = columns.held_s(now) / columns.speed
            return float(waits_s.min()) >= max(self._settings.full_s, limit_s)

    @property
    def speed(self) -> float:
        """Cool seconds that all replicas together do a second."""
        with self._guard:
            return float(self._columns.speed.sum())

    def _best(self, work: RoutedWork, now: float) -> int:
        if self._columns.told:
            return int(self._blurred(work, now).argmin())
        in_flight = self._columns.in_flight
        one, other = (int(at) for at in self._random.integers(len(in_flight), size=2))
        if one == other:
            other = (one + 1) % len(in_flight)
        return other if in_flight[other] < in_flight[one] else one

    def _blurred(self, work: RoutedWork, now: float) -> Floats:
        times = self._finish(work, now)
        tie = self._settings.tie * seconds_of(work, self._usual_s)
        times += (self._columns.width + tie) * self._random.random(len(times))
        return times

    def _finish(self, work: RoutedWork, now: float) -> Floats:
        return self._columns.finish_s(work, seconds_of(work, self._usual_s), now)

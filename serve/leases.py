"""When a Pipeline process counts as alive: the rules, without any I/O and without a clock.

Each process keeps one lease object in the journal's store and rewrites it again and again. Clocks
of two machines are never compared: a reader watches an object's ETag and takes the process for
dead once it has not changed for `lease_s` seconds of the reader's own monotonic clock. The owner
in turn trusts its lease for `lease_s` seconds from the moment it sent the last renewal that
succeeded. Nobody can have seen that renewal's ETag before it was sent, so as long as both clocks
run equally fast the owner has stopped before any reader begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Renewals are missed by a slow store or a starved process; one or two of these are no death.
RENEWALS_PER_LEASE = 5
# A reader who could not look for this share of a lease has not seen whether it was renewed.
_LONGEST_GAP = 0.6


@dataclass(frozen=True)
class _Seen:
    etag: str
    since: float  # seconds of the reader's clock; it has been this ETag from then on, at least


class LeaseWatch:
    """What one reader has seen of everybody's leases.

    Args:
        lease_s: Seconds without a change after which a lease is stale.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, _Seen] = {}
        self._last_answer: float | None = None

    def observe(self, etags: Mapping[str, str], asked: float, answered: float) -> dict[str, str]:
        """Take a listing and return the stale leases, name -> ETag.

        After a pause, whether the store did not answer or this process stood still, everybody is
        given the whole time again: their owners may have been cut off just as well.

        Args:
            etags: Name -> ETag of all leases there are.
            asked: When the listing was sent for, in seconds of this process's monotonic clock.
            answered: When it had come.
        """
        paused = (
            self._last_answer is None or asked - self._last_answer > _LONGEST_GAP * self._lease_s
        )
        self._last_answer = answered
        before = {} if paused else self._seen
        self._seen = {
            name: before[name]
            if name in before and before[name].etag == etag
            else _Seen(etag, answered)
            for name, etag in etags.items()
        }
        return {
            name: seen.etag
            for name, seen in self._seen.items()
            if asked - seen.since >= self._lease_s
        }


class Tenure:
    """What the owner of a lease may believe of it.

    Args:
        lease_s: The same as the readers'.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._until = float("-inf")

    def renewed(self, sent: float) -> None:
        """Note a renewal that succeeded; `sent` is when it was sent, by this process's clock."""
        self._until = max(self._until, sent + self._lease_s)

    def lost(self) -> None:
        """Note that somebody has ended the lease."""
        self._until = float("-inf")

    def is_held(self, now: float) -> bool:
        """Return whether no reader can take this process for dead yet."""
        return now < self._until

"""The events of jobs that ended in this process lately, for followers who come late or again.

Packed: some hundred bytes a job instead of the tens of kilobytes that events take as objects, with
the tasks and contexts that made them. Who comes later still is told the first and the last event,
from the store.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from serve.requests import JobEvent

MOST_BYTES: Final = 512 << 10  # packed: some hundreds of jobs
_FASTEST = 1


class _Kept(NamedTuple):
    tenant: str
    packed: bytes


class EndedJobs:
    """Of one process, on one event loop; iterates over ids, oldest first.

    Args:
        most_bytes: Of packed events; beyond it the oldest job is forgotten.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._jobs: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def keep(self, job_id: str, tenant: str, events: Sequence[JobEvent]) -> None:
        """Keep all events of a job, up to the last."""
        self.forget(job_id)
        lines = (event.model_dump_json(exclude_defaults=True) for event in events)
        kept = _Kept(tenant, zlib.compress("\n".join(lines).encode(), _FASTEST))
        self._jobs[job_id] = kept
        self._bytes += len(kept.packed)
        while self._bytes > self._most_bytes:
            self.forget(next(iter(self._jobs)))

    def forget(self, job_id: str) -> None:
        """Keep nothing of a job; no harm if nothing is kept."""
        if (kept := self._jobs.pop(job_id, None)) is not None:
            self._bytes -= len(kept.packed)

    def events(self, job_id: str, tenant: str) -> list[JobEvent]:
        """Return a tenant's job's events, the last one included; none if they are not kept."""
        return [JobEvent.model_validate_json(line) for line in self._lines(job_id, tenant)]

    def last(self, job_id: str, tenant: str) -> JobEvent | None:
        """Return how a tenant's job ended, if it is kept."""
        lines = self._lines(job_id, tenant)
        return JobEvent.model_validate_json(lines[-1]) if lines else None

    def _lines(self, job_id: str, tenant: str) -> list[bytes]:
        kept = self._jobs.get(job_id)
        if kept is None or kept.tenant != tenant:
            return []
        return zlib.decompress(kept.packed).split(b"\n")

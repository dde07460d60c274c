"""Jobs of dead Pipelines that go on in this one: which are taken, and how they start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

from serve.departure import Departure
from serve.errors import Overloaded
from serve.job_ids import accepted_seconds_ago
from serve.requests import GenerateRequest
from serve.room_halves import RoomHalves
from serve.running import RunningJob


class Adoption:
    """Where orphans go; see `serve.takeover`.

    Args:
        live: All jobs of this process by id, adopted ones among them once started.
        admit: Resolves a request as at acceptance, and raises Overloaded if there is no room in
            the half of orphans.
        halves: Of the room.
        start: Makes a job live.
        at_once: Orphans, at most.
        departure: Of this process, which takes nothing over once it goes.
    """

    def __init__(
        self,
        live: Mapping[str, RunningJob],
        admit: Callable[[GenerateRequest], Awaitable[GenerateRequest]],
        halves: RoomHalves,
        start: Callable[[RunningJob], None],
        at_once: int,
        departure: Departure,
    ) -> None:
        self._live = live
        self._admit = admit
        self._halves = halves
        self._start = start
        self._at_once = at_once
        self._departure = departure

    @property
    def live(self) -> tuple[RunningJob, ...]:
        """The jobs that live here."""
        return tuple(self._live.values())

    @property
    def live_ids(self) -> Collection[str]:
        """Their ids, as they change."""
        return self._live.keys()

    def holds(self, job_id: str) -> bool:
        """Return whether a job lives here, and has not been given up to another process."""
        job = self._live.get(job_id)
        return job is not None and not job.is_given_up

    async def resolved(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request of an orphan as it can be started now.

        Raises:
            Overloaded: There is no room.
            KelvinError: As at acceptance.
        """
        if self._departure.has_begun:
            raise Overloaded("This Pipeline is stopping.")
        self._halves.adopted.intersection_update(self._live)
        if len(self._halves.adopted) >= self._at_once:
            raise Overloaded("As many orphans as may be are under way.")
        return await self._admit(request)

    def none_waits(self) -> None:
        """Say that every orphan found room, or went elsewhere."""
        self._halves.waited_for.clear()

    def adopt(self, job_id: str, resolved: GenerateRequest, tenant: str) -> None:
        """Start an orphan of a tenant."""
        self._halves.adopted.add(job_id)
        self._start(RunningJob(job_id, resolved, accepted_seconds_ago(job_id), tenant))

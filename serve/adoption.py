"""Jobs of dead Pipelines that go on in this one: which are taken, and how they start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

from serve.departure import Departure
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

    @property
    def may_take(self) -> bool:
        """Whether one more orphan may be under way, of whatever model."""
        self._halves.adopted.intersection_update(self._live)
        return not self._departure.has_begun and len(self._halves.adopted) < self._at_once

    async def resolved(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request of an orphan as it can be started now.

        Raises:
            Overloaded: There is no room for it with its model.
            KelvinError: As at acceptance.
        """
        return await self._admit(request)

    def waits_for(self, models: Collection[str | None], *, none_else: bool = False) -> None:
        """Say that an orphan found no room.

        Args:
            models: Of which, as requests name them.
            none_else: Every orphan of other models found room, or went elsewhere.
        """
        if none_else:
            self._halves.waited_for.clear()
        self._halves.waited_for.update(models)

    def adopt(self, job_id: str, resolved: GenerateRequest, tenant: str) -> None:
        """Start an orphan of a tenant."""
        self._halves.adopted.add(job_id)
        self._start(RunningJob(job_id, resolved, accepted_seconds_ago(job_id), tenant))

"""A Pipeline that is asked to go: it finishes what it has and leaves the rest to the next one.

Ray Serve stops a replica once its calls are done. A job is no call, so Serve is kept waiting until
the Pipeline's jobs have ended, and no longer than it would wait. Where the whole application goes,
its stages with it, nothing can end: a handle waits for replicas that will not come, so all is let
go at once. What is left stays pending, and as the lease is ended with that, another Pipeline takes
it over at once, or the next start does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING

from serve.detached import detached_context
from serve.running import RunningJob

if TYPE_CHECKING:
    from serve.job_keeping import JobKeeping

_log = logging.getLogger("ray.serve")

# Serve tells the parts of an application one after the other, within a turn of its controller.
_IS_TOLD_WITHIN_S = 1.0
_POLL_S = 0.1
_LOOK_S = 0.5
_BETWEEN_STATUS_S = 3.0  # Serve's account of itself costs it tens of milliseconds
# For ending the lease, before Serve kills.
_MARGIN_S = 10.0


class Departure:
    """One Pipeline's.

    Args:
        is_asked: Returns whether Serve has asked it to go, at once.
        is_deleted: Returns whether the whole application goes; it may take its time.
        within_s: Seconds from then on until it is killed.
    """

    def __init__(
        self, is_asked: Callable[[], bool], is_deleted: Callable[[], bool], within_s: float
    ) -> None:
        self._is_asked = is_asked
        self._is_deleted = is_deleted
        self._within_s = within_s
        self._began_at: float | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether this Pipeline was asked to go."""
        if self._began_at is None and self._is_asked():
            self._began_at = monotonic()
        return self._began_at is not None

    def start(self, live: Mapping[str, RunningJob]) -> None:
        """Begin to look out for the end of the application; again, it does nothing.

        Args:
            live: All jobs of this process, as they change.
        """
        if self._watch is None:
            loop = asyncio.get_running_loop()
            watching = self._let_go_when_deleted(live)
            self._watch = loop.create_task(watching, name="departure", context=detached_context())

    async def _let_go_when_deleted(self, live: Mapping[str, RunningJob]) -> None:
        while not self.has_begun:
            await asyncio.sleep(_LOOK_S)
        while True:
            try:
                if await asyncio.to_thread(self._is_deleted):
                    break
            except Exception as error:  # Ray's and Serve's own: they may be on their way out
                _log.warning("Whether the application is deleted is not known: %s", error)
            await asyncio.sleep(_BETWEEN_STATUS_S)
        while True:
            for job in live.values():
                job.let_go()
            await asyncio.sleep(_LOOK_S)

    async def is_near(self) -> bool:
        """Return whether it was asked to go, or is within moments: stages may hear it first."""
        deadline = monotonic() + _IS_TOLD_WITHIN_S
        while not self.has_begun and monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        return self.has_begun

    async def complete(self, live: Mapping[str, RunningJob], keeping: JobKeeping) -> None:
        """Wait for jobs to end, let go of those that do not, and end the lease.

        Args:
            live: All jobs of this process, as they change.
            keeping: What keeps them safe until then.
        """
        began_at = monotonic() if self._began_at is None else self._began_at
        deadline = began_at + self._within_s - _MARGIN_S
        while any(_is_awaited(job) for job in live.values()) and monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        for job in live.values():
            job.let_go()
        await keeping.release()


def _is_awaited(job: RunningJob) -> bool:
    # What was given up or let go of ends elsewhere.
    return not (job.is_given_up or job.is_let_go)

"""A Pipeline that is asked to go: it finishes what it has and leaves the rest to the next one.

Ray Serve stops a replica once its calls are done. A job is no call, so Serve is kept waiting until
the Pipeline's jobs have ended or cannot end any more, because the stages go as well; and no longer
than it would wait. What is left stays pending, and as the lease is ended with that, another
Pipeline takes it over at once, or the next start does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING

from serve.running import RunningJob

if TYPE_CHECKING:
    from serve.job_keeping import JobKeeping

# Serve tells the parts of an application one after the other, within a turn of its controller.
_IS_TOLD_WITHIN_S = 1.0
_POLL_S = 0.1
# For ending the lease, before Serve kills.
_MARGIN_S = 10.0


class Departure:
    """One Pipeline's.

    Args:
        is_asked: Returns whether Serve has asked it to go, at once.
        within_s: Seconds from then on until it is killed.
    """

    def __init__(self, is_asked: Callable[[], bool], within_s: float) -> None:
        self._is_asked = is_asked
        self._within_s = within_s
        self._began_at: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether this Pipeline was asked to go."""
        if self._began_at is None and self._is_asked():
            self._began_at = monotonic()
        return self._began_at is not None

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
        # What was given up ends elsewhere.
        while not all(job.is_given_up for job in live.values()) and monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        for job in live.values():
            job.let_go()
        await keeping.release()

"""A job that is alive in this process: its events so far and whoever follows them.

All of it happens on one event loop, so nothing here locks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from serve.detached import detached_context
from serve.errors import KelvinError
from serve.requests import GenerateRequest, GenerateResult, JobEvent, JobRecord

_Result = TypeVar("_Result")


class RunningJob:
    """One accepted job; `request` is resolved."""

    def __init__(self, job_id: str, request: GenerateRequest) -> None:
        self.id = job_id
        self.request = request
        self.accepted_at = time.monotonic()
        self._life: asyncio.Task[None] | None = None
        self._work: asyncio.Task[Any] | None = None
        self._is_cancelled = False
        self.error: KelvinError | None = None
        self._events: list[JobEvent] = []
        self._changed = asyncio.Event()

    @property
    def newest(self) -> JobEvent | None:
        """The last event, or None before the first."""
        return self._events[-1] if self._events else None

    @property
    def num_events(self) -> int:
        """How many events it holds."""
        return len(self._events)

    @property
    def is_over(self) -> bool:
        """True once the last event has been published."""
        return self.newest is not None and self.newest.is_last

    def start(self, life: Coroutine[Any, Any, None]) -> None:
        """Run the job's whole life, its end included, in a task that belongs to no request."""
        loop = asyncio.get_running_loop()
        self._life = loop.create_task(life, name=f"job-{self.id}", context=detached_context())

    async def work(self, making: Coroutine[Any, Any, _Result]) -> _Result:
        """Do the part of the job that `cancel` stops.

        Raises:
            asyncio.CancelledError: It was cancelled, before or while it ran.
        """
        work = asyncio.get_running_loop().create_task(making)
        self._work = work
        if self._is_cancelled:
            work.cancel()
        return await work

    def cancel(self) -> None:
        """Stop the work; how the job ends is told by its last event, as ever."""
        self._is_cancelled = True
        if self._work is not None:
            self._work.cancel()

    def publish(self, event: JobEvent) -> None:
        """Append an event and wake every follower; events after the last one are dropped."""
        if self.is_over:
            return
        self._events.append(event)
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[JobEvent]:
        """Yield every event from the first, as they come, up to and with the last."""
        position = 0
        while True:
            changed = self._changed
            while position < len(self._events):
                event = self._events[position]
                position += 1
                yield event
                if event.is_last:
                    return
            await changed.wait()

    async def result(self) -> GenerateResult:
        """Wait for the end.

        Raises:
            KelvinError: As the job failed; JobCancelled if it was cancelled.
        """
        while not self.is_over:
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        newest = self.newest
        if newest is None or newest.result is None:
            raise KelvinError(f"Job {self.id} ended without a result.")
        return newest.result

    def record(self) -> JobRecord:
        """Return what `GET /v1/jobs/{id}` answers while the job lives here."""
        return JobRecord(id=self.id, status="running", request=self.request, progress=self.newest)

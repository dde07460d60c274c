"""A job that is alive in this process: its events so far and whoever follows them.

All of it happens on one event loop, so nothing here locks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from cluster.pace import Estimate
from serve.detached import detached_context
from serve.errors import DeadlineExceeded, KelvinError, StageUnavailable
from serve.requests import GenerateRequest, GenerateResult, JobEvent, JobRecord, JobStatus
from serve.tenants import DEFAULT_TENANT
from serve.work_ahead import WorkLeft

_Result = TypeVar("_Result")

# Of one job, for followers who lag and who ask for it without following: the newest hundred or so
# at 1024 x 1024. Older steps are told without their preview.
_PREVIEW_CHARACTERS_KEPT = 1 << 20


class RunningJob:
    """One accepted job; `request` is resolved.

    Args:
        job_id: Its id.
        request: Resolved.
        age_s: Seconds since it was accepted, where another process accepted it.
        tenant: Whose it is.
    """

    def __init__(
        self,
        job_id: str,
        request: GenerateRequest,
        age_s: float = 0.0,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        self.id = job_id
        self.tenant = tenant
        self.request = request
        self.accepted_at = time.monotonic() - age_s
        """Seconds of this process's monotonic clock; the deadline counts from here."""
        self.gpu_s = 0.0
        """Seconds of work of the stages so far, for whom it is made: `serve.tenant_book`."""
        self.is_given_up = False
        """True once another Pipeline process has taken it over."""
        self.is_let_go = False
        """True once this process, which ends, leaves it pending for another one."""
        self.work_left: WorkLeft | None = None
        """Of what stages have to do for it, where that is counted; told of every event."""
        self.estimate: Estimate | None = None
        """Of when it would be done, when it was accepted; None where nothing was known."""
        self._life: asyncio.Task[None] | None = None
        self._work: asyncio.Task[Any] | None = None
        self.is_cancelled = False
        """True once its work is to stop, for whatever reason."""
        self.error: KelvinError | None = None
        self._events: list[JobEvent] = []
        self._changed = asyncio.Event()
        self._previews: deque[int] = deque()  # places in _events
        self._preview_characters = 0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline, not below 0; None without a deadline."""
        if self.request.deadline_s is None:
            return None
        return max(0.0, self.accepted_at + self.request.deadline_s - time.monotonic())

    @property
    def newest(self) -> JobEvent | None:
        """The last event, or None before the first."""
        return self._events[-1] if self._events else None

    @property
    def events(self) -> Sequence[JobEvent]:
        """All events so far."""
        return self._events

    @property
    def is_over(self) -> bool:
        """True once the last event has been published."""
        return self.newest is not None and self.newest.is_last

    @property
    def is_decided(self) -> bool:
        """True once the journal knows better than this job how it stands."""
        return self.is_over or (self.is_cancelled and not self.is_given_up)

    @property
    def is_started(self) -> bool:
        """True once it is on record and its life has begun."""
        return self._life is not None

    def start(self, life: Coroutine[Any, Any, None]) -> None:
        """Run the job's whole life, its end included, in a task that belongs to no request."""
        loop = asyncio.get_running_loop()
        self._life = loop.create_task(life, name=f"job-{self.id}", context=detached_context())

    async def has_begun(self) -> None:
        """Return once its work has had its first turn: to answer who sent it takes time of its own.

        Then a stage is being asked meanwhile.
        """
        for _ in ("life", "work"):  # a task each
            await asyncio.sleep(0)

    async def work(self, making: Coroutine[Any, Any, _Result]) -> _Result:
        """Do the part of the job that `cancel` stops.

        Raises:
            asyncio.CancelledError: It was cancelled, before or while it ran.
        """
        work = asyncio.get_running_loop().create_task(making)
        self._work = work
        if self.is_cancelled:
            work.cancel()
        return await work

    async def in_time(self, making: Coroutine[Any, Any, _Result]) -> _Result:
        """Do what must be done before the deadline, and give it up then.

        Raises:
            DeadlineExceeded: The deadline has passed, or a stage says that it cannot be met.
        """
        try:
            async with asyncio.timeout(self.seconds_left) as limit:
                return await making
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._too_late("The deadline passed before the job was done.") from None
        except DeadlineExceeded as error:
            # A stage knows what was left when it was asked; the caller knows what they sent.
            raise self._too_late(error.message) from None

    def _too_late(self, message: str) -> DeadlineExceeded:
        return DeadlineExceeded(
            message,
            field="deadline_s",
            value=self.request.deadline_s,
            allowed="more seconds, a smaller request, or no deadline",
        )

    def cancel(self) -> None:
        """Stop the work; how the job ends is told by its last event, as ever."""
        self.is_cancelled = True
        if self._work is not None:
            self._work.cancel()

    def give_up(self) -> None:
        """Stop the work because another Pipeline process does it now; how it ends is its matter."""
        self.is_given_up = True
        self.forget_work()
        self.cancel()

    def forget_work(self) -> None:
        """Count its work as ahead of nobody: it is not done here."""
        if self.work_left is not None:
            self.work_left.gone()

    def let_go(self) -> None:
        """Leave it as it is on record; followers hear no more here, and no end."""
        self.is_let_go = True
        self._wake_followers()

    def publish(self, event: JobEvent) -> None:
        """Append an event and wake every follower; events after the last one are dropped."""
        if self.is_over:
            return
        if self.work_left is not None:
            self.work_left.seen(event)
        self._events.append(event)
        self._drop_old_previews(event)
        self._wake_followers()

    def _wake_followers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _drop_old_previews(self, newest: JobEvent) -> None:
        if newest.preview is not None:
            self._previews.append(len(self._events) - 1)
            self._preview_characters += len(newest.preview)
        # What is over has its pictures; its events stay longer than its previews are worth.
        most = 0 if newest.is_last else _PREVIEW_CHARACTERS_KEPT
        while self._previews and self._preview_characters > most:
            place = self._previews.popleft()
            self._preview_characters -= len(self._events[place].preview or "")
            self._events[place] = self._events[place].model_copy(update={"preview": None})

    async def follow(self) -> AsyncIterator[JobEvent]:
        """Yield every event from the first, as they come, up to and with the last.

        There is no last one where the job is left to another process.
        """
        position = 0
        while True:
            changed = self._changed
            while position < len(self._events):
                event = self._events[position]
                position += 1
                yield event
                if event.is_last:
                    return
            if self.is_let_go:
                return
            await changed.wait()

    async def result(self) -> GenerateResult:
        """Wait for the end.

        Raises:
            KelvinError: As the job failed; JobCancelled if it was cancelled; StageUnavailable if
                it is left to another process.
        """
        while not (self.is_over or self.is_let_go):
            await self._changed.wait()
        if not self.is_over:
            raise StageUnavailable("The service is stopping.", allowed="try again later")
        if self.error is not None:
            raise self.error
        newest = self.newest
        if newest is None or newest.result is None:
            raise KelvinError(f"Job {self.id} ended without a result.")
        return newest.result

    def _newest_with_preview(self) -> JobEvent | None:
        """Return the last event, with the newest preview if it has none: who polls saw none."""
        newest = self.newest
        if newest is None or newest.is_last or newest.preview or not self._previews:
            return newest
        shown = self._events[self._previews[-1]].preview
        return newest.model_copy(update={"preview": shown})

    def record(self, status: JobStatus, *, durable: bool) -> JobRecord:
        """Return what `GET /v1/jobs/{id}` answers while the job lives here."""
        return JobRecord(
            id=self.id,
            tenant=self.tenant,
            status=status,
            request=self.request,
            progress=self._newest_with_preview(),
            durable=durable,
        )

"""Every request an engine has taken: those that wait for memory and those that are live.

Callers' threads add to it, the engine's thread does everything else; one condition guards it all.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from deployments.job_size import live_bytes, most_rows, token_shape
from deployments.live_request import LiveRequest, VelocityModel
from deployments.memory_budget import MemoryBudget
from deployments.payloads import DenoiseJob
from deployments.ticket import Clock, OnEvent, Ticket
from serve.errors import Overloaded, StageUnavailable


class LiveSet:
    """Waiting tickets and live requests.

    Args:
        model: That requests will run on.
        memory: What there is room for.
        max_waiting: Requests that may wait for their first step.
        clock: Of ages and deadlines, in seconds.
    """

    def __init__(
        self, model: VelocityModel, memory: MemoryBudget, max_waiting: int, clock: Clock
    ) -> None:
        self._model = model
        self._memory = memory
        self._max_waiting = max_waiting
        self._clock = clock
        self._keys = itertools.count()
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._live: dict[int, LiveRequest] = {}
        self._ended_because: str | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """How many wait, and how many are live."""
        with self._changed:
            return len(self._waiting), len(self._live)

    @property
    def ended_because(self) -> str | None:
        """Why nothing more is taken; None while it is."""
        return self._ended_because

    @property
    def live(self) -> list[LiveRequest]:
        """The live requests, for the engine's thread; in order of admission."""
        return list(self._live.values())

    @property
    def held_bytes(self) -> int:
        """Memory that live requests hold, for the engine's thread."""
        return sum(live.bytes for live in self._live.values())

    def add(self, job: DenoiseJob, on_event: OnEvent) -> Ticket:
        """Take a job; it waits.

        Raises:
            Overloaded: Too many requests wait already.
            StageUnavailable: `end` was called.
        """
        with self._changed:
            if self._ended_because is not None:
                raise StageUnavailable(f"This denoiser takes no more work: {self._ended_because}.")
            waiting = sum(not live.has_begun for live in self._live.values()) + len(self._waiting)
            if waiting >= self._max_waiting:
                raise Overloaded(
                    f"{waiting} requests already wait for this denoiser.",
                    value=waiting,
                    allowed=f"at most {self._max_waiting} waiting requests",
                )
            ticket = Ticket(job, on_event, next(self._keys), self._clock())
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def tickets(self) -> list[Ticket]:
        """Return everything taken and not ended."""
        with self._changed:
            return [*self._waiting, *(live.ticket for live in self._live.values())]

    def remove(self, ticket: Ticket) -> bool:
        """Let go of a request, waiting or live; returns False if that was the last one."""
        with self._changed:
            if self._live.pop(ticket.key, None) is None:
                self._waiting.remove(ticket)
            return bool(self._live or self._waiting)

    def next_to_admit(self, may_start: Callable[[Ticket], bool]) -> Ticket | None:
        """Return the first of those that wait if there is room for it, else None.

        Args:
            may_start: Asked of each in order, under the set's lock; who must wait for something
                else is passed over.
        """
        with self._changed:
            if self._ended_because is not None:
                return None
            for ticket in sorted(self._waiting, key=lambda waiting: waiting.admission_order):
                if may_start(ticket):
                    # In order, so that no large request waits forever for smaller ones to stop
                    # coming.
                    return ticket if self._has_room(ticket.job) else None
            return None

    def admit(self, live: LiveRequest) -> None:
        """Move a request from those that wait to the live ones."""
        with self._changed:
            self._waiting.remove(live.ticket)
            self._live[live.ticket.key] = live

    def end(self, reason: str) -> None:
        """Take nothing more; the first reason given is remembered."""
        with self._changed:
            self._ended_because = self._ended_because or reason
            self._changed.notify_all()

    def wake(self) -> None:
        """End a pause: what somebody waits for may be there."""
        with self._changed:
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than until something new comes or `end` is called."""
        with self._changed:
            if self._ended_because is None:
                self._changed.wait(seconds)

    def rest(self, seconds: float) -> None:
        """Wait, whatever comes, but no longer than until `end` is called."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended_because is not None, seconds)

    def wait_for_work(self, on_waking: Callable[[], None]) -> bool:
        """Wait until there is something to do.

        Args:
            on_waking: Called if there was nothing at first.

        Returns:
            False once `end` was called.
        """
        with self._changed:
            if not self._is_wanted():
                self._changed.wait_for(self._is_wanted)
                on_waking()
            return self._ended_because is None

    def _is_wanted(self) -> bool:
        return bool(self._ended_because or self._waiting or self._live)

    def _has_room(self, job: DenoiseJob) -> bool:
        if not self._live:
            return True  # it was found to fit alone; if it no longer does, its forward says so
        rows = {live.shape: 2 for live in self._live.values()}
        rows.setdefault(token_shape(job), most_rows(job))
        widest = max(self._memory.forward_bytes(shape, count) for shape, count in rows.items())
        own = live_bytes(job, self._model.in_channels, self._model.precision.compute_dtype)
        return own + widest <= self._memory.free_bytes(self.held_bytes)

"""A request as who submitted it to the engine holds it: to be told of it, and to cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from deployments.payloads import DenoiseEvent, DenoiseJob
from serve.errors import DeadlineExceeded, JobCancelled, KelvinError

OnEvent = Callable[[DenoiseEvent | BaseException], None]
Clock = Callable[[], float]  # seconds that never go back


class Ticket:
    """A submitted request.

    Args:
        job: What to denoise.
        on_event: Who is told.
        key: Its own among the engine's tickets, rising with time.
        submitted_at: Seconds, by the engine's clock; its deadline counts from there.
    """

    def __init__(self, job: DenoiseJob, on_event: OnEvent, key: int, submitted_at: float) -> None:
        self.job = job
        self.on_event = on_event
        self.key = key
        self.submitted_at = submitted_at
        self.deadline = None if job.deadline_s is None else submitted_at + job.deadline_s
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask to stop: at once if it waits, at the next step if it runs; nothing if it is done."""
        self._cancelled.set()

    def over(self, now: float, duty: float) -> KelvinError | None:
        """Return what it ends with if it was cancelled or its deadline has passed, else None.

        Args:
            now: Seconds, by the engine's clock.
            duty: Share of the time that the card may compute.
        """
        if self._cancelled.is_set():
            return JobCancelled("The job was cancelled before it finished.")
        if self.deadline is None or now < self.deadline:
            return None
        held = f" For heat the card computes {duty:.0%} of the time." if duty < 1 else ""
        return DeadlineExceeded(
            f"The job had {self.job.deadline_s:.3f} s, and they have passed.{held}",
            field="deadline_s",
            value=self.job.deadline_s,
            allowed="more time, fewer steps, or a higher priority",
        )

    @property
    def admission_order(self) -> tuple[int, float, int]:
        """Sorts what waits for memory: by priority, then deadline, then age."""
        deadline = float("inf") if self.deadline is None else self.deadline
        return -self.job.priority, deadline, self.key

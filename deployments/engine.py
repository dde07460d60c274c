"""The denoising loop: a thread that carries live requests forward step by step.

Each turn admits what waits, chooses whose rows go into the next forward, steps every sampler and
lets the finished out. Today one request is live at a time, first come first served; the turn is
already written over a set, so that requests at different steps can share a forward.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

import torch

from deployments.live_request import LiveRequest, OnEvent, Ticket, VelocityModel
from deployments.payloads import DenoiseJob, Latents, StepProgress
from serve.errors import JobCancelled, KelvinError, Overloaded, StageFailed, StageUnavailable

_MOST_LIVE = 1

_log = logging.getLogger(__name__)


class Engine:
    """Denoises submitted jobs in a thread of its own.

    Args:
        model: Predicts velocities; used from the engine's thread only.
        max_waiting: Requests that may wait; more are refused.
    """

    def __init__(self, model: VelocityModel, *, max_waiting: int) -> None:
        self.model = model
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._live: list[LiveRequest] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="denoise-engine", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Requests submitted and not finished, the running one included."""
        with self._changed:
            return len(self._waiting) + len(self._live)

    @property
    def is_alive(self) -> bool:
        """True while it takes work."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: DenoiseJob, on_event: OnEvent) -> Ticket:
        """Queue a job.

        Args:
            job: What to denoise.
            on_event: Called from the engine's thread with a StepProgress after each step, then
                once with Latents, or once with the error that ended it. It must not block.

        Raises:
            Overloaded: Too many requests wait already.
            StageUnavailable: The engine was closed.
        """
        ticket = Ticket(job, on_event)
        with self._changed:
            if not self.is_alive:
                raise StageUnavailable("This denoiser is shutting down.")
            if len(self._waiting) >= self.max_waiting:
                raise Overloaded(
                    f"{self.max_waiting} requests already wait for this denoiser.",
                    value=len(self._waiting),
                    allowed=f"at most {self.max_waiting} waiting requests",
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the step under way; whatever is unfinished ends with StageUnavailable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            # A state of a thread, so it is set here and not where the model was loaded.
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
        finally:
            with self._changed:
                self._closed = True
                unfinished = [live.ticket for live in self._live] + list(self._waiting)
                self._live.clear()
                self._waiting.clear()
            for ticket in unfinished:
                self._tell(ticket, StageUnavailable("This denoiser is shutting down."))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._live)
            return not self._closed

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        chosen = self._choose()
        if chosen:
            self._advance(chosen)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.is_cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._tell(ticket, JobCancelled("The job was cancelled while it waited."))
        for live in [live for live in self._live if live.ticket.is_cancelled]:
            self._retire(live, JobCancelled("The job was cancelled while it ran."))

    def _admit(self) -> None:
        while True:
            with self._changed:
                if self._closed or not self._waiting or len(self._live) >= _MOST_LIVE:
                    return
                ticket = self._waiting.popleft()
            try:
                live = LiveRequest(ticket, self.model)
            except Exception as error:
                self._tell(ticket, self._failure(error))
                continue
            with self._changed:
                self._live.append(live)

    def _choose(self) -> list[LiveRequest]:
        """Return whose rows go into the next forward; all of one latent and text shape."""
        return self._live[:_MOST_LIVE]

    def _advance(self, chosen: list[LiveRequest]) -> None:
        """Run one forward and step each request by its own rows."""
        try:
            velocity = self.model.velocity(
                torch.cat([live.latent_rows() for live in chosen]),
                torch.cat([live.sigma_rows() for live in chosen]),
                torch.cat([live.prompt_embeds for live in chosen]),
                torch.cat([live.pooled for live in chosen]),
            )
        except Exception as error:
            for live in chosen:
                self._retire(live, self._failure(error))
            return
        end = 0
        for live in chosen:
            begin, end = end, end + live.rows
            try:
                progress = live.step(velocity[begin:end])
                finished = live.result() if live.is_finished else None
            except Exception as error:
                self._retire(live, self._failure(error))
                continue
            self._tell(live.ticket, progress)
            if finished is not None:
                self._retire(live, finished)

    def _retire(self, live: LiveRequest, outcome: Latents | KelvinError) -> None:
        with self._changed:
            self._live.remove(live)
        self._tell(live.ticket, outcome)

    def _tell(self, ticket: Ticket, event: StepProgress | Latents | KelvinError) -> None:
        try:
            ticket.on_event(event)
        except Exception:
            # Whoever listened is gone; its request stops, the others go on.
            _log.exception("a listener failed on %s", type(event).__name__)
            ticket.cancel()

    def _failure(self, error: Exception) -> KelvinError:
        """Return what the request is told; an error that outlives it closes the engine as well.

        The request itself is not to be tried elsewhere: it may be what broke the card.
        """
        if isinstance(error, KelvinError):
            return error
        _log.error("denoising failed", exc_info=error)
        if _is_sticky(error):
            with self._changed:
                self._closed = True
        return StageFailed(f"The denoiser failed: {type(error).__name__}: {error}")


def _is_sticky(error: Exception) -> bool:
    """True after a CUDA error, which every later call in the process may meet again.

    Running out of memory is none: `torch.OutOfMemoryError` neither is an AcceleratorError nor says
    "CUDA error". Libraries such as cuBLAS report theirs as plain RuntimeErrors.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)

"""Spans of what requests denoise together: one for each set of requests that shared forwards.

A forward is a step of all requests in it. A span a forward would be 28 for a picture of 28 steps,
each saying the same; what changes is who shares the card, when somebody comes or goes. So forwards
of the same company are one span, from its first to its last, which ends when one of them leaves:
a picture that was alone has one, and others as many as they had companies. Links lead from it to
the requests, each with the steps that it made, and from the requests to it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry.trace import Span

from deployments.forward_record import Forward, Member
from deployments.payloads import DenoiseJob
from deployments.replica import Identity
from serve import telemetry

_LATENT_PIXELS = 8
# Companies change with every forward where a policy shares the card out in turn.
_MOST_OPEN = 64
_MOST_WAITING = 1024


@dataclass
class _Part:
    """What one request had of a company's forwards."""

    first_step: int
    last_step: int = 0
    steps: int = 0
    rows: int = 0

    def took(self, member: Member) -> None:
        self.last_step = member.step
        self.steps += 1
        self.rows = max(self.rows, member.rows)

    def as_attributes(self) -> dict[str, telemetry.Attribute]:
        return {f"kelvin.{name}": value for name, value in vars(self).items()}


@dataclass
class _Company:
    began_ns: int
    width: int
    height: int
    requests: int
    ended_ns: int = 0
    forwards: int = 0
    seconds: float = 0.0
    rows: int = 0
    paths: set[str] = field(default_factory=set)
    parts: dict[str, _Part] = field(default_factory=dict)  # by traceparent

    def took(self, forward: Forward, traced: list[Member], now_ns: int) -> None:
        self.ended_ns = now_ns
        self.forwards += 1
        self.seconds += forward.seconds
        self.rows = max(self.rows, forward.rows)
        self.paths.add(forward.path)
        for member in traced:
            if member.traceparent is not None:
                part = self.parts.setdefault(member.traceparent, _Part(member.step))
                part.took(member)


class BatchSpans:
    """Of one replica. Requests that are not traced cost a look into a dictionary a forward.

    Args:
        identity: Which replica it is.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._guard = threading.Lock()
        self._spans: dict[str, Span] = {}  # of requests that are here, by traceparent
        self._companies: dict[frozenset[int], _Company] = {}
        self._waiting: deque[tuple[Forward, int]] = deque()  # and when it ended, in Unix ns

    @contextmanager
    def of(self, job: DenoiseJob) -> Iterator[Span]:
        """Run a block as the span of one request's part in this replica.

        It is not made the current one: a stream is read from wherever its reader is.
        """
        about: dict[str, telemetry.Attribute] = {
            "kelvin.job.id": job.job_id,
            "kelvin.image": job.image,
            "kelvin.num_inference_steps": job.steps,
            "kelvin.resumed_at_step": job.resume.step if job.resume else 0,
        }
        with self._identity.span("denoise", job.traceparent, about, is_current=False) as span:
            if not span.is_recording():
                yield span
                return
            key = telemetry.traceparent_of(span) or ""
            with self._guard:
                self._spans[key] = span
            try:
                yield span
            finally:
                with self._guard:
                    self._left(key)

    def ran(self, forward: Forward) -> None:
        """Take note of a forward that has just ended; from any thread.

        Which company it was of is found out when one of them leaves, and no step waits for that.
        """
        if not self._spans:
            return
        self._waiting.append((forward, time.time_ns()))
        if len(self._waiting) > _MOST_WAITING:
            with self._guard:
                self._look_at_waiting()

    def _look_at_waiting(self) -> None:
        while self._waiting:
            forward, now_ns = self._waiting.popleft()
            # Who was given up while the forward ran is no longer here.
            traced = [each for each in forward.members if each.traceparent in self._spans]
            if not traced:
                continue
            key = frozenset(member.key for member in forward.members)
            company = self._companies.get(key)
            if company is None:
                if len(self._companies) >= _MOST_OPEN:
                    self._close(next(iter(self._companies)))
                company = self._companies[key] = _Company(
                    now_ns - int(forward.seconds * 1e9),
                    forward.shape.width * _LATENT_PIXELS,
                    forward.shape.height * _LATENT_PIXELS,
                    len(forward.members),
                )
            company.took(forward, traced, now_ns)

    def _left(self, traceparent: str) -> None:
        self._look_at_waiting()
        for key in [key for key, each in self._companies.items() if traceparent in each.parts]:
            self._close(key)
        del self._spans[traceparent]

    def _close(self, key: frozenset[int]) -> None:
        company = self._companies.pop(key)
        oldest_first = [each for each in self._spans if each in company.parts]
        batch = telemetry.past_span(
            "kelvin.denoise.batch",
            company.began_ns,
            company.ended_ns,
            [(each, company.parts[each].as_attributes()) for each in oldest_first],
            {
                "kelvin.pool": self._identity.pool,
                "kelvin.replica": self._identity.replica,
                "kelvin.requests": company.requests,
                "kelvin.rows": company.rows,
                "kelvin.forwards": company.forwards,
                "kelvin.compute_s": company.seconds,
                "kelvin.width": company.width,
                "kelvin.height": company.height,
                "kelvin.path": company.paths.pop() if len(company.paths) == 1 else "mixed",
            },
        )
        for each in oldest_first[1:]:
            self._spans[each].add_link(batch.get_span_context())

"""Requests at set times, whatever becomes of the ones before: an open loop, and how late it was.

Callers in the world do not wait for one another. A loop that waits for answers slows down together
with the server and never sees it overloaded ("coordinated omission"). Latencies count from when a
request was due, so that a generator which lags shows up as latency and not as a lighter load; how
far it lagged is told as well.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.lean_http import LeanClient, Reply

Body = dict[str, Any]

NO_ANSWER = 0
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """One request and what came back.

    Attributes:
        at: When it was due, in seconds of the run.
        late_s: By how much it was sent later.
        seconds: From when it was due to its answer.
        status: Of HTTP; `NO_ANSWER` where the connection failed.
        code: Of the typed error; of what failed, without an answer; empty for a picture.
        retry_after_s: As told.
        job_s: From acceptance to published, by the server's clock.
        body: As it was sent.
    """

    at: float
    late_s: float
    seconds: float
    status: int
    code: str = ""
    retry_after_s: float | None = None
    job_s: float | None = None
    body: Body | None = None

    @property
    def is_refused(self) -> bool:
        """Whether it was told to come again, and when."""
        return self.status == 429 and self.retry_after_s is not None


class Door:
    """The front door as many callers use it; an asynchronous context.

    Args:
        url: Of Kelvin.
        began: Time zero of the run, by `time.monotonic`.
    """

    def __init__(self, url: str, began: float) -> None:
        self._began = began
        self._client = LeanClient(url)

    async def __aenter__(self) -> Door:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.__aexit__(None, None, None)

    @property
    def now(self) -> float:
        """Seconds of the run."""
        return time.monotonic() - self._began

    async def ask(self, body: Body, at: float | None = None) -> Answer:
        """Ask for a picture and wait for it.

        Args:
            body: The request.
            at: When it was due; now if absent.
        """
        due = self.now if at is None else at
        late_s = self.now - due
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await self._client.ask("POST", "/v1/generate", body)
        except (OSError, TimeoutError) as error:
            return Answer(due, late_s, self.now - due, NO_ANSWER, type(error).__name__, body=body)
        seconds = self.now - due
        if answer.status == 200:
            return Answer(due, late_s, seconds, 200, job_s=answer.json()["seconds"], body=body)
        told = answer.headers.get("retry-after")
        return Answer(
            due,
            late_s,
            seconds,
            answer.status,
            _code_of(answer),
            None if told is None else float(told),
            body=body,
        )

    async def offer(
        self,
        times: Sequence[float],
        body: Callable[[int], Body],
        seen: Callable[[Answer], None] = lambda _: None,
    ) -> list[Answer]:
        """Send each request when it is due and return all answers, in that order.

        Args:
            times: Seconds of the run, rising.
            body: Of the request of each number.
            seen: Called with each answer as it comes.
        """

        async def ask(number: int, at: float) -> Answer:
            answer = await self.ask(body(number), at)
            seen(answer)
            return answer

        async with asyncio.TaskGroup() as group:
            sent = []
            for number, at in enumerate(times):
                await asyncio.sleep(max(at - self.now, 0.0))
                sent.append(group.create_task(ask(number, at)))
        return [each.result() for each in sent]


def poisson(rate: float, begin: float, end: float, seed: str) -> list[float]:
    """Return the times of a Poisson process of so many a second."""
    gaps = random.Random(seed)
    times, at = [], begin + gaps.expovariate(rate)
    while at < end:
        times.append(at)
        at += gaps.expovariate(rate)
    return times


def _code_of(answer: Reply) -> str:
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "not ours: " + answer.body[:60].decode(errors="replace")

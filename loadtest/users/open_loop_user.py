"""A locust user that stands for all callers of one door: an open loop.

A usual locust user waits for its answer before it asks again, so under a service that slows down
it asks less, and counts its latencies from when it got round to asking. This one sends each request
of a plan when it is due, in a greenlet of its own, whatever became of those before; what it tells
locust is the time from when the request was *due*, so locust's own statistics are corrected too.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from locust import User, task

from loadtest.load_plan import Ask
from loadtest.outcomes import Outcome
from loadtest.picture_proof import fault_in, fault_in_stored
from loadtest.users.exchange import Exchange, Refused
from loadtest.users.run import Run

API_KEY = "KELVIN_API_KEY"


@dataclass(frozen=True)
class Drawn:
    """A picture as a caller of some door gets it.

    Attributes:
        picture: The file.
        job_id: That made it.
        result: Of the job, where the door tells it.
        is_stored: Whether these bytes are the store's own.
    """

    picture: bytes
    job_id: str | None
    result: dict[str, Any] | None = None
    is_stored: bool = False


class OpenLoopUser(User):
    """Sends the requests of one door; subclasses say how one is sent."""

    abstract = True
    fixed_count = 1
    door: ClassVar[str]
    endpoint: ClassVar[str]
    """What it asks, as locust names it in its statistics."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.exchange = Exchange(environment.host.rstrip("/"), os.environ.get(API_KEY))
        self.run_of_plan: Run = environment.run_of_plan

    def draw(self, request: dict[str, Any]) -> Drawn:
        """Ask for one picture and wait for it; called in many greenlets at a time.

        Args:
            request: Fields of the contract.

        Raises:
            Refused: There is no picture.
        """
        raise NotImplementedError

    @task
    def offer(self) -> None:
        """Send everything when it is due, and wait for all answers."""
        run, group = self.run_of_plan, Group()
        run.begin_together(self.door)
        for ask in run.claim(self.door):
            gevent.sleep(max(ask.at - run.now, 0.0))
            group.spawn(self._answer, ask)
        group.join()
        gevent.sleep(float("inf"))  # there is no second round: the shape ends the run

    def _answer(self, ask: Ask) -> None:
        run = self.run_of_plan
        late_s = run.now - ask.at
        began, error, status, drawn = time.time(), "", 200, None
        try:
            drawn = self.draw(ask.request)
        except Refused as refused:
            error, status = refused.code, refused.status
        except Exception as unforeseen:  # an answer that no door gives must not end the run
            error, status = f"unforeseen: {type(unforeseen).__name__}: {unforeseen}"[:200], 0
        latency_s = run.now - ask.at
        result = None
        if drawn is not None:
            error, result = self._proved(drawn, ask.request)
        told = Outcome(
            ask.number,
            self.door,
            round(ask.at, 4),
            round(late_s, 5),
            round(latency_s, 4),
            error,
            status,
            drawn.job_id if drawn else None,
            **_told_in(result),
            picture=run.keep(ask.number, drawn.picture) if drawn and not error else None,
        )
        run.record(told)
        self.environment.events.request.fire(
            request_type=self.door,
            name=self.endpoint,
            start_time=began - late_s,
            response_time=1000.0 * latency_s,
            response_length=len(drawn.picture) if drawn else 0,
            exception=Refused(error, status) if error else None,
            context={},
        )

    def _proved(self, drawn: Drawn, request: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
        """Return what is wrong with a picture, or nothing, and its job's result."""
        # Threads, because decoding a large PNG holds up every other greenlet for its time.
        thread = gevent.get_hub().threadpool
        sides = (request["width"], request["height"])
        if fault := thread.apply(fault_in, (drawn.picture, *sides)):
            return fault, drawn.result
        try:
            result = drawn.result
            if result is None:
                path = f"/v1/jobs/{drawn.job_id}"
                result = self.exchange.ask("GET", path).json()["result"] or {}
            (image,) = result["images"]
            stored = drawn.picture if drawn.is_stored else self.exchange.fetch(image["url"])
        except Refused as refused:
            return refused.code, drawn.result
        except (KeyError, ValueError, TypeError):
            return "unexpected_result", drawn.result
        return thread.apply(fault_in_stored, (stored, image["sha256"])), result


def _told_in(result: dict[str, Any] | None) -> dict[str, Any]:
    if not result:
        return {}
    stages = result.get("stages") or []
    denoised = [each.get("replica") for each in stages if each.get("stage") == "denoise"]
    return {
        "server_s": result.get("seconds"),
        "queue_s": round(sum(each.get("queue_s", 0.0) for each in stages), 4) if stages else None,
        "joules": result.get("joules"),
        "replica": denoised[0] if denoised else None,
    }

"""A denoiser replica: the schedule's choices, one stretch of steps after the other.

A stretch is one choice, kept for some steps. Its work is counted in cool seconds, so that a change
of the card's speed only moves its end. A request that comes cuts it at the next step boundary, and
a request that is alone runs to its end without asking anybody.
"""

from __future__ import annotations

from cluster.simulation.traffic import Request
from deployments.schedule import Work, choose
from deployments.step_costs import StepCosts

_ROUNDING = 1e-9


class Denoiser:
    """One replica.

    Attributes:
        id: Unique, never used again.
        card: Its place among the cards.
        ongoing: Requests it holds.
        accepted: Requests it ever took.
        accepted_s: Cool seconds of all of them.
        version: Of its next event; events of older versions are void.
        speed: Cool seconds of work a second.
        most_rows: Of a forward, or None.
    """

    __slots__ = (
        "_begun_at",
        "_chosen",
        "_costs",
        "_done_s",
        "_forward_s",
        "_keep",
        "_live",
        "_steps",
        "accepted",
        "accepted_s",
        "card",
        "id",
        "most_rows",
        "ongoing",
        "speed",
        "version",
    )

    def __init__(self, id: str, card: int, costs: StepCosts, keep_choice_steps: int) -> None:
        self.id = id
        self.card = card
        self._costs = costs
        self._keep = keep_choice_steps
        self._live: dict[int, Request] = {}
        self._chosen: tuple[int, ...] = ()
        self._forward_s = 0.0
        self._steps = 0
        self._done_s = 0.0
        self._begun_at = 0.0
        self.accepted = 0
        self.accepted_s = 0.0
        self.ongoing = 0
        self.version = 0
        self.speed = 1.0
        self.most_rows: int | None = None

    @property
    def holds(self) -> frozenset[str]:
        """Keys of the sizes that it works on."""
        return frozenset({request.size for request in self._live.values()})

    def own_s(self, request: Request) -> float:
        """Return the cool seconds that a request takes here alone."""
        return request.steps * self._costs.seconds(request.shape, request.rows)

    def accept(self, request: Request, now: float) -> float | None:
        """Take a request; return when the stretch ends, if that is another time than before."""
        request.steps_done = 0
        request.submitted_at = now
        self._live[request.key] = request
        self.ongoing += 1
        self.accepted += 1
        self.accepted_s += self.own_s(request)
        if len(self._live) == 1:
            return self._arrange(now)
        self._advance(now)
        begun = int(self._done_s / self._forward_s + _ROUNDING) + 1
        if begun >= self._steps:
            return None
        self._steps = begun
        return self._end()

    def finish_stretch(self, now: float) -> tuple[list[Request], float | None]:
        """Step all that were chosen; return those that are done, and when the next stretch ends."""
        done = []
        for key in self._chosen:
            request = self._live[key]
            request.steps_done += self._steps
            if request.steps_done >= request.steps:
                del self._live[key]
                done.append(request)
        self.ongoing -= len(done)
        if self._live:
            return done, self._arrange(now)
        self._chosen = ()
        return done, None

    def set_speed(self, speed: float, now: float) -> float | None:
        """Go on at another speed; return when the stretch ends then."""
        if not self._chosen:
            self.speed = speed
            return None
        self._advance(now)
        self.speed = speed
        return self._end()

    def give_up(self) -> list[Request]:
        """Lose all requests, as with the card."""
        lost = list(self._live.values())
        self._live.clear()
        self._chosen = ()
        self.ongoing = 0
        self.version += 1
        return lost

    def backlog(self, now: float) -> tuple[float, float]:
        """Return cool seconds of what it has not begun, and what is left of the rest."""
        if not self._chosen:
            return 0.0, 0.0
        seconds = self._costs.seconds
        waiting = running = 0.0
        for key, request in self._live.items():
            left = (request.steps - request.steps_done) * seconds(request.shape, request.rows)
            if request.steps_done or key in self._chosen:
                running += left
            else:
                waiting += left
        done = self._done_s + (now - self._begun_at) * self.speed
        return waiting, max(running - done, 0.0)

    def _advance(self, now: float) -> None:
        self._done_s += (now - self._begun_at) * self.speed
        self._begun_at = now

    def _end(self) -> float:
        self.version += 1
        left = max(self._steps * self._forward_s - self._done_s, 0.0)
        return self._begun_at + left / self.speed

    def _arrange(self, now: float) -> float:
        live = self._live
        if len(live) == 1:
            ((key, request),) = live.items()
            self._chosen = (key,)
            self._steps = request.steps - request.steps_done
            self._forward_s = self._costs.seconds(request.shape, request.rows)
        else:
            works = [_work(request) for request in live.values()]
            most = self.most_rows
            limit = None if most is None else (lambda shape: most)
            self._chosen = choose(works, self._costs, now, limit)
            chosen = [live[key] for key in self._chosen]
            rows = sum(request.rows for request in chosen)
            self._forward_s = self._costs.seconds(chosen[0].shape, rows)
            fewest = min(request.steps - request.steps_done for request in chosen)
            self._steps = min(self._keep, fewest)
        self._done_s = 0.0
        self._begun_at = now
        return self._end()


def _work(request: Request) -> Work:
    left = request.steps - request.steps_done
    return Work(
        key=request.key,
        shape=request.shape,
        rows=request.rows,
        rows_left=left * request.rows,
        steps_left=left,
        submitted_at=request.submitted_at,
        steps_done=request.steps_done,
    )

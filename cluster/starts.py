"""Which replicas of a pool have been starting for how long, and which are not to be counted on.

Serve tells how many are asked for and how many run, not which: who was asked for first is taken to
be the first that comes. Where a start never ends, for want of a node or a quota, what was asked for
must not pass for capacity that is about to come, or nothing else is asked for instead of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.plan_pool import Pool
from cluster.plan_settings import PlanSettings

_LEAST_START_S = 10.0
# For so long a pool where something did not start is asked last.
_REMEMBERED_S = 900.0

_Asked = tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Starts:
    """What is remembered of a pool's starts.

    Attributes:
        present: Replicas that ran.
        asked: When some were asked for that have not come, and how many; oldest first.
        failed_at: When a start was last found to take too long; None: none did since one came.
    """

    present: int = 0
    asked: _Asked = ()
    failed_at: float | None = None

    def late(self, start_s: float, now: float, settings: PlanSettings) -> tuple[int, float]:
        """Return how many should have come by now, and since when the first was asked for.

        Args:
            start_s: What a start takes.
            now: Seconds.
            settings: Of the plan.
        """
        after_s = settings.late_start * max(start_s, _LEAST_START_S)
        overdue = [(at, many) for at, many in self.asked if now - at > after_s]
        return sum(many for _, many in overdue), now - overdue[0][0] if overdue else 0.0


def follow(
    before: Starts | None,
    present: int,
    target: int,
    start_s: float,
    now: float,
    settings: PlanSettings,
) -> Starts:
    """Bring a pool's starts up to date.

    Args:
        before: As remembered; None at first.
        present: Replicas that run now.
        target: That are asked for.
        start_s: What a start takes.
        now: Seconds.
        settings: Of the plan.
    """
    before = before or Starts(present)
    came = max(present - before.present, 0)
    asked = _without_first(before.asked, came)
    starting = max(target - present, 0)
    known = sum(many for _, many in asked)
    if known > starting:  # Serve gives up those first that it was asked for last
        asked = _without_first(asked[::-1], known - starting)[::-1]
    elif known < starting:
        asked = (*asked, (now, starting - known))
    after = Starts(present, asked, None if came else before.failed_at)
    late, _ = after.late(start_s, now, settings)
    return Starts(present, asked, now) if late else after


def with_starts(pool: Pool, starts: Starts, now: float, settings: PlanSettings) -> Pool:
    """Return the pool with what its starts came to."""
    late, late_s = starts.late(pool.start_s, now, settings)
    failed_at = starts.failed_at
    unreliable = failed_at is not None and now - failed_at < _REMEMBERED_S
    if not (late or unreliable):
        return pool
    return replace(pool, late=late, late_s=late_s, is_unreliable=unreliable)


def _without_first(asked: _Asked, many: int) -> _Asked:
    left = []
    for at, number in asked:
        gone = min(number, many)
        many -= gone
        if number > gone:
            left.append((at, number - gone))
    return tuple(left)

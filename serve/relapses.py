"""Jobs whose Pipelines die again and again: when they are taken over once more, without any I/O.

That a Pipeline dies never counts against its jobs, so none is parked for it. But one that kills
the process it lives in would kill each Pipeline as soon as it has started, with all that lives
there. So whoever has been taken over a few times waits before the next time, twice as long each
time, and a Pipeline has one such job at a time: those that died along with it end one after the
other, and what kills Pipelines does so ever more rarely.
"""

from __future__ import annotations

from collections.abc import Collection

# Whoever accepted it, and three takeovers: of a bad day.
_ATTEMPTS_AT_ONCE = 4
_LONGEST_PAUSE_S = 600.0


class Relapses:
    """What one Pipeline knows of them.

    Args:
        first_pause_s: Seconds before the first takeover that waits.
    """

    def __init__(self, first_pause_s: float) -> None:
        self._first_pause_s = first_pause_s
        self._since: dict[str, tuple[int, float]] = {}
        self._under_way: str | None = None

    def may_start(self, job_id: str, attempts: int, live: Collection[str], now: float) -> bool:
        """Return whether an orphan may be taken over now.

        Args:
            job_id: The orphan.
            attempts: How many Pipelines have had it.
            live: Ids of the jobs that live here.
            now: Seconds of this process's monotonic clock.
        """
        pause_s = self.pause_s(attempts)
        if not pause_s:
            return True
        known = self._since.get(job_id)
        if known is None or known[0] != attempts:
            known = self._since[job_id] = attempts, now
        return self._under_way not in live and now - known[1] >= pause_s

    def started(self, job_id: str, attempts: int) -> None:
        """Note that an orphan is taken over after so many had it."""
        self._since.pop(job_id, None)
        if self.pause_s(attempts):
            self._under_way = job_id

    def keep(self, orphans: Collection[str]) -> None:
        """Forget all but these."""
        self._since = {job: known for job, known in self._since.items() if job in orphans}

    def pause_s(self, attempts: int) -> float:
        """Return the seconds that an orphan waits which so many Pipelines have had."""
        over = attempts - _ATTEMPTS_AT_ONCE
        if over < 0:
            return 0.0
        return min(self._first_pause_s * 2.0 ** min(over, 32), _LONGEST_PAUSE_S)

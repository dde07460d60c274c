"""The room for pictures in two halves, while jobs of dead Pipelines wait for some of it.

New requests come faster than orphans are looked for, so under a load that never ends they would
take every place that is left, and what was promised earlier would wait for ever. So while an orphan
waits, new requests for its model, and for models that share a pool with it, take up half of the
room at most; orphans never take up more than theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from serve.running import RunningJob

HALF: Final = 0.5


class RoomHalves:
    """Which jobs of one process are whose; on one event loop.

    Attributes:
        adopted: Ids of jobs that were orphans.
        waited_for: Models for which an orphan finds no room, as requests name them.
    """

    def __init__(self) -> None:
        self.adopted: set[str] = set()
        self.waited_for: set[str | None] = set()

    def beside(self, live: Iterable[RunningJob], *, is_orphan: bool) -> list[RunningJob]:
        """Return the jobs with which one shares a half.

        Args:
            live: Jobs of this process.
            is_orphan: Whether it is a dead Pipeline's; else it is a new request.
        """
        return [job for job in live if (job.id in self.adopted) == is_orphan]

"""Whose fault it is that a replica died: the rules, without Ray.

Some requests kill the process that works on them, and would kill one after the other. But who was
there when a replica died is only a suspect: it is run again alone, and parked once replicas have
died twice with nobody else in them. What a drain, a lost node or a Pipeline's end takes along says
nothing of the work.
"""

from __future__ import annotations

from serve.errors import StageFailed

_DEATHS_ALONE = 2


class Suspicion:
    """What is held against one piece of work of one stage.

    Args:
        stage: Its name.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._deaths_alone = 0
        self._is_alone_now = False
        self.is_suspect = False
        """Whether it is to run alone from now on."""

    def began(self) -> None:
        """Note that a replica works on it now, alone if it is a suspect."""
        self._is_alone_now = self.is_suspect

    def left(self) -> None:
        """Note that no replica works on it any more."""
        self._is_alone_now = False

    def replica_crashed(self) -> StageFailed | None:
        """Note that the replica's process died by itself; return an error if that proves it."""
        self._deaths_alone += self._is_alone_now
        self._is_alone_now = False
        self.is_suspect = True
        if self._deaths_alone < _DEATHS_ALONE:
            return None
        return StageFailed(
            f"Stage {self._stage!r} died {self._deaths_alone} times while it worked on this alone."
        )

"""What Serve says of the further models, remembered for seconds, and never waited for longer.

Serve's controller may be away: it is started again then, and whoever asks it meanwhile waits until
it is back. One thread does, and everybody else goes on with what was last said.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from serve.detached import detached_context
from serve.model_applications import ModelState

_log = logging.getLogger("ray.serve")

_ANSWERS_WITHIN_S = 5.0


class ModelWatch:
    """Asks for the states of models; on one event loop.

    Args:
        ask: Returns them; it may wait long, and raise what it likes.
        within_s: Seconds after which whoever wants to know goes on without an answer.
    """

    def __init__(
        self, ask: Callable[[], Mapping[str, ModelState]], within_s: float = _ANSWERS_WITHIN_S
    ) -> None:
        self._ask = ask
        self._within_s = within_s
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[Mapping[str, ModelState]] | None = None
        self.states: Mapping[str, ModelState] = {}
        """Of each further model, by its name, as last said."""

    def forget(self) -> None:
        """Have the next one who wants to know ask anew."""
        self._asked_at = float("-inf")

    async def newest(self, max_age_s: float) -> Mapping[str, ModelState]:
        """Return the states, asked for anew if the last answer is too old and there is one."""
        if time.monotonic() - self._asked_at > max_age_s:
            asking = self._asking
            if asking is None:
                asking = self._asking = asyncio.get_running_loop().create_task(
                    asyncio.to_thread(self._ask), context=detached_context()
                )
            answered, _ = await asyncio.wait({asking}, timeout=self._within_s)
            if answered:
                self._take(asking)
            else:
                _log.warning("Serve does not say which models there are.")
            self._asked_at = time.monotonic()
        return self.states

    def _take(self, answered: asyncio.Task[Mapping[str, ModelState]]) -> None:
        if self._asking is answered:
            self._asking = None
        try:
            self.states = answered.result()
        except Exception:
            # Serve's controller is away; what was met works on without it.
            _log.exception("which models there are cannot be asked")

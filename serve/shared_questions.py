"""Questions that may never be answered: each is asked once at a time, however many want to know.

What asks Serve's controller occupies a thread until that is back, and a process has few threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from serve.detached import detached_context

_Answer = TypeVar("_Answer")


class SharedQuestions(Generic[_Answer]):
    """On one event loop.

    Args:
        within_s: Seconds after which whoever wants to know goes on without an answer.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._asked: dict[Hashable, asyncio.Task[_Answer]] = {}

    async def answer(
        self, key: Hashable, ask: Callable[[], Coroutine[Any, Any, _Answer]]
    ) -> _Answer:
        """Return the answer to a question, asked now unless it is being asked already.

        Args:
            key: What makes it the same question.
            ask: Asks it; may take for ever.

        Raises:
            TimeoutError: There is no answer yet. The question goes on being asked.
            Exception: Whatever `ask` raises.
        """
        asked = self._asked.get(key)
        if asked is None:
            loop = asyncio.get_running_loop()
            asked = self._asked[key] = loop.create_task(ask(), context=detached_context())
            asked.add_done_callback(lambda answered: self._done(key, answered))
        if not (await asyncio.wait({asked}, timeout=self._within_s))[0]:
            raise TimeoutError
        return asked.result()

    def _done(self, key: Hashable, answered: asyncio.Task[_Answer]) -> None:
        del self._asked[key]
        if not answered.cancelled():
            answered.exception()  # nobody may be waiting for it any more

"""The API keys as one process knows them, asked of their store again every few seconds.

All keys are known here, so a wrong one costs the store nothing, however many are tried: it makes
the list be read anew at most once a second, for it may have been made just now.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from serve.detached import detached_context
from serve.errors import KelvinError, StorageUnavailable
from serve.key_store import KeyStore
from serve.keys import KeyRecord, digest_of, is_key

_log = logging.getLogger("ray.serve")

REVOKED_WITHIN_S = 3.0
_NEW_WITHIN_S = 1.0
# While the store does not answer, nobody can revoke through it either.
_KNOWN_FOR_S = 300.0
_PATIENCE_S = 1.0


class KeyRing:
    """All keys; on one event loop.

    Args:
        store: Where they lie.
        clock: Seconds, monotonic.
    """

    def __init__(self, store: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._reading: asyncio.Task[KelvinError | None] | None = None
        self._records: Mapping[str, KeyRecord] = {}
        self._read_at = float("-inf")
        self._tried_at = float("-inf")

    async def find(self, key: str) -> KeyRecord | None:
        """Return the record of a key; None: it is wrong, or revoked.

        Raises:
            StorageUnavailable: The store does not answer, and has not for minutes.
        """
        if not is_key(key):
            return None
        digest = digest_of(key)
        await self._refreshed(REVOKED_WITHIN_S)
        if digest not in self._records:
            await self._refreshed(_NEW_WITHIN_S)
        record = self._records.get(digest)
        return record if record is not None and record.is_of(key) else None

    async def _refreshed(self, max_age_s: float) -> None:
        """Have the keys read anew if need be; who is known waits for a slow store a moment only."""
        now = self._clock()
        if now - self._read_at <= max_age_s:
            return
        is_known = now - self._read_at <= _KNOWN_FOR_S
        if self._reading is None or self._reading.done():
            if is_known and now - self._tried_at <= _NEW_WITHIN_S:
                return
            self._tried_at = now
            loop = asyncio.get_running_loop()
            self._reading = loop.create_task(self._read(), context=detached_context())
        reading = self._reading
        patience_s = max(0.0, self._tried_at + _PATIENCE_S - now) if is_known else None
        if not (await asyncio.wait({reading}, timeout=patience_s))[0]:
            return
        error = reading.result()
        if error is not None and not is_known:
            # Where they lie is nobody's business who has not shown one.
            raise StorageUnavailable(
                "API keys cannot be checked now.", allowed="try again later"
            ) from None

    async def _read(self) -> KelvinError | None:
        asked_at = self._clock()
        try:
            self._records = await self._store.records()
        except KelvinError as error:
            _log.warning("API keys cannot be read: %s", error)
            return error
        self._read_at = asked_at
        return None

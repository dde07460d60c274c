"""Finished pictures on their way to the store, however long that does not answer.

As long as uploads succeed, pictures go straight there. After one has failed, all that are finished
wait in the spool, or in memory where it is full or off, while one task tries them in turn. A
picture is reported stored once it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from serve.detached import detached_context
from serve.errors import StorageUnavailable
from serve.jobs import JobJournal
from serve.pictures import CONTENT_TYPES
from serve.requests import GenerateRequest
from serve.spool import MadePicture, Spool, Spooled
from serve.storage import ObjectStore

_log = logging.getLogger("ray.serve")
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 4.0
_ROOM_POLL_S = 0.25
_BETWEEN_TIDYING_S = 30.0
_FORGOTTEN_AFTER_S = 3600.0
_METADATA_BYTES = 64 << 10


class SpooledPictureLost(Exception):
    """What waited on disk is gone or damaged: the picture must be made again."""


@dataclass
class _Waiting:
    key: str
    content_type: str
    done: asyncio.Future[None]
    spooled: Spooled | None
    data: bytes | None  # where it is not in the spool

    def read(self) -> bytes | None:
        return self.data if self.spooled is None else self.spooled.read()


class Uploads:
    """Puts pictures into their store. All on one event loop.

    Args:
        store: Of pictures.
        spool: Where they wait; None: in memory.
    """

    def __init__(self, store: ObjectStore, spool: Spool | None) -> None:
        self._store = store
        self._spool = spool
        self._waiting: dict[str, _Waiting] = {}
        self._drain: asyncio.Task[None] | None = None

    @property
    def is_in_trouble(self) -> bool:
        """Whether pictures wait for the store."""
        return self._drain is not None and not self._drain.done()

    async def upload(self, job_id: str, made: MadePicture, data: bytes) -> None:
        """Store a picture and return when it is stored.

        Raises:
            SpooledPictureLost: It waited, and was lost on this machine's disk.
        """
        key = self._store.key_of(made.ref.s3_uri)
        if key is None:
            raise ValueError(f"not a picture of this store: {made.ref.s3_uri}")
        content_type = CONTENT_TYPES[made.ref.output_format]
        if not self.is_in_trouble:
            try:
                await self._store.put(key, data, content_type)
            except StorageUnavailable as error:
                _log.warning("Pictures wait for their store: %s", error)
            else:
                return
        spooled = None
        if self._spool is not None:
            spooled = await asyncio.to_thread(self._spool.write, job_id, made, data)
        kept = data if spooled is None else None
        del data
        await self._when_stored(key, content_type, spooled, kept)

    async def resumed(self, job_id: str, index: int) -> MadePicture | None:
        """Store a picture that was finished before its Pipeline died on this machine, if there is.

        Returns:
            What is known of it, once it is stored; None: it must be made.
        """
        if self._spool is None:
            return None
        spooled = await asyncio.to_thread(self._spool.find, job_id, index)
        if spooled is None:
            return None
        made = spooled.made
        key = self._store.key_of(made.ref.s3_uri)
        if key is None:
            return None  # made for another bucket, before the settings changed
        content_type = CONTENT_TYPES[made.ref.output_format]
        try:
            await self._when_stored(key, content_type, spooled, None)
        except SpooledPictureLost:
            return None
        return made

    async def room(self, request: GenerateRequest) -> None:
        """Wait until a picture of this request, once finished, can wait on disk if it must."""
        while self.is_in_trouble and not await self._has_room(picture_bytes(request)):
            await asyncio.sleep(_ROOM_POLL_S)

    async def refuse_if_full(
        self, request: GenerateRequest, live: Collection[GenerateRequest]
    ) -> None:
        """Refuse a request whose pictures might find the spool full.

        Args:
            request: Resolved.
            live: The requests under way here.

        Raises:
            StorageUnavailable: They might.
        """
        if not self.is_in_trouble:
            return
        wanted = sum(picture_bytes(each) * each.num_images for each in (request, *live))
        if not await self._has_room(wanted):
            raise StorageUnavailable(
                "The object store does not answer, and finished pictures that wait for it have "
                "used up the spool.",
                field="spool.mib",
                value=0 if self._spool is None else self._spool.most_bytes >> 20,
                allowed="try again later; Retry-After says when",
            )

    async def tidy(self, journal: JobJournal, live: Collection[str]) -> None:
        """Remove, now and then, what waits for jobs that have ended elsewhere; until cancelled."""
        # A journal that is this process's alone says nothing of what others wait with.
        older_than_s = 0.0 if journal.is_durable else _FORGOTTEN_AFTER_S
        while self._spool is not None:
            for job_id in await asyncio.to_thread(self._spool.jobs, older_than_s):
                try:
                    if job_id not in live and await journal.has_ended(job_id):
                        await asyncio.to_thread(self._spool.remove_job, job_id)
                except StorageUnavailable:
                    break
            await asyncio.sleep(_BETWEEN_TIDYING_S)

    async def as_json(self) -> dict[str, Any]:
        """Return what `/v1/status` says of the spool."""
        spool = self._spool
        return {
            "limit_bytes": 0 if spool is None else spool.most_bytes,
            "used_bytes": 0 if spool is None else await asyncio.to_thread(spool.used_bytes),
            "waiting_pictures": len(self._waiting),
        }

    async def _has_room(self, wanted: int) -> bool:
        if self._spool is None:
            return False
        used = await asyncio.to_thread(self._spool.used_bytes)
        return used + wanted <= self._spool.most_bytes

    async def _when_stored(
        self, key: str, content_type: str, spooled: Spooled | None, data: bytes | None
    ) -> None:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(key, content_type, loop.create_future(), spooled, data)
        del data
        self._waiting[key] = waiting
        if not self.is_in_trouble:
            self._drain = loop.create_task(self._try_again(), context=detached_context())
        try:
            await waiting.done
        finally:
            if self._waiting.get(key) is waiting:
                del self._waiting[key]
        # Who is cancelled leaves it: a process that ends leaves it for the next one, and what
        # nobody wants any more is tidied up.
        if spooled is not None:
            await asyncio.to_thread(spooled.remove)

    async def _try_again(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while self._waiting:
            waiting = next(iter(self._waiting.values()))
            data = await asyncio.to_thread(waiting.read)
            try:
                if data is not None:
                    await self._store.put(waiting.key, data, waiting.content_type)
            except StorageUnavailable:
                if self._waiting.get(waiting.key) is waiting:
                    # Others first: the store may refuse this one alone, of one tenant's folder.
                    self._waiting[waiting.key] = self._waiting.pop(waiting.key)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = _FIRST_PAUSE_S
            if self._waiting.get(waiting.key) is waiting:
                del self._waiting[waiting.key]
            if waiting.done.done():
                continue
            if data is None:
                waiting.done.set_exception(SpooledPictureLost(waiting.key))
            else:
                waiting.done.set_result(None)


def picture_bytes(request: GenerateRequest) -> int:
    """Return an upper bound of a finished picture's size: that of its bare pixels, and metadata."""
    return 3 * (request.width or 0) * (request.height or 0) + _METADATA_BYTES

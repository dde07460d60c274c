"""Accepted ComfyUI prompts: one prompt is one or several of Kelvin's jobs.

A prompt's record, its workflow and which job makes what, is attached to the job of its first chain
(`serve.attachment`), which is accepted last. So it costs no write, who finds it finds jobs that are
all accepted, and it outlives a Pipeline as they do. To the jobs of other chains the prompt_id is
attached. Where the first chain's job is deleted before the others, the record is handed on to one
of them: `serve.http.comfyui_heirs`.

A prompt_id is the first chain's job's id as a UUID; or it came with the prompt, or was drawn for
several chains, and then all its jobs are accepted under idempotency keys made of it. Who was not
answered may send the prompt again under its prompt_id and gets the same jobs; new ones where they
were cancelled or failed and the prompt was removed from history since. Prompts are listed by the
journal, among the jobs that doors list; who removes one from history moves its job to the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Final

from pydantic import TypeAdapter, ValidationError

from serve.errors import InvalidRequest, RecordUnreadable
from serve.http.comfyui_heirs import Heirs
from serve.http.comfyui_record import OtherChain, PromptRecord
from serve.idempotency import Idempotency
from serve.job_ids import first_job_id, is_job_id
from serve.jobs import JobJournal
from serve.listing_keys import job_of, listing_key, listing_prefix
from serve.record_store import RecordStore

_log = logging.getLogger("ray.serve")

_JSON = "application/json"
_EMPTY = b"{}\n"
_LONGEST_ID = 200
_AT_ONCE = 4  # one may have 4 MiB, and takes several times that as Python's objects
_MOVED_AT_ONCE = 16
_LISTED_AT_ONCE = 1000  # what a store lists in one answer

MOST_BYTES_LISTED: Final = 8 << 20
"""Of workflows in one answer that lists prompts."""

_ATTACHED: TypeAdapter[PromptRecord | OtherChain] = TypeAdapter(PromptRecord | OtherChain)


class PromptRecords:
    """The prompts in one store. Every method raises StorageUnavailable where that is away.

    Args:
        store: Of the journal.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._journal = JobJournal(store)
        self._keys = Idempotency(store)
        self._heirs = Heirs(store)

    async def find(self, prompt_id: str, tenant: str) -> PromptRecord | None:
        """Return a tenant's prompt; None: there is none of that id."""
        drawn = prompt_id.replace("-", "")
        record = await self._held_by(drawn, tenant) if is_job_id(drawn) else None
        if record is None or record.id != prompt_id:
            keyed = await self._keys.job(chain_key(prompt_id, 0), tenant)
            if keyed is not None:
                record = await self._held_by(keyed, tenant)
                record = record or await self._heirs.find(prompt_id, tenant)
        return record if record is not None and record.id == prompt_id else None

    async def of_job(self, job_id: str, tenant: str) -> PromptRecord | None:
        """Return the prompt that a tenant's job belongs to; None: it came through another door."""
        return await self._prompt(job_id, tenant, await self._journal.attached(job_id, tenant))

    async def of_jobs(
        self, job_ids: Sequence[str], tenant: str
    ) -> AsyncIterator[tuple[PromptRecord, int]]:
        """Yield the prompts of a tenant's jobs, in order and each once, with the bytes they have.

        Few of them are in memory at a time. What cannot be read is left out: it must not hide the
        others.

        Args:
            job_ids: Of jobs of all doors.
            tenant: Whose.
        """
        known: set[str] = set()
        for begin in range(0, len(job_ids), _AT_ONCE):
            some = [job for job in job_ids[begin : begin + _AT_ONCE] if job not in known]
            read = await asyncio.gather(*(self._readable(job, tenant) for job in some))
            for record, size in read:
                if record is not None and record.job not in known:
                    known.update(chain.job for chain in record.chains)
                    yield record, size

    async def newest(self, tenant: str, most: int, skip: int = 0) -> list[PromptRecord]:
        """Return a tenant's newest prompts, oldest first; fewer where they are large.

        Args:
            tenant: Whose.
            most: How many.
            skip: So many newer ones are left out.
        """
        keys: list[str] = []
        while (missing := skip + most - len(keys)) > 0:
            page = min(missing, _LISTED_AT_ONCE)
            found = await self._listed(tenant, keys[-1] if keys else "", page)
            keys += found
            if len(found) < page:
                break
        prompts: list[PromptRecord] = []
        taken = 0
        async for record, size in self.of_jobs(_jobs_of(keys[skip:]), tenant):
            prompts.append(record)
            taken += size
            if taken >= MOST_BYTES_LISTED:
                break
        return prompts[::-1]

    async def since(
        self, tenant: str, since_ms: int, known: Collection[str] = ()
    ) -> AsyncIterator[PromptRecord]:
        """Yield a tenant's prompts, newest first, with few of them in memory at a time.

        Args:
            tenant: Whose.
            since_ms: Older ones are left out.
            known: `PromptRecord.job` of those that are left out and not read.
        """
        last, after = listing_key(first_job_id(since_ms), tenant, by_door=True), ""
        while True:
            keys = await self._listed(tenant, after, _LISTED_AT_ONCE)
            jobs = [
                job for job in _jobs_of([key for key in keys if key <= last]) if job not in known
            ]
            async for record, _ in self.of_jobs(jobs, tenant):
                yield record
            if len(keys) < _LISTED_AT_ONCE or keys[-1] > last:
                return
            after = keys[-1]

    async def is_accepted(self, record: PromptRecord) -> bool:
        """Return whether somebody works on a prompt, or did: who wrote it down may have died."""
        return await self._journal.is_pending(record.job) or await self._journal.has_ended(
            record.job
        )

    async def is_listed(self, record: PromptRecord) -> bool:
        """Return whether a prompt is in history, once it is over."""
        return await self._store.exists(listing_key(record.job, record.tenant, by_door=True))

    async def remember(self, record: PromptRecord) -> None:
        """Put a prompt back into history, if it was removed from there."""
        if not await self.is_listed(record):
            await self._list(record, by_door=True)

    async def forget(self, record: PromptRecord) -> None:
        """Remove a prompt from history; its pictures stay, and their workflow in them."""
        await self._list(record, by_door=False)

    async def forget_older(self, tenant: str, than_ms: int, kept: Collection[str]) -> None:
        """Remove prompts from history without reading them.

        Args:
            tenant: Whose.
            than_ms: Those accepted since this time stay.
            kept: `PromptRecord.job` of those that stay too.
        """
        after = listing_key(first_job_id(than_ms), tenant, by_door=True)
        while keys := await self._listed(tenant, after, _LISTED_AT_ONCE):
            jobs = [job for job in _jobs_of(keys) if job not in kept]
            for begin in range(0, len(jobs), _MOVED_AT_ONCE):
                some = jobs[begin : begin + _MOVED_AT_ONCE]
                await asyncio.gather(*(self._move(job, tenant, by_door=False) for job in some))
            after = keys[-1]

    async def hand_on(self, record: PromptRecord, heir: str | None) -> None:
        """Keep a prompt though the job that it is attached to is about to be deleted.

        Args:
            record: As it was found.
            heir: Job of another chain, that is left; None: none is, and the prompt goes too.
        """
        if heir is None:
            await self._heirs.drop(record)
            return
        handed_on = record.led_by(heir)
        await self._heirs.keep(handed_on)
        if await self.is_listed(record):
            await self._list(handed_on, by_door=True)

    async def _list(self, record: PromptRecord, *, by_door: bool) -> None:
        await self._move(record.job, record.tenant, by_door=by_door)

    async def _move(self, job_id: str, tenant: str, *, by_door: bool) -> None:
        # Not at once: among all jobs it is to be found at any time.
        await self._store.put(listing_key(job_id, tenant, by_door=by_door), _EMPTY, _JSON)
        await self._store.delete(listing_key(job_id, tenant, by_door=not by_door))

    async def _listed(self, tenant: str, after: str, most: int) -> list[str]:
        return await self._store.list_some(listing_prefix(tenant, by_door=True), after, most)

    async def _readable(self, job_id: str, tenant: str) -> tuple[PromptRecord | None, int]:
        """Return a job's prompt, if that can be read, and the bytes it has."""
        try:
            data = await self._journal.attached(job_id, tenant)
            return await self._prompt(job_id, tenant, data), len(data or b"")
        except RecordUnreadable as error:
            _log.warning("%s %s", error.message, error.value)
            return None, 0

    async def _held_by(self, job_id: str, tenant: str) -> PromptRecord | None:
        """Return the prompt that a tenant's job is the first chain of; None: it is of none."""
        attached = _read(job_id, tenant, await self._journal.attached(job_id, tenant))
        return attached if isinstance(attached, PromptRecord) else None

    async def _prompt(self, job_id: str, tenant: str, data: bytes | None) -> PromptRecord | None:
        """Return a job's prompt, given what is attached to the job."""
        attached = _read(job_id, tenant, data)
        if not isinstance(attached, OtherChain):
            return attached
        whole = await self.find(attached.prompt_id, tenant)
        # Of a prompt that was refused such jobs are left, cancelled.
        is_its = whole is not None and any(chain.job == job_id for chain in whole.chains)
        return whole if is_its else None


def chain_key(prompt_id: str, index: int) -> str:
    """Return the idempotency key of the job of a prompt's chain.

    Args:
        prompt_id: Given with the prompt, or drawn for several chains.
        index: Of the chain.
    """
    # The last number counted jobs that were cancelled, each of which had a key of its own.
    return f"comfyui:{prompt_id}:{index}:0"


def checked_id(prompt_id: object) -> str:
    """Return a prompt_id as ComfyUI does, as text.

    Raises:
        InvalidRequest: It is empty, too long, or cannot stand in a path.
    """
    text = str(prompt_id) if isinstance(prompt_id, str | int) else ""
    is_name = text.isascii() and text.isprintable() and "/" not in text
    if not is_name or text in ("", ".", "..") or len(text) > _LONGEST_ID:
        raise InvalidRequest(
            "This is no prompt_id.",
            field="prompt_id",
            value=prompt_id,
            allowed=f"1 to {_LONGEST_ID} printable ASCII characters without a slash; a UUID is "
            "drawn if absent",
        )
    return text


def now_ms() -> int:
    """Return milliseconds of Unix time, as ComfyUI stamps its messages."""
    return time.time_ns() // 1_000_000


def _read(job_id: str, tenant: str, data: bytes | None) -> PromptRecord | OtherChain | None:
    """Return what is attached to a tenant's job.

    Raises:
        RecordUnreadable: Somebody else, or another version, wrote it.
    """
    if data is None:
        return None
    attached: PromptRecord | OtherChain | None = None
    with contextlib.suppress(ValidationError):
        attached = _ATTACHED.validate_json(data)
    if isinstance(attached, OtherChain):
        return attached
    # Another tenant's would be answered with that one's jobs.
    if attached is None or attached.tenant != tenant:
        raise RecordUnreadable(
            "The record of a prompt cannot be read.",
            field="prompt_id",
            value=job_id,
            allowed="a bucket or prefix of Kelvin's own",
        )
    return attached.held_by(job_id)


def _jobs_of(keys: Sequence[str]) -> list[str]:
    return [job for job in map(job_of, keys) if job is not None]

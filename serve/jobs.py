"""The job journal: a job is written before it is accepted and its result is published once.

The object store is the only truth, so a job can be read through any proxy and after any restart.
Keys, relative to the store's prefix:

    jobs/{id}/request.json          the accepted request; put if absent. What its door keeps with
                                    the job stands below its first line: `serve.attachment`
    jobs/{id}/attempts/{n}.json     who took it over; `serve.claims`
    jobs/{id}/cancel.json           somebody wants it cancelled
    jobs/{id}/result.json           how it ended; put if absent: the one moment of truth
    images/{id}/{index}-{sha256}.{ext}   a late loser cannot overwrite what a winner published;
    images/{tenant}/{id}/...             those of a tenant other than the default one; what a job
                                    starts from lies beside them: `serve.inputs`
    pending/{shard}/{id}            accepted and not ended: what a restart must look at, and who
                                    accepted it
    leases/{pipeline}.json          which Pipelines live; `serve.leases`
    listing/{tenant}/{countdown}    a tenant's jobs, newest first; `serve.job_listing`
    listing/{tenant}.door/{countdown}    those of them that their door lists too
    idempotency/{digest}.json       which job a key stands for; `serve.idempotency`

Presigned URLs are secrets that expire: they are made on reading and never stored.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress

from pydantic import ValidationError

from serve.attachment import Attachment, attached, with_attachment, without_attachment
from serve.errors import JobConflict, KelvinError, RecordUnreadable, StorageUnavailable
from serve.job_ids import checked, is_job_id, not_found, shard
from serve.listing_keys import listing_key
from serve.record_store import RecordStore
from serve.removal import DELETED
from serve.requests import GenerateRequest, JobRecord
from serve.storage import ObjectStore
from serve.tenants import DEFAULT_TENANT, pictures_prefix

_JSON = "application/json"
_EMPTY = b"{}\n"
_LONGEST_OWNER = 200
_log = logging.getLogger(__name__)


class JobJournal:
    """Jobs in one store. A malformed id is a JobNotFound and never reaches a key.

    Args:
        store: Of records.
        pictures: Their store, where it is another one.
    """

    def __init__(self, store: RecordStore, pictures: ObjectStore | None = None) -> None:
        self._store = store
        if pictures is None and isinstance(store, ObjectStore):
            pictures = store
        self._pictures = pictures
        self.is_durable = isinstance(store, ObjectStore)
        """False where it dies with this process, and knows of no other's jobs."""

    async def accept(
        self,
        job_id: str,
        request: GenerateRequest,
        owner: str | None = None,
        tenant: str = DEFAULT_TENANT,
        attachment: Attachment | None = None,
    ) -> bool:
        """Write a job down; once this returns, no crash loses it.

        Args:
            job_id: From `serve.job_ids.new_job_id`.
            request: Fully resolved, with its seed: a takeover must make the same pictures.
            owner: Lease of the Pipeline that accepts it; None: whoever finds it may take it.
            tenant: Whose it is.
            attachment: To be kept with it. Where the job was written before, that one stays.

        Returns:
            True if the job is this owner's to do, False if it was accepted before.

        Raises:
            JobConflict: The id has another request already.
            StorageUnavailable: The job is not accepted.
        """
        record = JobRecord(
            id=checked(job_id),
            tenant=tenant,
            status="pending",
            request=request,
            durable=self.is_durable,
        )
        data = with_attachment(record.model_dump_json().encode(), attachment)
        by_door = attachment is not None and attachment.is_listed
        is_new, _ = await asyncio.gather(
            self._store.put(_request_key(job_id), data, _JSON, if_absent=True),
            self._store.put(listing_key(job_id, tenant, by_door=by_door), _EMPTY, _JSON),
        )
        is_known = not is_new
        if is_known:
            known = await self._accepted(job_id)
            if known is None or (known.request, known.tenant) != (request, tenant):
                raise JobConflict("This job id is taken.", field="id", value=job_id)
        # After the request: whoever finds a pending key finds what to do.
        body = _EMPTY if owner is None else json.dumps({"pipeline": owner}).encode()
        is_mine = await self._store.put(_pending_key(job_id), body, _JSON, if_absent=True)
        if is_mine and is_known and await self._store.exists(_result_key(job_id)):
            # It was not pending because it had ended.
            await self.forget_pending(job_id)
            return False
        return is_mine

    async def accepted_by(self, job_id: str) -> str | None:
        """Return the lease of the Pipeline that accepted a pending job; None: not known."""
        try:
            body = json.loads(await self._store.get(_pending_key(job_id)) or b"{}")
        except (ValueError, RecursionError):
            return None
        owner = body.get("pipeline") if isinstance(body, dict) else None
        return owner if isinstance(owner, str) and len(owner) <= _LONGEST_OWNER else None

    async def attached(self, job_id: str, tenant: str) -> bytes | None:
        """Return what is kept with a tenant's job; None: nothing, or there is no such job.

        Raises:
            JobNotFound: The id is malformed.
            RecordUnreadable: Somebody else, or another version, wrote it.
        """
        key = _request_key(job_id)
        data = await self._store.get(key)
        if data is None or self._parsed(data, key, job_id).tenant != tenant:
            return None
        return attached(data)

    async def read(self, job_id: str) -> JobRecord | None:
        """Return what the store knows of a job, with fresh presigned URLs; None if unknown.

        Raises:
            JobNotFound: The id is malformed.
            RecordUnreadable: Somebody else, or another version, wrote it.
        """
        result, cancel, request = await asyncio.gather(
            self._store.get(_result_key(job_id)),
            self._store.exists(_cancel_key(job_id)),
            self._store.get(_request_key(job_id)),
        )
        if result == DELETED:
            return None
        if result is not None:
            return await self._with_urls(self._parsed(result, _result_key(job_id), job_id))
        if request is None:
            return None
        accepted = self._parsed(request, _request_key(job_id), job_id)
        if cancel:
            # Whoever asked died before deciding it. Decide now, so that no reader is told
            # "cancelled" of a job that succeeds a moment later.
            return await self._decide_cancelled(accepted)
        return accepted

    async def ended(self, job_id: str) -> JobRecord | None:
        """Return a job that has ended, as `read` does; None: it has not, or nobody knows of it."""
        result = await self._store.get(_result_key(job_id))
        if result is None or result == DELETED:
            return None
        return await self._with_urls(self._parsed(result, _result_key(job_id), job_id))

    async def is_pending(self, job_id: str) -> bool:
        """Return whether a job was accepted and has not ended."""
        return await self._store.exists(_pending_key(job_id))

    async def publish(self, job_id: str, record: JobRecord) -> bool:
        """Publish how a job ended, once; the first publisher wins.

        Args:
            job_id: The job.
            record: succeeded, failed or cancelled. Its presigned URLs are left out.

        Returns:
            True if this is the job's result now and for ever, False if it had one already: then
            `read` tells it, and nobody refers to the caller's pictures.
        """
        if record.id != checked(job_id) or not record.is_over:
            raise ValueError(f"not the end of job {job_id}: {record.id} {record.status}")
        bare = _without_urls(record).model_copy(update={"durable": self.is_durable})
        data = bare.model_dump_json().encode()
        won = await self._store.put(_result_key(job_id), data, _JSON, if_absent=True)
        try:
            await self.forget_pending(job_id)
        except StorageUnavailable as error:
            # The result stands. Whoever looks at pending keys next finds it ended and removes it.
            _log.warning("job %s: its pending key stays for now: %s", job_id, error)
        return won

    async def forget_pending(self, job_id: str) -> None:
        """Remove a job that has ended, or that nobody ever wrote, from what a restart looks at."""
        await self._store.delete(_pending_key(job_id))

    async def was_deleted(self, job_id: str) -> bool:
        """Return whether a job was there and has been deleted."""
        return await self._store.get(_result_key(job_id)) == DELETED

    async def half_deleted(self, job_id: str) -> JobRecord | None:
        """Return a job as it was accepted whose deletion has begun and was broken off, if it is."""
        if not await self.was_deleted(checked(job_id)):
            return None
        return await self._accepted(job_id)

    async def has_ended(self, job_id: str) -> bool:
        """Return whether a job has ended, or is not on record at all."""
        if await self._store.exists(_result_key(job_id)):
            return True
        return not await self._store.exists(_request_key(job_id))

    async def request_cancel(self, job_id: str) -> JobRecord:
        """Cancel a job unless it has ended.

        Returns:
            The job as it is now and for ever: cancelled, or how it had ended before.

        Raises:
            JobNotFound: No job has this id.
        """
        record = await self.read(job_id)
        if record is None:
            raise not_found(job_id)
        if record.is_over:
            return record
        await self._store.put(_cancel_key(job_id), _EMPTY, _JSON)
        return await self._decide_cancelled(record)

    async def is_cancelled(self, job_id: str) -> bool:
        """Return whether somebody asked to cancel this job; cheap enough to ask now and then."""
        return await self._store.exists(_cancel_key(job_id))

    async def pending(self, of_shard: str | None = None) -> list[str]:
        """Return the ids of jobs accepted and not ended, oldest first; of one shard or all."""
        keys = await self._store.list_keys(f"pending/{of_shard}/" if of_shard else "pending/")
        return sorted(filter(is_job_id, (key.rsplit("/", 1)[-1] for key in keys)))

    @staticmethod
    def image_key(
        job_id: str, index: int, sha256: str, ext: str, tenant: str = DEFAULT_TENANT
    ) -> str:
        """Return the key of picture `index`, whose bytes have this hash.

        Args:
            job_id: The job.
            index: From 0.
            sha256: Hexadecimal, of the stored bytes.
            ext: png, jpg or webp.
            tenant: Whose job it is.
        """
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ValueError(f"not a sha256: {sha256[:80]!r}")
        if index < 0 or not (ext.isascii() and ext.isalnum()):
            raise ValueError(f"not a picture's index and extension: {index}, {ext[:80]!r}")
        return f"{pictures_prefix(tenant)}{checked(job_id)}/{index}-{sha256}.{ext}"

    async def _decide_cancelled(self, accepted: JobRecord) -> JobRecord:
        ended = accepted.model_copy(update={"status": "cancelled"})
        if await self.publish(accepted.id, ended):
            return ended
        return await self.read(accepted.id) or ended

    async def _accepted(self, job_id: str) -> JobRecord | None:
        key = _request_key(job_id)
        data = await self._store.get(key)
        return None if data is None else self._parsed(data, key, job_id)

    def _parsed(self, data: bytes, key: str, job_id: str) -> JobRecord:
        record: JobRecord | None = None
        is_end = key == _result_key(job_id)
        with suppress(ValueError, ValidationError, KelvinError):
            record = JobRecord.model_validate_json(data if is_end else without_attachment(data))
        # What was copied from another job, or is no end, would decide what it must not.
        if (
            record is None
            or record.id != job_id
            or record.is_over != is_end
            or (record.request is None and not is_end)
        ):
            raise RecordUnreadable(
                "A job record in the object store cannot be read: somebody else wrote it, or "
                "another version of Kelvin.",
                field="id",
                value=self._store.s3_uri(key),
                allowed="a bucket or prefix of Kelvin's own",
            )
        return record

    async def _with_urls(self, record: JobRecord) -> JobRecord:
        if record.result is None:
            return record
        pictures = self._pictures
        if pictures is None:
            return record
        keys = {image.s3_uri: pictures.key_of(image.s3_uri) for image in record.result.images}

        def presigned() -> dict[str, str]:
            return {uri: pictures.presign(key) for uri, key in keys.items() if key is not None}

        return _with_result(record, await asyncio.to_thread(presigned))


def _request_key(job_id: str) -> str:
    return f"jobs/{checked(job_id)}/request.json"


def _cancel_key(job_id: str) -> str:
    return f"jobs/{checked(job_id)}/cancel.json"


def _result_key(job_id: str) -> str:
    return f"jobs/{checked(job_id)}/result.json"


def _pending_key(job_id: str) -> str:
    return f"pending/{shard(job_id)}/{job_id}"


def _without_urls(record: JobRecord) -> JobRecord:
    bare = record.model_copy(update={"progress": None})
    return bare if record.result is None else _with_result(bare, {})


def _with_result(record: JobRecord, urls: dict[str, str]) -> JobRecord:
    """Return the record with these URLs (s3_uri -> URL) and no others."""
    if record.result is None:
        return record
    images = tuple(
        image.model_copy(update={"url": urls.get(image.s3_uri, "")})
        for image in record.result.images
    )
    result = record.result.model_copy(update={"images": images})
    return record.model_copy(update={"result": result})

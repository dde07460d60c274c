"""Idempotency keys: who sends the same request twice under one key gets one job.

    idempotency/{sha256 of tenant and key}.json    put if absent: the job's id, its seed and a
                                                   digest of what was asked. Swapped where a door
                                                   wants another job instead of one that it names

It is written before the job is, so that two who send at the same time, to two Pipelines, agree on
the id; who finds a key without its job accepts the job under that id. Of keys only digests are
kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from serve.errors import IdempotencyConflict, RecordUnreadable
from serve.job_ids import is_job_id
from serve.record_store import RecordStore
from serve.requests import LARGEST_SEED, GenerateRequest
from serve.tenants import DEFAULT_TENANT

_JSON = "application/json"


@dataclass(frozen=True)
class Remembered:
    """What a key stands for."""

    job_id: str
    seed: int


class Idempotency:
    """The keys in one journal's store.

    Every method raises StorageUnavailable where the store does not answer.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    async def find(
        self,
        request: GenerateRequest,
        tenant: str = DEFAULT_TENANT,
        instead_of: str | None = None,
    ) -> Remembered | None:
        """Return what a request's key stands for; None: it has none, or a new one.

        Args:
            request: As it was sent, with its key.
            tenant: Whose keys are meant.
            instead_of: A key that stands for this job is as good as new.

        Raises:
            IdempotencyConflict: Another request was sent under this key.
            RecordUnreadable: Somebody else wrote its record.
        """
        if request.idempotency_key is None:
            return None
        known = await self._read(request.idempotency_key, tenant)
        if known is None or known[0].job_id == instead_of:
            return None
        found, digest = known
        if digest != _digest(request):
            raise IdempotencyConflict(
                "Another request was sent under this idempotency key.",
                field="idempotency_key",
                value=request.idempotency_key,
                allowed="the same request as the first time, or a new key",
            )
        return found

    async def job(self, idempotency_key: str, tenant: str) -> str | None:
        """Return the id of the job that a key stands for, on record yet or not.

        Raises:
            RecordUnreadable: Somebody else wrote its record.
        """
        known = await self._read(idempotency_key, tenant)
        return None if known is None else known[0].job_id

    async def remember(
        self,
        request: GenerateRequest,
        job_id: str,
        seed: int,
        tenant: str = DEFAULT_TENANT,
        instead_of: str | None = None,
    ) -> Remembered:
        """Let a request's key stand for a job, unless it stands for one already.

        Args:
            request: As it was sent, with its key.
            job_id: For it, if it is new.
            seed: Drawn for it, if it is new.
            tenant: Whose keys are meant: others' mean other jobs.
            instead_of: The job that the key may stand for so far.

        Returns:
            What the key stands for from now on.

        Raises:
            IdempotencyConflict: Another request was sent under this key.
        """
        mine = Remembered(job_id, seed)
        body = {"id": job_id, "seed": seed, "request_sha256": _digest(request)}
        data = json.dumps(body).encode()
        key = _key(request.idempotency_key or "", tenant)
        before = None if instead_of is None else await self._store.get_with_etag(key)
        if before is None:
            if await self._store.put(key, data, _JSON, if_absent=True):
                return mine
        elif self._parsed(before[0], key)[0].job_id == instead_of and (
            await self._store.swap(key, data, _JSON, before[1]) is not None
        ):
            return mine
        return await self.find(request, tenant) or mine

    async def _read(self, idempotency_key: str, tenant: str) -> tuple[Remembered, str] | None:
        """Return what a key stands for, and the digest of what was asked."""
        key = _key(idempotency_key, tenant)
        data = await self._store.get(key)
        return None if data is None else self._parsed(data, key)

    def _parsed(self, data: bytes, key: str) -> tuple[Remembered, str]:
        try:
            content = json.loads(data)
            job_id, seed, digest = (content[name] for name in ("id", "seed", "request_sha256"))
        except (ValueError, TypeError, KeyError):
            job_id = seed = digest = None
        if is_job_id(job_id) and isinstance(seed, int) and 0 <= seed <= LARGEST_SEED:
            return Remembered(job_id, seed), str(digest)
        raise RecordUnreadable(
            "The record of an idempotency key cannot be read.",
            field="idempotency_key",
            value=self._store.s3_uri(key),
            allowed="a bucket or prefix of Kelvin's own",
        )


def _key(idempotency_key: str, tenant: str) -> str:
    # Keys are printable, so no key of one tenant is another's.
    whose = "" if tenant == DEFAULT_TENANT else f"{tenant}\0"
    return f"idempotency/{hashlib.sha256(f'{whose}{idempotency_key}'.encode()).hexdigest()}.json"


def _digest(request: GenerateRequest) -> str:
    """Return a digest of what was asked, the same where a default is left out or spelt out."""
    asked = request.model_dump(mode="json", exclude={"idempotency_key"}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

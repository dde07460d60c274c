"""Accepted ComfyUI prompts in the journal's store: one prompt is one or several of Kelvin's jobs.

    comfyui/{tenant}/prompts/{sha256 of prompt_id}.json    the workflow, and which job makes what
    comfyui/{tenant}/order/{countdown}-{sha256}            empty; for lists, newest first
    comfyui/{tenant}/open/{sha256}                         empty; its jobs may not have ended
    comfyui/{tenant}/jobs/{id}                             whose workflow a job's pictures carry,
                                                           where its id does not say that already

Jobs are accepted first, under idempotency keys made of prompt_id; the record is written before the
prompt is answered. So a prompt that was answered is found by every Pipeline and after any restart,
and who was not answered may send it again under its prompt_id and gets the same jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.comfyui_settings import COMFYUI
from serve.errors import InvalidRequest, RecordUnreadable
from serve.job_ids import checked
from serve.record_store import RecordStore
from serve.removal import delete_all
from serve.tenants import checked_tenant

_log = logging.getLogger("ray.serve")

_JSON = "application/json"
_EMPTY = b"{}\n"
_LONGEST_ID = 200
_LONGEST_KEYWORD = 79  # of a PNG's text chunk
_AT_ONCE = 4  # one may have 4 MiB, and takes several times that as Python's objects
_MOST_BYTES_LISTED = 8 << 20
_LISTED_AT_ONCE = 1000  # what a store lists in one answer
_LAST_MS = 10**13 - 1


class ChainRecord(BaseModel):
    """Which job makes the pictures of which nodes.

    Attributes:
        job: Its id.
        sampler: Id of the KSampler.
        encoder: Id of the node that encodes the prompt.
        decoder: Id of the node that decodes.
        outputs: Id of each output node -> prefix of its files' names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    sampler: str
    encoder: str
    decoder: str
    outputs: dict[str, str]


class PromptRecord(BaseModel):
    """One accepted prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    tenant: str
    number: int | float
    created_ms: int
    digest: str
    prompt: dict[str, Any]
    extra_data: dict[str, Any]
    chains: tuple[ChainRecord, ...]
    node_errors: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def client(self) -> str | None:
        """Who is sent its messages."""
        client = self.extra_data.get("client_id")
        return client if isinstance(client, str) else None

    def class_type(self, node: str) -> str:
        """Return the class of one of its nodes."""
        return str(self.prompt[node]["class_type"])

    def png_text(self) -> dict[str, str]:
        """Return the text chunks that ComfyUI writes into a picture: nodes.py, SaveImage."""
        info = self.extra_data.get("extra_pnginfo")
        more = info if isinstance(info, dict) else {}
        texts = {name: value for name, value in more.items() if _is_keyword(name)}
        return {name: json.dumps(value) for name, value in {**texts, "prompt": self.prompt}.items()}

    def queue_item(self) -> list[Any]:
        """Return what `/queue` and `/history` show of it."""
        outputs = [output for chain in self.chains for output in chain.outputs]
        return [self.number, self.id, self.prompt, self.extra_data, outputs]


class PromptRecords:
    """The prompts in one store. Every method raises StorageUnavailable where that is away.

    Args:
        store: Of the journal.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    async def write(self, record: PromptRecord) -> PromptRecord:
        """Write a prompt down, and return what stands there now: one of that id may have come."""
        folder, digest = _folder(record.tenant), _digest(record.id)
        named = json.dumps({"prompt": digest}).encode()
        data = record.model_dump_json().encode()
        key = f"{folder}prompts/{digest}.json"
        # At once: whoever finds the one without the others finds a prompt that was not answered.
        is_new, *_ = await asyncio.gather(
            self._store.put(key, data, _JSON, if_absent=True),
            self._store.put(order_key(record), _EMPTY, _JSON),
            self._store.put(f"{folder}open/{digest}", _EMPTY, _JSON),
            *(self._store.put(each, named, _JSON) for each in _job_keys(record)),
        )
        written = None if is_new else await self._read(key)
        if written is None:
            return record
        theirs = {order_key(written), *_job_keys(written)}
        ours = [order_key(record), *_job_keys(record)]
        await delete_all(self._store, [each for each in ours if each not in theirs])
        return written

    async def find(self, prompt_id: str, tenant: str) -> PromptRecord | None:
        """Return a tenant's prompt; None: there is none of that id."""
        return await self._read(f"{_folder(tenant)}prompts/{_digest(prompt_id)}.json")

    async def newest(self, tenant: str, most: int, skip: int = 0) -> list[PromptRecord]:
        """Return a tenant's newest prompts, oldest first; fewer where they are large.

        Args:
            tenant: Whose.
            most: How many.
            skip: So many newer ones are left out.
        """
        keys: list[str] = []
        while (missing := skip + most - len(keys)) > 0:
            after = keys[-1] if keys else ""
            page = min(missing, _LISTED_AT_ONCE)
            found = await self._store.list_some(f"{_folder(tenant)}order/", after, page)
            keys += found
            if len(found) < page:
                break
        return (await self._read_ordered(tenant, keys[skip:], _MOST_BYTES_LISTED))[::-1]

    async def since(
        self, tenant: str, since_ms: int, known: Collection[str] = ()
    ) -> AsyncIterator[PromptRecord]:
        """Yield a tenant's prompts, newest first, with few of them in memory at a time.

        Args:
            tenant: Whose.
            since_ms: Older ones are left out.
            known: `order_key` of prompts that are left out and not read.
        """
        beyond, after = _order_prefix(tenant, max(0, since_ms - 1)), ""
        while True:
            keys = await self._store.list_some(f"{_folder(tenant)}order/", after, _LISTED_AT_ONCE)
            new = [key for key in keys if key < beyond and key not in known]
            for begin in range(0, len(new), _AT_ONCE):
                for record in await self._read_ordered(tenant, new[begin : begin + _AT_ONCE]):
                    yield record
            if len(keys) < _LISTED_AT_ONCE or keys[-1] >= beyond:
                return
            after = keys[-1]

    async def of_job(self, job_id: str, tenant: str) -> PromptRecord | None:
        """Return the prompt that a tenant's job belongs to; None: it came through another door."""
        record = await self.find(drawn_id(checked(job_id)), tenant)
        if record is not None and _has_job(record, job_id):
            return record
        data = await self._store.get(f"{_folder(tenant)}jobs/{job_id}")
        if data is None:
            return None
        try:
            digest = str(json.loads(data)["prompt"])
        except (ValueError, TypeError, KeyError):
            return None
        is_ours = len(digest) == 64 and digest.isalnum()
        record = await self._read(f"{_folder(tenant)}prompts/{digest}.json") if is_ours else None
        return record if record is not None and _has_job(record, job_id) else None

    async def open(self, tenant: str) -> list[PromptRecord]:
        """Return a tenant's prompts whose jobs may not have ended, oldest first."""
        prefix = f"{_folder(tenant)}open/"
        keys = await self._store.list_keys(prefix)
        found = await self._read_some(tenant, [key.removeprefix(prefix) for key in keys])
        return sorted(found, key=lambda record: record.created_ms)

    async def close(self, record: PromptRecord) -> None:
        """Take a prompt whose jobs have all ended out of the open ones."""
        await self._store.delete(f"{_folder(record.tenant)}open/{_digest(record.id)}")

    async def forget(self, record: PromptRecord) -> None:
        """Remove a prompt from history; its pictures stay."""
        folder, digest = _folder(record.tenant), _digest(record.id)
        await delete_all(
            self._store,
            [
                order_key(record),
                f"{folder}open/{digest}",
                *_job_keys(record),
                f"{folder}prompts/{digest}.json",
            ],
        )

    async def _read_ordered(
        self, tenant: str, keys: list[str], most_bytes: float = math.inf
    ) -> list[PromptRecord]:
        """Return the prompts of keys below `order/`, as `_read_some` does.

        A prompt that was sent twice at the same time may have two until whoever came second has
        removed its own, or for good where that one died.
        """
        digests = dict.fromkeys(key.rsplit("-", 1)[-1] for key in keys)
        records = await self._read_some(tenant, list(digests), most_bytes)
        by_key = {order_key(record): record for record in records}
        return [by_key[key] for key in keys if key in by_key]

    async def _read_some(
        self, tenant: str, digests: list[str], most_bytes: float = math.inf
    ) -> list[PromptRecord]:
        """Return the prompts of these digests, in order, the last ones not where it gets too much.

        What cannot be read is left out: it must not hide the others.
        """
        found: list[PromptRecord] = []
        keys = [f"{_folder(tenant)}prompts/{digest}.json" for digest in digests]
        taken = 0
        for begin in range(0, len(keys), _AT_ONCE):
            some = keys[begin : begin + _AT_ONCE]
            for key, data in zip(
                some, await asyncio.gather(*map(self._store.get, some)), strict=True
            ):
                taken += len(data or b"")
                try:
                    found += [] if data is None else [self._parsed(key, data)]
                except RecordUnreadable as error:
                    _log.warning("%s %s", error.message, error.value)
            if taken >= most_bytes:
                break
        return found

    async def _read(self, key: str) -> PromptRecord | None:
        data = await self._store.get(key)
        return None if data is None else self._parsed(key, data)

    def _parsed(self, key: str, data: bytes) -> PromptRecord:
        try:
            return PromptRecord.model_validate_json(data)
        except ValidationError:
            raise RecordUnreadable(
                "The record of a prompt cannot be read.",
                field="prompt_id",
                value=self._store.s3_uri(key),
                allowed="a bucket or prefix of Kelvin's own",
            ) from None


def drawn_id(job_id: str) -> str:
    """Return the prompt_id of a prompt that was sent without one, from the id of its first job."""
    return str(uuid.UUID(hex=job_id))


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


def _is_keyword(name: str) -> bool:
    return 1 <= len(name) <= _LONGEST_KEYWORD and name.isascii() and name.isprintable()


def _folder(tenant: str) -> str:
    return f"{COMFYUI}{checked_tenant(tenant)}/"


def order_key(record: PromptRecord) -> str:
    """Return the key by which a prompt is listed; a later one of the same id has another."""
    return f"{_order_prefix(record.tenant, record.created_ms)}-{_digest(record.id)}"


def _order_prefix(tenant: str, created_ms: int) -> str:
    return f"{_folder(tenant)}order/{_LAST_MS - created_ms:013d}"


def _job_keys(record: PromptRecord) -> list[str]:
    folder = f"{_folder(record.tenant)}jobs/"
    jobs = [chain.job for chain in record.chains if drawn_id(chain.job) != record.id]
    return [f"{folder}{job}" for job in jobs]


def _has_job(record: PromptRecord, job_id: str) -> bool:
    return any(chain.job == job_id for chain in record.chains)


def _digest(prompt_id: str) -> str:
    return hashlib.sha256(prompt_id.encode()).hexdigest()

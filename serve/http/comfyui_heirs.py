"""Prompts whose record is not with the job of their first chain any more, which was deleted.

    comfyui/{tenant}/heirs/{digest of the prompt_id}.json    the record, its first chain one whose
                                                             job is left

A prompt of several chains outlives a job of it, so before its record goes with the job of the first
one it is written down here. It goes with the last of them, or once it is old: `serve.sweep`.
"""

from __future__ import annotations

import contextlib
import hashlib

from pydantic import ValidationError

from serve.comfyui_settings import COMFYUI
from serve.http.comfyui_record import PromptRecord
from serve.record_store import RecordStore
from serve.tenants import checked_tenant

_JSON = "application/json"


class Heirs:
    """The records in one store. Every method raises StorageUnavailable where that is away.

    Args:
        store: Of the journal.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    async def find(self, prompt_id: str, tenant: str) -> PromptRecord | None:
        """Return a tenant's prompt; None: its record is with its job, or there is none."""
        data = await self._store.get(_key(prompt_id, tenant))
        if data is None:
            return None
        with contextlib.suppress(ValidationError):
            record = PromptRecord.model_validate_json(data)
            # What was copied from elsewhere would be answered with another one's jobs.
            if (record.id, record.tenant) == (prompt_id, tenant):
                return record
        return None

    async def keep(self, record: PromptRecord) -> None:
        """Write a prompt down, its first chain one whose job is left."""
        data = record.model_dump_json().encode()
        await self._store.put(_key(record.id, record.tenant), data, _JSON)

    async def drop(self, record: PromptRecord) -> None:
        """Remove a prompt; no harm if it is not here."""
        await self._store.delete(_key(record.id, record.tenant))


def _key(prompt_id: str, tenant: str) -> str:
    digest = hashlib.sha256(prompt_id.encode()).hexdigest()
    return f"{COMFYUI}{checked_tenant(tenant)}/heirs/{digest}.json"

"""Deleting a job: its record, its pictures, and all that could bring it back.

`jobs/{id}/result.json` is written over first and stays as a mark that says "deleted": whoever still
works on the job finds that it has ended and cannot publish it again. From then on nobody finds the
job, and what is left of it goes. `serve.sweep` removes old marks, and finishes what broke off.
"""

from __future__ import annotations

import asyncio

from serve.inputs import INPUT_FILE
from serve.job_ids import checked
from serve.listing_keys import listing_key
from serve.record_store import RecordStore
from serve.storage import ObjectStore
from serve.tenants import pictures_prefix

DELETED = b'{"deleted": true}\n'
_JSON = "application/json"
_AT_ONCE = 16


class Removal:
    """Deletes jobs.

    Every method raises StorageUnavailable where a store does not answer; what is left then is
    deleted by the next try.

    Args:
        records: The journal's store.
        pictures: Their store.
    """

    def __init__(self, records: RecordStore, pictures: ObjectStore) -> None:
        self._records = records
        self._pictures = pictures

    async def delete(self, job_id: str, tenant: str) -> int:
        """Delete a tenant's job that has ended, and return how many pictures it had.

        What it started from goes too.
        """
        folder = f"jobs/{checked(job_id)}/"
        mark = f"{folder}result.json"
        await self._records.put(mark, DELETED, _JSON)
        # It stays too: whoever works on the job looks for it, and stops.
        request = f"{folder}request.json"
        kept = {mark, f"{folder}cancel.json", request}
        records = [key for key in await self._records.list_keys(folder) if key not in kept]
        pictures = await self._pictures.list_keys(f"{pictures_prefix(tenant)}{job_id}/")
        await delete_all(self._pictures, pictures)
        listed = [listing_key(job_id, tenant, by_door=by_door) for by_door in (False, True)]
        await delete_all(self._records, [*records, *listed])
        # Last: while it is there, a deletion that broke off can be asked for again.
        await self._records.delete(request)
        return sum(not key.endswith(f"/{INPUT_FILE}") for key in pictures)


async def delete_all(store: RecordStore, keys: list[str]) -> None:
    """Delete objects, some at a time."""
    for begin in range(0, len(keys), _AT_ONCE):
        await asyncio.gather(*map(store.delete, keys[begin : begin + _AT_ONCE]))

"""Leases as objects: `leases/{pipeline}.json`, one per Pipeline process and epoch.

`{pipeline}` is the process's own random name and its epoch, so a name that has ended never comes
back. All changes are conditional on the ETag: of an owner who renews and a reader who ends the
lease at the same time, exactly one succeeds.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import StorageUnavailable
from serve.record_store import RecordStore

_PREFIX = "leases/"
_SUFFIX = ".json"
_JSON = "application/json"
_ENDED = "ended"


@dataclass(frozen=True)
class Lease:
    """One's own lease as it was last written."""

    name: str
    etag: str
    renewals: int = 0


class LeaseStore:
    """The leases in one journal's store.

    Every method raises StorageUnavailable where the store does not answer.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._is_checked = False

    async def take(self, process: str, epoch: int, facts: Mapping[str, Any]) -> Lease:
        """Write a lease that nobody has had.

        Args:
            process: Random name of this process, hexadecimal.
            epoch: How many leases it has had before.
            facts: For people who look into the store: replica, node, process id.
        """
        name = f"{process}-{epoch}"
        body = _body({**facts, "pipeline": name, "epoch": epoch, "renewals": 0})
        etag = await self._store.swap(_key(name), body, _JSON, None)
        if etag is None:
            raise RuntimeError(f"lease {name} exists: two processes have one name")
        if not self._is_checked:
            await self._check_conditions(name, body)
        return Lease(name, etag)

    async def _check_conditions(self, name: str, body: bytes) -> None:
        """Refuse a store that takes writes whose condition does not hold.

        `kelvin up` and `kelvin doctor` find that out first; `serve deploy` does not ask them.
        """
        for etag in (None, '"not-its-etag"'):
            if await self._store.swap(_key(name), body, _JSON, etag) is not None:
                await self._store.delete(_key(name))
                raise StorageUnavailable(
                    "The journal's store ignores conditional writes, so a job could be published "
                    "twice: pictures may lie there, the journal may not.",
                    field="journal.storage",
                    value=self._store.s3_uri(_key(name)),
                    allowed="a store with conditional writes: AWS S3, MinIO, SeaweedFS, R2",
                )
        self._is_checked = True

    async def renew(self, lease: Lease, facts: Mapping[str, Any]) -> Lease | None:
        """Rewrite one's own lease; None: somebody has ended it."""
        renewals = lease.renewals + 1
        body = _body({**facts, "pipeline": lease.name, "renewals": renewals})
        etag = await self._store.swap(_key(lease.name), body, _JSON, lease.etag)
        if etag is None:
            etag = await self._own_etag(lease.name)
            renewals = lease.renewals
        return None if etag is None else replace(lease, etag=etag, renewals=renewals)

    async def _own_etag(self, name: str) -> str | None:
        """Return the ETag of a lease that its owner wrote last: an answer to it was lost."""
        found = await self._store.get_with_etag(_key(name))
        return None if found is None or _ENDED in json.loads(found[0]) else found[1]

    async def etags(self) -> dict[str, str]:
        """Return name -> ETag of all leases."""
        found = await self._store.list_etags(_PREFIX)
        return {
            key.removeprefix(_PREFIX).removesuffix(_SUFFIX): etag for key, etag in found.items()
        }

    async def end(self, name: str, etag: str) -> bool:
        """End somebody's stale lease unless its owner has renewed it.

        Written over first: a DELETE with a condition is not to be had everywhere. Who dies in
        between leaves an object that nobody renews, so that it goes stale and is ended again.

        Returns:
            True if the owner can renew it no more.
        """
        body = _body({"pipeline": name, _ENDED: secrets.token_hex(8)})
        if await self._store.swap(_key(name), body, _JSON, etag) is None:
            return False
        await self._store.delete(_key(name))
        return True


def _key(name: str) -> str:
    return f"{_PREFIX}{name}{_SUFFIX}"


def _body(content: Mapping[str, Any]) -> bytes:
    # Different each time, so that no store can give two writes one ETag.
    return (json.dumps(dict(content)) + "\n").encode()

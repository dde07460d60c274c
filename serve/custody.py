"""This Pipeline's own lease: taken, renewed, lost and taken anew.

What it holds a lease for it may start and publish. Between losing one lease, which is another
process's decision, and taking the next it does neither.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from typing import Any

from serve.errors import KelvinError, StorageUnavailable
from serve.lease_store import Lease, LeaseStore
from serve.leases import RENEWALS_PER_LEASE, Tenure

_log = logging.getLogger("ray.serve")


class Custody:
    """Keeps one process's lease.

    Args:
        leases: Where it lies.
        lease_s: The same for all Pipelines of one journal.
        facts: About this process, for people who look into the store.
        began_anew: Called with the old and the new name after a lease was lost and the next taken.
    """

    def __init__(
        self,
        leases: LeaseStore,
        lease_s: float,
        facts: Mapping[str, Any],
        began_anew: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._leases = leases
        self._tenure = Tenure(lease_s)
        self._every_s = lease_s / RENEWALS_PER_LEASE
        self._facts = dict(facts)
        self._began_anew = began_anew
        self._process = secrets.token_hex(8)
        self._epoch = 0
        self._lease: Lease | None = None
        self._is_released = False
        self._busy = asyncio.Lock()

    @property
    def name(self) -> str | None:
        """Name of the lease, held or only believed in; None before the first."""
        return None if self._lease is None else self._lease.name

    @property
    def is_held(self) -> bool:
        """Whether nobody can take this process for dead yet."""
        return self._lease is not None and self._tenure.is_held(monotonic())

    async def holding(self) -> str:
        """Return the name of the lease held; take or renew it if need be.

        Raises:
            StorageUnavailable: It cannot be had now.
        """
        for _ in range(2):
            if not self.is_held:
                await self.keep()  # which may take longer than the lease, the first time
        if self._lease is None or not self.is_held:
            raise StorageUnavailable(
                "This Pipeline cannot renew its lease in the journal, so others may take its jobs.",
                field="journal.lease_s",
                allowed="an object store that answers well within the lease",
            )
        return self._lease.name

    async def keep(self) -> None:
        """Take the lease or renew it, once.

        Raises:
            StorageUnavailable: The store does not answer; what is held runs on until it expires.
        """
        async with self._busy:
            if self._is_released:
                raise StorageUnavailable("This Pipeline has given its lease back: it is stopping.")
            before, sent = self._lease, monotonic()
            if before is not None:
                self._lease = await self._leases.renew(before, self._facts)
            if self._lease is None:
                if before is not None:
                    self._tenure.lost()
                    _log.warning("Lease %s has been ended by another Pipeline.", before.name)
                sent = monotonic()
                self._epoch += 1
                self._lease = await self._leases.take(self._process, self._epoch, self._facts)
            self._tenure.renewed(sent)
            if before is not None and before.name != self._lease.name:
                await self._began_anew(before.name, self._lease.name)

    async def release(self) -> None:
        """End the lease and take no other, so that nobody waits for it to expire.

        Raises:
            StorageUnavailable: The store does not answer; the lease expires.
        """
        async with self._busy:
            self._is_released = True
            self._tenure.lost()
            if self._lease is not None:
                await self._leases.end(self._lease.name, self._lease.etag)

    async def run(self) -> None:
        """Keep the lease until cancelled."""
        failing = False
        while True:
            try:
                await self.keep()
                failing = False
            except KelvinError as error:
                if not failing:
                    _log.warning("The lease cannot be renewed: %s", error)
                failing = True
            except Exception:
                _log.exception("The lease was not renewed for a reason nobody foresaw.")
            await asyncio.sleep(self._every_s)

"""Retention: old jobs go with their pictures, and so does what nothing refers to.

Never touched is what is pending, however old. A job's start image goes when the job goes; what was
sent beforehand, to start from, goes once it is as old as jobs that go. A picture that no result
names was uploaded by whoever lost the race to publish, or by a process that died first; it goes
once it is an hour old. Ages are by the store's clock and this machine's; retention does not mind
seconds.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.comfyui_settings import COMFYUI
from serve.inputs import INPUT_FILE, UPLOADS
from serve.job_ids import accepted_seconds_ago, is_job_id
from serve.listing_keys import LISTING, job_of
from serve.removal import DELETED, delete_all
from serve.storage import Listed, ObjectStore

_UNREFERENCED_AFTER_S = 3600.0
_LEASE_AFTER_S = 86_400.0
_AT_ONCE = 16


@dataclass
class Swept:
    """What a sweep removed, or would."""

    jobs: int = 0
    pictures_of_jobs: int = 0
    unreferenced_pictures: int = 0
    uploads: int = 0
    comfyui_records: int = 0
    idempotency_keys: int = 0
    leases: int = 0
    bytes: int = 0
    _records: list[str] = field(default_factory=list, repr=False)
    _pictures: list[str] = field(default_factory=list, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the numbers."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


class Sweep:
    """One sweep.

    Args:
        records: The journal's store.
        pictures: Their store, which mostly is the same.
        older_than_s: Jobs that ended and were accepted longer ago go.
        now: Seconds of Unix time.
    """

    def __init__(
        self, records: ObjectStore, pictures: ObjectStore, older_than_s: float, now: float
    ) -> None:
        self._records = records
        self._pictures = pictures
        self._older_than_s = older_than_s
        self._now = now

    async def run(self, *, dry: bool = False) -> Swept:
        """Remove what is old or belongs to nothing.

        Args:
            dry: Only count it.

        Raises:
            StorageUnavailable: A store does not answer; the next sweep goes on.
        """
        swept = Swept()
        # First: what is accepted after this is young, what ends after this is spared.
        pending = {
            entry.key.rsplit("/", 1)[-1] for entry in await self._records.list_entries("pending/")
        }
        jobs = await _by_job(self._records, "jobs/")
        pictures = await _by_job(self._pictures, "images/")
        kept: list[str] = []
        for job_id in sorted({*jobs, *pictures} - pending):
            own = jobs.get(job_id, [])
            if not own:
                self._unreferenced(pictures[job_id], frozenset(), swept)
            elif self._is_old(job_id, own):
                swept.jobs += 1
                swept.pictures_of_jobs += sum(
                    not each.key.endswith(f"/{INPUT_FILE}") for each in pictures.get(job_id, [])
                )
                swept.bytes += sum(each.size for each in (*own, *pictures.get(job_id, [])))
                swept._records += [each.key for each in own]
                swept._pictures += [each.key for each in pictures.get(job_id, [])]
            else:
                kept.append(job_id)
        await self._late_losers(kept, pictures, swept)
        await self._listings({*kept, *pending}, swept)
        await self._others(swept)
        if not dry:
            # Pictures first: a record whose pictures are gone is found by the next sweep, a picture
            # without a record is a stranger.
            await delete_all(self._pictures, swept._pictures)
            await delete_all(self._records, sorted(swept._records, key=_result_last))
        return swept

    async def _late_losers(
        self, jobs: Sequence[str], pictures: Mapping[str, Sequence[Listed]], swept: Swept
    ) -> None:
        suspects = [
            job_id
            for job_id in jobs
            if any(self._age_s(each) > _UNREFERENCED_AFTER_S for each in pictures.get(job_id, ()))
        ]
        for begin in range(0, len(suspects), _AT_ONCE):
            some = suspects[begin : begin + _AT_ONCE]
            results = await asyncio.gather(*map(self._named, some))
            for job_id, named in zip(some, results, strict=True):
                if named is not None:
                    self._unreferenced(pictures[job_id], named, swept)

    def _is_old(self, job_id: str, own: Sequence[Listed]) -> bool:
        """Return whether a job that is not pending goes.

        One without a result was never accepted: its Pipeline died while it wrote it down.
        """
        least_s = self._older_than_s
        if not any(each.key.endswith("/result.json") for each in own):
            least_s = max(least_s, _UNREFERENCED_AFTER_S)
        return accepted_seconds_ago(job_id, self._now) > least_s and all(
            self._age_s(each) > least_s for each in own
        )

    async def _named(self, job_id: str) -> frozenset[str] | None:
        """Return the keys of what a job's result names; None: there is no saying."""
        data = await self._records.get(f"jobs/{job_id}/result.json")
        if data is None:
            return None
        if data == DELETED:
            return frozenset()
        try:
            record = json.loads(data)
            result = record.get("result") or {}
            uris = [str(image["s3_uri"]) for image in result.get("images", ())]
            uris.append(str((record.get("request") or {}).get("init_image")))
        except (ValueError, AttributeError, TypeError, KeyError):
            return None
        return frozenset(filter(None, map(self._pictures.key_of, uris)))

    def _unreferenced(
        self, pictures: Sequence[Listed], named: frozenset[str], swept: Swept
    ) -> None:
        for picture in pictures:
            if picture.key not in named and self._age_s(picture) > _UNREFERENCED_AFTER_S:
                swept.unreferenced_pictures += 1
                swept.bytes += picture.size
                swept._pictures.append(picture.key)

    async def _listings(self, jobs: Collection[str], swept: Swept) -> None:
        for entry in await self._records.list_entries(LISTING):
            # One that is young may be of a job that was accepted after jobs were listed.
            if job_of(entry.key) not in jobs and self._age_s(entry) > _UNREFERENCED_AFTER_S:
                swept._records.append(entry.key)

    async def _others(self, swept: Swept) -> None:
        least_s = max(self._older_than_s, _UNREFERENCED_AFTER_S)
        keys = await self._older(self._records, "idempotency/", least_s)
        uploads = await self._older(self._pictures, UPLOADS, least_s)
        # Names that uploads have in workflows; what a prompt was goes with its jobs.
        prompts = await self._older(self._records, COMFYUI, least_s)
        leases = await self._older(self._records, "leases/", _LEASE_AFTER_S)
        swept.idempotency_keys += len(keys)
        swept.uploads += len(uploads)
        swept.comfyui_records += len(prompts)
        swept.leases += len(leases)
        swept.bytes += sum(each.size for each in uploads)
        swept._pictures += [each.key for each in uploads]
        swept._records += [each.key for each in (*keys, *prompts, *leases)]

    async def _older(self, store: ObjectStore, prefix: str, least_s: float) -> list[Listed]:
        entries = await store.list_entries(prefix)
        return [entry for entry in entries if self._age_s(entry) > least_s]

    def _age_s(self, entry: Listed) -> float:
        return self._now - entry.modified


async def _by_job(store: ObjectStore, prefix: str) -> dict[str, list[Listed]]:
    found: dict[str, list[Listed]] = defaultdict(list)
    for entry in await store.list_entries(prefix):
        # Pictures lie beneath a tenant's name, which is no id.
        job_id = next(filter(is_job_id, entry.key.removeprefix(prefix).split("/")[:2]), None)
        if job_id is not None:
            found[job_id].append(entry)
    return found


def _result_last(key: str) -> bool:
    # While it is there nobody can publish the job again.
    return key.endswith("/result.json")
